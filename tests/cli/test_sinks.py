"""Where metrics go, and what is shown: files that are cut and go on, TensorBoard, W&B, lines."""

import io
import json
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from dpo_eqx.cli.run.folder import Folder
from dpo_eqx.cli.run.sinks import cut_after, json_lines, open_sinks
from dpo_eqx.cli.settings.settings import Settings
from dpo_eqx.cli.terminal import display


def test_lines_are_on_disk_at_once_and_have_no_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with json_lines(path, 0) as write:
        write(1, {"loss": 0.5})
        assert path.read_text() == '{"step": 1, "loss": 0.5}\n'
        write(2, {"loss": float("nan")})
    assert path.read_text().splitlines()[1] == '{"step": 2, "loss": null}'


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', '{"step": 2}', "\x00\x00"])
def test_cutting(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3))
    path.write_text(whole + tail)
    cut_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    cut_after(tmp_path / "none.jsonl", 2)


def settings(tmp_path, **given):
    return Settings(model="m", data=("d",), output=tmp_path, **given)


def scalars(folder):
    """What TensorBoard's own files hold: step, name and value."""
    found = []
    for file in sorted(folder.glob("events*")):
        content = io.BytesIO(file.read_bytes())
        while header := content.read(12):
            event = Event.FromString(content.read(int.from_bytes(header[:8], "little")))
            content.read(4)
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.tag]
    return found


SAMPLES = [
    {"prompt": "Why <b>?\nSo?", "answer": "a | b", "reference": None},
    {"prompt": "How?", "answer": "c", "reference": "d"},
]


def test_lines_of_samples_come_once(tmp_path):
    folder = Folder(tmp_path)
    given = settings(tmp_path)
    for start, steps in ((0, (2, 4)), (3, (4, 6))):
        with open_sinks(given, folder, start) as sinks:
            for step in steps:
                sinks.samples(step, SAMPLES)
    lines = [json.loads(line) for line in folder.samples.read_text().splitlines()]
    assert lines == [{"step": step, **sample} for step in (2, 4, 6) for sample in SAMPLES]


def test_no_samples_no_file(tmp_path):
    with open_sinks(settings(tmp_path), Folder(tmp_path), 0):
        pass
    assert not Folder(tmp_path).samples.exists()


def test_tensorboard(tmp_path):
    folder = Folder(tmp_path)
    with open_sinks(settings(tmp_path, log=("tensorboard",)), folder, 0) as sinks:
        sinks.training(1, {"loss": 0.5})
        sinks.evaluation(1, {"eval/loss": 0.25})
        sinks.samples(2, SAMPLES)
    *numbers, (step, tag, _) = scalars(folder.tensorboard)
    assert numbers == [(1, "loss", 0.5), (1, "eval/loss", 0.25)]
    assert (step, tag) == (2, "samples/text_summary")
    (file,) = folder.tensorboard.glob("events*")
    table = "| prompt | answer | reference |\n| --- | --- | --- |\n"
    table += "| Why &lt;b&gt;?<br>So? | a &#124; b |  |\n| How? | c | d |"
    assert table.encode() in file.read_bytes()
    assert json.loads(folder.evaluations.read_text()) == {"step": 1, "eval/loss": 0.25}


def test_wandb(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self):
            calls.append("finish")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    wandb = types.ModuleType("wandb")
    monkeypatch.setattr(wandb, "init", init, raising=False)
    monkeypatch.setattr(wandb, "Table", dict, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = Folder(tmp_path)
    given = settings(tmp_path, log=("wandb",), beta=0.2)
    folder.begin(given, {"data": {}}, 0)
    for start in (0, 1):
        folder.begin(given, {"data": {}}, start)
        with open_sinks(given, folder, start) as sinks:
            sinks.training(start + 1, {"loss": 0.5})
            sinks.samples(start + 1, SAMPLES)
    first, *rest = calls
    assert first["config"]["beta"] == "0.2"
    assert first["resume"] == "allow"
    table = {"columns": ["step", "prompt", "answer", "reference"]}
    table["data"] = [[1, "Why <b>?\nSo?", "a | b", None], [1, "How?", "c", "d"]]
    assert rest[:3] == [(1, {"loss": 0.5}), (1, {"samples": table}), "finish"]
    assert rest[3]["id"] == first["id"], "one run, whatever the number of its parts"


def test_plain_lines(capsys):
    with display.display(0, 100) as show:
        for step in range(1, 101):
            show(step, {"loss": 0.5, "rewards/margins": 1.0, "tokens_per_second": 1234.5})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    shown = [int(line.split("/")[0].removeprefix("step")) for line in lines]
    assert shown == [1, *range(5, 101, 5)]
    assert lines[0].startswith("step   1/100  loss 0.5000  margin 1.0000  1,234 tok/s  0:0")


def test_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with display.display(2, 4) as show:
        show(3, {"loss": 0.5})
        show(4, {"loss": 0.25})
    assert "4/4" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (125, "2:05"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert display.duration(seconds) == text
