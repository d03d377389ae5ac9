"""Which items share a bin: first-fit decreasing, for packing rows. No token ids are here."""

import numpy as np
from jaxtyping import Int

# Items are placed in groups of this many, since first-fit takes the square of their number.
GROUP = 4096


def first_fit(
    needs: Int[np.ndarray, "items resources"], room: Int[np.ndarray, " resources"]
) -> list[list[int]]:
    """Bins of items by first-fit decreasing, all bins with the same room.

    The size of an item is its largest share of a resource.
    """
    order = np.argsort(-(needs / np.maximum(room, 1)).max(axis=1), kind="stable")
    left = np.tile(room, (len(needs), 1))
    bins: list[list[int]] = []
    for item in order.tolist():
        fits = (left[: len(bins)] >= needs[item]).all(axis=1)
        chosen = int(fits.argmax()) if fits.any() else len(bins)
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(item)
        left[chosen] -= needs[item]
    return bins
