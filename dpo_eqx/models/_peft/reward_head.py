"""The head of a reward model in PEFT's files, where it is always trained whole.

PEFT calls such an adapter one of the task `SEQ_CLS`, and the head `score`. `load.py` reads what is
beside it, and `save.py` writes it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._jax.dtypes import at_least_float32
from .._adapters.lora_layer import LoRA
from .._adapters.whole_module import WholeModule
from .._checkpoint.families import FAMILIES
from .._checkpoint.folder import ADAPTER_CONFIG, Weights
from .._checkpoint.reward_head import TENSOR
from .._decoder.reward_model import RewardModel
from .._decoder.transformer import Transformer
from .checks import PREFIX


def take_head(weights: Weights, width: int) -> np.ndarray | None:
    """Takes the head of a reward model out of an adapter's tensors; `None` if there is none.

    **Raises:**

    `ValueError` if the head has several labels, or another width.
    """
    name = PREFIX + TENSOR
    if name not in weights.shapes:
        return None
    if weights.shapes[name] != (1, width):
        raise ValueError(
            f"The adapter of {weights.folder / ADAPTER_CONFIG} is one of a sequence classifier. It "
            f"is one of a reward model on this base if its tensor {name!r} has one label, shape "
            f"(1, {width}); it has shape {weights.shapes[name]}."
        )
    head = weights.read(name)
    weights.drop(name)
    return head


def with_head(policy: Transformer | RewardModel, head: np.ndarray | None) -> RewardModel:
    """The reward model whose head an adapter's file replaces; `None` keeps the head.

    A `Transformer` becomes a reward model. Its head has no original, so the new one stands for it.
    """
    is_new = isinstance(policy, Transformer)
    model = RewardModel(policy, key=jax.random.key(0)) if is_new else policy
    if head is None:
        return model
    layer = model.head
    array = jnp.asarray(head, at_least_float32(layer.weight.dtype))
    if is_new:
        # A copy, since a buffer that is shared cannot be donated.
        original = jnp.array(array, layer.weight.dtype, copy=True)
        layer = eqx.tree_at(lambda x: x.weight, layer, original)
    whole = WholeModule.of(layer).with_trained((array,))
    return eqx.tree_at(lambda model: model.head, model, whole)


def has_names(policy: PyTree) -> bool:
    """Whether PEFT has names for the layers of this reward model, whose head has no $A$ and $B$."""
    return (
        isinstance(policy, RewardModel)
        and not isinstance(policy.head, LoRA)
        and FAMILIES[policy.body.config.family].classifier is not None
    )


def head_tensor(model: RewardModel) -> dict[str, np.ndarray]:
    """The tensor of the head in an adapter's file."""
    head = model.head.module if isinstance(model.head, WholeModule) else model.head
    return {PREFIX + TENSOR: np.ascontiguousarray(head.weight)}
