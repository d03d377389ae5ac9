"""Low-rank adapters for the linear layers of any Equinox module, by tree surgery.

`lora_filter` selects the adapters for training; the training step does not depend on them.
`lora_layer.py` has a layer with an adapter.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from ..._jax.paths import leaf_name
from .._decoder.random_parts import with_keys
from .first_values import first_magnitude, first_matrices, lora_scale
from .linear_layers import is_of_mixture, linear_paths, replace_at, unembedding_of
from .lora_layer import LoRA
from .quantize import dequantize, is_linear
from .whole_module import WholeModule, can_be_whole, module_paths

Policy = TypeVar("Policy")
Adapter = LoRA | WholeModule


def add_lora(
    policy: Policy,
    *,
    rank: int,
    alpha: float | int | None = None,
    target: str | None = None,
    rank_stabilised: bool = False,
    dropout: float = 0.0,
    dora: bool = False,
    modules_to_save: str | None = None,
    key: PRNGKeyArray,
) -> Policy:
    r"""Adds low-rank adapters to linear layers of any Equinox module.

    ```python
    policy = models.add_lora(policy, rank=16, key=key)
    trainable = models.lora_filter(policy)
    step = dpx.make_step(loss, optimizer, trainable=trainable, reference_of=models.without_lora)
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    ```

    $A$ starts uniform in $\pm 1/\sqrt{in}$ and $B$ at zero, so that the policy first computes
    exactly what its base does, and the base is the reference. Adapters are float32 or wider,
    whatever the dtype of the base.

    **Arguments:**

    - `policy`: a pytree with linear layers, this library's or `eqx.nn.Linear`, stacked along
        leading axes or not, quantised or not.
    - `rank`: the rank of the adapters.
    - `alpha`: the term is scaled by `alpha / rank` (default: `2 * rank`).
    - `target`: a regular expression, searched in the path of each layer's weight as
        `jax.tree_util.keystr(path, simple=True, separator=".")` writes it, such as
        `"layers.attention.query.weight"` (default: every linear layer but the unembedding, experts
        and routers). Each expert of a layer has an adapter of its own.
    - `rank_stabilised`: whether the term is scaled by `alpha / sqrt(rank)` instead, which is
        `use_rslora` in PEFT. Adapters of high rank then learn no slower than those of low rank.
    - `dropout`: the probability of dropout of the adapters' inputs. It applies only in training,
        that is with a key. A `Transformer` gives each adapter a key if it is called with one;
        another module does so with `keyed_lora`.
    - `dora`: whether the length of each row of the weights is trained, too, apart from its
        direction (weight-decomposed adapters, `use_dora` in PEFT). It costs the time and memory
        to compute these lengths in every pass.
    - `modules_to_save`: a regular expression like `target`, for modules that are trained whole
        beside the adapters, under PEFT's name for them: embeddings, norms, and linear layers
        outside of stacks, such as `"^(embedding|head)"` (default: none). The policy keeps the
        originals, too, since `without_lora` returns them.
    - `key`: the random key of the initial $A$.

    **Raises:**

    `ValueError` if

    - `target` matches no linear layer, or `modules_to_save` no module (the error lists the
        candidates), or both match one layer;
    - `rank` or `alpha` is not positive, or `dropout` is not in `[0, 1)`;
    - `dropout` is positive and `target` matches the unembedding, which is used as a matrix;
    - there is dropout or `dora`, and `target` matches experts or routers;
    - `policy` already has adapters.

    ??? cite

        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021 (arXiv 2106.09685).
        Rank-stabilised: Kalajdzievski, *A Rank Stabilization Scaling Factor for Fine-Tuning with
        LoRA*, 2023, theorem 3.2 (arXiv 2312.03732). `dora`: Liu et al., *DoRA: Weight-Decomposed
        Low-Rank Adaptation*, 2024, equation 5 and section 4.3 (arXiv 2402.09353). Differs: what is
        trained is the change of a length, so weight decay pulls it to its start and not to zero.
    """
    _check_positive(rank=rank, alpha=alpha)
    check_dropout(dropout)
    check_no_adapters(policy)
    paths = linear_paths(policy, target, is_linear, is_default=lambda node: not is_of_mixture(node))
    if dropout:
        _check_without_unembedding(policy, paths)
    whole = set() if modules_to_save is None else module_paths(policy, modules_to_save)
    if target is not None and paths & whole:
        raise ValueError(
            "`target` and `modules_to_save` must match different layers; both match "
            f"{', '.join(sorted(paths & whole))}."
        )
    paths = paths - whole
    alpha = 2 * rank if alpha is None else alpha
    keys = iter(jax.random.split(key, len(paths)))

    def adapted(path: str, layer: Any) -> LoRA:
        if dropout or dora:
            check_not_of_mixture(path, layer)
        down, up = first_matrices(layer, rank, next(keys))
        return LoRA(
            layer,
            down,
            up,
            lora_scale(alpha, rank, rank_stabilised=rank_stabilised),
            dropout,
            rank_stabilised=rank_stabilised,
            magnitude=first_magnitude(layer) if dora else None,
        )

    policy = replace_at(policy, paths, is_linear, adapted)
    return replace_at(policy, whole, can_be_whole, lambda _, module: WholeModule.of(module))


def lora_filter(policy: PyTree) -> PyTree:
    """True at the adapters and false elsewhere, for `trainable=` and `eqx.filter`.

    **Raises:**

    `ValueError` if `policy` has no adapters.
    """
    if not adapters(policy):
        raise ValueError("`policy` has no adapters to select; add them with `add_lora`.")

    def select(node):
        nothing = jax.tree.map(lambda _: False, node)
        if not isinstance(node, Adapter):
            return nothing
        return nothing.with_trained(tuple(True for _ in nothing.trained))

    return jax.tree.map(select, policy, is_leaf=_is_adapter)


def without_lora(policy: Policy) -> Policy:
    """The policy without its adapters: the base itself, not a copy.

    Use it as `reference_of=` if the base is the reference, which then takes no memory. If the
    reference has adapters of its own, use `pin_lora` and `pinned_lora`.
    """
    return _replace(policy, lambda adapter: adapter.base)


def keyed_lora(policy: Policy, key: PRNGKeyArray | None) -> Policy:
    """The policy whose adapters apply their dropout, each with a key of its own.

    A `Transformer` does this by itself if it is called with a key. Any other policy does it at the
    start of its call, before it runs its layers:

    ```python
    policy = dpx.adapt(model, lambda model, ids, key: models.keyed_lora(model, key)(ids))
    ```

    **Arguments:**

    - `policy`: a policy with adapters or without. In stacks of layers, each layer gets its own key.
    - `key`: the random key; with `None`, as in evaluation, the policy is unchanged.
    """
    return with_keys(policy, key)


def pin_lora(policy: Policy) -> Policy:
    """Stores a copy of the current adapters in the policy, for `pinned_lora`.

    ```python
    policy = models.pin_lora(models.load_lora(base, "adapter"))
    step = dpx.make_step(loss, optimizer, trainable=models.lora_filter(policy),
                         reference_of=models.pinned_lora)
    ```

    **Raises:**

    `ValueError` if `policy` has no adapters.
    """
    if not adapters(policy):
        raise ValueError("`policy` has no adapters to pin; add them with `add_lora`.")

    def pin(adapter: Adapter) -> Adapter:
        # Copies, since a buffer that is shared cannot be donated.
        pinned = tuple(jnp.array(x, copy=True) for x in adapter.trained)
        return dataclasses.replace(adapter, pinned=pinned)

    return _replace(policy, pin)


def pinned_lora(policy: Policy) -> Policy:
    """The policy with the adapters that `pin_lora` stored.

    Use it as `reference_of=` if training continues from adapters and the policy with the initial
    adapters is the reference. The base is shared with the policy.

    **Raises:**

    `ValueError` if `policy` has no pinned adapters.
    """
    if not adapters(policy):
        raise ValueError("`policy` has no adapters; add them with `add_lora`.")

    def as_pinned(adapter: Adapter) -> Adapter:
        if adapter.pinned is None:
            raise ValueError("`policy` has adapters that are not pinned; pin them with `pin_lora`.")
        return dataclasses.replace(adapter.with_trained(adapter.pinned), pinned=None)

    return _replace(policy, as_pinned)


def merge_lora(policy: Policy) -> Policy:
    """The policy with its adapters added into the weights, rounded to the weights' dtype.

    All quantised weights are decoded first, also those without an adapter.
    """

    def merge(adapter: Adapter):
        if isinstance(adapter, WholeModule):
            return adapter.merged()
        plain = dequantize(adapter.base)
        return eqx.tree_at(lambda layer: layer.weight, plain, adapter.weight)

    return dequantize(_replace(policy, merge))


def adapters(policy: PyTree) -> dict[str, LoRA]:
    """All adapters of a policy, by the path of their layer.

    **Raises:**

    `ValueError` if two layers have the same path, because a dictionary has a key with a dot.
    """
    return {path: node for path, node in _by_path(policy).items() if isinstance(node, LoRA)}


def modules_of(policy: PyTree) -> dict[str, WholeModule]:
    """All modules of a policy that are trained whole, by their paths; see `adapters`."""
    return {path: node for path, node in _by_path(policy).items() if isinstance(node, WholeModule)}


def _by_path(policy: PyTree) -> dict[str, Adapter]:
    nodes = jax.tree_util.tree_leaves_with_path(policy, is_leaf=_is_adapter)
    pairs = [(leaf_name(path), node) for path, node in nodes if _is_adapter(node)]
    by_path = dict(pairs)
    if len(by_path) < len(pairs):
        paths = [path for path, _ in pairs]
        shared = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(
            f"`policy` must have one path for each adapter; got two at {', '.join(shared)}. Rename "
            "the keys of its dictionaries so that they contain no dot."
        )
    return by_path


def check_no_adapters(policy: PyTree) -> None:
    """Raises if the policy already has adapters."""
    if adapters(policy):
        raise ValueError("`policy` has adapters already; merge them first, with `merge_lora`.")


def _is_adapter(node: Any) -> bool:
    return isinstance(node, Adapter)


def _replace(policy: Policy, function: Callable[[Any], Any]) -> Policy:
    return jax.tree.map(
        lambda node: function(node) if _is_adapter(node) else node, policy, is_leaf=_is_adapter
    )


def check_dropout(dropout: float) -> None:
    """Raises if `dropout` is not a probability below 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be in [0, 1); got {dropout}.")


def _check_without_unembedding(policy: PyTree, paths: set[str]) -> None:
    unembedding = unembedding_of(policy)
    if unembedding in paths:
        raise ValueError(
            "`dropout` must be 0 if `target` matches the unembedding, which is used as a matrix "
            f"and not called with an input to drop from; got `target` with {unembedding!r}. Leave "
            "it out of `target`, or add the adapters without `dropout`."
        )


def check_not_of_mixture(path: str, layer: Any) -> None:
    """Raises for experts and routers, whose adapters have no dropout and no magnitudes."""
    if is_of_mixture(layer):
        raise ValueError(
            "Adapters of experts and routers have neither `dropout` nor magnitudes (`dora`), as in "
            f"PEFT; got one for {path!r}. Add the adapters without these two, or leave that layer "
            "out."
        )


def _check_positive(**values: float | int | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be positive; got {value}.")
