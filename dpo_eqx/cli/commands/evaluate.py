"""`dpo-eqx evaluate`: how a policy ranks preferences, and how far it is from its reference.

`compose/measures.py` computes it.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ... import models
from ..._arrays.metrics import Metrics
from ..._diagnosis.preferences import Preferences
from ..compose.data import Prepared, learned_positions, make_batches, prepare, vocab_size
from ..compose.measures import make_lone_measure, make_measure
from ..compose.vocabulary import check_one_vocabulary
from ..run import devices
from ..run.compilation_cache import use_compilation_cache
from ..run.folder import finite, replace_text
from ..settings.check import check_positive
from ..settings.groups.memory import Dtype
from ..settings.shared_flags import Loading, Source, check_writable, parse_flags
from ..settings.words import in_flags
from ..terminal.display import display, say

Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Loading, Source):
    """Measures how a policy ranks preferences, against a reference, and writes it as JSON."""

    reference: str | None = None
    """The reference model, usually the one that training started from (default with `--lora`: the
    model without the adapters). Without a reference, only what needs none is measured."""
    output: Path
    """The JSON file to write."""
    per_pair: Path | None = None
    """A JSON Lines file for the numbers of each pair; `record` is the number of its record, from
    0."""
    beta: float | None = None
    """Scale of the implicit rewards (default: the column `beta` of the data, or 0.1)."""
    batch_size: int = 8
    """Number of pairs evaluated at once; the result does not depend on it."""
    compute_dtype: Dtype | None = None
    """Dtype of the forward pass (default: the dtype of the parameters)."""


def evaluate(arguments: Sequence[str]) -> None:
    """Runs the command with its flags in `arguments`.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    flags = parse_flags(Evaluate, "evaluate", arguments)
    use_compilation_cache(flags.compilation_cache)
    _check(flags)
    vocab = vocab_size(flags.model)
    check_one_vocabulary(flags.model, flags.reference, "--reference")
    settings = flags.as_training(
        reference=flags.reference, batch_size=flags.batch_size, beta=flags.beta
    )
    positions = learned_positions(flags.model, flags.reference)
    prepared = prepare(flags.data, settings, vocab, positions=positions)
    if prepared.form.unpaired:
        raise ValueError(
            f"`--data` must hold pairs; {flags.data} holds {prepared.form}. Give a file with "
            "columns for chosen and rejected completions."
        )
    say(in_flags(str(prepared.report)))
    policy, mesh = flags.load(flags.model, lora=flags.lora), flags.devices()
    reference = _reference(flags, policy)
    if reference is None:
        measure = functools.partial(make_lone_measure(flags.compute_dtype), policy)
    else:
        measure = make_measure(flags.beta, flags.compute_dtype)
        measure = functools.partial(measure, policy, reference)
    with make_batches(prepared, settings, training=False) as batches:
        counted, rows = _over_batches(measure, batches, prepared, mesh)
    result = summary(counted, int((rows["weight"] > 0).sum()))
    say(in_words(result))
    about = {name: getattr(flags, name) for name in ("model", "lora", "quantize", "data")}
    about["dropped"] = prepared.report.dropped
    if reference is not None:
        about["reference"] = flags.reference or f"{flags.model} without adapters"
        about["beta"] = flags.beta or _default_beta(prepared)
    replace_text(flags.output, json.dumps(finite(result | about), indent=1) + "\n")
    if flags.per_pair is not None:
        lines = (json.dumps(finite(row)) + "\n" for row in as_records(rows))
        replace_text(flags.per_pair, "".join(lines))


def _reference(flags: Evaluate, policy: models.Transformer) -> models.Transformer | None:
    if flags.reference is not None:
        return flags.load(flags.reference)
    return None if flags.lora is None else models.without_lora(policy)


def _over_batches(
    measure: Any, batches: Any, prepared: Prepared, mesh: Mesh | None
) -> tuple[Any, Rows]:
    """The sums over all batches, and the numbers of each pair in the order of the rows."""
    counted, parts, pairs_left = None, [], len(prepared.rows)
    with display(0, len(batches), what="batch") as show:
        for number, batch in enumerate(batches, 1):
            batch_sums, numbers = measure(devices.put_batch(batch, mesh))
            counted = batch_sums if counted is None else counted + batch_sums
            # The last batch is filled up with pairs of weight 0, which have no row of their own.
            parts.append({name: np.asarray(x)[:pairs_left] for name, x in numbers.items()})
            pairs_left -= batch.pairs
            first, value = next(iter(counted.mean().items()))
            show(number, {first: float(value)})
    rows = {"record": prepared.report.numbers_of_rows()}
    rows |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return counted, rows


def summary(counted: Preferences | Metrics, pairs: int) -> dict[str, Any]:
    """The quantities by name, as plain numbers; calibration is a list with one entry for a bin."""
    means = {name: float(value) for name, value in counted.mean().items()}
    if isinstance(counted, Metrics):
        return {"pairs": pairs, **means}
    bins = counted.calibration
    predicted, frequency = bins.mean()
    edges = np.linspace(0.5, 1, bins.count.size + 1).tolist()
    rows = [
        {
            "from": edges[i],
            "to": edges[i + 1],
            "predicted": float(predicted[i]) if bins.weight[i] > 0 else None,
            "frequency": float(frequency[i]) if bins.weight[i] > 0 else None,
            "count": int(bins.count[i]),
        }
        for i in range(bins.count.size)
    ]
    return {"pairs": pairs, **means, "calibration": rows}


def in_words(result: dict[str, Any]) -> str:
    """The quantities as a few lines of text."""
    names = {
        "preference_accuracy": "preference accuracy (chosen is likelier)",
        "preference_accuracy_per_token": "the same by the mean over tokens",
        "chosen_logp": "log-probability of chosen answers (nats)",
        "rejected_logp": "log-probability of rejected answers",
        "win_rate": "win rate (implicit reward)",
        "reward_margin_mean": "reward margin, mean",
        "reward_margin_std": "reward margin, standard deviation",
        "kl": "KL to the reference (nats per completion)",
    }
    lines = [f"{words:<40} {result[n]:8.4f}" for n, words in names.items() if n in result]
    lines += [f"{'pairs':<40} {result['pairs']:8}"]
    if "calibration" not in result:
        return "\n".join(lines)
    lines += ["", "predicted  frequency  pairs"]
    bins = [row for row in result["calibration"] if row["predicted"] is not None]
    lines += [f"{r['predicted']:9.3f}  {r['frequency']:9.3f}  {r['count']:5}" for r in bins]
    return "\n".join(lines)


def as_records(rows: Rows) -> Iterator[dict[str, Any]]:
    """A dictionary of the numbers of each pair."""
    columns = {name: values.tolist() for name, values in rows.items()}
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _default_beta(prepared: Prepared) -> float | str:
    return "of each pair" if "beta" in prepared.form.numbers else 0.1


def _check(flags: Evaluate) -> None:
    for name in ("beta", "batch_size"):
        check_positive(name, getattr(flags, name))
    if flags.reference is None and flags.lora is None and flags.beta is not None:
        raise ValueError(
            "`--beta` scales rewards against a reference, and there is none; give the model that "
            "training started from as `--reference`, or leave out `--beta`."
        )
    devices.check_rows(flags.batch_size, flags.devices())
    check_writable("--output", flags.output)
    check_writable("--per-pair", flags.per_pair)
