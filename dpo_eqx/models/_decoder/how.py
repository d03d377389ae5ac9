"""What attention computes, apart from its arrays. `attended.py` computes it."""

import dataclasses
from typing import Literal

# The form of a mask, for kernels that gain by it:
# - "causal": query i sees the keys up to i. There is no array of a mask.
# - "keys": the last query sees up to the last key, each query before it one key less, except for
#   keys that no query sees.
# - "any": any other.
Form = Literal["causal", "keys", "any"]


@dataclasses.dataclass(frozen=True)
class How:
    """What attention computes, apart from its arrays.

    - `scale`: the factor of the scores.
    - `softcap`: the soft cap of the scaled scores, or `None`.
    - `form`: the form of the mask.
    - `use_kernels`: whether a kernel may compute it.
    """

    scale: float
    softcap: float | None
    form: Form
    use_kernels: bool
