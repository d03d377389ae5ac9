"""DPO as a plain but good PyTorch loop.

It has fused attention, cross-entropy and AdamW. It unembeds completion rows only, uses all threads
and runs the reference under `no_grad`.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.large import Case
from benchmarks.problem import Problem, token_ids
from benchmarks.turns import Turns
from benchmarks.workers import given_problem


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, problem: Problem):
        super().__init__()
        width, self.heads = problem.width, problem.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (_linear(width, width) for _ in "qkvo")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, width = x.shape
        query, key, value = (
            project(x).view(rows, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, width))


class FeedForward(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, problem: Problem):
        super().__init__()
        width, inner = problem.width, problem.feed_forward
        self.gate_proj, self.up_proj = _linear(width, inner), _linear(width, inner)
        self.down_proj = _linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward around the residual stream."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(problem.width, problem.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(problem.width, problem.norm_eps)
        self.self_attn, self.mlp = Attention(problem), FeedForward(problem)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Everything below the unembedding."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.embed_tokens = nn.Embedding(problem.vocab, problem.width)
        self.layers = nn.ModuleList(Layer(problem) for _ in range(problem.layers))
        self.norm = nn.RMSNorm(problem.width, problem.norm_eps)
        half = problem.width // problem.heads // 2
        frequencies = problem.theta ** (-torch.arange(half, dtype=torch.float32) / half)
        positions = torch.arange(problem.prompt + problem.completion, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.norm(x)


class Llama(nn.Module):
    """A decoder with Hugging Face's names, which returns log-probabilities."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.model = Body(problem)
        self.lm_head = _linear(problem.width, problem.vocab)

    def forward(self, ids: Tensor, prompt: int) -> Tensor:
        """The summed log-probability of each row's completion."""
        hidden = self.model(ids)[:, prompt - 1 : -1]
        logits = self.lm_head(hidden.reshape(-1, hidden.shape[-1]))
        negative = functional.cross_entropy(logits, ids[:, prompt:].reshape(-1), reduction="none")
        return -negative.view(len(ids), -1).sum(1)


def _linear(width: int, out: int) -> nn.Linear:
    return nn.Linear(width, out, bias=False)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rows_of(problem: Problem) -> Tensor:
    """The chosen sequences, then the rejected sequences."""
    ids = {name: torch.from_numpy(rows).long() for name, rows in token_ids(problem).items()}
    return torch.cat([torch.cat([ids["prompt"], ids[n]], 1) for n in ("chosen", "rejected")])


def training(
    problem: Problem | Case,
    policy: nn.Module,
    reference: nn.Module,
    rows: Tensor,
    autocast: Callable,
) -> Callable[[], Tensor]:
    """A function that takes one step, updating `policy` in place, and returns the loss.

    **Arguments:**

    - `policy`, `reference`: functions from rows and the prompt's length to log-probabilities.
    - `rows`: the chosen rows, then the rejected rows.
    - `autocast`: makes the context in which both models run.
    """
    optimizer = torch.optim.AdamW(
        policy.parameters(), problem.learning_rate, weight_decay=problem.weight_decay, fused=True
    )

    def refer() -> Tensor:
        with torch.no_grad(), autocast():
            return reference(rows, problem.prompt)

    precomputed = refer() if problem.precomputed else None

    def step() -> Tensor:
        expected = refer() if precomputed is None else precomputed
        with autocast():
            ratios = policy(rows, problem.prompt) - expected
        chosen, rejected = ratios.chunk(2)
        loss = -functional.logsigmoid(problem.beta * (chosen - rejected)).mean()
        # Freed rather than zeroed: saves a pass over the gradient.
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main() -> None:
    from safetensors.torch import load_file

    turns = Turns(version=f"PyTorch {torch.__version__}")
    torch.set_num_threads(os.cpu_count() or 1)
    problem, folder = given_problem()
    policy, reference = Llama(problem), Llama(problem)
    for name, model in (("policy", policy), ("reference", reference)):
        model.load_state_dict(load_file(folder / name / "model.safetensors"))
    reference.requires_grad_(False)
    step = training(problem, policy, reference, rows_of(problem), nullcontext)
    turns.begin()
    while turns.step_done(float(step())):
        pass


if __name__ == "__main__":
    main()
