"""The interface of what makes a batch: one for padded pairs, one for packed pairs.

`batches.py` iterates over any of them, and knows no more of them than this.
"""

from typing import Any, Protocol, runtime_checkable

from .._tokens.rows import Rows
from .buckets import Buckets, PackedShapes, Shapes
from .order import Order


@runtime_checkable
class Batcher(Protocol):
    """Makes the batch of any step, counted from the start of the first epoch."""

    @property
    def rows(self) -> Rows:
        """The rows of token ids."""
        ...

    @property
    def order(self) -> Order:
        """The order of what the steps are made of."""
        ...

    @property
    def buckets(self) -> Buckets | None:
        """The widths; `None` if all batches have one shape."""
        ...

    def __call__(self, step: int) -> Any:
        """This process's part of the batch of a step."""
        ...

    def shapes(self) -> Shapes | PackedShapes:
        """The shapes of an epoch, and the padding."""
        ...

    def widest(self) -> int:
        """A step of the first epoch whose rows have the most positions."""
        ...
