"""`dpo-eqx inspect`: preferences as the tokens that training sees, with their masks.

What is scored, cut and dropped is decided in `dpo_eqx.data`; here it is looked up. It is drawn in
`inspect_draw.py`.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .. import data
from ..data.collate import pair_batch, unpaired_batch
from ..data.report import CUT, DROPPED, REASONS
from ..data.rows import Row, completions_of
from ..data.tokenizers import special_id
from .display import say
from .inspect_draw import LEGEND, Token, shortened, write, write_legend
from .options import split_pairs
from .rows import load_tokenizer, vocab_size
from .source import Source, parse_flags
from .texts import counted, pieces, special_names
from .vocabularies import has_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Source):
    """Shows preferences as the tokens that training would see, and what is scored of them."""

    rows: tuple[int, ...] = ()
    """Numbers of the records to show, from 0; by default the first three that are kept, and the
    first of those that are cut, dropped or noted, by reason."""
    scan: int = 1000
    """How many records are read and counted."""
    tokens: int = 100
    """Of a longer row of tokens that are all scored, or all not, only so many are shown, half of
    them from its end; 0 shows all."""
    ids: bool = False
    """Whether the ids are shown, too."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A prompt or a completion as tokens, each with its state: a key of `LEGEND`."""

    name: str
    ids: list[int]
    states: list[str]


@dataclasses.dataclass(frozen=True)
class Look:
    """A record as training sees it: its parts, and the reasons in `REASONS` that apply to it."""

    number: int
    reasons: list[str]
    parts: list[Part]

    @property
    def dropped(self) -> bool:
        """Whether training never sees it."""
        return not set(self.reasons).isdisjoint(DROPPED)


def inspect(arguments: Sequence[str]) -> None:
    """The command, from its flags.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for whoever gave them.
    """
    flags = parse_flags(Inspect, "inspect", arguments)
    _check(flags)
    columns = split_pairs(flags.columns, "--columns")
    source = data.read(flags.data, columns={ours: name or None for ours, name in columns.items()})
    records = list(itertools.islice(source, max(flags.scan, *(n + 1 for n in flags.rows), 1)))
    tokenizer = _tokenizer(flags, tokenized=source.form.tokenized)
    encoder = None if source.form.tokenized else tokenizer
    limits = {
        name: getattr(flags, name)
        for name in ("max_length", "max_prompt_length", "max_completion_length")
    }
    vocab = vocab_size(flags.model)
    kept, report = data.tokenize(records, encoder, vocab_size=vocab, **limits)

    def look(number: int) -> Look:
        return look_at(number, records[number], encoder, limits)

    _check_rows(flags.rows, len(records))
    numbers = flags.rows or _worth_showing(report, (look(n) for n in range(len(records))))
    for number in numbers:
        _show(look(number), tokenizer, most=flags.tokens, with_ids=flags.ids)
    write_legend()
    say("\n".join([f"{source}", *str(report).splitlines()[1:], *_ends(kept, tokenizer)]))


def look_at(number: int, record: dict[str, Any], tokenizer: Any, limits: dict[str, Any]) -> Look:
    """What training would see of one record.

    **Arguments:**

    - `number`: among the records; `record`: as from `data.read`.
    - `tokenizer`: `None` where the record holds ids.
    - `limits`: of lengths, as `data.tokenize` takes them.
    """
    whole, report = data.tokenize([record], tokenizer)
    if not whole:
        return Look(number, list(report.counts), [])
    kept, report = data.tokenize([record], tokenizer, **limits)
    reasons = [reason for reason in REASONS if report.counts.get(reason)]
    if not kept:
        names = ("prompt_ids", *completions_of(whole[0]))
        parts = [Part(_name(n), whole[0][n], ["cut"] * len(whole[0][n])) for n in names]
        return Look(number, reasons, parts)
    return Look(number, reasons, list(_parts(whole[0], kept[0])))


def _parts(whole: Row, kept: Row) -> Iterator[Part]:
    """The parts of a row as a batch holds them, with what was cut from them."""
    names = completions_of(kept)
    widths = len(kept["prompt_ids"]) + 1, max(len(kept[name]) for name in names)
    make = unpaired_batch if len(names) == 1 else pair_batch
    batch = make([kept], np.array([True]), widths)
    there = batch.prompt.ids[0][batch.prompt.mask[0]].tolist()
    cut = whole["prompt_ids"][: len(whole["prompt_ids"]) - len(kept["prompt_ids"])]
    yield Part("prompt", cut + there, ["cut"] * len(cut) + ["context"] * len(there))
    for name in names:
        tokens = getattr(batch, _name(name))
        # What an empty prompt took from the start of both completions is in the prompt.
        length = len(kept[name]) - (0 if kept["prompt_ids"] else _taken(kept, there))
        states = ["scored" if scored else "context" for scored in tokens.mask[0][:length]]
        cut = whole[name][len(kept[name]) :]
        ids = tokens.ids[0][:length].tolist()
        yield Part(_name(name), ids + cut, states + ["cut"] * len(cut))


def _taken(kept: Row, prompt: list[int]) -> int:
    """How many tokens of each completion became the prompt."""
    return int(all(kept[name][:1] == prompt for name in completions_of(kept)))


def _name(column: str) -> str:
    return column.removesuffix("_ids")


def _worth_showing(report: data.Report, looks: Iterable[Look]) -> list[int]:
    """The first three records that are kept, and the first for each reason."""
    kept = (look.number for look in looks if not look.dropped)
    first = {numbers[0] for numbers in report.examples.values()}
    return sorted({*itertools.islice(kept, 3), *first})


def _show(look: Look, tokenizer: Any, *, most: int, with_ids: bool) -> None:
    fate = "dropped" if look.dropped else "kept, cut" if set(look.reasons) & set(CUT) else "kept"
    lengths = ", ".join(
        f"{part.name} {counted(len(part.ids)) if look.dropped else _length(part)}"
        for part in look.parts
    )
    say(f"record {look.number}: {fate}; {lengths or 'no tokens'}")
    for reason in look.reasons:
        say(f"  {reason}: {REASONS[reason]}")
    for part in look.parts:
        tokens = list(shortened(_tokens(part, tokenizer), most))
        write(f"  {part.name:<10} ", tokens)
        if with_ids:
            say(f"  {'ids':<10} {' '.join(token.id for token in tokens)}")
    say("")


def _tokens(part: Part, tokenizer: Any) -> Iterator[Token]:
    special = special_names(tokenizer)
    for text, state, i in zip(pieces(tokenizer, part.ids), part.states, part.ids, strict=True):
        yield Token(text, state, str(i), i in special)


def _length(part: Part) -> str:
    counts = Counter(part.states)
    notes = [f"{counts['cut']} cut off"] if counts["cut"] else []
    if part.name != "prompt" and counts["context"]:
        notes.append(f"{counts['context']} {LEGEND['context']}")
    there = counted(counts["context"] + counts["scored"])
    return there + (f" ({', '.join(notes)})" if notes else "")


def _ends(rows: Any, tokenizer: Any) -> list[str]:
    """Whether BOS and EOS are where they belong, over all rows that are kept."""
    bos, eos = (special_id(tokenizer, kind) for kind in ("bos", "eos"))
    prompts = [row["prompt_ids"] for row in rows]
    completions = [row[name] for row in rows for name in completions_of(row)]
    lines = []
    if bos is not None and prompts:
        first = sum(ids[:1] == [bos] for ids in prompts)
        lines.append(
            f"  BOS: first in {first} of {len(prompts)} prompts; "
            f"{sum(bos in ids[1:] for ids in prompts)} have another, "
            f"{sum(bos in ids for ids in completions)} completions have one"
        )
    if eos is not None and completions:
        last = sum(ids[-1:] == [eos] for ids in completions)
        lines.append(
            f"  EOS: last in {last} of {len(completions)} completions; "
            f"{sum(ids.count(eos) > 1 for ids in completions)} have several, "
            f"{sum(eos not in ids for ids in completions)} have none"
        )
    return lines


def _tokenizer(flags: Inspect, *, tokenized: bool) -> Any:
    """The tokenizer; for records of ids `None` will do where the model comes with none."""
    if tokenized and flags.tokenizer is None and not has_tokenizer(flags.model):
        return None
    return load_tokenizer(flags.model, flags.tokenizer)


def _check(flags: Inspect) -> None:
    if flags.scan < 1:
        raise ValueError(f"`--scan` must be positive, got {flags.scan}.")
    if flags.tokens < 0:
        raise ValueError(f"`--tokens` must not be negative, got {flags.tokens}.")


def _check_rows(numbers: Sequence[int], count: int) -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"`--rows` must be below {count}, got {number}.")
