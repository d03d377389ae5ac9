"""From settings to batches of packed rows, for `--pack`.

`data.py` makes all other batches.
"""

from ... import data
from ...data._batches.pack import kept_together
from ...data._records.records import Form
from ...data._tokens.rows import Rows, lengths_of
from ..settings.settings import Settings
from .score import average_of


def pack_batches(
    rows: Rows,
    form: Form,
    settings: Settings,
    *,
    training: bool,
    share: tuple[int, int],
    split: int,
) -> data.Batches:
    """Batches of packed rows to train on without end, or to evaluate on once.

    **Arguments:**

    - `rows`, `form`: the rows of token ids, and what they are.
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
        average=average_of(form, settings),
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
            f"`--batch-size` must be about the number of {shapes.unit} in {shapes.rows} packed "
            f"rows or more, the fewest of a step; got {settings.batch_size}, and {shapes.rows} "
            f"rows of {shapes.length} tokens hold {held:.1f} {shapes.unit}. Give a larger "
            "`--batch-size`, a smaller `--pack-length`, or fewer `--microbatches` or devices."
        )


def check_packable(
    rows: Rows, form: Form, path: str, settings: Settings, *, mismatched: bool
) -> None:
    """Raises `ValueError` if `--pack` is given and the data of `path` cannot be packed.

    **Arguments:**

    - `rows`, `form`: the rows of token ids, and what they are.
    - `mismatched`: whether the loss compares with completions of other prompts, as KTO does.
    """
    if not settings.pack:
        return
    if mismatched:
        raise ValueError(
            "`--pack` has no completions of other prompts, with which KTO compares, and "
            f"{path} holds {form}. Leave out `--pack`, or take `--loss bco` or "
            "`apo_zero_unpaired`, which need no others."
        )
    if settings.pack_length is None:
        return
    tokens = lengths_of(rows).sum(axis=1)
    too_long = int((tokens > settings.pack_length).sum())
    if too_long:
        raise ValueError(
            f"`--pack-length` must hold each {kept_together(form.unpaired)}; got "
            f"{settings.pack_length}, and {too_long} of {len(tokens)} rows of {path} have more "
            f"tokens. Give {tokens.max()} or more, or cut rows by `--max-length`."
        )
