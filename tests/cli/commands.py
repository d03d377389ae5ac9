"""Running a command inside the test's process, and models to run it on."""

import shutil

import equinox as eqx
import jax
import jax.numpy as jnp

from dpo_eqx import models
from dpo_eqx.cli import main


def run(capsys, *arguments):
    """The exit status of a command, and what it wrote to both streams."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


def moved(folder, target, seed=0, scale=0.05):
    """A copy of the model in `folder` whose weights are moved a little, to differ from it."""
    shutil.copytree(folder, target)
    models.save(_with_noise(models.load(folder), eqx.is_inexact_array, seed, scale), target)
    return target


def adapted(folder, target, scale=0.05):
    """Beside each other in `target`: adapters for the model in `folder`, and what it is by them."""
    policy = models.add_lora(models.load(folder), rank=2, key=jax.random.key(0))
    policy = _with_noise(policy, models.lora_filter(policy), 1, scale)
    models.save_lora(policy, target / "adapter")
    models.save(models.merge_lora(policy), target / "model")
    return target


def _with_noise(policy, where, seed, scale):
    arrays, rest = eqx.partition(policy, where)
    leaves, structure = jax.tree.flatten(arrays)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        x + scale * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return eqx.combine(jax.tree.unflatten(structure, noisy), rest)


def one_message(status, error, command, words):
    """Asserts one message of the command on stderr, with status 2."""
    assert status == 2
    assert error.startswith(f"dpo-eqx {command}: "), error
    assert len(error.splitlines()) == 1, error
    assert words in error, error


def log_softmax(logits):
    """In float64, by the definition."""
    return logits - jnp.log(jnp.exp(logits).sum(axis=-1, keepdims=True))
