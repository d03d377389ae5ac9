# %% [markdown]
# # Supervised training, then DPO
#
# Preferences say which of two answers is better. They do not say how an answer looks. So training
# has two stages: Supervised Fine-Tuning (SFT) on demonstrations, and then DPO from there. This
# tutorial runs both, and also shows the usual mistake: DPO against the wrong reference.

# %%
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpo_eqx as dpx
from dpo_eqx import losses, models

LETTERS = "abcdefghijklmnop"
VOWELS, OTHERS = (
    jnp.array([0, 4, 8, 14]),
    jnp.array([1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13, 15]),
)
LENGTH = 6

# %% [markdown]
# ## Demonstrations
#
# A good answer is a word that can be spoken: consonant, vowel, consonant, vowel. The prompt is any
# letter. A demonstration is one prompt with one completion, an `UnpairedBatch` whose labels are all
# true.


# %%
def all_real(ids):
    return dpx.Tokens(ids, jnp.ones(ids.shape, bool))


def demonstrations(key, rows):
    a, b, c = jax.random.split(key, 3)
    prompt = jax.random.randint(a, (rows, 1), 0, len(LETTERS))
    consonants = jax.random.choice(b, OTHERS, (rows, LENGTH // 2))
    vowels = jax.random.choice(c, VOWELS, (rows, LENGTH // 2))
    words = jnp.stack([consonants, vowels], axis=-1).reshape(rows, LENGTH)
    return dpx.UnpairedBatch(
        all_real(prompt), all_real(words), jnp.ones(rows, bool)
    )


def text(ids):
    return "".join(LETTERS[i] for i in np.asarray(ids))


shown = demonstrations(jax.random.key(0), 5)
print(
    "prompt", shown.prompt.ids.shape, " completion", shown.completion.ids.shape
)
print(*(text(ids) for ids in shown.completion.ids))

# %% [markdown]
# ## Stage 1: SFT
#
# The same `make_step` does it, with the loss `losses.sft` and the score of single completions.
# There is no reference.

# %%
config = models.Config(vocab=len(LETTERS), width=32, layers=2, heads=4)
base = models.Transformer(config, key=jax.random.key(1))


def train(step, optimizer, policy, batches, *reference):
    """The policy after a step on each batch, and the losses."""
    step = eqx.filter_jit(step)
    opt_state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    history = []
    for batch in batches:
        policy, opt_state, metrics = step(policy, opt_state, batch, *reference)
        history.append(float(metrics["loss"]))
    return policy, history


optimizer = optax.adam(3e-3)
step = dpx.make_step(losses.sft, optimizer, score=dpx.score_unpaired)
make = jax.jit(demonstrations, static_argnums=1)
batches = (make(key, 64) for key in jax.random.split(jax.random.key(2), 200))
supervised, history = train(step, optimizer, base, batches)
entropy = (np.log(len(OTHERS)) + np.log(len(VOWELS))) / 2
print(
    f"loss of a token: {history[0]:.2f} at first, {np.mean(history[-20:]):.2f} at the end"
)
print(f"entropy of the demonstrations: {entropy:.2f}")

# %% [markdown]
# The loss is the negative log-probability of a token, in nats. It cannot fall below the entropy of
# the demonstrations. When it gets there, there is nothing left to learn.
#
# ## Preferences
#
# Now a reader prefers words with more of the letter `a`, and nothing else. Both completions come
# from the supervised policy. A tie has weight 0.


# %%
@eqx.filter_jit
def draw(policy, key, rows, samples):
    for_prompts, for_samples = jax.random.split(key)
    prompt = all_real(
        jax.random.randint(for_prompts, (rows, 1), 0, len(LETTERS))
    )
    return prompt, models.sample(
        policy, prompt, samples=samples, max_new_tokens=LENGTH, key=for_samples
    )


def count_a(tokens):
    return (tokens.ids == 0).sum(axis=-1).astype(jnp.float32)


def spoken(tokens):
    """Whether a word alternates between consonants and vowels, as the demonstrations do."""
    is_vowel = jnp.isin(tokens.ids, VOWELS)
    return (is_vowel == (jnp.arange(LENGTH) % 2 == 1)).all(axis=-1)


prompt, drawn = draw(supervised, jax.random.key(3), 2048, 2)
pairs = dpx.pair_samples(prompt, drawn, count_a(drawn.tokens))
print(f"pairs that are no ties: {int((pairs.weight > 0).sum())}")

# %% [markdown]
# ## Stage 2: DPO, with the right reference and with the wrong one
#
# The reference of DPO is the policy that it starts from: the supervised one. Watch the first loss.
# Against the base it is not $\log 2$, because what SFT has changed already counts as reward.

# %%
loss, optimizer = partial(losses.dpo, beta=0.3), optax.adam(5e-4)
step = dpx.make_step(loss, optimizer)


def batches_of(pairs, steps=150, size=64):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.choice(pairs.pairs, size=size, replace=False)
        yield jax.tree.map(lambda x, rows=rows: x[rows], pairs)


runs = {"base": base, "SFT": supervised}
for name, start, reference in [
    ("SFT, DPO", supervised, supervised),
    ("SFT, DPO against base", supervised, base),
    ("DPO without SFT", base, base),
]:
    runs[name], history = train(
        step, optimizer, start, batches_of(pairs), reference
    )
    print(
        f"{name:22} first loss {history[0]:.3f}, last losses {np.mean(history[-20:]):.3f}"
    )

# %% [markdown]
# ## What each run writes
#
# Two numbers matter: how many words can still be spoken, which is what SFT taught, and how many
# letters are `a`, which is what the preferences asked for.

# %%
for name, model in runs.items():
    drawn = draw(model, jax.random.key(4), 256, 4)[1].tokens
    words = " ".join(text(ids) for ids in drawn.ids[:4, 0])
    print(
        f"{name:22} spoken {float(spoken(drawn).mean()):.2f}"
        f"  a {float(count_a(drawn).mean()):.2f}  {words}"
    )

# %% [markdown]
# - **SFT, then DPO** writes more than three times as many `a` as before, and most words can still
#   be spoken.
# - **DPO against the base** writes as many `a`, and has forgotten much of what SFT taught. Its loss
#   is even lower. The reference is what DPO holds the policy to, and the base cannot speak.
# - **DPO without SFT** learns `a`, but not to speak: both completions of a pair can be spoken, so
#   the pairs do not say that words should.
#
# The first loss told it: $\log 2 = 0.693$ if policy and reference are equal, and 0.628 in the run
# that went wrong. That is the sign to look for.
#
# ## Next
#
# With adapters the choice of the reference is a flag: [From demonstrations to
# preferences](../sft.md). The command is `dpo-eqx train --loss sft`, and then `dpo-eqx train`.
