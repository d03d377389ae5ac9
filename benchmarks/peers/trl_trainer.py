"""TRL's `DPOTrainer` at its defaults, in float32, on text of a tokenizer made on the spot.

Its own loop trains; a callback tells of each step. Left at their defaults are the metrics of each
step and the rest of the trainer; off are logging to disk, checkpoints and gradient clipping, which
the other systems do not do.
"""

import tempfile

import torch
import trl
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback

from benchmarks.peers.word_tokenizer import tokenizer_of, word
from benchmarks.problem import Problem, token_ids
from benchmarks.turns import Turns
from benchmarks.workers import given_problem

# More than anybody asks for: the trainer is stopped by the callback.
STEPS = 100_000


def dataset_of(problem: Problem) -> Dataset:
    """The pairs as text."""
    ids = token_ids(problem)
    text = {name: [" " + " ".join(map(word, row)) for row in ids[name]] for name in ids}
    return Dataset.from_dict(text)


class Report(TrainerCallback):
    """Tells of every step, and stops the trainer when no more are wanted."""

    def __init__(self, turns: Turns):
        self.turns, self.loss = turns, float("nan")

    def on_train_begin(self, args, state, control, **_):
        self.turns.begin()

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = not self.turns.step_done(self.loss)


class Trainer(trl.DPOTrainer):
    """Remembers the loss of each step for the report; everything else is the trainer's own."""

    report: Report

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.report.loss = float(loss)
        return loss


def main() -> None:
    turns = Turns(version=f"TRL {trl.__version__}, PyTorch {torch.__version__}")
    problem, checkpoints = given_problem()
    report = Report(turns)
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=problem.pairs,
            max_steps=STEPS,
            learning_rate=problem.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=problem.weight_decay,
            max_grad_norm=0.0,
            beta=problem.beta,
            max_length=None,
            precompute_ref_log_probs=problem.precomputed,
            # Recomputing layers saves no memory worth having at this size, and takes time.
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=LlamaForCausalLM.from_pretrained(checkpoints / "policy", dtype=torch.float32),
            ref_model=LlamaForCausalLM.from_pretrained(
                checkpoints / "reference", dtype=torch.float32
            ),
            args=settings,
            train_dataset=dataset_of(problem),
            processing_class=tokenizer_of(problem),
            callbacks=[report],
        )
        trainer.report = report
        trainer.train()


if __name__ == "__main__":
    main()
