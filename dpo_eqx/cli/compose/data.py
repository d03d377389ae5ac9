"""From settings to rows of token ids: the tokenizer, the training data, the held-out data.

All of this runs before a model is loaded, so that a bad line is found early.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ... import data, models
from ...data._fingerprint import digest
from ...data._records.records import Form
from ...data._tokens.report import LIMITED
from ...data._tokens.rows import lengths_of
from ...models._checkpoint.folder import ADAPTER_CONFIG, CONFIG, read_json, resolve
from ..settings.options import split_columns, split_pairs
from ..settings.settings import Settings
from ..settings.sources import sources_of
from ..settings.words import OF_ARGUMENT, naming
from .loss import takes_offset
from .packing import pack_batches
from .score import average_of
from .tokenizer import tokenizer_of


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The rows of one source of preferences, and facts about the source.

    - `rows`: rows as `data.tokenize` returns them.
    - `report`: counts of the records that were kept, cut and dropped.
    - `form`: the form of the records.
    - `fingerprint`: the fingerprint of the files; `None` if the source has no files.
    - `mismatched`: whether batches of single completions have the mismatched ones of KTO.
    - `positions`: the largest number of tokens of a row; `None` if positions are not learned.
    - `name`: the name of a held-out set, if it has one.
    - `told`: what the user is told; `records`: the records, unless it is a mixture.
    """

    rows: Any
    report: data.Report
    form: Form
    fingerprint: str | None
    positions: int | None = None
    mismatched: bool = True
    name: str = ""
    told: str = ""
    records: data.Records | None = None

    def place(self, index: int) -> str:
        """The place of a row's record, such as `line 3 of a.jsonl`; it reads the source again."""
        located = () if self.records is None else self.records.located()
        later = itertools.islice(located, int(self.report.numbers_of_rows()[index]), None)
        return next((where for where, _ in later), "a record")


def vocab_size(model: str, flag: str = "--model") -> int:
    """The vocabulary size of the model in a folder, which `flag` gave; its weights are not read."""
    return _config(model, flag).vocab


def learned_positions(model: str, reference: str | None = None) -> int | None:
    """The fewest learned positions of the models; `None` if none has learned positions."""
    configs = [_config(model, "--model")]
    configs += [] if reference is None else [_config(reference, "--reference")]
    return min((c.max_length for c in configs if c.rotary is None), default=None)


def _config(model: str, flag: str) -> models.Config:
    with naming(flag):
        folder = resolve(model)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise ValueError(
            f"`{flag}` must be a model; {model} holds adapters and no model. Give the model that "
            "they were trained on as `--model`, and this folder as `--lora`."
        )
    values = read_json(folder / CONFIG)
    try:
        return models.read_config(values)
    except ValueError as error:
        raise ValueError(
            f"`{flag}` must be a supported model; {folder} cannot be read: {error}"
        ) from error


def prepare(
    path: str,
    settings: Settings,
    vocab: int,
    *,
    positions: int | None = None,
    held_out: bool = False,
) -> Prepared:
    """Reads and tokenises the preferences at `path`.

    **Arguments:**

    - `vocab`: the size of the vocabulary; `positions`: the number of learned positions, if any.
    - `held_out`: whether these are the preferences of `--eval-data` or of `--eval-fraction`.

    **Raises:**

    `ValueError` or `FileNotFoundError` if there are no preferences at `path`, if a record is
    invalid, if no row is left to learn from, or if a row is longer than `positions`.
    """
    records = _read(path, settings, held_out=held_out)
    if settings.eval_fraction is not None:
        records = data.hold_out(records, settings.eval_fraction)[held_out]
    elif held_out:
        _check_apart(records, settings)
    form = records.form
    _check_numbers(form, settings)
    rows, report = data.tokenize(
        records,
        None if form.tokenized else tokenizer_of(settings),
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        max_completion_length=settings.max_completion_length,
        strict=settings.strict,
        score=settings.score,
        vocab_size=vocab,
        cache=settings.cache,
    )
    if not len(rows):
        limits = "Raise the limits, or give" if LIMITED & report.counts.keys() else "Give"
        remedy = "" if settings.eval_fraction is None else ", or another `--eval-fraction`"
        raise ValueError(f"No row is left of {report}\n{limits} other data{remedy}.")
    if "weight" in form.numbers and not any(row["weight"] > 0 for row in rows):
        raise ValueError(
            f"`weight` is 0 in each row of {path}, so there is nothing to learn from; ignore the "
            "column with `--columns weight=`, or give some rows a positive weight."
        )
    source = Prepared(
        rows, report, form, records.fingerprint(), positions, told=str(report), records=records
    )
    if positions is not None:
        _check_fits(source, positions, path)
    return source


def mixed(
    parts: Sequence[Prepared], names: Sequence[str], weights: Sequence[float | None], seed: int
) -> Prepared:
    """Several sources, with their paths and weights, as one: see `data.mix`."""
    if len(parts) == 1:
        return parts[0]
    rows = data.mix([part.rows for part in parts], weights=weights, seed=seed)
    form = next((part.form for part in parts if not part.form.tokenized), parts[0].form)
    reports = [part.report for part in parts]
    counts = sum((Counter(report.counts) for report in reports), Counter())
    report = data.Report(
        form=str(form),
        read=sum(report.read for report in reports),
        kept=len(rows),
        tokens=int(rows.lengths().sum()),
        counts=counts,
    )
    prints = [part.fingerprint for part in parts]
    fingerprint = None if None in prints else digest(prints)
    shares = [
        f"  {given} of {len(part.rows)} rows ({given / len(rows):.1%}) from {name}"
        for given, part, name in zip(rows.counts, parts, names, strict=True)
    ]
    told = [*(part.told for part in parts), f"mixture of {len(rows)} rows an epoch:", *shares]
    return Prepared(rows, report, form, fingerprint, parts[0].positions, told="\n".join(told))


def _check_fits(source: Prepared, positions: int, path: str) -> None:
    """Raises `ValueError` if a row has more tokens than there are learned positions."""
    lengths = lengths_of(source.rows)
    tokens = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    too_long = int((tokens > positions).sum())
    if too_long:
        raise ValueError(
            f"The model has learned positions for {positions} tokens, and {too_long} of "
            f"{len(tokens)} rows of {path} are longer: {source.place(int(tokens.argmax()))} has "
            f"{tokens.max()}. Give `--max-length {positions}`."
        )


def _read(path: str, settings: Settings, *, held_out: bool) -> data.Records:
    # A fraction is held out of the training data, which their own flags choose.
    held_out = held_out and settings.eval_fraction is None
    try:
        records = data.read(
            path,
            **reading(settings),
            split=settings.eval_split if held_out else settings.split,
            # Held-out data of another source have their own subsets.
            subset=None if held_out and path not in _paths(settings) else settings.subset,
        )
        _ = records.form  # a wrong split of a saved folder is found only now
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(_in_flags_of_source(str(error), held_out=held_out)) from error
    return records


def reading(settings: Settings) -> dict[str, Any]:
    """The arguments of `data.read` that decide how records become pairs."""
    columns = split_columns(settings.columns)
    if settings.offset_column is not None:
        columns["offset"] = settings.offset_column or None
    options = split_pairs(settings.loss_options, "--loss-options")
    return {
        "columns": columns,
        "where": split_pairs(settings.where, "--where"),
        "as_chat": settings.as_chat,
        "pairs": settings.pairs,
        "ties": settings.ties,
        "offset_from_scores": takes_offset(settings)
        and "offset" not in options.keys() | columns.keys(),
    }


def _in_flags_of_source(message: str, *, held_out: bool) -> str:
    """`message` with the flags of the training data or of the held-out data."""
    prefix = "--eval-" if held_out else "--"
    message = message.replace("`path_or_iterable`", f"`{prefix}data`")
    return re.sub(rf"`split`{OF_ARGUMENT}", f"`{prefix}split`", message)


def _check_apart(held_out: data.Records, settings: Settings) -> None:
    """Raises `ValueError` if the held-out preferences are those that the run trains on."""
    for path in _paths(settings):
        if held_out.place() == _read(path, settings, held_out=False).place():
            raise ValueError(
                f"`--eval-data` must hold other rows than `--data`; both are {held_out.source}. "
                "Give another file, or another split of it by `--eval-split`."
            )


def _paths(settings: Settings) -> list[str]:
    return [source.path for source in sources_of(settings.data)]


def data_facts(prepared: Sequence[Prepared]) -> dict[str, object]:
    """Facts about the data on which processes that train together must agree."""
    reports = [source.report for source in prepared]
    return {
        "the data": [source.fingerprint for source in prepared],
        "the records read, rows and tokens": [(r.read, r.kept, r.tokens) for r in reports],
    }


def make_batches(
    prepared: Prepared,
    settings: Settings,
    *,
    training: bool,
    share: tuple[int, int] = (0, 1),
    split: int = 1,
) -> data.Batches:
    """Batches to train on without end, or to evaluate on once.

    **Arguments:**

    - `training`: whether the batches are for training.
    - `share`, `split`: the number of the part of each batch that this process makes, the number of
        parts, and the number of devices that split a batch.
    """
    if settings.pack:
        return pack_batches(
            prepared.rows, prepared.form, settings, training=training, share=share, split=split
        )
    # Evaluation runs a batch at once, so its batches are as small as a microbatch of training.
    parts = 1 if training else settings.microbatches
    # A mismatched completion of KTO follows another prompt, so the two may be longer than any row.
    limits = [n for n in (settings.max_length, prepared.positions) if n is not None]
    return data.batches(
        prepared.rows,
        batch_size=settings.batch_size // parts,
        shuffle=settings.shuffle and training,
        seed=settings.seed,
        epochs=None if training else 1,
        buckets=settings.buckets,
        max_length=min(limits, default=None),
        kl=prepared.mismatched,
        average=average_of(prepared.form, settings),
        process_index=share[0],
        process_count=share[1],
    )


def _check_numbers(form: Form, settings: Settings) -> None:
    """Raises `ValueError` if a column of the data and a flag give the same quantity."""
    if "beta" in form.numbers and settings.beta is not None:
        raise ValueError(
            "`--beta` and the column `beta` of the data contradict each other; leave out the flag, "
            "or ignore the column with `--columns beta=`."
        )
    if "offset" in form.numbers and "offset" in split_pairs(
        settings.loss_options, "--loss-options"
    ):
        raise ValueError(
            "`--loss-options offset` and the column `offset` of the data contradict each other; "
            "leave out the option, or ignore the column with `--columns offset=`."
        )
    columns = [name for name in form.numbers if name.startswith("reference_")]
    flags = {
        "--reference": settings.reference is not None,
        "--precompute-reference": settings.precompute_reference,
        "--sync-reference-every": settings.sync_reference_every > 0,
    }
    for name, is_given in flags.items():
        if columns and is_given:
            raise ValueError(
                f"`{name}` and the column `{columns[0]}` of the data contradict each other; leave "
                f"out the flag, or ignore the columns with `--columns {'= '.join(columns)}=`."
            )
