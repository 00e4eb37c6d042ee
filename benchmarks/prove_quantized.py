"""Proof: what each arithmetic of the weights costs in accuracy, on the compiled kernels and the embedded model.

Held-out chats with their right answers (as in tools/score_model.py) are read by the model in fp32 and in every other
arithmetic; all see the same tokens. Of the positions that choose an answer's tokens: the relative error of the logits
(norm of the difference over the norm of fp32's), whether both would choose the same token, and the perplexity. Allowed
are 1 % more perplexity for int8, 3 % for int4 with the better of its two roundings, and for bf16 2 % relative error,
with the same token wherever fp32's lead is larger than the largest error of a logit. With a head of int8 ("+head") as
much is allowed as without, and the same mode without is its control. Keys and values as int8 beside
bf16 weights are allowed 1 %, and stand beside bf16 once more: how often both would choose the same token.

Errors over all positions stand beside them and are not judged: the model was never trained to predict what people
write, and finds nearly nothing of it likely. The control is transformers in bf16.

    python -m benchmarks.prove_quantized [--chats 1100]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.common import ROOT, write_result
from shoal.kernels import load, set_threads
from shoal.kernels.api import Kernels
from shoal.nn.arch import read_config
from shoal.nn.calibrate import calibrate
from shoal.nn.decoder import Decoder
from shoal.nn.weights import MODES, load_weights, model_bytes
from shoal.text.chat import ChatTemplate
from shoal.text.checkpoint import EMBEDDED
from shoal.text.tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "tests" / "cpu"))  # the same driver as the tests
sys.path.insert(0, str(ROOT / "tools"))  # the held-out tasks

from make_tasks import MAKERS, held_out_chats, training_chats
from naive import make_batch

PROVES = (
    "shoal/kernels", "shoal/nn", "shoal/models", "shoal/text", "tests/cpu/naive.py", "tools/make_tasks.py",
    "tools/task_kinds.py", "tools/task_words.py",
)  # fmt: skip
SEED = 2024
CHATS = 1100
CALIBRATION = 12  # chats
PAGE = 32
STEP = 2048  # tokens of a step
QUANTIZED = ("int8", "int4", "int4-a16")
KV = "bf16, int8 keys and values"
LOSS = {
    "int8": 0.01,
    "int8+head": 0.01,
    "int4": 0.03,
    "int4+head": 0.03,
    KV: 0.01,
}  # more perplexity than fp32's that is allowed


@dataclass(frozen=True)
class Row:
    """A chat's tokens, and where its answer begins."""

    ids: list[int]
    first: int

    def places(self) -> range:
        """The positions that choose the answer's tokens."""
        return range(self.first - 1, len(self.ids) - 1)


@dataclass
class Tally:
    """What is added up over positions, of one arithmetic against fp32."""

    error: float = 0.0  # squares of differences
    size: float = 0.0  # squares of fp32's logits
    largest: float = 0.0  # difference of any logit
    widest: float = 0.0  # fp32's lead where both choose differently
    same: int = 0
    positions: int = 0
    surprise: float = 0.0  # nats
    divergence: float = 0.0  # nats from fp32's probabilities: unlike a perplexity, it is never less by luck

    def add(self, truth: Tensor, found: Tensor) -> None:
        """The logits of some positions."""
        difference = (found - truth).double()
        self.error += float(difference.square().sum())
        self.size += float(truth.double().square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))
        same = found.argmax(1) == truth.argmax(1)
        best = truth.topk(2, dim=1).values
        self.widest = max([self.widest, *(best[:, 0] - best[:, 1])[~same].tolist()])
        self.same += int(same.sum())
        self.positions += len(same)


def main() -> int:
    """Measure every arithmetic; 1 when one costs more than is allowed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chats", type=int, default=CHATS)
    wanted = parser.parse_args()
    set_threads(1)
    steps = list(read_chats(wanted.chats))
    kernels, config = load("cpu"), read_config(EMBEDDED)
    began = time.perf_counter()
    expected = open_decoder("fp32", kernels, [])
    names = ["fp32", *(name for name in MODES if name != "fp32"), *(f"{name} aware" for name in QUANTIZED), KV]
    chats = calibration_rows()
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        mode = name.removesuffix(" aware") if name != KV else "bf16"
        decoder = open_decoder(mode, kernels, chats if name.endswith(" aware") else [], name == KV)
        results[name] = measure(expected, decoder, steps) | {"bytes": model_bytes(config, mode)}
        results[name]["more_perplexity"] = results[name]["perplexity"] / results["fp32"]["perplexity"] - 1
        print(f"{name}: {describe(results[name])}", flush=True)
    beside = measure(open_decoder("bf16", kernels, []), open_decoder("bf16", kernels, [], True), steps)
    results[KV]["beside_bf16"] = {key: beside[key] for key in ("relative_error", "same_token", "divergence_nats")}
    print("{}, beside bf16: relative error {relative_error:.4f}, same token {same_token:.2%}".format(KV, **beside))
    results["transformers in bf16"] = control = measure(expected, Judge(), steps)
    print(f"control, transformers in bf16: relative error {control['relative_error']:.4f}", flush=True)
    good = judge(results)
    if wanted.chats >= CHATS:
        data = {"shown": good, "kernels": kernels.name, "chats": wanted.chats, "allowed": LOSS, "arithmetic": results}
        write_result("quantized", data, SEED)
    print(f"{'shown' if good else 'NOT SHOWN'}, {time.perf_counter() - began:.0f} s")
    return 0 if good else 1


def describe(found: dict[str, Any]) -> str:
    """A result as a line."""
    return (
        "relative error {relative_error:.4f}, same token {same_token:.2%}, perplexity {perplexity:.4f} "
        "({more_perplexity:+.2%}), divergence {divergence_nats:.5f} nats, largest error {largest_error:.3f}, "
        "widest lead lost {widest_lead_lost:.3f}, {bytes} bytes; of all positions: relative error "
        "{everywhere[relative_error]:.4f}, same token {everywhere[same_token]:.2%}".format(**found)
    )


def open_decoder(name: str, kernels: Kernels, chats: list[list[int]], rounded_kv: bool = False) -> Decoder:
    """The model; with chats, its weights are scaled for what goes through them before they are rounded."""
    config, kept = read_config(EMBEDDED), MODES[name]
    weights = load_weights(EMBEDDED, config, *kept)
    if chats:
        weights.folding = calibrate(config, load_weights(EMBEDDED, config, kept.dtype), kernels, chats, kept.mode)
    return Decoder(config, weights, kernels, kv_dtype=torch.int8 if rounded_kv else None)


def calibration_rows() -> list[list[int]]:
    """Chats of the words the model was trained with, none of which is measured."""
    template, tokenizer = ChatTemplate.load(EMBEDDED), Tokenizer.load(EMBEDDED)
    found = []
    for chat in islice(training_chats(SEED), CALIBRATION):
        messages = [{"role": role, "content": text} for role, text in chat.messages]
        found.append([int(token) for token in tokenizer.encode(template.render(messages, False), special=False)])
    return found


def judge(results: dict[str, dict[str, Any]]) -> bool:
    """Whether all is within what is allowed."""
    found = results["bf16"]
    good = found["relative_error"] <= 0.02 and found["widest_lead_lost"] <= found["largest_error"]
    for name, allowed in LOSS.items():
        tried = [each["more_perplexity"] for other, each in results.items() if other in (name, f"{name} aware")]
        good &= min(tried) <= allowed
    return bool(good)


def read_chats(count: int) -> Iterator[list[Row]]:
    """The tokens of held-out chats, every kind in turn, as steps of at most STEP tokens."""
    template, tokenizer = ChatTemplate.load(EMBEDDED), Tokenizer.load(EMBEDDED)
    (end,) = tokenizer.encode("<|im_end|>", special=False)
    step: list[Row] = []
    for chat in held_out_chats(SEED, count, tuple(MAKERS)):
        messages = [{"role": role, "content": text} for role, text in chat.messages]
        prompt = tokenizer.encode(template.render(messages[:-1]), special=False)
        answer = tokenizer.encode(chat.answer, special=False)
        row = Row([*map(int, prompt), *map(int, answer), end], len(prompt))
        if step and sum(len(each.ids) for each in step) + len(row.ids) > STEP:
            yield step
            step = []
        step.append(row)
    yield step


class Judge:
    """The control of bf16: the same model through transformers."""

    def __init__(self) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            EMBEDDED, dtype=torch.bfloat16, attn_implementation="eager", local_files_only=True
        ).eval()


@torch.inference_mode()
def all_logits(decoder: Decoder | Judge, rows: list[list[int]]) -> Tensor:
    """The logits of every position of every row, one row after the other."""
    if isinstance(decoder, Judge):
        return torch.cat([decoder.model(torch.tensor([ids])).logits[0].float() for ids in rows])
    pieces, page = [], 1
    for ids in rows:
        pages = list(range(page, page + -(-len(ids) // PAGE)))
        pieces.append((ids, 0, pages))
        page += len(pages)
    batch = make_batch(pieces, PAGE)
    kv = decoder.new_kv(page, PAGE)
    return decoder.logits(decoder.forward(replace(batch, out_R=torch.arange(len(batch.ids_T))), kv))


def measure(expected: Decoder, decoder: Decoder | Judge, steps: list[list[Row]]) -> dict[str, Any]:
    """One arithmetic against another over the same tokens: of the answers, and the relative error of all positions."""
    answers, everywhere = Tally(), Tally()
    for rows in steps:
        ids = [row.ids for row in rows]
        truth, found = all_logits(expected, ids), all_logits(decoder, ids)
        everywhere.add(truth, found)
        starts = accumulate((len(each) for each in ids), initial=0)
        places = [at + place for at, row in zip(starts, rows, strict=False) for place in row.places()]
        truth, found = truth[places], found[places]
        answers.add(truth, found)
        chosen = torch.tensor([token for row in rows for token in row.ids[row.first :]])
        scores, wanted = found.double().log_softmax(1), truth.double().log_softmax(1)
        answers.surprise -= float(scores.gather(1, chosen[:, None]).sum())
        answers.divergence += float((wanted.exp() * (wanted - scores)).sum())
    return {
        "relative_error": math.sqrt(answers.error / answers.size),
        "same_token": answers.same / answers.positions,
        "perplexity": math.exp(answers.surprise / answers.positions),
        "divergence_nats": answers.divergence / answers.positions,
        "largest_error": answers.largest,
        "widest_lead_lost": answers.widest,
        "positions": answers.positions,
        "everywhere": {
            "relative_error": math.sqrt(everywhere.error / everywhere.size),
            "same_token": everywhere.same / everywhere.positions,
            "largest_error": everywhere.largest,
            "widest_lead_lost": everywhere.widest,
            "positions": everywhere.positions,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
