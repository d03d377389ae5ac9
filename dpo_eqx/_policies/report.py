"""The report of `check_policy`: its problems, and the arrays that would be trained.

The checks themselves are in `check_policy.py` and `probes.py`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


class TrainedArray(NamedTuple):
    """An array that is trained."""

    path: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PolicyReport:
    """The result of `check_policy`; `print(report)` shows all of it.

    **Arguments:**

    - `policy`: the name of the policy's class.
    - `problems`: a sentence or two for each fault, with a remedy.
    - `notes`: facts about the policy that are no faults.
    - `passed`: the names of the checks that found no fault.
    - `trained`: the arrays that are trained, in order.
    """

    policy: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    passed: tuple[str, ...]
    trained: tuple[TrainedArray, ...]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def raise_if_problems(self) -> None:
        """Raises `ValueError` with all problems, if there are any."""
        if self.problems:
            raise ValueError(f"`policy` must pass `dpx.check_policy`; got:\n{self}")

    def __str__(self) -> str:
        verdict = "no problem" if self.ok else f"{len(self.problems)} problem(s)"
        lines = [f"{self.policy}: {verdict}"]
        lines += [f"  ok       {name}" for name in self.passed]
        lines += [f"  PROBLEM  {problem}" for problem in self.problems]
        lines += [f"  note     {note}" for note in self.notes]
        total = sum(array.size for array in self.trained)
        lines.append(f"  trained  {total:,} parameters in {len(self.trained)} arrays")
        largest = sorted(self.trained, key=lambda array: -array.size)[:10]
        width = max((len(array.path) for array in largest), default=0)
        lines += [f"    {a.path:{width}}  {a.shape!s} {a.dtype}" for a in largest]
        rest = len(self.trained) - len(largest)
        return "\n".join([*lines, *([f"    and {rest} more arrays"] if rest else [])])
