"""Every setting of `dpo-eqx train`, with its default and its help.

How they are read from flags and files is in `parse.py`; which contradict each other in `check.py`.
"""

import dataclasses
from pathlib import Path
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Trains a policy on preferences, from text files to a checkpoint that `transformers` loads."""

    config: Path | None = None
    """A YAML file of settings, keys as the flags; flags override it. A run's own `config.yaml` is
    one."""

    model: str
    """The policy to start from: a folder with `config.json`, safetensors and a tokenizer, or a
    name of the Hugging Face hub."""
    data: str
    """Preferences: JSON Lines (plain or gzip), Parquet, a folder, or a name of the hub."""
    output: Path
    """The folder of the run: settings, metrics, checkpoints, and at the end the model."""
    reference: str | None = None
    """The reference, where it is another model than the one to start from."""
    eval_data: str | None = None
    """Held-out preferences, evaluated before the first step, every `--eval-every` steps, and at
    the end."""
    tokenizer: str | None = None
    """Where it is not in the folder of the model; `bytes` is the built-in one of bytes."""
    columns: tuple[str, ...] = ()
    """Names of columns, ours first: `prompt=question`. `weight=` leaves that column out."""

    loss: tuple[str, ...] = ("sigmoid",)
    """One loss, or several that are added up: sigmoid, ipo, robust, hinge, simpo, kto, ..."""
    loss_weights: tuple[float, ...] = ()
    """As many weights as losses; by default 1 each."""
    loss_options: tuple[str, ...] = ()
    """Further hyper-parameters of the losses, by name: `gamma=0.5`."""
    beta: float | None = None
    """Strength of the pull towards the reference; by default that of the loss, mostly 0.1."""
    label_smoothing: float | None = None
    """The share of labels taken to be flipped."""
    reference_free: bool = False
    """Do without a reference: its log-probabilities count as 0."""
    divergence: str | None = None
    """reverse_kl, forward_kl, jensen_shannon, or alpha_divergence=A."""

    steps: int | None = None
    """How many optimiser steps at most."""
    epochs: int | None = None
    """How many times through the data at most; 1 where `--steps` is not given either."""
    batch_size: int = 8
    """Pairs per optimiser step, over all microbatches."""
    microbatches: int = 1
    """Into how many parts a batch is split to save memory; the result is the same."""
    learning_rate: float = 1e-6
    """At its peak. Some 1e-6 for a whole model, 1e-5 to 1e-4 for LoRA."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What becomes of the learning rate after the warm-up; the last two end at 0."""
    warmup_steps: int = 0
    """Over how many steps the learning rate rises from 0."""
    optimizer: Literal["adamw", "sgd", "adafactor", "lion"] = "adamw"
    """The Optax optimiser; sgd has no momentum."""
    weight_decay: float = 0.0
    """Of all parameters but biases and norms."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 is off."""
    dropout: bool = False
    """Whether the model's own dropout applies in training. TRL switches it off, too."""

    shuffle: bool = True
    """Whether each epoch has a new random order; else that of the file."""
    seed: int = 0
    """Of the order, of adapters and of dropout."""
    max_length: int | None = None
    """Tokens of prompt and completion; the start is kept. A prompt as long drops its row."""
    max_prompt_length: int | None = None
    """Tokens of a prompt, applied first; the end is kept."""
    max_completion_length: int | None = None
    """Tokens of a completion; the start is kept."""
    strict: bool = False
    """Whether a row that is dropped or cut, or whose completions are the same, is an error."""
    buckets: int = 4
    """How many widths prompts are padded to, and how many completions: fewer compile less, more
    pad less."""

    lora_rank: int = 0
    """Train low-rank adapters of this rank in place of the model; 0 is off."""
    lora_alpha: float | None = None
    """The adapters are scaled by alpha / rank; by default twice the rank."""
    lora_target: str | None = None
    """A regular expression for the layers that get one, such as `attention`; by default all but
    the unembedding."""
    lora: str | None = None
    """Go on from the adapters in this folder, as PEFT or an earlier run's `adapter/` holds them, in
    place of new ones."""
    lora_reference: Literal["base", "adapter"] | None = None
    """The reference where `--lora` is given: the model without adapters, or with those that the
    run begins with. There is no default."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the linear layers of the frozen model in 8 or 4 bits; for adapters. The model of
    `--reference` too."""

    dtype: Dtype | None = None
    """Dtype of the parameters in training (default: float32 for those that are trained, as stored
    in the checkpoint for those that are frozen). Adapters are always in float32."""
    compute_dtype: Dtype | None = None
    """Dtype of the forward pass (default: that of the checkpoint, or `--dtype` if it is
    narrower)."""
    save_dtype: Dtype | None = None
    """Dtype of the finished model in `model/` (default: that of the checkpoint, or `--dtype` if it
    is narrower)."""
    remat: bool = False
    """Whether each layer is computed again in the backward pass, which saves memory."""
    fused: bool = True
    """Whether attention in half precision goes through cuDNN's kernel on a GPU that has it."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, before training, and keep them on disk."""
    sync_reference_every: int = 0
    """Every so many steps the reference moves towards the policy (TR-DPO); 0 is off."""
    sync_reference_alpha: float = 0.6
    """How far: 1 is all the way."""

    eval_every: int = 0
    """Evaluate every so many steps; 0 is at the start and the end only."""
    save_every: int = 500
    """Write a checkpoint every so many steps; 0 is at the end only."""
    keep: int = 2
    """How many checkpoints are kept."""
    resume: bool = False
    """Continue the run in `--output`; start afresh where it has no complete checkpoint."""
    cache: Path | None = None
    """A folder for tokens and reference log-probabilities; by default the user's cache folder,
    for what does not fit in memory."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go beside `metrics.jsonl`."""
    report: bool = True
    """Whether some pairs and answers are kept at the start and the end, and `report.html` is
    written."""

    mesh: str | None = None
    """How devices are used, `data=4,fsdp=2,tensor=1`: pairs are split over the first two,
    parameters over the last two. By default one device, or `data` over those of all processes."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes train together; `auto` where the cluster
    tells (Slurm, Open MPI, Kubernetes, TPU pods)."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""


# About one invocation and not about the run: they are not kept in `config.yaml`.
INVOCATION = ("config", "resume", "coordinator", "num_processes", "process_id")
