"""The part `full` of `benchmarks.models` in PyTorch, with the decoder of `transformers`."""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.large import Case
from benchmarks.models import COMPLETION, PAIRS, PROMPT, STEPS, pair_ids
from benchmarks.peers.large_torch import Scorer
from benchmarks.peers.torch_loop import training
from benchmarks.turns import resident


def main(folder: Path) -> None:
    # The shape is that of the checkpoint.
    case = Case(shape="", pairs=PAIRS, prompt=PROMPT, completion=COMPLETION, remat=True)
    settings = {"attn_implementation": "sdpa", "dtype": torch.float32}
    started = time.perf_counter()
    policy, reference = (
        Scorer(AutoModelForCausalLM.from_pretrained(folder, **settings), remat=case.remat)
        for _ in "pr"
    )
    measured = {
        "load": (time.perf_counter() - started) / 2,
        "peak after loading": resident("VmHWM"),
    }
    policy.train()
    reference.eval().requires_grad_(False)
    prompt, chosen, rejected = (torch.from_numpy(ids).long() for ids in pair_ids())
    rows = torch.cat([torch.cat([prompt, side], 1) for side in (chosen, rejected)])
    step = training(case, policy, reference, rows, nullcontext)
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        measured["loss at the end"] = float(step())
        times.append(time.perf_counter() - started)
    print(json.dumps({**measured, "step": min(times), "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
