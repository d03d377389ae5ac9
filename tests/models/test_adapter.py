"""Adapters of PEFT: what it wrote, read; what we wrote, read again; what is refused, and how."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_eqx import models
from dpo_eqx.models._checkpoint.folder import ADAPTER, ADAPTER_CONFIG
from dpo_eqx.models._peft.config import read_peft

from .golden import FOLDER, call, same, shaken

PEFT = FOLDER / "peft"
# Written by PEFT 0.21, see `compare_peft.py`.
BASES = {path.name: json.loads((path / ADAPTER_CONFIG).read_text()) for path in PEFT.iterdir()}
BASES = {name: values["base_model_name_or_path"] for name, values in BASES.items()}
SLOW = [name for name in BASES if name not in ("dora-fused", "gpt2", "qwen2")]


def families(names=BASES):
    return [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in sorted(names)
    ]


def base_of(name):
    return models.load(FOLDER / "families" / BASES[name])


def ids_of(name):
    return np.load(FOLDER / "families" / BASES[name] / "expected.npz")["ids"][0, :12].astype(int)


@pytest.mark.parametrize("name", families())
def test_logits_are_those_of_peft(name, tmp_path):
    base, ids = base_of(name), ids_of(name)
    loaded = models.load_lora(base, PEFT / name)
    want = np.load(PEFT / name / "logits.npy")
    assert np.abs(call(loaded, ids) - want).max() < 1e-4
    assert np.abs(call(base, ids) - want).max() > 0.5
    models.save_lora(loaded, tmp_path / "again")
    assert same(models.load_lora(base, tmp_path / "again"), loaded)


@pytest.mark.parametrize("name", families(["gpt2", "llama", "mistral", "phi"]))
def test_a_round_trip(name, tmp_path):
    """Adapters of ours, also of an unembedding, come back bit by bit; on a quantised base too."""
    base = models.load(FOLDER / "families" / BASES[name], quantize="nf4")
    policy = shaken(models.add_lora(base, rank=3, alpha=5, target="", key=jax.random.key(0)))
    models.save_lora(policy, tmp_path, base="somebody/something")
    assert same(models.load_lora(base, tmp_path), policy)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "somebody/something"
    assert config["peft_type"] == "LORA"
    with pytest.raises(ValueError, match="`policy` has adapters already"):
        models.load_lora(policy, tmp_path)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_the_form_of_the_scale_is_kept(rank_stabilised, tmp_path):
    base = base_of("qwen2")
    policy = models.add_lora(
        base, rank=3, alpha=5, rank_stabilised=rank_stabilised, key=jax.random.key(0)
    )
    models.save_lora(policy, tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (rank_stabilised, 5)
    assert same(models.load_lora(base, tmp_path), policy)


def gpt2_with(target):
    base = base_of("gpt2")
    return base, shaken(models.add_lora(base, rank=2, target=target, key=jax.random.key(0)))


def test_queries_keys_and_values_in_one(tmp_path):
    """Three adapters become one of three times the rank, made of blocks."""
    _, policy = gpt2_with(r"attention\.(query|key|value)")
    models.save_lora(policy, tmp_path)
    tensors = load_file(tmp_path / ADAPTER)
    down, up = (
        tensors[f"base_model.model.transformer.h.1.attn.c_attn.lora_{x}.weight"] for x in "AB"
    )
    attention = policy.layers.attention
    parts = attention.query, attention.key, attention.value
    width = attention.query.up.shape[1]
    want = [part.scale * part.up[1] @ part.down[1] for part in parts]
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert (config["r"], config["target_modules"]) == (6, ["c_attn"])
    assert config["fan_in_fan_out"]
    assert np.abs(config["lora_alpha"] / 6 * up @ down - np.concatenate(want)).max() < 1e-6
    assert not up[:width, 2:].any()


def test_parts_of_unequal_scale_and_rank(tmp_path):
    base, policy = gpt2_with(r"attention\.(query|value)")
    query = policy.layers.attention.query
    louder = models.LoRA(query.base, query.down[:, :1], query.up[..., :1], 3 * query.scale)
    policy = eqx.tree_at(lambda p: p.layers.attention.query, policy, louder)
    models.save_lora(policy, tmp_path)
    ids = ids_of("gpt2")
    again = models.load_lora(base, tmp_path)
    assert again.layers.attention.query.down.shape[1] == 1
    assert np.abs(call(again, ids) - call(policy, ids)).max() < 1e-5


def test_a_part_of_them_stays_a_part(tmp_path):
    base, policy = gpt2_with(r"attention\.(query|value)")
    models.save_lora(policy, tmp_path)
    again = models.load_lora(base, tmp_path)
    assert same(again, policy)
    assert not isinstance(again.layers.attention.key, models.LoRA)


def test_layers_without_adapters_stay_without(tmp_path):
    """PEFT's `layers_to_transform`: zeros for both matrices, which no gradient moves."""
    base = base_of("mistral")
    policy = models.load_lora(base, PEFT / "mistral")
    query = policy.layers.attention.query
    assert not np.any(query.down[0])
    assert not np.any(query.up[0])
    assert np.any(query.down[1])

    @eqx.filter_jit
    def slopes(policy, ids):
        own, frozen = eqx.partition(policy, models.lora_filter(policy))
        return eqx.filter_grad(lambda own: (eqx.combine(own, frozen)(ids) ** 2).sum())(own)

    slope = slopes(policy, ids_of("mistral")).layers.attention.query
    assert not np.any(slope.down[0])
    assert not np.any(slope.up[0])
    assert np.any(slope.down[1])
    models.save_lora(policy, tmp_path)
    assert load_file(tmp_path / ADAPTER).keys() == load_file(PEFT / "mistral" / ADAPTER).keys()


def test_in_float32_on_a_narrow_base(tmp_path):
    folder = shutil.copytree(PEFT / "qwen2", tmp_path / "narrow")
    narrow = {n: x.astype(jnp.bfloat16) for n, x in load_file(folder / ADAPTER).items()}
    save_file(narrow, folder / ADAPTER)
    base = models.load(FOLDER / "families" / BASES["qwen2"], dtype=jnp.bfloat16)
    query = models.load_lora(base, folder).layers.attention.query
    assert query.down.dtype == np.float32
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert np.array_equal(query.down[0], narrow[name].astype(np.float32))


def test_pinned_adapters_stay():
    policy = models.load_lora(base_of("qwen2"), PEFT / "qwen2")
    pinned = models.pin_lora(policy)
    moved = shaken(pinned)
    assert same(models.pinned_lora(moved), policy)
    assert len(jax.tree.leaves(eqx.filter(moved, models.lora_filter(moved)))) == 6
    assert same(models.merge_lora(moved), models.merge_lora(shaken(policy)))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(pinned)]
    assert len(buffers) == len(set(buffers)), "nothing is donated twice"
    with pytest.raises(ValueError, match=r"not pinned; pin them with `pin_lora`"):
        models.pinned_lora(policy)
    for view in (models.pin_lora, models.pinned_lora):
        with pytest.raises(ValueError, match=r"`policy` has no adapters.*`add_lora`"):
            view(base_of("qwen2"))


class Mixed(eqx.Module):
    """Layers of many forms: stacked, quantised, in a list, without an adapter."""

    stack: eqx.nn.Linear
    blocks: list
    out: eqx.nn.Linear


def mixed(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    linear = [eqx.nn.Linear(4, 6, key=key, dtype=dtype) for key in keys]
    stack = jax.tree.map(lambda *rows: jnp.stack([*map(jnp.asarray, rows)]), *linear[:2])
    blocks = [{"up": linear[2]}, models.quantize(linear[3], "int8")]
    return Mixed(stack, blocks, linear[4])


def with_adapters(policy, target="stack|blocks", **settings):
    settings = {"rank": 2, "alpha": 3, "key": jax.random.key(1), **settings}
    return models.add_lora(policy, target=target, **settings)


def test_adapters_of_any_module(tmp_path):
    """By the paths of their layers, bit by bit, onto a module without adapters and with them."""
    base = mixed()
    policy = shaken(with_adapters(base))
    models.save_lora(policy, tmp_path, base="somebody/something")
    tensors = load_file(tmp_path / ADAPTER)
    assert sorted(tensors) == [
        f"{path}.{part}" for path in ("blocks.0.up", "blocks.1", "stack") for part in ("down", "up")
    ]
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert config["adapters"]["stack"] == {"rank": 2, "scale": 1.5}
    assert config["base_model_name_or_path"] == "somebody/something"
    assert same(models.load_lora(base, tmp_path), policy)
    assert same(models.load_lora(with_adapters(base), tmp_path), policy)
    pinned = models.pin_lora(with_adapters(base))
    loaded = models.load_lora(pinned, tmp_path)
    assert same(models.pinned_lora(loaded), with_adapters(base))
    assert same(models.without_lora(loaded), base)
    assert np.array_equal(loaded.stack.up, policy.stack.up)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_adapters_of_any_module_keep_their_dtype(dtype, tmp_path):
    layer = eqx.nn.Linear(3, 2, key=jax.random.key(0), dtype=dtype)
    policy = with_adapters(layer, target=None)
    policy = eqx.tree_at(lambda p: (p.down, p.up), policy, replace_fn=lambda x: x.astype(dtype))
    models.save_lora(policy, tmp_path)
    assert set(load_file(tmp_path / ADAPTER)) == {"down", "up"}
    again = models.load_lora(layer, tmp_path)
    assert again.down.dtype == dtype
    assert same(again, policy)
    if dtype == jnp.float64:
        with jax.enable_x64(False), pytest.raises(ValueError, match="only if `jax_enable_x64`"):
            models.load_lora(layer, tmp_path)


def test_a_transformer_inside_another_module(tmp_path):
    base = {"policy": base_of("qwen2")}
    policy = shaken(models.add_lora(base, rank=1, target="query", key=jax.random.key(0)))
    models.save_lora(policy, tmp_path)
    assert same(models.load_lora(base, tmp_path), policy)
    with pytest.raises(
        ValueError, match=r"no linear layer at 'policy\.layers\.attention\.query'\. Give"
    ):
        models.load_lora(base["policy"], tmp_path)


def test_adapters_that_do_not_fit_another_module(tmp_path):
    base = mixed()
    policy = with_adapters(base)
    models.save_lora(policy, tmp_path)

    def refused(other, message):
        with pytest.raises(ValueError, match=message):
            models.load_lora(other, tmp_path)

    refused(base.out, r"no linear layer at 'blocks.0.up'; .*`policy` has layers at: ''\.")
    refused(with_adapters(base, rank=3), r"rank 2 and scale 1.5 at 'stack', but .* 3 and 1.0")
    refused(with_adapters(base, target="stack"), "no linear layer at 'blocks.0.up'")
    refused(with_adapters(base, target=None), "no tensors for the adapter that .* has at 'out'")
    wide = eqx.tree_at(lambda p: p.stack.weight, base, jnp.zeros((2, 6, 5), jnp.float32))
    refused(wide, r"mis-shaped: stack.down should be \(2, 2, 5\), is \(2, 2, 4\)")
    spoil_tensors(tmp_path, lambda x: {**without(x, "stack.up"), "other": x["stack.up"]})
    refused(base, r"extra: other, of shape \(2, 6, 2\); missing: stack.up, of shape")
    spoil_config(tmp_path, adapters={"stack": {"rank": "2"}})
    refused(base, "`rank` in `adapters` of .* at 'stack', must be a positive integer; got '2'; `sc")
    spoil_config(tmp_path, adapters=None)
    refused(base, "`adapters` in adapter_config.json must be an object")
    spoil_config(tmp_path, version=2)
    refused(base, "`version` in adapter_config.json must be 1.*; got 2")
    with pytest.raises(ValueError, match=r"`policy` must be a `models.Transformer` .* got Mixed"):
        models.load_lora(base, PEFT / "llama")


def test_two_adapters_of_one_path(tmp_path):
    layer = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    policy = with_adapters({"a": {"b": layer}}, target=None) | {
        "a.b": with_adapters(layer, target=None)
    }
    with pytest.raises(ValueError, match=r"one path for each adapter; got two at a\.b"):
        models.save_lora(policy, tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A copy of an adapter, to be spoilt."""
    return shutil.copytree(PEFT / "llama", tmp_path / "adapter")


def spoil_config(folder, **changes):
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**values, **changes}))


def spoil_tensors(folder, change):
    save_file(change(load_file(folder / ADAPTER)), folder / ADAPTER)


EMBEDDING = "base_model.model.model.embed_tokens.weight"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def without(tensors, name):
    return {key: x for key, x in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: without(x, f"{QUERY}.lora_B.weight"), r"missing: \S+q_proj.lora_B.weight, of"),
        (lambda x: {**x, "base_model.model.other.lora_A.weight": x[f"{QUERY}.lora_A.weight"]},
         r"extra: base_model.model.other.lora_A.weight, of shape \(4, 32\)"),
        (lambda x: {**x, f"{QUERY}.lora_A.weight": np.zeros((4, 33), np.float32)},
         r"mis-shaped: \S+q_proj.lora_A.weight should be \(4, 32\), is \(4, 33\)"),
        (lambda x: {**x, f"{QUERY}.lora_A.weight": np.zeros((5, 32), np.float32)},
         r"q_proj.lora_A.weight is of rank 5, its configuration says 4"),
        (lambda x: {**x, f"{QUERY}.lora_A.weight": np.zeros((4, 32), np.int8)},
         r"q_proj.lora_A.weight is of dtype I8"),
        (lambda x: {**x, EMBEDDING: np.zeros((96, 32), np.float32)},
         r"embed_tokens.weight differs from the policy's"),
    ],
)  # fmt: skip
def test_tensors_of_another_model(folder, change, message):
    spoil_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        models.load_lora(base_of("llama"), folder)


def test_an_adapter_for_other_sizes(folder):
    with pytest.raises(ValueError, match=r"mis-shaped: .*should be .*, is .*; and \d+ more"):
        models.load_lora(models.load(FOLDER / "families" / "mistral-wide-heads"), folder)


def test_an_adapter_of_an_embedding(folder):
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    spoil_tensors(folder, lambda x: {**x, name: np.zeros((4, 96), np.float32)})
    with pytest.raises(ValueError, match=r"extra: \S+lora_embedding_A.*to be merged into .* PEFT"):
        models.load_lora(base_of("llama"), folder)


REFUSED = [
    ({"peft_type": "IA3"}, r"`peft_type` of .* must be `LORA`; got 'IA3'.*`merge_and_unload`"),
    ({"use_dora": True}, r"missing: \S+.lora_magnitude_vector, of shape \(32,\)"),
    ({"modules_to_save": ["lm_head"]}, r"missing: base_model.model.lm_head.weight"),
    ({"lora_dropout": 1}, r"`lora_dropout` in .* must be a number from 0 to below 1; got 1"),
    ({"bias": "all", "lora_bias": True}, r"`bias` \('all'\), `lora_bias` \(True\)"),
    ({"init_lora_weights": "pissa"}, r"`init_lora_weights` \('pissa'\)"),
    ({"tomorrow": 1}, r"`tomorrow` \(1\)"),
    ({"r": 0}, r"`r` of the adapter's configuration, .* must be positive numbers; got 0"),
    ({"alpha_pattern": {"q_proj": "8"}}, r"`lora_alpha` of .* must be positive numbers; got '8'"),
    ({"r": 5}, r"is of rank 4, its configuration says 5"),
    ({"target_modules": None}, r"`target_modules` .* must name the modules.*got None"),
    ({"target_modules": ["c_attn"]}, r"\('c_attn',\), match no linear layer of its base"),
    ({"target_modules": ["q_proj"]}, r"extra: \S+.down_proj"),
    ({"alpha_pattern": {"layers.0.self_attn.q_proj": 3}}, r"of model.layers.\*.self_attn.q_proj"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_configurations_that_are_refused(folder, changes, message):
    spoil_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        models.load_lora(base_of("llama"), folder)


def test_files_that_are_not_there(folder, tmp_path):
    base = base_of("llama")
    with pytest.raises(ValueError, match="has no adapters to save; add them with `add_lora`"):
        models.save_lora(base, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (folder / ADAPTER).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin: a pickle, which can run any code"):
        models.load_lora(base, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"needs `adapter_model.safetensors`; there is none"
    ):
        models.load_lora(base, folder)
    with pytest.raises(FileNotFoundError, match=r"holds an adapter: .* to `models.load_lora`"):
        models.load(folder)
    (folder / ADAPTER_CONFIG).write_text("[1]")
    with pytest.raises(ValueError, match=r"must hold an object of keys and values; it holds \[1"):
        models.load_lora(base, folder)
    (folder / ADAPTER_CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"needs `adapter_config.json`; there is none"):
        models.load_lora(base, folder)
    with pytest.raises(FileNotFoundError, match="holds a whole model, not an adapter"):
        models.load_lora(base, FOLDER / "families" / "llama")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        models.load_lora(base, tmp_path / "nowhere")


NAME = "model.layers.{}.self_attn.{}_proj".format


@pytest.mark.parametrize(
    ("changes", "yes", "no"),
    [
        ({"target_modules": ["q_proj"]}, [NAME(0, "q"), "q_proj"], [NAME(0, "k"), "xq_proj"]),
        ({"target_modules": r".*\.1\..*q_proj"}, [NAME(1, "q")], [NAME(0, "q"), NAME(11, "q")]),
        ({"target_modules": "all-linear"}, [NAME(0, "q")], ["lm_head"]),
        ({"exclude_modules": ["k_proj"]}, [NAME(0, "q")], [NAME(0, "k")]),
        ({"exclude_modules": r".*k_proj"}, [NAME(0, "q")], [NAME(0, "k")]),
        ({"layers_to_transform": 1}, [NAME(1, "k")], [NAME(0, "k"), NAME(11, "k"), "q_proj"]),
        (
            {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
            [NAME(2, "q")],
            [NAME(1, "q"), "model.blocks.2.q_proj"],
        ),
    ],
)
def test_which_modules_are_meant(changes, yes, no):
    values = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "k_proj"], **changes}
    config = read_peft(values)
    assert all(map(config.has, yes))
    assert not any(map(config.has, no))


def test_ranks_and_scales():
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    patterns = {"rank_pattern": {"self_attn.q_proj": 9}, "alpha_pattern": {"v_proj": 2}}
    config = read_peft({**values, **patterns})
    assert [config.rank_of(NAME(0, x)) for x in "qv"] == [9, 4]
    assert [config.scale_of(NAME(0, x)) for x in "qv"] == [6 / 9, 2 / 4]
    stabilised = read_peft({**values, **patterns, "use_rslora": True})
    assert [stabilised.scale_of(NAME(0, x)) for x in "qv"] == [6 / 3, 2 / 2]
