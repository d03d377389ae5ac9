"""Reward models: a decoder with one number at the last token in place of the logits.

`_checkpoint` reads and writes them; `losses.bradley_terry` trains them.
"""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from ..._arrays.batches import PreferenceBatch
from ..._arrays.layout import Layout
from ..._arrays.log_probs import PairLogProbs
from ..._arrays.tokens import Tokens, as_ids
from ..._jax.dtypes import at_least_float32
from ..._jax.explicit_meshes import automatic
from ..._jax.keys import Keys, keys_per_pair
from ..._scoring.predict import sizes_of
from .basic_layers import Linear
from .config import Config
from .transformer import Transformer


class RewardModel(eqx.Module):
    """A reward for one sequence, read at its last token; `jax.vmap` it over a batch.

    ```python
    reward_model = models.load("Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    reward = reward_model(ids, length)
    ```

    **Arguments:**

    - `policy`: a `Transformer`, whose unembedding is dropped.
    - `key`: the random key of the initial weights of the new head, of shape `(1, width)` and in
        the dtype of the embedding.
    """

    body: Transformer
    head: Linear

    def __init__(self, policy: Transformer, *, key: PRNGKeyArray):
        self.body = without_unembedding(policy)
        width = policy.config.width
        head = Linear(1, width, bias=False, scale=width**-0.5, key=key)
        self.head = jax.tree.map(lambda x: x.astype(policy.embedding.weight.dtype), head)

    @partial(automatic, like=1)
    def __call__(
        self,
        ids: Integer[Array | np.ndarray, " length"],
        length: Integer[Array | np.ndarray, ""] | int | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, ""]:
        """The reward of the first `length` tokens, in float32 or wider.

        **Arguments:**

        - `ids`: prompt and completion, padded on the right. Shape `(length,)`.
        - `length`: the number of real tokens, at least 1 (default: all).
        - `key`: the random key of dropout; without it no dropout applies.
        """
        length = jnp.asarray(ids.size if length is None else length)
        hidden = self.body.hidden(ids, Layout(length, ids.size, ()), key=key)
        return self.rewards(hidden, (length - 1)[None])[0]

    def rewards(
        self, hidden: Float[Array, "length width"], places: Int[Array, " places"]
    ) -> Float[Array, " places"]:
        """The rewards at some places of a row of hidden states, in float32 or wider."""
        at = hidden[places]
        return self.head(at.astype(at_least_float32(at.dtype)))[:, 0]


def without_unembedding(policy: Transformer) -> Transformer:
    """`policy` without its unembedding, as a policy whose unembedding is tied has none."""
    config = without_head(policy.config)
    bare = eqx.filter_eval_shape(
        partial(Transformer, config, origin=policy.origin), key=jax.random.key(0)
    )
    return eqx.tree_at(_parts, bare, _parts(policy), is_leaf=lambda x: x is None)


def without_head(config: Config) -> Config:
    """The configuration of a decoder that has no unembedding of its own."""
    return dataclasses.replace(config, tied=True, unembedding_bias=False)


def _parts(policy: Transformer) -> tuple:
    return policy.embedding, policy.positions, policy.layers, policy.norm


def score_rewards(
    reward_model: RewardModel, batch: PreferenceBatch, *, key: Keys | None = None
) -> PairLogProbs:
    """The rewards of both completions of each pair, as a score for `losses.bradley_terry`.

    ```python
    step = dpx.make_step(losses.bradley_terry, optimizer, score=models.score_rewards)
    ```

    A reward is read at the last scored token of a completion, or at the last token of the prompt if
    the completion is empty. The prompt is encoded once for both completions.

    **Arguments:**

    - `reward_model`: a `RewardModel`.
    - `batch`: the pairs.
    - `key`: one random key of dropout, or one for each pair.

    **Returns:**

    The rewards, in the fields `chosen` and `rejected`, and the weights of the batch. The numbers of
    scored tokens are `None`, so that a loss of averages refuses rewards.
    """

    def pair(prompt: Tokens, chosen: Tokens, rejected: Tokens, key: Keys | None):
        widths = chosen.ids.size, rejected.ids.size
        sizes = jnp.stack([sizes_of(chosen), sizes_of(rejected)])
        layout = Layout(prompt.mask.sum(), prompt.ids.size, widths, sizes)
        ids = jnp.concatenate([as_ids(x.ids) for x in (prompt, chosen, rejected)])
        hidden = reward_model.body.hidden(ids, layout, key=key)
        starts = jnp.asarray([prompt.ids.size, prompt.ids.size + widths[0]], sizes.dtype)
        last_of_prompt = layout.prompt_length.astype(sizes.dtype) - 1
        return reward_model.rewards(
            hidden, jnp.where(sizes > 0, starts + sizes - 1, last_of_prompt)
        )

    keys = keys_per_pair(key, batch.pairs)
    rewards = jax.vmap(pair)(batch.prompt, batch.chosen, batch.rejected, keys)  # (pairs, 2)
    weight = None if batch.weight is None else jnp.asarray(batch.weight)
    return PairLogProbs(rewards[:, 0], rewards[:, 1], weight=weight)
