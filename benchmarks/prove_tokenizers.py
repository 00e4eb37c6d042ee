"""Proof of the text half: tokenizers equal to their published vectors and to transformers, and fast enough.

It knows the shared tokenizers and corpora; it must not know models' weights. Claims: 47 of 47 vectors for gpt2, qwen2
and gpt_neox_20b; no difference from transformers on a corpus of odd texts; 1,000,000 texts of about 40 tokens through
the Qwen2 tokenizer within 60 s of one core and 400 MB; a short chat rendered within 15 µs by the usual templates; a
detokenizer whose time per token does not grow with the answer and whose text is the full decode.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, SHARED, memory_now, write_result

PROVES = ("shoal/text", "shoal/models/minnow/tokenizer.json", "constraints.txt", "tests/null/some_templates.py")
SEED = 5
FOLDERS = {
    "gpt2": SHARED / "data/tokenizers/gpt2",
    "qwen2": SHARED / "data/tokenizers/qwen2",
    "gpt_neox_20b": SHARED / "data/tokenizers/gpt_neox_20b",
    "stories260K": SHARED / "data/models/stories260K/hf",
    "minnow": ROOT / "shoal/models/minnow",
}
ODD = [
    "é",
    "e\u0301",
    "日本語",
    "🙂",
    "👨‍👩‍👧",
    "\u2028",
    "\ufeff",
    "ﬁ",
    "Å",
    "½²",
    "Ⅷ",
    "\x00",
    "\x85",
    "\r\n",
    "\t\t",
    "   ",
]
MARKS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<0x0A>",
    "<unk>",
    "don'T",
    "'LL",
    "1234567",
    "\n\n",
]

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "null")]


def prose() -> list[str]:
    """The words of the public-domain novels."""
    books = sorted((SHARED / "data" / "corpora" / "novels").glob("*.gz"))
    return [word for book in books for word in gzip.decompress(book.read_bytes()).decode("utf-8", "replace").split()]


def odd_texts(words: list[str], count: int) -> list[str]:
    """Prose mixed with other scripts, marks of special tokens, odd spaces and random characters."""
    rng = random.Random(SEED)
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(12)):
            kind = rng.randrange(4)
            if kind == 0:
                start = rng.randrange(len(words) - 10)
                parts.append(" ".join(words[start : start + rng.randrange(10)]))
            elif kind == 1:
                parts.append("".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randrange(6))))
            else:
                parts.append(rng.choice(ODD if kind == 2 else MARKS))
        texts.append(rng.choice(("", " ")).join(parts))
    return texts


def vectors() -> dict[str, int]:
    """How many of the 47 published vectors each tokenizer reproduces."""
    from shoal.text.tokenizer import Tokenizer

    folder = SHARED / "data" / "tokenizers" / "test_vectors"
    texts = (folder / "input.txt").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    found = {}
    for name in ("gpt2", "qwen2", "gpt_neox_20b"):
        lines = (folder / f"{name}.out").read_text(encoding="utf-8").split("\n")
        wanted = [[int(word) for word in line.split()] for line in lines]
        ids = Tokenizer.load(FOLDERS[name]).encode_batch(texts, special=False)
        found[name] = sum(a.tolist() == b for a, b in zip(ids, wanted, strict=False))
    return found


def against_transformers(texts: list[str]) -> dict[str, dict[str, int]]:
    """Differences in ids and in decoded text, with and without special tokens."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer, GPT2Tokenizer

    from shoal.text.tokenizer import Tokenizer

    found = {}
    for name, folder in FOLDERS.items():
        ours = Tokenizer.load(folder)
        judge: Any = (GPT2Tokenizer if name == "gpt2" else AutoTokenizer).from_pretrained(folder)
        ids = {special: ours.encode_batch(texts, special) for special in (True, False)}
        counts = {"texts": len(texts), "encode": 0, "decode": 0}
        for special in (True, False):
            wanted = judge(texts, add_special_tokens=special)["input_ids"]
            counts["encode"] += sum(a.tolist() != b for a, b in zip(ids[special], wanted, strict=True))
            for row in wanted:
                text = judge.decode(row, skip_special_tokens=special, clean_up_tokenization_spaces=False)
                counts["decode"] += ours.decode(row, skip_special=special) != text
        found[name] = counts
    return found


def encoding_speed(words: list[str], count: int) -> dict[str, float]:
    """A million chat-shaped texts, 1,000 at a time; the library's own batch encoding on some of them as control."""
    from shoal.text.tokenizer import Tokenizer

    rng = random.Random(SEED)
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"

    def text() -> str:
        start = rng.randrange(len(words) - 40)
        return head + " ".join(words[start : start + rng.randrange(10, 25)]) + "<|im_end|>\n<|im_start|>assistant\n"

    tokenizer = Tokenizer.load(FOLDERS["qwen2"])
    idle = memory_now()["anonymous"]
    seconds = processor = control = 0.0
    tokens = control_tokens = peak = 0
    for batch in range(count // 1000):
        texts = [text() for _ in range(1000)]
        started, processor_started = time.perf_counter(), time.process_time()
        ids = tokenizer.encode_batch(texts)
        seconds += time.perf_counter() - started
        processor += time.process_time() - processor_started
        tokens += sum(map(len, ids))
        peak = max(peak, memory_now()["anonymous"]) if batch % 50 == 0 else peak
        if batch % 50 == 49:
            started = time.perf_counter()
            library = [e.ids for e in tokenizer.backend.encode_batch_fast(texts)]
            control += time.perf_counter() - started
            control_tokens += sum(map(len, library))
            assert library == [row.tolist() for row in ids]
    return {
        "texts": count,
        "tokens": tokens,
        "seconds": seconds,
        "processor_seconds": processor,
        "tokens_per_second": tokens / seconds,
        "library_tokens_per_second": control_tokens / control if control else 0.0,
        "anonymous_bytes_above_idle": peak - idle,
    }


def rendering_times() -> dict[str, float]:
    """Best time of a short chat, in µs, for each template of the tests but the one that tries every feature."""
    from some_templates import TEMPLATES, VARIABLES

    from shoal.text.chat import ChatTemplate

    messages = [{"role": "user", "content": "Where do the herring go in winter?"}]
    found = {}
    for name, source in TEMPLATES.items():
        template = ChatTemplate({"default": source}, VARIABLES)
        if name != "odd":
            found[name] = best(lambda template=template: template.render(messages), 300) * 1e6
    return found


def best(call: Callable[[], object], times: int) -> float:
    """Processor seconds of one call: the least mean over twenty rounds."""
    least = float("inf")
    for _ in range(20):
        started = time.thread_time()
        for _ in range(times):
            call()
        least = min(least, (time.thread_time() - started) / times)
    return least


def detokenizing(words: list[str], answers: int) -> dict[str, float]:
    """µs a token for short and long answers with stop strings, and wrong texts among random answers."""
    from shoal.text.detok import Detokenizer
    from shoal.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(FOLDERS["qwen2"])
    found: dict[str, float] = {}
    for length in (100, 1_000, 10_000):
        ids = tokenizer.encode(" ".join(words[: length * 2]))[:length].tolist()

        def answer(ids: list[int] = ids) -> None:
            detok = Detokenizer(tokenizer, stop=("\n\nQuestion:", "Never said."))
            for token in ids:
                detok.push((token,))
            detok.finish()

        found[f"us_per_token_{length}"] = best(answer, 1) / length * 1e6
    rng = random.Random(SEED)
    wrong = 0
    for name in FOLDERS:
        some = Tokenizer.load(FOLDERS[name])
        for _ in range(answers // len(FOLDERS)):
            ids = [rng.randrange(some.vocab_size if rng.random() < 0.5 else 300) for _ in range(rng.randrange(40))]
            detok = Detokenizer(some)
            text = ""
            start = 0
            while start < len(ids):
                size = rng.randrange(1, 6)
                text += detok.push(ids[start : start + size])
                start += size
            wrong += text + detok.finish() != some.decode(ids)
    return {**found, "answers": answers, "wrong": wrong}


def main() -> int:
    """Measure, print, write, and say whether every claim holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if not Path(FOLDERS["qwen2"]).is_dir():
        print("the shared tokenizers are not beside this repository: nothing to prove here")
        return 1
    words = prose()
    result: dict[str, Any] = {"texts_asked": arguments.texts, "load_average": os.getloadavg()[0]}
    result["vectors_of_47"] = vectors()
    result["encoding"] = encoding_speed(words, arguments.texts)
    result["rendering_us"] = rendering_times()
    result["detokenizing"] = detokenizing(words, 20_000)
    result["against_transformers"] = against_transformers(odd_texts(words, 4_000))
    slow, fast = (result["detokenizing"][f"us_per_token_{n}"] for n in (10_000, 1_000))
    claims = {
        "vectors": all(count == 47 for count in result["vectors_of_47"].values()),
        "equal to transformers": not any(c["encode"] + c["decode"] for c in result["against_transformers"].values()),
        "a million texts within 60 s of one core": result["encoding"]["processor_seconds"] / arguments.texts * 1_000_000
        < 60,
        "within 400 MB": result["encoding"]["anonymous_bytes_above_idle"] < 400e6,
        "a chat within 15 us": max(result["rendering_us"].values()) < 15,
        "time per token does not grow": slow < 1.5 * fast,
        "text is the decode": result["detokenizing"]["wrong"] == 0,
    }
    result["claims"], result["shown"] = claims, all(claims.values())
    path = write_result("tokenizers", result, SEED)
    for name in ("vectors_of_47", "encoding", "rendering_us", "detokenizing", "against_transformers", "claims"):
        print(name, result[name])
    print("written to", path)
    return 0 if result["shown"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
