"""Checks of settings before anything is read: those out of range, and those that contradict others.

The code that reads the data or the model checks the settings that depend on it.
"""

import math
import re
from collections.abc import Iterator

from ...sharding._mesh import parse_sizes
from .goal import goal_of
from .groups.optimizer import OPTIMIZERS, OptimizerFlags, schedule_of
from .options import is_function, near
from .settings import Settings
from .sources import held_out_of, sources_of

# The loss of reward models. It takes rewards, and every other loss takes log-probabilities.
REWARD_LOSS = "bradley_terry"

_POSITIVE = ("steps", "epochs", "batch_size", "microbatches", "buckets", "keep", "learning_rate")
_POSITIVE_IF_GIVEN = (
    "beta",
    "decay_steps",
    "pack_length",
    "max_length",
    "max_prompt_length",
    "max_completion_length",
    "early_stop",
    "sample_tokens",
)
_NOT_NEGATIVE = (
    "warmup_steps",
    "min_learning_rate",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "lora_rank",
    "sync_reference_every",
    "eval_every",
    "sample_every",
    "save_every",
)


def check(settings: Settings) -> None:
    """Raises `ValueError` with the fault and the remedy if `settings` are wrong."""
    _check_ranges(settings)
    sources_of(settings.data)
    held_out_of(settings.eval_data)
    if settings.mesh is not None:
        parse_sizes(settings.mesh)
    patterns = {
        "lora_target": (settings.lora_target or "",),
        "lora_modules_to_save": (settings.lora_modules_to_save or "",),
        "train": settings.train,
        "freeze": settings.freeze,
    }
    for name, given in patterns.items():
        for pattern in given:
            _check_pattern(name, pattern)
    check_optimizer(settings.optimizer)
    raise_all(_contradictions(settings))
    raise_all(_about_evaluations(settings))
    if settings.sample_prompts is not None and not settings.sample_every:
        raise ValueError(
            "`--sample-prompts` needs a number of steps between answers; give `--sample-every` too."
        )
    goal_of(settings)
    raise_all(_of_optimizer(settings))


def check_optimizer(name: str) -> None:
    """Raises `ValueError` if `--optimizer` is neither a known name nor a Python function."""
    if name in OPTIMIZERS or is_function(name):
        return
    raise ValueError(
        f"`--optimizer` must be one of {', '.join(OPTIMIZERS)}, or a Python function as "
        f"`module:function`; got {name!r}.{near(name, OPTIMIZERS)}"
    )


def flag(name: str) -> str:
    """The flag of a field, such as `--batch-size`, in backticks."""
    return f"`--{name.replace('_', '-')}`"


def check_positive(name: str, value: float | int | None) -> None:
    """Raises `ValueError` if the value of the flag of the field `name` is not positive and finite.

    `None`, the value of a flag that was not given, passes.
    """
    # Written so that NaN fails, which is neither above nor below a number.
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{flag(name)} must be positive; got {value}.")


def _check_ranges(settings: Settings) -> None:
    for name in (*_POSITIVE, *_POSITIVE_IF_GIVEN, "lora_alpha"):
        check_positive(name, getattr(settings, name))
    for name in _NOT_NEGATIVE:
        value = getattr(settings, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{flag(name)} must not be negative; got {value}.")
    for name in ("sync_reference_alpha", "ld_alpha", "warmup_ratio"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{flag(name)} must be in [0, 1]; got {value}.")
    if not 0 <= settings.lora_dropout < 1:
        raise ValueError(f"`--lora-dropout` must be in [0, 1); got {settings.lora_dropout}.")
    if settings.eval_fraction is not None and not 0 < settings.eval_fraction < 1:
        raise ValueError(
            f"`--eval-fraction` must be above 0 and below 1; got {settings.eval_fraction}."
        )


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{flag(name)} must be a regular expression; got {pattern!r} ({error})."
        ) from None


def _contradictions(settings: Settings) -> Iterator[str]:
    """An error message for each pair of settings that exclude each other."""
    s = settings
    lora = s.lora_rank > 0
    moves = s.sync_reference_every > 0
    # A reference that moves is a copy of the trained parameters: it cannot be computed in advance,
    # and with adapters the reference is a view of the policy, not a copy.
    exclusive = [
        ("reference_free", s.reference_free, "reference", s.reference is not None),
        ("reference_free", s.reference_free, "precompute_reference", s.precompute_reference),
        ("reference_free", s.reference_free, "sync_reference_every", moves),
        ("precompute_reference", s.precompute_reference, "sync_reference_every", moves),
        ("reference_offload", s.reference_offload, "sync_reference_every", moves),
        ("reference_offload", s.reference_offload, "precompute_reference", s.precompute_reference),
        ("lora_rank", lora, "sync_reference_every", moves),
        ("lora", s.lora is not None, "sync_reference_every", moves),
        ("lora", s.lora is not None, "lora_rank", lora),
        ("lora", s.lora is not None, "lora_alpha", s.lora_alpha is not None),
        ("lora", s.lora is not None, "lora_rslora", s.lora_rslora),
        ("lora", s.lora is not None, "lora_dora", s.lora_dora),
        ("lora", s.lora is not None, "lora_modules_to_save", s.lora_modules_to_save is not None),
        ("lora", s.lora is not None, "lora_target", s.lora_target is not None),
        *((one, bool(getattr(s, one)), "lora_rank", lora) for one in ("train", "freeze")),
        *((one, bool(getattr(s, one)), "lora", s.lora is not None) for one in ("train", "freeze")),
        ("eval_fraction", s.eval_fraction is not None, "eval_data", bool(s.eval_data)),
        ("eval_fraction", s.eval_fraction is not None, "eval_split", s.eval_split is not None),
        ("lora_reference", s.lora_reference is not None, "reference", s.reference is not None),
        ("lora_reference", s.lora_reference is not None, "reference_free", s.reference_free),
        ("reward_head", s.reward_head, "reference_free", s.reference_free),
        ("reward_head", s.reward_head, "metrics", bool({*s.metrics} - {"num_tokens"})),
        ("reward_head", s.reward_head, "pack", s.pack),
        ("pack", s.pack, "no_shuffle", not s.shuffle),
        ("pack", s.pack, "wpo", s.wpo),
        *(
            ("ld_alpha", s.ld_alpha is not None, name, bool(getattr(s, name)))
            for name in ("pack", "wpo", "metrics", "precompute_reference", "reward_head")
        ),
        ("wpo", s.wpo, "reward_head", s.reward_head),
        ("reward_head", s.reward_head, "sample_every", s.sample_every > 0),
    ]
    for one, has_one, other, has_other in exclusive:
        if has_one and has_other:
            yield f"{flag(one)} and {flag(other)} contradict each other; leave out one of them."
    if s.reward_head != (REWARD_LOSS in s.loss) or (s.reward_head and len(s.loss) > 1):
        yield (
            f"`--reward-head` must be given with `--loss {REWARD_LOSS}` alone, the loss of reward "
            f"models; got `--loss {' '.join(s.loss)}` with{'' if s.reward_head else 'out'} "
            "`--reward-head`."
        )
    of_new_adapters = (
        *("lora_alpha", "lora_target", "lora_rslora", "lora_dora"),
        "lora_modules_to_save",
    )
    for name in of_new_adapters:
        if getattr(s, name) not in (None, False) and not lora:
            yield f"{flag(name)} is for adapters, and this run has none; give `--lora-rank` too."
    if s.lora_dropout and not lora and s.lora is None:
        yield (
            "`--lora-dropout` is for adapters, and this run has none; give `--lora-rank` or "
            "`--lora` too."
        )
    if s.lora_reference is not None and s.lora is None:
        yield "`--lora-reference` only applies if a run continues from adapters; give `--lora` too."
    if s.quantize is not None and not lora and s.lora is None:
        yield (
            "`--quantize` is for a frozen model, so that only adapters are trained; give "
            "`--lora-rank` or `--lora` too."
        )
    if s.pack_length is not None and not s.pack:
        yield "`--pack-length` is for packed rows; give `--pack` too."
    if s.loss_weights and len(s.loss_weights) != len(s.loss):
        yield (
            f"`--loss-weights` must have one weight for each loss, {len(s.loss)}; got "
            f"{len(s.loss_weights)}."
        )
    if s.average is not None and s.loss != ("sft",):
        given = " ".join(s.loss)
        yield f"`--average` is for `--loss sft` alone; got `--loss {given}`. Leave it out."
    if not s.loss:
        yield "`--loss` must name at least one loss; got none."
    if s.batch_size % s.microbatches:
        yield (
            "`--microbatches` must divide `--batch-size`, the number of pairs in all microbatches; "
            f"got {s.microbatches} and {s.batch_size}."
        )


def _about_evaluations(settings: Settings) -> Iterator[str]:
    """An error message for each setting of evaluations that would have no effect."""
    s = settings
    if s.eval_split is not None and not s.eval_data:
        yield "`--eval-split` is for held-out data, and this run has none; give `--eval-data` too."
    needs_data = {
        "--eval-every": s.eval_every > 0,
        "--no-eval-at-start": not s.eval_at_start,
        "--keep-best": s.keep_best is not None,
    }
    for name, is_given in needs_data.items():
        if is_given and not s.eval_data and s.eval_fraction is None:
            yield (
                f"`{name}` needs preferences to evaluate on; give `--eval-data` too, or "
                "`--eval-fraction`."
            )
    if s.early_stop is not None and s.keep_best is None:
        yield (
            "`--early-stop` needs a metric that must improve; give `--keep-best` too, such as "
            "`--keep-best loss`."
        )
    if s.early_stop is not None and not s.eval_every:
        yield "`--early-stop` needs evaluations during the run; give `--eval-every` too."


def _of_optimizer(s: OptimizerFlags) -> Iterator[str]:
    """An error message for each contradiction in the optimiser and its learning rate."""
    schedule = schedule_of(s)
    if s.warmup_ratio is not None and s.warmup_steps:
        yield (
            "`--warmup-ratio` and `--warmup-steps` contradict each other; leave out one of them."
        )
    if s.optimizer == "schedule_free_adamw" and schedule != "constant":
        yield (
            "`--optimizer schedule_free_adamw` averages parameters in place of a decay, so that "
            f"`--schedule` must be constant; got {schedule}. Leave out `--schedule`."
        )
    if s.min_learning_rate > s.learning_rate:
        yield (
            f"`--min-learning-rate` must be at most `--learning-rate`, {s.learning_rate}; got "
            f"{s.min_learning_rate}."
        )
    if s.min_learning_rate and schedule == "constant":
        yield (
            "`--min-learning-rate` is where a schedule ends, and `--schedule constant` does not "
            "fall; leave it out, or give another `--schedule`."
        )
    if s.decay_steps is not None and schedule != "wsd":
        yield f"`--decay-steps` is for `--schedule wsd`; got `--schedule {schedule}`."
    if s.weight_decay and is_function(s.optimizer):
        yield (
            f"`--weight-decay` has no effect on your own `--optimizer {s.optimizer}`; leave it "
            "out, and let your function add the decay."
        )


def raise_all(problems: Iterator[str]) -> None:
    """Raises `ValueError` with all messages, one in a line, if there are any."""
    if found := list(problems):
        raise ValueError("\n".join(found))
