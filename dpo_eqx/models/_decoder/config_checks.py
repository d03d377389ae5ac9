"""Checks of a `Config`: its sizes are in range, and its parts fit together.

`config.py` imports this file, so that the types are `Any` here.
"""

from typing import Any


def check_sizes(config: Any) -> None:
    """Raises if a size is not positive, or negative if it has a default."""
    for name in ("vocab", "width", "layers", "heads", "max_length"):
        if not getattr(config, name) > 0:
            raise ValueError(f"`{name}` must be positive; got {getattr(config, name)}.")
    for name in ("key_heads", "head_width", "feed_forward", "experts", "expert_width"):
        if not getattr(config, name) >= 0:
            raise ValueError(
                f"`{name}` must be positive, or 0 for its default; got {getattr(config, name)}."
            )


def check_fit(config: Any) -> None:
    """Raises if the numbers of heads, the windows or the rotated width do not fit."""
    if config.heads % config.key_heads:
        raise ValueError(
            f"`heads` must be a multiple of `key_heads`; got {config.heads} and {config.key_heads}."
        )
    by_layer = {
        "windows": config.windows,
        "recurrent": config.mixers,
        "dense": config.dense or config.mixers,
        "rotaries": config.layer_rotaries,
    }
    for name, entries in by_layer.items():
        if len(entries) != config.layers:
            raise ValueError(
                f"`{name}` must have one entry per layer, {config.layers}; got {len(entries)}."
            )
    if any(config.recurrent) and config.recurrence is None:
        raise ValueError("`recurrence` is required if a layer is recurrent; got None.")
    check_rotary(config)
    check_experts(config)


def check_experts(config: Any) -> None:
    """Raises if the sizes of experts do not fit, or the activation is not one of experts."""
    count, most = config.experts_per_token, config.experts
    if not (1 <= count <= most if most else count == 0):
        wanted = f"from 1 to `experts`, {most}" if most else "0 if `experts` is 0"
        raise ValueError(f"`experts_per_token` must be {wanted}; got {count}.")
    if not most and any(config.dense) and not all(config.dense):
        raise ValueError("`dense` must be true for each layer, or for none, if `experts` is 0.")
    if most and (not config.gated or config.activation == "xielu"):
        raise ValueError(
            "`experts` must be 0 without a gate or with the activation 'xielu'; got "
            f"{most} experts, `gated` {config.gated} and `activation` {config.activation!r}."
        )


def check_rotary(config: Any) -> None:
    """Raises if the rotary embeddings do not fit the heads or each other."""
    rotary = config.rotary
    others = [other for other in config.layer_rotaries if other is not None]
    if rotary is None:
        if others:
            raise ValueError("`rotaries` must be `None` in each layer if positions are learned.")
        return
    if rotary.rotated_width(config.head_width) > config.head_width:
        raise ValueError(
            f"`head_width` must be even if the whole of a head is rotated; got {config.head_width}."
        )
    for other in {rotary, *others}:
        if other.kind == "yarn" and other.stated_width(config.head_width) % 2:
            raise ValueError(
                "The rotated part of a head must be even for the rotary embedding of type 'yarn'; "
                f"got `head_width` {config.head_width} and the fraction {other.fraction}."
            )
        half = rotary.rotated_width(config.head_width) // 2
        if _form(other, config) != _form(rotary, config):
            raise ValueError(
                "`rotaries` must rotate the same part of each head in the same way; got "
                f"{other} and {rotary}."
            )
        counts = {len(other.short_factors), len(other.long_factors)}
        if other.kind == "longrope" and counts != {half}:
            raise ValueError(
                f"`short_factor` and `long_factor` must have one number for each frequency, {half};"
                f" got {len(other.short_factors)} and {len(other.long_factors)}."
            )


def _form(rotary: Any, config: Any) -> tuple[object, ...]:
    """What the rotary embeddings of all layers must have in common."""
    width = rotary.rotated_width(config.head_width)
    return width, rotary.interleaved, rotary.query_growth
