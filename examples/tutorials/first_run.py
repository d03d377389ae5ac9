# %% [markdown]
# # A first run of DPO
#
# A small decoder writes four letters after a letter. A simulated reader likes vowels. You train the
# decoder on the reader's choices, and then ask three questions: did the loss fall for the right
# reason, what did the policy gain, and how far did it move? All of it takes seconds on a CPU.

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

# %% [markdown]
# ## The policy and its reference
#
# A policy takes the ids of one sequence, of shape `(length,)`, and returns logits of shape
# `(length, vocab)`. This one has random weights, so that it writes all letters about equally often.
# In real work it is a checkpoint: `models.load("Qwen/Qwen3-0.6B")`. The reference is the policy
# before training, and stays as it is.

# %%
config = models.Config(vocab=len(LETTERS), width=32, layers=2, heads=4)
reference = models.Transformer(config, key=jax.random.key(0))
logits = reference(jnp.array([0, 1, 2]))
print("logits:", logits.shape)

# %% [markdown]
# ## Pairs
#
# The policy draws two completions of each prompt, and the reader prefers one of them. The reward is
# the number of vowels. The reader is not always right: he prefers $y_1$ to $y_2$ with probability
# $\sigma(r_1 - r_2)$, which is the Bradley-Terry model. Gumbel noise on the rewards does just that.


# %%
def vowels(prompt, completions):
    """The number of vowels in each completion, of shape `(prompts, samples)`."""
    return (VOWELS[completions.ids] & completions.mask).sum(axis=-1)


def draw(policy, key, prompts, samples):
    """Random prompts of one letter, and completions of four letters."""
    for_prompts, for_samples = jax.random.split(key)
    ids = jax.random.randint(for_prompts, (prompts, 1), 0, len(LETTERS))
    prompt = dpx.Tokens(ids, jnp.ones(ids.shape, bool))
    return prompt, models.sample(
        policy, prompt, samples=samples, max_new_tokens=4, key=for_samples
    )


@eqx.filter_jit
def make_pairs(key, pairs):
    """A batch of pairs, judged by the noisy reader."""
    for_draws, for_reader = jax.random.split(key)
    prompt, drawn = draw(reference, for_draws, pairs, samples=2)
    reward = vowels(prompt, drawn.tokens)
    return dpx.pair_samples(
        prompt, drawn, reward + jax.random.gumbel(for_reader, reward.shape)
    )


def text(ids):
    return "".join(LETTERS[i] for i in np.asarray(ids))


train, held_out = (
    make_pairs(jax.random.key(1), 4096),
    make_pairs(jax.random.key(2), 512),
)
print("prompt", train.prompt.ids.shape, " chosen", train.chosen.ids.shape)
for row in range(4):
    chosen, rejected = (
        text(train.chosen.ids[row]),
        text(train.rejected.ids[row]),
    )
    print(f"{text(train.prompt.ids[row])}: {chosen} is preferred to {rejected}")

# %% [markdown]
# ## Training
#
# `make_step` makes a pure function from policy, optimiser's state, batch and reference to the new
# policy, the new state and metrics. `beta` is the strength of the pull towards the reference.

# %%
beta = 0.5
loss = partial(losses.dpo, beta=beta)
optimizer = optax.adam(1e-3)
step = eqx.filter_jit(dpx.make_step(loss, optimizer))
evaluate = eqx.filter_jit(dpx.make_eval(loss))

policy = dpx.snapshot(reference)
opt_state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
rng = np.random.default_rng(0)
history, looks = [], []
for number in range(301):
    if number % 50 == 0:
        looks.append((number, evaluate(policy, held_out, reference).mean()))
    rows = rng.choice(train.pairs, size=64, replace=False)
    batch = jax.tree.map(lambda x, rows=rows: x[rows], train)
    policy, opt_state, metrics = step(policy, opt_state, batch, reference)
    history.append(float(metrics["loss"]))

print("step  loss   accuracy  margin  (on pairs that were not trained on)")
for number, seen in looks:
    accuracy, margin = seen["rewards/accuracies"], seen["rewards/margins"]
    print(f"{number:4d}  {seen['loss']:.3f}  {accuracy:8.2f}  {margin:6.2f}")

# %% [markdown]
# Look at three things.
#
# - **The first loss is $\log 2 = 0.693$.** Policy and reference are equal, so all margins are 0. If
#   your first loss is another number, your reference is not what you think.
# - **The accuracy cannot reach 1,** since the reader himself is not always right.
# - **The loss on held-out pairs falls, is flat, and rises again.** While it rises, the policy
#   learns the training pairs by heart: the training loss still falls. Stop before, or keep the
#   best policy.

# %%
plt.plot(history, color="0.7", label="training, each step")
plt.plot(
    *zip(*[(n, x["loss"]) for n, x in looks], strict=True),
    "o-",
    label="held out",
)
plt.xlabel("step")
plt.ylabel("loss")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What was gained, and for how much
#
# A low loss is not what you want. You want more vowels, near the reference. So draw completions of
# the trained policy, and measure their true reward and their KL to the reference, in nats.


# %%
@eqx.filter_jit
def look(policy, key):
    """The mean reward and the KL of 2048 fresh completions."""
    prompt, drawn = draw(policy, key, prompts=512, samples=4)
    reward = vowels(prompt, drawn.tokens)
    pairs = dpx.pair_samples(prompt, drawn, reward.astype(float), how="all")
    sides = dpx.compare(policy, reference, pairs)
    return (
        reward.mean(),
        (sides.chosen_kl.mean() + sides.rejected_kl.mean()) / 2,
        drawn,
    )


for name, model in {"reference": reference, "policy": policy}.items():
    reward, kl, drawn = look(model, jax.random.key(3))
    shown = " ".join(text(ids) for ids in drawn.tokens.ids[:6, 0])
    print(f"{name:9}  vowels {reward:.2f}  KL {abs(kl):.2f}  {shown}")

# %% [markdown]
# ## Is this the best there is?
#
# DPO has a known optimum: $\pi(y) \propto \pi_{ref}(y)\, e^{r(y)/\beta}$. The reference writes the
# letters almost independently of each other, so that the optimum nearly makes each vowel
# $e^{1/\beta}$ times as likely as before. From the share of vowels in the reference follows how
# many vowels the optimum writes. The policy is not far from it.

# %%
share = float(look(reference, jax.random.key(3))[0]) / 4
odds = share / (1 - share) * np.exp(1 / beta)
print(f"vowels at the optimum: about {4 * odds / (1 + odds):.2f}")

# %% [markdown]
# ## Next
#
# Change `beta` to 0.1, and look again: more vowels, more KL, and a policy that relies on fewer
# pairs. [A sweep](sweep.md) does this for many values at once.
# [Diagnosing a run](diagnosis.md) looks at single pairs, and
# [A first loop of your own](../start/first_loop.md) does without the library's models.
