"""Makes the golden logits of `family_cases.py` by `transformers`, and loads what we saved; by hand.

    python -m tests.models.make_families make families [NAME ...]  # with torch and transformers
    python -m tests.models.make_families make hybrids              # or options
    python -m tests.models.make_families defaults                  # or activations
    python -m tests.models.make_families ours FOLDER               # with dpo_eqx
    python -m tests.models.make_families back FOLDER               # with torch and transformers

`make` writes `tests/golden/models/families.json.gz`, or `hybrids.json.gz` for layers of two kinds,
or `options.json.gz`, or only the named cases in it. `defaults` writes the classes and the default
configuration of each family, and `activations` the values of each activation. `ours` saves each
checkpoint again, and `back` checks that `transformers` loads it with the same bits and no
complaint. `transformers` computes norms, rotary tables and delta rules in float32 for any weights.
Here float32 stands for float64, so the logits are exact to 1e-12.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np

from .family_cases import CASES, GROUPS, IDS, OLDER, POSITIONS, TOKENS, settings_of, weights_of

FOLDER = Path(__file__).parents[1] / "golden" / "models"
# PyTorch's grouped products have no float64.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def make(group: str, *names: str) -> None:
    import torch

    widen(torch)
    import transformers

    cases = {name: case for name, case in read_golden().items() if name in GROUPS[group]}
    cases = cases if names else {}
    for name in names or GROUPS[group]:
        family, settings = settings_of(name)
        config = transformers.AutoConfig.for_model(family, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
        cases[name] = one_case(model.double().eval())
        print(name, flush=True)
    write_golden(group, cases)


def defaults() -> None:
    import transformers

    names = sorted({*OLDER, *(family for family, _ in CASES.values())})
    auto = transformers.models.auto.modeling_auto
    values = {
        name: {
            "config": transformers.AutoConfig.for_model(name).to_dict(),
            "architecture": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name],
            "classifier": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(name),
        }
        for name in names
    }
    write_golden("defaults", values)


def activations() -> None:
    import torch

    widen(torch)
    import transformers

    from .option_cases import ACTIVATIONS

    x = [-30.0, -11.0, -4.0, -1.3, -0.2, 0.0, 0.1, 0.8, 1.0, 2.5, 7.0, 12.0]
    values = {
        name: transformers.activations.ACT2FN[name](torch.tensor(x)).tolist()
        for name in ACTIVATIONS
    }
    text = json.dumps({"x": x, "values": values}, indent=1, sort_keys=True)
    (FOLDER / "activations.json").write_text(text + "\n")


def write_golden(name: str, values: dict) -> None:
    text = json.dumps(values, indent=1, sort_keys=True)
    (FOLDER / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def widen(torch) -> None:
    """Makes float32 stand for float64, in every place where `transformers` narrows."""
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)


def one_case(model) -> dict:
    """The configuration, the tensors and the logits of a model with our random weights."""
    import tempfile

    import torch
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        stored = load_file(Path(folder) / "model.safetensors")
        shapes = {key: list(value.shape) for key, value in stored.items()}
        constants = {key: float(value) for key, value in stored.items() if value.shape == ()}
        # As float64, since float32 is not what it says here.
        weights = weights_of(shapes, constants)
        save({key: value.astype(np.float64) for key, value in weights.items()}, Path(folder))
        loaded = type(model).from_pretrained(folder, dtype=torch.float64, **EAGER)
    with torch.no_grad():
        logits = logits_of(loaded)
    scale = float(np.abs(logits).max())
    shown = logits[:, POSITIONS, TOKENS].tolist()
    config = {key: value for key, value in config.items() if key not in ("dtype", "architectures")}
    return {
        "config": config,
        "shapes": shapes,
        "constants": constants,
        "logits": shown,
        "scale": scale,
    }


def logits_of(model) -> np.ndarray:
    import torch

    # `transformers` has no cache for a model without attention.
    return model.eval()(torch.tensor(IDS), use_cache=False).logits.numpy()


def save(weights: dict[str, np.ndarray], folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def read_golden() -> dict:
    """The golden cases by name."""
    files = ((FOLDER / f"{group}.json.gz").read_bytes() for group in GROUPS)
    groups = (json.loads(gzip.decompress(file)) for file in files)
    return {name: case for group in groups for name, case in group.items()}


def read_defaults() -> dict:
    """The classes and the default configuration of `transformers` by family."""
    return json.loads(gzip.decompress((FOLDER / "defaults.json.gz").read_bytes()))


def write_checkpoint(case: dict, folder: Path) -> Path:
    """Writes the checkpoint of a golden case."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case["config"]))
    save(weights_of(case["shapes"], case["constants"]), folder)
    return folder


def ours(folder: Path) -> None:
    from dpo_eqx import models

    for name, case in read_golden().items():
        path = write_checkpoint(case, folder / name)
        models.save(models.load(path), folder / "back" / name)


def back(folder: Path) -> None:
    import torch
    import transformers

    for name, case in read_golden().items():
        first, again = (
            transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
            for path in (folder / name, folder / "back" / name)
        )
        assert type(first[0]) is type(again[0]), name
        assert not any(again[1].values()), (name, again[1])
        states = first[0].state_dict(), again[0].state_dict()
        assert states[0].keys() == states[1].keys(), name
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
        with torch.no_grad():
            logits = [logits_of(model) for model, _ in (first, again)]
        apart = float(np.abs(logits[0] - logits[1]).max()) / case["scale"]
        assert apart < 2e-6, (name, apart)
        print(f"{name:28} the same weights, logits apart by {apart:.1e}", flush=True)


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    if task in ("make", "defaults", "activations"):
        {"make": make, "defaults": defaults, "activations": activations}[task](*arguments)
    else:
        {"ours": ours, "back": back}[task](*map(Path, arguments))
