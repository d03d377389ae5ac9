"""The benchmark suite at sizes that take no time: that it runs, and that its arithmetic is right.

What it measures is not judged here, and systems that are not installed are left out.
"""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import accelerator, compiled, large, lengths, memory, parts, recurrent, sample, step
from benchmarks.peers import ours, plain_jax
from benchmarks.problem import (
    Problem,
    floor_flops,
    hf_config,
    tensor_shapes,
    token_ids,
    weights,
    write_checkpoints,
)
from benchmarks.turns import Turns
from benchmarks.workers import Worker, WorkerError, alternate, started
from dpo_eqx import models

from .pages.as_users import as_users

TINY = step.quick(Problem())


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """The benchmarks are in float32 with JAX's usual promotion, unlike the tests."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with as_users():
        yield


def three_losses(training) -> list[float]:
    """What `training` of a peer makes, run as far as the systems are compared."""
    train, (frozen, policy, opt_state) = training
    losses = []
    for _ in range(3):
        policy, opt_state, seen = train(frozen, policy, opt_state)
        losses.append(float(seen["loss"] if isinstance(seen, dict) else seen))
    return losses


@pytest.fixture
def implicit_ranks():
    """Plain JAX is written as most users write it: with vectors that broadcast."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("implicit_ranks")
def test_ours_and_plain_jax_have_the_same_losses(tmp_path):
    write_checkpoints(TINY, tmp_path)
    files = [tmp_path / name for name in ("policy", "reference")]
    llamas = (plain_jax.Llama(load_file(file / "model.safetensors"), TINY) for file in files)
    seen = three_losses(ours.training(TINY, *map(models.load, files)))
    assert step.agree(seen, three_losses(plain_jax.training(TINY, *llamas)), TINY)
    assert abs(seen[0] - np.log(2)) > 1e-3


WORKER = """
from benchmarks.turns import Turns
turns, losses = Turns(version="none"), iter(range(9))
turns.begin()
while turns.step_done(float(next(losses))):
    pass
"""


def test_a_worker_answers_in_turns_and_has_a_row(tmp_path, monkeypatch):
    (tmp_path / "system.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with started("torch", "system", TINY, tmp_path) as worker:
        worker.warm_up()
        alternate([worker], rounds=2, steps=2)
    assert worker.losses == [0, 1, 2]
    assert len(worker.times) == 4
    row = step.row(worker, {"torch": worker}, TINY, rate=1e9)
    shown = step.table([row, row | {"same": False}]).splitlines()
    assert "| 0.000000 1.000000 2.000000 | yes  | none " in shown[2]
    assert "| NO   | none " in shown[3]
    assert row["of torch"] == 1
    assert "of trl" not in shown[0]


@pytest.mark.slow
def test_step_prints_a_table_in_which_the_losses_agree(capsys, tmp_path):
    path = tmp_path / "seen.json"
    step.main(["--quick", "--rounds", "2", "--steps", "1", "--json", str(path)])
    out = capsys.readouterr().out
    rows = {row["system"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"ours", "plain_jax"}
    assert all(row["same"] for row in rows.values())
    assert "| ours " in out
    assert "Not measured" not in out


def test_a_system_that_fails_is_told_of(tmp_path):
    with (
        started("none", "benchmarks.peers.none", TINY, tmp_path) as worker,
        pytest.raises(WorkerError, match="none ended without an answer"),
    ):
        worker.warm_up()


@pytest.mark.slow
@pytest.mark.usefixtures("implicit_ranks")
def test_memory_prints_what_is_planned(capsys):
    memory.main(["--quick", "--lengths", "8"])
    last = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert last[0] == "8"
    assert all(float(cell) >= 0 for cell in (last[1], last[2], last[4]))


@pytest.mark.slow
def test_lengths_fits_a_line(capsys):
    lengths.main(["pairs", "--quick", "--rounds", "1"])
    assert "s x pairs; the worst row is" in capsys.readouterr().out


@pytest.mark.slow
def test_parts_prints_a_row_for_each(capsys):
    sizes = "--vocab 97 --width 16 --layers 2 --heads 2 --prompt 6 --completion 5 --pairs 2"
    parts.main([*sizes.split(), "--rounds", "1"])
    assert "| unembedding, and backward | 0." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("implicit_ranks")
def test_recurrent_prints_how_much_faster_the_state_is(capsys):
    sizes = "--vocab 31 --width 8 --layers 1 --prompt 6 --completion 3 --pairs 2 --rounds 1"
    recurrent.main(sizes.split())
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows][1::2] == [
        "| gradient, by the state",
        "| drawing, by the state",
    ]


@pytest.mark.slow
def test_accelerator_prints_tokens_per_second(capsys):
    systems = ["--systems", "ours,ours_unfused,plain_jax"]
    accelerator.main(["--quick", "--shapes", "tiny-qwen3", "--steps", "1", "--remat", *systems])
    out = capsys.readouterr().out
    assert "| tiny-qwen3 | ours_unfused | " in out
    assert "| tiny-qwen3 | plain_jax    | " in out
    assert "Not measured" not in out


@pytest.mark.slow
@pytest.mark.usefixtures("implicit_ranks")
def test_compiled_prints_a_row_for_each_system(capsys):
    compiled.main(["--quick"])
    head, _, *rows = capsys.readouterr().out.splitlines()[-4:]
    ours, plain = (dict(zip(head.split(" | "), row.split(" | "), strict=True)) for row in rows)
    assert float(plain["of plain"]) == 1
    # Both prompts of a pair are computed, and the logits of all positions.
    assert 1 < float(ours["done / needed"]) < float(plain["done / needed"])
    assert 0 < float(ours["accessed GB"]) < float(plain["accessed GB"])
    # One device has no ring.
    assert (ours["collectives"], ours["of the ring"]) == ("0", "")


def test_compiled_says_what_could_not_be_compiled():
    rows = [compiled.Row("big", "v5e", system, "too large", 1.0) for system in ("ours", "plain")]
    _, _, *lines = compiled.table(rows).splitlines()
    assert lines[0] == "| big | v5e | ours | not compiled: too large |"
    assert len(lines) == 2


@pytest.mark.slow
def test_sample_prints_a_row_for_each_system_and_point(capsys):
    sample.main(["--quick"])
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| 6")]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [
        ["6", batch, system] for batch in "12" for system in ("ours", "plain_jax")
    ]
    first, second = out.splitlines()[-1].removeprefix("checksums: ").split(", ")
    assert first.split()[1] == second.split()[1]
    sample.main(["--quick", "--top-p", "0.9"])
    # The loop of plain JAX is greedy.
    assert "plain_jax" not in capsys.readouterr().out


def test_the_times_of_a_point_are_those_of_its_calls():
    drawing = sample.Drawing(batches=(1, 2), prompts=(3, 5), new=7, rounds=2)
    calls = list(drawing.calls())
    worker = Worker("none", None, None)
    # The time of a call is its number among all calls; those of the warm-up are not in `times`.
    worker.times = [float(number) for number in range(len(calls))][sample.WARM_UP :]
    for point, (batch, prompt) in enumerate(drawing.points):
        for time, new in zip(sample.seconds(worker, drawing, point), (1, 7), strict=True):
            at = [number for number, call in enumerate(calls) if call == (batch, prompt, new)]
            assert time == np.mean(at[-2:])
    assert len(calls) == sample.WARM_UP + 2 * 3 * 4


def test_the_floors_of_drawing_count_the_weights():
    drawing = sample.Drawing(layers=3, vocab=100, width=8, feed_forward=20, new=16)
    shapes = tensor_shapes(drawing.problem)
    matrices = {name: np.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    embedding, head = matrices.pop("model.embed_tokens.weight"), matrices["lm_head.weight"]
    assert embedding == head
    assert sample.weights_read(drawing) == sum(matrices.values())
    # So slow at arithmetic that only the products count, and then so slow at reading.
    first, token = sample.floors(drawing, 2, 10, rate=1.0, bandwidth=1e30)
    layers = sum(matrices.values()) - head
    assert first == 2 * 2 * (10 * layers + head)
    assert token == 2 * 2 * sum(matrices.values()) + 2 * 2 * 2 * 18 * 8 * 3
    _, token = sample.floors(drawing, 2, 10, rate=1e30, bandwidth=1.0)
    assert token == 4 * (sum(matrices.values()) + 2 * 2 * 18 * 8 * 3)


def test_the_line_goes_through_its_points():
    begin, slope, off = lengths.straight_line([1, 2, 4], [0.5, 0.7, 1.1])
    np.testing.assert_allclose([begin, slope, off], [0.3, 0.2, 0.0], atol=1e-12)


def test_the_floor_is_what_the_products_with_weights_cost():
    problem = Problem()
    matrices = {name: shape for name, shape in tensor_shapes(problem).items() if len(shape) == 2}
    body = sum(
        shape[0] * shape[1] for name, shape in matrices.items() if name.startswith("model.layers")
    )
    forward = 2 * 4 * (3 * 128 * body + 2 * 128 * 32000 * 256)
    assert floor_flops(problem) == 4 * forward
    assert sum(parts.forward_flops(problem)) == forward
    precomputed = dataclasses.replace(problem, precomputed=True)
    assert floor_flops(precomputed) == 3 * forward
    assert parts.forward_flops(precomputed) == parts.forward_flops(problem)
    assert round(floor_flops(problem) / 1e9) == 106


def test_the_arithmetic_of_a_real_model_counts_its_weights():
    """With attention taken off, it is what the floor says of a llama of that shape."""
    case = large.Case(shape="tiny-llama", pairs=2, prompt=8, completion=6)
    config = models.read_config(large.SHAPES["tiny-llama"])
    inner = config.heads * config.head_width
    layer = 2 * config.width * (inner + config.key_heads * config.head_width)
    layer += 3 * config.width * config.feed_forward
    products = 2 * (2 * 20 * config.layers * layer + 2 * 12 * config.width * config.vocab)
    rows = [(8, 0)] + [(6, 8)] * 2  # how many tokens, and how many before them that they see
    seen = sum(before + i + 1 for count, before in rows for i in range(count))
    attention = 2 * 2 * seen * inner * config.layers * 2
    assert large.flops(case) == 4 * (products + attention)


def test_every_system_is_given_the_same():
    ids = token_ids(TINY)
    assert {name: rows.shape for name, rows in ids.items()} == {
        "prompt": (2, 6),
        "chosen": (2, 5),
        "rejected": (2, 5),
    }
    assert all((ids[name][:, -1] == 2).all() for name in ("chosen", "rejected"))
    again = weights(TINY)
    assert all((again[name] == tensor).all() for name, tensor in weights(TINY).items())
    config = models.read_config(hf_config(TINY))
    assert (config.width, config.layers, config.heads) == (16, 2, 2)


def test_turns_stop_where_nothing_more_is_asked(monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n"))
    monkeypatch.setattr("os.dup2", lambda *_: None)
    turns = Turns(version="none")
    turns.begin()
    steps = 1
    while turns.step_done(float(steps)):
        steps += 1
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [answer["losses"] for answer in answers] == [[1, 2, 3], [4, 5]]
    assert all(answer["peak"] > 0 and answer["version"] == "none" for answer in answers)
