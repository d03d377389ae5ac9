"""What a run would need of each device, without a step: its program is compiled and looked at."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from ... import sharding
from ...protocols import Step
from .state import State

NOTHING_DONE = "dry run: nothing was trained or written"


def needs(
    step: Step,
    state: State,
    batch: Any,
    mesh: Mesh | None,
    *,
    trainable: Any,
    options: Mapping[str, Any],
) -> sharding.Plan:
    """What the step needs of each device for `batch`.

    **Arguments:**

    - `step`, `trainable`: from `make_step`, and its filter.
    - `state`: the state before the first step.
    - `batch`: the global batch of the run that takes the most memory, or its shapes.
    - `mesh`: the mesh of the run, if any.
    - `options`: the options of the step; `score` and `reference_of` count.
    """
    sizes = "data=1" if mesh is None else ",".join(f"{n}={s}" for n, s in mesh.shape.items())
    return sharding.plan(
        step,
        state.policy,
        state.opt_state,
        batch,
        state.reference,
        target=f"here:{1 if mesh is None else mesh.size}",
        mesh=sizes,
        score=options["score"],
        trainable=trainable,
        reference_of=options["reference_of"],
    )
