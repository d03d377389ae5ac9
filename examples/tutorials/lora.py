# %% [markdown]
# # LoRA on a checkpoint
#
# Low-Rank Adaptation (LoRA) freezes a model and trains small matrices beside its weights. You load
# a checkpoint, add adapters, train them by DPO, and save them in the format of PEFT. The reference
# needs no memory: it is the same model without its adapters. The checkpoint here is a tiny one that
# the first cell makes; with a real one only the path changes.

# %%
import tempfile
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpo_eqx as dpx
from dpo_eqx import losses, models

folder = Path(tempfile.mkdtemp())
config = models.Config(vocab=64, width=64, layers=2, heads=4, key_heads=2)
models.save(models.Transformer(config, key=jax.random.key(0)), folder / "base")
print(sorted(path.name for path in (folder / "base").iterdir()))

# %% [markdown]
# These are the files of any checkpoint on the Hugging Face hub, and `transformers` loads this
# folder, too.
#
# ## Load it, and add adapters
#
# `target` is a regular expression on the paths of the weights. Without it, all linear layers get
# adapters. An adapter adds $B A$ to a weight. $A$ has shape `(rank, inputs)`, and $B$ has shape
# `(outputs, rank)`. At first $B = 0$, so that the policy is still the base.

# %%
base = models.load(folder / "base")
policy = models.add_lora(
    base, rank=4, target=r"attention|feed_forward", key=jax.random.key(1)
)
trainable = models.lora_filter(policy)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


ids = jnp.array([3, 1, 4, 1, 5])
print(
    f"all numbers: {count(policy):,}, trained: {count(eqx.filter(policy, trainable)):,}"
)
print("still the base:", bool((policy(ids) == base(ids)).all()))

# %% [markdown]
# ## Pairs
#
# The preference is one that you can count: of two random completions of five tokens, the one with
# more tokens below 32. The batch has prompts of shape `(pairs, 3)` and completions of shape
# `(pairs, 5)`.


# %%
def make_batch(key, pairs):
    for_prompts, for_completions = jax.random.split(key)
    prompt = jax.random.randint(for_prompts, (pairs, 3), 0, 64)
    both = jax.random.randint(for_completions, (2, pairs, 5), 0, 64)
    low = (both < 32).sum(axis=-1)
    chosen, rejected = jnp.where(
        (low[0] >= low[1])[None, :, None], both, both[::-1]
    )

    def tokens(ids):
        return dpx.Tokens(ids, jnp.ones(ids.shape, bool))

    weight = (low[0] != low[1]).astype(jnp.float32)  # a tie says nothing
    return dpx.PreferenceBatch(
        tokens(prompt), tokens(chosen), tokens(rejected), weight
    )


train, held_out = (
    make_batch(jax.random.key(2), 8192),
    make_batch(jax.random.key(3), 256),
)
print(
    f"ties, which have weight 0: {(train.weight == 0).sum()} of {train.pairs}"
)

# %% [markdown]
# ## Train the adapters only
#
# Two arguments of the step make this LoRA. `trainable` selects what the gradient and the optimiser
# see. `reference_of` computes the reference from the policy in each step, so that the step takes no
# reference. The optimiser's state has the size of the adapters.

# %%
loss = partial(losses.dpo, beta=0.5)
optimizer = optax.adam(1e-3)
opt_state = optimizer.init(eqx.filter(policy, trainable))
step = dpx.make_step(
    loss, optimizer, trainable=trainable, reference_of=models.without_lora
)
step = eqx.filter_jit(step)
evaluate = eqx.filter_jit(dpx.make_eval(loss, reference_of=models.without_lora))
print(f"numbers in the optimiser's state: {count(opt_state):,}")

rng = np.random.default_rng(0)
for number in range(121):
    if number % 40 == 0:
        seen = evaluate(policy, held_out).mean()
        print(
            f"{number:3d}  loss {seen['loss']:.3f}  accuracy {seen['rewards/accuracies']:.2f}"
        )
    rows = rng.choice(train.pairs, size=64, replace=False)
    batch = jax.tree.map(lambda x, rows=rows: x[rows], train)
    policy, opt_state, metrics = step(policy, opt_state, batch)

# %% [markdown]
# The first loss is $\log 2 = 0.693$, since the adapters start at 0, and the accuracy counts ties as
# one half. Adapters want a higher rate than full training: ten times is a usual first try.
#
# The base has not moved by a bit:

# %%
left = models.without_lora(policy)
same = jax.tree.map(
    lambda a, b: bool((a == b).all()),
    *(eqx.filter(x, eqx.is_array) for x in (left, base)),
)
print("base unchanged:", all(jax.tree.leaves(same)))

# %% [markdown]
# ## Save the adapters, and load them again
#
# The folder has the two files that PEFT and vLLM load. It is small beside the model.

# %%
models.save_lora(policy, folder / "adapter", base=str(folder / "base"))
for path in sorted((folder / "adapter").iterdir()):
    print(path.name)

again = models.load_lora(models.load(folder / "base"), folder / "adapter")
print("the same logits:", bool((again(ids) == policy(ids)).all()))

# %% [markdown]
# ## Merge, for serving
#
# `merge_lora` adds the adapters into the weights. The result is a plain model, without adapters and
# as fast as the base. Its logits are those of the policy up to rounding.

# %%
merged = models.merge_lora(policy)
models.save(merged, folder / "merged")
served = models.load(folder / "merged")
difference = (
    jnp.abs(served(ids) - policy(ids)).max() / jnp.abs(policy(ids)).max()
)
print("numbers in the merged model:", f"{count(served):,}")
print("logits agree:", bool(difference < 1e-5))

# %% [markdown]
# ## Next
#
# A base in 4 bits takes a quarter of the memory: `models.load(path, quantize="nf4")`, and the rest
# of this page stays as it is. DoRA, rank stabilisation, dropout and modules that are trained whole
# are arguments of `add_lora`: [Adapters](../models.md#adapters). From the command line,
# `dpo-eqx train --lora-rank 16` does all of this.
