"""Tunix's `DPOTrainer` on its own Llama, through its own loop; a hook reports each step."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.llama3 import model as llama, params
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

from benchmarks.problem import Problem, token_ids
from benchmarks.turns import Turns
from benchmarks.workers import given_problem


def model_of(problem: Problem, checkpoint: Path) -> llama.Llama3:
    """Its Llama with the weights of the checkpoint."""
    config = llama.ModelConfig(
        num_layers=problem.layers,
        vocab_size=problem.vocab,
        embed_dim=problem.width,
        hidden_dim=problem.feed_forward,
        num_heads=problem.heads,
        head_dim=problem.width // problem.heads,
        num_kv_heads=problem.heads,
        rope_theta=int(problem.theta),
        norm_eps=problem.norm_eps,
    )
    return params.create_model_from_safe_tensors(str(checkpoint), config, dtype=jnp.float32)


class Trainer(DPOTrainer):
    """Reports every step; all else is Tunix's."""

    turns: Turns
    going_on: bool = True

    def _post_process_train_step(self, aux: Any) -> None:
        super()._post_process_train_step(aux)
        assert self._buffered_train_metrics is not None
        # A step counts only when its results exist, not when it was dispatched.
        jax.block_until_ready(aux)
        self.going_on = self.turns.step_done(float(self._buffered_train_metrics.loss))

    def batches(self, problem: Problem) -> Iterator[TrainingInput]:
        """The same batch for as long as steps are needed."""
        ids = token_ids(problem)
        masks = {name: np.ones(rows.shape, np.int32) for name, rows in ids.items()}
        fields = {f"{name}_ids": ids[name] for name in ids}
        fields |= {f"{name}_mask": masks[name] for name in ids}
        while self.going_on:
            yield TrainingInput(**fields)


def main() -> None:
    turns = Turns(version=f"Tunix {version('google-tunix')}, JAX {jax.__version__}")
    problem, folder = given_problem()
    if problem.precomputed:
        raise SystemExit("Tunix's DPOTrainer does not take a precomputed reference.")
    trainer = Trainer(
        model=model_of(problem, folder / "policy"),
        ref_model=model_of(problem, folder / "reference"),
        optimizer=optax.adamw(problem.learning_rate, weight_decay=problem.weight_decay),
        training_config=DPOTrainingConfig(
            eval_every_n_steps=10**9, beta=problem.beta, max_inflight_computations=1
        ),
    )
    trainer.turns = turns
    turns.begin()
    trainer.train(trainer.batches(problem))


if __name__ == "__main__":
    main()
