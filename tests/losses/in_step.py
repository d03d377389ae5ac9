"""Losses that couple pairs, batches for them, and one step of each by every road."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses

from ..policies import (
    Perceptron,
    arrays,
    prefix_masks,
    random_batch,
    random_tokens,
    statics,
)

PAIRS = 32  # four microbatches of one pair on each of eight devices
SGD = optax.sgd(0.5)
POLICY, REFERENCE = Perceptron(jax.random.key(0)), Perceptron(jax.random.key(1))


@losses.couples_pairs
def centred(policy, reference, *, beta, strength):
    """A user's own loss that couples pairs: DPO's margin against the weighted mean margin."""
    result = losses.dpo(policy, reference, beta=beta)
    margin = result.chosen_reward - result.rejected_reward
    mean = (policy.weight * margin).sum() / policy.weight.sum()
    return dataclasses.replace(result, loss=-jax.nn.log_sigmoid(margin - strength * mean))


@dataclasses.dataclass(frozen=True)
class Coupled:
    """A loss with its batch and its score."""

    loss: Callable[..., Any]
    unpaired: bool = False

    @property
    def batch(self):
        return UNPAIRED if self.unpaired else PAIRED

    @property
    def score(self):
        return dpx.score_unpaired if self.unpaired else dpx.score_pairs


COUPLED = {
    "aot": Coupled(partial(losses.aot, beta=0.4, label_smoothing=0.1)),
    "aot_unpaired": Coupled(losses.aot_unpaired),
    "beta_dpo": Coupled(partial(losses.beta_dpo, margin=0.05)),
    "kto": Coupled(partial(losses.kto, undesirable_weight=0.7), unpaired=True),
    "bco": Coupled(losses.batch_delta(losses.bco), unpaired=True),
    "bco_pair": Coupled(losses.batch_delta(losses.bco_pair)),
    "centred": Coupled(
        partial(losses.combine((1.5, partial(centred, strength=0.3)), (0.5, losses.ipo)), beta=0.2)
    ),
}


def _weights():
    """Unequal; a quarter of the pairs have none, and neither has one whole device of eight."""
    weight = np.random.default_rng(0).uniform(0.5, 2, PAIRS)
    weight[[3, 8, 9, 10, 11, 17, 22, 30]] = 0
    return weight


def _unpaired(pairs):
    rng = np.random.default_rng(1)
    kl = random_tokens(rng, prefix_masks(rng.integers(1, 5, PAIRS), 4))
    return dpx.UnpairedBatch(
        pairs.prompt, pairs.chosen, rng.random(PAIRS) < 0.4, kl=kl, weight=pairs.weight
    )


PAIRED = random_batch(pairs=PAIRS, weight=_weights())
UNPAIRED = _unpaired(PAIRED)


def plainly(case):
    """What SGD makes of the mean over the pairs that have weight, without any of the step."""
    kept = jax.tree.map(lambda x: x[case.batch.weight > 0], case.batch)

    def mean(policy):
        scores = (case.score(model, kept) for model in (policy, REFERENCE))
        result = case.loss(*scores)
        return (kept.weight * result.loss).sum() / kept.weight.sum()

    loss, gradient = eqx.filter_jit(eqx.filter_value_and_grad(mean))(POLICY)
    return jax.tree.map(lambda p, g: p - 0.5 * g, arrays(POLICY), arrays(gradient)), loss


def _on_device(case, microbatches, axis_name):
    """A step as raw transformations carry it: arrays only."""
    step = dpx.make_step(
        case.loss, SGD, score=case.score, microbatches=microbatches, axis_name=axis_name
    )

    def run(params, batch):
        policy = eqx.combine(params, statics(POLICY))
        policy, _, metrics = step(policy, SGD.init(params), batch, REFERENCE)
        return arrays(policy), metrics["loss"]

    return run


def _mesh(devices):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def by_pmap(case, devices, microbatches):
    step = jax.pmap(
        _on_device(case, microbatches, "data"),
        axis_name="data",
        in_axes=(None, 0),
        devices=jax.devices()[:devices],
    )
    rows = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), case.batch)
    return jax.tree.map(lambda x: x[-1], step(arrays(POLICY), rows))


def by_shard_map(case, devices, microbatches, *, check_vma=True):
    step = jax.shard_map(
        _on_device(case, microbatches, "data"),
        mesh=_mesh(devices),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    return jax.jit(step)(arrays(POLICY), case.batch)


def by_partitioning(case, devices, microbatches):
    mesh = _mesh(devices)
    params = jax.device_put(arrays(POLICY), NamedSharding(mesh, P()))
    batch = jax.device_put(case.batch, NamedSharding(mesh, P("data")))
    return jax.jit(_on_device(case, microbatches, None))(params, batch)


ROADS = {
    "pmap": by_pmap,
    "shard_map": by_shard_map,
    "shard_map_unchecked": partial(by_shard_map, check_vma=False),
    "automatic": by_partitioning,
}
