"""Checkpoints of a run, written by Orbax: complete or absent, and only the last and best are kept.

A checkpoint holds a flat dictionary of arrays by name, and a small dictionary as JSON.
"""

import contextlib
import gc
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from jaxtyping import Array, PyTree

from ..._extras import require
from ..._jax.paths import leaf_name

Tree = TypeVar("Tree", bound=PyTree)


class Checkpoints:
    """The checkpoints in one folder; `latest()` is the step of the last complete one, if any.

    **Arguments:**

    - `folder`: the folder of the checkpoints; the first `save` creates it.
    - `keep`: the number of latest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int):
        # Orbax logs through absl. Its exceptions hold all that the user needs of these messages.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._orbax = require("orbax.checkpoint", extra="train")
        self._folder, self._keep = folder.absolute(), keep
        self._manager: Any = None

    def latest(self) -> int | None:
        """The step of the last complete checkpoint; `None` if there is none."""
        return self._open().latest_step() if self._folder.exists() else None

    def save(
        self, step: int, state: PyTree, position: dict[str, Any], *, best: int | None = None
    ) -> None:
        """Writes the arrays of `state`, and `position`, unless that checkpoint exists already.

        **Arguments:**

        - `best`: the step of a checkpoint to keep besides the latest ones; `None` if there is none.

        **Raises:**

        `OSError` if they cannot be written; earlier checkpoints stay as they were.
        """
        if self.latest() == step:
            return
        args = self._orbax.args
        items = args.Composite(
            state=args.StandardSave(named(state)), position=args.JsonSave(position)
        )
        reason = None
        with _silence():
            try:
                self._open().save(step, args=items)
                self._remove_old(best)
            except Exception as error:  # Orbax passes on every exception of its backends
                reason = _shorten(str(error)) or type(error).__name__
                self._manager = None  # it may list a checkpoint that was not written
            if reason is not None:
                gc.collect()  # unfinished coroutines complain now, while they are silenced
        if reason is not None:
            _silence_leftovers()
            raise OSError(self._words(step, reason))

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """The arrays of a checkpoint in the structure of `like`, and the position in the data.

        The arrays of `like` may be deleted.

        **Raises:**

        `ValueError` if the checkpoint does not hold the arrays of `like`, or is damaged.
        """
        args = self._orbax.args
        templates = {name: _abstract(leaf) for name, leaf in named(like).items()}
        try:
            items = self._open().restore(
                step,
                args=args.Composite(
                    state=args.StandardRestore(templates), position=args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"The checkpoint of step {step} in {self._folder} does not hold this policy and "
                f"optimiser, or is damaged ({_shorten(str(error))}). Give the settings of that "
                "run, or remove this checkpoint to continue from an earlier one."
            ) from error
        arrays = iter(items["state"][name] for name in templates)
        return jax.tree.map(lambda _: next(arrays), like), items["position"]

    def close(self) -> None:
        """Closes Orbax's manager, if it was opened."""
        if self._manager is not None:
            self._manager.close()

    def _remove_old(self, best: int | None) -> None:
        """Removes all checkpoints except the latest ones and that of the step `best`."""
        steps = sorted(self._open().all_steps())
        for step in steps[: -self._keep]:
            if step != best:
                self._open().delete(step)

    def _open(self) -> Any:
        if self._manager is None:
            options = self._orbax.CheckpointManagerOptions(
                # `save` then returns once the checkpoint is on disk, or raises the error itself.
                enable_async_checkpointing=False,
                # A run that was killed while it wrote leaves such directories.
                cleanup_tmp_directories=True,
            )
            self._manager = self._orbax.CheckpointManager(self._folder, options=options)
        return self._manager

    def _words(self, step: int, reason: str) -> str:
        last = self.latest()
        earlier = (
            "There is no earlier checkpoint."
            if last is None
            else f"The checkpoint of step {last} is complete."
        )
        return (
            f"The checkpoint of step {step} could not be written to {self._folder} ({reason}). "
            f"{earlier} Remove the cause, and continue with `--resume`."
        )


def named(tree: PyTree) -> dict[str, Array]:
    """The arrays of a pytree by their paths."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps Orbax's threads and coroutines from reporting one failure about 60 times."""
    before = sys.unraisablehook, threading.excepthook
    tasks = logging.getLogger("asyncio")
    level = tasks.level
    sys.unraisablehook = threading.excepthook = lambda _: None
    tasks.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = before
        tasks.setLevel(level)


def _silence_leftovers() -> None:
    """Silences the unfinished coroutines of a failed save until the process ends.

    They complain when they are garbage-collected, which may be at the end of the process.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _but_for_closed_loops(sys.unraisablehook)


def _but_for_closed_loops(report: Callable[[Any], object]) -> Callable[[Any], None]:
    """A hook that passes all exceptions to `report`, except those about a closed event loop.

    TensorStore's threads may call back after the failed save has closed its event loop.
    """

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    return hook


def _shorten(message: str, room: int = 160) -> str:
    """The start and the end of a message. The middle of Orbax's messages repeats paths."""
    words = " ".join(message.split())
    return words if len(words) <= 2 * room else f"{words[:room]} ... {words[-room:]}"


def _abstract(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
