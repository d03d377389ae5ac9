"""`evaluate` against a computation by hand in float64, and its bad input."""

import json

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import models

from .commands import adapted, log_softmax, moved, one_message, run
from .small import MODEL, write_data

PAIRS = 10


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with data, and beside it policies that differ from their reference, `MODEL`."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_data(folder / "data.jsonl", PAIRS)
    moved(MODEL, folder / "policy")
    return adapted(MODEL, folder, scale=0.3)


@pytest.fixture(scope="module")
def by_hand(there):
    """For each pair: log-probabilities of policy and reference, and KL, chosen then rejected."""
    sides = [models.load(path, dtype=jnp.float64) for path in (there / "policy", MODEL)]
    call = eqx.filter_jit(lambda policy, ids: policy(ids))

    def one(prompt, completion):
        text = prompt + completion
        # Padded to one length: what comes later has no influence.
        ids = jnp.asarray(text + [0] * (16 - len(text)))
        here = slice(len(prompt) - 1, len(text) - 1)
        p, q = (np.asarray(log_softmax(call(side, ids)))[here] for side in sides)
        picked = [x[np.arange(len(completion)), completion].sum() for x in (p, q)]
        return [*picked, (np.exp(p) * (p - q)).sum()]

    records = map(json.loads, (there / "data.jsonl").read_text().splitlines())
    return np.array(
        [
            [one(r["prompt_ids"], r[f"{side}_ids"]) for side in ("chosen", "rejected")]
            for r in records
        ]
    )


def evaluate(capsys, there, output, *more, model=None, reference=MODEL):
    compared = () if reference is None else ("--reference", reference)
    return run(
        capsys,
        *("evaluate", "--model", model or there / "policy", *compared),
        *("--data", there / "data.jsonl", "--output", output, *more),
    )


def written(path):
    """What is in a file of results."""
    return json.loads(path.read_text())


def quantities(path):
    """The numbers in a file of results."""
    return {name: value for name, value in written(path).items() if isinstance(value, float)}


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, 10])
def test_quantities(there, by_hand, tmp_path, capsys, batch_size):
    files = tmp_path / "out.json", tmp_path / "pairs.jsonl"
    flags = ("--per-pair", files[1], "--batch-size", batch_size, "--beta", 0.3)
    status, out, err = evaluate(capsys, there, files[0], *flags)
    assert (status, err) == (0, "")
    result = written(files[0])
    policy, reference, kl = (by_hand[..., i] for i in range(3))
    ratio = policy - reference
    margin = 0.3 * (ratio[:, 0] - ratio[:, 1])
    want = {
        "pairs": PAIRS,
        "preference_accuracy": (policy[:, 0] > policy[:, 1]).mean(),
        "win_rate": (margin > 0).mean(),
        "reward_margin_mean": margin.mean(),
        "reward_margin_std": margin.std(),
        "kl": kl.mean(),
    }
    for name, value in want.items():
        assert result[name] == pytest.approx(value, rel=1e-4), name
    assert want["kl"] > 0.1
    assert f"{want['kl']:.2f}" in out
    check_calibration(result["calibration"], margin)
    assert (result["beta"], result["dropped"]) == (0.3, {})
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [row["record"] for row in rows] == list(range(PAIRS))
    columns = {
        "margin": margin,
        "gradient_weight": 0.3 / (1 + np.exp(margin)),
        "chosen_logp": policy[:, 0],
        "rejected_reference_logp": reference[:, 1],
        "rejected_log_ratio": ratio[:, 1],
        "chosen_kl": kl[:, 0],
        "rejected_kl": kl[:, 1],
    }
    for name, values in columns.items():
        got = [row[name] for row in rows]
        np.testing.assert_allclose(got, values, rtol=1e-4, atol=1e-4, err_msg=name)


def check_calibration(rows, margin):
    sure = 1 / (1 + np.exp(-np.abs(margin)))
    assert len(rows) == 10
    assert sum(row["count"] for row in rows) == PAIRS
    for i, row in enumerate(rows):
        inside = (sure >= 0.5 + 0.05 * i) & (sure < 0.55 + 0.05 * i)
        assert row["count"] == inside.sum()
        if inside.any():
            assert row["predicted"] == pytest.approx(sure[inside].mean(), rel=1e-4)
            assert row["frequency"] == pytest.approx((margin > 0)[inside].mean())
        else:
            assert row["predicted"] is row["frequency"] is None


@pytest.mark.slow
def test_beside_itself(there, tmp_path, capsys):
    assert evaluate(capsys, there, tmp_path / "out.json", model=MODEL)[0] == 0
    result = written(tmp_path / "out.json")
    assert (result["win_rate"], result["reward_margin_std"]) == (0.5, 0)
    assert abs(result["kl"]) < 1e-6
    assert result["beta"] == 0.1


@pytest.mark.slow
def test_adapters_beside_their_base_are_the_merged_model_beside_it(there, tmp_path, capsys):
    outputs = tmp_path / "merged.json", tmp_path / "adapter.json"
    assert evaluate(capsys, there, outputs[0], model=there / "model")[0] == 0
    flags = ("--lora", there / "adapter")
    assert evaluate(capsys, there, outputs[1], *flags, model=MODEL, reference=None)[0] == 0
    merged, got = map(quantities, outputs)
    assert merged["kl"] > 0.1
    assert got == pytest.approx(merged, rel=1e-3)
    assert written(outputs[1])["reference"] == f"{MODEL} without adapters"


@pytest.mark.slow
def test_adapters_on_a_quantised_base(there, tmp_path, capsys):
    """The base is quantised on both sides: what differs is the adapters alone."""
    flags = ("--lora", there / "adapter", "--quantize", "nf4", "--per-pair", tmp_path / "pairs")
    status, _, err = evaluate(capsys, there, tmp_path / "out", *flags, model=MODEL, reference=None)
    assert (status, err) == (0, "")
    base = models.load(MODEL, quantize="nf4")
    sides = models.load_lora(base, there / "adapter"), base
    record = json.loads((there / "data.jsonl").read_text().splitlines()[0])
    text = jnp.asarray(record["prompt_ids"] + record["chosen_ids"])
    here = slice(len(record["prompt_ids"]) - 1, -1)
    p, q = (log_softmax(eqx.filter_jit(side)(text).astype(float))[here] for side in sides)
    pair = json.loads((tmp_path / "pairs").read_text().splitlines()[0])
    assert pair["chosen_kl"] == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-3)
    exact = jnp.asarray(models.load(MODEL)(text), float)
    assert np.abs(log_softmax(exact)[here] - q).max() > 1e-2, "quantising changes the base"


def test_lines_of_pairs_have_the_numbers_of_their_records(there, tmp_path, capsys):
    records = [json.loads(line) for line in (there / "data.jsonl").read_text().splitlines()]
    kept = [i for i, record in enumerate(records) if len(record["prompt_ids"]) < 5]
    assert 0 < len(kept) < PAIRS
    flags = ("--max-length", 5, "--per-pair", tmp_path / "pairs", "--batch-size", 4)
    assert evaluate(capsys, there, tmp_path / "out", *flags)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "pairs").read_text().splitlines()]
    assert [row["record"] for row in rows] == kept
    for row in rows:
        record = records[row["record"]]
        room = 5 - len(record["prompt_ids"])
        assert row["chosen_tokens"] == min(len(record["chosen_ids"]), room)
    dropped = {"prompt_fills_max_length": PAIRS - len(kept)}
    assert written(tmp_path / "out")["dropped"] == dropped


def test_without_a_reference_what_needs_none(there, by_hand, tmp_path, capsys):
    files = tmp_path / "out.json", tmp_path / "pairs.jsonl"
    flags = ("--per-pair", files[1], "--batch-size", 4)
    status, out, err = evaluate(capsys, there, files[0], *flags, reference=None)
    assert (status, err) == (0, "")
    assert "preference accuracy" in out
    assert "win rate" not in out
    records = [json.loads(line) for line in (there / "data.jsonl").read_text().splitlines()]
    tokens = np.array([[len(r[f"{side}_ids"]) for side in ("chosen", "rejected")] for r in records])
    policy = by_hand[..., 0]
    want = {
        "preference_accuracy": np.mean(policy[:, 0] > policy[:, 1]),
        "preference_accuracy_per_token": np.mean(np.diff(policy / tokens)[:, 0] < 0),
        "chosen_logp": policy[:, 0].mean(),
        "rejected_logp": policy[:, 1].mean(),
    }
    assert quantities(files[0]) == pytest.approx(want, rel=1e-5)
    assert written(files[0])["pairs"] == PAIRS
    assert "reference" not in written(files[0])
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [row["chosen_logp"] for row in rows] == pytest.approx(policy[:, 0].tolist(), rel=1e-5)
    assert [row["rejected_tokens"] for row in rows] == tokens[:, 1].tolist()


@pytest.mark.slow
def test_several_devices_measure_the_same(there, tmp_path, capsys):
    one, eight = tmp_path / "one.json", tmp_path / "eight.json"
    assert evaluate(capsys, there, one)[0] == 0
    assert evaluate(capsys, there, eight, "--mesh", "data=2,fsdp=2,tensor=2")[0] == 0
    assert quantities(eight) == pytest.approx(quantities(one), rel=1e-5, abs=1e-6)
    status, _, err = evaluate(capsys, there, eight, "--mesh", "data=8", "--batch-size", "4")
    one_message(status, err, "evaluate", "`--batch-size` must be a multiple of data * fsdp = 8")
    status, _, err = evaluate(capsys, there, eight, "--mesh", "data=3")
    one_message(status, err, "evaluate", "`--mesh` must have as many places as there are devices")


def test_nothing_to_compare_with(there, tmp_path, capsys):
    status, _, err = evaluate(capsys, there, tmp_path / "o", "--beta", "1", reference=None)
    one_message(status, err, "evaluate", "`--beta` scales rewards against a reference")
    status, _, err = evaluate(capsys, there, tmp_path / "o", model=there / "adapter")
    one_message(status, err, "evaluate", "holds adapters and no model. Give the model")


def test_another_vocabulary(there, tmp_path, capsys, models):
    status, _, err = evaluate(
        capsys, there, tmp_path / "o", model=models("llama"), reference=models("qwen3")
    )
    one_message(status, err, "evaluate", "has 512 tokens")
    assert "`--reference` must have the vocabulary of `--model`" in err
    # One size, but other tokens.
    other = tmp_path / "other"
    moved(models("llama"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    tokens["the"], tokens["to"] = 1000, 1001
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    status, _, err = evaluate(capsys, there, tmp_path / "o", model=models("llama"), reference=other)
    one_message(status, err, "evaluate", "their tokenizers differ")


BAD = {
    "no data": (["--data", "nowhere.jsonl"], "there is no `nowhere.jsonl`"),
    "no model": (["--model", "nowhere"], "there is no folder 'nowhere'"),
    "no folder": (["--output", "no/where.json"], "`--output` must be a file in a folder"),
    "a folder": (["--per-pair", "."], "`--per-pair` must be a file to write"),
    "beta": (["--beta", "0"], "`--beta` must be positive; got 0.0"),
    "batch": (["--batch-size", "-1"], "`--batch-size` must be positive; got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, there, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, words = BAD[case]
    status, _, err = evaluate(capsys, there, "out.json", *flags)
    one_message(status, err, "evaluate", words)
    assert not list(tmp_path.glob("*.json"))


def test_single_completions(there, tmp_path, capsys):
    record = {"prompt_ids": [1], "completion_ids": [2], "label": True}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    status, _, err = evaluate(capsys, tmp_path, tmp_path / "o", model=there / "policy")
    one_message(status, err, "evaluate", "`--data` must hold pairs")
