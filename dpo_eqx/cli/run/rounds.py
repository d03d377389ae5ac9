"""A round of on-policy training as one step of `loop.py`: draw, judge, pair, then a training step.

Drawing, and the training step, are one compiled function each. The reward runs between them, on the
host; each process judges a part of the answers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, PyTree, UInt32

from ... import models, sharding
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
from . import hosts
from .devices import keep_rows_of, put_batch
from .loop import Advance
from .offload import fetched
from .parts import share_of
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

    def rewards(
        self, numbers: Int[np.ndarray, " prompts"], tokens: Tokens
    ) -> Float[np.ndarray, "prompts samples"]:
        """The rewards of the answers to the prompts of these numbers; `tokens` are in NumPy."""
        asked = []
        for place, number in enumerate(numbers.tolist()):
            prompt = self.encoded.prompts[number]
            own = jax.tree.map(lambda x, place=place: x[place], tokens)
            _, texts, _ = answers_of(self.encoded, number, own, self.tokenizer, self.ends)
            value = stored(self.tokenizer, prompt)
            asked += [Asked(value, text, carried(prompt.columns)) for text in texts]
        found = self.judge(asked) if asked else np.zeros(0)
        return found.astype(np.float32).reshape(tokens.ids.shape[:2])


def judged(
    judging: Judging, numbers: Int[np.ndarray, " prompts"], tokens: Tokens
) -> Float[np.ndarray, "rows samples"]:
    """The rewards of all answers of a round, on every process. Each process judges its part.

    A round that is short of prompts has more rows of answers than numbers; their rewards are 0.

    **Arguments:**

    - `numbers`: the numbers of the round's prompts.
    - `tokens`: the answers of all processes, in NumPy. Shape `(rows, samples, length)`.
    """
    share = share_of(len(numbers), jax.process_index(), jax.process_count())
    part = slice(share.start, share.stop)
    own = jax.tree.map(lambda x: x[part], tokens)
    rewards = np.zeros(tokens.ids.shape[:2], np.float32)
    # If a reward fails on one process, the others must not wait for it.
    rewards[part] = hosts.together(lambda: judging.rewards(numbers[part], own))
    return hosts.summed(rewards)


def make_round(
    advance: Advance, draw: Draw, pair: Pair, judging: Judging, mesh: Mesh | None = None
) -> Advance:
    """A function of a state, this process's part of a batch of prompts, and the round's number.

    The keys of a round come from the state's key and the round's number, and a prompt's key from
    its own number too: neither a run that is continued nor the number of processes changes them.

    **Arguments:**

    - `advance`: a training step on pairs that are on the mesh; see `make_advance`.
    - `draw`, `pair`: see `make_draw` and `make_pair`.
    - `judging`: the reward.
    - `mesh`: the devices that the policy and the prompts are split over, if there are several.
    """

    def one_round(state: State, batch: UnpairedBatch, number: int) -> tuple[State, dict[str, Any]]:
        own = batch.prompt, np.asarray(batch.completion.ids)[:, 0], batch.weight
        prompt, numbers, weight = put_batch(own, mesh)
        # As an array: for a Python number each round would be a program of its own.
        keys = _keys(state.key, np.asarray(number, np.uint32), numbers)
        samples, log_ratios = draw(state, prompt, keys)
        tokens, numbers, weight = sharding.gather((samples.tokens, numbers, weight))
        # Real prompts come first: a short batch is filled up at its end.
        is_real = np.asarray(weight) > 0
        rewards = judged(judging, np.asarray(numbers)[is_real], tokens)
        pairs = pair(prompt, samples, rewards, keys)
        pair_weight = np.asarray(sharding.gather(pairs.weight))
        if not pair_weight.any():
            hosts.say(f"round {number}: no pair to train on, since no two rewards differ enough")
        found = _metrics(tokens, sharding.gather(log_ratios), rewards, pair_weight, is_real)
        state, metrics = advance(state, pairs, number)
        return state, {**metrics, **found}

    return one_round


@eqx.filter_jit
def _keys(
    key: PRNGKeyArray,
    number: UInt32[Array | np.ndarray, ""],
    numbers: Int[Array | np.ndarray, " prompts"],
) -> Keys:
    """The keys of the prompts of these numbers in a round."""
    of_round = jax.random.fold_in(key, number)
    return jax.vmap(jax.random.fold_in, (None, 0))(of_round, numbers.astype(np.uint32))


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
        reference = fetched(reference) if settings.reference_offload else reference
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


def make_pair(settings: Online, *, offset: bool, mesh: Mesh | None = None) -> Pair:
    """The jitted function that makes the pairs of a round, split over the mesh.

    `offset` is that of `pair_samples`.
    """

    @eqx.filter_jit
    def pair(prompt: Tokens, samples: Samples, rewards: Rewards, keys: Keys):
        # Not the keys of the samples themselves, which fold in the samples' numbers.
        apart = jax.vmap(lambda key: jax.random.fold_in(key, settings.samples))(keys)
        options = {"how": settings.how, "min_gap": settings.min_gap, "offset": offset}
        pairs = pair_samples(prompt, samples, jnp.asarray(rewards), key=apart, **options)
        return keep_rows_of(pairs, mesh)

    return pair


def pair_shapes(
    draw: Draw, pair: Pair, state: State, batch: UnpairedBatch, mesh: Mesh | None = None
) -> PreferenceBatch:
    """The shapes of the pairs of a round, without drawing; arguments as of `make_round`."""

    def pairs_of(state: State, prompt: Tokens, numbers: Int[Array, " prompts"]) -> PreferenceBatch:
        keys = _keys(state.key, jnp.zeros((), jnp.uint32), numbers)
        samples, _ = draw(state, prompt, keys)
        return pair(prompt, samples, jnp.zeros(samples.log_probs.shape, jnp.float32), keys)

    own = batch.prompt, np.asarray(batch.completion.ids)[:, 0]
    return eqx.filter_eval_shape(pairs_of, state, *put_batch(own, mesh))


def _metrics(
    tokens: Tokens,
    log_ratios: Float[Array | np.ndarray, "prompts samples"] | None,
    rewards: Float[np.ndarray, "prompts samples"],
    pair_weight: Float[np.ndarray, " pairs"],
    is_real: Bool[np.ndarray, " prompts"],
) -> dict[str, Array]:
    """The numbers of a round, as means over its real prompts and all their answers."""
    found = {
        "reward": rewards[is_real].mean(),
        "reward_best": rewards[is_real].max(axis=1).mean(),
        "length": np.asarray(tokens.mask).sum(axis=-1)[is_real].mean(),
        "ties": 1 - pair_weight.reshape(len(is_real), -1)[is_real].mean(),
    }
    if log_ratios is not None:
        found["kl"] = np.asarray(log_ratios)[is_real].mean()
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}
