"""The files of `examples/cluster/` use flags that `dpo-eqx train` has."""

import re
import shlex

import pytest
import yaml

from dpo_eqx.cli.settings.parse import parse

from .fences import ROOT

FOLDER = ROOT / "examples" / "cluster"


def arguments_in(text):
    """The arguments of the one `dpo-eqx train` in a text, with a number for each variable."""
    (line,) = re.findall(r"dpo-eqx train (.*)", text.replace("\\\n", " "))
    return shlex.split(re.sub(r'"?\$\{?\w+\}?"?', "7", line).replace('"', ""))


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_pod.sh", "kubernetes.yaml"])
def test_the_flags_are_those_of_the_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config in ("7", "run.yaml"):
        (tmp_path / config).write_text("model: base\ndata: preferences.jsonl\n")
    text = (FOLDER / name).read_text()
    if name.endswith("yaml"):
        service, job = yaml.safe_load_all(text)
        pod = job["spec"]["template"]["spec"]
        assert pod["subdomain"] == service["metadata"]["name"]
        text = pod["containers"][0]["args"][0]
    settings = parse(arguments_in(text))
    assert settings.resume
    assert settings.coordinator in ("auto", "dpo-0.dpo:1234")
    if name.endswith("yaml"):
        assert settings.num_processes == job["spec"]["completions"] == job["spec"]["parallelism"]
