"""From `--reward` to a judge of answers: a Python function, or a reward model with its tokenizer.

Both judge texts, so that a reward model may have another tokenizer than the policy.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float

from ... import data, models
from ..._onpolicy.text_rewards import TextReward, judge_texts
from ...data._tokens.rows import Row
from ..settings.options import dtype_of
from ..settings.words import in_flags, naming
from ..terminal.answers import padded
from .data import learned_positions
from .tokenizer import load_tokenizer

# The least width of a row. Each further one is twice as wide: few widths, few compilations.
_FIRST_WIDTH = 64


class Asked(NamedTuple):
    """An answer to judge: its prompt (text or messages), and its text.

    `columns` are the prompt's `tools` and `chat_template_kwargs`, if it has them.
    """

    prompt: Any
    answer: str
    columns: Mapping[str, Any]


# What errors say of a policy and its tokenizer, as patterns, and what holds for a reward model.
_OF_POLICY = {
    "`--model`": "`--reward`",
    "`--tokenizer` must": "The tokenizer of `--reward` must",
    r"record \d+ of `--data`": "an answer with its prompt",
    "Take the policy's own tokenizer": "Put the tokenizer that the reward model was trained with "
    "into its folder",
}
_MERGED = (
    "load the base, and give this folder to `models.load_lora`",
    "give the folder with the merged model, such as `model` of the run that trained it",
)

Judge = Callable[[Sequence[Asked]], Float[np.ndarray, " answers"]]


def function_judge(function: TextReward, *, most: int, timeout: float | None) -> Judge:
    """A judge that calls a Python function with at most `most` prompts and answers.

    `timeout` is the longest time of a call, in seconds.
    """

    def judge(asked: Sequence[Asked]) -> Float[np.ndarray, " answers"]:
        prompts, answers = [one.prompt for one in asked], [one.answer for one in asked]
        return judge_texts(function, prompts, answers, batch_size=most, timeout=timeout)

    return judge


def model_judge(
    reward: str, *, chat_template: str, template_flag: str, dtype: str | None, most: int
) -> Judge:
    """A judge that runs a reward model on texts, by its own tokenizer and chat template.

    A text and its answer are tokenised as `train` tokenises them: an EOS ends a text.

    **Arguments:**

    - `reward`: the folder or hub name of the model.
    - `chat_template`, `template_flag`: its chat template, and the name of the flag that gave it.
    - `dtype`: the dtype of its parameters; `None` for that of the checkpoint.
    - `most`: the largest number of answers in a call.

    **Raises:**

    `ValueError` or `OSError` if the folder holds another model, or lacks a tokenizer. The judge
    raises `ValueError` if an answer cannot be tokenised, is too long, or has a reward that is not
    finite.
    """
    model = _loaded(reward, dtype)
    with _naming_its_flags(template_flag):
        tokenizer = load_tokenizer(reward, None, chat_template)
    positions = learned_positions(reward)
    # The model is an argument: a constant of the program would be a copy of it.
    run = eqx.filter_jit(lambda model, ids, lengths: jax.vmap(model)(ids, lengths))

    def judge(asked: Sequence[Asked]) -> Float[np.ndarray, " answers"]:
        with _naming_its_flags(template_flag):
            rows = _rows(asked, tokenizer, model.body.config.vocab)
        if positions is not None:
            _check_lengths(rows, asked, positions)
        filled = rows + [rows[0]] * (most - len(rows))
        tokens = padded(filled, _width(max(map(len, rows)), positions))
        rewards = run(model, tokens.ids, tokens.mask.sum(axis=1))
        return judge_finite(np.asarray(rewards, np.float64)[: len(rows)], asked)

    return judge


def _loaded(reward: str, dtype: str | None) -> models.RewardModel:
    """The reward model in the folder that `--reward` names."""
    required = (
        "`--reward` must be a reward model (`*ForSequenceClassification` with one label), or a "
        "Python function as `module:function`"
    )
    try:
        with naming("--reward"):
            model = models.load(reward, dtype=dtype_of(dtype))
    except (ValueError, OSError) as error:
        if "`--reward`" in str(error):
            raise
        message = str(error).replace(*_MERGED)
        raise ValueError(f"{required}; {reward} cannot be loaded as one: {message}") from error
    if not isinstance(model, models.RewardModel):
        raise ValueError(
            f"{required}; {reward} holds a language model. Train a reward model with `dpo-eqx "
            "train --loss bradley_terry --reward-head`."
        )
    return model


@contextlib.contextmanager
def _naming_its_flags(template_flag: str) -> Iterator[None]:
    """Lets errors name the flags of the reward model, and not those of the policy."""
    try:
        yield
    except (ValueError, OSError) as error:
        # Before `in_flags`, which has advice for the policy alone.
        message = in_flags(str(error).replace("`--model`", "`--reward`"))
        for pattern, words in _OF_POLICY.items():
            message = re.sub(pattern, words, message)
        message = message.replace("`--chat-template", f"`{template_flag}")
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(message) from error


def judge_finite(
    rewards: Float[np.ndarray, " answers"], asked: Sequence[Asked]
) -> Float[np.ndarray, " answers"]:
    """`rewards`, or a `ValueError` if one of them is not finite."""

    def known(prompts: list[Any], answers: list[str]) -> Float[np.ndarray, " answers"]:
        return rewards

    return function_judge(known, most=len(asked), timeout=None)(asked)


def _rows(asked: Sequence[Asked], tokenizer: Any, vocab: int) -> list[list[int]]:
    """The ids of each prompt with its answer, in their order."""
    rows: list[list[int]] = [[] for _ in asked]
    # A source of records holds texts or conversations, not both.
    for is_turns in (False, True):
        places = [i for i, one in enumerate(asked) if isinstance(one.prompt, list) is is_turns]
        if places:
            records = [_record(asked[i], is_turns=is_turns) for i in places]
            for place, row in zip(places, _tokenized(records, tokenizer, vocab), strict=True):
                rows[place] = [*row["prompt_ids"], *row["completion_ids"]]
    return rows


def _record(one: Asked, *, is_turns: bool) -> dict[str, Any]:
    answer = [{"role": "assistant", "content": one.answer}] if is_turns else one.answer
    return {"prompt": one.prompt, "completion": answer, "label": True, **one.columns}


def _tokenized(records: list[dict[str, Any]], tokenizer: Any, vocab: int) -> list[Row]:
    rows, report = data.tokenize(data.read(records), tokenizer, vocab_size=vocab)
    if len(rows) < len(records):
        raise ValueError(
            f"`--reward` must be able to judge each answer; its tokenizer drops some: {report}\n"
            "Give another `--chat-template`, or another reward model."
        )
    return list(rows)


def _check_lengths(rows: list[list[int]], asked: Sequence[Asked], positions: int) -> None:
    for row, one in zip(rows, asked, strict=True):
        if len(row) > positions:
            raise ValueError(
                f"The reward model has learned positions for {positions} tokens, and the answer "
                f"{one.answer[:80]!r} with its prompt has {len(row)}. Draw shorter answers "
                "by `--max-new-tokens`, or give another `--reward`."
            )


def _width(longest: int, positions: int | None) -> int:
    width = _FIRST_WIDTH
    while width < longest:
        width *= 2
    return width if positions is None else min(width, positions)
