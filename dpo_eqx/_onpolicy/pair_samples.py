"""Samples and their rewards to batches: pairs of a better and a worse sample, or labelled samples.

Shapes depend on shapes alone, so that drawing, judging, pairing and a training step can be one
jitted function. What cannot be compared stays in the batch with weight 0.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Real

from .._arrays.batches import PreferenceBatch, UnpairedBatch, check_prompt, is_concrete
from .._arrays.samples import Samples
from .._arrays.tokens import Tokens
from .._jax.describe import described
from .._jax.dtypes import at_least_float32
from .._jax.keys import Keys, keys_per_row
from .._jax.scalars import Number

How = Literal["best_worst", "all", "random"]
Rewards = Real[Array | np.ndarray, "prompts samples"]


def pair_samples(
    prompt: Tokens,
    samples: Samples | Tokens,
    rewards: Rewards,
    *,
    how: How = "best_worst",
    min_gap: Number = 0.0,
    offset: bool = False,
    key: Keys | None = None,
) -> PreferenceBatch:
    """Pairs of samples of one prompt: the sample with the larger reward is the chosen one.

    ```python
    samples = models.sample(policy, prompt, samples=4, max_new_tokens=64, key=key, eos=2)
    batch = dpx.pair_samples(prompt, samples, reward(prompt, samples.tokens))
    ```

    **Arguments:**

    - `prompt`: the prompts, padded on the right. Shape `(prompts, length)`.
    - `samples`: several completions of each prompt, of shape `(prompts, samples, completion)`.
    - `rewards`: the reward of each sample; larger is better. Shape `(prompts, samples)`.
    - `how`: `"best_worst"` makes one pair of each prompt, of its best and its worst sample, and
        `"random"` one pair of two random samples. `"all"` makes all
        `samples * (samples - 1) / 2` pairs.
    - `min_gap`: pairs whose rewards differ by less get weight 0. So do ties, always.
    - `offset`: whether the difference of the rewards comes along as `per_pair["offset"]`, for
        `losses.odpo`.
    - `key`: the random key of `"random"`; one key, or one for each prompt.

    **Returns:**

    A batch with the pairs of each prompt next to each other. `weight` is 1, or 0 for a pair without
    a preference, so `(batch.weight == 0).mean()` is the fraction of such pairs. Under a
    transformation a reward that is not finite gives weight 0 to the pairs that depend on it.

    **Raises:**

    `ValueError` if shapes do not fit, there are fewer than two samples, an argument is out of range
    or missing, or, outside of transformations, a reward is not finite.
    """
    tokens, rewards = _checked(prompt, samples, rewards, at_least=2)
    if how not in get_args(How):
        raise ValueError(
            f"`how` must be one of {', '.join(map(repr, get_args(How)))}; got {how!r}."
        )
    if not isinstance(min_gap, jax.Array) and not min_gap >= 0:
        raise ValueError(f"`min_gap` must not be negative; got {min_gap}.")
    first, second = _candidates(rewards, how, key)
    gap = _take(rewards, first) - _take(rewards, second)
    chosen, rejected = jnp.where(gap >= 0, first, second), jnp.where(gap >= 0, second, first)
    # A reward that is not finite is the best or the worst one, so its gap is not finite either.
    is_pair = jnp.isfinite(gap) & (abs(gap) > 0) & (abs(gap) >= min_gap)
    gaps = jnp.where(is_pair, abs(gap), 0).reshape(-1)
    return PreferenceBatch(
        _repeated(prompt, first.shape[1]),
        _picked(tokens, chosen),
        _picked(tokens, rejected),
        weight=is_pair.reshape(-1).astype(rewards.dtype),
        per_pair={"offset": gaps} if offset else None,
    )


def label_samples(
    prompt: Tokens,
    samples: Samples | Tokens,
    rewards: Rewards,
    *,
    threshold: Number | None = None,
    kl: bool = False,
) -> UnpairedBatch:
    """Samples with labels: a sample is desirable if its reward is high enough.

    **Arguments:**

    - `prompt`: the prompts, padded on the right. Shape `(prompts, length)`.
    - `samples`: completions of each prompt, of shape `(prompts, samples, completion)`.
    - `rewards`: the reward of each sample; larger is better. Shape `(prompts, samples)`.
    - `threshold`: a sample with at least this reward is desirable. By default a sample is desirable
        if its reward is larger than the mean of its prompt's rewards, and a sample with exactly
        this mean gets weight 0.
    - `kl`: whether each row also gets a sample of the next prompt, for the reference point of
        `losses.kto`. It needs at least two prompts.

    **Returns:**

    A batch of `prompts * samples` rows, with the samples of each prompt next to each other. Under a
    transformation a reward that is not finite gives weight 0 to the rows that depend on it.

    **Raises:**

    `ValueError` if shapes do not fit, `kl` has one prompt only, or, outside of transformations, a
    reward is not finite.
    """
    tokens, rewards = _checked(prompt, samples, rewards, at_least=1 if threshold is not None else 2)
    prompts, count = rewards.shape
    if kl and prompts < 2:
        raise ValueError(
            "`kl=True` pairs each prompt with samples of another one, so it needs at least two "
            f"prompts; got {prompts}."
        )
    if threshold is None:
        bar = rewards.mean(axis=1, keepdims=True)
        counts = rewards != bar
    else:
        bar = jnp.asarray(threshold, rewards.dtype)
        counts = jnp.ones(rewards.shape, bool)
    is_known = counts & jnp.isfinite(rewards) & jnp.isfinite(bar)
    return UnpairedBatch(
        _repeated(prompt, count),
        _rows(tokens),
        (rewards >= bar).reshape(-1),
        kl=_rows(jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), tokens)) if kl else None,
        weight=is_known.reshape(-1).astype(rewards.dtype),
    )


def _candidates(
    rewards: Real[Array, "prompts samples"], how: How, key: Keys | None
) -> tuple[Int[Array, "prompts pairs"], Int[Array, "prompts pairs"]]:
    """The two samples of each pair, in any order."""
    prompts, count = rewards.shape
    if how == "best_worst":
        return jnp.argmax(rewards, axis=1)[:, None], jnp.argmin(rewards, axis=1)[:, None]
    if how == "random":
        if key is None:
            raise ValueError(
                '`key` is required for `how="random"`; give one, as `jax.random.key(0)`.'
            )
        keys = keys_per_row(key, prompts, rows="prompts")
        order = jax.vmap(lambda key: jax.random.permutation(key, count))(keys)
        return order[:, :1], order[:, 1:2]
    first, second = (jnp.broadcast_to(i, (prompts, i.size)) for i in np.triu_indices(count, 1))
    return first, second


def _checked(
    prompt: Tokens, samples: Samples | Tokens, rewards: Any, *, at_least: int
) -> tuple[Tokens, Real[Array, "prompts samples"]]:
    """The tokens of the samples, and their rewards in float32 or wider."""
    tokens = samples.tokens if isinstance(samples, Samples) else samples
    check_prompt(prompt)
    if tokens.ids.ndim != 3 or tokens.ids.shape[0] != prompt.ids.shape[0]:
        raise ValueError(
            "`samples` must have shape `(prompts, samples, completion)` with the prompts of "
            f"`prompt`, {prompt.ids.shape[0]}; got {tokens.ids.shape}."
        )
    if tokens.ids.shape[1] < at_least:
        raise ValueError(
            f"`samples` must have at least {at_least} completions of each prompt to compare; got "
            f"{tokens.ids.shape[1]}."
        )
    shape = tokens.ids.shape[:2]
    if getattr(rewards, "shape", None) != shape:
        raise ValueError(
            f"`rewards` must be an array with one reward for each sample, shape {shape}; got "
            f"{described(rewards)}."
        )
    if is_concrete(rewards) and not np.isfinite(np.asarray(rewards)).all():
        row, sample = np.argwhere(~np.isfinite(np.asarray(rewards)))[0].tolist()
        raise ValueError(
            f"`rewards` must be finite; got {float(rewards[row, sample])} for sample {sample} of "
            f"prompt {row} (counted from 0)."
        )
    rewards = jnp.asarray(rewards)
    is_float = jnp.issubdtype(rewards.dtype, jnp.floating)
    dtype = at_least_float32(rewards.dtype) if is_float else jnp.dtype(jnp.float32)
    return tokens, rewards.astype(dtype)


def _take(
    rewards: Real[Array, "prompts samples"], index: Int[Array, "prompts pairs"]
) -> Real[Array, "prompts pairs"]:
    return jnp.take_along_axis(rewards, index, axis=1)


def _picked(tokens: Tokens, index: Int[Array, "prompts pairs"]) -> Tokens:
    """The samples at `index`, as rows."""
    return _rows(
        jax.tree.map(lambda x: jnp.take_along_axis(jnp.asarray(x), index[..., None], 1), tokens)
    )


def _rows(tokens: Tokens) -> Tokens:
    """Samples of all prompts as rows of one batch."""
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, x.shape[-1]), tokens)


def _repeated(prompt: Tokens, count: int) -> Tokens:
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), count, axis=0), prompt)
