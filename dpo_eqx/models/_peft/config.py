"""PEFT's `adapter_config.json`: which linear layers have an adapter, of which rank and scale.

`load.py` reads the tensors. Settings without an exact counterpart raise; the error names the key.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from .._adapters.first_values import lora_scale
from .._checkpoint.config_values import RATE, check_kinds
from .._checkpoint.folder import ADAPTER_CONFIG
from .checkpoint_layers import Site

# Keys about how an adapter was trained or is run. None changes what it computes.
_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    ]
)
_READ = frozenset(
    [
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "use_dora",
        "use_rslora",
    ]
)
# What PEFT adds to `modules_to_save` for the task `SEQ_CLS`: every classifier has one of the two.
HEADS = ("classifier", "score")
# Other initialisations modify the base weights, so their adapters only fit that modified base.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The contents of an `adapter_config.json`, and the modules that it selects.

    **Arguments:**

    - `rank`, `alpha`: the defaults of modules that no pattern matches.
    - `rank_stabilised`: whether the scale is `alpha / sqrt(rank)` rather than `alpha / rank`.
    - `dropout`: the probability of dropout of the adapters' inputs in training.
    - `dora`: whether there are magnitudes.
    - `modules`: the ends of names of modules that are trained whole.
    - `tied`: whether the embedding and the unembedding among them stay one array.
    - `targets`: the ends of names of modules, or a regular expression for whole names.
    - `parameters`: the ends of names of parameters with an adapter, such as those of experts.
    - `excluded`: modules without an adapter, in the same form.
    - `layers`: the numbers of the layers with adapters; `None` for all.
    - `layer_names`: the names of the lists that `layers` counts in.
    - `ranks`, `alphas`: ranks and alphas by regular expressions for the ends of names.
    - `reward`: whether the adapter is one of a reward model, which has no unembedding.
    - `outer`: what names have in place of `model.`, if the adapter is one of a checkpoint that
        holds more than a language model; `""` if it is not.
    """

    rank: int
    alpha: float | int
    targets: tuple[str, ...] | str
    parameters: tuple[str, ...] = ()
    rank_stabilised: bool = False
    dropout: float = 0.0
    dora: bool = False
    modules: tuple[str, ...] = ()
    tied: bool = False
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    layer_names: tuple[str, ...] = ()
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    reward: bool = False
    outer: str = ""

    def has(self, module: str) -> bool:
        """Whether the module of this name has an adapter."""
        module = self._in_file(module)
        if _named(self.excluded, module):
            return False
        if self.targets == "all-linear":
            return module.rsplit(".", 1)[-1] != "lm_head"
        if isinstance(self.targets, str) or self.layers is None:
            return _named(self.targets, module)
        return _named(self.targets, module) and self._layer(module) in self.layers

    def names_in(self, site: Site) -> list[str]:
        """The names of a layer of the checkpoint that have an adapter."""
        if site.parameter:
            return [name for name in site.names() if _named(self.parameters, name)]
        return [name for name in site.names() if self.has(name)]

    def rank_of(self, module: str) -> int:
        """The rank of the module's adapter."""
        return _by_pattern(self.ranks, self._in_file(module), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of the adapter's term."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alphas, self._in_file(module), self.alpha)
        return lora_scale(alpha, rank, rank_stabilised=self.rank_stabilised)

    def _in_file(self, module: str) -> str:
        """The name of a module in the checkpoint that the adapter was trained on."""
        return re.sub(r"^model\.", self.outer, module) if self.outer else module

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layer_names]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            match = re.match(pattern, module)
            if match:
                return int(match[1])
        return None


def read_peft(values: Mapping[str, Any]) -> PeftConfig:
    """The configuration that the contents of an `adapter_config.json` describe.

    **Raises:**

    `ValueError` if the adapter is not LoRA, or has settings that are not supported.
    """
    _check_kind(values)
    _check_built(values)
    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    _check_numbers("r", [rank, *(values.get("rank_pattern") or {}).values()], int)
    _check_numbers(
        "lora_alpha", [alpha, *(values.get("alpha_pattern") or {}).values()], int | float
    )
    dropout = values.get("lora_dropout") or 0.0
    check_kinds({"lora_dropout": dropout}, {"lora_dropout": RATE}, ADAPTER_CONFIG)
    targets, parameters = values.get("target_modules"), values.get("target_parameters")
    if not targets and not parameters:
        raise ValueError(
            "`target_modules` of the adapter's configuration must name the modules that have an "
            f"adapter; got {targets!r}."
        )
    layers = values.get("layers_to_transform")
    return PeftConfig(
        rank=rank,
        alpha=alpha,
        targets=_names(targets or ()),
        parameters=_listed(parameters or ()),
        rank_stabilised=bool(values.get("use_rslora")),
        dropout=dropout,
        dora=bool(values.get("use_dora")),
        modules=_listed(values.get("modules_to_save") or ()),
        tied=bool(values.get("ensure_weight_tying")),
        excluded=_names(values.get("exclude_modules") or ()),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()) or None,
        layer_names=_listed(values.get("layers_pattern") or ()),
        ranks=values.get("rank_pattern") or {},
        alphas=values.get("alpha_pattern") or {},
    )


def write_peft(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    parameters: Set[str],
    rank_stabilised: bool,
    dropout: float,
    dora: bool,
    modules: Sequence[str],
    tied: bool,
    transposed: bool,
    base: str | None,
    reward: bool = False,
) -> dict[str, Any]:
    """The contents of an `adapter_config.json` for adapters by modules' names or ends of names.

    `parameters` are the names among them that are of parameters rather than of modules; `reward`
    says whether they are of a reward model.
    """
    names = sorted(ranks)
    experts = [name for name in names if name in parameters]
    alphas = {
        name: _plain(scales[name] / lora_scale(1, ranks[name], rank_stabilised=rank_stabilised))
        for name in names
    }
    rank, alpha = ranks[names[0]], alphas[names[0]]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {n: ranks[n] for n in names if ranks[n] != rank},
        "alpha_pattern": {n: alphas[n] for n in names if alphas[n] != alpha},
        "target_modules": [name for name in names if name not in parameters],
        **({"target_parameters": experts} if experts else {}),
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "modules_to_save": [*modules, *(HEADS if reward else ())] or None,
        "ensure_weight_tying": tied,
        "use_rslora": rank_stabilised,
        "use_dora": dora,
    }


def _check_kind(values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"`peft_type` of the adapter's configuration must be `LORA`; got {kind!r}, which is "
            "not supported. If PEFT can merge the adapter into its base (`merge_and_unload`), "
            "load the result."
        )


def _check_built(values: Mapping[str, Any]) -> None:
    unknown = {key: values[key] for key in values.keys() - _READ - _WITHOUT_EFFECT if values[key]}
    if values.get("bias", "none") != "none":
        unknown["bias"] = values["bias"]
    if values.get("init_lora_weights") not in _STARTS:
        unknown["init_lora_weights"] = values["init_lora_weights"]
    if unknown:
        listed = ", ".join(f"`{key}` ({unknown[key]!r})" for key in sorted(unknown))
        raise ValueError(
            f"The adapter's configuration has settings that are not supported: {listed}. Merge the "
            "adapter into its base with PEFT, and load the result."
        )


def _check_numbers(key: str, numbers: list[Any], kind: Any) -> None:
    wrong = [x for x in numbers if isinstance(x, bool) or not isinstance(x, kind) or not x > 0]
    if wrong:
        raise ValueError(
            f"`{key}` of the adapter's configuration, and its pattern, must be positive numbers; "
            f"got {wrong[0]!r}."
        )


def _named(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    patterns = (name for name in values if re.match(rf"(.*\.)?({name})$", module))
    return values.get(next(patterns, ""), default)


def _names(names: str | Iterable[str]) -> tuple[str, ...] | str:
    return names if isinstance(names, str) else tuple(names)


def _listed(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _plain(number: float) -> float | int:
    # PEFT declares `lora_alpha` as an integer, which it mostly is.
    return round(number) if abs(number - round(number)) < 1e-9 else number
