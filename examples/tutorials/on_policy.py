# %% [markdown]
# # On-policy training
#
# Fixed pairs come from the policy of yesterday. On-policy training draws them from the policy of
# now: sample, judge, pair, step, again and again. In JAX a round is a pure function, so many rounds
# are one `scan`. This tutorial trains on-policy and off-policy with the same number of labels, and
# shows when the difference matters: if the reference seldom writes what is liked.

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

# %% [markdown]
# ## A policy that seldom does the right thing
#
# The reward is the number of times that the last letter of the alphabet, 15, is written. The
# reference writes it about once in 60 letters. The policy is a table of the logits of the next
# letter; a `models.Transformer` or your own model goes in the same place.


# %%
class Table(eqx.Module):
    logits: jax.Array  # (vocab, vocab)

    def __call__(self, ids):
        return self.logits[ids]


logits = 0.5 * jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))
reference = Table(logits.at[:, 15].add(-1.0))


def reward_of(tokens):
    """The reward of each completion, of shape `(prompts, samples)`."""
    return ((tokens.ids == 15) & tokens.mask).sum(axis=-1).astype(jnp.float32)


# %% [markdown]
# ## One round
#
# - **Draw.** `models.sample` draws completions of each prompt: tokens of shape
#   `(prompts, samples, max_new_tokens)`.
# - **Judge.** A reward is any function of tokens. Gumbel noise makes a reader of it who is not
#   always right.
# - **Pair.** `pair_samples` takes the best and the worst completion of each prompt.
# - **Step.** It is the step of every other page.
#
# The only difference between the two runs is who writes: the policy or the reference.

# %%
PROMPTS, ROUNDS, BETA = 64, 150, 0.2
optimizer = optax.adam(0.03)
step = dpx.make_step(partial(losses.dpo, beta=BETA), optimizer)


def one_round(policy, opt_state, key, is_online):
    for_prompts, for_samples, for_reader = jax.random.split(key, 3)
    ids = jax.random.randint(for_prompts, (PROMPTS, 1), 0, VOCAB)
    prompt = dpx.Tokens(ids, jnp.ones(ids.shape, bool))
    writer = jax.tree.map(
        lambda a, b: jnp.where(is_online, a, b), policy, reference
    )
    drawn = models.sample(
        writer, prompt, samples=2, max_new_tokens=LENGTH, key=for_samples
    )
    reward = reward_of(drawn.tokens)
    noise = jax.random.gumbel(for_reader, reward.shape)
    batch = dpx.pair_samples(prompt, drawn, reward + noise)
    policy, opt_state, metrics = step(policy, opt_state, batch, reference)
    differs = (reward[:, 0] != reward[:, 1]).mean()
    return (
        policy,
        opt_state,
        {"loss": metrics["loss"], "pairs that differ": differs},
    )


# %% [markdown]
# ## Many rounds, and both runs, in one program
#
# `scan` runs the rounds, and `vmap` both runs with the same keys. Before each round, fresh
# completions of the policy are measured by their true reward and their KL to the reference.


# %%
def measure(policy, key):
    ids = jnp.arange(VOCAB)[:, None]
    prompt = dpx.Tokens(ids, jnp.ones(ids.shape, bool))
    drawn = models.sample(
        policy, prompt, samples=16, max_new_tokens=LENGTH, key=key
    )
    reward = reward_of(drawn.tokens)
    sides = dpx.compare(
        policy, reference, dpx.pair_samples(prompt, drawn, reward, how="all")
    )
    return {
        "reward": reward.mean(),
        "kl": (sides.chosen_kl + sides.rejected_kl).mean() / 2,
    }


def train(is_online):
    def advance(carry, key):
        policy, opt_state = carry
        for_round, for_look = jax.random.split(key)
        seen = measure(policy, for_look)
        policy, opt_state, metrics = one_round(
            policy, opt_state, for_round, is_online
        )
        return (policy, opt_state), metrics | seen

    keys = jax.random.split(jax.random.key(1), ROUNDS)
    return jax.lax.scan(
        advance,
        (reference, optimizer.init(eqx.filter(reference, eqx.is_array))),
        keys,
    )[1]


results = jax.jit(jax.vmap(train))(jnp.array([False, True]))
print("each metric has shape", results["reward"].shape, "for (runs, rounds)")
print("round    off-policy              on-policy")
print("         reward   KL  differ     reward   KL  differ")
for place in (0, 24, 49, 99, 149):
    cells = []
    for run in (0, 1):
        window = slice(max(0, place - 9), place + 1)
        reward, kl, differ = (
            results[name][run, window].mean()
            for name in ("reward", "kl", "pairs that differ")
        )
        cells.append(f"{reward:6.2f} {abs(kl):4.2f}  {differ:6.2f}")
    print(f"{place + 1:5d}    {'     '.join(cells)}")

# %% [markdown]
# Look at the column *differ*: the share of pairs whose two completions have different rewards. Only
# these pairs say anything about the reward. The reference writes few of them, in every round the
# same. The policy writes more and more of them, so that its own pairs teach it more.

# %%
figure, (reward, frontier) = plt.subplots(1, 2, figsize=(9, 3))
for run, name in enumerate(("off-policy", "on-policy")):
    reward.plot(results["reward"][run], label=name)
    frontier.plot(results["kl"][run], results["reward"][run], ".", label=name)
reward.set(xlabel="round", ylabel="mean reward")
frontier.set(xlabel="KL to the reference (nats)", ylabel="mean reward")
reward.legend(frameon=False)
plt.show()

# %% [markdown]
# The left picture compares equal labels. The right picture compares equal distances: both runs
# climb along nearly the same line. The on-policy run goes further in the same number of rounds.
#
# ## What to watch
#
# - **The reward of fresh samples**, not the loss. The loss of on-policy training hardly moves,
#   since the task becomes harder as the policy improves.
# - **The KL.** A reward model can be deceived, and the KL says how far the policy has gone from
#   where it was trained. Stop, or raise `beta`.
# - **The share of pairs that differ.** If it is near 0, draw more samples of each prompt.
#
# ## Next
#
# [On-policy training](../online.md) has rewards that are Python functions of texts, reward models,
# and other ways to pair. From the command line it is [`dpo-eqx online`](../online_command.md).
