"""Checkpoints of a run, by Orbax: whole or not there, the last few kept.

What is in them is a flat dictionary of arrays by name, and a small one that fits in JSON.
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

    - `folder`: where they are; made when the first is saved.
    - `keep`: how many of the last are kept.
    """

    def __init__(self, folder: Path, keep: int):
        # What matters of its messages is in what it raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._orbax = require("orbax.checkpoint", extra="train")
        self._folder, self._keep = folder.absolute(), keep
        self._manager: Any = None

    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._open().latest_step() if self._folder.exists() else None

    def save(self, step: int, state: PyTree, position: dict[str, Any]) -> None:
        """Writes the arrays of `state`, and `position`, unless they are there already.

        **Raises:**

        `OSError` where they cannot be written; earlier checkpoints are as they were.
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
            except Exception as error:  # Orbax lets through what its backends raise
                reason = _shorten(str(error)) or type(error).__name__
                self._manager = None  # what it believes to have written is not to be relied on
            if reason is not None:
                gc.collect()
        if reason is not None:
            _hush_what_it_left()
            raise OSError(self._words(step, reason))

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """The arrays of a checkpoint in the places of those of `like`, and the position.

        **Raises:**

        `ValueError` where it holds others.
        """
        args = self._orbax.args
        wanted = {name: _abstract(leaf) for name, leaf in named(like).items()}
        try:
            items = self._open().restore(
                step,
                args=args.Composite(
                    state=args.StandardRestore(wanted), position=args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"The checkpoint of step {step} in {self._folder} does not hold this policy and "
                f"optimiser, or is damaged: {_shorten(str(error))}"
            ) from error
        arrays = iter(items["state"][name] for name in wanted)
        return jax.tree.map(lambda _: next(arrays), like), items["position"]

    def close(self) -> None:
        """Ends what Orbax keeps open."""
        if self._manager is not None:
            self._manager.close()

    def _open(self) -> Any:
        if self._manager is None:
            options = self._orbax.CheckpointManagerOptions(
                max_to_keep=self._keep,
                # So that an error is raised where it can be told, and `save` means saved.
                enable_async_checkpointing=False,
                # Left by a run that was killed while it wrote.
                cleanup_tmp_directories=True,
            )
            self._manager = self._orbax.CheckpointManager(self._folder, options=options)
        return self._manager

    def _words(self, step: int, reason: str) -> str:
        last = self.latest()
        kept = "there is no earlier one" if last is None else f"that of step {last} is whole"
        where = f"The checkpoint of step {step} could not be written to {self._folder}"
        return f"{where} ({reason}); {kept}."


def named(tree: PyTree) -> dict[str, Array]:
    """The arrays of a pytree by their paths."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps Orbax's threads and coroutines from telling of one failure some sixty times."""
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


def _hush_what_it_left() -> None:
    """What is half done complains when it is collected, at the end of the process at the latest."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _but_for_closed_loops(sys.unraisablehook)


def _but_for_closed_loops(tell: Callable[[Any], object]) -> Callable[[Any], None]:
    """TensorStore's threads may call back only when the event loop of the failure is closed."""

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            tell(unraisable)

    return hook


def _shorten(message: str, room: int = 160) -> str:
    """The beginning and the end of a message: in between are paths, several times."""
    words = " ".join(message.split())
    return words if len(words) <= 2 * room else f"{words[:room]} ... {words[-room:]}"


def _abstract(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
