"""What a plan says agrees with the compiler, with the program, and with sums by hand."""

import dataclasses
import functools
import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

import dpo_eqx as dpx
from dpo_eqx import models, sharding
from dpo_eqx._jax.grouped_dot import grouped_dot
from dpo_eqx.cli._main import main
from dpo_eqx.cli.commands import plan as plan_command
from dpo_eqx.models._decoder.attention import attend
from dpo_eqx.sharding._collectives import collectives
from dpo_eqx.sharding._flops import flops
from dpo_eqx.sharding._hlo import instructions, lines, times
from dpo_eqx.sharding._plan import Plan, TooLargeError, _compiled, _needed
from dpo_eqx.sharding._targets import CHIPS, chip_of_kind, find_target
from dpo_eqx.sharding._traffic import bytes_accessed

from .programs import CONFIG, compiled_step, peak, shapes_of_step

PAIRS, PROMPT, COMPLETION = 16, 24, 16
MESH = "data=2,fsdp=4"


@pytest.fixture(scope="module")
def planned():
    step, policy, opt_state, batch = shapes_of_step()
    with jax.numpy_dtype_promotion("standard"):
        return sharding.plan(step, policy, opt_state, batch, policy, target="cpu:8", mesh=MESH)


@pytest.fixture(scope="module")
def compiled():
    """The same step, compiled without `plan`."""
    return compiled_step(sharding.make_mesh(MESH))


def test_memory_and_collectives_are_those_of_the_compiled_program(planned, compiled):
    memory = compiled.memory_analysis()
    assert planned.arguments == memory.argument_size_in_bytes
    assert planned.peak == pytest.approx(peak(compiled), rel=1e-3)
    assert planned.temporaries == pytest.approx(memory.temp_size_in_bytes, rel=1e-3)
    sent = sum(each.ring_bytes for each in collectives(compiled.as_text()))
    assert planned.collective_bytes == pytest.approx(sent, rel=1e-3)
    assert planned.collective_bytes > 0


def products(text):
    """The operations of all `dot`s in a compiled program, as often as they run."""
    counts, total = times(instructions(text)), 0
    shapes = {
        name: [int(n) for n in axes.split(",") if n]
        for name, axes in re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", text)
    }
    for name, line in lines(text):
        dot = re.search(
            r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.-]+), .*lhs_contracting_dims=\{([\d,]*)\}", line
        )
        if dot:
            out = [int(n) for n in dot[1].split(",") if n]
            inner = [shapes[dot[2]][int(i)] for i in dot[3].split(",")]
            total += 2 * functools.reduce(int.__mul__, out + inner, 1) * counts.get(name, 0)
    return total


def test_operations_are_those_of_the_compiled_program(planned, compiled):
    assert planned.flops_done == pytest.approx(products(compiled.as_text()), rel=0.02)


def test_operations_needed_by_hand(planned):
    """Each weight with each token, and all blocks of attention, in four forward passes."""
    weights = 4 * CONFIG.width**2 + 3 * CONFIG.width * CONFIG.feed_forward
    scored = 2 * PAIRS * COMPLETION
    tokens = PAIRS * PROMPT + scored
    seen = PAIRS * (PROMPT**2 + 2 * COMPLETION * (PROMPT + COMPLETION))
    forward = 2 * tokens * weights * CONFIG.layers + 4 * seen * CONFIG.width * CONFIG.layers
    forward += 2 * scored * CONFIG.width * CONFIG.vocab
    assert planned.flops_needed == pytest.approx(4 * forward / 8, rel=1e-3)


def test_operations_of_each_kind_of_product():
    def counted(function, *shapes, platform="cpu"):
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return flops(jax.make_jaxpr(function)(*arrays), platform)

    def looped(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    def grouped(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([2, 1], jnp.int32))

    def of_experts(x, w):
        return grouped_dot(x, w, jnp.array([0, 1, 0], jnp.int32))

    def chosen(x, w):
        return jax.lax.platform_dependent(
            x, w, cpu=lambda x, w: x @ w, default=lambda x, w: x @ w @ w
        )

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(
        jnp.dot, mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows
    )
    assert counted(jnp.dot, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert counted(looped, (3, 5), (6, 5, 5)) == 6 * 2 * 3 * 5 * 5
    assert counted(grouped, (3, 5), (2, 5, 7)) == 2 * 3 * 5 * 7
    assert counted(of_experts, (3, 5), (2, 7, 5)) == 2 * 3 * 5 * 7
    # The value, and as much for the gradient of each factor.
    gradient = jax.grad(lambda *operands: of_experts(*operands).sum(), (0, 1))
    assert counted(gradient, (3, 5), (2, 7, 5)) == 3 * 2 * 3 * 5 * 7
    assert counted(mapped, (8, 5), (5, 7)) == 2 * 8 * 5 * 7
    assert counted(chosen, (3, 5), (5, 5)) == 2 * 3 * 5 * 5
    assert counted(chosen, (3, 5), (5, 5), platform="tpu") == 2 * 2 * 3 * 5 * 5


def test_operations_of_attention_on_each_platform():
    """cuDNN's kernel runs forward once more in its backward pass, and leaves out what is masked."""
    config = models.Config(vocab=1, width=1, layers=1, heads=4, key_heads=2, head_width=16)
    shapes = [jax.ShapeDtypeStruct((2, 8, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]

    def total(*operands):
        return attend(*operands, None, config=config).sum()

    program = jax.jit(jax.grad(total, (0, 1, 2))).trace(*shapes).jaxpr
    product = 2 * 2 * 4 * 8 * 8 * 16
    assert flops(program, "cpu") == flops(program, "tpu") == (2 + 5) * product
    assert flops(program, "cuda") == (2 + 2 + 5) * product / 2


def compiled_alone(function, *shapes, **options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **options).lower(*arrays).compile()


def test_bytes_accessed_are_those_that_xla_counts():
    """XLA counts a loop as if it ran once, and its condition and scalar constants besides."""

    def product(x, w):
        return jnp.tanh(x @ w).sum(axis=0)

    def updated(x, w):
        return jax.lax.dynamic_update_slice_in_dim(x, 2 * w[3:5], jnp.int32(7), axis=0)

    def looped(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    one = compiled_alone(product, (30, 50), (50, 70))
    assert bytes_accessed(one.as_text()) == one.cost_analysis()["bytes accessed"]
    part = compiled_alone(updated, (1000, 50), (90, 50), donate_argnums=0)
    assert bytes_accessed(part.as_text()) == part.cost_analysis()["bytes accessed"] < 4 * 90 * 50
    six, twelve = (compiled_alone(looped, (30, 50), (n, 50, 50)) for n in (6, 12))
    of_six, of_twelve = (bytes_accessed(each.as_text()) for each in (six, twelve))
    body = (of_twelve - of_six) / 6
    # The matrix of a step, of the stack.
    assert 4 * 50 * 50 < body < 6 * 4 * 50 * 50
    assert of_six - 5 * body == pytest.approx(six.cost_analysis()["bytes accessed"], abs=100)


ASYNCHRONOUS = """
%written (into: bf16[28,64], new: bf16[64], at: s32[]) -> bf16[28,64] {
  %into = bf16[28,64]{1,0} parameter(0)
  %new = bf16[64]{0} parameter(1)
  %row = bf16[1,64]{1,0} bitcast(%new)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %put = bf16[28,64]{1,0} dynamic-update-slice(%into, %row, %at, %zero)
}

ENTRY %main (into: bf16[28,64], new: bf16[64], at: s32[]) -> bf16[28,64] {
  %into = bf16[28,64]{1,0} parameter(0)
  %new = bf16[64]{0} parameter(1)
  %at = s32[] parameter(2)
  %start = ((bf16[28,64]{1,0}, bf16[64]{0}, s32[]), bf16[28,64]{1,0}, u32[]) \
fusion-start(%into, %new, %at), kind=kLoop, calls=%written
  ROOT %done = bf16[28,64]{1,0} fusion-done(%start)
}
""".replace("\\\n", "")


def test_bytes_of_an_asynchronous_fusion():
    """As for GPUs since JAX 0.11: a row is read and written, and its place is read."""
    assert bytes_accessed(ASYNCHRONOUS) == 2 * 64 * 2 + 4


PLAN = Plan("h100", "data=1", 60, 30, 100, 90, 300, 7, 2, 10, 12, "cudnn", {}, 1.0)


def test_a_plan_says_what_binds_and_what_is_too_little():
    assert not PLAN.fits
    assert "does not fit" in str(PLAN)
    assert PLAN.bound is None
    plan = dataclasses.replace(
        PLAN, capacity=100, seconds={"arithmetic": 2.0, "memory": 3.0, "links": 1.0}
    )
    assert plan.fits
    assert plan.bound == "memory"
    assert re.search(r"memory +3e\+03 ms \(binds\)", str(plan))
    assert plan.as_dict() == {**dataclasses.asdict(plan), "fits": True, "bound": "memory"}


class Refused:
    """A lowered program that is too large for a TPU, or has a fault of its own."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_step_that_the_compiler_refuses_does_not_fit():
    with pytest.raises(TooLargeError, match=r"v5e:1 \(data=1\) does not fit.*: Ran out. Give"):
        _compiled(Refused("RESOURCE_EXHAUSTED: Ran out.\n\nMore."), "v5e:1", "data=1")
    with pytest.raises(jax.errors.JaxRuntimeError):
        _compiled(Refused("INTERNAL: a fault"), "v5e:1", "data=1")


@pytest.mark.parametrize("refused", [True, False])
def test_the_largest_batch_that_fits(monkeypatch, capsys, refused):
    def planned(flags, problem, pairs):
        if pairs > 12 and refused:
            raise TooLargeError
        return dataclasses.replace(PLAN, peak=10 * pairs, capacity=120)

    monkeypatch.setattr(plan_command, "_plan", planned)
    flags = plan_command.PlanFlags(model="", batch_size=3)
    problem = plan_command.Problem(lambda: None, None, None, None, None, None)
    assert plan_command._largest(flags, problem, planned(flags, problem, 3)).peak == 120
    words = capsys.readouterr().out
    assert "12 pairs fit" in words
    assert "24 pairs do not fit" in words


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ("h1000", ValueError, "one of here, cpu, a100"),
        ("h100:none", ValueError, "positive number"),
        ("h100:12", ValueError, "multiple of 8"),
        ("v5e:2x2x2", ValueError, "2 axes"),
        ("v5e:6", ValueError, "power of 2"),
        ("cpu:9", ValueError, "jax_num_cpu_devices"),
        ("h100:8", ImportError, r"jax\[cuda13\]"),
        ("v5p:8", ImportError, r"jax\[tpu\]"),
    ],
)
def test_bad_targets(monkeypatch, target, error, words):
    def missing(*_, **__):
        raise NotImplementedError("topology not implemented")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    step, policy, opt_state, batch = shapes_of_step()
    with pytest.raises(error, match=words):
        sharding.plan(step, policy, opt_state, batch, policy, target=target)


@pytest.mark.parametrize(
    ("target", "topology"),
    [("h100:4", "1x4x1"), ("b200:16", "2x8x1"), ("v5e:8", "v5e:2x4"), ("v5p:16", "v5p:2x2x4")],
)
def test_topologies(monkeypatch, target, topology):
    seen = {}

    def describe(**asked):
        seen.update(asked)
        raise NotImplementedError

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    with pytest.raises(ImportError):
        sharding._targets.find_target(target)
    assert topology in (seen.get("topology"), seen["topology_name"])


CONFIG_JSON = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def run(tmp_path, *flags):
    """The numbers of `dpo-eqx plan` with these flags."""
    config, numbers = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(CONFIG_JSON))
    arguments = ["plan", "--model", config, "--json", numbers, "--max-length", "32", *flags]
    # As in a process of the command.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main([str(argument) for argument in arguments]) == 0
    return json.loads(numbers.read_text())


# Floating-point numbers of the model, all of them trained, and of two moments.
SIZE = 2 * 64 * 16 + 4 * 16**2 + 3 * 16 * 32 + 3 * 16


@pytest.mark.slow
def test_the_command_counts_parameters_moments_and_a_reference(tmp_path, capsys):
    found = run(tmp_path, "--target", "cpu:2", "--mesh", "data=2")
    batch = found["arguments"] - (4 + 4 + 4 + 2) * SIZE
    # Ids and masks of a prompt of 16 and two answers of 16, 4 pairs on each device, and weights;
    # and the counts of Adam and of the schedule.
    assert batch == 4 * (3 * 16 * (4 + 1) + 4) + 2 * 4
    assert found["fits"]
    assert found["attention"] == "blocks"
    assert "fits. On each device" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "held"),
    [
        (["--precompute-reference"], 12 * SIZE),
        (["--dtype", "float32"], 16 * SIZE),
        (["--optimizer", "sgd"], (4 + 2) * SIZE),
        (["--lora-rank", "2", "--lora-target", "query"], 2 * SIZE + 12 * 2 * (16 + 16)),
    ],
)
def test_flags_of_the_command(tmp_path, flags, held):
    found = run(tmp_path, *flags)
    assert 0 < found["arguments"] - held < 4500


@pytest.mark.slow
def test_microbatches_remat_and_length_change_the_temporaries(tmp_path):
    plain, parts, short = (
        run(tmp_path, *flags)["temporaries"]
        for flags in ([], ["--microbatches", "8"], ["--max-prompt-length", "2"])
    )
    assert parts < plain
    assert short != plain


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quantize", "int8"], "--lora-rank"),
        (["--microbatches", "3"], "must divide `--batch-size`"),
        (["--max-prompt-length", "32"], "below `--max-length`"),
        (["--batch-size", "0"], "positive"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, words):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    arguments = ["plan", "--model", str(tmp_path / "config.json"), "--max-length", "32", *flags]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_the_step_of_a_reference_in_the_policy_is_counted():
    """A view of the policy takes a forward pass, as another reference does."""
    _, policy, opt_state, batch = shapes_of_step()
    arguments = (policy, opt_state, batch)
    one = _needed(dpx.score_pairs, (*arguments, policy), eqx.is_inexact_array, None, "cpu")
    two = _needed(
        dpx.score_pairs, (*arguments, None), eqx.is_inexact_array, lambda policy: policy, "cpu"
    )
    none = _needed(dpx.score_pairs, (*arguments, None), eqx.is_inexact_array, None, "cpu")
    assert one == two == pytest.approx(4 / 3 * none, rel=1e-6)


def test_the_devices_of_this_process_are_a_target():
    found = find_target("here:2")
    assert list(found.devices) == jax.devices()[:2]
    assert found.platform == "cpu"
    assert found.chip.memory > 0
    assert found.capability is None


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_a_chip_by_the_name_that_jax_has_for_it(kind, chip):
    assert chip_of_kind(kind) == CHIPS[chip]
    assert chip_of_kind("something new").rate is None
