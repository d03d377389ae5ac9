"""Many options of each family against `transformers`; by hand, since it takes an hour.

    python -m tests.models.sweep_options make FOLDER [FAMILY ...]  # with torch and transformers
    python -m tests.models.sweep_options ours FOLDER [FAMILY ...]  # with dpo_eqx
    python -m tests.models.sweep_options back FOLDER [FAMILY ...]  # with torch and transformers

`make` writes a checkpoint for each case of `option_cases.py`, with a `config.json` as it stands
there and another as `transformers` saves it, and the logits in float64. `ours` loads both, compares
the logits, and saves the policy. `back` compares the logits of what was saved. It lists every case
that `transformers` runs and that is refused here, or that differs by more than 1e-9 of the largest
logit. `family_cases.py` has the cases whose logits are golden values.
"""

import json
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np

from .family_cases import IDS, weights_of
from .make_families import EAGER, logits_of, save, widen
from .option_cases import cases


def chosen(families: list[str]):
    return [case for case in cases() if not families or case[0].split("/")[0] in families]


def make(folder: Path, families: list[str]) -> None:
    import torch

    widen(torch)
    import transformers

    _quiet(transformers)
    for name, keys in chosen(families):
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(keys))
        try:
            logits = np.asarray(one_case(transformers, path))
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{name:40} transformers refuses: {text:.100}", flush=True)
            continue
        np.save(path / "logits.npy", logits)
    print("done", flush=True)


def one_case(transformers, path: Path) -> np.ndarray:
    """Writes the weights and the other `config.json` of a case, and returns its logits."""
    import torch
    from safetensors.numpy import load_file

    config = transformers.AutoConfig.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
    model.double().save_pretrained(path / "again")
    stored = load_file(path / "again" / "model.safetensors")
    shapes = {key: list(value.shape) for key, value in stored.items()}
    constants = {key: float(value) for key, value in stored.items() if value.shape == ()}
    weights = weights_of(shapes, constants)
    for place in (path, path / "again"):
        save({key: value.astype(np.float64) for key, value in weights.items()}, place)
    logits = []
    for place in (path, path / "again"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float64, **EAGER
        )
        with torch.no_grad():
            logits.append(logits_of(model))
    if not np.array_equal(*logits):
        print(f"{path}: transformers computes something else after saving", flush=True)
        np.save(path / "again" / "logits.npy", logits[1])
    return logits[0]


def ours(folder: Path, families: list[str]) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    seen: dict[str, dict] = {}
    counts = {"same": 0, "wrong": 0, "refused": 0, "not comparable": 0}
    for name, _ in chosen(families):
        if not (folder / name / "logits.npy").exists():
            counts["not comparable"] += 1
            continue
        family = name.split("/")[0]
        for result in results(folder / name, seen.setdefault(family, {})):
            counts[result[0]] += 1
            if result[0] != "same":
                print(f"{name:40} {result[0]}: {result[1]}", flush=True)
    print(counts, flush=True)


def results(path: Path, seen: dict):
    """What became of a checkpoint with each of its two configurations.

    `seen` has the logits by configuration, since these decide the weights of a family's cases.
    """
    import jax
    import jax.numpy as jnp

    from dpo_eqx import models

    for place in (path, path / "again"):
        want = np.load((place if (place / "logits.npy").exists() else path) / "logits.npy")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                policy = models.load(place, dtype=jnp.float64)
            if policy.config not in seen:
                seen[policy.config] = np.asarray(jax.jit(jax.vmap(policy))(IDS))
            models.save(policy, path / "back")
            apart = float(np.abs(seen[policy.config] - want).max() / np.abs(want).max())
            yield ("same" if apart < 1e-9 else "wrong", f"{place.name}: {apart:.1e}")
        except Exception as error:
            text = str(error) or traceback.format_exc()
            yield "refused", f"{place.name}: {text[:300]}"


def _quiet(transformers) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def back(folder: Path, families: list[str]) -> None:
    import torch

    widen(torch)
    import transformers

    _quiet(transformers)
    counts = {"saved": 0, "wrong": 0}
    for name, _ in chosen(families):
        path = folder / name / "back"
        if not path.exists():
            continue
        want = np.load(folder / name / "logits.npy")
        counts["saved"] += 1
        try:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float64, output_loading_info=True, **EAGER
            )
            with torch.no_grad():
                apart = float(np.abs(logits_of(model) - want).max() / np.abs(want).max())
        except Exception as error:
            apart, loading = np.inf, {"error": str(error)[:300]}
        if any(loading.values()) or not apart < 1e-9:
            counts["wrong"] += 1
            print(f"{name:40} saved: {apart:.1e}, {loading}", flush=True)
    print(counts, flush=True)


if __name__ == "__main__":
    task, place, *families = sys.argv[1:]
    {"make": make, "ours": ours, "back": back}[task](Path(place), families)
