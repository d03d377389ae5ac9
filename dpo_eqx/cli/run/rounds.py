"""A round of on-policy training as one step of `loop.py`: draw, judge, pair, then a training step.

Drawing, and the training step, are one compiled function each. The reward runs between them, on the
host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PyTree

from ... import models
from ..._arrays.batches import PreferenceBatch, UnpairedBatch
from ..._arrays.samples import Samples
from ..._arrays.tokens import Tokens
from ..._jax.dtypes import in_dtype
from ..._jax.inference_mode import in_inference
from ..._jax.keys import Keys
from ..._onpolicy.pair_samples import pair_samples
from ..._scoring.score import score_unpaired
from ..compose.draws import Encoded, answers_of, carried
from ..compose.rewards import Asked, Judge
from ..settings.online import Online
from ..terminal.prompts import stored
from .devices import put_batch
from .hosts import say
from .loop import Advance
from .state import State

Rewards = Float[Array | np.ndarray, "prompts samples"]
# Draws from a state: the answers to prompts, and how much likelier each is than to the reference.
Draw = Callable[[State, Tokens, Keys], tuple[Samples, Float[Array, "prompts samples"] | None]]
Pair = Callable[[Tokens, Samples, Rewards, Keys], PreferenceBatch]


@dataclasses.dataclass(frozen=True)
class Judging:
    """What turns drawn ids into rewards.

    - `encoded`: all prompts of the run; `tokenizer`: the policy's.
    - `ends`: the tokens that end an answer.
    - `judge`: the reward.
    """

    encoded: Encoded
    tokenizer: Any
    ends: tuple[int, ...]
    judge: Judge

    def rewards(self, numbers: Int[np.ndarray, " rows"], samples: Samples) -> Rewards:
        """The rewards of the answers to the prompts of these numbers.

        A round that is short of prompts has more answers than numbers; their rewards are all 0.
        """
        tokens = jax.tree.map(np.asarray, samples.tokens)
        asked = []
        for place, number in enumerate(numbers.tolist()):
            prompt = self.encoded.prompts[number]
            own = jax.tree.map(lambda x, place=place: x[place], tokens)
            _, texts, _ = answers_of(self.encoded, number, own, self.tokenizer, self.ends)
            value = stored(self.tokenizer, prompt)
            asked += [Asked(value, text, carried(prompt.columns)) for text in texts]
        rewards = np.zeros(tokens.ids.shape[:2], np.float32)
        rewards[: len(numbers)] = self.judge(asked).reshape(len(numbers), -1)
        return rewards


def make_round(
    advance: Advance, draw: Draw, pair: Pair, judging: Judging, mesh: Mesh | None = None
) -> Advance:
    """A function of a state, a batch of prompts, and the number of the round.

    The keys of a round come from the state's key and the round's number, and a prompt's key from
    its own number too: a run that is continued draws the same.

    **Arguments:**

    - `advance`: a training step on pairs; see `make_advance`.
    - `draw`, `pair`: see `make_draw` and `make_pair`.
    - `judging`: the reward.
    - `mesh`: the devices that the policy and the prompts are split over, if there are several.
    """

    def one_round(state: State, batch: UnpairedBatch, number: int) -> tuple[State, dict[str, Any]]:
        key = jax.random.fold_in(state.key, number)
        is_real = np.asarray(batch.weight) > 0
        numbers = np.asarray(batch.completion.ids)[:, 0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers.astype(np.uint32))
        prompt, keys = put_batch((batch.prompt, keys), mesh)
        samples, log_ratios = draw(state, prompt, keys)
        # Real prompts come first: a short batch is filled up at its end.
        rewards = judging.rewards(numbers[is_real], samples)
        pairs = pair(prompt, samples, rewards, keys)
        found = _metrics(samples, log_ratios, np.asarray(rewards), pairs, is_real)
        if not float(jnp.sum(jnp.asarray(pairs.weight))) > 0:
            say(f"round {number}: no pair to train on, since no two rewards differ enough")
        state, metrics = advance(state, pairs, number)
        return state, {**metrics, **found}

    return one_round


def make_draw(
    settings: Online,
    *,
    ends: tuple[int, ...],
    compute_dtype: DTypeLike,
    reference_of: Callable[[PyTree], PyTree] | None,
    needs_reference: bool,
) -> Draw:
    """The jitted function that draws the answers of a round, and scores them by the reference."""

    @eqx.filter_jit
    def draw(policy: PyTree, reference: PyTree, prompt: Tokens, keys: Keys):
        reference = reference if reference_of is None else reference_of(policy)
        # As an evaluation runs them: without dropout, and in the dtype of the forward pass.
        policy, reference = (in_dtype(in_inference(x), compute_dtype) for x in (policy, reference))
        samples = models.sample(
            policy,
            prompt,
            samples=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            key=keys,
            eos=ends,
        )
        if not needs_reference:
            return samples, None
        return samples, jnp.asarray(samples.log_probs) - _scored(reference, prompt, samples)

    def on_state(state: State, prompt: Tokens, keys: Keys):
        return draw(state.policy, state.reference, prompt, keys)

    return on_state


def _scored(policy: PyTree, prompt: Tokens, samples: Samples) -> Float[Array, "prompts samples"]:
    """The log-probabilities of all samples under another policy."""
    prompts, count = samples.log_probs.shape
    repeated = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), count, axis=0), prompt)
    rows = jax.tree.map(lambda x: x.reshape(prompts * count, -1), samples.tokens)
    batch = UnpairedBatch(repeated, rows, jnp.ones(prompts * count, bool))
    return jnp.asarray(score_unpaired(policy, batch).completion).reshape(prompts, count)


def make_pair(settings: Online, *, offset: bool) -> Pair:
    """The jitted function that makes the pairs of a round; `offset` is that of `pair_samples`."""

    @eqx.filter_jit
    def pair(prompt: Tokens, samples: Samples, rewards: Rewards, keys: Keys):
        # Not the keys of the samples themselves, which fold in the samples' numbers.
        apart = jax.vmap(lambda key: jax.random.fold_in(key, settings.samples))(keys)
        options = {"how": settings.how, "min_gap": settings.min_gap, "offset": offset}
        return pair_samples(prompt, samples, jnp.asarray(rewards), key=apart, **options)

    return pair


def _metrics(
    samples: Samples,
    log_ratios: Float[Array, "prompts samples"] | None,
    rewards: Float[np.ndarray, "prompts samples"],
    pairs: PreferenceBatch,
    is_real: Bool[np.ndarray, " prompts"],
) -> dict[str, Array]:
    """The numbers of a round, as means over its real prompts and all their answers."""
    lengths = np.asarray(samples.tokens.mask).sum(axis=-1)[is_real]
    weights = np.asarray(pairs.weight).reshape(len(is_real), -1)[is_real]
    found = {
        "reward": rewards[is_real].mean(),
        "reward_best": rewards[is_real].max(axis=1).mean(),
        "length": lengths.mean(),
        "ties": 1 - weights.mean(),
    }
    if log_ratios is not None:
        found["kl"] = np.asarray(log_ratios)[is_real].mean()
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}
