"""A warning if the first steps leave most of what is trained as it was.

The fraction that changed is computed by the step; here it is only judged.
"""

from collections.abc import Callable

from .sinks import Numbers

FRACTION = "update_fraction"
# So many steps are judged, and at least this fraction must change in one of them.
STEPS, ENOUGH = 10, 0.5


class UpdateWatch:
    """Warns once if no step among the first ten changes half of the trained numbers.

    Steps with less than half of the highest learning rate, as in a warm-up, are not judged: they
    change little, and rightly. One step that changes enough is enough, since adapters begin with
    zeros that have no gradient in the first step.

    **Arguments:**

    - `highest_rate`: the highest learning rate of the run.
    - `dtype`: the name of the dtype of what is trained; `narrow`: whether it is below float32.
    - `warn`: takes the warning.
    """

    def __init__(
        self, highest_rate: float, dtype: str, warn: Callable[[str], None], *, narrow: bool
    ):
        self._least_rate = highest_rate / 2
        self._dtype, self._narrow, self._warn = dtype, narrow, warn
        self._fractions: list[float] = []
        self._is_done = False

    def add(self, numbers: Numbers) -> None:
        """The metrics of the next step."""
        if self._is_done or numbers["learning_rate"] < self._least_rate:
            return
        self._fractions.append(numbers[FRACTION])
        if self._fractions[-1] >= ENOUGH:
            self._is_done = True
        elif len(self._fractions) == STEPS:
            self.close()

    def close(self) -> None:
        """Judges the steps so far, of a run that ends before the tenth."""
        if self._fractions and not self._is_done:
            self._warn(self._words())
        self._is_done = True

    def _words(self) -> str:
        steps = len(self._fractions)
        which = "the first step" if steps == 1 else f"any of the first {steps} steps"
        found = f"At most {max(self._fractions):.1%} of the trained numbers changed in {which}"
        if self._narrow:
            return (
                f"{found}: the other updates are smaller than {self._dtype} can hold, and are "
                "rounded away. Leave `--dtype` out to keep what is trained in float32, or give a "
                "larger `--learning-rate`."
            )
        return (
            f"{found}: the other updates are smaller than {self._dtype} can hold, or are 0, as for "
            "the embeddings of tokens that the data does not have. Unless most parameters are such "
            "embeddings, give a larger `--learning-rate`."
        )
