"""A predicted step behaves as machines do: more work takes longer, and nothing is quicker than its maker promises."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.types import TOKEN, Slice, Step
from shoal.models import embedded_path
from shoal.sim.hardware import A100, H100, HARDWARE, Efficiency, Wire
from shoal.sim.roofline import Load, Roofline, all_reduce, load_of, send, tiled
from shoal.sim.shapes import SHAPES, shape_of

LLAMA = SHAPES["llama-2-7b"]
amounts = st.integers(1, 4096)


def part(ticket: int, start: int, count: int, blocks: tuple[int, ...] = (), want: int = 1) -> Slice:
    return Slice(ticket, start, array(TOKEN, [7] * count), blocks, want)


def decodes(rows: int, context: int) -> Load:
    return Load(rows, rows, decodes=rows * context)


@given(tokens=amounts, more=amounts, machine=st.sampled_from(sorted(HARDWARE)), shape=st.sampled_from(sorted(SHAPES)))
def test_more_tokens_never_take_less(tokens, more, machine, shape):
    cost = Roofline(HARDWARE[machine], SHAPES[shape])
    few, many = (sum(cost.stage_seconds(decodes(n, 100))) for n in (tokens, tokens + more))
    assert 0 < few <= many * (1 + 1e-12)


@given(tokens=amounts, context=st.integers(0, 8000))
def test_nothing_is_quicker_than_what_the_maker_promises(tokens, context):
    load = Load(tokens, 1, tokens * (context + (tokens + 1) / 2), context + tokens)
    bare = A100.bare()
    cost = Roofline(bare, LLAMA)
    operations = 2 * tokens * LLAMA.layers * LLAMA.layer_parameters
    moved = 2 * LLAMA.layers * LLAMA.layer_parameters
    least = max(operations / bare.peak["bf16"], moved / bare.bandwidth)
    assert sum(cost.stage_seconds(load)) >= least
    assert sum(Roofline(A100, LLAMA).stage_seconds(load)) >= sum(cost.stage_seconds(load))


def test_a_decode_step_reads_all_weights_once_for_many_rows():
    cost = Roofline(A100, LLAMA)
    one, many = (sum(cost.stage_seconds(decodes(rows, 1))) for rows in (1, 64))
    assert cost.weights / A100.bandwidth < one < many < 1.3 * one


def test_a_token_beyond_a_tile_costs_a_tile():
    cost = Roofline(A100, LLAMA)
    at = {tokens: cost.layer_seconds(tokens)[0] for tokens in (512, 513, 640)}
    assert at[513] == pytest.approx(at[640], rel=0.02) and at[513] > 1.1 * at[512]
    assert [tiled(n, 128) for n in (1, 16, 17, 64, 65, 128, 129)] == [16, 16, 32, 64, 128, 128, 256]


def test_the_loads_of_a_step_are_counted_by_hand():
    step = Step(1, (part(1, 10, 4, (0, 1)), part(2, 30, 1, (0, 2)), part(3, 0, 3, (3,), want=0)))
    assert load_of(step) == Load(8, 2, 4 * 10 + 10 + 6, 14 + 3, 31)
    once = load_of(step, block=8)  # 4 blocks of 8 for 48 positions that are looked at
    assert once.read + once.decodes == pytest.approx(32)
    assert load_of(step, block=64).decodes == 31  # the last blocks are not full
    near = load_of(step, window=8)
    assert near.decodes == 8 and near.read == 11 + 3 and near.pairs == 4 * 8 + 6


def test_devices_share_layers_and_pay_for_it_on_the_wire():
    prompt = Load(2048, 1, 2048 * 1024, 2048)
    seconds = {n: sum(Roofline(A100, SHAPES["llama-2-70b"], n).stage_seconds(prompt)) for n in (1, 2, 4, 8)}
    assert seconds[1] > seconds[2] > seconds[4] > seconds[8] > seconds[1] / 8
    assert Roofline(A100, LLAMA).parts(prompt).wires == 0 < Roofline(A100, LLAMA, 2).parts(prompt).wires


@given(stages=st.integers(1, 8), tokens=amounts)
def test_stages_make_up_the_step_and_the_last_has_the_head(stages, tokens):
    cost, load = Roofline(H100, SHAPES["llama-2-70b"], 1, stages), decodes(tokens, 50)
    found = cost.stage_seconds(load)
    assert len(found) == stages and min(found) > 0
    fixed = H100.efficiency.step
    assert sum(found) - (stages - 1) * fixed == pytest.approx(sum(cost.parts(load)))
    assert len(set(found[:-1])) <= 1 and (stages == 1 or found[-1] > found[0])


def test_few_tokens_touch_few_experts():
    mixtral = SHAPES["mixtral-8x7b"]
    assert mixtral.touched(1) == pytest.approx(2) and 7.9 < mixtral.touched(64) <= 8
    cost = Roofline(H100, mixtral)
    one, many = cost.layer_seconds(1)[0], cost.layer_seconds(64)[0]
    assert 2.5 * one < many
    assert LLAMA.touched(1) == 1


def test_a_message_takes_longer_than_its_bytes_alone():
    wire = Wire(100e9, 0.5, 20e-6, 5e-6, 0.1, 1e6)
    assert send(wire, 0) == 5e-6 and send(wire, 10e6) == pytest.approx(20e-6 + 10e6 / 50e9)
    assert all_reduce(wire, 1, 1e9) == 0
    assert all_reduce(wire, 8, 1e8) == pytest.approx(send(wire, 2 * 7 / 8 * 1e8))


def test_what_has_room_beside_the_weights():
    alone = Roofline(A100, SHAPES["opt-13b"])
    assert alone.positions == pytest.approx(66_144, rel=0.03)  # as DistServe's authors measured
    assert Roofline(A100, SHAPES["opt-66b"]).positions == 0  # 132 GB do not fit in 80
    assert Roofline(A100, SHAPES["opt-13b"], 2).positions > 2 * alone.positions


def test_a_host_that_is_slow_is_seen_only_where_the_device_is_quicker():
    slow = replace(A100, efficiency=Efficiency(layer=1e-3))
    few, many = decodes(1, 1), Load(8192, 1, 8192 * 4096, 8192)
    assert sum(Roofline(slow, LLAMA).stage_seconds(few)) == pytest.approx(
        LLAMA.layers * 1e-3 + Roofline(slow, LLAMA).parts(few).head
    )
    assert Roofline(slow, LLAMA).parts(many).fixed == 0


def test_shapes_are_those_of_published_configurations():
    assert SHAPES["llama-2-7b"].parameters == pytest.approx(6.74e9, rel=0.01)
    assert SHAPES["llama-2-70b"].parameters == pytest.approx(69.0e9, rel=0.01)
    assert SHAPES["mixtral-8x7b"].parameters == pytest.approx(46.7e9, rel=0.01)
    assert SHAPES["qwen3-30b-a3b"].parameters == pytest.approx(30.5e9, rel=0.01)
    assert SHAPES["falcon-180b"].parameters == pytest.approx(180e9, rel=0.02)
    assert SHAPES["opt-175b"].parameters == pytest.approx(175e9, rel=0.01)
    values = json.loads((embedded_path() / "config.json").read_text())
    assert shape_of("minnow", values) == SHAPES["minnow"]
    with pytest.raises(KeyError, match="hidden_size"):
        shape_of("nothing", {})
