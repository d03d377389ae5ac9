"""From prompts to drawn answers: their ids and widths, the keys, and the lines of `samples.jsonl`.

`models.sample` draws. Nothing here reads or writes a file of lines.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ... import models, sharding
from ..._arrays.samples import Samples
from ..._arrays.tokens import Tokens
from ...data._batches.buckets import choose_buckets
from ...data._records.as_chat import as_chat
from ..terminal.answers import MULTIPLE, ends_of, padded
from ..terminal.prompts import Prompt, encode_prompt, stored
from ..terminal.texts import continuation

# What a prompt gives its chat template besides its messages; training needs it again.
_CARRIED = ("tools", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Prompts as token ids, and what the user is told about them.

    - `prompts`: the prompts; `ids`: their token ids.
    - `cut`: the number of prompts that lost their start.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """Neighbouring prompts that are drawn for at once.

    - `numbers`: the number of each prompt among all of them.
    - `width`: the width that they are padded to.
    """

    numbers: range
    width: int


def encode(
    prompts: Sequence[Prompt], tokenizer: Any, *, as_turns: bool, max_prompt_length: int | None
) -> Encoded:
    """The ids of prompts, as `train` reads them: texts as they are, messages by the chat template.

    **Arguments:**

    - `as_turns`: whether a text becomes the user's turn, as by `--as-chat`.
    - `max_prompt_length`: the largest number of tokens; a longer prompt loses its start.

    **Raises:**

    `ValueError` that names the place of a prompt that cannot be encoded.
    """
    asked = [_as_turns(prompt) if as_turns else prompt for prompt in prompts]
    ids = [encode_prompt(tokenizer, prompt, chat=False) for prompt in asked]
    if max_prompt_length is None:
        return Encoded(asked, ids)
    cut = sum(len(row) > max_prompt_length for row in ids)
    return Encoded(asked, [row[-max_prompt_length:] for row in ids], cut)


def _as_turns(prompt: Prompt) -> Prompt:
    if not isinstance(prompt.value, str):
        return prompt
    # With an answer, since only records with an answer become conversations.
    record = as_chat({"prompt": prompt.value, "completion": ""}, prompt.where)
    return dataclasses.replace(prompt, value=record["prompt"])


def check_fits(encoded: Encoded, positions: int | None, max_new_tokens: int, vocab: int) -> None:
    """Raises `ValueError` if a prompt and its answer have more tokens than the model takes.

    **Arguments:**

    - `positions`: the number of learned positions; `None` if positions are not learned.
    - `vocab`: the size of the model's vocabulary.
    """
    lengths = np.array([len(row) for row in encoded.ids])
    for prompt, row in zip(encoded.prompts, encoded.ids, strict=True):
        if max(row) >= vocab:
            raise ValueError(
                f"{prompt.where} has the id {max(row)}, and the vocabulary of `--model` has {vocab}"
                " tokens. Give the tokenizer of the model."
            )
    if positions is None or not (too_long := lengths + max_new_tokens > positions).any():
        return
    worst = encoded.prompts[int(lengths.argmax())]
    remedy = "Give a smaller `--max-new-tokens`"
    if positions > max_new_tokens:
        remedy += f", or `--max-prompt-length {positions - max_new_tokens}`"
    raise ValueError(
        f"The model has learned positions for {positions} tokens, and with `--max-new-tokens "
        f"{max_new_tokens}` {too_long.sum()} of {len(lengths)} prompts may need more: "
        f"{worst.where} has {lengths.max()}. {remedy}."
    )


def batches_of(lengths: Sequence[int], share: range, batch_size: int, buckets: int) -> list[Batch]:
    """The batches of a share of all prompts, padded to at most `buckets` widths."""
    numbers = [
        range(start, min(start + batch_size, share.stop))
        for start in range(share.start, share.stop, batch_size)
    ]
    longest = np.array([max(lengths[i] for i in part) for part in numbers])
    if not len(longest):
        return []
    # Prompts have one column here; the rows of `data.batches` have two.
    chosen = choose_buckets(np.stack([longest, longest], axis=1), buckets, MULTIPLE).prompt
    widths = np.array(chosen)[np.searchsorted(chosen, longest)]
    return [Batch(*pair) for pair in zip(numbers, widths.tolist(), strict=True)]


def make_draw(
    policy: models.Transformer,
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[Encoded, Batch], Samples]:
    """A function that draws the answers to the prompts of a batch.

    A prompt's key depends on `seed` and on its number alone, and a sample's key on these and on
    the sample's number: neither batches nor processes change what is drawn.

    **Arguments:**

    - `batch_size`: a smaller batch is filled up to it, so that each width is one compilation.
    - `mesh`: the devices that the policy and the prompts are split over, if there are several.
    - `options`: further arguments of `models.sample`.
    """
    ends = ends_of(policy, tokenizer)
    key = jax.random.key(seed)

    def draw(encoded: Encoded, batch: Batch) -> Samples:
        numbers = list(batch.numbers) + [batch.numbers[0]] * (batch_size - len(batch.numbers))
        rows = padded([encoded.ids[i] for i in numbers], batch.width)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(numbers, np.uint32))
        if mesh is not None:
            rows, keys = sharding.shard_batch((rows, keys), mesh)
        samples = models.sample(policy, rows, key=keys, eos=ends, **options)
        return jax.tree.map(lambda x: np.asarray(x)[: len(batch.numbers)], samples)

    return draw


def lines_of(
    encoded: Encoded, batch: Batch, samples: Samples, tokenizer: Any, *, seed: int, ends: tuple
) -> Iterator[dict[str, Any]]:
    """A line for each prompt of a batch: the prompt as given, and its answers."""
    for place, number in enumerate(batch.numbers):
        prompt = encoded.prompts[number]
        tokens = jax.tree.map(lambda x, place=place: x[place], samples.tokens)
        rows, texts, ended = answers_of(encoded, number, tokens, tokenizer, ends)
        yield {
            **({} if prompt.ids is None else {"prompt_ids": prompt.ids}),
            "prompt": stored(tokenizer, prompt),
            **carried(prompt.columns),
            "answers": texts,
            **({} if prompt.ids is None else {"answer_ids": rows}),
            "log_probs": [float(x) for x in samples.log_probs[place]],
            "tokens": [len(row) for row in rows],
            "ended": ended,
            "seed": seed,
            "number": number,
        }


def answers_of(
    encoded: Encoded, number: int, tokens: Tokens, tokenizer: Any, ends: tuple[int, ...]
) -> tuple[list[list[int]], list[str], list[bool]]:
    """The ids of the answers to a prompt, their texts without an end, and whether each has ended.

    **Arguments:**

    - `number`: the number of the prompt.
    - `tokens`: its answers, in NumPy. Shape `(samples, length)`.
    - `ends`: the tokens that end an answer.
    """
    rows = [row[mask].tolist() for row, mask in zip(tokens.ids, tokens.mask, strict=True)]
    ended = [bool(row) and row[-1] in ends for row in rows]
    texts = [row[:-1] if is_ended else row for row, is_ended in zip(rows, ended, strict=True)]
    # A text continues the text of its prompt; the content of a turn stands alone.
    before = encoded.ids[number] if isinstance(encoded.prompts[number].value, str) else []
    return rows, [continuation(tokenizer, before, row) for row in texts], ended


def carried(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a prompt that its chat template gets."""
    return {name: columns[name] for name in _CARRIED if name in columns}
