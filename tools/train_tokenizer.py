"""Trains a tokenizer like the embedded model's; it knows text and merges, and nothing of weights.

One command, with the shared data beside the repository (about half a minute, the result is always the same):

    .venv/bin/python tools/train_tokenizer.py

It writes to build/tokenizer. The tokenizer in the package was made so before the sums and the lists to sort got
shorter, and its weights depend on it: only a model that is trained anew may take another one (`--output`).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from make_tasks import training_chats
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
CORPORA = ROOT.parent / "shared" / "data" / "corpora"
FOLDER = ROOT / "shoal" / "models" / "minnow"
END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 4096
# Words with their leading space, digits one by one (sums are learnt by digit), runs of signs, white space.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def public_domain_texts() -> list[str]:
    """The novels and the plays, one string each; paragraphs of wrapped lines are joined to one line."""
    if not CORPORA.is_dir():
        sys.exit(f"no shared data at {CORPORA}: put it beside the repository")
    texts = []
    for path in sorted([*CORPORA.glob("novels/*.txt*"), *CORPORA.glob("tinyshakespeare.txt*")]):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8", errors="replace").replace("\r\n", "\n")
        lines = [line for line in text.split("\n") if line.strip()]
        wrapped = sum(len(line) for line in lines) / len(lines) < 90
        if wrapped and "\n\n" in text and "shakespeare" not in path.name:
            paragraphs = (re.sub(r"\s*\n\s*", " ", part.strip()) for part in re.split(r"\n\s*\n", text))
            text = "\n".join(part for part in paragraphs if part)
        texts.append(text)
    return texts


def training_text() -> Iterator[str]:
    """What the merges are counted on: every second paragraph of the books, and 60,000 task conversations."""
    for text in public_domain_texts():
        yield from text.split("\n")[::2]
    for chat in itertools.islice(training_chats(seed=7), 60_000):
        yield from (content for _, content in chat.messages)


def main() -> None:
    """Train and write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    options = argparse.ArgumentParser(description="Train a byte-level tokenizer.")
    options.add_argument("--output", type=Path, default=ROOT / "build" / "tokenizer")
    folder: Path = options.parse_args().output
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, CHAT_START, CHAT_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": END_OF_TEXT, "eos_token": CHAT_END, "pad_token": END_OF_TEXT}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(
        json.dumps(special | {"additional_special_tokens": [CHAT_START, CHAT_END]}, indent=2) + "\n"
    )
    print(f"{tokenizer.get_vocab_size()} tokens in {folder}")


if __name__ == "__main__":
    main()
