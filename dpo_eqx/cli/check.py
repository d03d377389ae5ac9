"""Settings that cannot be, found before anything is read: out of range, or against each other.

What depends on the data or the model is checked where it is known.
"""

import math
from collections.abc import Iterator

from .settings import Settings

_POSITIVE = ("steps", "epochs", "batch_size", "microbatches", "buckets", "keep", "learning_rate")
_POSITIVE_IF_GIVEN = ("beta", "max_length", "max_prompt_length", "max_completion_length")
_NOT_NEGATIVE = (
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "lora_rank",
    "sync_reference_every",
    "eval_every",
    "save_every",
)


def check(settings: Settings) -> None:
    """Raises `ValueError` with what is wrong in `settings`, and the remedy."""
    _check_ranges(settings)
    problem = next(_contradictions(settings), None)
    if problem is not None:
        raise ValueError(problem)


def flag(name: str) -> str:
    """The flag of a field, as in `--batch-size`."""
    return f"`--{name.replace('_', '-')}`"


def _check_ranges(settings: Settings) -> None:
    for name in (*_POSITIVE, *_POSITIVE_IF_GIVEN, "lora_alpha"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag(name)} must be positive, got {value}.")
    for name in _NOT_NEGATIVE:
        value = getattr(settings, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{flag(name)} must not be negative, got {value}.")
    if not 0 <= settings.sync_reference_alpha <= 1:
        raise ValueError(
            f"{flag('sync_reference_alpha')} must be in [0, 1], got "
            f"{settings.sync_reference_alpha}."
        )


def _contradictions(settings: Settings) -> Iterator[str]:
    """A sentence for each pair of settings that exclude each other."""
    s = settings
    lora = s.lora_rank > 0
    moves = s.sync_reference_every > 0
    exclusive = [
        ("reference_free", s.reference_free, "reference", s.reference is not None),
        ("reference_free", s.reference_free, "precompute_reference", s.precompute_reference),
        ("reference_free", s.reference_free, "sync_reference_every", moves),
        ("precompute_reference", s.precompute_reference, "sync_reference_every", moves),
        ("lora_rank", lora, "sync_reference_every", moves),
    ]
    for one, has_one, other, has_other in exclusive:
        if has_one and has_other:
            yield f"{flag(one)} and {flag(other)} contradict each other; leave out one of them."
    for name in ("lora_alpha", "lora_target"):
        if getattr(s, name) is not None and not lora:
            yield f"{flag(name)} is for adapters, of which there are none; give `--lora-rank` too."
    if s.eval_every and s.eval_data is None:
        yield "`--eval-every` needs preferences to evaluate on; give `--eval-data` too."
    if s.loss_weights and len(s.loss_weights) != len(s.loss):
        yield (
            f"`--loss-weights` must be as many as losses, {len(s.loss)}; got {len(s.loss_weights)}."
        )
    if not s.loss:
        yield "`--loss` must name a loss at least."
    if s.batch_size % s.microbatches:
        yield (
            "`--microbatches` must divide `--batch-size`, which counts the pairs of all of them; "
            f"got {s.microbatches} and {s.batch_size}."
        )
