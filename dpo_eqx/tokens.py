"""Token ids with a mask beside them, the one form in which text reaches the core.

What the mask means is said by whoever holds the tokens: `batch.py`.
"""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Int


class Tokens(eqx.Module):
    """Token ids and a mask of the same shape, rows padded on the right.

    In a prompt the mask says which tokens are there: a prefix of the row. In a completion it says
    which tokens are **scored**, in any pattern; unscored tokens before the last scored one are
    context, and ids after it have no influence.

    **Arguments:**

    - `ids`: integers. Shape `(*batch, length)`.
    - `mask`: booleans. Shape `(*batch, length)`.

    **Raises:**

    `ValueError` where the shapes differ, `ids` are not integers or `mask` is not boolean.
    """

    ids: Int[Array | np.ndarray, "*batch length"]
    mask: Bool[Array | np.ndarray, "*batch length"]

    def __check_init__(self):
        if self.ids.shape != self.mask.shape or self.ids.ndim == 0:
            raise ValueError(
                "`ids` and `mask` must have one shape, `(*batch, length)`; got "
                f"{self.ids.shape} and {self.mask.shape}."
            )
        if not np.issubdtype(self.ids.dtype, np.integer):
            raise ValueError(f"`ids` must be integers, got {self.ids.dtype}.")
        if self.mask.dtype != bool:
            raise ValueError(
                f"`mask` must be boolean, got {self.mask.dtype}. Convert it, say with `mask > 0`; "
                "use `weight` to weigh a pair."
            )
