"""What a run does and leaves: the reference's ways, adapters, evaluation, the folder."""

import json
import math

import equinox as eqx
import jax
import numpy as np
import orbax.checkpoint
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, models
from dpo_eqx.cli.compose.data import learned_positions, make_batches, prepare
from dpo_eqx.cli.settings.settings import Settings

from .runs import lines_of, same_weights, train, weights_of
from .small import MODEL, STEPS, check_each_step_once, small, write_data


def column(output, name, file="metrics.jsonl"):
    return np.array([line[name] for line in lines_of(output, file)])


def test_the_folder_of_a_run(tmp_path, capsys):
    assert small(tmp_path, eval_data=write_data(tmp_path / "eval.jsonl", 5, 1), eval_every=4) == 0
    run = tmp_path / "run"
    names = {"config.yaml", "run.json", "metrics.jsonl", "eval.jsonl", "checkpoints", "model"}
    assert {path.name for path in run.iterdir()} == names
    check_each_step_once(run)
    assert abs(lines_of(run)[0]["loss"] - np.log(2)) < 1e-6
    facts = json.loads((run / "run.json").read_text())
    assert facts["data"]["form"].startswith("token ids")
    assert facts["data"]["fingerprint"] == data.read(tmp_path / "data.jsonl").fingerprint()
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["hardware"]["platform"] == "cpu"
    out = capsys.readouterr()
    assert "10 records: 10 rows kept, 0 dropped" in out.out
    assert out.err == ""

    # The held-out data as one batch, by the core alone.
    rows, _ = data.tokenize(data.read(tmp_path / "eval.jsonl"), None)
    batch = next(data.batches(rows, batch_size=5, shuffle=False))
    assert column(run, "step", "eval.jsonl").tolist() == [0, 4, STEPS]
    for where, step in ((MODEL, 0), (run / "model", -1)):
        want = eqx.filter_jit(dpx.score_pairs)(models.load(where), batch)
        got = column(run, "eval/logps/chosen", "eval.jsonl")[step]
        assert abs(got - want.chosen.mean()) < 1e-4

    # The settings alone give the same run again.
    assert train(config=run / "config.yaml", output=tmp_path / "again") == 0
    assert same_weights(run, tmp_path / "again")


@pytest.mark.slow
def test_adapters(tmp_path):
    assert small(tmp_path, lora_rank=2, lora_target="attention", dropout=False) == 0
    run = tmp_path / "run"
    assert abs(lines_of(run)[0]["loss"] - np.log(2)) < 1e-6
    assert column(run, "loss")[-1] < 0.69
    base, trained = models.load(MODEL), models.load(run / "model")
    moved = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda one, other: bool((one != other).any()), base, trained)
    )
    changed = {jax.tree_util.keystr(p, simple=True, separator=".") for p, is_new in moved if is_new}
    assert changed == {
        f"layers.attention.{name}.weight" for name in ("query", "key", "value", "output")
    }
    checkpoint = orbax.checkpoint.StandardCheckpointer()
    held = checkpoint.metadata(run / "checkpoints" / "6" / "state").item_metadata.tree
    policy = [name for name in held if name.startswith("policy.")]
    assert len(policy) == 8, "two matrices of four layers, and no frozen weight"


@pytest.mark.slow
def test_a_reference_that_follows_at_once(tmp_path):
    """With alpha 1 after each step the reference is the policy: nothing is ever preferred."""
    settings = {"sync_reference_every": 1, "sync_reference_alpha": 1.0, "dropout": False}
    assert small(tmp_path, **settings) == 0
    assert np.abs(column(tmp_path / "run", "loss") - np.log(2)).max() < 1e-6
    assert np.abs(column(tmp_path / "run", "rewards/margins")).max() < 1e-5
    assert np.ptp(column(tmp_path / "run", "logps/chosen")) > 1


@pytest.mark.slow
def test_a_precomputed_reference(tmp_path):
    for name, given in (("live", {}), ("once", {"precompute_reference": True})):
        more = {"dropout": False, "output": tmp_path / name}
        assert small(tmp_path, cache=tmp_path / "cache", **more, **given) == 0
    for key in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
        live, once = (column(tmp_path / name, key) for name in ("live", "once"))
        assert np.abs(live - once).max() < 1e-4 * (1 + np.abs(live).max())
    assert list((tmp_path / "cache").glob("reference-*"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_single_completions(tmp_path, loss):
    rng = np.random.default_rng(0)
    records = [
        {
            "prompt_ids": rng.integers(0, 96, 3).tolist(),
            "completion_ids": rng.integers(0, 96, 1 + i % 4).tolist(),
            "label": bool(i % 2),
        }
        for i in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert small(tmp_path, loss=loss) == 0
    line = lines_of(tmp_path / "run")[-1]
    assert "rewards/margins" in line
    assert "rewards/accuracies" not in line


@pytest.mark.slow
def test_a_model_with_its_tokenizer(models, tmp_path):
    """The model at the end is complete: weights in the asked dtype, configuration, tokenizer."""
    (tmp_path / "data.jsonl").write_text(
        '{"chosen": "Why? So.", "rejected": "Why? No."}\n{"chosen": "A b", "rejected": "A c"}\n'
    )
    status = train(
        model=models("llama"),
        data=tmp_path / "data.jsonl",
        output=tmp_path / "run",
        loss=["simpo", "sft"],
        loss_weights=[1, 0.1],
        dtype="bfloat16",
        remat=True,
        batch_size=2,
        epochs=2,
        learning_rate=1e-3,
        optimizer="sgd",
        buckets=1,
    )
    assert status == 0
    assert len(lines_of(tmp_path / "run")) == 2
    folder = tmp_path / "run" / "model"
    assert {str(tensor.dtype) for tensor in weights_of(tmp_path / "run").values()} == {"bfloat16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    ours, theirs = (data.load_tokenizer(path) for path in (folder, models("llama")))
    assert ours.encode("Why? So.") == theirs.encode("Why? So.")


def write_lengths(path, lengths, **columns):
    """Preferences of token ids with these numbers of prompt, chosen and rejected tokens."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, ([7] * n for n in row), strict=True)) for row in lengths]
    path.write_text("".join(json.dumps(row | columns) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_learned_positions_bound_tokens_and_not_padding(tmp_path):
    """Together the widest prompt and the widest completion have more than the 256 positions."""
    write_lengths(tmp_path / "data.jsonl", [(90, 10, 9), (5, 90, 80), (90, 90, 90), (90, 1, 166)])
    assert small(tmp_path, batch_size=2, steps=1, dropout=False) == 0
    assert column(tmp_path / "run", "loss") == pytest.approx([math.log(2)], abs=1e-5)


def test_rows_that_are_too_long_are_known_before_the_first_step(tmp_path, capsys):
    lengths = [(3, 4, 5), (90, 167, 9), (90, 3, 180), (7, 7, 7)]
    path = write_lengths(tmp_path / "eval.jsonl", lengths)
    assert small(tmp_path, eval_data=path) == 2
    assert (
        f"learned positions for 256 tokens, and 2 of 4 rows of {path} are longer: line 3 of {path} "
        "has 270. Give `--max-length 256`."
    ) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    # The flag that the message gives helps.
    settings = Settings(model=str(MODEL), data=(str(path),), output=tmp_path, max_length=256)
    assert len(prepare(str(path), settings, 96, positions=256).rows) == 4


def test_mismatched_completions_stay_within_the_learned_positions(tmp_path):
    rows = [
        {"prompt_ids": [1] * 250, "completion_ids": [2] * 6, "label": True},
        {"prompt_ids": [3] * 6, "completion_ids": [4] * 250, "label": False},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(model=str(MODEL), data=(str(path),), output=tmp_path, batch_size=2)
    prepared = prepare(str(path), settings, 96, positions=learned_positions(settings.model))
    with make_batches(prepared, settings, training=True) as batches:
        batch = next(batches)
    mismatched = batch.prompt.mask.sum(axis=1) + batch.kl.mask.sum(axis=1)
    assert sorted(mismatched) == [12, 256]
