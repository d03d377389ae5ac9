"""DPO of a Hugging Face checkpoint on a file of preferences: the loop of `dpo-eqx train`, to edit.

Read it from top to bottom. The command adds checkpoints, evaluation, adapters and reports.
"""

import argparse
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import dpo_eqx as dpx
from dpo_eqx import data, losses, models

# Data
BATCH_SIZE = 8  # pairs per step; 32 to 128 is usual if they fit in memory
MICROBATCHES = 1  # parts of a batch, computed one after another if it does not fit
MAX_LENGTH = 1024  # tokens of prompt and completion; memory grows with it
EPOCHS = 1  # after more than 3 the policy knows the pairs by heart
SEED = 0  # of the data order

# The loss: `losses` has about thirty, and your own function of the same form works, too
LOSS = partial(losses.dpo, beta=0.1)  # 0.01 pulls weakly towards the reference, 0.5 strongly

# The optimiser
LEARNING_RATE = 1e-6  # peak, for a whole model; a small model takes more
WARMUP = 0.1  # fraction of the steps in which the learning rate rises from 0
MAX_GRAD_NORM = 1.0
COMPUTE_DTYPE = None  # of the forward pass; None is the checkpoint's, jnp.bfloat16 is often faster

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="A folder, or a hub name.")
parser.add_argument("--data", required=True, help="Preferences in JSON Lines or Parquet.")
parser.add_argument("--output", required=True, help="The folder for the trained model.")
parser.add_argument(
    "--learning-rate", type=float, default=LEARNING_RATE, help="Peak learning rate (%(default)s)."
)
options = parser.parse_args()

# The reference is the model before training. The policy is a copy of it in float32, since updates
# at DPO's learning rates are too small for bfloat16 weights and would be rounded away.
reference = models.load(options.model)
policy = jax.tree.map(lambda x: jnp.array(x, jnp.float32), reference)
compute_dtype = COMPUTE_DTYPE or reference.embedding.weight.dtype

# From text to batches. The report accounts for every record.
tokenizer = data.load_tokenizer(options.model)
records = data.read(options.data)
rows, report = data.tokenize(
    records, tokenizer, max_length=MAX_LENGTH, vocab_size=policy.config.vocab
)
batches = data.batches(rows, batch_size=BATCH_SIZE, seed=SEED, epochs=EPOCHS)
print(report, batches.shapes(), sep="\n", flush=True)

steps = len(batches)
warmup = int(WARMUP * steps)
optimizer = optax.chain(
    optax.clip_by_global_norm(MAX_GRAD_NORM),
    optax.adamw(optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, steps)),
)
step = dpx.make_step(LOSS, optimizer, microbatches=MICROBATCHES, compute_dtype=compute_dtype)


# The policy and the optimiser's state are updated in place; `frozen` is used again.
@eqx.filter_jit(donate="all-except-first")
def train(frozen, policy, opt_state):
    """Takes one step."""
    batch, reference = frozen
    return step(policy, opt_state, batch, reference)


opt_state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
with batches:
    for number, batch in enumerate(batches, 1):
        policy, opt_state, metrics = train((batch, reference), policy, opt_state)
        print(
            f"step {number}/{steps}"
            f"  loss {metrics['loss']:.4f}"
            f"  accuracy {metrics['rewards/accuracies']:.3f}"
            f"  margin {metrics['rewards/margins']:.4f}",
            flush=True,
        )

# A folder that `transformers` loads, in the dtypes of the checkpoint.
models.save(jax.tree.map(lambda x, y: x.astype(y.dtype), policy, reference), options.output)
