"""The commands on a mesh with the axis `expert`: they do the same as on one device."""

import json

import jax
import numpy as np
import pytest

from dpo_eqx import models
from dpo_eqx.cli import main

from .interrupted import at_line, terminate
from .runs import lines_of, weights_of, with_tokenizer
from .small import small, write_data
from .test_online import online

MESH = "fsdp=2,expert=4"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a mixture of 8 experts in float32, and a tokenizer."""
    folder = tmp_path_factory.mktemp("mixture")
    like = models.load(with_tokenizer("llama", folder / "llama"))
    config = models.Config(
        vocab=like.config.vocab, width=16, layers=2, heads=4, key_heads=2, feed_forward=24,
        experts=8, experts_per_token=2, family="mixtral", tied=False,
    )  # fmt: skip
    policy = models.Transformer(config, key=jax.random.key(0), origin=like.origin)
    models.save(policy, folder / "mixture")
    return folder / "mixture"


def check_close(folder, names):
    """Asserts that `one` and `mesh` in the folder hold nearly the same metrics and weights."""
    one, mesh = folder / "one", folder / "mesh"
    for here, there in zip(lines_of(one), lines_of(mesh), strict=True):
        for name in names:
            assert abs(here[name] - there[name]) < 1e-4, name
    one, mesh = weights_of(one), weights_of(mesh)
    assert one.keys() == mesh.keys()
    assert max(np.abs(one[name] - mesh[name]).max() for name in one) < 1e-4


@pytest.mark.slow
def test_training_that_goes_on_without_the_axis(mixture, tmp_path, monkeypatch):
    write_data(tmp_path / "data.jsonl", 32)
    given = {"model": mixture, "batch_size": 16, "microbatches": 2, "remat": True, "dropout": False}
    assert small(tmp_path, output=tmp_path / "one", **given) == 0
    with monkeypatch.context() as patch:
        at_line(patch, 3, terminate)
        assert small(tmp_path, output=tmp_path / "mesh", mesh=MESH, **given) == 0
    assert small(tmp_path, output=tmp_path / "mesh", mesh="data=8", resume=True, **given) == 0
    check_close(tmp_path, ("loss", "grad_norm", "logps/chosen"))


@pytest.mark.slow
def test_adapters_of_a_quantised_mixture(mixture, tmp_path):
    write_data(tmp_path / "data.jsonl", 32)
    given = {"model": mixture, "batch_size": 8, "quantize": "nf4", "lora_rank": 2}
    given |= {"lora_target": "feed_forward|attention", "steps": 4, "dropout": False}
    assert small(tmp_path, output=tmp_path / "one", **given) == 0
    assert small(tmp_path, output=tmp_path / "mesh", mesh=MESH, **given) == 0
    check_close(tmp_path, ("loss", "grad_norm", "logps/chosen"))


@pytest.mark.slow
def test_rounds_of_online(mixture, tmp_path):
    more = {"batch_size": 8, "how": "all", "steps": 3, "dtype": "float32"}
    assert online(tmp_path, mixture, output=tmp_path / "one", **more) == 0
    assert online(tmp_path, mixture, output=tmp_path / "mesh", mesh=MESH, **more) == 0
    check_close(tmp_path, ("loss", "reward", "length", "kl"))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_sampling_and_planning(mixture, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("Why?\nWhat is 2 + 2?\nSo\n")
    drawn = {}
    for name, mesh in {"one": [], "mesh": ["--mesh", MESH]}.items():
        given = ["--policy", mixture, "--prompts", tmp_path / "p.txt", "--output", tmp_path / name]
        flags = ["--samples", 2, "--max-new-tokens", 5, "--batch-size", 8, *mesh]
        assert main(["sample", *map(str, given + flags)]) == 0
        drawn[name] = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    assert [line["answers"] for line in drawn["one"]] == [line["answers"] for line in drawn["mesh"]]
    flags = ["--target", "cpu:8", "--batch-size", 16, "--max-length", 32]
    for mesh in (MESH, "expert=4,tensor=2"):
        assert main(["plan", *map(str, ["--model", mixture, "--mesh", mesh, *flags])]) == 0
    capsys.readouterr()
    assert main(["plan", *map(str, ["--model", mixture, "--mesh", "expert=16", *flags])]) == 2
    assert "as there are devices, 8" in capsys.readouterr().err
