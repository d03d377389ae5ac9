"""Tokenising: from records to rows of ids, with the boundary after the prompt between two tokens.

`truncate.py` decides which rows are cut or dropped; the report counts them.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._fingerprint import digest
from .._records.prompts import split_answer, split_shared_prompt
from .._records.read import Records, read
from .._records.records import NUMBERS, Form
from .encoder import Encoder, encode_texts, make_encoder
from .report import CUT, DROPPED, LIMITED, LOST, REASONS, Account, Report
from .rows import Row, Rows, completions_of, mask_name
from .scored import check_score, masks_in_row, masks_of
from .store import open_cache, write_cache
from .template import conversation_of, encode_conversations
from .tokenizers import Tokenizer, fingerprint_of, shared_length, without_limits
from .truncate import Limits, truncate

# Records tokenised at once: enough for a fast tokenizer's threads, few enough to stay in cache.
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
    score: str = "completion",
    cache: str | Path | None = None,
) -> tuple[Rows, Report]:
    """Rows of token ids, and a report that accounts for every record.

    The texts tokenised are prompt, prompt + chosen and prompt + rejected. The ids of the prompt
    share a prefix with the ids of each of the other two. Both completions start at the end of the
    shorter prefix, as in TRL 1.16, so a token that merges across the end of the prompt belongs to
    the completions. If the tokenizer adds a BOS, it occurs once. The EOS ends a text, once. Nothing
    is added after a chat template.

    Limits apply in this order. `max_prompt_length` keeps the end of the prompt.
    `max_completion_length` and `max_length` keep the start; an EOS that is cut off is not added
    again. A row is dropped if its prompt has `max_length` tokens or more, or if a completion has no
    token. A completion of empty text is its EOS, and is kept. If the prompt is empty and has no
    BOS, nothing precedes the completion's first token, so that token is not scored.

    Records that can be read only once, or that come from files larger than 256 MB, are tokenised
    into a cache on disk, which is mapped into memory and keyed by content. `report.cache` is its
    folder.

    **Arguments:**

    - `records`: records from `read`, or anything that `read` takes.
    - `tokenizer`: from `load_tokenizer`, or a `ByteTokenizer`, or anything with `encode`; `None`
        for records of token ids.
    - `max_length`, `max_prompt_length`, `max_completion_length`: limits in tokens; see above.
    - `strict`: whether it is an error if a row is dropped or cut, has identical completions, or
        has text that the chat template leaves out.
    - `append_eos`: whether a completion of text ends with the EOS.
    - `eos_token_id`: the EOS, if the tokenizer does not name one.
    - `vocab_size`: the policy's vocabulary size; a greater or equal id is an error.
    - `tools`, `template_arguments`: for the chat template; a record's own `tools` and
        `chat_template_kwargs` take precedence.
    - `score`: which tokens of a conversation's answers are scored. `"completion"`: all tokens after
        the prompt. `"assistant"`: those of the assistant's turns. `"last"`: those of its last turn.
        A message with `weight: 0` is never scored. An answer of text is one turn.
    - `cache`: a folder for caches of tokens. If given, rows are always stored on disk.

    **Returns:**

    `(rows, report)`. A row is a dictionary with the lists `prompt_ids`, `chosen_ids` and
    `rejected_ids`, or with `prompt_ids` and `completion_ids`, and the boolean `label` if the record
    has one. It also holds the record's numbers. If some tokens of a completion are not scored, it
    also holds `chosen_mask`, `rejected_mask` or `completion_mask`, a boolean for each token.

    **Raises:**

    `ValueError` if a record is invalid, if the tokenizer lacks the EOS or chat template that the
    records need, if an id is not below `vocab_size`, and as described for `strict`.
    """
    records = records if isinstance(records, Records) else read(records)
    tokenizer = without_limits(tokenizer)
    limits = Limits(max_length, max_prompt_length, max_completion_length)
    template = {"tools": tools, **(template_arguments or {})}
    check_score(score, tokenized=records.form.tokenized)
    encoder = make_encoder(tokenizer, records.form, append_eos, eos_token_id, template)
    encoder = dataclasses.replace(encoder, score=score)
    report = Report(form=str(records), left_out=records.left_out)
    rows = _rows(records, encoder, limits, report, strict=strict, vocab_size=vocab_size)
    if records.in_memory and cache is None:
        return list(rows), report
    key = _key(records, tokenizer, dataclasses.replace(encoder, tokenizer=None), limits, vocab_size)
    cached = open_cache(cache, key) if key and not strict else None
    return cached or write_cache(cache, key, rows, report)


def _key(records: Records, tokenizer: Any, *settings: Any) -> str | None:
    """The key of the rows before they exist, or `None` if an input has no readable content."""
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
    """The rows; `report` counts each one when it is made."""
    remaining = records.located()
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        encoded = _encode(chunk, records.form, encoder)
        for (where, _), (row, account) in zip(chunk, encoded, strict=True):
            limited, reasons = _limited(row, list(account), limits, vocab_size, where)
            _check_strict(reasons, account, strict, where)
            report.add(reasons, account, where)
            if limited is not None:
                report.kept += 1
                names = ("prompt_ids", *completions_of(limited))
                report.tokens += sum(len(limited[name]) for name in names)
                # See `start_of`: a batch needs a token before the completions.
                start = {} if limited["prompt_ids"] else {"start_id": encoder.start_id}
                yield limited | start


def _limited(
    row: Row | None, reasons: list[str], limits: Limits, vocab_size: int | None, where: str
) -> tuple[Row | None, list[str]]:
    """The row within the limits, unless it is dropped, and all reasons to report it."""
    dropped = [reason for reason in reasons if reason in DROPPED]
    if row is None or dropped:
        return None, dropped
    _check_vocabulary(row, vocab_size, where)
    limited, cuts = truncate(row, limits)
    if limited is not None and _scores_nothing(limited):
        return None, ["nothing_scored"]
    return limited, cuts if limited is None else [*reasons, *cuts, *_looks(limited)]


def _encode(
    chunk: list[tuple[str, dict[str, Any]]], form: Form, encoder: Encoder
) -> Iterator[tuple[Row | None, Account]]:
    """The uncut row of each record, if there is one, and the reasons to report the record."""
    if form.tokenized:
        for _, record in chunk:
            yield record, {}
        return
    parts = [_parts(record, form, encoder.score) for _, record in chunk]
    names = form.answers
    if form.conversational:
        pairs = zip(chunk, parts, strict=True)
        conversations = [conversation_of(r, p, names, encoder, where) for (where, r), p in pairs]
        encoded = encode_conversations(conversations, encoder)
    else:
        conversations = [None] * len(chunk)
        encoded = zip(encode_texts(parts, encoder), map(_empty, parts), strict=True)
    turns = zip(conversations, encoded, strict=True)
    for (_, record), (conversation, (ids, account)) in zip(chunk, turns, strict=True):
        if ids is None:
            yield None, account
            continue
        row, moved = _at_boundary(ids, [f"{name}_ids" for name in names])
        if conversation is not None:
            masks = masks_of(conversation, encoder, ids)
            row |= masks_in_row(masks, names, len(row["prompt_ids"]))
        if moved and "prompt_not_kept" not in account:
            account = {"boundary_moved": "", **account}
        copied = ("label", *NUMBERS)
        yield row | {name: record[name] for name in copied if name in record}, account


def _empty(part: tuple[str, ...]) -> Account:
    return {"empty_completion": ""} if "" in part[1:] else {}


def _parts(record: dict[str, Any], form: Form, score: str) -> tuple[Any, ...]:
    """The prompt, and the one or two completions."""
    if form.name == "text":
        return "", record["text"]
    if form.name == "messages":
        # All turns of the assistant are scored only if all of them belong to the completion.
        return split_answer(record["messages"], first=score == "assistant")
    if form.name == "implicit prompt":
        return split_shared_prompt(record["chosen"], record["rejected"])
    return tuple(record[name] for name in form.columns if name != "label")


def _at_boundary(encoded: list[list[int]], names: list[str]) -> tuple[Row, bool]:
    """The row, and whether its completions start before the end of the prompt's ids."""
    prompt, *full = encoded
    start = min(shared_length(prompt, ids) for ids in full)
    row = {"prompt_ids": prompt[:start]}
    row |= {name: ids[start:] for name, ids in zip(names, full, strict=True)}
    return row, start < len(prompt)


def _scores_nothing(row: Row) -> bool:
    """Whether a completion has no scored token; one that follows no token is not scored."""
    first = 0 if row["prompt_ids"] else 1
    for name in completions_of(row):
        mask = row.get(mask_name(name))
        if len(row[name]) <= first or (mask is not None and not any(mask[first:])):
            return True
    return False


def _looks(row: Row) -> list[str]:
    reasons = [] if row["prompt_ids"] else ["nothing_before_completion"]
    same = "chosen_ids" in row and row["chosen_ids"] == row["rejected_ids"]
    return [*reasons, "identical_completions"] if same else reasons


def _check_vocabulary(row: Row, vocab_size: int | None, where: str) -> None:
    if vocab_size is None:
        return
    worst = max((max(row[c], default=0) for c in ("prompt_ids", *completions_of(row))), default=0)
    if worst >= vocab_size:
        raise ValueError(
            f"`tokenizer` must give ids below `vocab_size`, {vocab_size}; {where} has {worst}. "
            "Take the policy's own tokenizer."
        )


def _check_strict(reasons: list[str], account: Account, strict: bool, where: str) -> None:
    refused = DROPPED.keys() | CUT.keys() | LOST.keys() | {"identical_completions"}
    strict_reasons = [reason for reason in reasons if reason in refused]
    if strict and strict_reasons:
        words = [
            REASONS[reason] + (f" ({account[reason]})" if account.get(reason) else "")
            for reason in strict_reasons
        ]
        limit = "Raise the limit, or repair" if LIMITED & {*strict_reasons} else "Repair"
        raise ValueError(
            f"`strict` allows no row to be dropped or cut and no text to be lost, and {where} "
            f"would be: {'; '.join(words)}. {limit} or leave out the record."
        )
