"""What is said of a policy, a loss, a metric or a key that is not one."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, losses, models, sharding

from .policies import VOCAB, Attention, Perceptron, random_batch

POLICY = Perceptron(jax.random.key(0))
BATCH = random_batch(pairs=2)

# The short-hands: logits of the right form, and a change to them.
LOGITS = {
    "tuple": (lambda x: (x, None), r"got a tuple of 2: \(11, 11\) in float64; None from Returns\."),
    "list": (lambda x: [x], r"got a list of 1: .* wrap the policy in an `eqx.Module`"),
    "dict": (lambda x: {"logits": x}, r"an object of class dict .* Return the logits alone"),
    "none": (lambda x: None, "got None from Returns. Return the logits as an array"),
    "object": (lambda x: POLICY, "got an object of class Perceptron from Returns"),
    "batch axis": (lambda x: x[None], r"got \(1, 11, 11\) .* written for one sequence"),
    "last token": (lambda x: x[-1], r"got \(11,\) .* every token, not only of the last token"),
    "cut": (lambda x: x[1:], r"here \(11, vocab\) for `ids` of shape \(11,\); got \(10, 11\)"),
    "integers": (lambda x: x.astype(int), "got .* in int64 .* real floating-point numbers"),
    "complex": (lambda x: x.astype(complex), "in complex128 .* real floating-point numbers"),
}


class Returns(eqx.Module):
    change: object = eqx.field(static=True)

    def __call__(self, ids):
        return self.change(jnp.zeros((ids.size, VOCAB)))


class ReturnsHidden(Attention):
    change: object = eqx.field(static=True, default=None)

    def hidden(self, ids, layout, *, key=None):
        return self.change(super().hidden(ids, layout))


def score(policy, **options):
    return eqx.filter_eval_shape(partial(dpx.score_pairs, **options), policy, BATCH)


@pytest.mark.parametrize("kind", LOGITS)
def test_what_a_policy_returns(kind):
    change, message = LOGITS[kind]
    with pytest.raises(ValueError, match=r"`policy\(ids\)` must return logits.*" + message):
        score(Returns(change))


@pytest.mark.parametrize("kind", ["tuple", "none", "last token", "cut", "integers"])
def test_what_hidden_returns(kind):
    policy = ReturnsHidden(jax.random.key(0))
    object.__setattr__(policy, "change", LOGITS[kind][0])
    want = r"`policy.hidden\(ids, layout\)` must return shape .* got .* from ReturnsHidden"
    with pytest.raises(ValueError, match=want):
        score(policy)


def test_logits_of_numpy_are_logits():
    policy = Returns(lambda x: np.zeros(x.shape))
    np.testing.assert_allclose(
        dpx.score_pairs(policy, BATCH).chosen, -BATCH.chosen.mask.sum(1) * np.log(VOCAB)
    )


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (None, "got None"),
        (Perceptron, r"got the class Perceptron. Make an instance of it by `Perceptron\("),
        (Attention, "got the class Attention"),
        (jnp.zeros(3), r"got \(3,\) in float64. Give it a method `__call__"),
    ],
)
def test_what_is_no_policy(policy, message):
    with pytest.raises(ValueError, match="`policy` must be a callable pytree.*" + message):
        dpx.score_pairs(policy, BATCH)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda ids: POLICY(ids), "a function, which hides its arrays from JAX"),
        (partial(Perceptron.__call__, POLICY), "a partial, which hides .* `jax.tree_util.Partial`"),
        (None, "The policy is None"),
        (Perceptron, "The policy is the class Perceptron; give an instance"),
        (Returns(lambda x: x), "in fields that are not static"),
    ],
)
def test_a_policy_without_arrays_to_train(policy, message):
    with pytest.raises(ValueError, match="`trainable` must select at least one.*" + message):
        dpx.make_grad(losses.sft)(policy, BATCH)


def test_a_partial_of_jax_is_a_policy():
    policy = jax.tree_util.Partial(Perceptron.__call__, POLICY)
    grad = eqx.filter_jit(dpx.make_grad(losses.sft))
    (gradients, _), (want, _) = grad(policy, BATCH), grad(POLICY, BATCH)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


def test_errors_say_whether_the_reference_was_run():
    wrong = Returns(LOGITS["tuple"][0])
    grad = partial(eqx.filter_eval_shape, dpx.make_grad(losses.dpo))
    with pytest.raises(ValueError, match="while the reference was run"):
        grad(POLICY, BATCH, wrong)
    with pytest.raises(ValueError, match=r"`policy\(ids\)`") as caught:
        dpx.make_eval(losses.sft)(wrong, BATCH)
    assert "reference was run" not in "".join(getattr(caught.value, "__notes__", []))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.loss, r"PairLoss\(loss, .*got \(2,\) in float64 from `loss`"),
        (lambda x: (x.loss, x.chosen_reward), "PairLoss.*got a tuple of 2: "),
        (lambda x: None, "PairLoss.*got None from `loss`"),
        (lambda x: 0.7, "PairLoss.*got 0.7 from `loss`"),
    ],
)
def test_what_a_loss_returns(change, message):
    def loss(policy, reference):
        return change(losses.sft(policy, reference))

    log_probs = dpx.score_pairs(POLICY, BATCH)
    for run in (
        lambda: dpx.make_grad(partial(loss))(POLICY, BATCH),
        lambda: dpx.make_eval(loss)(POLICY, BATCH),
        lambda: dpx.diagnose(loss, log_probs),
    ):
        with pytest.raises(ValueError, match="`loss` must return a `losses." + message):
            run()


def test_a_loss_of_integers(unchecked):
    def loss(policy, reference):
        zeros = jnp.zeros(policy.chosen.shape, int)
        return losses.PairLoss(zeros, zeros, zeros)

    with pytest.raises(ValueError, match="floating-point losses; got int64 from `loss`"):
        dpx.make_grad(loss)(POLICY, BATCH)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.1, r"'mine' must have one value per pair, shape \(2,\).*got 0.1.*`jnp.full_like"),
        (None, "'mine' must have one value per pair.*got None"),
        ("text", "got 'text'"),
        (np.zeros(3), r"got \(3,\) in float64"),
        (np.zeros(2, complex), "an array of real numbers"),
        ((np.zeros(2), None, None), "got a tuple of 3"),
        ((np.zeros(2), np.zeros(2, int)), r"boolean mask of shape \(2,\).*got \(2,\) in int64"),
        ((np.zeros(2), np.ones(3, bool)), r"boolean mask of shape \(2,\).*got \(3,\) in bool"),
        ((0.1, np.ones(2, bool)), "'mine' must have one value per pair.*got 0.1"),
    ],
)
def test_what_a_metric_is(value, message):
    metrics = dpx.make_eval(losses.sft, metrics=lambda *args: {"mine": value})
    with pytest.raises(ValueError, match=message):
        metrics(POLICY, BATCH)


def test_metrics_that_are_no_dict():
    for value in (None, np.zeros(2)):
        with pytest.raises(ValueError, match="`metrics` must return a dict of arrays"):
            dpx.make_eval(losses.sft, metrics=lambda *args, value=value: value)(POLICY, BATCH)


@pytest.mark.parametrize("key", [0, 1.5, "seed", np.zeros(2), np.zeros(3, np.uint32)])
def test_a_seed_is_no_key(unchecked, key):
    wanted = r"`key` must be a JAX key, as `jax.random.key\(0\)` makes one.*got "
    for run in (
        lambda: dpx.make_grad(losses.sft)(POLICY, BATCH, key=key),
        lambda: dpx.score_pairs(POLICY, BATCH, key=key),
        lambda: models.generate(POLICY, BATCH.prompt, max_new_tokens=1, key=key),
    ):
        with pytest.raises(ValueError, match=wanted):
            run()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_both_kinds_are_keys(impl):
    typed = jax.random.key(0, impl=impl)
    raw = jax.random.key_data(typed)
    assert raw.dtype == np.uint32
    policy = Perceptron(jax.random.key(0), rate=0.5)
    dpx.score_pairs(policy, BATCH, key=typed)
    if impl == "threefry2x32":
        got = dpx.score_pairs(policy, BATCH, key=raw)
        np.testing.assert_array_equal(got.chosen, dpx.score_pairs(policy, BATCH, key=typed).chosen)


@pytest.mark.parametrize("prompt", ["text", [1, 2, 3], np.array([[1, 2]]), None])
def test_a_prompt_of_text(unchecked, prompt):
    with pytest.raises(ValueError, match=r"`prompt` must be `dpx.Tokens.*A tokenizer turns text"):
        models.generate(POLICY, prompt, max_new_tokens=1, temperature=0)


def test_ids_that_are_no_array(unchecked):
    with pytest.raises(ValueError, match=r"`ids` must be an array .* got 'text'. Text is turned"):
        dpx.Tokens("text", np.ones((1, 4), bool))
    with pytest.raises(ValueError, match=r"`mask` must be an array .* got \[True\]"):
        dpx.Tokens(np.ones(1, int), [True])


def test_generate_takes_numbers_of_numpy():
    def run(**options):
        return models.generate(POLICY, BATCH.prompt, max_new_tokens=np.int64(3), **options).ids

    greedy = run(temperature=0, eos=2)
    for zero in (np.float32(0), np.int64(0)):
        np.testing.assert_array_equal(run(temperature=zero, eos=np.int64(2)), greedy)
    for eos in (np.array(2), np.array([2]), [np.uint8(2)], (2,), jnp.array(2)):
        np.testing.assert_array_equal(run(temperature=0.0, eos=eos), greedy)
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        run(top_k=np.int64(3), top_p=np.float32(0.5), key=key), run(top_k=3, top_p=0.5, key=key)
    )


@pytest.mark.parametrize("eos", ["</s>", 2.0, [2.5], ["</s>"]])
def test_an_end_that_is_no_id(unchecked, eos):
    with pytest.raises(ValueError, match="`eos` must be the id of the token"):
        models.generate(POLICY, BATCH.prompt, max_new_tokens=1, temperature=0, eos=eos)


def test_generate_from_a_policy_that_returns_a_tuple():
    wrong = Returns(LOGITS["tuple"][0])
    with pytest.raises(ValueError, match=r"`policy\(ids\)` must return .*got a tuple of 2"):
        models.generate(wrong, BATCH.prompt, max_new_tokens=1, temperature=0)


REFERENCE = Perceptron(jax.random.key(1))
SINGLE = dpx.UnpairedBatch(BATCH.prompt, BATCH.chosen, np.array([True, False]))
PAIRS = dpx.PairLogProbs(np.zeros(2), np.zeros(2))
MORE = dpx.PairLogProbs(np.zeros(3), np.zeros(3))
THUMBS = dpx.UnpairedLogProbs(np.zeros(2), np.ones(2, bool))


def step(loss, policy, batch, **options):
    """Traced only, as a gradient and as an evaluation."""
    return [
        lambda make=make: eqx.filter_eval_shape(make(loss, **options), policy, batch, REFERENCE)
        for make in (dpx.make_grad, dpx.make_eval)
    ]


MISTAKES = {
    "kto on pairs": (
        step(losses.kto, POLICY, BATCH),
        "`kto` takes the log-probabilities of single completions, `dpx.UnpairedLogProbs`; got an "
        "object of class PairLogProbs.*`score=dpx.score_unpaired`",
    ),
    "dpo on single completions": (
        step(losses.dpo, POLICY, SINGLE),
        "`score_pairs` takes a batch .*`rejected`; got an object of class UnpairedBatch. Give "
        "`score=dpx.score_unpaired` .* loss of single completions",
    ),
    "dpo on their scores": (
        step(losses.dpo, POLICY, SINGLE, score=dpx.score_unpaired),
        "`dpo` takes the log-probabilities of pairs, .*class UnpairedLogProbs.*dpx.score_pairs",
    ),
    "a score of single completions on pairs": (
        step(losses.kto, POLICY, BATCH, score=dpx.score_unpaired),
        "`score_unpaired` takes .*class PreferenceBatch. Give `score=dpx.score_pairs`",
    ),
    "a dict": (
        step(losses.dpo, POLICY, {"prompt": np.zeros(2)}),
        "`batch` must be a `dpx.PreferenceBatch`.*class dict. Make one",
    ),
    "policy and batch": (
        step(losses.dpo, BATCH, POLICY),
        "got an object of class Perceptron. The policy comes first",
    ),
    "policy and batch of a score": (
        [lambda: dpx.score_pairs(BATCH, POLICY)],
        "got an object of class Perceptron. The policy comes first",
    ),
    "the name of a loss": (
        [
            lambda: dpx.make_step("sigmoid", None),
            lambda: dpx.make_eval("sigmoid"),
        ],
        r"`loss` must be a function .* got 'sigmoid'. Give `losses.BY_NAME\['sigmoid'\]`",
    ),
    "other pairs": (
        [lambda: losses.dpo(PAIRS, MORE)],
        r"log-probabilities of the same pairs; got arrays of shape \(2,\) and \(3,\)",
    ),
    "a loss of pairs": ([lambda: losses.simpo(THUMBS, None)], "`simpo` takes the log-prob.*pairs"),
    "a text": ([lambda: losses.dpo(PAIRS, PAIRS, beta="0.1")], "`beta` must be a number.*'0.1'"),
    "sizes": (
        [lambda: sharding.make_mesh({"data": 4, "tensor": 2})],
        "must be a text of names and sizes; .*dict. Write 'data=4,tensor=2'",
    ),
    "a mapping": ([lambda: data.mix({"a": [{}]})], "`sources` must be a list .* got a mapping"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_mixed_up(case, unchecked):
    runs, message = MISTAKES[case]
    for run in runs:
        with pytest.raises(ValueError, match=message):
            run()
