"""Optimisers and schedules of the command: against NumPy, in whole runs, and when resumed."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, losses, models
from dpo_eqx.cli.commands import train as command
from dpo_eqx.cli.compose.optimizer import (
    compose_optimizer,
    compose_schedule,
    learning_rates,
    matrices,
)
from dpo_eqx.cli.run.state import State, evaluated
from dpo_eqx.cli.settings.check import check
from dpo_eqx.cli.settings.settings import Settings

from .interrupted import check_resumes_with_the_same_bits
from .runs import lines_of, weights_of
from .small import MODEL, small, write_data

RATE, FLOOR = 0.5, 0.125


def settings(**given):
    return Settings(model="m", data=("d",), output=Path("o"), **given)


def rates(total, **given):
    given = settings(learning_rate=RATE, **given)
    check(given)
    return learning_rates(compose_schedule(given, total), total)


def wanted(name, step, total, warmup, floor, decay):
    """The learning rate of one step, by its definition."""
    if step < warmup:
        return RATE * step / warmup
    done, rest = step - warmup, total - warmup
    if name == "inverse_sqrt":
        timescale = warmup or 10_000
        return max(RATE * np.sqrt(timescale / (timescale + done)), floor)
    if name == "cosine":
        return floor + (RATE - floor) * (1 + np.cos(np.pi * done / rest)) / 2
    # A linear schedule is one that decays over all of its steps.
    length = decay if name == "wsd" else rest
    return floor + (RATE - floor) * min((total - step) / length, 1)


@pytest.mark.parametrize("name", ["linear", "cosine", "inverse_sqrt", "wsd"])
@pytest.mark.parametrize("floor", [0.0, FLOOR])
@pytest.mark.parametrize(
    ("total", "warmup", "decay"),
    [
        (12, 3, 4),
        (12, 0, 4),
        (12, 8, 4),
        (12, 12, None),
        (12, 20, None),
        (1, 0, None),
        (31, 1, None),
    ],
)
def test_schedules(name, floor, total, warmup, decay):
    given = {"schedule": name, "min_learning_rate": floor, "warmup_steps": warmup}
    given |= {"decay_steps": decay} if name == "wsd" else {}
    # A tenth of the steps, rounded up.
    decay = decay or -(-total // 10)
    want = [wanted(name, step, total, warmup, floor, decay) for step in range(total)]
    np.testing.assert_allclose(rates(total, **given), want, rtol=1e-12)


@pytest.mark.parametrize(("ratio", "warmup"), [(0.0, 0), (0.25, 3), (0.21, 3), (1.0, 12)])
def test_the_warmup_ratio_is_rounded_up_to_steps(ratio, warmup):
    got = rates(12, schedule="cosine", warmup_ratio=ratio)
    assert np.array_equal(got, rates(12, schedule="cosine", warmup_steps=warmup))


def test_a_schedule_free_optimiser_has_no_decay():
    got = rates(6, optimizer="schedule_free_adamw", warmup_steps=2)
    assert got.tolist() == [0.0, 0.25, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adam"}, "`--optimizer` must be one of adamw, .* got 'adam'. Did you mean"),
        ({"warmup_ratio": 1.5}, r"`--warmup-ratio` must be in \[0, 1\]; got 1.5"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "`--warmup-ratio` and `--warmup-steps` contra"),
        ({"min_learning_rate": 1.0}, "`--min-learning-rate` must be at most `--learning-rate`"),
        ({"min_learning_rate": -1.0}, "`--min-learning-rate` must not be negative"),
        ({"min_learning_rate": 0.1, "schedule": "constant"}, "`--schedule constant` does not fall"),
        ({"decay_steps": 3}, "`--decay-steps` is for `--schedule wsd`; got `--schedule linear`"),
        ({"decay_steps": 0, "schedule": "wsd"}, "`--decay-steps` must be positive"),
        ({"decay_steps": 13, "schedule": "wsd"}, "`--decay-steps` must be at most the 12 steps"),
        (
            {"optimizer": "schedule_free_adamw", "schedule": "linear"},
            "`--schedule` must be constant; got linear",
        ),
        (
            {"optimizer": "my:own", "weight_decay": 0.1},
            "`--weight-decay` has no effect on your own",
        ),
    ],
)
def test_contradictions(given, message):
    with pytest.raises(ValueError, match=message):
        rates(12, **given)


def layers(rng):
    """Parameters with two stacked layers, in the shapes and by the names of the decoder."""
    return {
        "embedding": {"weight": rng.normal(size=(7, 4))},
        "layers": {
            "attention": {"query": {"weight": rng.normal(size=(2, 6, 4))}},
            "experts": {
                "weight": rng.normal(size=(2, 3, 4, 5)),
                "bias": rng.normal(size=(2, 3, 4)),
            },
            "query_norm": {"weight": rng.normal(size=(2, 3, 4))},
            "filter": {"weight": rng.normal(size=(2, 4, 1, 3))},
            "gate": {"weight": rng.normal(size=(2, 4))},
        },
        "norm": {"weight": rng.normal(size=4)},
    }


def orthogonal(x):
    """Five Newton-Schulz iterations on one matrix."""
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_by_hand(gradients, beta=0.95):
    """The direction after all gradients of one matrix."""
    momentum = 0.0
    for gradient in gradients:
        momentum = beta * momentum + (1 - beta) * gradient
    count = len(gradients)
    ahead = beta * momentum / (1 - beta ** (count + 1))
    now = (1 - beta) * gradients[-1] / (1 - beta**count)
    return 0.2 * np.sqrt(max(gradients[-1].shape)) * orthogonal(ahead + now)


def test_muon_treats_each_matrix_of_a_stack_on_its_own():
    rng = np.random.default_rng(0)
    params, *gradients = (layers(rng) for _ in range(3))
    given = settings(optimizer="muon", learning_rate=RATE, schedule="constant", max_grad_norm=0.0)
    muon = compose_optimizer(given, compose_schedule(given, 4))
    adam = optax.adam(RATE)
    states = muon.init(params), adam.init(params)
    for gradient in gradients:
        updates, by_muon = muon.update(gradient, states[0], params)
        others, by_adam = adam.update(gradient, states[1], params)
        states = by_muon, by_adam
    flat = [
        dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (updates, others, *gradients)
    ]
    are_matrices = dict(jax.tree_util.tree_leaves_with_path(matrices(params)))
    assert sum(are_matrices.values()) == 2
    for path, is_matrix in are_matrices.items():
        update, other, *seen = (np.asarray(tree[path]) for tree in flat)
        if not is_matrix:
            np.testing.assert_allclose(update, other, rtol=1e-12)
            continue
        for place in np.ndindex(update.shape[:-2]):
            want = -RATE * muon_by_hand([gradient[place] for gradient in seen])
            np.testing.assert_allclose(update[place], want, rtol=1e-9)


def test_every_linear_layer_of_a_model_is_a_matrix():
    policy = eqx.filter(models.load(MODEL), eqx.is_inexact_array)
    found = jax.tree_util.tree_leaves_with_path(matrices(policy))
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, yes in found if yes}
    parts = ("attention.query", "attention.key", "attention.value", "attention.output")
    parts += ("feed_forward.up", "feed_forward.down")
    assert names == {f"layers.{part}.weight" for part in parts}


def test_schedule_free_adamw_by_hand():
    """The sequences x, y and z of Defazio et al., 2024, with decay and a warm-up."""
    target, start = np.array([1.0, -2.0]), np.array([0.5, 0.5])
    # Optax computes the schedule in float32, so the rates are exact there.
    given = {"learning_rate": 0.125, "warmup_steps": 2, "weight_decay": 0.3, "max_grad_norm": 0.0}
    given = settings(optimizer="schedule_free_adamw", **given)
    schedule = compose_schedule(given, 6)
    optimizer = compose_optimizer(given, schedule)
    params = {"weight": jnp.asarray(start)}
    opt_state = optimizer.init(params)
    x, y, z, square, weights = start, start, start, 0.0, 0.0
    for step in range(6):
        updates, opt_state = optimizer.update(
            {"weight": params["weight"] - target}, opt_state, params
        )
        params = optax.apply_updates(params, updates)
        gradient = y - target
        square = 0.999 * square + 0.001 * gradient**2
        direction = gradient / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
        z = z - 0.125 * min(step / 2, 1) * (direction + 0.3 * y)
        # Optax weighs a step by the square of the next step's learning rate.
        weight = (0.125 * min((step + 1) / 2, 1)) ** 2
        weights += weight
        x = x + weight / weights * (z - x)
        y = 0.1 * z + 0.9 * x
        np.testing.assert_allclose(params["weight"], y, rtol=1e-10)
    state = State(params, opt_state, None, jax.random.key(0))
    np.testing.assert_allclose(evaluated(state).policy["weight"], x, rtol=1e-10)


@pytest.mark.slow
def test_a_schedule_free_run_evaluates_and_saves_the_average(tmp_path, monkeypatch):
    states = []

    def kept(*given, **more):
        place = loop(*given, **more)
        states.append(place.state)
        return place

    loop = command.loop
    monkeypatch.setattr(command, "loop", kept)
    held_out = write_data(tmp_path / "eval.jsonl", 5, 1)
    free = {"optimizer": "schedule_free_adamw", "schedule": "constant", "eval_data": held_out}
    assert small(tmp_path, **free, batch_size=5) == 0
    (state,) = states
    z = optax.tree_utils.tree_get(state.opt_state, "ScheduleFreeState").z
    y = np.asarray(state.policy.embedding.weight)
    x = (y - 0.1 * np.asarray(z.embedding.weight)) / 0.9
    saved = weights_of(tmp_path / "run")["transformer.wte.weight"]
    assert np.abs(x - y).max() > 1e-4
    np.testing.assert_allclose(saved, x, atol=1e-6)
    (batch,) = data.batches(
        data.tokenize(data.read(held_out), None)[0], batch_size=5, shuffle=False, epochs=1
    )
    finished = models.load(tmp_path / "run" / "model")
    metrics = dpx.make_eval(losses.dpo)(finished, batch, models.load(MODEL)).mean()
    last = lines_of(tmp_path / "run", "eval.jsonl")[-1]
    np.testing.assert_allclose(last["eval/logps/chosen"], metrics["logps/chosen"], rtol=1e-5)


OWN = """
import optax

def adam(schedule):
    return optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))

def nothing(schedule):
    return schedule
"""
CASES = {
    "muon": {"schedule": "wsd", "decay_steps": 2, "min_learning_rate": 1e-3},
    "schedule_free_adamw": {"schedule": "constant"},
    "own": {"schedule": "inverse_sqrt", "log_norms": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_has_the_same_bits(name, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    optimizer = f"{tmp_path / 'own.py'}:adam" if name == "own" else name
    given = {**CASES[name], "optimizer": optimizer, "batch_size": 4}
    given |= {"warmup_steps": 0, "warmup_ratio": 0.3}
    check_resumes_with_the_same_bits(tmp_path, monkeypatch, "metrics.jsonl", **given)


@pytest.mark.slow
def test_an_optimiser_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    assert small(tmp_path, steps=2, log_norms=True) == 0
    plain, line = weights_of(tmp_path / "run"), lines_of(tmp_path / "run")[0]
    groups = ("attention", "embedding", "feed_forward", "norms", "positions")
    squares = [line[f"grad_norm/{group}"] ** 2 for group in groups]
    np.testing.assert_allclose(sum(squares) ** 0.5, line["grad_norm"], rtol=1e-5)
    assert sum(name.startswith("update_norm/") for name in line) == len(groups)

    own = {"output": tmp_path / "own", "optimizer": "own.py:adam", "steps": 2, "log_norms": True}
    assert small(tmp_path, **own) == 0
    for name, weight in weights_of(tmp_path / "own").items():
        np.testing.assert_allclose(weight, plain[name], atol=1e-6)
    (tmp_path / "own.py").write_text(OWN + "# changed\n")
    assert small(tmp_path, **own, resume=True) == 2
    assert "`--optimizer` must have the same content" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("own.py:nothing", "it returned an object of class function"),
        ("own.py:absent", "it has no function `absent`. It has `adam`, `nothing`"),
        ("no_such_module:adam", "importing no_such_module raised ModuleNotFoundError"),
    ],
)
def test_a_function_that_is_no_optimiser(named, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    given = settings(optimizer=named)
    with pytest.raises(ValueError, match=message):
        compose_optimizer(given, compose_schedule(given, 4))
