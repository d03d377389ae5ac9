"""The models of a run."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What is trained, and against what."""

    model: str
    """The model to train: a folder with `config.json`, safetensors and a tokenizer, or a hub
    name."""
    reference: str | None = None
    """The reference model (default: `--model` before training)."""
