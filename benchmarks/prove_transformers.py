"""Proof: greedy tokens and log-probabilities are those of transformers in float32, for every listed architecture.

200 prompts for each small random model, for the embedded model and for stories260K, which must also tell its published
stories. Ours are computed together, in chunks, through shuffled pages whose unwritten memory is NaN; transformers'
one by one. Beside each result stands the control: the smallest lead of a chosen token over the next, the number of
different tokens seen, and the largest difference of log-probabilities, of which 1e-4 is allowed. Where transformers'
own lead is below TIE, rounding decides; a prompt that parts there is counted apart, and no more than 1 % may.

    python -m benchmarks.prove_transformers [--prompts 200] [--only NAME …]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common import ROOT, SHARED, write_result
from shoal.kernels import load, set_threads
from shoal.nn.arch import read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import load_weights
from shoal.text.checkpoint import EMBEDDED
from shoal.text.tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "tests" / "cpu"))  # the same driver and models as the tests

from naive import generate
from small_models import CONFIGS, reference, save_model

PROVES = ("shoal/kernels", "shoal/nn", "shoal/models", "tests/cpu/naive.py", "tests/cpu/small_models.py")
SEED = 20
NUM_TOKENS = 16
LONGEST = 330  # crosses the tile of 256 and every small model's window
CONTEXTS = {"phi3-long": 512}  # transformers switches frequencies with the length of each text; we settle on one
TIE = 5e-5
STORIES = SHARED / "data/models/stories260K"


def main() -> int:
    """Compare everything; 1 when anything differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=[])
    wanted = parser.parse_args()
    set_threads(1)
    results: dict[str, dict[str, Any]] = {}
    for name in CONFIGS:
        if not wanted.only or name in wanted.only:
            results[name] = prove_random(name, wanted.prompts)
    if not wanted.only:
        results["embedded"] = prove_trained(EMBEDDED, wanted.prompts)
        if STORIES.is_dir():
            results["stories260K"] = prove_trained(STORIES / "hf", wanted.prompts) | published_stories()
    good = bool(results) and all(each["equal"] for each in results.values())
    small = wanted.only or wanted.prompts < 200
    if not small:
        complete = good and "stories260K" in results
        write_result("transformers", {"shown": complete, "prompts": wanted.prompts, "models": results}, SEED)
        good = complete
    print("all equal" if good else "NOT SHOWN")
    return 0 if good else 1


def prove_random(name: str, num_prompts: int) -> dict[str, Any]:
    """One of the tests' small models, with random prompts of all lengths."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(name, Path(folder), SEED)
        decoder = open_decoder(Path(folder), CONTEXTS.get(name))
        dice = random.Random(SEED)
        vocabulary = model.config.vocab_size
        lengths = [dice.randrange(1, LONGEST) for _ in range(num_prompts)]
        prompts = [[dice.randrange(vocabulary) for _ in range(length)] for length in lengths]
        return compare(name, decoder, model, prompts)


def prove_trained(folder: Path, num_prompts: int) -> dict[str, Any]:
    """A trained model, with pieces of text it knows: what it writes itself from random beginnings."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    model.generation_config = transformers.GenerationConfig()
    decoder = open_decoder(folder)
    tokenizer = Tokenizer.load(folder)
    dice = random.Random(SEED)
    beginnings = [[dice.randrange(3, tokenizer.vocab_size) for _ in range(3)] for _ in range(num_prompts)]
    told = generate(decoder, beginnings, 120)
    prompts = [begin + tokens[: dice.randrange(120)] for begin, (tokens, _) in zip(beginnings, told, strict=True)]
    prompts[0] = (prompts[0] * 400)[:LONGEST]
    return compare("embedded" if folder == EMBEDDED else "stories260K", decoder, model, prompts)


def published_stories() -> dict[str, Any]:
    """stories260K's own expected continuations."""
    cases = json.loads((STORIES / "expected_greedy.json").read_text())["cases"]
    answers = generate(open_decoder(STORIES / "hf"), [case["prompt_ids"] for case in cases], 64)
    right = sum(tokens == case["greedy_ids"] for case, (tokens, _) in zip(cases, answers, strict=True))
    print(f"stories260K: {right} of {len(cases)} published continuations")
    return {"published": len(cases), "published_equal": right} | ({} if right == len(cases) else {"equal": False})


def open_decoder(folder: Path, context: int | None = None) -> Decoder:
    """Our model of a folder."""
    config = read_config(folder, context)
    return Decoder(config, load_weights(folder, config), load("auto"))


def compare(name: str, decoder: Decoder, model: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Our answers against transformers', prompt by prompt."""
    began = time.perf_counter()
    ours = generate(decoder, prompts, NUM_TOKENS, chunk=100, seed=SEED)
    middle = time.perf_counter()
    different, ties, largest, lead, kinds = 0, 0, 0.0, float("inf"), set()
    for prompt, (tokens, logits) in zip(prompts, ours, strict=True):
        expected_tokens, expected_logits = reference(model, prompt, NUM_TOKENS)
        kinds.update(expected_tokens)
        best = expected_logits.topk(2).values
        leads = best[:, 0] - best[:, 1]
        lead = min(lead, leads.min().item())
        same = NUM_TOKENS
        if tokens != expected_tokens:
            same = next(i for i in range(NUM_TOKENS) if tokens[i] != expected_tokens[i])
            ties += leads[same].item() < TIE
            different += leads[same].item() >= TIE
        known = slice(0, same + 1)  # up to where they part, both saw the same tokens
        difference = logits[known].log_softmax(-1) - expected_logits[known].log_softmax(-1)
        largest = max(largest, difference.abs().max().item())
    result = {
        "equal": not different and ties <= len(prompts) / 100 and largest < 1e-4,
        "prompts": len(prompts),
        "tokens": len(prompts) * NUM_TOKENS,
        "prompts_that_differ": different,
        "prompts_that_part_at_a_tie": ties,
        "largest_logprob_difference": largest,
        "smallest_lead": lead,
        "different_tokens_seen": len(kinds),
        "seconds": middle - began,
        "seconds_transformers": time.perf_counter() - middle,
    }
    print(
        f"{name}: {len(prompts) - different - ties} of {len(prompts)} prompts equal, largest difference {largest:.1e}, "
        f"smallest lead {lead:.1e}, {len(kinds)} different tokens, {middle - began:.1f} s",
        flush=True,
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
