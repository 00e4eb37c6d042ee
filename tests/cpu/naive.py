"""The plainest driver of a decoder: every sequence in every step, pages dealt from a shuffled deck.

It knows how to fill a Batch by hand. It must not share code with the runner, which is tested against it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from shoal.kernels import KV, Batch
from shoal.kernels.cpu import UnitKV
from shoal.kernels.ref import PagedKV
from shoal.nn.decoder import Decoder

Piece = tuple[list[int], int, list[int]]  # tokens, position of the first, pages of their sequence


@dataclass
class Row:
    tokens: list[int]
    pages: list[int]
    computed: int = 0


def make_batch(pieces: list[Piece], page_size: int, device: str | torch.device = "cpu") -> Batch:
    """A step of these pieces; the last position of each is wanted."""
    ids = [token for tokens, _, _ in pieces for token in tokens]
    places = [(start + i, pages) for tokens, start, pages in pieces for i in range(len(tokens))]
    slots = [pages[pos // page_size] * page_size + pos % page_size for pos, pages in places]
    ends = torch.tensor([0, *(len(tokens) for tokens, _, _ in pieces)]).cumsum(0)
    table = torch.zeros(len(pieces), max(len(pages) for _, _, pages in pieces), dtype=torch.int32)
    for row, (_, _, pages) in zip(table, pieces, strict=True):
        row[: len(pages)] = torch.tensor(pages)
    length = torch.tensor([start + len(tokens) for tokens, start, _ in pieces])
    tensors = (torch.tensor(ids), torch.tensor([p for p, _ in places]), torch.tensor(slots), ends, table, length)
    return Batch(*(tensor.to(device) for tensor in (*tensors, ends[1:] - 1)))


@torch.inference_mode()
def spoil(kv: KV) -> None:
    """Fill the memory with numbers that are none."""
    assert isinstance(kv, PagedKV | UnitKV)
    for memory in (kv.k, kv.v, *(kv.scales or ())) if isinstance(kv, PagedKV) else (kv.memory,):
        memory.view(torch.uint8).fill_(255)


def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    num_tokens: int,
    page_size: int = 16,
    chunk: int = 1 << 30,
    seed: int = 0,
    adapters: list[int] | None = None,
) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy tokens of each prompt, and the logits [num_tokens, V] they were chosen from.

    At most `chunk` tokens of a prompt are computed in one step. Pages hold NaN until they are written. `adapters` has
    the number of each prompt's adapter, -1 for none.
    """
    counts = [-(-(len(prompt) + num_tokens) // page_size) for prompt in prompts]
    deck = list(range(sum(counts) + 1))
    random.Random(seed).shuffle(deck)
    kv = decoder.new_kv(len(deck), page_size)
    spoil(kv)
    rows = [Row(list(p), [deck.pop() for _ in range(c)]) for p, c in zip(prompts, counts, strict=True)]
    logits: list[list[torch.Tensor]] = [[] for _ in rows]
    while live := [i for i, row in enumerate(rows) if len(logits[i]) < num_tokens]:
        pieces = [(rows[i].tokens[rows[i].computed :][:chunk], rows[i].computed, rows[i].pages) for i in live]
        batch = make_batch(pieces, page_size, decoder.kernels.device)
        if adapters is not None:
            numbers = [adapters[i] for i, (tokens, _, _) in zip(live, pieces, strict=True) for _ in tokens]
            batch = replace(batch, adapter_T=torch.tensor(numbers))
        out = decoder.logits(decoder.forward(batch, kv))
        for i, (tokens, _, _), scores in zip(live, pieces, out, strict=True):
            rows[i].computed += len(tokens)
            if rows[i].computed == len(rows[i].tokens):
                logits[i].append(scores.cpu())
                rows[i].tokens.append(int(scores.argmax()))
    return [(row.tokens[-num_tokens:], torch.stack(found)) for row, found in zip(rows, logits, strict=True)]
