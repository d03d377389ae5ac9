"""Token ids with a mask, the only form in which text reaches the core.

The fields of a batch, in `batches.py`, define what their masks mean.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer


def narrow_on_host(ids: Any) -> Any:
    """Casts NumPy ids of more than 31 bits to int32, and returns anything else unchanged.

    At the border of a jitted function, JAX would cut int64 to its lower 32 bits: an id of
    `2**32 + 5` would become token 5.
    """
    is_wide = isinstance(ids, np.ndarray) and ids.dtype in (np.int64, np.uint64, np.uint32)
    return in_int32(ids) if is_wide else ids


def as_ids(ids: Integer[Array | np.ndarray, "*shape"]) -> Int[Array, "*shape"]:
    """Token ids in int32, whatever their integer dtype.

    Token files are stored in narrow and unsigned integers, which are not suitable for arithmetic: a
    difference of unsigned numbers is never negative. An id that does not fit in int32 becomes the
    nearest int32, which is outside every vocabulary.
    """
    return jnp.asarray(in_int32(ids))


def in_int32(ids: Integer[Array | np.ndarray, "*shape"]) -> Int[Array | np.ndarray, "*shape"]:
    """`as_ids`, but a NumPy array stays a NumPy array."""
    bounds, wanted = jnp.iinfo(ids.dtype), jnp.iinfo(jnp.int32)
    low, high = max(bounds.min, wanted.min), min(bounds.max, wanted.max)
    if (low, high) != (bounds.min, bounds.max):
        # A cast alone would wrap a large id around, perhaps into the vocabulary.
        clip = np.clip if isinstance(ids, np.ndarray) else jnp.clip
        ids = clip(ids, int(low), int(high))
    return ids.astype(np.int32)


class Tokens(eqx.Module):
    """Token ids and a mask of the same shape, with rows padded on the right.

    In a prompt the mask is true at the real tokens, a prefix of the row. In a completion it is true
    at the **scored** tokens, in any pattern. Unscored tokens before the last scored one are
    context, and ids after it have no influence.

    **Arguments:**

    - `ids`: integers of any dtype, signed or not. A policy sees them as int32, and wider NumPy
        arrays are narrowed to int32 here. Shape `(*batch, length)`.
    - `mask`: booleans. Shape `(*batch, length)`.

    **Raises:**

    `ValueError` if the shapes differ, `ids` are not integers or `mask` is not boolean.
    """

    ids: Integer[Array | np.ndarray, "*batch length"] = eqx.field(converter=narrow_on_host)
    mask: Bool[Array | np.ndarray, "*batch length"]

    def __check_init__(self):
        for name, value in (("ids", self.ids), ("mask", self.mask)):
            if not isinstance(value, jax.Array | np.ndarray):
                raise ValueError(
                    f"`{name}` must be an array of NumPy or JAX, got {value!r}. Text is turned "
                    "into ids by a tokenizer, and lists into arrays by `np.array`."
                )
        if self.ids.shape != self.mask.shape or self.ids.ndim == 0:
            raise ValueError(
                "`ids` and `mask` must have one shape, `(*batch, length)`; got "
                f"{self.ids.shape} and {self.mask.shape}."
            )
        if not np.issubdtype(self.ids.dtype, np.integer):
            raise ValueError(f"`ids` must be integers; got {self.ids.dtype}.")
        if self.mask.dtype != bool:
            raise ValueError(
                f"`mask` must be boolean; got {self.mask.dtype}. Convert it by `mask > 0`; "
                "use `weight` to weigh a pair."
            )
