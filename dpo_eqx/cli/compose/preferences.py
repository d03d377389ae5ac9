"""The preferences of a run: those to train on, and sets held out, of the kind that its loss takes.

`data.py` reads one source. Everything here is checked before a model is loaded.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from ...data._batches.mismatch import check_mismatchable
from ...data._records.records import Form
from ...data._records.values import ticked
from ...data._tokens.report import LIMITED
from ...data._tokens.rows import PER_PAIR, Row, completions_of, lengths_of, start_of
from ..settings.settings import Settings
from ..settings.sources import held_out_of, sources_of
from .data import Prepared, learned_positions, mixed, prepare, vocab_size
from .loss import (
    Loss,
    needs_labels,
    needs_mismatched,
    needs_reference,
    takes_of_pairs,
    takes_rows,
)
from .packing import check_packable
from .score import check_weights
from .vocabulary import check_one_vocabulary


def prepare_all(settings: Settings, loss: Loss) -> list[Prepared]:
    """The training data, and each held-out set.

    **Raises:**

    `ValueError` if the data do not fit the loss, the model or each other.
    """
    vocab = vocab_size(settings.model)
    reference = settings.reference if needs_reference(loss) else None
    check_one_vocabulary(settings.model, reference, "--reference")
    positions = learned_positions(settings.model, reference)
    sources = sources_of(settings.data)
    paths = [source.path for source in sources]

    def one(path: str, *, held_out: bool) -> Prepared:
        source = prepare(path, settings, vocab, positions=positions, held_out=held_out)
        _check_fits_loss(source, path, settings, loss)
        _check_starts(source)
        if not held_out:
            _check_preferences(source, path, settings)
        mismatched = source.form.unpaired and needs_mismatched(loss)
        check_packable(source.rows, source.form, path, settings, mismatched=mismatched)
        return source

    training = [one(path, held_out=False) for path in paths]
    # The paths of each held-out set, by its name.
    sets = {held_out.name: [held_out.path] for held_out in held_out_of(settings.eval_data)}
    sets = sets if settings.eval_fraction is None else {"": paths}
    held_out = {name: [one(path, held_out=True) for path in sets[name]] for name in sets}
    _check_same_numbers(
        [*training, *itertools.chain(*held_out.values())],
        [*paths, *itertools.chain(*sets.values())],
    )
    prepared = [mixed(training, paths, [source.weight for source in sources], settings.seed)]
    # Held-out rows have no weights: the metrics are means over all of them.
    for name, parts in held_out.items():
        source = mixed(parts, sets[name], [None] * len(parts), 0)
        prepared.append(dataclasses.replace(source, name=name, told=_told(name, source.told)))
    if prepared[0].form.unpaired:
        prepared = [
            dataclasses.replace(source, mismatched=needs_mismatched(loss)) for source in prepared
        ]
        for source, names in zip(prepared, (paths, *sets.values()), strict=True):
            _check_mismatched(source, " and ".join(names))
    return prepared


def _told(name: str, told: str) -> str:
    return f"held-out set {name}: {told}" if name else told


def _check_fits_loss(source: Prepared, path: str, settings: Settings, loss: Loss) -> None:
    form, name = source.form, f"`--loss {' '.join(settings.loss)}`"
    if not takes_rows(loss, unpaired=form.unpaired):
        kind = "pairs" if form.unpaired else "single completions"
        raise ValueError(
            f"{name} needs {kind}, and {path} holds {form}. Give kto, bco or apo_zero_unpaired for "
            "completions with a label, sft for completions without one, any other loss for pairs."
        )
    check_weights(form, settings)
    if form.unpaired:
        _check_labels(form, path, name, needed=needs_labels(loss))
    elif settings.average is not None:
        raise ValueError(
            f"`--average` is for single completions, and {path} holds {form}. Leave it out: on "
            "pairs, `--loss sft` averages over the tokens of each chosen completion."
        )
    for column in _per_pair(source):
        if not takes_of_pairs(loss, column):
            raise ValueError(
                f"{name} has no `{column}`, and {path} has a column `{column}`. Leave the column "
                f"out with `--columns {column}=`, or take a loss with `{column}`."
            )
    whole = ("completion",) if form.unpaired else ("chosen", "rejected")
    needed = [f"reference_{side}" for side in whole]
    given = _reference_columns(source)
    if given and set(given) != set(needed):
        raise ValueError(
            f"{path} must have {ticked(needed)} if it has log-probabilities of the reference; it "
            f"has {ticked(given)} alone. Add the other column, or leave out what is there with "
            f"`--columns {'= '.join(given)}=`."
        )


def _check_labels(form: Form, path: str, name: str, *, needed: bool) -> None:
    """Raises `ValueError` if labels are missing, or if nothing would be done with them."""
    if needed and not form.labelled:
        raise ValueError(
            f"{name} needs a column `label`, which says whether a completion is desirable, and "
            f"{path} holds {form}. Add the column, or take `--loss sft` to learn from all of them."
        )
    if form.labelled and not needed:
        raise ValueError(
            f"{name} learns to write every completion, and {path} has a column `label`. Choose the "
            "desirable ones with `--where label=true --columns label=`, or take all of them with "
            "`--columns label=`."
        )


def _check_same_numbers(prepared: Sequence[Prepared], paths: Sequence[str]) -> None:
    """Raises `ValueError` if one source has a column of numbers that the other does not have."""
    for source, path in zip(prepared[1:], paths[1:], strict=True):
        ours, theirs = ([*_reference_columns(s), *_per_pair(s)] for s in (prepared[0], source))
        if set(ours) != set(theirs):
            columns = sorted(set(ours) ^ set(theirs))
            holder, other = (paths[0], path) if set(columns) <= set(ours) else (path, paths[0])
            raise ValueError(
                f"All sources of preferences must have the same columns of numbers: {holder} has "
                f"{ticked(columns)}, and {other} does not. Add them there, or leave them out with "
                f"`--columns {'= '.join(columns)}=`."
            )


def _reference_columns(source: Prepared) -> list[str]:
    return [name for name in source.form.numbers if name.startswith("reference_")]


def _per_pair(source: Prepared) -> list[str]:
    return [name for name in source.form.numbers if name in PER_PAIR]


def _check_starts(source: Prepared) -> None:
    """Raises `ValueError` if a row has no token before its completions, and none can be put there.

    Only records of ids can be so: text has a tokenizer, which has a BOS or an EOS.
    """
    if not source.form.tokenized:
        return
    for index in (lengths_of(source.rows)[:, 0] == 0).nonzero()[0]:
        row = source.rows[int(index)]
        if not _has_start(row):
            raise ValueError(
                f"`prompt_ids` must hold a token in {source.place(int(index))}, since its "
                "completions begin with different tokens. Put the tokenizer's BOS or EOS there."
            )


def _check_preferences(source: Prepared, path: str, settings: Settings) -> None:
    """Raises `ValueError` if the completions of each pair are the same, and the loss compares them.

    Nothing would be learned, or only from errors of rounding.
    """
    same = source.report.counts.get("identical_completions", 0)
    if settings.loss != ("sft",) and 0 < len(source.rows) <= same:
        cut = LIMITED & source.report.counts.keys()
        remedy = "raise the limits that cut them, or give other data" if cut else "give other data"
        raise ValueError(
            f"No pair of {path} has a preference: chosen and rejected are the same in all "
            f"{len(source.rows)} rows. Look at them with `dpo-eqx inspect`, and {remedy}."
        )


def _has_start(row: Row) -> bool:
    try:
        start_of([], [row[name] for name in completions_of(row)], row.get("start_id"))
    except ValueError:
        return False
    return True


def _check_mismatched(source: Prepared, path: str) -> None:
    if not source.mismatched:
        return
    try:
        check_mismatchable(source.rows)
    except ValueError:
        raise ValueError(
            f"KTO compares prompts with completions of other prompts, and all {len(source.rows)} "
            f"rows of {path} have one prompt. Add prompts, or take `--loss bco` or "
            "`apo_zero_unpaired`, which need no others."
        ) from None
