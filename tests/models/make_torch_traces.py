"""Twenty AdamW steps of DPO in a plain PyTorch loop through `transformers`; by hand.

    python -m tests.models.make_torch_traces  # with torch and transformers

It writes `tests/golden/models/torch_traces.json`, which `test_torch_traces.py` compares with our
step. Everything is in float64, and each sequence runs alone, without padding. The checkpoints are
those of `family_cases.py`: a dense one, a hybrid and a mixture.
"""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np

from .family_cases import weights_of
from .make_families import EAGER, FOLDER, read_golden, save, widen

FILE = FOLDER / "torch_traces.json"
CASES = ("olmo2", "qwen3-5-rest", "qwen3-moe-mixed")
STEPS, PAIRS, PROMPT, COMPLETION = 20, 3, 6, 8
BETA, LEARNING_RATE, WEIGHT_DECAY = 0.3, 1e-3, 0.05
NAMES = ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "grad_norm")


def rows(step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The ids of the prompts and of both completions of a step, right-padded, and their lengths."""
    rng = np.random.default_rng(step)
    widths = {"prompt": PROMPT, "chosen": COMPLETION, "rejected": COMPLETION}
    # Not 0, the padding: PyTorch's embedding has no gradient there.
    return {
        name: (rng.integers(1, 80, (PAIRS, width)), rng.integers(1, width + 1, PAIRS))
        for name, width in widths.items()
    }


def make() -> None:
    import torch

    widen(torch)
    FILE.write_text(json.dumps({name: trace(name) for name in CASES}, indent=1) + "\n")


def trace(name: str) -> dict[str, list[float]]:
    """What one case logs at each step, by the names of our metrics."""
    import torch

    policy = load(name)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps=1e-8
    )
    logged: dict[str, list[float]] = {name: [] for name in NAMES}
    for step in range(STEPS):
        batch = rows(step)
        chosen, rejected = (log_probs(policy, batch, side) for side in ("chosen", "rejected"))
        with torch.no_grad():
            before = [log_probs(reference, batch, side) for side in ("chosen", "rejected")]
        margins = BETA * ((chosen - before[0]) - (rejected - before[1]))
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        for key, value in zip(NAMES, (loss, chosen, rejected, margins, norm), strict=True):
            logged[key].append(float(value.mean()))
        optimizer.step()
    return logged


def load(name: str):
    """The checkpoint of a case, in float64."""
    import torch
    import transformers

    case = read_golden()[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case["config"]))
        weights = weights_of(case["shapes"], case["constants"])
        save({key: value.astype(np.float64) for key, value in weights.items()}, Path(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, **EAGER
        )
    return model.eval()


def log_probs(model, batch: dict[str, tuple[np.ndarray, np.ndarray]], side: str):
    """The summed log-probability of each pair's completion. Shape `(pairs,)`."""
    import torch

    sums = []
    for prompt, start, completion, count in zip(*batch["prompt"], *batch[side], strict=True):
        ids = torch.tensor(np.concatenate([prompt[:start], completion[:count]]))
        logits = model(ids[None], use_cache=False).logits[0, start - 1 : -1]
        found = torch.log_softmax(logits, dim=-1).gather(1, ids[start:, None])
        sums.append(found.sum())
    return torch.stack(sums)


if __name__ == "__main__":
    make()
