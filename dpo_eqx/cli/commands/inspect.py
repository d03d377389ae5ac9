"""`dpo-eqx inspect`: preferences as the tokens that training sees, with their masks.

`dpo_eqx.data` decides what is scored, cut and dropped; this file looks it up, and
`cli/terminal/tokens.py` draws it.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ... import data
from ...data._batches.collate import pair_batch, unpaired_batch
from ...data._tokens.report import CUT, DROPPED, REASONS
from ...data._tokens.rows import Row, completions_of
from ...data._tokens.tokenizers import special_id
from ..compose.data import reading, vocab_size
from ..compose.tokenizer import load_tokenizer
from ..compose.vocabulary import has_tokenizer
from ..settings.shared_flags import Source, parse_flags
from ..settings.words import in_flags
from ..terminal.display import say
from ..terminal.texts import counted, pieces, special_names
from ..terminal.tokens import LEGEND, Token, shortened, write, write_legend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Source):
    """Shows preferences as the tokens that training would see, and marks the scored ones."""

    rows: tuple[int, ...] = ()
    """Numbers of the records to show, from 0 (default: the first three kept records, and the first
    record for each reason to cut, drop or note one)."""
    scan: int = 1000
    """Number of records to read and count."""
    tokens: int = 100
    """Longest run of tokens of one state to show in full; a longer run shows only its two ends
    (0: show all tokens)."""
    ids: bool = False
    """Show the token ids, too."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A prompt or a completion as tokens, each with a state, which is a key of `LEGEND`."""

    name: str
    ids: list[int]
    states: list[str]


@dataclasses.dataclass(frozen=True)
class Look:
    """A record as training sees it: its parts, its place, and the reasons in `REASONS` for it."""

    number: int
    reasons: list[str]
    parts: list[Part]
    where: str = ""
    places: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def dropped(self) -> bool:
        """Whether training never sees the record."""
        return not set(self.reasons).isdisjoint(DROPPED)


def inspect(arguments: Sequence[str]) -> None:
    """Runs the command with its flags in `arguments`.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    flags = parse_flags(Inspect, "inspect", arguments)
    _check(flags)
    source = data.read(
        flags.data,
        **reading(flags.as_training()),
        split=flags.split,
        subset=flags.subset,
    )
    count = max(flags.scan, *(n + 1 for n in flags.rows), 1)
    records = list(itertools.islice(source.located(), count))
    tokenizer = _tokenizer(flags, tokenized=source.form.tokenized)
    encoder = None if source.form.tokenized else tokenizer
    names = ("max_length", "max_prompt_length", "max_completion_length")
    limits = {name: getattr(flags, name) for name in names}
    vocab = vocab_size(flags.model)
    scanned = data.Records(lambda: iter(records), str(source), {})
    score = flags.score
    rows, report = data.tokenize(scanned, encoder, vocab_size=vocab, score=score, **limits)
    report.left_out = source.left_out

    def look(number: int) -> Look:
        return look_at(number, records[number], encoder, limits, score)

    _check_rows(flags.rows, len(records))
    numbers = flags.rows or _worth_showing(report, (look(n) for n in range(len(records))))
    for number in numbers:
        _show(look(number), tokenizer, most=flags.tokens, with_ids=flags.ids)
    write_legend()
    lines = [f"{source}", *str(report).splitlines()[1:], *_ends(rows, tokenizer)]
    say(in_flags("\n".join(lines)))


def look_at(
    number: int,
    record: tuple[str, dict[str, Any]],
    tokenizer: Any,
    limits: dict[str, Any],
    score: str = "completion",
) -> Look:
    """What training would see of one record.

    **Arguments:**

    - `number`: the record's number, from 0; `record`: its place in words, and the record.
    - `tokenizer`: the tokenizer; `None` if the record holds ids.
    - `limits`, `score`: the limits of lengths and what is scored, as `data.tokenize` takes them.
    """
    where = record[0]
    alone = data.Records(lambda: iter([record]), where, {})
    full, report = data.tokenize(alone, tokenizer, score=score)
    if not full:
        return Look(number, list(report.counts), [], where, report.places)
    within, report = data.tokenize(alone, tokenizer, score=score, **limits)
    reasons = [reason for reason in REASONS if report.counts.get(reason)]
    if not within:
        names = ("prompt_ids", *completions_of(full[0]))
        parts = [Part(_name(n), full[0][n], ["cut"] * len(full[0][n])) for n in names]
        return Look(number, reasons, parts, where, report.places)
    return Look(number, reasons, list(_parts(full[0], within[0])), where, report.places)


def _parts(full: Row, row: Row) -> Iterator[Part]:
    """The parts of a row as a batch holds them, with the tokens that were cut."""
    names = completions_of(row)
    widths = len(row["prompt_ids"]) + 1, max(len(row[name]) for name in names)
    make = unpaired_batch if len(names) == 1 else pair_batch
    batch = make([row], np.array([True]), widths)
    prompt = batch.prompt.ids[0][batch.prompt.mask[0]].tolist()
    cut = full["prompt_ids"][: len(full["prompt_ids"]) - len(row["prompt_ids"])]
    yield Part("prompt", cut + prompt, ["cut"] * len(cut) + ["context"] * len(prompt))
    for name in names:
        tokens = getattr(batch, _name(name))
        # If the prompt was empty, the completions' shared first token is now the prompt.
        length = len(row[name]) - (0 if row["prompt_ids"] else _taken(row, prompt))
        states = ["scored" if scored else "context" for scored in tokens.mask[0][:length]]
        cut = full[name][len(row[name]) :]
        ids = tokens.ids[0][:length].tolist()
        yield Part(_name(name), ids + cut, states + ["cut"] * len(cut))


def _taken(row: Row, prompt: list[int]) -> int:
    """How many tokens of each completion became the prompt."""
    return int(all(row[name][:1] == prompt for name in completions_of(row)))


def _name(column: str) -> str:
    return column.removesuffix("_ids")


def _worth_showing(report: data.Report, looks: Iterable[Look]) -> list[int]:
    """The first three kept records, and the first record for each reason."""
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
    say(f"  {look.where}")
    for reason in look.reasons:
        place = f" ({look.places[reason]})" if reason in look.places else ""
        say(in_flags(f"  {reason}: {REASONS[reason]}{place}"))
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
    remaining = counted(counts["context"] + counts["scored"])
    return remaining + (f" ({', '.join(notes)})" if notes else "")


def _ends(rows: Any, tokenizer: Any) -> list[str]:
    """How many prompts begin with the BOS, and how many completions end with the EOS."""
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
    """The tokenizer, or `None` if the records hold ids and the model has no tokenizer."""
    if tokenized and flags.tokenizer is None and not has_tokenizer(flags.model):
        return None
    return load_tokenizer(flags.model, flags.tokenizer, flags.chat_template)


def _check(flags: Inspect) -> None:
    if flags.scan < 1:
        raise ValueError(f"`--scan` must be positive; got {flags.scan}.")
    if flags.tokens < 0:
        raise ValueError(f"`--tokens` must not be negative; got {flags.tokens}.")


def _check_rows(numbers: Sequence[int], count: int) -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"`--rows` must be below {count}; got {number}.")
