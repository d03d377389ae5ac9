# %% [markdown]
# # A sweep by `vmap`
#
# `beta` may be a traced number, and a step is a pure function. So one program trains a policy for
# each of many values at once: `scan` over the steps, `vmap` over the values, `jit` around both. For
# small policies this costs little more than one run. The result is the frontier: how much reward a
# policy gains for the distance that it moves.

# %%
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import dpo_eqx as dpx
from dpo_eqx import losses, models

VOCAB, LENGTH = 16, 4
VOWELS = jnp.isin(jnp.arange(VOCAB), jnp.array([0, 4, 8, 14]))  # a, e, i, o

# %% [markdown]
# ## The task
#
# The task is that of [A first run](first_run.md): a policy writes letters, and a noisy reader likes
# vowels. The policy is a table of logits of the next letter, so that the sweep is quick.


# %%
class Table(eqx.Module):
    logits: jax.Array  # (vocab, vocab)

    def __call__(self, ids):
        return self.logits[ids]


reference = Table(jax.random.normal(jax.random.key(0), (VOCAB, VOCAB)))


def draw(policy, key, prompts, samples):
    """Random prompts of one letter, their completions, and the number of vowels in each."""
    for_prompts, for_samples = jax.random.split(key)
    ids = jax.random.randint(for_prompts, (prompts, 1), 0, VOCAB)
    prompt = dpx.Tokens(ids, jnp.ones(ids.shape, bool))
    drawn = models.sample(
        policy, prompt, samples=samples, max_new_tokens=LENGTH, key=for_samples
    )
    return prompt, drawn, VOWELS[drawn.tokens.ids].sum(axis=-1).astype(float)


def make_pairs(key, pairs):
    for_draws, for_reader = jax.random.split(key)
    prompt, drawn, reward = draw(reference, for_draws, pairs, 2)
    return dpx.pair_samples(
        prompt, drawn, reward + jax.random.gumbel(for_reader, reward.shape)
    )


# %% [markdown]
# ## One run, as a function of `beta` and a seed
#
# The function takes numbers and returns numbers. Everything that the sweep changes is an argument:
# `beta`, which is traced, and a key, from which the pairs and their order follow. The last lines
# measure the policy on fresh completions: the mean reward, and the KL to the reference in nats.


# %%
def run(beta, key, steps=200, pairs=2048, rows=64):
    for_pairs, for_rows, for_look = jax.random.split(key, 3)
    data = make_pairs(for_pairs, pairs)
    # With the usual eps, Adam would scale up gradients that are nothing but rounding.
    optimizer = optax.adam(0.03, eps=1e-5)
    step = dpx.make_step(partial(losses.dpo, beta=beta), optimizer)

    def advance(carry, rows):
        policy, opt_state = carry
        batch = jax.tree.map(lambda x: x[rows], data)
        policy, opt_state, metrics = step(policy, opt_state, batch, reference)
        return (policy, opt_state), metrics["loss"]

    chosen = jax.random.randint(for_rows, (steps, rows), 0, pairs)
    (policy, _), loss = jax.lax.scan(
        advance,
        (reference, optimizer.init(eqx.filter(reference, eqx.is_array))),
        chosen,
    )
    prompt, drawn, reward = draw(policy, for_look, 256, 4)
    sides = dpx.compare(
        policy, reference, dpx.pair_samples(prompt, drawn, reward, how="all")
    )
    kl = (
        sides.chosen_kl + sides.rejected_kl
    ).mean() / 2  # each completion counts alike
    return {"loss": loss, "reward": reward.mean(), "kl": kl}


# %% [markdown]
# ## All runs at once
#
# The inner `vmap` goes over seeds and the outer one over `beta`, so that each result has shape
# `(betas, seeds, ...)`. `in_axes` says which argument has the axis.

# %%
betas = jnp.array([0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0])
keys = jax.random.split(jax.random.key(1), 4)
sweep = jax.jit(jax.vmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(0, None)))
results = sweep(betas, keys)
print("losses:", results["loss"].shape, " rewards:", results["reward"].shape)

print(
    "beta   reward         KL            (mean and standard deviation over 4 seeds)"
)
for row, beta in enumerate(betas):
    reward, kl = results["reward"][row], results["kl"][row]
    print(
        f"{beta:4.1f}  {reward.mean():5.2f} ± {reward.std():.2f}  {kl.mean():5.2f} ± {kl.std():.2f}"
    )

# %% [markdown]
# The reward rises and the KL rises as `beta` falls, but not alike. Most of the reward comes at a
# small KL, and the last nats buy little. That is what the picture is for.

# %%
figure, (curves, frontier) = plt.subplots(1, 2, figsize=(9, 3))
for row in (0, 3, 7):
    loss = results["loss"][row].reshape(4, -1, 10).mean(axis=(0, 2))
    curves.plot(
        10 * jnp.arange(len(loss)) + 5, loss, label=f"beta {betas[row]:.1f}"
    )
curves.set(xlabel="step", ylabel="loss, mean of 10 steps, 4 seeds")
curves.legend(frameon=False)
colours = jnp.broadcast_to(jnp.log10(betas)[:, None], results["kl"].shape)
points = frontier.scatter(
    results["kl"], results["reward"], c=colours, cmap="viridis"
)
figure.colorbar(points, label="log10 of beta")
frontier.set(xlabel="KL to the reference (nats)", ylabel="vowels")
plt.show()

# %% [markdown]
# The curves of loss say little: the run with `beta` 0.1 ends with the highest loss, and with the
# highest reward. Do not compare losses of different `beta`. Compare reward at equal KL.
#
# ## The check that the sweep is right
#
# A run of the sweep is the run alone, up to rounding.

# %%
alone = jax.jit(run)(betas[3], keys[2])
print(
    "the same as alone:",
    bool(jnp.abs(alone["loss"] - results["loss"][3, 2]).max() < 1e-4),
)

# %% [markdown]
# ## Next
#
# The same works for the rate (`optax.inject_hyperparams`), for the parameters of a loss, and for
# whole policies. On a mesh, `jax.vmap(step, spmd_axis_name="data")` puts the runs of a sweep on
# different devices: [Devices](../devices.md#a-sweep-over-an-axis-of-the-mesh).
