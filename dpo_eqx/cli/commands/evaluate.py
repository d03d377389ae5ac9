"""`dpo-eqx evaluate`: how a policy ranks preferences, and how far it is from its reference.

The library's `_diagnosis/` defines what is computed.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import numpy as np
from jaxtyping import PyTree

from ... import losses, models
from ..._arrays.batches import PreferenceBatch
from ..._diagnosis.compare import compare
from ..._diagnosis.diagnose import diagnose
from ..._diagnosis.preferences import Preferences, count_preferences
from ..._jax.dtypes import in_dtype
from ..._jax.inference_mode import in_inference
from ..compose.data import Prepared, learned_positions, make_batches, prepare, vocab_size
from ..compose.vocabulary import check_one_vocabulary
from ..run.compilation_cache import use_compilation_cache
from ..run.folder import finite, replace_text
from ..settings.check import check_positive
from ..settings.groups.memory import Dtype
from ..settings.options import dtype_of
from ..settings.shared_flags import Loading, Source, check_writable, parse_flags
from ..settings.words import in_flags
from ..terminal.display import display, say

Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Loading, Source):
    """Measures how a policy ranks preferences, against a reference, and writes it as JSON."""

    reference: str | None = None
    """The reference model, usually the one that training started from. It is required without
    `--lora` (default with `--lora`: the model without the adapters)."""
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
    if flags.reference is not None:
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
    policy = flags.load(flags.model, lora=flags.lora)
    reference = _reference(flags, policy)
    measure = make_measure(flags.beta, flags.compute_dtype)
    with make_batches(prepared, settings, training=False) as batches:
        measure_one = functools.partial(measure, policy, reference)
        counted, rows = _over_batches(measure_one, batches, prepared)
    result = summary(counted)
    say(in_words(result))
    about = {name: getattr(flags, name) for name in ("model", "lora", "quantize", "data")}
    about["reference"] = flags.reference or f"{flags.model} without adapters"
    about |= {"beta": flags.beta or _default_beta(prepared), "dropped": prepared.report.dropped}
    replace_text(flags.output, json.dumps(finite(result | about), indent=1) + "\n")
    if flags.per_pair is not None:
        lines = (json.dumps(finite(row)) + "\n" for row in as_records(rows))
        replace_text(flags.per_pair, "".join(lines))


def make_measure(
    beta: float | None, compute_dtype: str | None
) -> Callable[[PyTree, PyTree, PreferenceBatch], tuple[Preferences, dict[str, Any]]]:
    """A jitted function of policy, reference and batch.

    It returns the sums over the batch, and the numbers of each pair by name.
    """
    loss = losses.dpo if beta is None else functools.partial(losses.dpo, beta=beta)
    dtype = dtype_of(compute_dtype)

    @eqx.filter_jit
    def measure(policy: PyTree, reference: PyTree, batch: PreferenceBatch):
        policy, reference = (in_dtype(in_inference(model), dtype) for model in (policy, reference))
        sides = compare(policy, reference, batch)
        pairs = diagnose(loss, sides.policy, sides.reference, per_pair=batch.per_pair)
        kl = sides.chosen_kl, sides.rejected_kl
        numbers = {
            "margin": pairs.margin,
            "gradient_weight": pairs.chosen_gradient_weight,
            "weight": sides.policy.weight,
        }
        for i, side in enumerate(("chosen", "rejected")):
            numbers |= {
                f"{side}_logp": getattr(sides.policy, side),
                f"{side}_reference_logp": getattr(sides.reference, side),
                f"{side}_log_ratio": getattr(pairs, f"{side}_log_ratio"),
                f"{side}_kl": kl[i],
                f"{side}_tokens": getattr(sides.policy, f"{side}_length"),
            }
        return count_preferences(sides.policy, pairs.margin, kl), numbers

    return measure


def _reference(flags: Evaluate, policy: models.Transformer) -> models.Transformer:
    return models.without_lora(policy) if flags.reference is None else flags.load(flags.reference)


def _over_batches(measure: Any, batches: Any, prepared: Prepared) -> tuple[Preferences, Rows]:
    """The sums over all batches, and the numbers of each pair in the order of the rows."""
    counted, parts, pairs_left = None, [], len(prepared.rows)
    with display(0, len(batches), what="batch") as show:
        for number, batch in enumerate(batches, 1):
            batch_sums, numbers = measure(batch)
            counted = batch_sums if counted is None else counted + batch_sums
            # The last batch is filled up with pairs of weight 0, which have no row of their own.
            parts.append({name: np.asarray(x)[:pairs_left] for name, x in numbers.items()})
            pairs_left -= batch.pairs
            show(number, {"win_rate": float(counted.mean()["win_rate"])})
    rows = {"record": prepared.report.numbers_of_rows()}
    rows |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return cast(Preferences, counted), rows


def summary(counted: Preferences) -> dict[str, Any]:
    """The quantities by name, as plain numbers; calibration is a list with one entry for a bin."""
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
    means = {name: float(value) for name, value in counted.mean().items()}
    return {"pairs": int(counted.pairs), **means, "calibration": rows}


def in_words(result: dict[str, Any]) -> str:
    """The quantities as a few lines of text."""
    names = {
        "preference_accuracy": "preference accuracy (chosen is likelier)",
        "win_rate": "win rate (implicit reward)",
        "reward_margin_mean": "reward margin, mean (nats)",
        "reward_margin_std": "reward margin, standard deviation",
        "kl": "KL to the reference (nats per completion)",
    }
    lines = [f"{words:<40} {result[name]:8.4f}" for name, words in names.items()]
    lines += [f"{'pairs':<40} {result['pairs']:8}", "", "predicted  frequency  pairs"]
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
    if flags.reference is None and flags.lora is None:
        raise ValueError(
            "`--reference` must be the model to compare with; got none. Give the model that "
            "training started from. Only with `--lora` there is a default: the model without the "
            "adapters."
        )
    check_writable("--output", flags.output)
    check_writable("--per-pair", flags.per_pair)
