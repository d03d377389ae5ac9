# %% [markdown]
# # Several devices
#
# A step runs on a mesh of devices if its arrays are sharded over the mesh. The step does not
# change. You can try this without an accelerator: JAX makes several devices of one CPU. They are
# not faster, but programs, shapes and numbers are those of a real mesh.

# %%
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding

jax.config.update("jax_num_cpu_devices", 4)  # before anything runs
print(len(jax.devices()), "devices")

# %% [markdown]
# ## A policy and a batch on one device
#
# The pairs are random tokens with unequal weights: enough to compare numbers. The optimiser is SGD,
# since Adam hides a gradient that is too large by a factor.

# %%
config = models.Config(vocab=64, width=32, layers=2, heads=4)
policy = models.Transformer(config, key=jax.random.key(0))
keys = jax.random.split(jax.random.key(1), 3)
prompt, chosen, rejected = (
    jax.random.randint(key, (8, 6), 0, 64) for key in keys
)
real = jnp.arange(6) < jnp.array([6, 5, 4, 6, 3, 2, 6, 1])[:, None]
batch = dpx.PreferenceBatch(
    prompt=dpx.Tokens(prompt, real),
    chosen=dpx.Tokens(chosen, real),
    rejected=dpx.Tokens(rejected, real[::-1]),
    weight=jnp.array([1.0, 1, 2, 1, 0, 1, 0.5, 1]),
)

optimizer = optax.sgd(0.1)
step = eqx.filter_jit(dpx.make_step(partial(losses.dpo, beta=0.1), optimizer))
opt_state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
alone, _, metrics_alone = step(policy, opt_state, batch, policy)

# %% [markdown]
# ## The same on four
#
# The mesh has two axes of two devices each. `data` splits the pairs. `fsdp` splits the pairs, too,
# and also the parameters, the moments of the optimiser and the reference: each device holds a part,
# and gathers a layer when it runs.

# %%
mesh = sharding.make_mesh("data=2,fsdp=2")
sharded = sharding.shard_policy(policy, mesh)
sharded_batch = sharding.shard_batch(batch, mesh)
sharded_state = sharding.shard_policy(opt_state, mesh)

ids = sharded_batch.chosen.ids
print(
    f"ids: {ids.shape}, on each device {ids.addressable_shards[0].data.shape}"
)
weight = sharded.layers.attention.query.weight
print(
    f"queries of all layers: {weight.shape}, on each device "
    f"{weight.addressable_shards[0].data.shape}, sharded as {weight.sharding.spec}"
)

# %% [markdown]
# Read the shapes. Each device has two of the eight pairs. The weights of both layers are stacked
# along the first axis, which is never split; the last two are `(outputs, inputs)`.
#
# Now the same step runs on the sharded arrays. JAX reads the mesh from them.

# %%
trained, _, metrics = step(sharded, sharded_state, sharded_batch, sharded)

for name in ("loss", "rewards/accuracies", "logps/chosen"):
    print(
        f"{name:20} one device {metrics_alone[name]:9.4f}  four devices {metrics[name]:9.4f}"
    )


def largest(one, other):
    """The largest difference between the parameters of two policies."""
    parts = (
        jax.tree.leaves(eqx.filter(x, eqx.is_inexact_array))
        for x in (one, other)
    )
    return max(float(jnp.abs(a - b).max()) for a, b in zip(*parts, strict=True))


gathered = sharding.gather(trained)
print("moved by the step:", largest(alone, policy) > 1e-4)
print("one and four agree:", largest(alone, gathered) < 1e-6)

# %% [markdown]
# They agree up to rounding, since the loss is the weighted mean over the **global** batch. A mean
# of the means of devices would be another number here: the weights are unequal, and a device may
# even have pairs of weight 0 only.
#
# ## What the devices say to each other
#
# The compiled program shows it. `all-gather` collects the parameters of a layer, and `all-reduce`
# sums gradients. No pair goes to another device: there is no `all-to-all`.

# %%
program = (
    step.lower(sharded, sharded_state, sharded_batch, sharded)
    .compile()
    .compiled.as_text()
)
for collective in ("all-gather", "all-reduce", "all-to-all"):
    found = program.count(f" {collective}(") + program.count(
        f" {collective}-start("
    )
    print(f"{collective:15} {'yes' if found else 'no'}")

# %% [markdown]
# ## Memory
#
# With `fsdp`, a device holds less. Count the bytes of the parameters on the first device:


# %%
def held(tree, device):
    arrays = jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    shards = [
        s for x in arrays for s in x.addressable_shards if s.device == device
    ]
    return sum(shard.data.nbytes for shard in shards)


whole = held(
    sharding.shard_policy(policy, sharding.make_mesh("data=4")),
    jax.devices()[0],
)
for axes in ("data=4", "data=2,fsdp=2", "fsdp=4", "fsdp=2,tensor=2"):
    placed = sharding.shard_policy(policy, sharding.make_mesh(axes))
    print(
        f"{axes:16} {held(placed, jax.devices()[0]) / whole:.2f} of the parameters on a device"
    )

# %% [markdown]
# `data` alone saves no memory for parameters, `fsdp` and `tensor` do.
#
# ## Next
#
# Start with `fsdp` over all devices. Add `tensor` if a single layer, or one row, is too large for a
# device; it costs two sums of activations in each layer. A real checkpoint goes straight onto the
# mesh: `models.load(path, sharding=sharding.placement(mesh))`. [Devices](../devices.md) has
# `shard_map`, explicit axes and several hosts, and [A cluster](../howto/cluster.md) has files to
# copy.
