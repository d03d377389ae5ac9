"""A loop as most JAX users write it: a cache of the full length, and one jitted call per token.

The decoder's weights are those of `plain_jax.Llama`; nothing here uses this library.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file

from benchmarks.peers.plain_jax import Llama
from benchmarks.sample import Drawing, checksum
from benchmarks.turns import Turns
from benchmarks.workers import given

Cache = tuple[Float[Array, "layers rows length heads head"], ...]


def rotated(model: Llama, x: Float[Array, "rows new heads head"], positions: Array) -> Array:
    """`x` with the rotary embedding of its positions."""
    half = x.shape[-1] // 2
    frequencies = model.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@eqx.filter_jit(donate="all-except-first")
def advance(
    frozen: tuple[Llama, Int[Array, "rows new"], Int[Array, ""]], cache: Cache
) -> tuple[Int[Array, "rows 1"], Cache]:
    """Reads new tokens from position `start` on: the likeliest next token, and the cache."""
    model, ids, start = frozen
    positions = start + jnp.arange(ids.shape[1])
    # A token sees itself and all before it.
    mask = jnp.arange(cache[0].shape[2]) <= positions[:, None]

    def layer(x, of_layer):
        weights, keys, values = of_layer
        normed = model._normed(x, weights["input_layernorm.weight"])
        query, key, value = (
            (normed @ weights[f"self_attn.{name}_proj.weight"].T).reshape(
                *x.shape[:2], model.heads, -1
            )
            for name in "qkv"
        )
        query, key = rotated(model, query, positions), rotated(model, key, positions)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, key, start, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, value, start, axis=1)
        mixed = jax.nn.dot_product_attention(query, keys, values, mask=mask[None, None])
        x = x + mixed.reshape(x.shape) @ weights["self_attn.o_proj.weight"].T
        normed = model._normed(x, weights["post_attention_layernorm.weight"])
        gate = jax.nn.silu(normed @ weights["mlp.gate_proj.weight"].T)
        up = normed @ weights["mlp.up_proj.weight"].T
        return x + (gate * up) @ weights["mlp.down_proj.weight"].T, (keys, values)

    x, cache = jax.lax.scan(layer, model.embedding[ids], (model.layers, *cache))
    logits = model._normed(x[:, -1:], model.norm) @ model.head.T
    return jnp.argmax(logits, axis=-1), cache


def generate(model: Llama, ids: np.ndarray, new: int) -> np.ndarray:
    """The ids of `new` greedy tokens for each row."""
    layers, width = model.layers["self_attn.q_proj.weight"].shape[:2]
    shape = (layers, len(ids), ids.shape[1] + new, model.heads, width // model.heads)
    cache = (jnp.zeros(shape, model.embedding.dtype), jnp.zeros(shape, model.embedding.dtype))
    token, cache = advance((model, jnp.asarray(ids), jnp.asarray(0)), cache)
    tokens = [token]
    for step in range(new - 1):
        token, cache = advance((model, token, jnp.asarray(ids.shape[1] + step)), cache)
        tokens.append(token)
    return np.concatenate(tokens, axis=1)


def main() -> None:
    turns = Turns(version=f"JAX {jax.__version__}")
    drawing, folder = given(Drawing)
    model = Llama(load_file(folder / "policy" / "model.safetensors"), drawing.problem)
    arrays, static = eqx.partition(model, eqx.is_array)
    model = eqx.combine(jax.tree.map(lambda x: x.astype(drawing.dtype), arrays), static)
    turns.begin()
    for batch, length, new in drawing.calls():
        drawn = generate(model, drawing.ids(batch, length), new)
        if not turns.step_done(checksum(drawing, drawn)):
            return


if __name__ == "__main__":
    main()
