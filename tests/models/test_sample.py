"""Several completions of each prompt: what is drawn, from which keys, and its log-probabilities."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx.models._decoder import decode
from dpo_eqx.models._decoder.sample import choose, keep_min_p

from ..policies import Perceptron, as_users_compile
from .golden import FOLDER, Uncached

STEPS, SAMPLES = 11, 3


@pytest.fixture(scope="module")
def prompt():
    lengths = np.array([7, 2, 5])
    ids = np.random.default_rng(0).integers(0, 96, (3, 7))
    return dpx.Tokens(ids, np.arange(7) < lengths[:, None])


@pytest.fixture(scope="module")
def policy():
    # Windows of 12 in every other layer, soft caps, grouped heads.
    return models.load(FOLDER / "families" / "gemma2", dtype=jnp.float64)


KEYS = jax.random.split(jax.random.key(0), 3)
OPTIONS = {"samples": SAMPLES, "max_new_tokens": STEPS, "key": KEYS, "eos": 5, "temperature": 1.3}


@pytest.fixture(scope="module")
def drawn(policy, prompt):
    return models.sample(policy, prompt, **OPTIONS)


def rows(prompt, samples):
    """The samples as unpaired completions."""
    rewards = np.zeros(samples.log_probs.shape)
    return dpx.label_samples(prompt, samples, rewards, threshold=0.0)


def same(one, other):
    """The same real tokens; ids behind the end of a completion have no influence."""
    assert np.array_equal(one.tokens.mask, other.tokens.mask)
    ids = (np.where(x.tokens.mask, x.tokens.ids, 0) for x in (one, other))
    assert np.array_equal(*ids)
    np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-12)


def test_any_policy_draws_what_the_cache_draws(policy, prompt, drawn):
    same(drawn, models.sample(Uncached(policy), prompt, **OPTIONS))
    # Not vacuous: completions differ, end early and late, and pass the window.
    assert len({row.tobytes() for row in np.asarray(drawn.tokens.ids).reshape(9, -1)}) == 9
    assert drawn.tokens.ids.shape == (3, SAMPLES, STEPS)


@pytest.mark.slow
def test_caches_that_grow_draw_the_same(policy, prompt, drawn, monkeypatch):
    monkeypatch.setattr(decode, "FIRST_WIDTH", 2)
    jax.clear_caches()
    assert list(decode.widths(STEPS)) == [2, 4, 8, 11]
    same(drawn, models.sample(policy, prompt, **OPTIONS))
    jax.clear_caches()


def test_log_probs_are_those_of_the_score(policy, prompt, drawn):
    want = dpx.score_unpaired(policy, rows(prompt, drawn)).completion
    np.testing.assert_allclose(drawn.log_probs.reshape(-1), want, rtol=1e-10)


def test_a_jitted_function_can_close_over_the_prompt(policy, prompt, drawn):
    """With JAX arrays, of which even a sum is traced there."""
    constant = jax.tree.map(jnp.asarray, prompt)
    got = jax.eval_shape(lambda: models.sample(policy, constant, **OPTIONS))
    assert got.tokens.ids.shape == drawn.tokens.ids.shape


@pytest.mark.slow
def test_adapters_draw_like_any_policy(prompt):
    base = models.load(FOLDER / "families" / "qwen2", dtype=jnp.float64)
    policy = models.add_lora(base, rank=2, key=jax.random.key(1))
    policy = jax.tree.map(lambda x: x + 0.01 if eqx.is_inexact_array(x) else x, policy)
    same(*(models.sample(p, prompt, **OPTIONS) for p in (policy, Uncached(policy))))


class Table(eqx.Module):
    """Logits of the next token, by the last token alone."""

    table: jax.Array

    def __call__(self, ids):
        return self.table[ids]


TABLE = Table(2 * jax.random.normal(jax.random.key(2), (96, 96)))


def test_more_samples_and_other_batches_draw_the_same(prompt):
    drawn = models.sample(TABLE, prompt, **OPTIONS)
    more = models.sample(TABLE, prompt, **{**OPTIONS, "samples": SAMPLES + 2})
    same(drawn, jax.tree.map(lambda x: x[:, :SAMPLES], more))
    tail = jax.tree.map(lambda x: x[1:], prompt)
    rest = models.sample(TABLE, tail, **{**OPTIONS, "key": KEYS[1:]})
    same(jax.tree.map(lambda x: x[1:], drawn), rest)
    options = {name: value for name, value in OPTIONS.items() if name != "samples"}
    first = models.generate(TABLE, prompt, **options)
    assert np.array_equal(first.ids, drawn.tokens.ids[:, 0])
    assert np.array_equal(first.mask, drawn.tokens.mask[:, 0])


def test_draws_have_the_distribution_of_the_policy():
    table = jax.random.normal(jax.random.key(3), (4, 4))
    prompt = dpx.Tokens(np.array([[1]]), np.ones((1, 1), bool))
    count = 20_000
    samples = models.sample(
        Table(table), prompt, samples=count, max_new_tokens=2, key=jax.random.key(0)
    )
    first, second = np.asarray(samples.tokens.ids[0]).T
    seen = np.bincount(4 * first + second, minlength=16)
    log_probs = jax.nn.log_softmax(table)
    want = np.asarray(jnp.exp(log_probs[1][:, None] + log_probs)).reshape(-1) * count
    # Chi-square of 15 degrees of freedom: above 37.7 with a probability of 1e-3.
    assert ((seen - want) ** 2 / want).sum() < 37.7
    np.testing.assert_allclose(
        samples.log_probs[0], np.log(want / count)[4 * first + second], rtol=1e-6
    )


def truncated(probabilities, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The distribution to draw from, one id after the other, as the docstring has it."""
    tempered = probabilities ** (1 / temperature)
    tempered = tempered / tempered.sum()
    kept, order = np.zeros(len(tempered)), np.argsort(-tempered)
    limit = len(tempered) if top_k is None else top_k
    total = tempered[order[:limit]].sum()  # top-p looks at what top-k has left
    mass = 0.0
    for id in order[:limit]:
        if top_p is not None and mass >= top_p:
            break
        if min_p is None or tempered[id] >= min_p * tempered[order[0]]:
            kept[id] = tempered[id]
        mass += tempered[id] / total
    return kept / kept.sum()


SETTINGS = [
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.25},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.85, "min_p": 0.2},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_truncated_draws_have_their_distribution(settings):
    """Chi-square over 1e5 draws of one token, and nothing outside of what is kept."""
    probabilities = np.array([0.02, 0.3, 0.07, 0.21, 0.11, 0.05, 0.2, 0.04])
    table = Table(jnp.log(jnp.broadcast_to(jnp.asarray(probabilities), (8, 8))))
    prompt, count = dpx.Tokens(np.array([[1]]), np.ones((1, 1), bool)), 100_000
    options = {"samples": count, "max_new_tokens": 1, "key": jax.random.key(7)}
    drawn = models.sample(table, prompt, **options, **settings)
    ids = np.asarray(drawn.tokens.ids).ravel()
    seen, want = np.bincount(ids, minlength=8), count * truncated(probabilities, **settings)
    assert not seen[want == 0].any()
    kept = want > 0
    # Chi-square of at most 7 degrees of freedom: above 24.3 with a probability of 1e-3.
    assert ((seen - want)[kept] ** 2 / want[kept]).sum() < 24.3
    # Not vacuous: the settings change the distribution by far more.
    assert abs(want / count - probabilities).max() > 0.02
    # The log-probabilities are those of the policy, at temperature 1.
    np.testing.assert_allclose(drawn.log_probs[0], np.log(probabilities)[ids], rtol=1e-6)


def test_a_top_p_of_one_is_not_looked_for(prompt, monkeypatch):
    drawn = models.sample(TABLE, prompt, **OPTIONS)

    def keep_top_p(logits, top_p):
        raise AssertionError("`top_p` was applied.")

    monkeypatch.setattr("dpo_eqx.models._decoder.sample.keep_top_p", keep_top_p)
    same(drawn, models.sample(TABLE, prompt, top_p=1.0, **OPTIONS))
    with pytest.raises(AssertionError, match="was applied"):
        models.sample(TABLE, prompt, top_p=0.99, **OPTIONS)


def test_min_p():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    assert np.isfinite(keep_min_p(logits, 0.3)).tolist() == [True, True, True, False]
    assert np.isfinite(keep_min_p(logits, 1.0)).tolist() == [True, False, False, False]
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(
        lambda key: choose(logits, key, temperature=0.5, top_k=None, top_p=None, min_p=0.2)
    )(keys)
    # At this temperature the third is 0.09 times as likely as the first.
    assert set(np.asarray(drawn).tolist()) == {0, 1}


def test_a_completion_ends_with_a_stop_sequence(prompt):
    options = {"samples": 2, "max_new_tokens": STEPS, "key": KEYS}
    free = models.sample(TABLE, prompt, **options)
    stop = [np.asarray(free.tokens.ids[1, 0, 3:6]).tolist(), [97]]
    ended = models.sample(TABLE, prompt, stop=stop, **options)
    assert int(ended.tokens.mask[1, 0].sum()) == 6
    assert np.array_equal(ended.tokens.ids[1, 0, :6], free.tokens.ids[1, 0, :6])
    assert ended.tokens.mask[0].all()


def test_a_stop_sequence_needs_all_of_its_tokens(prompt):
    # From any id to 5, and from 5 to 6: the first new token alone is not the whole sequence.
    table = Table(jax.nn.one_hot(jnp.where(jnp.arange(96) == 5, 6, 5), 96))
    options = {"samples": 1, "max_new_tokens": 4, "temperature": 0, "stop": [[5, 5], [6, 5]]}
    drawn = models.sample(table, jax.tree.map(lambda x: x[:1], prompt), **options)
    assert drawn.tokens.ids[0, 0, :3].tolist() == [5, 6, 5]
    assert drawn.tokens.mask[0, 0].tolist() == [True, True, True, False]


def test_no_gradient_flows(prompt):
    def total(policy):
        return models.sample(policy, prompt, **OPTIONS).log_probs.sum()

    assert not np.any(eqx.filter_grad(total)(TABLE).table)


def reward(tokens):
    """The fraction of even ids."""
    return (tokens.mask & (tokens.ids % 2 == 0)).sum(-1) / jnp.maximum(tokens.mask.sum(-1), 1)


OPTIMIZER = optax.sgd(0.1)


def draw(policy, prompt, key):
    return models.sample(policy, prompt, samples=4, max_new_tokens=5, eos=5, key=key)


def pair(prompt, samples):
    return dpx.pair_samples(prompt, samples, reward(samples.tokens))


step = dpx.make_step(losses.dpo, OPTIMIZER)


def one_round(policy, reference, opt_state, prompt, key):
    """A round of drawing, judging, pairing and training, in one function."""
    batch = pair(prompt, draw(policy, prompt, key))
    return step(policy, opt_state, batch, reference)


def transformer():
    return models.load(FOLDER / "families" / "qwen2", dtype=jnp.float64)


def perceptron():
    return Perceptron(jax.random.key(5), dtype=jnp.float64)


@pytest.fixture(
    scope="module", params=[perceptron, pytest.param(transformer, marks=pytest.mark.slow)]
)
def start(request):
    policy = request.param()
    opt_state = OPTIMIZER.init(eqx.filter(policy, eqx.is_array))
    prompt = dpx.Tokens(jnp.arange(32).reshape(8, 4) % 11, jnp.ones((8, 4), bool))
    return policy, dpx.snapshot(policy), opt_state, prompt, jax.random.key(4)


@pytest.fixture(scope="module")
def after(start):
    return eqx.filter_jit(one_round)(*start)


def close(one, other, tolerance):
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        if eqx.is_array(x):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_one_jit_is_the_pieces(start):
    """As users compile: with the flags of the tests, the two programs round differently."""
    policy, reference, opt_state, prompt, key = start
    after = as_users_compile(one_round, *start)
    samples = as_users_compile(draw, policy, prompt, key)
    batch = as_users_compile(pair, prompt, samples)
    assert batch.weight.sum() > 4
    pieces, _, metrics = as_users_compile(step, policy, opt_state, batch, reference)
    assert eqx.tree_equal(after[0], pieces)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-12)


@pytest.mark.slow
def test_a_scan_over_rounds_is_the_loop(start):
    policy, reference, opt_state, prompt, key = start
    keys = jax.random.split(key, 2)
    arrays, static = eqx.partition(policy, eqx.is_array)

    @eqx.filter_jit
    def scanned(arrays, opt_state, reference, prompt):
        def body(carry, key):
            policy = eqx.combine(carry[0], static)
            policy, opt_state, _ = one_round(policy, reference, carry[1], prompt, key)
            return (eqx.filter(policy, eqx.is_array), opt_state), None

        return jax.lax.scan(body, (arrays, opt_state), keys)[0][0]

    got = scanned(arrays, opt_state, reference, prompt)
    for key in keys:
        policy, opt_state, _ = eqx.filter_jit(one_round)(policy, reference, opt_state, prompt, key)
    close(got, eqx.filter(policy, eqx.is_array), 1e-12)


@pytest.mark.slow
def test_eight_devices_are_one(start, after):
    policy, reference, opt_state, prompt, key = start
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    prompt = jax.device_put(prompt, over)
    got, _, _ = eqx.filter_jit(one_round)(policy, reference, opt_state, prompt, key)
    close(got, after[0], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["data=1,tensor=2", "data=3,tensor=2"])
def test_layers_split_over_devices_draw_the_same(sizes, policy, prompt, drawn):
    mesh = sharding.make_mesh(sizes, devices=jax.devices()[: 6 if "3" in sizes else 2])
    split = sharding.shard_policy(policy, mesh)
    weight = split.layers.attention.query.weight
    assert weight.sharding.shard_shape(weight.shape)[1] == weight.shape[1] // 2
    got = models.sample(split, sharding.shard_batch(prompt, mesh), **OPTIONS)
    np.testing.assert_array_equal(got.tokens.mask, drawn.tokens.mask)
    np.testing.assert_array_equal(got.tokens.ids, drawn.tokens.ids)
    np.testing.assert_allclose(got.log_probs, drawn.log_probs, rtol=0, atol=1e-10)


def test_errors(policy, prompt):
    def run(**settings):
        return models.sample(policy, prompt, **{**OPTIONS, **settings})

    with pytest.raises(ValueError, match="`samples` must be positive; got 0"):
        run(samples=0)
    with pytest.raises(ValueError, match=r"`min_p` must be in \(0, 1\]; got 0"):
        run(min_p=0.0)
    with pytest.raises(ValueError, match=r"one for each of the 3 prompts; got shape \(2,\)"):
        run(key=KEYS[:2])
    with pytest.raises(ValueError, match="`stop` must be sequences of at least one id"):
        run(stop=[[]])
