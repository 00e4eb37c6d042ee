"""Every backend keeps two promises: the right numbers, and the same bits in any company."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from naive import generate, make_batch, spoil
from small_models import save_model
from torch import Tensor

from shoal.kernels import KV, Batch, Heads, Kernels, load, set_threads
from shoal.kernels.cpu import CpuKernels, UnitKV, instruction_sets
from shoal.kernels.ref import PagedKV, RefKernels
from shoal.nn.arch import read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import DTYPES, load_weights

PAGE = 32
KEPT = {**DTYPES, "int8": torch.int8}  # keys and values in their pages; bf16 is rounded to int8
SHAPES = [(256, 512), (704, 256), (64, 199), (172, 64), (100, 36), (1024, 3000)]  # K, N


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(before)


@pytest.fixture(params=["ref", *instruction_sets(), "no runs"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The specification, the compiled kernels, and those without reading shared runs once."""
    if request.param == "no runs":
        return CpuKernels(instruction_sets()[0], share=False)
    return load("ref") if request.param == "ref" else CpuKernels(request.param)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Each row of the result is bit-equal in any company, at any place, with any number of threads."""
    set_threads(1)
    whole = function(x)
    for threads in (1, 2, 5):
        set_threads(threads)
        assert torch.equal(function(x), whole)
        for shift in (1, 13):
            assert torch.equal(function(x.roll(shift, 0)).roll(-shift, 0), whole)
        for first, last in ((0, 1), (5, 6), (3, 20), (len(x) - 1, len(x)), (7, len(x))):
            assert torch.equal(function(x[first:last].clone()), whole[first:last])
            assert torch.equal(function(x[first:last]), whole[first:last])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_product_does_not_depend_on_company(kernels: Kernels, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = noise(outputs, inputs, seed=1, dtype=dtype), noise(outputs, seed=2, dtype=dtype)
    packed = kernels.pack(weight, bias)
    x = noise(70, inputs, dtype=dtype)
    same_rows(lambda rows: kernels.linear(rows, packed), x)
    truth = x.double() @ weight.double().T + bias.double()
    allowed = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert (kernels.linear(x, packed) - truth).abs().max() < allowed * truth.abs().max()
    assert kernels.linear(x[:0], packed).shape == (0, outputs)
    assert kernels.logits(x[:3], packed).dtype == torch.float32
    residual = noise(70, outputs, seed=3, dtype=dtype)
    added = kernels.linear(x, packed, residual.clone(), 0.25)
    assert (added - (truth * 0.25 + residual)).abs().max() < allowed * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("inner", [32, 100, 352])
def test_a_gate_lets_through_what_it_should(kernels: Kernels, inner: int, dtype: torch.dtype) -> None:
    weight, bias = noise(2 * inner, 64, seed=1, dtype=dtype) / 8, noise(2 * inner, seed=2, dtype=dtype)
    x = noise(70, 64, dtype=dtype)
    both = x.double() @ weight.double().T + bias.double()
    gate, up = both[:, :inner], both[:, inner:]
    functions = torch.nn.functional
    truths = {"silu": functions.silu(gate) * up, "gelu": functions.gelu(gate, approximate="tanh") * up}
    for activation, truth in truths.items():
        packed = kernels.pack_gated(weight, bias, activation)  # type: ignore[arg-type]
        allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert (kernels.gated(x, packed) - truth).abs().max() < allowed * truth.abs().max()
        same_rows(lambda rows, packed=packed: kernels.gated(rows, packed), x)  # type: ignore[misc]
    far = torch.full((1, 64), 1e4, dtype=dtype)
    assert bool(torch.isfinite(kernels.gated(-far, packed)).all())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [64, 100, 896, 2816])
def test_what_is_done_row_by_row_does_not_depend_on_company(kernels: Kernels, width: int, dtype: torch.dtype) -> None:
    x = noise(50, width, dtype=dtype) * 4
    weight = noise(width, seed=1)
    same_rows(lambda rows: kernels.rms_norm(rows, weight, 1e-5), x)
    same_rows(lambda rows: kernels.add(rows, rows, 0.5), x)


def test_row_by_row_functions_are_what_their_names_say(kernels: Kernels) -> None:
    x, weight = noise(9, 100) * 3, noise(100, seed=1)
    normed = torch.nn.functional.rms_norm(x, (100,), weight, 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), normed, atol=2e-6, rtol=2e-6)
    assert torch.equal(kernels.embedding(torch.tensor([3, 3, 0]), x), x[[3, 3, 0]])
    assert torch.equal(kernels.add(x, x, 0.5), x + x * 0.5)
    x[2, 17] = x[2, 63] = 1e3
    x[4, 5] = torch.nan
    index, value = kernels.largest(x)
    assert torch.equal(index, x.argmax(1))
    assert index[2] == 17 and index[4] == 5
    torch.testing.assert_close(value, x.gather(1, index[:, None])[:, 0], rtol=0, atol=0, equal_nan=True)


def placed(
    kernels: Kernels, kv: KV, qkv: Tensor, batch: Batch, group: int, table: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Queries of rows of two key heads; keys and values are in their slots afterwards."""
    width = qkv.shape[1] // (2 * group + 4)
    prepared = kernels.prepare_heads(Heads(2 * group, 2, width, table))
    return kernels.place(qkv.clone(), prepared, kv, 0, batch)


def test_rope_turns_pairs_and_leaves_the_rest(kernels: Kernels) -> None:
    x = noise(5, 6, 20)
    batch = make_batch([([0], pos, [n]) for n, pos in enumerate([0, 1, 7, 7, 30])], PAGE)
    angle = torch.arange(31)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.5, 0.3, 0.2, 0.7, 0.05])
    kv = kernels.new_kv(1, 5, PAGE, 2, 20, torch.float32)
    turned = placed(kernels, kv, x.flatten(1), batch, 1, (angle.cos(), angle.sin()))
    x = x[:, :2]
    first = torch.complex(x[..., :8], x[..., 8:16]) * torch.polar(torch.ones(5, 1, 8), angle[batch.pos_T][:, None])
    torch.testing.assert_close(turned[..., :8], first.real)
    torch.testing.assert_close(turned[..., 8:16], first.imag)
    assert torch.equal(turned[..., 16:], x[..., 16:])


@pytest.mark.parametrize("whole", [False, True])
def test_queries_and_keys_are_normed_before_they_are_turned(kernels: Kernels, whole: bool) -> None:
    """The keys are seen through attention: a token that sees only itself gives back its value, one that sees two, a
    mixture that depends on the keys."""
    spec = RefKernels(torch.device("cpu"))
    weights = (noise(32 if whole else 16, seed=1), noise(32 if whole else 16, seed=2))
    angle = torch.arange(40)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.5, 0.3, 0.2, 0.7, 0.05])
    heads = Heads(2, 2, 16, (angle.cos(), angle.sin()), weights, whole)
    batch = make_batch([([0] * 40, 0, [1, 0])], PAGE)
    qkv, outs = noise(40, 96), []
    for backend in (spec, kernels):
        kv = backend.new_kv(1, 2, PAGE, 2, 16, torch.float32)
        spoil(kv)
        q = backend.place(qkv.clone(), backend.prepare_heads(heads), kv, 0, batch)
        outs.append((q, backend.attention(q, kv, 0, backend.plan(batch, kv), 0.3)))
    torch.testing.assert_close(outs[1][0], outs[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outs[1][1], outs[0][1], atol=1e-5, rtol=1e-5)


# Attention: sequences as (new tokens, length); they cross pages, windows and tiles of 256.
MIX = [(1, 1), (1, 300), (5, 5), (30, 530), (1, 256), (1, 257), (3, 256), (70, 70), (260, 300), (1, 513)]


class Pages:
    """Sequences of random keys and values in pages that are dealt at random, the rest of memory being NaN."""

    def __init__(self, kernels: Kernels, mix: list[tuple[int, int]], group: int, kept: torch.dtype, seed: int = 0):
        dtype = torch.bfloat16 if kept == torch.int8 else kept
        self.kernels, self.mix, self.group = kernels, mix, group
        total = sum(-(-length // PAGE) for _, length in mix)
        deck = list(range(total + 1))
        random.Random(seed).shuffle(deck)
        self.kv = kernels.new_kv(1, total + 1, PAGE, 2, 16, kept)
        spoil(self.kv)
        self.tables = [[deck.pop() for _ in range(-(-length // PAGE))] for _, length in mix]
        self.q = [noise(length, 2 * group, 16, seed=3 + n, dtype=dtype) for n, (_, length) in enumerate(mix)]
        self.k = [noise(length, 2, 16, seed=103 + n, dtype=dtype) for n, (_, length) in enumerate(mix)]
        self.v = [noise(length, 2, 16, seed=203 + n, dtype=dtype) for n, (_, length) in enumerate(mix)]
        for number, (_, length) in enumerate(mix):
            qkv = torch.cat([self.q[number], self.k[number], self.v[number]], dim=1).flatten(1)
            placed(kernels, self.kv, qkv, self.batch([(number, 0, length)]), group)

    def batch(self, pieces: list[tuple[int, int, int]]) -> Batch:
        """A step of (sequence, first position, end)."""
        return make_batch([([0] * (end - start), start, self.tables[n]) for n, start, end in pieces], PAGE)

    def attend(self, pieces: list[tuple[int, int, int]], window: int, softcap: float) -> list[Tensor]:
        batch = self.batch(pieces)
        q = torch.cat([self.q[n][start:end] for n, start, end in pieces])
        plan = self.kernels.plan(batch, self.kv)
        out = self.kernels.attention(q, self.kv, 0, plan, 0.3, window, softcap)
        return list(torch.split(out, [end - start for _, start, end in pieces]))

    def all_pieces(self) -> list[tuple[int, int, int]]:
        return [(n, length - new, length) for n, (new, length) in enumerate(self.mix)]

    def truth(self, number: int, window: int, softcap: float) -> Tensor:
        """The textbook, in float64."""
        q = self.q[number].double().unflatten(1, (2, self.group))
        scores = torch.einsum("tghe,sge->ghts", q, self.k[number].double()) * 0.3
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        pos = torch.arange(len(q))
        hidden = pos > pos[:, None]
        hidden |= (pos <= pos[:, None] - window) if window else False
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("ghts,sge->tghe", weights, self.v[number].double()).flatten(1, 2)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (40, 0.0), (256, 2.0), (1, 0.0)])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_attention_is_the_textbooks(kernels: Kernels, group: int, window: int, softcap: float) -> None:
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.int8, 4e-2)):
        pages = Pages(kernels, MIX, group, dtype)
        for (n, start, end), out in zip(
            pages.all_pieces(), pages.attend(pages.all_pieces(), window, softcap), strict=True
        ):
            assert (out - pages.truth(n, window, softcap)[start:end]).abs().max() < allowed


@pytest.mark.parametrize("dtype", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("window", [0, 40])
def test_attention_does_not_depend_on_company_chunks_pages_or_threads(
    kernels: Kernels, window: int, dtype: torch.dtype
) -> None:
    for group in (1, 6):
        pages = Pages(kernels, MIX, group, dtype)
        pieces = pages.all_pieces()
        whole = pages.attend(pieces, window, 0.0)
        set_threads(2)
        assert all(map(torch.equal, pages.attend(pieces, window, 0.0), whole))
        backwards = pages.attend(pieces[::-1], window, 0.0)[::-1]
        assert all(map(torch.equal, backwards, whole))
        elsewhere = Pages(kernels, MIX, group, dtype, seed=1)
        assert all(map(torch.equal, elsewhere.attend(pieces, window, 0.0), whole))
        set_threads(1)
        for (n, start, end), expected in zip(pieces, whole, strict=True):
            assert torch.equal(pages.attend([(n, start, end)], window, 0.0)[0], expected)
            for cut in {(start + end) // 2, end - 1} - {start, end}:
                halves = pages.attend([(n, start, cut)], window, 0.0) + pages.attend([(n, cut, end)], window, 0.0)
                assert torch.equal(torch.cat(halves), expected)


@pytest.mark.parametrize("dtype", KEPT)
@pytest.mark.parametrize("name", ["llama3", "gemma2", "olmo2"])
def test_a_row_has_the_same_bits_in_any_company(name: str, dtype: str, kernels: Kernels, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    config = read_config(tmp_path)
    kept = KEPT[dtype] if dtype not in DTYPES else None
    decoder = Decoder(config, load_weights(tmp_path, config, DTYPES.get(dtype, torch.bfloat16)), kernels, kv_dtype=kept)
    dice = random.Random(3)
    prompts = [[dice.randrange(model.config.vocab_size) for _ in range(n)] for n in (3, 40, 250, 290)]
    together = generate(decoder, prompts, 7)

    def check(answers: list[tuple[list[int], Tensor]], numbers: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        for number, (tokens, logits) in zip(numbers, answers, strict=True):
            assert tokens == together[number][0]
            assert torch.equal(logits, together[number][1])

    check(generate(decoder, prompts, 7, chunk=37))
    check(generate(decoder, prompts[::-1], 7, chunk=100, page_size=32, seed=5), (3, 2, 1, 0))
    check(generate(decoder, [prompts[2]], 7), (2,))
    check(generate(decoder, [prompts[1]], 7, chunk=1), (1,))
    set_threads(2)
    check(generate(decoder, prompts, 7, chunk=200))


def test_a_shared_prefix_may_be_written_in_the_same_step_and_branch_inside_a_page(
    kernels: Kernels, tmp_path: Path
) -> None:
    """Row b has the first 70 tokens of row a: it reads two of a's pages, and six positions copied from the third."""
    save_model("mistral", tmp_path)
    config = read_config(tmp_path)
    decoder = Decoder(config, load_weights(tmp_path, config), kernels)
    a, b = list(range(100)), [*range(70), *range(150, 190)]
    kv = decoder.new_kv(9, PAGE)
    spoil(kv)
    with torch.inference_mode():
        alone = decoder.forward(make_batch([(b, 0, [5, 6, 7, 8])], PAGE), kv)
        both = decoder.forward(make_batch([(a, 0, [1, 2, 3, 4]), (b[64:], 64, [1, 2, 7, 8])], PAGE), kv)
        assert torch.equal(both[1], alone[0])
        kernels.move_blocks(kv, torch.tensor([[3, 5, 6]]))
        moved = decoder.forward(make_batch([(b[70:], 70, [1, 2, 5, 6])], PAGE), kv)
        assert torch.equal(moved, alone)


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_moves_copy_the_first_positions_in_order(kernels: Kernels, kept: torch.dtype) -> None:
    """A value of -1 marks its page and position; a query that sees one position alone reads its value."""
    kv, dtype = kernels.new_kv(1, 4, PAGE, 1, 8, kept), torch.bfloat16 if kept == torch.int8 else kept
    content = (torch.arange(4)[:, None] * PAGE + torch.arange(PAGE)).to(dtype)
    whole = make_batch([([0] * PAGE, 0, [page]) for page in range(4)], PAGE)
    qkv = torch.cat([torch.ones(4 * PAGE, 16, dtype=dtype), content.flatten()[:, None].expand(-1, 8)], dim=1)
    prepared = kernels.prepare_heads(Heads(1, 1, 8))
    q = kernels.place(qkv.contiguous(), prepared, kv, 0, whole)
    kernels.move_blocks(kv, torch.tensor([[0, 1, 19], [1, 2, PAGE], [0, 3, 0]]))
    seen = kernels.attention(q, kv, 0, kernels.plan(whole, kv), 1.0, window=1)[:, 0, 0].view(4, PAGE)
    expected = content.clone()
    expected[1, :19] = content[0, :19]
    expected[2] = expected[1]
    assert torch.equal(seen, expected)


def test_unknown_kernels_and_page_sizes_are_refused(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="no kernels 'fast' on device 'cpu'"):
        load("fast")
    with pytest.raises(ValueError, match="page size 48"):
        kernels.new_kv(1, 1, 48, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="heads of 513 numbers cannot be kept as int8: 512 are the most"):
        kernels.new_kv(1, 1, PAGE, 1, 513, torch.int8)


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_pages_take_the_bytes_that_they_are_said_to_take(kernels: Kernels, kept: torch.dtype) -> None:
    kv = kernels.new_kv(3, 5, PAGE, 2, 40, kept)
    assert isinstance(kv, PagedKV | UnitKV)
    held = (kv.k, kv.v, *(kv.scales or ())) if isinstance(kv, PagedKV) else (kv.memory,)
    assert sum(each.nbytes for each in held) == 3 * 5 * kernels.kv_bytes(PAGE, 2, 40, kept)
