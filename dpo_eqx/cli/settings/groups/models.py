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
    train: tuple[str, ...] = ()
    """Regular expressions for the parameters to train, such as `feed_forward`, searched in paths
    like layers.attention.query.weight (default: all)."""
    freeze: tuple[str, ...] = ()
    """Regular expressions for parameters that are not trained, such as `embedding`."""
