"""Levanter's DPO loss on its own Llama, through its `Trainer.train_step`.

Its command also reads and packs conversations, which is left out here. Layers are not recomputed,
unlike its default.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from haliax.state_dict import from_torch_compatible_state_dict
from levanter.checkpoint import CheckpointerConfig
from levanter.data.text import DpoExample
from levanter.dpo import DpoModel, dpo_loss
from levanter.layers.rotary import DefaultRotaryEmbeddingsConfig
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from levanter.models.lm_model import LmExample
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig
from levanter.utils.tree_utils import inference_mode
from safetensors.numpy import load_file

from benchmarks.problem import Problem, token_ids
from benchmarks.turns import Turns
from benchmarks.workers import given_problem


def config_of(problem: Problem) -> LlamaConfig:
    """The configuration of the shape."""
    return LlamaConfig(
        max_seq_len=problem.prompt + problem.completion,
        hidden_dim=problem.width,
        intermediate_dim=problem.feed_forward,
        num_layers=problem.layers,
        num_heads=problem.heads,
        num_kv_heads=problem.heads,
        layer_norm_epsilon=problem.norm_eps,
        gradient_checkpointing=False,
        rope=DefaultRotaryEmbeddingsConfig(theta=problem.theta),
    )


def model_of(problem: Problem, checkpoint: Path) -> LlamaLMHeadModel:
    """Its Llama with the weights of the checkpoint."""
    vocab = hax.Axis("vocab", problem.vocab)
    model = LlamaLMHeadModel.init(vocab, config_of(problem), key=jax.random.key(0))
    tensors = load_file(checkpoint / "model.safetensors")
    return from_torch_compatible_state_dict(model, jax.tree.map(jnp.asarray, tensors))


def batch_of(problem: Problem, trainer: Trainer) -> DpoExample:
    """The pairs in the format of its loader."""
    ids, position = token_ids(problem), config_of(problem).max_Pos

    def example(name: str) -> LmExample:
        rows = np.concatenate([ids["prompt"], ids[name]], axis=1)
        tokens = hax.named(jnp.asarray(rows), (trainer.TrainBatch, position))
        weight = LmExample.causal_loss_mask(position, prompt_length=problem.prompt)
        weight = hax.broadcast_axis(weight.astype(jnp.float32), trainer.TrainBatch)
        return LmExample(tokens=tokens, loss_weight=weight)

    return DpoExample(chosen=example("chosen"), rejected=example("rejected"))


def trainer_config(problem: Problem, folder: Path) -> TrainerConfig:
    """A configuration in float32, without logging or saving."""
    return TrainerConfig(
        tracker=NoopConfig(),
        log_jaxprs=False,
        log_xla_hlo=False,
        log_dir=folder,
        train_batch_size=problem.pairs,
        checkpointer=CheckpointerConfig(base_path=str(folder)),
        load_checkpoint=False,
        require_accelerator=False,
    )


def main() -> None:
    turns = Turns(version=f"Levanter {version('marin-levanter')}, JAX {jax.__version__}")
    problem, checkpoints = given_problem()
    if problem.precomputed:
        raise SystemExit("Levanter takes a precomputed reference for evaluation only.")

    def loss(model: DpoModel, example: DpoExample, *, key=None):
        reference = inference_mode(model.reference, True)
        return dpo_loss(model.policy, reference, example, beta=problem.beta)

    # The same optimiser as in every system, not Levanter's, whose defaults differ.
    optimizer = optax.adamw(problem.learning_rate, weight_decay=problem.weight_decay)
    with tempfile.TemporaryDirectory() as folder:
        config = trainer_config(problem, Path(folder))
        config.initialize()
        with Trainer(config, optimizer, loss, add_default_hooks=False) as trainer:
            both = (model_of(problem, checkpoints / name) for name in ("policy", "reference"))
            model = DpoModel(*both)
            trainable = DpoModel(policy=True, reference=False)
            key = jax.random.PRNGKey(0)
            state = trainer.initial_state(key, model=model, is_trainable=trainable)
            del model
            batch, going_on = batch_of(problem, trainer), True
            turns.begin()
            while going_on:
                info = trainer.train_step(state, batch)
                state, going_on = info.state, turns.step_done(info.loss)


if __name__ == "__main__":
    main()
