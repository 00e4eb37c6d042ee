"""The plain torch kernels on a card: the numbers of the CPU, and the same bits in any company."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cpu"))  # the same driver and models

from naive import generate
from small_models import save_model

from shoal.kernels import load
from shoal.nn.arch import read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import DTYPES, load_weights

if not torch.cuda.is_available():
    pytest.skip("no CUDA card that torch can use", allow_module_level=True)

NAMES = ("llama3", "gemma2", "olmo2", "qwen2")


def decoders(name: str, folder: Path, dtype: str) -> tuple[list[Decoder], list[list[int]]]:
    """The small model on the CPU and on the card, and prompts for it."""
    vocab_size = save_model(name, folder).config.vocab_size
    config = read_config(folder)
    dice = random.Random(4)
    prompts = [[dice.randrange(vocab_size) for _ in range(n)] for n in (3, 40, 250, 290)]
    made = [Decoder(config, load_weights(folder, config, DTYPES[dtype]), load("ref", d)) for d in ("cpu", "cuda")]
    return made, prompts


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_the_cpu_says(name: str, tmp_path: Path) -> None:
    (cpu, cuda), prompts = decoders(name, tmp_path, "fp32")
    for ours, theirs in zip(generate(cuda, prompts, 8), generate(cpu, prompts, 8), strict=True):
        assert ours[0] == theirs[0]
        assert (ours[1].log_softmax(-1) - theirs[1].log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bits_in_any_company(name: str, dtype: str, tmp_path: Path) -> None:
    (_, cuda), prompts = decoders(name, tmp_path, dtype)
    together = generate(cuda, prompts, 8)
    alone = [generate(cuda, [prompt], 8, chunk=31, seed=1)[0] for prompt in prompts]
    backwards = generate(cuda, prompts[::-1], 8, chunk=100, page_size=32)[::-1]
    for other in (alone, backwards):
        for (tokens, logits), (expected_tokens, expected) in zip(other, together, strict=True):
            assert tokens == expected_tokens
            assert torch.equal(logits, expected)
