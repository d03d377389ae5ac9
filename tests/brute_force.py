"""DPO once more, by loops over pairs and tokens: no padding, no vmap, no shared code."""

import jax.numpy as jnp
import numpy as np


def recurrent_logits(policy, ids):
    """The GRU language model of `policies.Recurrent`, from its weights, one token at a time."""
    cell, state, logits = policy.cell, 0.0, []
    for token in ids:
        x = policy.embedding[token]
        gates_x = cell.weight_ih @ x + cell.bias
        gates_h = cell.weight_hh @ (state + jnp.zeros(x.shape))
        width = x.shape[0]
        reset = 1 / (1 + jnp.exp(-(gates_x[:width] + gates_h[:width])))
        update = 1 / (1 + jnp.exp(-(gates_x[width : 2 * width] + gates_h[width : 2 * width])))
        new = jnp.tanh(gates_x[2 * width :] + reset * (gates_h[2 * width :] + cell.bias_n))
        state = new + update * (state - new)
        logits.append(policy.head.weight @ state + policy.head.bias)
    return logits


def completion_log_prob(policy, prompt, completion, scored):
    """Summed over the scored tokens of the completion."""
    logits = recurrent_logits(policy, [*prompt, *completion])
    total = 0.0
    for i, (token, counts) in enumerate(zip(completion, scored, strict=True)):
        if counts:
            row = logits[len(prompt) + i - 1]
            total += row[token] - jnp.log(sum(jnp.exp(value) for value in row))
    return total


def sequences(batch):
    """Each pair as plain lists, without padding: prompt, and (completion, scored) twice."""
    for i in range(batch.pairs):
        prompt = np.asarray(batch.prompt.ids[i])[np.asarray(batch.prompt.mask[i])].tolist()
        pair = []
        for tokens in (batch.chosen, batch.rejected):
            mask = np.asarray(tokens.mask[i])
            end = mask.nonzero()[0].max(initial=-1) + 1
            pair.append((np.asarray(tokens.ids[i])[:end].tolist(), mask[:end].tolist()))
        yield prompt, *pair


def scores(policy, batch):
    """`(chosen, rejected)` log-probabilities of each pair."""
    return [
        tuple(completion_log_prob(policy, prompt, *completion) for completion in pair)
        for prompt, *pair in sequences(batch)
    ]


def dpo_loss(policy, reference, batch, beta):
    """The weighted mean of -log sigmoid(beta (rho_w - rho_l))."""
    ours, theirs = scores(policy, batch), scores(reference, batch)
    weights = np.ones(batch.pairs) if batch.weight is None else batch.weight
    total = 0.0
    for policy_pair, reference_pair, weight in zip(ours, theirs, weights, strict=True):
        chosen, rejected = (a - b for a, b in zip(policy_pair, reference_pair, strict=True))
        z = beta * (chosen - rejected)
        total += weight * jnp.log(1 + jnp.exp(-z))
    return total / weights.sum()
