"""Our adapters against PEFT's, both ways, on golden checkpoints of many families; run by hand.

The two may live in different environments, so it has three parts, run one after the other:

    python -m tests.models.compare_peft make FOLDER     # with torch, transformers and peft
    python -m tests.models.compare_peft ours FOLDER     # with dpo_eqx
    python -m tests.models.compare_peft back FOLDER     # with torch, transformers and peft

`make` writes adapters and the logits with them, which are also the golden ones in
`tests/golden/models/peft`, `peft_experts` and `peft_reward`, where the one logit is a reward;
`ours` compares, and saves what it loaded and adapters of its own; `back` loads these in PEFT and
compares again. A deviation of 1e-4 fails. Names of cases behind FOLDER select these.
"""

import sys
from pathlib import Path

import numpy as np

from .family_cases import IDS
from .make_families import EAGER, read_golden, write_checkpoint

BASES = Path(__file__).parents[1] / "golden" / "models" / "families"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# By name, the checkpoint and what PEFT's `LoraConfig` is given.
CASES = {
    "llama": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "mistral": (
        "mistral-sliding",
        {
            "r": 4,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "layers_to_transform": [1],
        },
    ),
    "qwen2": (
        "qwen2-tied",
        {
            "r": 4,
            "target_modules": r".*\.(q_proj|v_proj|up_proj)",
            "rank_pattern": {"q_proj": 2, "mlp.up_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "qwen3": ("qwen3", {"r": 2, "target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "gpt2": ("gpt2", {"r": 3, "target_modules": ["c_attn", "attn.c_proj", "c_fc"]}),
    "phi": ("phi", {"r": 2, "lora_dropout": 0.1, "target_modules": ["dense", "fc1", "lm_head"]}),
    "dora": (
        "qwen2-tied",
        {
            "r": 4,
            "lora_alpha": 4,
            "use_dora": True,
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [1],
        },
    ),
    "dora-fused": (
        "gpt2",
        {"r": 2, "use_dora": True, "target_modules": ["c_attn", "c_fc"], "lora_dropout": 0.1},
    ),
    "modules": (
        "gpt2",
        {"r": 2, "target_modules": ["c_fc"], "modules_to_save": ["ln_f", "ln_1", "wpe"]},
    ),
    "modules-tied": (
        "qwen2-tied",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "reward": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_fc"], "modules_to_save": ["wpe"]}),
    "reward-tied": (
        "qwen2-tied",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "gemma2": ("gemma2", {"r": 2, "init_lora_weights": "gaussian", "target_modules": ["o_proj"]}),
    "experts": (
        "mixtral",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"mlp.experts.down_proj": 3},
            "alpha_pattern": {"mlp.experts.gate_up_proj": 5},
        },
    ),
    "experts-interleaved": (
        "gpt-oss",
        {"r": 2, "target_modules": [], "target_parameters": ["1.mlp.experts.gate_up_proj"]},
    ),
    "experts-and-router": ("olmoe", {"r": 2, "target_modules": "all-linear"}),
    "experts-and-dense": (
        "qwen3-moe-mixed",
        {
            "r": 2,
            "use_rslora": True,
            "target_modules": ["o_proj"],
            "target_parameters": [*EXPERTS, "mlp.up_proj.weight"],
        },
    ),
}
# The names of layers in families whose adapters are no golden values.
CASES |= {
    name: (name, {"r": 2, "target_modules": modules, **others})
    for name, modules, others in [
        ("qwen3-moe", ["o_proj"], {"target_parameters": EXPERTS, "use_rslora": True}),
        ("mixtral", "all-linear", {}),
        ("gpt-oss-plain", ["k_proj"], {"target_parameters": EXPERTS}),
        *(
            (base, "all-linear", {})
            for base in [
                *("ministral3", "gemma", "gemma3", "arcee", "smollm3", "seed-oss", "starcoder2"),
                *("stablelm", "helium", "granite", "nemotron", "hunyuan", "nanochat", "ernie"),
                *("phi3", "glm", "glm4", "gpt-neox", "gptj", "codegen", "olmo", "olmo2", "olmo3"),
                *("cohere", "cohere2", "exaone4", "apertus", "lfm2", "qwen3-5"),
            ]
        ),
    ]
}
CASES |= {
    f"reward-{base}": (base, {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS})
    for base in ("mixtral", "qwen3-moe", "gpt-oss")
}
LENGTH = 12


def ids_of(base: str) -> np.ndarray:
    """A row of the checkpoint's golden ids."""
    if not (BASES / base).exists():
        return IDS[0, :LENGTH]
    return np.load(BASES / base / "expected.npz")["ids"][0, :LENGTH].astype(np.int64)


def base_folder(folder: Path, base: str) -> Path:
    """The folder of a checkpoint, which is written if it is none of the golden ones."""
    path = folder / "bases" / base
    if (BASES / base).exists():
        return BASES / base
    return path if path.exists() else write_checkpoint(read_golden()[base], path)


def make(folder: Path, cases: dict) -> None:
    import peft
    import torch

    for name, (base, settings) in cases.items():
        torch.manual_seed(0)
        task = "SEQ_CLS" if _is_reward(name) else "CAUSAL_LM"
        config = peft.LoraConfig(task_type=task, **settings)
        model = peft.get_peft_model(_base(base_folder(folder, base), name), config)
        for key, parameter in model.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter.data *= 0.5 + torch.rand_like(parameter)
            elif "modules_to_save" in key:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
        np.save(folder / name / "logits.npy", _logits(model.eval(), base))


def ours(folder: Path, cases: dict) -> None:
    import jax

    from dpo_eqx import models

    worst = 0.0
    for name, (base, _) in cases.items():
        plain = models.load(base_folder(folder, base))
        loaded = models.load_lora(plain, folder / name)
        want = np.load(folder / name / "logits.npy")
        without = np.asarray(models.without_lora(loaded)(ids_of(base)))
        print(f"{name}: the adapter moves logits by {np.abs(want - without).max():.2f}")
        worst = max(worst, _report(name, np.asarray(loaded(ids_of(base))), want))
        fresh = models.add_lora(
            models.RewardModel(plain, key=jax.random.key(2)) if _is_reward(name) else plain,
            rank=3,
            alpha=4.5,
            target=None if plain.config.experts == 0 else "attention|feed_forward",
            dora="dora" in name,
            modules_to_save=_whole(name),
            key=jax.random.key(0),
        )
        fresh = _shaken(fresh, models.lora_filter(fresh))
        for kind, policy in (("again", loaded), ("fresh", fresh)):
            path = folder / "back" / f"{name}-{kind}"
            models.save_lora(policy, path, base=base)
            np.save(path / "logits.npy", np.asarray(policy(ids_of(base))))
    sys.exit(worst > 1e-4)


def _is_reward(name: str) -> bool:
    """Whether the base of a case is a reward model, whose one logit is the reward."""
    return name.startswith("reward")


def _whole(name: str) -> str | None:
    """Which modules our own adapters of a case have whole."""
    if _is_reward(name):
        return r"^(head|body\.embedding|body\.norm)"
    return "^(embedding|head|norm)" if "modules" in name else None


def _shaken(policy, chosen):
    """Random numbers in the place of all adapters."""
    import jax

    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(
        lambda x, is_it: jax.random.normal(next(keys), x.shape, x.dtype) / 5 if is_it else x,
        policy,
        chosen,
    )


def back(folder: Path, cases: dict) -> None:
    import peft

    worst = 0.0
    for name, (base, _) in cases.items():
        for kind in ("again", "fresh"):
            path = folder / "back" / f"{name}-{kind}"
            model = peft.PeftModel.from_pretrained(_base(base_folder(folder, base), name), path)
            want = np.load(path / "logits.npy")
            worst = max(worst, _report(f"{name}-{kind}", _logits(model.eval(), base), want))
            _check_the_same_tensors(model, path)
    sys.exit(worst > 1e-4)


def _check_the_same_tensors(model, path: Path) -> None:
    """PEFT only warns of tensors that it misses or does not know."""
    import safetensors.numpy

    names = set(safetensors.numpy.load_file(path / "adapter_model.safetensors"))
    known = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    known = {key.replace(".modules_to_save.default.", ".modules.") for key in known}
    known = {key.replace(".default.", ".") for key in known if "lora_" in key or ".modules." in key}
    known = {key.replace("magnitude_vector.weight", "magnitude_vector") for key in known}
    known = {key.replace(".modules.", ".") for key in known}
    if model.peft_config["default"].ensure_weight_tying:
        # PEFT writes the trained embedding a second time, and then does not look for it.
        known |= {"base_model.model.lm_head.weight"}
    assert names == known, names ^ known


def _base(path: Path, name: str):
    import torch
    import transformers

    if _is_reward(name):
        kind = transformers.AutoModelForSequenceClassification
        return kind.from_pretrained(path, dtype=torch.float32, num_labels=1, **EAGER)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **EAGER)


def _logits(model, base: str) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids_of(base)[None]), use_cache=False).logits[0].numpy()


def _report(name: str, got: np.ndarray, want: np.ndarray) -> float:
    deviation = float(np.abs(got - want).max())
    print(f"{name:16} off by {deviation:.1e}, logits up to {np.abs(want).max():.1f}")
    return deviation


if __name__ == "__main__":
    task, place, *names = sys.argv[1:]
    chosen = {name: case for name, case in CASES.items() if not names or name in names}
    {"make": make, "ours": ours, "back": back}[task](Path(place), chosen)
