"""Finds, in a function's jaxpr, the arrays of its result that depend on its argument.

Only values count: a result that uses only the shape or dtype of an array does not depend on it.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import PyTree

from .._jax.paths import leaf_name


def dependent_paths(function: Callable[[Any], Any], tree: PyTree) -> list[str]:
    """The paths of the arrays in `function(tree)` that depend on an array of `tree`.

    If the result holds a closure or a `functools.partial`, the arrays inside it count, too. What
    cannot be traced, such as the body of a callback, counts as dependent on all of its operands.
    """
    closed, arrays, _ = eqx.filter_make_jaxpr(lambda tree: _open_functions(function(tree)))(tree)
    dependent = _outputs(closed.jaxpr, [True] * len(closed.jaxpr.invars))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(arrays)]
    return [leaf_name(path) for path, depends in zip(paths, dependent, strict=True) if depends]


def _open_functions(tree: PyTree) -> PyTree:
    """`tree` with each Python function replaced by the values that it holds."""
    seen = set()

    def open_one(leaf: Any) -> PyTree:
        if isinstance(leaf, functools.partial):
            parts = [leaf.func, leaf.args, leaf.keywords]
        elif isinstance(leaf, types.MethodType):
            parts = [leaf.__self__, leaf.__func__]
        elif isinstance(leaf, types.FunctionType):
            parts = [cell.cell_contents for cell in leaf.__closure__ or ()]
        else:
            return leaf
        # A function may hold itself, which would otherwise recurse without end.
        is_new = id(leaf) not in seen
        seen.add(id(leaf))
        return jax.tree.map(open_one, parts) if is_new else None

    return jax.tree.map(open_one, tree)


def _outputs(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Whether each output depends on an input that is marked."""
    dependent = {var for var, depends in zip(jaxpr.invars, inputs, strict=True) if depends}

    def marked(atoms: Sequence[Any]) -> list[bool]:
        return [not isinstance(atom, Literal) and atom in dependent for atom in atoms]

    for equation in jaxpr.eqns:
        operands = marked(equation.invars)
        if any(operands):
            results = zip(equation.outvars, _results(equation, operands), strict=True)
            dependent.update(var for var, depends in results if depends)
    return marked(jaxpr.outvars)


def _results(equation: JaxprEqn, operands: list[bool]) -> list[bool]:
    """Whether each result of one equation depends on an operand that is marked."""
    params, everything = equation.params, [True] * len(equation.outvars)
    if "branches" in params:
        index, *inputs = operands
        branches = [_outputs(branch.jaxpr, inputs) for branch in params["branches"]]
        return everything if index else [any(results) for results in zip(*branches, strict=True)]
    inner = [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in params.values()
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
    if len(inner) != 1 or len(inner[0].invars) != len(operands):
        return everything
    if equation.primitive.name == "scan":
        return _scanned(equation, inner[0], operands)
    results = _outputs(inner[0], operands)
    return results if len(results) == len(everything) else everything


def _scanned(equation: JaxprEqn, body: Jaxpr, operands: list[bool]) -> list[bool]:
    """The results of a scan, iterated until no more of the carry becomes dependent."""
    # Scanned inputs and stacked outputs have one more axis outside the body, so equal shapes
    # identify carries and constants. The parameters that count them have other names in other
    # versions of JAX.
    carried = _same_shapes(equation.outvars, body.outvars)
    consts = _same_shapes(equation.invars, body.invars) - carried
    while True:
        results = _outputs(body, operands)
        carry = operands[consts : consts + carried]
        grown = [a or b for a, b in zip(carry, results[:carried], strict=True)]
        if grown == carry:
            return results
        operands = [*operands[:consts], *grown, *operands[consts + carried :]]


def _same_shapes(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(x.aval.shape == y.aval.shape for x, y in zip(outside, inside, strict=True))
