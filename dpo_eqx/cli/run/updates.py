"""A warning if the first steps leave most of the trained numbers unchanged.

The step computes the fraction that changed; this file only judges it.
"""

from collections.abc import Callable

from .sinks import Numbers

FRACTION = "update_fraction"
# The number of steps that are judged, and the fraction that must change in one of them.
STEPS, ENOUGH = 10, 0.5


class UpdateWatch:
    """Warns once if no step among the first ten changes half of the trained numbers.

    Steps with less than half of the highest learning rate, as in a warm-up, are not judged, since
    they should change little. A single step that changes half is enough: in the first step of new
    adapters, A has no gradient, since B is 0.

    **Arguments:**

    - `highest_rate`: the highest learning rate of the run.
    - `dtype`: the name of the dtype of the trained parameters.
    - `warn`: a function that shows the warning.
    - `narrow`: whether `dtype` is narrower than float32.
    """

    def __init__(
        self, highest_rate: float, dtype: str, warn: Callable[[str], None], *, narrow: bool
    ):
        self._least_rate = highest_rate / 2
        self._dtype, self._narrow, self._warn = dtype, narrow, warn
        self._fractions: list[float] = []
        self._has_gradient = False
        self._is_done = False

    def add(self, numbers: Numbers) -> None:
        """Judges the metrics of the next step."""
        if self._is_done or numbers["learning_rate"] < self._least_rate:
            return
        self._fractions.append(numbers[FRACTION])
        self._has_gradient |= numbers["grad_norm"] != 0
        if self._fractions[-1] >= ENOUGH:
            self._is_done = True
        elif len(self._fractions) == STEPS:
            self.close()

    def close(self) -> None:
        """Judges the steps so far, if the run ends before the tenth step."""
        if self._fractions and not self._is_done:
            self._warn(self._words())
        self._is_done = True

    def _words(self) -> str:
        steps = len(self._fractions)
        which = "the first step" if steps == 1 else f"any of the first {steps} steps"
        found = f"At most {max(self._fractions):.1%} of the trained numbers changed in {which}"
        if not self._has_gradient:
            return (
                f"{found}, since the gradient was 0: no pair had a preference to learn from. Look "
                "for chosen completions that are the same as the rejected ones, for weights of 0, "
                "and for rewards that are equal."
            )
        if self._narrow:
            return (
                f"{found}: the other updates are smaller than {self._dtype} can hold, and are "
                "rounded away. Leave out `--dtype` to train the parameters in float32, or give a "
                "larger `--learning-rate`."
            )
        return (
            f"{found}: the other updates are smaller than {self._dtype} can hold, or are 0, as for "
            "the embeddings of tokens that are not in the data. Unless most parameters are such "
            "embeddings, give a larger `--learning-rate`."
        )
