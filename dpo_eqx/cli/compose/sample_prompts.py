"""The prompts that a run answers while it learns: those of `--sample-prompts`, or held-out ones.

`run/samples.py` draws the answers.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ..settings.settings import Settings
from ..terminal.prompts import Prompt, read_prompts
from .data import Prepared, learned_positions, vocab_size
from .draws import Encoded, check_fits, encode
from .tokenizer import tokenizer_of

# The number of prompts from the data, and the largest number from a file.
FROM_DATA, FROM_FILE = 4, 32


@dataclasses.dataclass(frozen=True)
class SamplePrompts:
    """Prompts, and the tokenizer that decodes their answers; `None` if all data are ids."""

    encoded: Encoded
    tokenizer: Any


def sample_prompts(settings: Settings, prepared: Sequence[Prepared]) -> SamplePrompts | None:
    """The prompts of `--sample-every`; `None` without it.

    **Arguments:**

    - `prepared`: the training data, and the held-out sets if there are any.

    **Raises:**

    `ValueError` or `FileNotFoundError` if `--sample-prompts` holds no prompts, too many, or one
    that does not fit the model.
    """
    if not settings.sample_every:
        return None
    source = prepared[1] if prepared[1:] else prepared[0]
    given = _given(settings)
    is_ids = source.form.tokenized and all(prompt.ids is not None for prompt in given)
    tokenizer = None if is_ids else tokenizer_of(settings)
    return _that_fit(settings, given or list(_first_of(source)), tokenizer)


def sample_prompts_among(
    settings: Settings, prompts: Sequence[Prompt], tokenizer: Any
) -> SamplePrompts | None:
    """`sample_prompts` for a run on prompts alone: the first of them by default.

    **Raises:**

    The errors of `sample_prompts`.
    """
    if not settings.sample_every:
        return None
    return _that_fit(settings, _given(settings) or prompts[:FROM_DATA], tokenizer)


def _given(settings: Settings) -> list[Prompt]:
    return _read(settings.sample_prompts) if settings.sample_prompts else []


def _that_fit(settings: Settings, prompts: Sequence[Prompt], tokenizer: Any) -> SamplePrompts:
    found = encode(
        prompts,
        tokenizer,
        as_turns=settings.as_chat,
        max_prompt_length=settings.max_prompt_length,
    )
    positions = learned_positions(settings.model, settings.reference)
    try:
        check_fits(found, positions, settings.sample_tokens, vocab_size(settings.model))
    except ValueError as error:
        raise ValueError(str(error).replace("--max-new-tokens", "--sample-tokens")) from None
    return SamplePrompts(found, tokenizer)


def _read(path: str) -> list[Prompt]:
    try:
        found = read_prompts(path, FROM_FILE + 1)
    except (ValueError, FileNotFoundError) as error:
        message = str(error).replace("`path_or_iterable`", "`--sample-prompts`")
        raise type(error)(message.replace("`--data`", "`--sample-prompts`")) from None
    if len(found) > FROM_FILE:
        raise ValueError(
            f"`--sample-prompts` must hold at most {FROM_FILE} prompts, since all of them are "
            f"answered every `--sample-every` steps; {path} holds more. Give a file with fewer."
        )
    return found


def _first_of(source: Prepared) -> Iterator[Prompt]:
    """The first different prompts of a source, as ids."""
    seen: list[list[int]] = []
    for number in range(len(source.rows)):
        row = source.rows[number]
        ids = list(row["prompt_ids"]) or [row.get("start_id") or 0]
        if ids not in seen:
            seen.append(ids)
            yield Prompt(ids, f"row {number + 1} of the data")
        if len(seen) == FROM_DATA:
            return
