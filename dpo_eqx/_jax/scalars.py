"""Types, used in annotations only, of one number and of one number for each pair.

NumPy's scalars are accepted like Python's, and integers like floating-point numbers.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, Bool, Real

# One number, traced or not.
if TYPE_CHECKING:
    # NumPy's stubs wrongly type the product of a NumPy number and an `Array` as a NumPy array, so
    # type checkers see no NumPy numbers here.
    Number = float | Array
else:
    Number = float | int | np.floating | np.integer | Real[Array | np.ndarray, ""]

# One number for each pair. A boolean mask can be used as weights of 0 and 1.
PerPair = Real[Array | np.ndarray, " pairs"]
Weights = PerPair | Bool[Array | np.ndarray, " pairs"]
