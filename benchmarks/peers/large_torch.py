"""PyTorch at the shape of a real model: the decoder of `transformers`, the loop of `torch_loop`."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.large import SHAPES, Case, rows_of
from benchmarks.peers.torch_loop import training
from benchmarks.turns import Turns
from benchmarks.workers import given


class Scorer(nn.Module):
    """A decoder of `transformers` that unembeds only completions and returns log-probabilities."""

    def __init__(self, decoder: nn.Module, *, remat: bool):
        super().__init__()
        self.decoder = decoder
        if remat:
            self.decoder.gradient_checkpointing_enable()

    def forward(self, rows: Tensor, prompt: int) -> Tensor:
        """The summed log-probability of each row's completion."""
        hidden = self.decoder.model(rows, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
        logits = self.decoder.lm_head(hidden.flatten(0, 1)).float()
        negative = functional.cross_entropy(logits, rows[:, prompt:].reshape(-1), reduction="none")
        return -negative.view(len(rows), -1).sum(1)


def random_scorer(case: Case, device: torch.device) -> Scorer:
    """A decoder of this shape with random weights, fused attention, in float32."""
    shape = dict(SHAPES[case.shape])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with device:
        decoder = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32
        )
    return Scorer(decoder, remat=case.remat)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def device_peak() -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0

    turns = Turns(version=f"PyTorch {torch.__version__}", device_peak=device_peak)
    case, _ = given(Case)
    torch.manual_seed(0)
    policy, reference = random_scorer(case, device), random_scorer(case, device)
    reference.load_state_dict(policy.state_dict())
    policy.train()
    reference.eval().requires_grad_(False)
    rows = torch.from_numpy(rows_of(case)).long().to(device)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16)

    step = training(case, policy, reference, rows, autocast)
    turns.begin()
    while turns.step_done(float(step())):
        pass


if __name__ == "__main__":
    main()
