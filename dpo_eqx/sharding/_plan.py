"""Compiles a training step for devices that need not be there, and reads what it needs of each.

`_targets.py` has the devices.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from .._jax.gpus import assume
from .._jax.paths import leaf_name
from .._scoring.score import score_pairs
from ..protocols import Score
from ._collectives import collectives, count_runs
from ._flops import flops
from ._mesh import make_mesh, rows_in
from ._policy import placement
from ._rules import Rules
from ._targets import Target, find_target
from ._traffic import bytes_accessed

_ATTENTION = {
    "cudnn": "cuDNN's kernel",
    "splash": "JAX's splash kernel",
    "blocks": "in blocks of queries",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step needs of each device; it prints as a table.

    - `target`, `mesh`: what it was compiled for.
    - `arguments`: bytes of parameters, optimiser state, reference and batch.
    - `temporaries`: bytes of everything else, at most at one time.
    - `peak`: bytes in all; results that are written over arguments count once.
    - `capacity`: bytes of the device's memory.
    - `bytes_accessed`: bytes that the operations read from the device's memory and write to it.
        What stays on the chip does not count.
    - `collective_bytes`: bytes that the device sends in a ring; `collectives`: in how many
        operations.
    - `flops_needed`: operations of a step that computes nothing twice; `flops_done`: those of this
        one. Products count, and nothing else. Both are those of the whole step over the number of
        devices.
    - `attention`: the kernel that the program calls, `"cudnn"` or `"splash"`, or `"blocks"`.
    - `seconds`: the least time for arithmetic, memory (each argument read and each result written
        once) and links, at the full rates of the chip; empty if they are not known.
    - `compile_seconds`: how long XLA took.
    """

    target: str
    mesh: str
    arguments: int
    temporaries: int
    peak: int
    capacity: int
    bytes_accessed: int
    collective_bytes: int
    collectives: int
    flops_needed: int
    flops_done: int
    attention: str
    seconds: Mapping[str, float]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within the capacity."""
        return self.peak <= self.capacity

    @property
    def bound(self) -> str | None:
        """What takes longest: arithmetic, memory or links; `None` if the rates are not known."""
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """All numbers by name, for JSON."""
        return dataclasses.asdict(self) | {"fits": self.fits, "bound": self.bound}

    def __str__(self) -> str:
        left = self.capacity - self.peak
        ratio = self.flops_done / max(self.flops_needed, 1)
        lines = {
            "arguments": in_bytes(self.arguments),
            "temporaries": in_bytes(self.temporaries),
            "peak": in_bytes(self.peak),
            "capacity": f"{in_bytes(self.capacity)}, "
            + (f"{in_bytes(left)} left" if self.fits else f"{in_bytes(-left)} too little"),
            "read and written": in_bytes(self.bytes_accessed),
            "sent to others": f"{in_bytes(self.collective_bytes)}, "
            f"in {self.collectives} collectives",
            "operations": f"{self.flops_done:.3g} done, {self.flops_needed:.3g} needed "
            f"({ratio:.2f} times)",
            "attention": _ATTENTION[self.attention],
        }
        lines |= {
            f"least time, {name}": f"{seconds * 1e3:.3g} ms" + self._binds(name)
            for name, seconds in self.seconds.items()
        }
        lines["compiled in"] = f"{self.compile_seconds:.0f} s"
        verdict = "fits" if self.fits else "does not fit"
        head = f"One step on {self.target} ({self.mesh}) {verdict}. On each device:"
        return "\n".join([head, *(f"  {name:<24}{value}" for name, value in lines.items())])

    def _binds(self, name: str) -> str:
        return " (binds)" if name == self.bound else ""


class TooLargeError(ValueError):
    """The compiler refuses a program that needs more memory than a device has, as on TPUs."""


def plan(
    step: Callable[..., Any],
    policy: PyTree,
    opt_state: PyTree,
    batch: PyTree,
    reference: PyTree = None,
    *,
    target: str = "cpu",
    mesh: str | None = None,
    rules: Rules | None = None,
    score: Score = score_pairs,
    trainable: PyTree = eqx.is_inexact_array,
    reference_of: Callable[[Any], Any] | None = None,
) -> Plan:
    """Says whether a step fits the devices, and what bounds its time, without running it.

    ```python
    policy = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
    opt_state = eqx.filter_eval_shape(
        lambda policy: optimizer.init(eqx.filter(policy, eqx.is_inexact_array)), policy
    )
    print(sharding.plan(step, policy, opt_state, batch, policy, target="h100:8", mesh="fsdp=8"))
    ```

    Arrays may be `jax.ShapeDtypeStruct`s, so nothing needs to be in memory. The policy and the
    optimiser's state are donated, as in a training loop.

    **Arguments:**

    - `step`: from `make_step`, or any function of the same arguments.
    - `policy`, `opt_state`, `batch`, `reference`: the arguments of the step; the batch is the
        global one.
    - `target`: the devices: `here` (those of this process), `cpu`, `a100`, `h100`, `h200`, `b200`,
        `l4`, `v5e`, `v5p` or `v6e`, and their number (`"h100:8"`) or, for TPUs, their topology
        (`"v5e:2x2"`).
    - `mesh`: the sizes of its axes, as `make_mesh` takes them (default: all devices over `data`).
    - `rules`: as for `shard_policy`.
    - `score`, `trainable`, `reference_of`: those of the step, for `flops_needed`. The policy takes
        one forward pass for its values, one for the gradients of activations, and the share of its
        trained parameters in one for their gradients; a reference takes one.

    **Raises:**

    `ValueError` if the target or the mesh is wrong, or the batch does not split over the mesh. Also
    if the step does not fit and the compiler refuses it, as on TPUs. `ImportError` if the compiler
    for the target is not installed.
    """
    chips = find_target(target)
    sizes = mesh or f"data={len(chips.devices)}"
    devices = make_mesh(sizes, devices=chips.devices)
    placed = _placed((policy, opt_state, batch, reference), devices, rules)
    dynamic, static = eqx.partition(placed, _is_array)

    def run(policy, opt_state, rest):
        batch, reference = rest
        arguments = eqx.combine((policy, opt_state, batch, reference), static)
        return eqx.filter(step(*arguments), eqx.is_array)

    policy_arrays, state_arrays, *rest = dynamic
    with assume(chips.capability):
        traced = jax.jit(run, donate_argnums=(0, 1)).trace(policy_arrays, state_arrays, rest)
        needed = _needed(score, placed, trainable, reference_of, chips.platform)
        started = time.perf_counter()
        compiled = _compiled(traced.lower(lowering_platforms=(chips.platform,)), target, sizes)
    seconds = time.perf_counter() - started
    done = flops(traced.jaxpr, chips.platform)
    return _read(compiled, chips, sizes, needed, done, seconds)


def _compiled(lowered: Any, target: str, sizes: str) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = re.match(r"RESOURCE_EXHAUSTED: (.*)", str(error))
        if refused is None:
            raise
        raise TooLargeError(
            f"One step on {target} ({sizes}) does not fit, and the compiler refuses it: "
            f"{refused[1]} Give a smaller batch, shorter rows, or more devices."
        ) from error


def _read(
    compiled: Any, target: Target, sizes: str, needed: int, done: int, seconds: float
) -> Plan:
    memory, text, count = compiled.memory_analysis(), compiled.as_text(), len(target.devices)
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes
    moved = collectives(text)
    sent = round(sum(each.ring_bytes for each in moved))
    chip, work = target.chip, done // count
    times = {}
    if chip.rate and chip.bandwidth and chip.links:
        times = {
            "arithmetic": work / chip.rate,
            "memory": (arguments + results) / chip.bandwidth,
            "links": sent / chip.links,
        }
    return Plan(
        target=target.name,
        mesh=sizes,
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries + results - memory.alias_size_in_bytes,
        capacity=chip.memory,
        bytes_accessed=bytes_accessed(text),
        collective_bytes=sent,
        collectives=count_runs(moved),
        flops_needed=needed // count,
        flops_done=work,
        attention=_attention_of(text),
        seconds=times,
        compile_seconds=seconds,
    )


def _attention_of(text: str) -> str:
    if "__cudnn$fmha" in text:
        return "cudnn"
    return "splash" if "splash_mha" in text else "blocks"


def _needed(score: Score, placed: Any, trainable: PyTree, reference_of: Any, platform: str) -> int:
    """The operations of a step that computes nothing twice, on all devices together."""
    policy, _, batch, reference = placed
    if reference_of is not None:
        reference = eqx.filter_eval_shape(reference_of, policy)

    def forward(model):
        arrays, static = eqx.partition((model, batch), _is_array)
        traced = jax.make_jaxpr(lambda arrays: score(*eqx.combine(arrays, static), key=None))(
            arrays
        )
        return flops(traced, platform)

    # A filter of floating-point arrays selects no shapes, but it selects what is traced.
    trained = eqx.filter_eval_shape(lambda policy: eqx.filter(policy, trainable), policy)
    of_policy = forward(policy) * (2 + _size(trained) / max(_size(policy), 1))
    return round(of_policy) + (0 if reference is None else forward(reference))


def _size(tree: PyTree) -> int:
    """The number of elements in matrices, which are what products are made with."""
    return sum(x.size for x in jax.tree.leaves(tree) if _is_array(x) and len(x.shape) > 1)


def _placed(arguments: Any, mesh: Mesh, rules: Rules | None) -> Any:
    """The shapes of the arguments with their shardings."""
    policy, opt_state, batch, reference = arguments
    place = placement(mesh, rules=rules)
    rows = NamedSharding(mesh, P(rows_in(mesh)))

    def by_rules(path, leaf):
        return _with(leaf, place(leaf_name(path), leaf)) if _is_array(leaf) else leaf

    def by_rows(leaf):
        return _with(leaf, rows) if _is_array(leaf) else leaf

    by_path = functools.partial(jax.tree_util.tree_map_with_path, by_rules)
    return by_path(policy), by_path(opt_state), jax.tree.map(by_rows, batch), by_path(reference)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _with(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def in_bytes(number: int) -> str:
    """A number of bytes with its unit."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"
