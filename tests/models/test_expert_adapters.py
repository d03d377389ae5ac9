"""Adapters and quantised weights of experts and routers, against NumPy, PEFT and dense weights."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx.models._checkpoint.folder import ADAPTER, ADAPTER_CONFIG

from ..policies import assert_close
from .family_cases import IDS
from .golden import FOLDER, call, ragged_batch, same, shaken
from .make_families import read_golden, write_checkpoint
from .test_experts import CLIPPED, MIXTURE, POLICY

PEFT = FOLDER / "peft_experts"
KEY = jax.random.key(0)


def with_sums(policy):
    """The policy without adapters, whose weights have their sums, computed by NumPy."""

    def plain(node):
        if not isinstance(node, models.LoRA):
            return node
        *lead, rank, width = node.down.shape
        down = np.asarray(node.down).reshape(-1, rank, width)
        up = np.asarray(node.up).reshape(len(down), -1, rank)
        terms = [node.scale * b @ a for a, b in zip(down, up, strict=True)]
        weight = np.asarray(node.base.weight) + np.reshape(terms, (*lead, -1, width))
        return eqx.tree_at(lambda layer: layer.weight, node.base, jnp.asarray(weight))

    return jax.tree.map(plain, policy, is_leaf=lambda node: isinstance(node, models.LoRA))


def test_each_expert_and_the_router_has_its_own_adapter():
    adapted = shaken(models.add_lora(POLICY, rank=2, target="feed_forward", key=KEY))
    assert adapted.layers.feed_forward.gate.down.shape == (2, 5, 2, 16)
    assert adapted.layers.feed_forward.router.up.shape == (2, 5, 2)
    ids = jnp.arange(9)
    got, want = call(adapted, ids), call(with_sums(adapted), ids)
    assert_close(got, np.asarray(want), 1e-12)
    assert_close(call(models.merge_lora(adapted), ids), np.asarray(want), 1e-12)
    assert np.abs(want - call(POLICY, ids)).max() > 0.1


def test_adapters_are_for_attention_by_default():
    adapted = models.add_lora(POLICY, rank=2, dropout=0.1, key=KEY)
    assert isinstance(adapted.layers.attention.query, models.LoRA)
    assert eqx.tree_equal(adapted.layers.feed_forward, POLICY.layers.feed_forward)
    for settings in ({"dropout": 0.1}, {"dora": True}):
        for target in ("feed_forward.router", "feed_forward.down"):
            with pytest.raises(ValueError, match=f"neither `dropout` nor .*'layers.{target}'"):
                models.add_lora(POLICY, rank=2, target=target, key=KEY, **settings)


@pytest.mark.parametrize(
    "name",
    [
        "experts",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("experts-interleaved", "experts-and-router", "experts-and-dense")
        ),
    ],
)
def test_logits_are_those_of_peft(name, tmp_path):
    """PEFT 0.21 wrote them, see `compare_peft.py`."""
    config = json.loads((PEFT / name / ADAPTER_CONFIG).read_text())
    case = read_golden()[config["base_model_name_or_path"]]
    base, ids = models.load(write_checkpoint(case, tmp_path / "base")), IDS[0, :12]
    loaded = models.load_lora(base, PEFT / name)
    want = np.load(PEFT / name / "logits.npy")
    assert np.abs(call(loaded, ids) - want).max() < 1e-4
    assert np.abs(call(base, ids) - want).max() > 0.5
    models.save_lora(loaded, tmp_path / "again")
    assert same(models.load_lora(base, tmp_path / "again"), loaded)
    stored = load_file(PEFT / name / ADAPTER).items()
    again = load_file(tmp_path / "again" / ADAPTER)
    assert {key: x.shape for key, x in stored} == {key: x.shape for key, x in again.items()}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model on a mixture of experts, with the adapter and the head that PEFT wrote."""
    base = write_checkpoint(read_golden()["mixtral"], tmp_path_factory.mktemp("reward") / "base")
    return models.load_lora(models.load(base), FOLDER / "peft_reward" / "mixtral")


@pytest.mark.slow
def test_reward_models_on_experts_are_those_of_peft(reward_model, tmp_path):
    """PEFT 0.21 wrote it, see `compare_peft.py`."""
    source = FOLDER / "peft_reward" / "mixtral"
    assert isinstance(reward_model, models.RewardModel)
    assert isinstance(reward_model.body.layers.feed_forward.gate, models.LoRA)
    want = np.load(source / "logits.npy")[0]
    # Float32 rounds to 1e-6: the reward, 0.1, is a sum of much larger terms.
    assert abs(call(reward_model, IDS[0, :12]) - want) < 5e-6
    assert abs(call(models.without_lora(reward_model), IDS[0, :12]) - want) > 0.01
    models.save_lora(reward_model, tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["task_type"] == "SEQ_CLS"
    shapes = [{k: x.shape for k, x in load_file(p / ADAPTER).items()} for p in (source, tmp_path)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_reward_models_on_experts_learn_and_are_saved(reward_model, standard_promotion, tmp_path):
    batch, optimizer = ragged_batch(0, vocab=80), optax.adam(1e-2)
    trainable = models.lora_filter(reward_model)
    step = eqx.filter_jit(
        dpx.make_step(
            losses.bradley_terry, optimizer, score=models.score_rewards, trainable=trainable
        )
    )
    model, seen = reward_model, []
    opt_state = optimizer.init(eqx.filter(model, trainable))
    for _ in range(4):
        model, opt_state, metrics = step(model, opt_state, batch)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.5 * seen[0]
    experts, before = (x.body.layers.feed_forward for x in (model, reward_model))
    assert not np.array_equal(experts.down.up, before.down.up)
    assert np.array_equal(experts.down.base.weight, before.down.base.weight)
    base = models.RewardModel(models.without_lora(reward_model).body, key=KEY)
    models.save_lora(model, tmp_path / "adapter")
    again = models.load_lora(base, tmp_path / "adapter")
    assert same(*(eqx.filter(x, models.lora_filter(x)) for x in (again, model)))
    models.save(models.merge_lora(model), tmp_path / "merged")
    merged = models.load(tmp_path / "merged")
    got, want = (models.score_rewards(x, batch) for x in (merged, model))
    assert_close(got.chosen, np.asarray(want.chosen), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_adapters_from_before_transformers_5(family, tmp_path):
    """Routers and experts were modules then, and could have dropout, which is left out."""
    config = dataclasses.replace(MIXTURE, family=family, query_key_norm=family == "olmoe")
    base = models.Transformer(config, key=KEY)
    policy = shaken(models.add_lora(base, rank=2, alpha=2, target="feed_forward|query", key=KEY))
    older = {"olmoe": "mlp.{}", "mixtral": "block_sparse_moe.{}"}[family]
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    names = names if family == "olmoe" else {"gate": "w1", "up": "w3", "down": "w2"}
    tensors = {}

    def put(name, down, up):
        name = f"base_model.model.model.layers.{name}"
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(down)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(up)

    block, query = policy.layers.feed_forward, policy.layers.attention.query
    for layer in range(2):
        put(f"{layer}.self_attn.q_proj", query.down[layer], query.up[layer])
        router = f"{layer}.{older.format('gate')}"
        put(router, block.router.down[layer], block.router.up[layer])
        for part, expert in [(part, expert) for part in names for expert in range(5)]:
            lora = getattr(block, part)
            name = f"{layer}.{older.format('experts')}.{expert}.{names[part]}"
            put(name, lora.down[layer, expert], lora.up[layer, expert])
    save_file(tensors, tmp_path / ADAPTER)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "lora_dropout": 0.1}
    values["target_modules"] = ["q_proj", "gate", *names.values()]
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(values))
    loaded = models.load_lora(base, tmp_path)
    assert loaded.layers.attention.query.dropout == 0.1
    assert same(models.load_lora(base, tmp_path, dropout=0.0), policy)


def test_tensors_of_unknown_parameters_are_named(tmp_path):
    base = models.Transformer(dataclasses.replace(CLIPPED, family="gpt_oss"), key=KEY)
    models.save_lora(models.add_lora(base, rank=2, target="forward.gate", key=KEY), tmp_path)
    values = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert values["target_parameters"] == ["mlp.experts.gate_up_proj"]
    values["target_parameters"] = ["mlp.experts.down_proj"]
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"mis-shaped.*mlp\.experts\.lora_B.*|is of rank"):
        models.load_lora(base, tmp_path)
    values["target_parameters"] = ["mlp.nothing"]
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"nor do `target_parameters`, \('mlp.nothing',\), so it is of another"
    ):
        models.load_lora(base, tmp_path)


@pytest.mark.parametrize("form", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_experts_are_quantised_matrix_by_matrix(form):
    """And routers are not."""
    policy = models.quantize(POLICY, form)
    block, before = policy.layers.feed_forward, POLICY.layers.feed_forward
    assert same(block.router, before.router)
    alone = eqx.nn.Linear(16, 12, dtype=jnp.float64, key=KEY)
    for layer, expert in ((0, 3), (1, 0)):
        alone = eqx.tree_at(lambda x: x.weight, alone, before.gate.weight[layer, expert])
        want = models.quantize(alone, form).weight
        assert np.array_equal(block.gate.weight[layer, expert], want)
    ids = jnp.arange(9)
    decoded = models.merge_lora(policy)
    assert_close(call(policy, ids), np.asarray(call(decoded, ids)), 1e-12)
    adapted = models.add_lora(policy, rank=2, target="feed_forward", key=KEY)
    assert np.array_equal(call(adapted, ids), call(policy, ids))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_quantised_on_reading(form, tmp_path):
    policy = models.load(write_checkpoint(read_golden()["mixtral"], tmp_path / "base"))
    models.save(policy, tmp_path / "saved")
    loaded = models.load(tmp_path / "saved", quantize=form)
    assert same(loaded, models.quantize(models.load(tmp_path / "saved"), form))


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, "int8", "nf4"])
def test_eight_devices_train_adapters_as_one_does(form):
    config = dataclasses.replace(
        CLIPPED, width=64, experts=8, expert_width=128, heads=8, key_heads=8, vocab=64
    )
    policy = models.Transformer(config, key=KEY)
    policy = policy if form is None else models.quantize(policy, form)
    policy = shaken(models.add_lora(policy, rank=4, target="feed_forward|query", key=KEY))
    batch = jax.tree.map(lambda x: np.concatenate([x, x, x])[:8], ragged_batch(0, vocab=64))
    optimizer = optax.sgd(0.1)
    trainable = models.lora_filter(policy)
    step = dpx.make_step(
        losses.dpo, optimizer, trainable=trainable, reference_of=models.without_lora
    )
    state = optimizer.init(eqx.filter(policy, trainable))
    want, _, metrics = eqx.filter_jit(step)(policy, state, batch)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    placed = sharding.shard_policy(policy, mesh)
    got, _, sharded = eqx.filter_jit(step)(placed, state, sharding.shard_batch(batch, mesh))
    assert abs(metrics["loss"] - sharded["loss"]) < 1e-6
    assert np.abs(want.layers.feed_forward.up.up - policy.layers.feed_forward.up.up).max() > 1e-5
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_close(one, np.asarray(other), 1e-5)
