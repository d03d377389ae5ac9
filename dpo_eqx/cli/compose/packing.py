"""From settings to batches of packed rows, for `--pack`.

`data.py` makes all other batches.
"""

from ... import data
from ...data._records.records import Form
from ...data._tokens.rows import Rows, lengths_of
from ..settings.settings import Settings


def pack_batches(
    rows: Rows, settings: Settings, *, training: bool, share: tuple[int, int], split: int
) -> data.Batches:
    """Batches of packed rows to train on without end, or to evaluate on once.

    **Arguments:**

    - `rows`: pairs of token ids.
    - `training`, `share`, `split`: as in `make_batches`.

    **Raises:**

    `ValueError` if the rows of a step of training hold far more pairs than `--batch-size`.
    """
    # As in `make_batches`, a batch of evaluation is a microbatch of training.
    parts = settings.microbatches if training else 1
    batches = data.packed_batches(
        rows,
        batch_size=settings.batch_size * parts // settings.microbatches,
        length=settings.pack_length,
        shuffle=training,
        seed=settings.seed,
        epochs=None if training else 1,
        multiple_of=parts * split,
        process_index=share[0],
        process_count=share[1],
    )
    shapes = batches.shapes() if training else None
    if isinstance(shapes, data.PackedShapes):
        _check_pairs(shapes, settings)
    return batches


def _check_pairs(shapes: data.PackedShapes, settings: Settings) -> None:
    held = shapes.pairs / shapes.steps
    if held > 1.5 * settings.batch_size + 1:
        raise ValueError(
            f"`--batch-size` must be about the number of pairs in {shapes.rows} packed rows or "
            f"more, the fewest of a step; got {settings.batch_size}, and {shapes.rows} rows of "
            f"{shapes.length} tokens hold {held:.1f} pairs. Give a larger `--batch-size`, a "
            "smaller `--pack-length`, or fewer `--microbatches` or devices."
        )


def check_packable(rows: Rows, form: Form, path: str, settings: Settings) -> None:
    """Raises `ValueError` if `--pack` is given and some row of `path` cannot be packed."""
    if not settings.pack:
        return
    if form.unpaired:
        raise ValueError(
            f"`--pack` is for pairs, and {path} holds {form}. Leave out `--pack`; batches of "
            "single completions are padded to a few widths."
        )
    if settings.pack_length is None:
        return
    tokens = lengths_of(rows).sum(axis=1)
    too_long = int((tokens > settings.pack_length).sum())
    if too_long:
        raise ValueError(
            "`--pack-length` must hold each pair, its prompt once and both completions; got "
            f"{settings.pack_length}, and {too_long} of {len(tokens)} rows of {path} have more "
            f"tokens. Give {tokens.max()} or more, or cut rows by `--max-length`."
        )
