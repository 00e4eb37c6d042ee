"""The tokenizer files of a checkpoint folder, and the tokenizer they describe, built as transformers would build it.

Knows file names, configuration keys and their defaults; it must not know how texts are encoded or decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from shoal.core.errors import ModelError

HASHED = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")

CONVERT = (
    'python -c "from transformers import AutoTokenizer; '
    "AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files of one folder that decide how text becomes tokens, parsed."""

    folder: Path
    config: Mapping[str, Any]  # tokenizer_config.json, {} when absent
    special_map: Mapping[str, Any]  # special_tokens_map.json
    added: Mapping[str, int]  # added_tokens.json
    model_config: Mapping[str, Any]  # config.json
    generation_config: Mapping[str, Any]  # generation_config.json

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read every file that is there. ModelError for a folder that is none, or a file that is not JSON."""
        if not folder.is_dir():
            raise ModelError(f"{folder} is not a folder: give the folder of a checkpoint with its tokenizer files")
        return cls(
            folder=folder,
            config=read_json(folder / "tokenizer_config.json"),
            special_map=read_json(folder / "special_tokens_map.json"),
            added=read_json(folder / "added_tokens.json"),
            model_config=read_json(folder / "config.json"),
            generation_config=read_json(folder / "generation_config.json"),
        )

    def digest(self) -> str:
        """sha256 over name, length and content of the tokenizer files, sorted by name; hexadecimal."""
        total = hashlib.sha256()
        for name in sorted(HASHED):
            path = self.folder / name
            if path.is_file():
                content = path.read_bytes()
                total.update(f"{name}\0{len(content)}\0".encode())
                total.update(content)
        return total.hexdigest()

    def named_tokens(self) -> dict[str, AddedToken]:
        """The tokens with a role (bos_token, …): of tokenizer_config.json, else special_tokens_map.json."""
        found = {}
        for name in NAMED_TOKENS:
            value = self.config.get(name) if name in self.config else self.special_map.get(name)
            if value is not None:
                found[name] = added_token(value, special=True)
        if not (self.folder / "tokenizer.json").is_file() and (self.folder / "vocab.json").is_file():
            for name in ("bos_token", "eos_token", "unk_token") if self.style == "gpt2" else ("eos_token", "unk_token"):
                if name not in self.config and name not in self.special_map:
                    found[name] = added_token("<|endoftext|>", special=True)
        return found

    def extra_tokens(self) -> list[AddedToken]:
        """Further special tokens without a role."""
        values: list[Any] = []
        for name in EXTRA_TOKENS:
            value = self.config.get(name, self.special_map.get(name)) or []
            values.extend(value.values() if isinstance(value, dict) else value)
        return [added_token(value, special=True) for value in values]

    def listed_tokens(self) -> list[tuple[int, AddedToken]]:
        """(id, token) of `added_tokens_decoder` and added_tokens.json, by id."""
        listed: dict[int, AddedToken] = {}
        try:
            for text, token_id in self.added.items():
                listed[int(token_id)] = AddedToken(text, normalized=False, special=False)
            for key, value in (self.config.get("added_tokens_decoder") or {}).items():
                listed[int(key)] = added_token(value, special=False)
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{self.folder}: added_tokens.json or added_tokens_decoder gives a token no number: {error}"
            ) from error
        return sorted(listed.items(), key=lambda item: item[0])

    @property
    def style(self) -> str:
        """ "qwen2" or "gpt2": whose rules split the words of a vocab.json with merges.txt."""
        name = self.config.get("tokenizer_class")
        if name is None:
            kind = str(self.model_config.get("model_type") or "gpt2")
            name = "Qwen2Tokenizer" if kind.startswith("qwen") else "GPT2Tokenizer"
        if name in QWEN2_CLASSES:
            return "qwen2"
        if name in GPT2_CLASSES:
            return "gpt2"
        raise ModelError(
            f"{self.folder} has vocab.json and merges.txt of a {name}, which only its tokenizer.json describes fully. "
            f"Make one with: {CONVERT.format(folder=self.folder)}"
        )

    def eos_ids(self) -> list[int]:
        """End-of-sequence ids of generation_config.json, or of config.json when that names none."""
        value = self.generation_config.get("eos_token_id")
        if value is None:
            value = self.model_config.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file, {} when there is no such file; ModelError when it holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object: fetch the checkpoint again")
    return value


def added_token(value: Any, special: bool) -> AddedToken:
    """An added token from its JSON form: a string, or an object with `content` and flags."""
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {k: bool(value[k]) for k in ("single_word", "lstrip", "rstrip", "normalized") if k in value}
        return AddedToken(value["content"], special=bool(value.get("special", special)), **flags)
    raise ModelError(f"a special token is neither a string nor an object with 'content': {value!r:.80}")


def build(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """The tokenizer of a folder: from tokenizer.json, else from vocab.json with merges.txt. ModelError for neither."""
    folder = files.folder
    if (folder / "tokenizer.json").is_file():
        with _refused(f"{folder / 'tokenizer.json'} cannot be read"):
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_merges(files)
    else:
        raise ModelError(_nothing_to_load(folder))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(files.config.get("split_special_tokens", False))
    _add_tokens(backend, files)
    _set_ends(backend, files)
    return backend


@contextmanager
def _refused(words: str) -> Iterator[None]:
    """Say with these words that what is read here is malformed."""
    try:
        yield
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise ModelError(f"{words}: {error}") from error


def _nothing_to_load(folder: Path) -> str:
    if any(folder.glob("*.model")) or any(folder.glob("*.model.v*")) or any(folder.glob("tekken*.json")):
        return (
            f"{folder} has only a SentencePiece or tekken tokenizer, which Shoal does not read. Convert it once "
            f"(pip install transformers sentencepiece protobuf): {CONVERT.format(folder=folder)}"
        )
    return f"{folder} has no tokenizer: it needs tokenizer.json, or vocab.json with merges.txt"


def _from_merges(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Byte-level BPE from vocab.json and merges.txt, split in GPT-2's or Qwen2's way."""
    qwen = files.style == "qwen2"
    listed = {token.content: token_id for token_id, token in files.listed_tokens()}
    with _refused(f"vocab.json and merges.txt in {files.folder} do not fit together"):
        vocab, merges = models.BPE.read_file(str(files.folder / "vocab.json"), str(files.folder / "merges.txt"))
        # Listed tokens enter with their own ids: added afterwards they would be numbered without gaps.
        backend = tokenizers.Tokenizer(models.BPE({**vocab, **listed}, merges, fuse_unk=False))
    space = bool(files.config.get("add_prefix_space", False))
    if qwen:
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Add the tokens that the configuration lists and the backend lacks; mark the special ones."""
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in files.listed_tokens():
        if token.content in present:
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ModelError(
                f"{files.folder}: token {token.content!r} is listed with id {token_id} but the vocabulary gives it "
                f"{backend.token_to_id(token.content)}: the tokenizer files are of different models"
            )
    special = {token.content: token for token in (*files.named_tokens().values(), *files.extra_tokens())}
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([known.get(text, token) for text, token in special.items()])


def _set_ends(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Obey add_bos_token and add_eos_token where the configuration names one of them, as transformers does."""
    if "add_bos_token" not in files.config and "add_eos_token" not in files.config:
        return
    named = files.named_tokens()
    bos = named.get("bos_token") if files.config.get("add_bos_token") else None
    eos = named.get("eos_token") if files.config.get("add_eos_token") else None
    ends = [token.content for token in (bos, eos) if token is not None]
    before = f"{bos.content}:0 " if bos else ""
    after = f" {eos.content}:0" if eos else ""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before}$A:0{after}",
        pair=f"{before}$A:0{after} {before.replace(':0', ':1')}$B:1{after.replace(':0', ':1')}",
        special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys(ends)],
    )
