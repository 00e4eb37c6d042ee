"""A step as tensors, and what a decoder leaves out of it."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import pytest
import torch
from small_models import save_model

from shoal.core.types import PENDING, TOKEN, Slice, Step
from shoal.kernels import load
from shoal.nn.arch import read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import load_weights
from shoal.runtime.batch import lay_out

VOCAB, BLOCK = 199, 16


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    config = read_config(folder)
    return Decoder(config, load_weights(folder, config), load("auto"))


def test_a_batch_says_where_every_token_goes() -> None:
    slices = (
        Slice(7, 3, array(TOKEN, [5, 6]), (9, 2), 1),
        Slice(8, 0, array(TOKEN, [1, 2, 3, 4, 5]), (4, 1), 3),
        Slice(9, 8, array(TOKEN, [PENDING]), (6, 0, 3), 1),
        Slice(10, 0, array(TOKEN, [999]), (5,), 0),
    )
    batch = lay_out(Step(1, slices), 4, VOCAB).batch({9: 77}, torch.device("cpu"))
    assert batch.ids_T.tolist() == [5, 6, 1, 2, 3, 4, 5, 77, VOCAB - 1]
    assert batch.pos_T.tolist() == [3, 4, 0, 1, 2, 3, 4, 8, 0]
    assert batch.slot_T.tolist() == [39, 8, 16, 17, 18, 19, 4, 12, 20]
    assert batch.start_N1.tolist() == [0, 2, 7, 8, 9]
    assert batch.table_NB.tolist() == [[9, 2, 0], [4, 1, 0], [6, 0, 3], [5, 0, 0]]
    assert batch.length_N.tolist() == [5, 5, 9, 1]
    assert batch.out_R.tolist() == [1, 4, 5, 6, 7]
    assert batch.table_NB.dtype == torch.int32
    wanted = batch.wanted
    assert wanted is not None and wanted.wanted is None
    assert wanted.pos_T.tolist() == [4, 2, 3, 4, 8] and wanted.start_N1.tolist() == [0, 1, 4, 5]
    assert wanted.table_NB.tolist() == [[9, 2, 0], [4, 1, 0], [6, 0, 3]] and wanted.length_N.tolist() == [5, 5, 9]


def test_the_last_layer_skips_what_nobody_wants_and_changes_no_bit(decoder: Decoder) -> None:
    """Its keys and values are written all the same: a second step reads them."""
    luck = random.Random(3)
    prompts = [array(TOKEN, [luck.randrange(VOCAB) for _ in range(length)]) for length in (40, 7, 33, 1)]
    wants = (1, 0, 5, 1)
    tables = ((0, 1, 2), (3,), (4, 5, 6), (7,))
    slices = tuple(Slice(i, 0, *each) for i, each in enumerate(zip(prompts, tables, wants, strict=True)))
    more = tuple(
        Slice(i, len(p), array(TOKEN, [9]), t, 1) for i, (p, t) in enumerate(zip(prompts, tables, strict=True))
    )
    for some in (slices, tuple(replace(part, want=0) for part in slices)):
        found = []
        for skips in (True, False):
            kv = decoder.new_kv(8, BLOCK)
            for step in (some, more):
                batch = lay_out(Step(1, step), BLOCK, VOCAB).batch({}, torch.device("cpu"))
                assert (batch.wanted is None) == (step is more)
                found.append(decoder.forward(batch if skips else replace(batch, wanted=None), kv))
        assert len(found[0]) == sum(part.want for part in some)
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
