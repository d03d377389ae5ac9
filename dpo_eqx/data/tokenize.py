"""Tokenising: from records to rows of ids, the boundary of prompt and completion a token boundary.

What is cut or dropped is decided in `truncate.py`, and told in the report.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .encoder import Encoder, encode_texts, make_encoder, render
from .fingerprint import digest
from .prompts import split_shared_prompt
from .read import Records, read
from .records import NUMBERS, Form
from .report import CUT, DROPPED, REASONS, Report
from .rows import Row, Rows, completions_of
from .store import open_cache, write_cache
from .tokenizers import Tokenizer, fingerprint_of
from .truncate import Limits, truncate

# Records tokenised at once: enough for a fast tokenizer's threads, little enough to stay in cache.
_CHUNK = 256


def tokenize(
    records: Records | Iterable[Mapping[str, Any]] | str | Path,
    tokenizer: Tokenizer | None,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    strict: bool = False,
    append_eos: bool = True,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    tools: list | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
) -> tuple[Rows, Report]:
    """Rows of token ids, and a report that accounts for every record.

    Prompt and completion are tokenised together, so that their boundary is a token boundary:
    prompt, prompt + chosen, prompt + rejected. Both completions start at the shorter of the two
    prefixes that the prompt's ids share with the others, as in TRL 1.16; a token that merges
    across the end of the prompt belongs to the completions. The BOS is there if the tokenizer adds
    it, once; the EOS ends a text, once, and nothing is added after a chat template.

    Lengths are limited in this order. `max_prompt_length` keeps the end of the prompt;
    `max_completion_length` and `max_length` keep the start, and the EOS that goes is not added
    again. A row whose prompt has `max_length` tokens or more is dropped, as is one with a
    completion of no token at all; an empty text is its EOS, and kept. An empty prompt without BOS
    leaves nothing before the completion's first token, which is then not scored.

    Records that cannot be read again, or of files larger than 256 MB, are tokenised into a cache
    on disk, mapped into memory and keyed by content; `report.cache` is its folder.

    **Arguments:**

    - `records`: from `read`, or anything that `read` takes.
    - `tokenizer`: from `load_tokenizer`, or a `ByteTokenizer`, or anything with `encode`; `None`
        for records of token ids.
    - `max_length`, `max_prompt_length`, `max_completion_length`: in tokens; see above.
    - `strict`: whether a row that is dropped or cut, or whose completions are the same, is an
        error.
    - `append_eos`: whether a completion of text ends with the EOS.
    - `eos_token_id`: of a tokenizer that does not tell.
    - `vocab_size`: of the policy; an id beyond it is an error.
    - `tools`, `template_arguments`: for the chat template; a record's own `tools` and
        `chat_template_kwargs` come before them.
    - `cache`: a folder for caches of tokens. Rows are kept on disk where it is given.

    **Returns:**

    `(rows, report)`. A row is a dictionary with the lists `prompt_ids`, `chosen_ids` and
    `rejected_ids`, or `prompt_ids`, `completion_ids` and the boolean `label`; and the record's
    numbers.

    **Raises:**

    `ValueError` for records that are not what they must be, a tokenizer without EOS or chat
    template where one is needed, an id beyond `vocab_size`, and by `strict`.
    """
    records = records if isinstance(records, Records) else read(records)
    limits = Limits(max_length, max_prompt_length, max_completion_length)
    template = {"tools": tools, **(template_arguments or {})}
    encoder = make_encoder(tokenizer, records.form, append_eos, eos_token_id, template)
    report = Report(form=str(records))
    rows = _rows(records, encoder, limits, report, strict=strict, vocab_size=vocab_size)
    if records.in_memory and cache is None:
        return list(rows), report
    key = _key(records, tokenizer, dataclasses.replace(encoder, tokenizer=None), limits, vocab_size)
    found = open_cache(cache, key) if key and not strict else None
    return found or write_cache(cache, key, rows, report)


def _key(records: Records, tokenizer: Any, *settings: Any) -> str | None:
    """The key of the rows before they are made, where all that decides them has a content."""
    contents = records.fingerprint(), fingerprint_of(tokenizer)
    return digest(*contents, *settings) if None not in contents else None


def _rows(
    records: Records,
    encoder: Encoder,
    limits: Limits,
    report: Report,
    *,
    strict: bool,
    vocab_size: int | None,
) -> Iterator[Row]:
    """The rows, each counted in `report` as it is made."""
    remaining = iter(records)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        for row, reasons in _encode(chunk, records.form, encoder, report.read):
            _check_vocabulary(row, vocab_size, report.read)
            kept, more = truncate(row, limits)
            reasons = more if kept is None else [*reasons, *more, *_looks(kept)]
            _check_strict(reasons, strict, report.read)
            report.add(reasons)
            if kept is not None:
                report.kept += 1
                report.tokens += sum(len(kept[c]) for c in ("prompt_ids", *completions_of(kept)))
                yield kept if kept["prompt_ids"] else kept | {"start_id": encoder.start_id}


def _encode(
    chunk: list[dict[str, Any]], form: Form, encoder: Encoder, first: int
) -> Iterator[tuple[Row, list[str]]]:
    """Each record's row with nothing cut, and the reasons to look at it."""
    if form.tokenized:
        for record in chunk:
            yield record, []
        return
    parts = [_parts(record, form) for record in chunk]
    if form.conversational:
        records = enumerate(zip(chunk, parts, strict=True), start=first)
        encoded = [render(record, part, encoder, number) for number, (record, part) in records]
    else:
        encoded = encode_texts(parts, encoder)
    for record, part, ids in zip(chunk, parts, encoded, strict=True):
        names = ["completion_ids"] if form.unpaired else ["chosen_ids", "rejected_ids"]
        row, moved = _at_boundary(ids, names)
        reasons = (["boundary_moved"] if moved else []) + (
            ["empty_completion"] if "" in part[1:] else []
        )
        kept = ("label", *NUMBERS)
        yield row | {name: record[name] for name in kept if name in record}, reasons


def _parts(record: dict[str, Any], form: Form) -> tuple[Any, ...]:
    """The prompt, and the completion or completions."""
    if form.name == "implicit prompt":
        return split_shared_prompt(record["chosen"], record["rejected"])
    return tuple(record[name] for name in form.columns if name != "label")


def _at_boundary(encoded: list[list[int]], names: list[str]) -> tuple[Row, bool]:
    """The row whose completions start where the prompt's ids and those of all others part."""
    prompt, *whole = encoded
    start = min(_shared(prompt, ids) for ids in whole)
    row = {"prompt_ids": prompt[:start]}
    row |= {name: ids[start:] for name, ids in zip(names, whole, strict=True)}
    return row, start < len(prompt)


def _shared(one: list[int], other: list[int]) -> int:
    if other[: len(one)] == one:  # nearly always, and fast
        return len(one)
    return next(i for i, a in enumerate(one) if i >= len(other) or a != other[i])


def _looks(row: Row) -> list[str]:
    reasons = [] if row["prompt_ids"] else ["nothing_before_completion"]
    same = "chosen_ids" in row and row["chosen_ids"] == row["rejected_ids"]
    return [*reasons, "identical_completions"] if same else reasons


def _check_vocabulary(row: Row, vocab_size: int | None, number: int) -> None:
    if vocab_size is None:
        return
    worst = max((max(row[c], default=0) for c in ("prompt_ids", *completions_of(row))), default=0)
    if worst >= vocab_size:
        raise ValueError(
            f"`tokenizer` must give ids below `vocab_size`, {vocab_size}; record {number} (from "
            f"0) has {worst}. Take the tokenizer that belongs to the policy."
        )


def _check_strict(reasons: list[str], strict: bool, number: int) -> None:
    grave = [r for r in reasons if r in DROPPED or r in CUT or r == "identical_completions"]
    if strict and grave:
        raise ValueError(
            f"`strict` allows no row to be dropped or cut, and record {number} (from 0) would be: "
            f"{'; '.join(REASONS[reason] for reason in grave)}. Raise the limit, or repair or "
            "leave out the record."
        )
