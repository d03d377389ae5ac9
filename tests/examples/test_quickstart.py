"""The quickstart itself: its numbers against ones made another way, bad files, and whole runs."""

import gzip
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quickstart
from support import exam, show

import dpo_eqx as dpx

SCRIPT = Path(quickstart.__file__)


class Sums(eqx.Module):
    """Logits from the sum of the vectors of all tokens up to here: causal, and quick to compile."""

    vectors: jax.Array

    def __call__(self, ids):
        return jnp.cumsum(self.vectors[ids], axis=0)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_kl_equals_a_loop_over_rows_and_positions():
    policy, reference = (
        Sums(jax.random.normal(jax.random.key(i), (7, 7), "float32")) for i in (0, 1)
    )
    rng, lengths, widths = np.random.default_rng(0), [(1, 1), (3, 4), (2, 0)], (3, 4)
    ids = [rng.integers(0, 7, (3, width), np.int32) for width in widths]
    counts = zip(*lengths, strict=True)
    masks = [np.arange(w) < np.array(n)[:, None] for w, n in zip(widths, counts, strict=True)]
    prompt, completion = (dpx.Tokens(*x) for x in zip(ids, masks, strict=True))
    expected = []
    for row, (before, after) in enumerate(lengths):
        text = np.concatenate([prompt.ids[row, :before], completion.ids[row, :after]])
        p, q = (log_softmax(np.asarray(m(text), np.float64)) for m in (policy, reference))
        here = slice(before - 1, before - 1 + after)
        expected.append((np.exp(p) * (p - q)).sum(axis=-1)[here].sum())
    assert max(expected) > 0.1
    np.testing.assert_allclose(
        exam.kl(policy, reference, prompt, completion), expected, rtol=1e-5, atol=1e-6
    )


def test_best_possible_is_the_tilted_distribution_of_normal_rewards():
    # Rewards of a standard normal: tilted by t their mean is t and the KL is t^2 / 2.
    quantile = statistics.NormalDist().inv_cdf
    rewards = np.array([quantile((i + 0.5) / 50_000) for i in range(50_000)])
    kls, means = map(np.array, exam.best_possible(rewards))
    assert kls[0] == pytest.approx(0, abs=1e-12)
    early = kls < 2
    assert early.sum() > 15
    np.testing.assert_allclose(kls[early], means[early] ** 2 / 2, rtol=0.01, atol=1e-4)


def test_batches_hold_every_row_once_an_epoch():
    batches = quickstart.random_batches(10, 4, 5, seed=0)
    assert [len(rows) for rows in batches] == [4] * 5
    rows = np.concatenate(batches)
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(rows[10:])
    assert [len(rows) for rows in quickstart.random_batches(3, 4, 2, seed=0)] == [3, 3]


def test_wilson_interval():
    # Wilson 1927, as computed by hand: 8 of 10.
    low, high = show.wilson(0.8, 10, z=1.96)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert show.wilson(0.0, 5)[0] == pytest.approx(0, abs=1e-12)


def test_moving_average():
    assert show.moving_average([1.0, 2.0, 6.0, 7.0], window=2) == [1.0, 1.5, 4.0, 6.5]


def test_table_of_before_and_after():
    before = {"rewards/accuracies": 0.5, "rewards/margins": 0.0, "kl": 0.0, "kl_error": 0.0}
    after = {"rewards/accuracies": 0.8, "rewards/margins": 1.25, "kl": 3.0, "kl_error": 0.5}
    lines = show.report([before, after], 10).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "preference accuracy",
        "reward margin",
        "KL to the reference (nats)",
    ]
    assert lines[2].endswith("0.500  0.800 (0.49 to 0.94)")
    assert lines[4].endswith("3.00 ± 0.98")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "must hold at least 2 usable pairs, .* it holds 0"),
        ('{"chosen": "a", "rejected": "b"}\n', "must hold at least 2 usable pairs, .* it holds 1"),
    ],
)
def test_a_file_without_pairs_gives_one_message_and_status_2(tmp_path, capsys, text, message):
    path = tmp_path / "pairs.jsonl"
    if text is not None:
        path.write_text(text)
    assert quickstart.main(["--data", str(path)]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert str(path) in told
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(told)


@pytest.mark.parametrize("steps", ["0", "-1", "x"])
def test_steps_must_be_positive(capsys, steps):
    with pytest.raises(SystemExit, match="2"):
        quickstart.main([f"--steps={steps}"])
    assert f"must be a positive whole number; got '{steps}'" in capsys.readouterr().err


def test_a_picture_needs_a_folder(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        quickstart.main([f"--output={tmp_path / 'none' / 'x.png'}"])
    assert "`--output` must be in a folder that exists" in capsys.readouterr().err


def run(*arguments, without=()):
    """The script as users run it: another process, without the settings of the tests."""
    hide = "".join(f"sys.modules[{name!r}] = None;" for name in without)
    code = (
        f"import sys, runpy; {hide} sys.path.insert(0, {str(SCRIPT.parent)!r});"
        f"sys.argv = {[str(SCRIPT), *map(str, arguments)]!r};"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.slow  # compiling takes most of the time
def test_a_short_run_on_reviews(tmp_path):
    picture = tmp_path / "picture.png"
    done = run("--steps", 20, "--fit-steps", 60, "--output", picture)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "DPO  1/20  loss 0.693  accuracy 0.500  margin 0.000" in done.stdout
    rows = {line[:26].strip(): line[26:].split() for line in done.stdout.splitlines()}
    accuracy = float(rows["preference accuracy"][1])
    assert accuracy > 0.53
    assert float(rows["reward margin"][1]) > 0
    assert rows["KL to the reference (nats)"][:3] == ["0.00", "±", "0.00"]
    before, after = (float(rows["mean gold reward"][i]) for i in (0, 3))
    assert math.isfinite(before)
    assert after > before
    assert done.stdout.count("\n  before  ") == done.stdout.count("\n  after   ") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # compiling takes most of the time
def test_a_short_run_on_a_file_without_the_extras(tmp_path):
    path, picture = tmp_path / "pairs.jsonl.gz", tmp_path / "picture.png"
    rows = [{"chosen": f"Q{i}: {'yes ' * i}", "rejected": f"Q{i}: no"} for i in range(1, 12)]
    lines = [json.dumps(row) for row in rows]
    path.write_bytes(gzip.compress("\n".join([*lines[:3], "{", *lines[3:]]).encode()))
    steps = ("--steps", 2, "--fit-steps", 2)
    done = run("--data", path, *steps, "--output", picture, without=["rich", "matplotlib"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"{path}:4: The line is not JSON")
    assert len(done.stderr.splitlines()) == 1
    assert "12 lines read: 11 pairs, 0 blank, 1 faulty." in done.stdout
    assert "9 pairs are trained on, 2 held out." in done.stdout
    assert "Left out: bars and colours (rich), the picture (matplotlib)." in done.stdout
    assert 'pip install ".[examples]"' in done.stdout
    assert not picture.exists()
