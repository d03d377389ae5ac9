"""What a run writes, and where."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What is written, and when."""

    config: Path | None = None
    """A YAML file of settings, with the names of the flags as keys. Flags override it. The
    `config.yaml` of an earlier run is such a file."""
    output: Path
    """The folder of the run, for settings, metrics, checkpoints and the finished model."""
    resume: bool = False
    """Continue the run in `--output`, or start it if it has no complete checkpoint."""
    dry_run: bool = False
    """Do everything up to the first step, say what a step needs of each device, and end. Nothing is
    written to `--output`."""
    eval_every: int = 0
    """Number of steps between evaluations; 0 evaluates only at the start and the end."""
    eval_at_start: bool = True
    """Evaluate before the first step, too."""
    keep_best: str | None = None
    """A metric of the evaluations, such as `loss`, or `helpful/loss` of the held-out set helpful.
    `model/` is then the model of the best evaluation, whose checkpoint is kept, too. If the metric
    is not the loss, a margin or an accuracy, `min:NAME` or `max:NAME` says what is best."""
    early_stop: int | None = None
    """Number of evaluations in a row without a better value of `--keep-best` that end the run."""
    save_every: int = 500
    """Number of steps between checkpoints; 0 writes one only at the end."""
    keep: int = 2
    """Number of checkpoints to keep."""
    sample_every: int = 0
    """Number of steps between answers of the policy and of the reference to some prompts, which are
    shown and go to `samples.jsonl`; 0 draws none."""
    sample_prompts: str | None = None
    """Prompts to answer: a `.txt` with one on each line, records with `prompt`, or preferences
    (default: the first four prompts of the held-out data, or of `--data`)."""
    sample_tokens: int = 64
    """Largest number of tokens in such an answer."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further places to log metrics to; `metrics.jsonl` is always written."""
    metrics: tuple[Literal["entropy", "accuracy", "logits", "num_tokens"], ...] = ()
    """Further metrics of each step: the entropy of the predictions, the share of chosen tokens that
    are the likeliest, the mean logits, the number of tokens read so far."""
    log_norms: bool = False
    """Log the norms of gradients and updates of each part of the model, such as `attention`."""
    report: bool = True
    """Keep some pairs and answers from the start and the end, and write `report.html`."""
