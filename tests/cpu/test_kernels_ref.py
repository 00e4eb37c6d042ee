"""The specification keeps its two promises: the right numbers, and the same bits in any company."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from naive import generate, make_batch
from small_models import save_model
from torch import Tensor

from shoal.kernels import Batch, Kernels, load
from shoal.nn.arch import read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import DTYPES, load_weights

PAGE = 32
SHAPES = [(256, 512), (704, 256), (64, 199), (172, 64), (100, 36), (1024, 3000)]  # K, N


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernels() -> Kernels:
    return load("ref")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Each row of the result is bit-equal in any company, at any place, with any number of threads."""
    torch.set_num_threads(1)
    whole = function(x)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
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


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [64, 100, 896, 2816])
def test_what_is_done_row_by_row_does_not_depend_on_company(kernels: Kernels, width: int, dtype: torch.dtype) -> None:
    x = noise(50, width, dtype=dtype) * 4
    weight = noise(width, seed=1)
    same_rows(lambda rows: kernels.rms_norm(rows, weight, 1e-5), x)
    same_rows(lambda rows: kernels.add_rms_norm(rows, rows * 2, weight, 1e-5)[0], x)
    same_rows(kernels.silu_mul, x)
    same_rows(kernels.gelu_mul, x)


def test_row_by_row_functions_are_what_their_names_say(kernels: Kernels) -> None:
    x, weight = noise(9, 100) * 3, noise(100, seed=1)
    gate, up = x[:, :50], x[:, 50:]
    close = {"atol": 2e-6, "rtol": 2e-6}
    functions = torch.nn.functional
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), functions.rms_norm(x, (100,), weight, 1e-5), **close)
    torch.testing.assert_close(kernels.silu_mul(x), functions.silu(gate) * up, **close)
    torch.testing.assert_close(kernels.gelu_mul(x), functions.gelu(gate, approximate="tanh") * up, **close)
    assert kernels.silu_mul(torch.tensor([[-1e4, 1.0]])).item() == 0
    assert torch.equal(kernels.embedding(torch.tensor([3, 3, 0]), x), x[[3, 3, 0]])
    normed, total = kernels.add_rms_norm(x, x, weight, 1e-5)
    assert torch.equal(total, x + x)
    assert torch.equal(normed, kernels.rms_norm(x + x, weight, 1e-5))


def test_rope_turns_pairs_and_leaves_the_rest(kernels: Kernels) -> None:
    x, pos = noise(5, 3, 20), torch.tensor([0, 1, 7, 7, 30])
    angle = torch.arange(31)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.5, 0.3, 0.2, 0.7, 0.05])
    turned = kernels.rope(x, pos, angle.cos(), angle.sin())
    first = torch.complex(x[..., :8], x[..., 8:16]) * torch.polar(torch.ones(5, 1, 8), angle[pos][:, None])
    torch.testing.assert_close(turned[..., :8], first.real)
    torch.testing.assert_close(turned[..., 8:16], first.imag)
    assert torch.equal(turned[..., 16:], x[..., 16:])


# Attention: sequences as (new tokens, length); they cross pages, windows and tiles of 256.
MIX = [(1, 1), (1, 300), (5, 5), (30, 530), (1, 256), (1, 257), (3, 256), (70, 70), (260, 300), (1, 513)]


class Pages:
    """Sequences of random keys and values in pages that are dealt at random, the rest of memory being NaN."""

    def __init__(self, kernels: Kernels, mix: list[tuple[int, int]], group: int, dtype: torch.dtype, seed: int = 0):
        self.kernels, self.mix, self.group = kernels, mix, group
        total = sum(-(-length // PAGE) for _, length in mix)
        deck = list(range(total + 1))
        random.Random(seed).shuffle(deck)
        self.kv = kernels.new_kv(1, total + 1, PAGE, 2, 16, dtype)
        self.kv.k.fill_(torch.nan)
        self.kv.v.fill_(torch.nan)
        self.tables = [[deck.pop() for _ in range(-(-length // PAGE))] for _, length in mix]
        self.q = [noise(length, 2 * group, 16, seed=3 + n, dtype=dtype) for n, (_, length) in enumerate(mix)]
        self.k = [noise(length, 2, 16, seed=103 + n, dtype=dtype) for n, (_, length) in enumerate(mix)]
        self.v = [noise(length, 2, 16, seed=203 + n, dtype=dtype) for n, (_, length) in enumerate(mix)]
        for number, (_, length) in enumerate(mix):
            slots = self.batch([(number, 0, length)]).slot_T
            kernels.write_kv(self.kv, 0, self.k[number], self.v[number], slots)

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
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        pages = Pages(kernels, MIX, group, dtype)
        for (n, start, end), out in zip(
            pages.all_pieces(), pages.attend(pages.all_pieces(), window, softcap), strict=True
        ):
            assert (out - pages.truth(n, window, softcap)[start:end]).abs().max() < allowed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("window", [0, 40])
def test_attention_does_not_depend_on_company_chunks_pages_or_threads(
    kernels: Kernels, window: int, dtype: torch.dtype
) -> None:
    for group in (1, 6):
        pages = Pages(kernels, MIX, group, dtype)
        pieces = pages.all_pieces()
        whole = pages.attend(pieces, window, 0.0)
        torch.set_num_threads(2)
        assert all(map(torch.equal, pages.attend(pieces, window, 0.0), whole))
        backwards = pages.attend(pieces[::-1], window, 0.0)[::-1]
        assert all(map(torch.equal, backwards, whole))
        elsewhere = Pages(kernels, MIX, group, dtype, seed=1)
        assert all(map(torch.equal, elsewhere.attend(pieces, window, 0.0), whole))
        torch.set_num_threads(1)
        for (n, start, end), expected in zip(pieces, whole, strict=True):
            assert torch.equal(pages.attend([(n, start, end)], window, 0.0)[0], expected)
            for cut in {(start + end) // 2, end - 1} - {start, end}:
                halves = pages.attend([(n, start, cut)], window, 0.0) + pages.attend([(n, cut, end)], window, 0.0)
                assert torch.equal(torch.cat(halves), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama3", "gemma2", "olmo2"])
def test_a_row_has_the_same_bits_in_any_company(name: str, dtype: str, kernels: Kernels, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    config = read_config(tmp_path)
    decoder = Decoder(config, load_weights(tmp_path, config, DTYPES[dtype]), kernels)
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
    torch.set_num_threads(2)
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
    kv.k.fill_(torch.nan)
    kv.v.fill_(torch.nan)
    with torch.inference_mode():
        alone = decoder.forward(make_batch([(b, 0, [5, 6, 7, 8])], PAGE), kv)
        both = decoder.forward(make_batch([(a, 0, [1, 2, 3, 4]), (b[64:], 64, [1, 2, 7, 8])], PAGE), kv)
        assert torch.equal(both[1], alone[0])
        kernels.move_blocks(kv, torch.tensor([[3, 5, 6]]))
        moved = decoder.forward(make_batch([(b[70:], 70, [1, 2, 5, 6])], PAGE), kv)
        assert torch.equal(moved, alone)


def test_moves_copy_the_first_positions_in_order(kernels: Kernels) -> None:
    kv = kernels.new_kv(2, 4, 4, 1, 2, torch.float32)
    kv.k.copy_(noise(*kv.k.shape))
    kv.v.copy_(noise(*kv.v.shape, seed=1))
    k = kv.k.clone()
    kernels.move_blocks(kv, torch.tensor([[0, 1, 3], [1, 2, 4], [0, 3, 0]]))
    assert torch.equal(kv.k[:, :, 1, :3], k[:, :, 0, :3])
    assert torch.equal(kv.k[:, :, 1, 3], k[:, :, 1, 3])
    assert torch.equal(kv.k[:, :, 2], kv.k[:, :, 1])
    assert torch.equal(kv.k[:, :, 3], k[:, :, 3])
    assert torch.equal(kv.v[:, :, 2], kv.v[:, :, 1])


def test_unknown_kernels_and_page_sizes_are_refused(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="unknown kernels 'fast'"):
        load("fast")
    with pytest.raises(ValueError, match="page size 48 does not divide 256"):
        kernels.new_kv(1, 1, 48, 1, 8, torch.float32)
