# %% [markdown]
# # A loss of your own
#
# A loss is a function from the log-probabilities of policy and reference to one number for each
# pair. It does not depend on models, batches or devices, so you can look at it before you train.
# This tutorial writes one, draws it beside DPO, trains with it, and gives it data of its own.

# %%
import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import dpo_eqx as dpx
from dpo_eqx import losses

# %% [markdown]
# ## Write it
#
# The loss of this page wants a margin of 1, and is satisfied beyond it: a squared hinge. `policy`
# and `reference` are `PairLogProbs`. Their fields `chosen` and `rejected` are sums over the tokens
# of a completion, in nats, and have shape `(pairs,)`. The result has shape `(pairs,)`, too: the
# step takes the mean, and so the loss must not.


# %%
def squared_hinge(policy, reference, *, beta=0.1, target=1.0):
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    shortfall = jax.nn.relu(target - (chosen - rejected))
    return losses.PairLoss(shortfall**2, chosen, rejected)


policy = dpx.PairLogProbs(
    chosen=jnp.array([-4.0, -9.0]), rejected=jnp.array([-7.0, -5.0])
)
reference = dpx.PairLogProbs(
    chosen=jnp.array([-6.0, -6.0]), rejected=jnp.array([-6.0, -6.0])
)
result = squared_hinge(policy, reference)
print("loss of each pair:", result.loss)
print("margin:           ", result.chosen_reward - result.rejected_reward)

# %% [markdown]
# The first pair has the right order, and a small loss is left because its margin is below 1. The
# second has the wrong order.
#
# ## Look at it
#
# What trains a policy is the derivative: how strongly a pair pulls its chosen completion up. Draw
# it against the margin, beside the losses that you know. `dpx.diagnose` computes it for any loss.


# %%
def pull(loss, margin):
    """The weight of each pair in the gradient, if policy and reference differ by a margin."""
    zeros = jnp.zeros_like(margin)
    ours = dpx.PairLogProbs(margin, zeros)
    return dpx.diagnose(
        loss, ours, dpx.PairLogProbs(zeros, zeros)
    ).chosen_gradient_weight


margin = jnp.linspace(-3, 3, 121)
shown = {
    "squared hinge": partial(squared_hinge, beta=1.0),
    "dpo": partial(losses.dpo, beta=1.0),
    "hinge": partial(losses.hinge, beta=1.0),
    "ipo": partial(losses.ipo, beta=1.0),
}
for name, loss in shown.items():
    plt.plot(margin, pull(loss, margin), label=name)
plt.axhline(0, color="0.8", linewidth=1, zorder=0)
plt.xlabel("margin")
plt.ylabel("pull on the chosen completion")
plt.ylim(-2, 8)
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# A wrong label has a margin far to the left. The pull of DPO is bounded there; that of the squared
# hinge grows, so that wrong labels weigh more than under DPO. Beyond the target the hinges stop,
# DPO pulls a little for ever, and IPO pulls back. This picture tells more than a training run.
#
# ## Train with it
#
# The policy is any callable pytree, here a table of the logits of the next token. The reader likes
# a letter that is one further than the last: 3, 4, 5.


# %%
class Table(eqx.Module):
    logits: jax.Array

    def __call__(self, ids):  # of shape (length,)
        return self.logits[ids]  # of shape (length, vocab)


def make_batch(key, pairs=256):
    start = jax.random.randint(key, (pairs, 1), 0, 7)
    real = jnp.ones((pairs, 2), bool)
    return dpx.PreferenceBatch(
        prompt=dpx.Tokens(start, real[:, :1]),
        chosen=dpx.Tokens(start + jnp.array([1, 2]), real),
        rejected=dpx.Tokens((start + jnp.array([5, 3])) % 9, real),
    )


def train(loss, batch, steps=200):
    """The policy after some steps, and the metrics of the last step."""
    start = Table(jnp.zeros((9, 9)))
    optimizer = optax.adam(0.05)
    step = eqx.filter_jit(dpx.make_step(loss, optimizer))
    policy, opt_state = start, optimizer.init(eqx.filter(start, eqx.is_array))
    for _ in range(steps):
        policy, opt_state, metrics = step(policy, opt_state, batch, start)
    return policy, metrics


batch = make_batch(jax.random.key(0))
for name, loss in {"squared hinge": squared_hinge, "dpo": losses.dpo}.items():
    trained, metrics = train(loss, batch)
    margins = dpx.diagnose(
        loss,
        dpx.score_pairs(trained, batch),
        dpx.score_pairs(Table(jnp.zeros((9, 9))), batch),
    ).margin
    print(
        f"{name:13}  loss {metrics['loss']:.3f}  margins {margins.min():.2f} to {margins.max():.2f}"
    )

# %% [markdown]
# The squared hinge brings the margins to 1 and leaves them there. DPO goes on.
#
# The margins and rewards of the metrics come from the `PairLoss`. So they are right for any loss
# that fills its fields.
#
# ## Data of its own
#
# Suppose that readers also said how much better the chosen completion is. Such a number travels in
# `batch.per_pair`, and reaches the loss as a keyword argument of the same name, of shape
# `(pairs,)`. Microbatches and devices split it together with the pairs.


# %%
def by_strength(policy, reference, *, strength, beta=0.1):
    return squared_hinge(policy, reference, beta=beta, target=strength)


strength = jnp.where(jnp.arange(256) < 128, 0.2, 1.0)
strong = dataclasses.replace(batch, per_pair={"strength": strength})
grad = eqx.filter_jit(dpx.make_grad(by_strength))
start = Table(jnp.zeros((9, 9)))
gradient, metrics = grad(start, strong, start)
print(f"loss {metrics['loss']:.2f}, which is the mean of 0.04 and 1")

# %% [markdown]
# ## Check it
#
# Three checks find most faults of a loss. Extremes stay finite; the derivative is the one that you
# derived; and the loss does not depend on what else is in the batch.

# %%
far = dpx.PairLogProbs(jnp.array([-1e4]), jnp.array([0.0]))
none = dpx.PairLogProbs(jnp.zeros(1), jnp.zeros(1))
print(
    "far from the reference:",
    squared_hinge(far, none).loss,
    pull(squared_hinge, jnp.array([-1e4])),
)

by_hand = (
    2 * 0.1 * (1.0 - 0.1 * margin)
)  # for margins below the target, in nats
print(
    "derivative agrees:",
    bool(jnp.allclose(pull(squared_hinge, margin), by_hand, atol=1e-6)),
)

alone = squared_hinge(*jax.tree.map(lambda x: x[:1], (policy, reference))).loss[
    0
]
print("a pair alone agrees:", bool(alone == result.loss[0]))

# %% [markdown]
# ## Next
#
# A loss that takes a mean or a sort over the batch is marked with `losses.couples_pairs`, so that
# the step calls it on the global batch. [Losses, in tables](../losses.md) lists what exists, and
# [Choose a loss](../howto/choose_a_loss.md) compares how they behave.
