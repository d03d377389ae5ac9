"""The operations of the products in a traced program, in all runs of its loops.

Only products count, with two operations for each multiplication and addition, as in the literature.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from .._jax.by_platform import CUDA, OTHER
from .._jax.platform_rules import RULE, traced_rule


def flops(program: Any, platform: str) -> int:
    """The operations of a program on all of its devices together.

    **Arguments:**

    - `program`: a jaxpr, such as `jax.make_jaxpr(function)(*shapes)`.
    - `platform`: `"cpu"`, `"cuda"` or `"tpu"`; only its branch of `jax.lax.platform_dependent`
        counts. The longest of all other branches counts, and a loop of unknown length counts once.
    """
    return sum(_of(equation, platform) for equation in _open(program).eqns)


def _of(equation: Any, platform: str) -> int:
    name, parameters = equation.primitive.name, equation.params
    inner = [flops(program, platform) for program in _programs(parameters)]
    if name == "dot_general":
        return _of_dot(equation)
    if name == RULE:
        # Splash attention counts as the blocks that it stands for.
        return flops(traced_rule(equation, platform if platform == CUDA else OTHER), platform)
    if name in ("ragged_dot", "ragged_dot_general"):
        # (rows, width) by (groups, width, out): each row meets the matrix of its group.
        return 2 * math.prod(equation.outvars[0].aval.shape) * equation.invars[1].aval.shape[-2]
    if name in ("grouped_dot", "grouped_outer"):
        # Of (rows, in) and (groups, out, in); the derivative, of (rows, out) and (rows, in).
        out = equation.invars[1].aval.shape[1]
        return 2 * math.prod(equation.invars[0].aval.shape) * out
    if name.startswith("dot_product_attention"):
        return _of_attention(equation, backward="bwd" in name)
    if name == "scan":
        return parameters["length"] * sum(inner)
    if name == "shard_map":
        manual = parameters["newly_manual_axes"]
        return math.prod(parameters["mesh"].shape[axis] for axis in manual) * sum(inner)
    if name == "cond":
        platforms = parameters.get("branches_platforms")
        return max(inner) if platforms is None else inner[_branch(platforms, platform)]
    if name == "custom_linear_solve":
        return flops(parameters["jaxprs"].solve, platform)
    return sum(inner)


def _of_dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _of_attention(equation: Any, *, backward: bool) -> int:
    """Two products forward, five backward, of shapes `(batch, length, heads, width)`."""
    query, key = (x.aval.shape for x in equation.invars[:2])
    whole = (5 if backward else 2) * 2 * math.prod(query) * key[1]
    # A causal kernel leaves out what no query sees.
    return whole // 2 if "CAUSAL" in str(equation.params.get("mask_type")) else whole


def _branch(platforms: Any, platform: str) -> int:
    for index, names in enumerate(platforms):
        if names is None or platform in names:
            return index
    raise ValueError(f"The program has no branch for the platform {platform!r}.")


def _programs(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item


def _open(program: Any) -> Jaxpr:
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program
