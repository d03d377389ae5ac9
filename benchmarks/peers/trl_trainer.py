"""TRL's `DPOTrainer` at its defaults, in float32, on text for a word tokenizer made here.

Its own loop trains, and a callback reports each step. The metrics of each step and the rest of the
trainer have their defaults. Logging to disk, checkpoints and gradient clipping are off, since the
other systems do not do these.
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

# More steps than any parent requests: the callback stops the trainer.
STEPS = 100_000


def dataset_of(problem: Problem) -> Dataset:
    """The pairs as text."""
    ids = token_ids(problem)
    text = {name: [" " + " ".join(map(word, row)) for row in ids[name]] for name in ids}
    return Dataset.from_dict(text)


class Report(TrainerCallback):
    """Reports every step, and stops the trainer when no more steps are needed."""

    def __init__(self, turns: Turns):
        self.turns, self.loss = turns, float("nan")

    def on_train_begin(self, args, state, control, **_):
        self.turns.begin()

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = not self.turns.step_done(self.loss)


class Trainer(trl.DPOTrainer):
    """Stores the loss of each step for the report; all else is TRL's."""

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
            # Recomputing layers takes time, and saves no significant memory at this size.
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
