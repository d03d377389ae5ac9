"""Several processes, one run: the weights of a single process, and no survivor that hangs."""

import signal
import time

import pytest

from ..cli.runs import lines_of
from ..cli.small import write_data
from .processes import Processes, check_same


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process leaves, on one device."""
    with Processes(tmp_path_factory.mktemp("single"), 1) as processes:
        return processes.finish()


def test_two_processes(tmp_path, single):
    with Processes(tmp_path, 2, mesh="data=2,fsdp=2") as processes:
        check_same(processes.finish(), single)
    for log in processes.logs:
        assert "All 2 processes train together" in log.read_text()
        assert "the runtime ends them too" in log.read_text()
    assert "step" not in processes.logs[1].read_text().split("--resume.", 1)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, {}),
        (2, {"mesh": "fsdp=4", "microbatches": 2}),
        # All processes need the same rows.
        (2, {"mesh": "tensor=4"}),
        (4, {"mesh": "fsdp=8"}),
        # Two and two processes need the same rows.
        (4, {"mesh": "data=2,tensor=4"}),
        (4, {"mesh": "data=2,fsdp=2,tensor=2"}),
        (1, {"mesh": "fsdp=2"}),
    ],
)
def test_processes_and_meshes(tmp_path, single, count, settings):
    with Processes(tmp_path, count, **settings) as processes:
        check_same(processes.finish(), single)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_rank": 2, "learning_rate": 1.0, "dropout": True},
        {"loss": ("aot",), "optimizer": "adamw", "learning_rate": 1e-3},
        {"eval_every": 5, "sync_reference_every": 3},
        {"buckets": 2, "report": True},
        # All pairs in one batch, so that the devices change nothing but the empty rows.
        {"pack": True, "batch_size": 30},
    ],
)
def test_settings_over_processes(tmp_path, settings):
    if "eval_every" in settings:
        settings = {**settings, "eval_data": write_data(tmp_path / "eval.jsonl", 5, 1)}
    with Processes(tmp_path, 1, name="alone", **settings) as processes:
        alone = processes.finish()
    with Processes(tmp_path, 2, mesh="data=2,fsdp=2", **settings) as processes:
        check_same(processes.finish(), alone)
    if "eval_every" in settings:
        pairs = zip(
            *(lines_of(run, "eval.jsonl") for run in (alone, processes.output)), strict=True
        )
        for want, got in pairs:
            assert got == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_a_reference_computed_once_that_only_one_process_finds(tmp_path):
    """To compute it takes all of them, its parameters being spread over them."""
    warm, cold = ({"cache": tmp_path / name} for name in ("warm", "cold"))
    settings = {"precompute_reference": True}
    with Processes(tmp_path, 1, name="alone", **warm, **settings) as processes:
        alone = processes.finish()
    with Processes(tmp_path, 2, mesh="fsdp=4", each={0: warm, 1: cold}, **settings) as processes:
        check_same(processes.finish(), alone)
    found = [{path.name for path in given["cache"].iterdir()} for given in (warm, cold)]
    assert found[0] == found[1], "the same content has the same name on one device and on four"


@pytest.mark.slow
def test_killed_and_resumed_on_another_mesh(tmp_path, single):
    """Two processes are killed, four go on and are killed, and one ends the run."""
    for count, mesh, step in [(2, "data=2,fsdp=2", 5), (4, "fsdp=4,tensor=2", 9)]:
        with Processes(tmp_path, count, mesh=mesh) as processes:
            processes.until_step(step)
            for process in processes.all:
                process.kill()
        assert not (processes.output / "model").exists(), "ended before it could be killed"
    with Processes(tmp_path, 1) as processes:
        check_same(processes.finish(), single)
    assert [line["step"] for line in lines_of(processes.output)] == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_no_survivor_hangs(tmp_path, victim, how, count, devices):
    """One process is killed, or only stops to answer."""
    settings = {"steps": 100000, "save_every": 0, "mesh": "fsdp=4", "devices": devices}
    with Processes(tmp_path, count, **settings) as processes:
        processes.until_step(3)
        processes.all[victim].send_signal(how)
        began = time.monotonic()
        others = [process for i, process in enumerate(processes.all) if i != victim]
        statuses = [process.wait(60) for process in others]
        print(
            f"{how.name} to process {victim} of {count}: the others ended after "
            f"{time.monotonic() - began:.1f} s with {statuses}"
        )
        assert 0 not in statuses


@pytest.mark.slow
def test_a_signal_to_one_stops_all(tmp_path, single):
    with Processes(tmp_path, 2, steps=100000, mesh="fsdp=4") as processes:
        processes.until_step(3)
        processes.all[1].send_signal(signal.SIGTERM)
        assert processes.wait(60) == [0, 0], processes.words()
    words = processes.logs[0].read_text()
    step = lines_of(processes.output)[-1]["step"]
    assert f"stopped by SIGTERM after step {step}; continue with --resume" in words
    assert (processes.output / "checkpoints" / str(step)).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "each", "message"),
    [
        (
            {},
            {1: {"beta": 0.2}},
            "they disagree on `beta`: None on process 0, 0.2 on process 1",
        ),
        (
            {},
            {1: {"num_processes": 3}},
            "they disagree on `num_processes`: 2 on process 0, 3 on process 1",
        ),
        (
            {"mesh": "data=3"},
            {},
            "as many places as there are devices, 4; data=3 * fsdp=1 * tensor=1 makes 3",
        ),
        ({"batch_size": 6, "mesh": "data=4"}, {}, "a multiple of data * fsdp = 4"),
        (
            {},
            {1: {"data": "missing.jsonl"}},
            "process 1: ",
        ),
        ({"mesh": "tensor=6", "devices": 3}, {}, "axis 1 of `layers.attention"),
    ],
)
def test_one_clear_message_on_every_process(tmp_path, settings, each, message):
    with Processes(tmp_path, 2, each=each, **settings) as processes:
        statuses = processes.wait(60)
    for log in processes.logs:
        assert message in log.read_text(), processes.words()
        assert "Traceback" not in log.read_text()
    assert statuses == [2, 2]
    assert not processes.output.exists()
