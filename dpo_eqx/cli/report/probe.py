"""Data for the report of `train`, at the start and at the end: margins of some pairs, samples.

It covers at most `PAIRS` pairs and `PROMPTS` answers, so its cost does not grow with the run.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from ... import data, sharding
from ..._diagnosis.diagnose import make_diagnose
from ..._jax.dtypes import in_dtype
from ..._jax.inference_mode import in_inference
from ..compose.data import Prepared
from ..compose.loss import Loss
from ..compose.tokenizer import tokenizer_of
from ..run import devices, hosts
from ..run.folder import finite, replace_text
from ..run.state import State
from ..settings.settings import Settings
from ..terminal.answers import draw_answers
from ..terminal.texts import decode

PAIRS, PROMPTS, TOKENS = 256, 4, 48
Probe = Callable[[State, int, Path], None]


def make_probe(
    settings: Settings,
    prepared: Sequence[Prepared],
    loss: Loss,
    options: Mapping[str, Any],
    mesh: Mesh | None,
) -> Probe:
    """A function of a state, its step and a path. It examines the state; process 0 writes the file.

    It does nothing without `--report`, and for a reward model, which writes no text. Pairs and
    prompts come from the first held-out set, or from the training data if none is held out. Several
    processes must all call it, and sample no answers.

    **Arguments:**

    - `prepared`: the training data, and the held-out sets if there are any.
    - `loss`: the loss; `options`: the options of `make_step` that `make_diagnose` also takes.
    - `mesh`: the mesh of the state.
    """
    if not settings.report or settings.reward_head:
        return lambda state, step, path: None
    # The first held-out set is examined if there are several.
    source = prepared[1] if prepared[1:] else prepared[0]
    kind = f"held-out {source.name}".rstrip() if prepared[1:] else "training"
    rows = [source.rows[int(i)] for i in spread(len(source.rows), PAIRS)]
    tokenized = source.form.tokenized
    tokenizer = None if tokenized else tokenizer_of(settings)
    examine = None if source.form.unpaired else eqx.filter_jit(make_diagnose(loss, **options))

    def probe(state: State, step: int, path: Path) -> None:
        record: dict[str, Any] = {"step": step, "data": kind}
        if examine is not None:
            record |= _pairs(examine, state, rows, settings, mesh)
        record |= _samples(state, rows[:PROMPTS], tokenizer, settings, options["compute_dtype"])
        _write(record, path)

    return probe


def make_sample_probe(
    settings: Settings, prepared: Prepared, tokenizer: Any, compute_dtype: DTypeLike
) -> Probe:
    """`make_probe` for a run on prompts alone: answers to some of them, and no pairs."""
    if not settings.report:
        return lambda state, step, path: None
    rows = [prepared.rows[int(i)] for i in spread(len(prepared.rows), PROMPTS)]

    def probe(state: State, step: int, path: Path) -> None:
        samples = _samples(state, rows, tokenizer, settings, compute_dtype)
        _write({"step": step, "data": "training", **samples}, path)

    return probe


def _write(record: Mapping[str, Any], path: Path) -> None:
    if hosts.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(finite(dict(record))) + "\n")


def spread(count: int, at_most: int) -> np.ndarray:
    """At most `at_most` numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).astype(int))


def _pairs(
    examine: Any, state: State, rows: list, settings: Settings, mesh: Mesh | None
) -> dict[str, list]:
    """Margins, log-ratios and lengths of the rows, in their order."""
    size = settings.batch_size // settings.microbatches
    index, count = devices.share(mesh)
    parts = []
    with data.batches(
        rows,
        batch_size=size,
        shuffle=False,
        buckets=1,  # one width, so that there is one compilation
        process_index=index,
        process_count=count,
    ) as batches:
        for batch in batches:
            pairs = examine(state.policy, devices.put_batch(batch, mesh), state.reference)
            numbers = {
                "margin": pairs.margin,
                "chosen_log_ratio": pairs.chosen_log_ratio,
                "rejected_log_ratio": pairs.rejected_log_ratio,
                "chosen_tokens": pairs.policy.chosen_length,
                "rejected_tokens": pairs.policy.rejected_length,
            }
            parts.append(sharding.gather({n: x for n, x in numbers.items() if x is not None}))
    columns = {n: np.concatenate([part[n] for part in parts])[: len(rows)] for n in parts[0]}
    return {name: [_short(x) for x in values.tolist()] for name, values in columns.items()}


def _samples(
    state: State, rows: list, tokenizer: Any, settings: Settings, compute_dtype: DTypeLike
) -> dict[str, Any]:
    """Answers sampled from the policy, with the same random numbers in every call."""
    if jax.process_count() > 1:
        return {"samples": [], "no_samples": "Runs of several processes sample no answers."}
    prompts = [row["prompt_ids"] or [row.get("start_id") or 0] for row in rows]
    # Samples compare policies, so dropout is off.
    policy = in_dtype(in_inference(state.policy), compute_dtype)
    with jax.numpy_dtype_promotion("standard"):
        try:
            answers = draw_answers(
                policy,
                prompts,
                tokenizer,
                batch_size=PROMPTS,
                seed=settings.seed,
                max_new_tokens=TOKENS,
            )
        except ValueError as error:  # too few learned positions for `TOKENS` more tokens
            return {"samples": [], "no_samples": str(error)}
    pairs = zip(prompts, answers, strict=True)
    return {
        "samples": [
            {"prompt": decode(tokenizer, p), **dataclasses.asdict(answer)} for p, answer in pairs
        ]
    }


def _short(value: float | int) -> float | int:
    return float(f"{value:.6g}") if isinstance(value, float) else value
