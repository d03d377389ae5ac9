"""What counts as a number, and as a number for each pair: types, for annotations alone.

NumPy's scalars are numbers as good as Python's, and integers as good as fractions.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, Bool, Real

# One number, traced or not.
if TYPE_CHECKING:
    # NumPy's stubs believe that the product of a NumPy number and an `Array` is a NumPy array,
    # which it is not.
    Number = float | Array
else:
    Number = float | int | np.floating | np.integer | Real[Array | np.ndarray, ""]

# One number for each pair. A mask is welcome as weights of 0 and 1.
PerPair = Real[Array | np.ndarray, " pairs"]
Weights = PerPair | Bool[Array | np.ndarray, " pairs"]
