"""Scores the embedded model on held-out tasks through transformers; it knows right answers, and nothing of training.

One command (a few minutes on one core), which prints a table and writes benchmarks/results/embedded_model.json:

    .venv/bin/python tools/score_model.py
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from make_tasks import Chat, held_out_chats
from task_kinds import MAKERS, matches
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import write_result  # noqa: E402  (the repository is not on the path before)
from shoal.models import DEFAULT, embedded_path  # noqa: E402

BATCH = 50
GUESSED = 3  # kinds with two possible answers: a coin gets half of them and none of the others


def replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[Chat], max_tokens: int
) -> list[str]:
    """The greedy answer to each chat, special tokens left out, in the order of `chats`."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in chat.messages[:-1]],
            add_generation_prompt=True,
            tokenize=False,
        )
        for chat in chats
    ]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found: dict[int, str] = {}
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        batch = tokenizer([prompts[place] for place in places], return_tensors="pt", padding=True, padding_side="left")
        batch.pop("token_type_ids", None)
        out = model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found.update(zip(places, texts, strict=True))
    return [found[place] for place in range(len(chats))]


def half_width(share: float, count: int) -> float:
    """Half the 95 % interval of a share (normal approximation)."""
    return 1.96 * math.sqrt(share * (1 - share) / count)


def main() -> None:
    """Score each kind of task and write the result; the exit code is 1 if the model is no better than guessing."""
    options = argparse.ArgumentParser(description="Score a model folder on held-out tasks.")
    options.add_argument("--model", type=Path, default=embedded_path())
    options.add_argument("--count", type=int, default=300, help="rows of each kind")
    options.add_argument("--seed", type=int, default=2024)
    options.add_argument("--max-tokens", type=int, default=256)
    options.add_argument("--wrong", type=int, default=0, help="print this many wrong replies of each kind")
    options.add_argument("--no-result", action="store_true", help="do not write the result file")
    chosen = options.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    parameters = sum(weight.numel() for weight in model.parameters())
    began, scores = time.monotonic(), {}
    for kind in MAKERS:
        chats = held_out_chats(chosen.seed, chosen.count, (kind,))
        answers = replies(model, tokenizer, chats, chosen.max_tokens)
        wrong = [(chat, reply) for chat, reply in zip(chats, answers, strict=True) if not matches(chat.answer, reply)]
        share = 1 - len(wrong) / chosen.count
        scores[kind] = {
            "right": chosen.count - len(wrong),
            "rows": chosen.count,
            "share": round(share, 4),
            "half_width_95": round(half_width(share, chosen.count), 4),
        }
        print(f"{kind:26} {share:6.1%} ± {half_width(share, chosen.count):.1%} of {chosen.count}", flush=True)
        for chat, reply in wrong[: chosen.wrong]:
            print(f"    {chat.messages[-2][1]!r}: {reply!r}, not {chat.answer!r}")
    mean = sum(score["share"] for score in scores.values()) / len(scores)
    print(f"{'mean':26} {mean:6.1%}  {parameters} parameters, {time.monotonic() - began:.0f} s")
    if not chosen.no_result:
        result = {"model": DEFAULT, "parameters": parameters, "mean_share": round(mean, 4), "scores": scores}
        write_result("embedded_model", result, chosen.seed)
    guessing = GUESSED * 0.5 / len(scores)
    sys.exit(0 if mean > guessing else 1)


if __name__ == "__main__":
    main()
