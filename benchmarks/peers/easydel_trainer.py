"""EasyDeL's `DPOTrainer` on its own Llama, through its own loop; a hook reports each step.

Its tables of rotary angles are always in bfloat16, so its losses are close to those of other
systems but not equal.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import easydel
import jax
import jax.numpy as jnp
from datasets import Dataset

from benchmarks.peers.word_tokenizer import tokenizer_of
from benchmarks.problem import Problem, token_ids
from benchmarks.turns import Turns
from benchmarks.workers import given_problem

# More steps than any parent requests: the hook stops the trainer.
STEPS = 500


def dataset_of(problem: Problem) -> Dataset:
    """The pairs as token ids, repeated for all steps."""
    rows = {}
    for name, ids in token_ids(problem).items():
        rows[f"{name}_input_ids"] = ids.tolist() * STEPS
        rows[f"{name}_attention_mask"] = [[1] * ids.shape[1]] * (problem.pairs * STEPS)
    return Dataset.from_dict(rows)


def model_of(checkpoint: Path):
    """Its Llama with the weights of the checkpoint, all in float32."""
    # Otherwise attention is in bfloat16 for any `dtype`.
    attention = easydel.EasyDeLBaseConfigDict(attn_dtype=jnp.float32)
    return easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        str(checkpoint), dtype=jnp.float32, param_dtype=jnp.float32, config_kwargs=attention
    )


class Trainer(easydel.DPOTrainer):
    """Reports every step, and stops when no more steps are needed; all else is EasyDeL's."""

    turns: Turns

    def on_step_start(self, state, step):
        # Loading and setting up are over when the first step begins.
        if step == 0:
            self.turns.begin()
        return super().on_step_start(state, step)

    def on_step_end(self, state, metrics, step):
        state, metrics = super().on_step_end(state, metrics, step)
        jax.block_until_ready(state.graphstate)
        if not self.turns.step_done(float(metrics.loss)):
            raise KeyboardInterrupt
        return state, metrics


def main() -> None:
    turns = Turns(version=f"EasyDeL {version('easydel')}, JAX {jax.__version__}")
    problem, checkpoints = given_problem()
    if problem.precomputed:
        raise SystemExit("EasyDeL's precomputed reference is not set up here.")
    policy, reference = (model_of(checkpoints / name) for name in ("policy", "reference"))
    with tempfile.TemporaryDirectory() as folder:
        settings = easydel.DPOConfig(
            save_directory=folder,
            total_batch_size=problem.pairs,
            max_training_steps=STEPS,
            num_train_epochs=1,
            learning_rate=problem.learning_rate,
            optimizer=easydel.EasyDeLOptimizers.ADAMW,
            scheduler=easydel.EasyDeLSchedulers.NONE,
            weight_decay=problem.weight_decay,
            clip_grad=None,
            beta=problem.beta,
            max_length=problem.prompt + problem.completion,
            max_prompt_length=problem.prompt,
            max_completion_length=problem.completion,
            shuffle_train_dataset=False,
            do_last_save=False,
            use_wandb=False,
        )
        trainer = Trainer(
            arguments=settings,
            model=policy,
            reference_model=reference,
            processing_class=tokenizer_of(problem),
            train_dataset=dataset_of(problem),
        )
        trainer.turns = turns
        trainer.train()


if __name__ == "__main__":
    main()
