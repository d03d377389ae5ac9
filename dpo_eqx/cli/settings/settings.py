"""Every setting of `dpo-eqx train`, with its default and its help text.

`parse.py` reads settings from flags and files; `check.py` finds those that contradict each other.
"""

import dataclasses
from pathlib import Path
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Trains a policy on preferences, from text files to a checkpoint that `transformers` loads."""

    config: Path | None = None
    """A YAML file of settings, with the names of the flags as keys. Flags override it. The
    `config.yaml` of an earlier run is such a file."""

    model: str
    """The model to train: a folder with `config.json`, safetensors and a tokenizer, or a hub
    name."""
    data: tuple[str, ...]
    """Preferences: JSON Lines, JSON, CSV, TSV, Parquet or Arrow (plain or compressed), a folder, or
    a hub name. Several are a mixture, each with its share of the rows, if given, as
    `a.jsonl:0.3`."""
    output: Path
    """The folder of the run, for settings, metrics, checkpoints and the finished model."""
    reference: str | None = None
    """The reference model (default: `--model` before training)."""
    eval_data: str | None = None
    """Held-out preferences, evaluated before the first step, every `--eval-every` steps, and at
    the end."""
    eval_fraction: float | None = None
    """The fraction of the prompts of `--data` to hold out, in place of `--eval-data`. A hash of the
    prompt chooses them, so that they are the same in every run."""
    tokenizer: str | None = None
    """A folder or hub name of the tokenizer (default: the model's); `bytes` is the built-in one."""
    chat_template: str = "tokenizer"
    """The chat template of conversations: a file with a Jinja template, `none`, or `tokenizer` for
    the tokenizer's own."""
    as_chat: bool = False
    """Make turns of the user and the assistant from prompts and answers of text."""
    score: Literal["completion", "assistant", "last"] = "completion"
    """The scored tokens of a conversation's answers: all after the prompt, those of the assistant's
    turns, or those of its last turn. Messages with `weight: 0` are never scored."""
    split: str | None = None
    """The split of `--data`, if it has several (default: train)."""
    eval_split: str | None = None
    """The split of `--eval-data`, if it has several (default: train)."""
    subset: str | None = None
    """The subset of `--data`, if it has several; the `config_name` on the hub."""
    columns: tuple[str, ...] = ()
    """Names of columns in the data, as `prompt=question` for a column `question` that holds the
    prompts. `weight=` ignores the column `weight`."""
    where: tuple[str, ...] = ()
    """Values that columns must have, as `lang=en`; other records are left out."""
    pairs: Literal["best-worst", "all", "best-rest"] = "best-worst"
    """The pairs of several answers with scores or ranks: the best and the worst one, all of unequal
    worth, or the best one with every worse one."""
    ties: Literal["drop", "half"] = "drop"
    """Two answers of equal worth: leave them out, or train both pairs with the weight 0.5."""
    offset_column: str | None = None
    """The column of the offset of `--loss odpo` (default: the difference of the scores,
    if the data have any)."""

    loss: tuple[str, ...] = ("sigmoid",)
    """One loss, or several that are added up: sigmoid, ipo, robust, hinge, simpo, kto, ..."""
    loss_weights: tuple[float, ...] = ()
    """Weights of the losses, one for each loss (default: 1)."""
    loss_options: tuple[str, ...] = ()
    """Further hyper-parameters of the losses, by name: `gamma=0.5`."""
    beta: float | None = None
    """Strength of the pull towards the reference (default: the loss's default, mostly 0.1)."""
    label_smoothing: float | None = None
    """Assumed fraction of flipped labels (default: the loss's default)."""
    reward_head: bool = False
    """Train a reward model, with `--loss bradley_terry`: `--model` gets a head with one number in
    place of its logits, or is a reward model already."""
    reference_free: bool = False
    """Train without a reference: its log-probabilities count as 0."""
    divergence: str | None = None
    """The divergence from the reference: reverse_kl, forward_kl, jensen_shannon, or
    alpha_divergence=A (default: reverse_kl)."""

    steps: int | None = None
    """Largest number of optimiser steps (default: set by `--epochs`)."""
    epochs: int | None = None
    """Largest number of passes through the data (default: 1, or no limit if `--steps` is given)."""
    batch_size: int = 8
    """Pairs per optimiser step, over all microbatches."""
    microbatches: int = 1
    """Number of parts that a batch is split into to save memory. The result stays the same."""
    learning_rate: float = 1e-6
    """Peak learning rate. About 1e-6 suits a whole model, 1e-5 to 1e-4 suits LoRA."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises from 0 to its peak."""
    optimizer: Literal["adamw", "sgd", "adafactor", "lion"] = "adamw"
    """The Optax optimiser; sgd has no momentum."""
    weight_decay: float = 0.0
    """Weight decay of all parameters except biases and norms."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 switches clipping off."""
    dropout: bool = False
    """Apply the model's own dropout in training. TRL switches it off, too."""

    shuffle: bool = True
    """Give each epoch a new random order; otherwise keep the order of the file."""
    seed: int = 0
    """Random seed of the data order, of new adapters and of dropout."""
    max_length: int | None = None
    """Largest number of tokens of prompt plus completion; a longer completion loses its end. A row
    is dropped if its prompt alone fills the limit."""
    max_prompt_length: int | None = None
    """Largest number of tokens of a prompt, applied before `--max-length`; a longer prompt loses
    its start."""
    max_completion_length: int | None = None
    """Largest number of tokens of a completion; a longer completion loses its end."""
    strict: bool = False
    """Raise an error for a row that would be dropped or cut, has two equal completions, or has text
    that the chat template leaves out."""
    buckets: int = 4
    """Number of widths that prompts are padded to, and completions likewise. Fewer widths compile
    less and pad more."""

    lora_rank: int = 0
    """Train low-rank adapters of this rank in place of the model; 0 trains the model."""
    lora_alpha: float | None = None
    """The adapters are scaled by alpha / rank (default: twice the rank)."""
    lora_target: str | None = None
    """A regular expression for the layers that get adapters, such as `attention` (default: all
    linear layers but the unembedding)."""
    lora: str | None = None
    """Continue from the adapters in this folder, which PEFT or an earlier run wrote, in place of
    new adapters. An earlier run wrote them to `adapter/`."""
    lora_reference: Literal["base", "adapter"] | None = None
    """The reference of a run with `--lora`: the model without adapters (base), or with the adapters
    that the run starts from (adapter). It has no default."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the linear layers of the frozen model, and of `--reference`, in 8 or 4 bits. Only
    adapters can be trained then."""

    dtype: Dtype | None = None
    """Dtype of the parameters in training (default: float32 for trained parameters, as stored in
    the checkpoint for frozen parameters). Adapters are always in float32."""
    compute_dtype: Dtype | None = None
    """Dtype of the forward pass (default: the checkpoint's dtype, or `--dtype` if it is
    narrower)."""
    save_dtype: Dtype | None = None
    """Dtype of the finished model in `model/` (default: the checkpoint's dtype, or `--dtype` if it
    is narrower)."""
    remat: bool = False
    """Recompute each layer in the backward pass, which saves memory."""
    fused: bool = True
    """Use cuDNN's attention kernel in half precision on a GPU that has it."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, before training, and cache them on disk."""
    sync_reference_every: int = 0
    """Number of steps between moves of the reference towards the policy (TR-DPO); 0 switches the
    moves off."""
    sync_reference_alpha: float = 0.6
    """Mixing weight of the policy in such a move, in [0, 1]; 1 copies the policy."""

    eval_every: int = 0
    """Number of steps between evaluations; 0 evaluates only at the start and the end."""
    save_every: int = 500
    """Number of steps between checkpoints; 0 writes one only at the end."""
    keep: int = 2
    """Number of checkpoints to keep."""
    resume: bool = False
    """Continue the run in `--output`, or start it if it has no complete checkpoint."""
    cache: Path | None = None
    """A folder for tokens and reference log-probabilities (default: the user's cache folder, for
    data that does not fit in memory)."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further places to log metrics to; `metrics.jsonl` is always written."""
    report: bool = True
    """Keep some pairs and answers from the start and the end, and write `report.html`."""

    mesh: str | None = None
    """The mesh of devices, `data=4,fsdp=2,tensor=1`. Pairs are split over data and fsdp, parameters
    over fsdp and tensor (default: one device, or the devices of all processes along data if there
    are several processes)."""
    coordinator: str | None = None
    """The address HOST:PORT of process 0 if several processes train together. `auto` asks the
    cluster (Slurm, Open MPI, Kubernetes, TPU pods)."""
    num_processes: int | None = None
    """Number of processes that train together."""
    process_id: int | None = None
    """The number of this process, from 0."""


# These belong to one invocation, not to the run, so `config.yaml` does not keep them.
INVOCATION = ("config", "resume", "coordinator", "num_processes", "process_id")
