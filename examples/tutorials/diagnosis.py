# %% [markdown]
# # Diagnosing a run
#
# A curve that falls does not say that a run is good. This tutorial plants a fault, as real data has
# it: a tenth of the labels are flipped. Then it looks for the fault with three tools: the margins
# of single pairs, the contributions of single tokens, and calibration.

# %%
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import dpo_eqx as dpx
from dpo_eqx import losses, models

LETTERS = "abcdefghijklmnop"
VOWELS = jnp.array([letter in "aeio" for letter in LETTERS])
PAIRS, FLIPPED = 2048, 0.1

# %% [markdown]
# ## Pairs with wrong labels
#
# The reader likes vowels, and is always right. Then a tenth of the pairs change sides. We keep the
# mask `flipped`, of shape `(pairs,)`, to count what the tools find. They do not see it.


# %%
class Table(eqx.Module):
    logits: jax.Array  # (vocab, vocab)

    def __call__(self, ids):
        return self.logits[ids]


reference = Table(0.3 * jax.random.normal(jax.random.key(0), (16, 16)))


def make_pairs(key, pairs):
    """Pairs of completions of six letters, without ties."""
    for_prompts, for_samples = jax.random.split(key)
    ids = jax.random.randint(for_prompts, (3 * pairs, 1), 0, 16)
    prompt = dpx.Tokens(ids, jnp.ones(ids.shape, bool))
    drawn = models.sample(
        reference, prompt, samples=2, max_new_tokens=6, key=for_samples
    )
    batch = dpx.pair_samples(
        prompt, drawn, VOWELS[drawn.tokens.ids].sum(-1).astype(float)
    )
    untied = np.flatnonzero(np.asarray(batch.weight))[:pairs]
    return jax.tree.map(lambda x: x[untied], batch)


def text(ids):
    return "".join(LETTERS[i] for i in np.asarray(ids))


clean, held_out = (
    make_pairs(jax.random.key(1), PAIRS),
    make_pairs(jax.random.key(2), 512),
)
flipped = np.random.default_rng(0).random(PAIRS) < FLIPPED
swapped = dpx.PreferenceBatch(
    clean.prompt, clean.rejected, clean.chosen, clean.weight
)
train = jax.tree.map(
    lambda a, b: jnp.where(flipped.reshape(-1, *[1] * (a.ndim - 1)), b, a),
    clean,
    swapped,
)
print(f"{flipped.sum()} of {PAIRS} labels are flipped")

# %% [markdown]
# ## Train, and look at the curves

# %%
loss = partial(losses.dpo, beta=0.3)
optimizer = optax.adam(0.03)
step = dpx.make_step(loss, optimizer)


@jax.jit
def run(train, key):
    def advance(carry, rows):
        batch = jax.tree.map(lambda x: x[rows], train)
        policy, opt_state, metrics = step(*carry, batch, reference)
        return (policy, opt_state), metrics

    rows = jax.random.randint(key, (150, 64), 0, PAIRS)
    (policy, _), history = jax.lax.scan(
        advance,
        (reference, optimizer.init(eqx.filter(reference, eqx.is_array))),
        rows,
    )
    return policy, history


policy, history = run(train, jax.random.key(3))
for name in ("loss", "rewards/accuracies", "rewards/margins"):
    print(
        f"{name:20} first {history[name][0]:.2f}, last {history[name][-20:].mean():.2f}"
    )

# %% [markdown]
# Nothing is wrong with these curves. The accuracy is high, and the loss has fallen.
#
# ## Margins of single pairs
#
# `compare` runs policy and reference on a batch, and `diagnose` gives one number for each pair. The
# margin is the reward of the chosen completion minus that of the rejected one. Below 0, the policy
# disagrees with the label, although it was trained on it.


# %%
@eqx.filter_jit
def examine(policy, batch):
    sides = dpx.compare(policy, reference, batch)
    return dpx.diagnose(loss, sides.policy, sides.reference), sides


pairs, sides = examine(policy, train)
margin = np.asarray(pairs.margin)
print("margins:", margin.shape)
for quantile in (0.01, 0.1, 0.5, 0.9):
    print(
        f"{quantile:4.0%} of the margins are below {np.quantile(margin, quantile):5.2f}"
    )

bins = np.linspace(margin.min(), margin.max(), 40)
plt.hist(
    [margin[~flipped], margin[flipped]],
    bins,
    stacked=True,
    label=["right", "flipped"],
)
plt.xlabel("margin (nats)")
plt.ylabel("pairs")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# There are two groups. The smaller one, left of 0, is the fault. Real data has no colours, but it
# has the second hump or a long tail. So read the pairs with the lowest margins:

# %%
lowest = np.argsort(margin)
for count in (50, 100, 200):
    share = flipped[lowest[:count]].mean()
    print(
        f"of the {count:3d} lowest margins, {share:4.0%} have a flipped label"
    )
negative = margin < 0
print(
    f"margins below 0 find {flipped[negative].sum()} of {flipped.sum()} flipped labels"
)

# %% [markdown]
# ## Single tokens
#
# Why does the policy disagree? `chosen_tokens` and `rejected_tokens`, of shape
# `(pairs, completion)`, say what each token adds to the log-ratio of its completion. Positive means
# that training made the token likelier.

# %%
for place in lowest[:3]:
    print(f"margin {margin[place]:.2f}, prompt {text(train.prompt.ids[place])}")
    for side in ("chosen", "rejected"):
        letters = text(getattr(train, side).ids[place])
        values = getattr(sides, f"{side}_tokens")[place]
        print(
            f"  {side:8}",
            "  ".join(
                f"{a} {v:+.1f}" for a, v in zip(letters, values, strict=True)
            ),
        )

# %% [markdown]
# The policy has learned what the reader likes: vowels are up and the rest is down. In these pairs
# the label says the opposite. That is how a wrong label looks, in text as here.
#
# ## Is the policy too sure?
#
# The margin is also a prediction: the chosen completion wins with probability $\sigma$ of it.
# `calibrate` compares the prediction with what came true, on pairs that were not trained on.

# %%
for name, batch in {
    "training, with flipped labels": train,
    "held out, all right": held_out,
}.items():
    calibration = dpx.calibrate(examine(policy, batch)[0].margin, bins=5)
    predicted, came_true = calibration.mean()
    print(name)
    for row in range(5):
        if calibration.count[row]:
            print(
                f"  predicted {predicted[row]:.2f}  came true {came_true[row]:.2f}"
                f"  ({calibration.count[row]} pairs)"
            )

# %% [markdown]
# On the held-out pairs, whose labels are all right, predictions come true more often than the
# policy says. It is less sure than it should be. That is what flipped labels do: they shrink all
# margins, as the [gallery](../gallery/noisy_labels.md) shows. The opposite, predictions that come
# true less often than they say, is what too many epochs do.
#
# ## Train again without the suspects
#
# A weight of 0 takes a pair out of the loss, and leaves all shapes as they are.

# %%
train = eqx.tree_at(
    lambda b: b.weight, train, jnp.where(negative, 0.0, train.weight)
)
second, _ = run(train, jax.random.key(3))
for name, model in {"first run": policy, "second run": second}.items():
    seen = examine(model, held_out)[0]
    print(
        f"{name:11} held-out loss {seen.loss.mean():.3f}, margin {seen.margin.mean():.2f}"
    )

# %% [markdown]
# Fewer wrong labels, a lower loss on pairs that are right. In real work, read the suspects before
# you drop them: some are not wrong, only hard.
#
# ## Next
#
# `dpo-eqx evaluate --per-pair` writes these numbers for each pair of a file, and the report of
# `dpo-eqx train` draws them: [Seeing what was learned](../seeing.md). How healthy and sick curves
# look is in [Read your report](../howto/read_your_report.md). `losses.robust_dpo` is made for known
# rates of flipped labels.
