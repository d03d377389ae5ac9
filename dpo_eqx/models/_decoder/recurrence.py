"""The sizes of layers that keep a state in place of attention, as data, and their checks.

`short_conv.py` and `delta_net.py` have the layers themselves.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrence:
    """What replaces attention in the recurrent layers of a `Transformer`.

    **Arguments:**

    - `kind`: `"convolution"` for gated short convolutions (LFM2), or `"delta"` for the gated delta
        rule (Qwen3.5).
    - `kernel`: the number of tokens that each causal convolution sees, its own token included.
    - `bias`: whether the projections and convolutions of `"convolution"` have biases.
    - `key_heads`, `value_heads`: for `"delta"`, the numbers of heads of queries and keys, and of
        values; the latter is a multiple of the former.
    - `key_width`, `value_width`: for `"delta"`, the width of a query or key, and of a value.

    **Raises:**

    `ValueError` if a size is not positive or the numbers of heads do not fit.
    """

    kind: Literal["convolution", "delta"]
    kernel: int
    bias: bool = False
    key_heads: int = 1
    value_heads: int = 1
    key_width: int = 1
    value_width: int = 1

    def __post_init__(self):
        for name in ("kernel", "key_heads", "value_heads", "key_width", "value_width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive; got {getattr(self, name)}.")
        if self.value_heads % self.key_heads:
            raise ValueError(
                "`value_heads` must be a multiple of `key_heads`; got "
                f"{self.value_heads} and {self.key_heads}."
            )
        if self.kind not in ("convolution", "delta"):
            raise ValueError(f"`kind` must be 'convolution' or 'delta'; got {self.kind!r}.")
