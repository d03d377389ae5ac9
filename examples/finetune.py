"""DPO of a Hugging Face checkpoint on a file of preferences: the loop of `dpo-eqx train`, to own.

It is read from top to bottom, and is there to be edited. Checkpoints, evaluation and the like are
in the command.
"""

import argparse
from functools import partial

import equinox as eqx
import optax

import dpo_eqx as dpx
from dpo_eqx import data, losses, models

# Data
BATCH_SIZE = 8  # pairs per step; 32 to 128 is usual where they fit
MICROBATCHES = 1  # parts of a batch, one after the other, where they do not
MAX_LENGTH = 1024  # tokens of prompt and completion; memory grows with it
EPOCHS = 1  # more than 3 learn the pairs by heart
SEED = 0  # of the order

# The loss: `losses` has some thirty, and your own function of the same form drops in
LOSS = partial(losses.dpo, beta=0.1)  # 0.01 lets go of the reference, 0.5 holds on to it

# The optimiser
LEARNING_RATE = 1e-6  # for a whole model; a small one takes more
WARMUP = 0.1  # of all steps, rising from 0
MAX_GRAD_NORM = 1.0
COMPUTE_DTYPE = None  # jax.numpy.bfloat16 on an accelerator; parameters keep their own

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="a folder, or a name of the hub")
parser.add_argument("--data", required=True, help="JSON Lines or Parquet with preferences")
parser.add_argument("--output", required=True, help="the folder for the trained model")
parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
options = parser.parse_args()

# The policy, and what it must not move too far from: itself, before the first step.
policy = models.load(options.model)
reference = dpx.snapshot(policy)

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
step = dpx.make_step(LOSS, optimizer, microbatches=MICROBATCHES, compute_dtype=COMPUTE_DTYPE)


# Policy and optimiser are updated in place; what is `frozen` is kept.
@eqx.filter_jit(donate="all-except-first")
def train(frozen, policy, opt_state):
    """One step."""
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

# A folder that `transformers` loads.
models.save(policy, options.output)
