"""What the compiled steps move between devices and hold on each, read from the programs.

Results would be right all the same: without these tests nobody would see that every device
computes all rows, or holds all layers.
"""

import dataclasses

import pytest

from dpo_eqx import models, sharding
from dpo_eqx.sharding._collectives import Collective, collectives, count_runs

from .programs import CONFIG, compiled_step, peak

WIDTH, VOCAB, ROWS, TOKENS = CONFIG.width, CONFIG.vocab, 16, 24 + 2 * 16
UNEMBEDDING = 4 * VOCAB * WIDTH
MATRICES = {(WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)}
LAYER = 4 * (4 * WIDTH * WIDTH + 3 * 4 * WIDTH * WIDTH)
PARAMETERS = CONFIG.layers * LAYER + 2 * UNEMBEDDING


@pytest.fixture(scope="module")
def alone():
    return compiled_step(None)


@pytest.fixture(scope="module")
def fsdp():
    return compiled_step(sharding.make_mesh("fsdp=8"))


def moved(compiled) -> list[Collective]:
    return collectives(compiled.as_text())


def gathers(compiled):
    return [each for each in moved(compiled) if each.kind == "all-gather"]


def test_fsdp_gathers_no_logits_and_one_layer_at_a_time(fsdp):
    for each in gathers(fsdp):
        # Logits have the vocabulary, or a device's part of it, beside tokens.
        of_vocabulary = {VOCAB, VOCAB // 8} & set(each.shape)
        assert not of_vocabulary or each.shape == (VOCAB, WIDTH), each
        # What has a leading axis of layers would be all of them at once.
        assert each.size <= max(LAYER, UNEMBEDDING), each
        assert each.shape[0] != CONFIG.layers, each
    layers = [each for each in gathers(fsdp) if each.shape in MATRICES]
    # Seven matrices of each layer, for the policy and its reference forward, and backward.
    assert {each.times % CONFIG.layers for each in layers} == {0}
    assert sum(each.times for each in layers) <= 5 * 7 * CONFIG.layers + 64


def test_fsdp_keeps_the_rows_where_they_are(fsdp):
    """No device has the activations of all rows in a layer.

    Where the embeddings of all rows are smaller than the table, XLA sums them instead, once.
    """
    for each in moved(fsdp):
        if each.shape[:1] == (ROWS,) and len(each.shape) > 2:
            assert each.times == 1, each
            assert each.size < UNEMBEDDING, each


def test_fsdp_holds_an_eighth(alone, fsdp):
    """Of parameters and moments an eighth, and of the rest as much but for what is gathered."""
    held, whole = (c.memory_analysis().argument_size_in_bytes for c in (fsdp, alone))
    assert held < 1.05 * whole / 8
    # What is gathered at a time, and its gradient before it is split again.
    assert peak(fsdp) < peak(alone) / 8 + 2 * max(LAYER, UNEMBEDDING)


def test_fsdp_moves_what_a_ring_must(fsdp):
    """The reference and the policy gathered once forward, the policy once more backward.

    On CPUs there is no reduce-scatter: gradients are summed whole, at twice the bytes.
    """
    least = 7 / 8 * PARAMETERS
    assert sum(each.ring_bytes for each in moved(fsdp)) < 1.1 * (3 + 2) * least


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=4"])
def test_many_tokens_stay_where_they_are_and_the_unembedding_is_gathered(mesh):
    """The hidden states of all devices would be larger than the unembedding.

    It moves once forward for the policy and its reference, and its gradient once.
    """
    compiled = compiled_step(sharding.make_mesh(mesh), pairs=128)
    tokens = 2 * 128 * 16
    for each in moved(compiled):
        # A whole row of the batch, or chunks of 48 tokens.
        assert not {48, tokens, tokens // 2, tokens // 4} & set(each.shape), each
    whole = [each for each in moved(compiled) if each.shape == (VOCAB, WIDTH)]
    assert 0 < sum(each.times for each in whole) <= 8


@pytest.mark.slow
def test_tensor_keeps_the_vocabulary_apart():
    compiled = compiled_step(sharding.make_mesh("tensor=8"))
    for each in gathers(compiled):  # of what layers keep
        assert each.shape == (ROWS, TOKENS, WIDTH), each
    for each in moved(compiled):
        assert VOCAB not in each.shape, each
        assert VOCAB // 8 not in each.shape, each


@pytest.mark.slow
def test_tensor_splits_what_layers_keep_by_tokens():
    """Each layer keeps its input; each device has an eighth of it.

    It is gathered when the layer runs: forward for policy and reference, again in the backward
    pass, and so is the gradient of its output.
    """
    mesh = sharding.make_mesh("tensor=8")
    deep = models.Config(vocab=VOCAB, width=WIDTH, layers=32, heads=8, remat=True)
    compiled, shallow = (compiled_step(mesh, config=config) for config in (deep, CONFIG))
    kept = (deep.layers - CONFIG.layers) * 4 * ROWS * TOKENS * WIDTH
    held, less = (c.memory_analysis().temp_size_in_bytes for c in (compiled, shallow))
    # The gradients of the further layers are there, too, an eighth of each.
    gradients = (deep.layers - CONFIG.layers) * LAYER / 8
    assert held - less < 1.1 * (kept / 8 + gradients)
    whole = [each for each in gathers(compiled) if each.shape == (ROWS, TOKENS, WIDTH)]
    assert sum(each.times for each in whole) <= 4 * deep.layers + 1


@pytest.mark.slow
def test_data_sums_the_gradient_once():
    least = 2 * 7 / 8 * PARAMETERS
    compiled = compiled_step(sharding.make_mesh("data=8"))
    assert sum(each.ring_bytes for each in moved(compiled)) < 2 * least


@pytest.mark.slow
def test_all_axes_at_once():
    compiled = compiled_step(sharding.make_mesh("data=2,fsdp=2,tensor=2"))
    for each in gathers(compiled):
        assert each.size <= max(LAYER, UNEMBEDDING) / 2, each
        # A device has as many rows as there are layers.
        assert each.shape[0] != CONFIG.layers or each.shape[1:] == (TOKENS, WIDTH), each


@pytest.mark.slow
def test_experts_keep_tokens_on_their_devices_and_gather_one_layer():
    config = dataclasses.replace(CONFIG, experts=8, experts_per_token=2, expert_width=128)
    compiled = compiled_step(sharding.make_mesh("fsdp=8"), config=config)
    weights = 4 * 8 * 128 * WIDTH
    for each in moved(compiled):
        # Sorted over all devices, the tokens of all rows would be one axis, twice or once.
        tokens = ROWS * (24 + 2 * 16)
        assert not {tokens, 2 * tokens} & set(each.shape), each
        assert each.kind != "all-gather" or each.size <= max(weights, UNEMBEDDING), each
    gathered = [each for each in gathers(compiled) if each.size == 4 * 8 * 128 * WIDTH]
    # Three matrices, for the policy and its reference forward, and backward.
    assert 0 < sum(each.times for each in gathered) <= 5 * 3 * config.layers


def test_parsing_of_collectives():
    """Bytes and groups of a program written by hand; the last loop counts by two."""
    text = """
%body (p: f32[4]) -> f32[4] {
  %g = f32[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
}
%cond (p: f32[4]) -> pred[] {
}
%other (p: f32[4]) -> f32[4] {
  %h = f32[4]{0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
}
%other_cond.1_spmd (p: (s32[], f32[4])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}
%third_cond (p: (f32[4], u32[])) -> pred[] {
  %n = u32[]{:T(128)} constant(8)
  %k = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%k, %n), direction=LT
}
%third (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %j = u32[]{:T(128)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%j, %two)
  %q = f32[9]{0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %state = (f32[9]{0}, u32[]{:T(128)}) tuple(%q, %next)
}
ENTRY %main () -> f32[4] {
  %u = (f32[9]{0}, u32[]) while(%i), condition=%third_cond, body=%third
  %w = f32[4]{0} while(%i), condition=%cond, body=%body, x={"known_trip_count":{"n":"3"}}
  %v = (s32[], f32[4]) while(%i), condition=%other_cond.1_spmd, body=%other, metadata={}
  %r = (bf16[6]{0}, /*index=1*/f32[]) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}
  %s = f32[2]{0} reduce-scatter(%a), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %t = f32[]{} all-reduce(%a), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]T(0)) {'a','b'}
  %n = f32[2]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}
"""
    assert collectives(text) == [
        Collective("g", "all-gather", "f32", (8, 4), 4, 3),
        Collective("h", "all-gather", "f32", (4,), 2, 5),
        Collective("q", "all-gather", "f32", (9,), 2, 4),
        Collective("r", "all-reduce", "bf16", (6,), 2, 1),
        Collective("r", "all-reduce", "f32", (), 2, 1),
        Collective("s", "reduce-scatter", "f32", (2,), 4, 1),
        Collective("t", "all-reduce", "f32", (), 8, 1),
    ]
    assert [each.ring_bytes for each in collectives(text)] == [288, 40, 72, 12, 4, 24, 7]


# As GPUs have them: an asynchronous operation has its operands before its results, except that an
# all-reduce has only its results. The loop runs four times.
ASYNCHRONOUS = """
%body (x: (f32[8,4])) -> (f32[8,4]) {
  %both = ((bf16[4]{0}, f32[2,6]{1,0}), (bf16[32]{0}, f32[16,6]{1,0})) all-gather-start(%x, %y), \
replica_groups=[1,8]<=[8], dimensions={0}
  %both-done = (bf16[32]{0}, f32[16,6]{1,0}) all-gather-done(%both)
  %part = (bf16[16,3]{1,0}, bf16[2,3]{1,0}) reduce-scatter-start(%z), \
replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %loop = (f32[8,4]{1,0}) while(%x), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %sum = f32[5]{0} all-reduce-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %move = (f32[9]{0}, f32[9]{0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
}
"""


def test_asynchronous_collectives_send_their_results_once():
    found = collectives(ASYNCHRONOUS.replace("\\\n", ""))
    sent = {(each.kind, each.dtype): each.ring_bytes for each in found}
    assert sent == {
        ("all-gather", "bf16"): 4 * 7 / 8 * 2 * 32,
        ("all-gather", "f32"): 4 * 7 / 8 * 4 * 16 * 6,
        ("reduce-scatter", "bf16"): 4 * 7 / 8 * 2 * 16 * 3,
        ("all-reduce", "f32"): 2 * 3 / 4 * 4 * 5,
        ("collective-permute", "f32"): 4 * 9,
    }
    assert count_runs(found) == 4 + 4 + 1 + 1


# As TPUs have them: the gather starts, moves while another fusion computes, and is waited for.
FUSED = """
%start (x: bf16[4]) -> bf16[32] {
  %gather.1 = bf16[32]{0:T(256)S(1)} all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8]
}

%meanwhile (x: bf16[4], y: f32[9]) -> (f32[9], bf16[32]) {
  %gather.2 = bf16[32]{0:T(256)S(1)} all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8]
}

%wait (x: bf16[4]) -> bf16[32] {
  %gather.3 = bf16[32]{0:T(256)} all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8]
}

ENTRY %main (x: bf16[4], y: f32[9]) -> bf16[32] {
  %a = bf16[32]{0:T(256)S(1)} fusion(%x), kind=kCustom, calls=%start
  %b = (f32[9]{0}, bf16[32]{0}) fusion(%a, %y), kind=kCustom, calls=%meanwhile
  %c = bf16[32]{0:T(256)} fusion(%b), kind=kCustom, calls=%wait
  %d = f32[3]{0} all-reduce(%y), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %e = f32[3]{0} all-reduce(%d), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_a_collective_in_several_fusions_sends_once():
    """But those of a `shard_map` have one channel together."""
    found = {each.name: each.ring_bytes for each in collectives(FUSED)}
    sums = dict.fromkeys("de", 2 * 7 / 8 * 4 * 3)
    assert found == {"gather.1": 7 / 8 * 2 * 32, **sums}
