"""Quantised weights: the specification means what it says, every backend computes it, and no row depends on company."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import generate
from safetensors.torch import load_file, save_file
from small_models import CONFIGS, save_model
from torch import Tensor

from shoal.build import build_engine
from shoal.core.config import EngineConfig
from shoal.core.errors import ModelError
from shoal.kernels import load, set_threads
from shoal.kernels.api import Kernels, Mode
from shoal.kernels.cpu import CpuKernels, instruction_sets
from shoal.kernels.quantize import (
    EIGHT_BITS,
    LEVELS,
    WIDE_LEVELS,
    group_size,
    mixed,
    product,
    quantize,
    quantize_heads,
    quantize_rows,
    run_of,
    weight_bytes,
)  # fmt: skip
from shoal.kernels.ref import RefKernels
from shoal.nn.arch import read_config
from shoal.nn.calibrate import calibrate
from shoal.nn.decoder import Decoder
from shoal.nn.weights import MODES, load_weights, model_bytes

QUANTIZED: tuple[Mode, ...] = ("int8", "int8-a16", "int4", "int4-a16")
MODELS = ("int8", "int8+head", "int4", "int4+head", "int4-a16")
SHAPES = [(256, 512), (704, 256), (64, 199), (172, 64), (100, 36), (1024, 300), (3000, 64), (7, 5)]  # K, N


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(before)


@pytest.fixture(params=["ref", *instruction_sets()])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The specification and the compiled kernels."""
    return load("ref") if request.param == "ref" else CpuKernels(request.param)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(0, 10_000))


@settings(deadline=None)
@given(sizes, st.sampled_from(QUANTIZED), st.floats(-3, 3), st.floats(1e-6, 1e4))
def test_a_rounded_weight_is_within_half_a_step(
    size: tuple[int, int, int], mode: Mode, shift: float, by: float
) -> None:
    weight = (noise(*size[:2], seed=size[2]) + shift) * by
    found = quantize(weight, mode)
    step = found.scale_NC.float().repeat_interleave(found.group, dim=1)[:, : weight.shape[1]]
    eight = mode in EIGHT_BITS
    allowed = 0.5001 if eight else 0.56  # an int4 scale is rounded to bf16: 15 steps may end 1/17 short
    assert bool(((found.plain() - weight).abs() <= allowed * step).all())
    lowest, highest = (-127, 127) if eight else (0, 15)
    assert lowest <= int(found.values_NK.min()) and int(found.values_NK.max()) <= highest
    assert bool((found.plain()[weight == 0] == 0).all())


@pytest.mark.parametrize("mode", QUANTIZED)
def test_an_output_of_zeros_stays_zero_and_a_weight_that_is_no_number_is_refused(mode: Mode) -> None:
    weight = noise(3, 130)
    weight[1] = 0
    weight[2, :70] = 0
    assert bool((quantize(weight, mode).plain()[1] == 0).all())
    assert bool((quantize(weight, mode).plain()[2, :70] == 0).all())
    for wrong in (torch.nan, torch.inf):
        weight[0, 99] = wrong
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight, mode)


def test_whole_numbers_within_range_are_kept() -> None:
    weight = torch.randint(-127, 128, (9, 70), generator=torch.Generator().manual_seed(1)).float()
    weight[:, 5] = 127
    assert torch.equal(quantize(weight, "int8").plain(), weight)
    small = torch.randint(-5, 11, (9, 70), generator=torch.Generator().manual_seed(1)).float()
    small[:, 5], small[:, 6], small[:, 66], small[:, 67] = -5, 10, -5, 10
    assert torch.equal(quantize(small, "int4").plain(), small)


@settings(deadline=None)
@given(sizes, st.sampled_from([16, 64, 128, 1000]), st.floats(1e-6, 1e6))
def test_rounded_activations_are_within_half_a_step(size: tuple[int, int, int], group: int, by: float) -> None:
    x = (noise(*size[:2], seed=size[2]) * by).bfloat16()
    numbers, scale = quantize_rows(x, group)
    assert int(numbers.abs().max()) <= 127
    meant = (numbers * scale[..., None]).flatten(1)[:, : x.shape[1]]
    step = scale.repeat_interleave(group, dim=1)[:, : x.shape[1]]
    assert bool(((meant - x.float()).abs() <= 0.5001 * step).all())


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_rounded_heads_are_within_half_a_step_and_depend_on_their_token_alone(width: int, by: float, seed: int) -> None:
    heads = [(noise(9, 2, width, seed=seed + half) * by).bfloat16() for half in range(2)]
    stored = quantize_heads(*heads)
    for x, numbers, scale in zip((mixed(heads[0]), heads[1].float()), stored[::2], stored[1::2], strict=True):
        assert numbers.dtype == torch.int8 and int(numbers.min()) >= -127
        assert bool(((numbers * scale[..., None] - x).abs() <= 0.5001 * scale[..., None]).all())
    alone = quantize_heads(*(x[4:5] for x in heads))
    assert all(torch.equal(one[0], all_of_them[4]) for one, all_of_them in zip(alone, stored, strict=True))


@pytest.mark.parametrize("width", [1, 31, 48, 64, 128, 256])
def test_products_of_mixed_heads_are_those_of_the_heads(width: int) -> None:
    a, b = noise(20, width).double(), noise(20, width, seed=1).double()
    found = (mixed(a).double() * mixed(b).double()).sum(1) / run_of(width)
    torch.testing.assert_close(found, (a * b).sum(1), rtol=1e-5, atol=1e-5)


def test_a_key_with_a_few_large_numbers_is_rounded_nearly_as_well_as_others() -> None:
    """Two of 64 numbers are 100 times the others', as in models with large biases: alone they would set the step."""
    query, key = noise(500, 1, 64, seed=1), noise(500, 1, 64)
    key[..., 5] += 100
    key[..., 37] -= 80
    key = key.bfloat16().float()
    numbers, scale, _, _ = quantize_heads(key, key)
    query[..., [5, 37]] = 0  # what is left of a product when the large numbers meet small ones
    exact, found = (query * key).sum(-1), (mixed(query) * numbers).sum(-1) * scale / 64
    _, plain_scale = quantize_rows(key.flatten(0, 1), 64)
    assert (found - exact).std() < 0.3 * plain_scale.mean() * 12**-0.5 * 64**0.5


@settings(deadline=None, max_examples=50)
@given(sizes, st.integers(1, 40), st.sampled_from(QUANTIZED))
def test_the_product_is_that_of_the_rounded_numbers(size: tuple[int, int, int], rows: int, mode: Mode) -> None:
    weight = quantize(noise(*size[:2], seed=size[2]), mode)
    x = noise(rows, size[1], seed=size[2] + 1, dtype=torch.bfloat16)
    rounded = x.double()
    if mode != "int4-a16":
        numbers, scale = quantize_rows(x, weight.group, WIDE_LEVELS if mode == "int8-a16" else LEVELS)
        rounded = (numbers.double() * scale[..., None].double()).flatten(1)[:, : size[1]]
    truth = rounded @ weight.plain().double().T
    magnitude = rounded.abs() @ weight.plain().double().abs().T
    assert bool(((product(x, weight) - truth).abs() <= 1e-6 * magnitude).all())


@pytest.mark.parametrize("mode", QUANTIZED)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_quantised_product_is_the_specification(kernels: Kernels, inputs: int, outputs: int, mode: Mode) -> None:
    """Sums of whole numbers are the same bits on every instruction set; so are int4's totals where the machine adds and
    multiplies with one rounding. Else results are within 1e-6 of the magnitude of what is summed."""
    spec = RefKernels(torch.device("cpu"))
    weight, bias = noise(outputs, inputs, seed=1), noise(outputs, seed=2)
    x = noise(70, inputs, dtype=torch.bfloat16)
    residual = noise(70, outputs, seed=3, dtype=torch.bfloat16)
    packed, meant = kernels.pack(weight, bias, mode), spec.pack(weight, bias, mode)
    magnitude = x.float().abs() @ weight.abs().T + bias.abs()
    wide = kernels.logits(x, packed)
    assert wide.dtype == torch.float32
    expected = spec.logits(x, meant)
    assert bool(((wide - expected).abs() <= 1e-6 * magnitude).all())
    if mode in EIGHT_BITS or (mode == "int4" and kernels.name != "scalar"):
        assert torch.equal(wide, expected)
    near(kernels.linear(x, packed), spec.linear(x, meant), magnitude)
    near(
        kernels.linear(x, packed, residual.clone(), 0.25),
        spec.linear(x, meant, residual, 0.25),
        magnitude + residual.abs(),
    )
    assert kernels.linear(x[:0], packed).shape == (0, outputs)


def near(found: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Both are bf16: a number next to a border of rounding may go either way."""
    assert found.dtype == expected.dtype == torch.bfloat16
    allowed = 1e-6 * magnitude + expected.float().abs() * 2**-7
    assert bool(((found.float() - expected.float()).abs() <= allowed).all())
    assert (found != expected).float().mean() < 0.01


@pytest.mark.parametrize("mode", QUANTIZED)
@pytest.mark.parametrize("inner", [32, 100, 352])
def test_a_quantised_gate_is_the_specification(kernels: Kernels, inner: int, mode: Mode) -> None:
    spec = RefKernels(torch.device("cpu"))
    weight, bias = noise(2 * inner, 200, seed=1) / 14, noise(2 * inner, seed=2)
    x = noise(70, 200, dtype=torch.bfloat16)
    for activation in ("silu", "gelu"):
        found = kernels.gated(x, kernels.pack_gated(weight, bias, activation, mode))  # type: ignore[arg-type]
        expected = spec.gated(x, spec.pack_gated(weight, bias, activation, mode))  # type: ignore[arg-type]
        assert found.shape == (70, inner)
        near(found, expected, torch.full((70, inner), 5.0))


@pytest.mark.parametrize("mode", QUANTIZED)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_quantised_row_does_not_depend_on_company(kernels: Kernels, inputs: int, outputs: int, mode: Mode) -> None:
    packed = kernels.pack(noise(outputs, inputs, seed=1), noise(outputs, seed=2), mode)
    gate = kernels.pack_gated(noise(2 * outputs, inputs, seed=1), None, "silu", mode)
    x = noise(70, inputs, dtype=torch.bfloat16)
    x[11] *= 1000  # a large row must not change the scale of others
    for function in (lambda rows: kernels.linear(rows, packed), lambda rows: kernels.gated(rows, gate)):
        set_threads(1)
        whole = function(x)
        for threads in (1, 2, 5):
            set_threads(threads)
            assert torch.equal(function(x), whole)
            assert torch.equal(function(x.roll(13, 0)).roll(-13, 0), whole)
            for first, last in ((0, 1), (5, 6), (3, 20), (11, 12), (69, 70), (7, 70)):
                assert torch.equal(function(x[first:last].clone()), whole[first:last])


@pytest.mark.parametrize("mode", QUANTIZED)
def test_a_row_that_is_no_number_says_so_and_harms_no_other(kernels: Kernels, mode: Mode) -> None:
    packed = kernels.pack(noise(40, 200, seed=1), None, mode)
    x = noise(20, 200, dtype=torch.bfloat16)
    whole = kernels.linear(x, packed)
    x[3, 150], x[5, 7], x[7], x[9] = torch.nan, torch.inf, 0, 1e-38
    found = kernels.linear(x, packed)
    assert not bool(torch.isfinite(found[[3, 5]]).any())
    assert bool((found[[7, 9]].abs() < 1e-30).all())
    others = [row for row in range(20) if row not in (3, 5, 7, 9)]
    assert torch.equal(found[others], whole[others])


@pytest.mark.parametrize("mode", MODELS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_quantised_model_answers_nearly_as_before_and_alike_in_any_company(
    kernels: Kernels, name: str, mode: str, tmp_path: Path
) -> None:
    save_model(name, tmp_path)
    config = read_config(tmp_path)
    plain = Decoder(config, load_weights(tmp_path, config), kernels)
    decoder = Decoder(config, load_weights(tmp_path, config, *MODES[mode]), kernels)
    assert decoder.dtype == torch.bfloat16 and decoder.embedding_VD.dtype == torch.bfloat16
    prompts = [[(7 * i * n) % 199 for i in range(n)] for n in (3, 40, 270)]
    whole = generate(decoder, prompts, 3)
    for prompt, (tokens, logits) in zip(prompts, whole, strict=True):
        ((alone, same),) = generate(decoder, [prompt], 3, chunk=100)
        assert alone == tokens and torch.equal(logits, same)
        expected = generate(plain, [prompt], 1)[0][1]
        error = (logits[0] - expected[0]).norm() / expected[0].norm()
        assert error < (0.1 if mode.startswith("int8") else 0.4)


@pytest.mark.parametrize(("name", "tied"), [("qwen2", True), ("llama", False)])
def test_only_the_head_is_rounded_when_it_is_asked_for(kernels: Kernels, name: str, tied: bool, tmp_path: Path) -> None:
    """The embeddings are the same, and logits are within a hundredth of those of the plain head."""
    save_model(name, tmp_path)
    config = read_config(tmp_path)
    assert config.tied == tied
    plain, rounded = (
        Decoder(config, load_weights(tmp_path, config, *MODES[mode]), kernels) for mode in ("int4", "int4+head")
    )
    assert torch.equal(plain.embedding_VD, rounded.embedding_VD)
    hidden = noise(9, config.width, dtype=torch.bfloat16)
    expected, found = plain.logits(hidden), rounded.logits(hidden)
    assert 0 < (found - expected).norm() / expected.norm() < 0.01
    assert torch.equal(rounded.logits(hidden[4:5].clone())[0], found[4])


def test_a_head_with_numbers_that_are_none_is_refused_by_name(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    config = read_config(tmp_path)
    with pytest.raises(ModelError, match=r"lm_head\.weight: the weight has numbers that are not"):
        Decoder(config, load_weights(tmp_path, config, *MODES["int8+head"]), load("ref"))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_with_rounded_keys_and_values_answers_nearly_as_before(
    kernels: Kernels, name: str, tmp_path: Path
) -> None:
    save_model(name, tmp_path)
    config = read_config(tmp_path)
    prompts = [[(7 * i * n) % 199 for i in range(n)] for n in (3, 40, 270)]
    plain, rounded = (
        generate(Decoder(config, load_weights(tmp_path, config, torch.bfloat16), kernels, kv_dtype=dtype), prompts, 2)
        for dtype in (torch.bfloat16, torch.int8)
    )
    for (_, expected), (_, found) in zip(plain, rounded, strict=True):
        assert 0 < (found[0] - expected[0]).norm() / expected[0].norm() < 0.05


def test_keys_and_values_of_8_bits_leave_room_for_more_blocks(tmp_path: Path) -> None:
    """A block of llama's narrow heads, which are filled up to 32 numbers: two bytes of each become one and a scale."""
    save_model("llama", tmp_path)
    blocks = {}
    for kv, size in (("auto", 2 * 32), ("int8", 32 + 4)):
        built = build_engine(
            EngineConfig(model=str(tmp_path), weights="bf16", kv=kv, memory_bytes=10**6, block_size=16)
        )
        assert built.facts.memory.block == 2 * 3 * 16 * 2 * size
        assert built.facts.kv == ("bf16" if kv == "auto" else "int8")
        blocks[kv] = built.facts.memory.num_blocks
        built.close()
    assert blocks["int8"] > 1.7 * blocks["auto"]


@pytest.mark.parametrize("mode", MODELS)
@pytest.mark.parametrize(("name", "tied"), [("qwen2", True), ("llama", False)])
def test_memory_counts_weights_as_they_are_kept(mode: str, name: str, tied: bool, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    config, (_, layer_mode, head_mode) = read_config(tmp_path), MODES[mode]
    named = dict(model.named_parameters())
    layers = [w for name, w in named.items() if "layers" in name and w.ndim == 2]
    head = named.get("lm_head.weight", named["model.embed_tokens.weight"])
    separate = head_mode != "plain"  # beside the embedding, or in place of the checkpoint's head
    rest = sum(w.numel() for w in named.values()) - sum(w.numel() for w in layers)
    rest -= head.numel() if separate and not tied else 0
    kept = [quantize(w.detach(), layer_mode) for w in layers]
    heads = weight_bytes(head_mode, *head.shape) if separate else 0
    counted = 2 * rest + sum(weight_bytes(layer_mode, *w.shape) for w in layers)
    values = sum(q.values_NK.numel() for q in kept) / (1 if layer_mode == "int8" else 2)
    assert values <= counted - 2 * rest <= 1.2 * values
    counted += heads
    assert (heads > head.numel()) == separate
    assert model_bytes(config, mode) == counted
    built = build_engine(EngineConfig(str(tmp_path), weights=mode, kernels="ref"))
    try:
        assert built.facts.weights == mode and built.facts.memory.weights == counted
    finally:
        built.close()


def test_groups_are_small_where_layers_are_narrow() -> None:
    assert [group_size("int4", inputs) for inputs in (64, 1023, 1024, 8192)] == [64, 64, 128, 128]
    assert group_size("int8", 896) == 896


def test_a_layer_with_numbers_that_are_none_is_refused_by_name(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    config = read_config(tmp_path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight: the weight has numbers that are not"):
        Decoder(config, load_weights(tmp_path, config, *MODES["int8"]), load("ref"))


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_factors_change_no_answer_by_more_than_rounding(name: str, tmp_path: Path) -> None:
    """In fp32, and with factors far from 1. The factors themselves are the same whatever the number of threads."""
    save_model(name, tmp_path)
    config, kernels = read_config(tmp_path, 512), load("cpu")
    weights = load_weights(tmp_path, config, torch.bfloat16)
    rows = [[(7 * i * n) % 199 for i in range(n)] for n in (30, 70, 3)]
    folding = calibrate(config, weights, kernels, rows, "int4")
    set_threads(2)
    again = calibrate(config, weights, kernels, rows, "int4")
    for factors, same in ((folding.columns, again.columns), (folding.rows, again.rows), (folding.norms, again.norms)):
        assert factors.keys() == same.keys()
        assert all(torch.equal(each, same[layer]) for layer, each in factors.items())
    assert len(folding.rows) == 2 * config.num_layers
    assert max(float(each.max() / each.min()) for each in folding.columns.values()) > 1.5
    plain, folded = load_weights(tmp_path, config), load_weights(tmp_path, config)
    folded.folding = folding
    for prompt in ([5, 9, 100], list(range(90))):
        ((_, expected),) = generate(Decoder(config, plain, kernels), [prompt], 1)
        ((_, found),) = generate(Decoder(config, folded, kernels), [prompt], 1)
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_inputs_that_are_large_get_the_largest_factors(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][[3, 40]] *= 30
    save_file(tensors, tmp_path / "model.safetensors")
    config = read_config(tmp_path)
    weights = load_weights(tmp_path, config, torch.bfloat16)
    folding = calibrate(config, weights, load("cpu"), [list(range(150))], "int4")
    factors = folding.columns["layers.1.self_attn.q_proj"]
    assert set(factors.topk(2).indices.tolist()) == {3, 40}
    assert torch.equal(factors, folding.columns["layers.1.self_attn.v_proj"])
    assert torch.equal(factors, folding.norms["layers.1.input_layernorm"])


def test_there_must_be_tokens_to_calibrate_with(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    config = read_config(tmp_path)
    with pytest.raises(ValueError, match="no tokens"):
        calibrate(config, load_weights(tmp_path, config), load("cpu"), [[], []], "int4")
