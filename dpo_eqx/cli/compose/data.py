"""From settings to rows of token ids: the tokenizer, the training data, the held-out data.

Everything here is said before a model is loaded, so that a bad line is found early.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ... import data, models
from ...data._records.records import Form
from ...models._checkpoint.folder import ADAPTER_CONFIG, CONFIG, read_json, resolve
from ..settings.options import split_pairs
from ..settings.settings import Settings


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Rows of one source, and what is known of where they came from.

    - `rows`: as from `data.tokenize`; `report`: what became of the records.
    - `form`: of the records; `fingerprint`: of the files, `None` where there are none.
    """

    rows: Any
    report: data.Report
    form: Form
    fingerprint: str | None


def vocab_size(model: str) -> int:
    """The vocabulary of the model in a folder, whose weights are not read."""
    folder = resolve(model)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise ValueError(
            f"{model} holds adapters and no model. Give the model that they are for by `--model`, "
            "and this folder by `--lora`."
        )
    return models.read_config(read_json(folder / CONFIG)).vocab


def prepare(path: str, settings: Settings, vocab: int) -> Prepared:
    """Reads and tokenises the preferences at `path`.

    **Raises:**

    `ValueError` or `FileNotFoundError` where there are none, or they are not what they must be.
    """
    columns = split_pairs(settings.columns, "--columns")
    records = data.read(path, columns={ours: theirs or None for ours, theirs in columns.items()})
    form = records.form
    _check_numbers(form, settings)
    rows, report = data.tokenize(
        records,
        None if form.tokenized else load_tokenizer(settings.model, settings.tokenizer),
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        max_completion_length=settings.max_completion_length,
        strict=settings.strict,
        vocab_size=vocab,
        cache=settings.cache,
    )
    if not len(rows):
        raise ValueError(f"No row is left of {report}")
    if "weight" in form.numbers and not any(row["weight"] > 0 for row in rows):
        raise ValueError(
            f"`weight` is 0 in each row of {path}, so that there is nothing to learn from; leave "
            "the column out by `--columns weight=`, or give some rows a weight."
        )
    return Prepared(rows, report, form, records.fingerprint())


def data_facts(prepared: Sequence[Prepared]) -> dict[str, object]:
    """What processes that train together must have found alike."""
    reports = [each.report for each in prepared]
    return {
        "the data": [each.fingerprint for each in prepared],
        "the records read, rows and tokens": [(r.read, r.kept, r.tokens) for r in reports],
    }


def load_tokenizer(model: str, named: str | None) -> Any:
    """The tokenizer of the model, or the one that `--tokenizer` names."""
    return (
        data.ByteTokenizer() if named == "bytes" else data.load_tokenizer(named or resolve(model))
    )


def make_batches(
    prepared: Prepared, settings: Settings, *, training: bool, share: tuple[int, int] = (0, 1)
) -> data.Batches:
    """Batches to train on without end, or to evaluate on once.

    **Arguments:**

    - `share`: which part of each batch this process makes, and of how many.
    """
    parts = 1 if training else settings.microbatches
    return data.batches(
        prepared.rows,
        batch_size=settings.batch_size // parts,
        shuffle=settings.shuffle and training,
        seed=settings.seed,
        epochs=None if training else 1,
        buckets=settings.buckets,
        max_length=settings.max_length,
        process_index=share[0],
        process_count=share[1],
    )


def with_reference(
    prepared: Prepared, cache: Callable[[Any], data._reference_cache.ReferenceRows]
) -> Prepared:
    """The same, its rows with the reference's log-probabilities from `cache`."""
    return dataclasses.replace(prepared, rows=cache(prepared.rows))


def _check_numbers(form: Form, settings: Settings) -> None:
    """Raises where a column of the data and a flag give the same."""
    if "beta" in form.numbers and settings.beta is not None:
        raise ValueError(
            "`--beta` and the column `beta` of the data contradict each other; leave out the flag, "
            "or the column by `--columns beta=`."
        )
    given = [name for name in form.numbers if name.startswith("reference_")]
    wanted = {
        "--reference": settings.reference is not None,
        "--precompute-reference": settings.precompute_reference,
        "--sync-reference-every": settings.sync_reference_every > 0,
    }
    for name, is_given in wanted.items():
        if given and is_given:
            raise ValueError(
                f"`{name}` and the column `{given[0]}` of the data contradict each other; leave "
                f"out the flag, or the columns by `--columns {'= '.join(given)}=`."
            )
