"""`dpo-eqx plan`: whether a training step fits some devices, and what bounds its time.

`sharding.plan` compiles; this file makes the step of `dpo-eqx train` from shapes alone.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from ... import losses, models, sharding
from ..._arrays.batches import PreferenceBatch
from ..._arrays.log_probs import PairLogProbs
from ..._arrays.tokens import Tokens
from ..._jax.dtypes import in_dtype
from ..._training.step import make_step
from ...models._checkpoint.config_json import read_config
from ...models._checkpoint.folder import CONFIG, read_json, resolve
from ...models._checkpoint.language_model import inner_config
from ...protocols import Step
from ...sharding._mesh import parse_sizes
from ...sharding._plan import TooLargeError
from ..compose.dtypes import keep_trained_wide
from ..compose.optimizer import compose_optimizer
from ..compose.policy import has_adapters, trainable_of, with_new_adapters
from ..run.folder import replace_text
from ..settings.check import check_optimizer, check_positive
from ..settings.groups.memory import Dtype
from ..settings.options import dtype_of
from ..settings.settings import Settings
from ..settings.shared_flags import check_writable, parse_flags
from ..terminal.display import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Says whether a training step fits some devices, and what bounds its time.

    The step is compiled for the devices, which need not be there. No weights are read."""

    model: str
    """A folder with `config.json`, that file itself, or a hub name."""
    target: str = "cpu"
    """The devices: cpu, a100, h100, h200, b200, l4, v5e, v5p or v6e, with their number or, for
    TPUs, their topology: `h100:8`, `v5e:2x2`."""
    mesh: str | None = None
    """The mesh, `data=4,fsdp=2,tensor=1`, or with the experts of a mixture over `expert=4`
    (default: all devices along data)."""
    batch_size: int = 8
    """Pairs per optimiser step, over all devices and microbatches."""
    microbatches: int = 1
    """Number of parts that a batch is split into to save memory."""
    max_length: int = 1024
    """Number of tokens of prompt plus completion."""
    max_prompt_length: int | None = None
    """Number of tokens of the prompt (default: half of `--max-length`)."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank in place of the model; 0 trains the model."""
    lora_target: str | None = None
    """A regular expression for the layers that get adapters (default: all linear layers but the
    unembedding)."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the linear layers of the frozen model in 8 or 4 bits."""
    optimizer: str = "adamw"
    """Name of the optimiser, or your own as `module:function` or `file.py:function`, as in
    `train`."""
    dtype: Dtype | None = None
    """Dtype of the parameters (default: float32 for trained parameters, that of `config.json` for
    frozen parameters)."""
    compute_dtype: Dtype | None = None
    """Dtype of the forward pass (default: that of `config.json`)."""
    remat: bool = False
    """Recompute each layer in the backward pass, which saves memory."""
    unroll: bool = False
    """Compile the code of every layer, rather than a loop over the layers."""
    fused: bool = True
    """Use the attention kernel of the GPU or the TPU, if there is one that fits."""
    precompute_reference: bool = False
    """The reference's log-probabilities are computed once, before training."""
    largest_batch: bool = False
    """Double `--batch-size` while the step fits, and show the largest batch."""
    json: Path | None = None
    """A file for the numbers, as JSON."""


def plan(arguments: Sequence[str]) -> None:
    """Runs the command with its flags in `arguments`.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    flags = parse_flags(PlanFlags, "plan", arguments)
    _check(flags)
    _make_cpus(flags.target)
    problem = _pose(flags)
    found = _plan(flags, problem, flags.batch_size)
    if flags.largest_batch:
        found = _largest(flags, problem, found)
    say(str(found))
    if flags.json is not None:
        replace_text(flags.json, json.dumps(found.as_dict(), indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A step and the shapes of all of its arguments but the batch."""

    step: Step
    policy: PyTree
    opt_state: PyTree
    reference: PyTree
    reference_of: Callable[[Any], Any] | None
    trainable: PyTree


def _pose(flags: PlanFlags) -> Problem:
    """The step that `dpo-eqx train` would take with these flags."""
    values = inner_config(_config_json(flags.model))
    how_it_runs = {name: getattr(flags, name) for name in ("remat", "unroll", "fused")}
    config = dataclasses.replace(read_config(values), **how_it_runs)
    if config.rotary is None and flags.max_length > config.max_length:
        raise ValueError(
            f"`--max-length` must be at most {config.max_length}, the number of learned positions "
            f"of {flags.model}; got {flags.max_length}."
        )
    stored = jnp.dtype(values.get("dtype") or values.get("torch_dtype") or "bfloat16")
    settings = _as_training(flags)
    base = eqx.filter_eval_shape(_make_base, config, flags, stored)
    policy = eqx.filter_eval_shape(with_new_adapters, base, settings)
    trainable = trainable_of(policy, settings)
    policy = eqx.filter_eval_shape(keep_trained_wide, policy, trainable, settings)
    optimizer = compose_optimizer(settings, optax.constant_schedule(settings.learning_rate))
    with jax.numpy_dtype_promotion("standard"):
        opt_state = eqx.filter_eval_shape(
            lambda policy: optimizer.init(eqx.filter(policy, trainable)), policy
        )
    is_live = not flags.precompute_reference
    adapted = has_adapters(settings)
    reference_of = models.without_lora if adapted and is_live else None
    step = make_step(
        losses.dpo,
        optimizer,
        trainable=trainable,
        microbatches=flags.microbatches,
        compute_dtype=dtype_of(flags.compute_dtype) or stored,
        reference_of=reference_of,
    )
    reference = base if is_live and not adapted else None
    return Problem(step, policy, opt_state, reference, reference_of, trainable)


def _plan(flags: PlanFlags, problem: Problem, pairs: int) -> sharding.Plan:
    # Optax's Adam mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        return sharding.plan(
            problem.step,
            problem.policy,
            problem.opt_state,
            _batch(flags, pairs),
            problem.reference,
            target=flags.target,
            mesh=flags.mesh,
            reference_of=problem.reference_of,
            trainable=problem.trainable,
        )


def _largest(flags: PlanFlags, problem: Problem, found: sharding.Plan) -> sharding.Plan:
    """The plan of the largest batch that fits, by doubling; `found` if even that does not fit."""
    pairs, larger = flags.batch_size, found
    while larger is not None and larger.fits:
        say(f"{pairs} pairs fit: {_filled(larger)}")
        found, pairs = larger, 2 * pairs
        larger = _unless_refused(flags, problem, pairs)
    say(f"{pairs} pairs do not fit" + (f": {_filled(larger)}" if larger is not None else ""))
    return found


def _unless_refused(flags: PlanFlags, problem: Problem, pairs: int) -> sharding.Plan | None:
    try:
        return _plan(flags, problem, pairs)
    except TooLargeError:
        return None


def _filled(plan: sharding.Plan) -> str:
    return f"{plan.peak / 1e9:.2f} GB of {plan.capacity / 1e9:.2f} GB"


def _make_base(config: models.Config, flags: PlanFlags, stored: np.dtype) -> models.Transformer:
    """The model as loaded: in the dtype of `config.json` or `--dtype`, quantised if asked for."""
    base = in_dtype(
        models.Transformer(config, key=jax.random.key(0)), dtype_of(flags.dtype) or stored
    )
    return base if flags.quantize is None else models.quantize(base, flags.quantize)


def _batch(flags: PlanFlags, pairs: int) -> PreferenceBatch:
    """A full batch: no shape of a training run is larger."""
    prompt = flags.max_prompt_length or flags.max_length // 2

    def tokens(length: int) -> Tokens:
        return Tokens(np.zeros((pairs, length), np.int32), np.ones((pairs, length), bool))

    completion = tokens(flags.max_length - prompt)
    zeros, lengths = np.zeros(pairs, np.float32), np.zeros(pairs, np.int32)
    given = PairLogProbs(zeros, zeros, lengths, lengths)
    reference = given if flags.precompute_reference else None
    return PreferenceBatch(
        tokens(prompt), completion, completion, np.ones(pairs, np.float32), reference
    )


def _config_json(model: str) -> Mapping[str, Any]:
    path = Path(model)
    return read_json(path if path.is_file() else resolve(model, (CONFIG,)) / CONFIG)


def _as_training(flags: PlanFlags) -> Settings:
    """The settings of the run that is planned."""
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(flags).items() if name in names}
    return Settings(**given, data=(), output=Path())


def _make_cpus(target: str) -> None:
    """Lets JAX make as many CPU devices as the target has, if it has not started yet."""
    chip, _, count = target.partition(":")
    if chip == "cpu" and count.isdecimal():
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", int(count))


def _check(flags: PlanFlags) -> None:
    for name in ("batch_size", "microbatches", "max_length", "max_prompt_length"):
        check_positive(name, getattr(flags, name))
    check_writable("--json", flags.json)
    check_optimizer(flags.optimizer)
    if flags.mesh is not None:
        parse_sizes(flags.mesh)
    if flags.max_prompt_length is not None and flags.max_prompt_length >= flags.max_length:
        raise ValueError(
            f"`--max-prompt-length` must be below `--max-length`, {flags.max_length}; got "
            f"{flags.max_prompt_length}."
        )
    if flags.quantize is not None and not flags.lora_rank:
        raise ValueError(
            f"`--quantize {flags.quantize}` freezes the model, so adapters are trained; give "
            "`--lora-rank` too."
        )
    if flags.batch_size % flags.microbatches:
        raise ValueError(
            f"`--microbatches` must divide `--batch-size`, {flags.batch_size}; got "
            f"{flags.microbatches}."
        )
