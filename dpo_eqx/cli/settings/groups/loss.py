"""The loss of a run, and its reference if that moves or is left out."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossFlags:
    """What is minimised."""

    loss: tuple[str, ...] = ("sigmoid",)
    """One loss, or several that are added up: sigmoid (also called dpo), ipo, robust, hinge, simpo,
    kto, ..."""
    loss_weights: tuple[float, ...] = ()
    """Weights of the losses, one for each loss (default: 1)."""
    loss_options: tuple[str, ...] = ()
    """Further hyper-parameters of the losses, by name: `gamma=0.5`."""
    beta: float | None = None
    """Strength of the pull towards the reference (default: the loss's default, mostly 0.1)."""
    label_smoothing: float | None = None
    """Assumed fraction of flipped labels (default: the loss's default)."""
    divergence: str | None = None
    """The divergence from the reference: reverse_kl, forward_kl, jensen_shannon, or
    alpha_divergence=A (default: reverse_kl)."""
    reference_free: bool = False
    """Train without a reference: its log-probabilities count as 0."""
    average: Literal["tokens", "rows"] | None = None
    """Units of the mean of `--loss sft` on completions: all tokens of the batch, or its rows, each
    with the mean over its own tokens (default: tokens)."""
    ld_alpha: float | None = None
    """Weight of the tokens by which the longer completion of a pair exceeds the shorter one
    (length-desensitised DPO), in [0, 1]; 1 changes nothing."""
    wpo: bool = False
    """Give more weight to pairs that the policy is likely to write (WPO)."""
    sync_reference_every: int = 0
    """Number of steps between moves of the reference towards the policy (TR-DPO); 0 switches the
    moves off."""
    sync_reference_alpha: float = 0.6
    """Mixing weight of the policy in such a move, in [0, 1]; 1 copies the policy."""
    reward_head: bool = False
    """Train a reward model, with `--loss bradley_terry`: `--model` gets a head with one number in
    place of its logits, or is a reward model already."""
