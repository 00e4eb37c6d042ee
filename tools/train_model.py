"""Trains the embedded model and exports it; it knows losses and schedules, and nothing of how tasks are made.

One command, with the shared data beside the repository and the tokenizer in place (about an hour on two cores):

    .venv/bin/python tools/train_model.py

The state is saved every few minutes: the same command with `--resume` goes on after an interruption. The rate stays
level until the last `--decay` steps and then falls to nothing, so that `--steps` may be changed on the way.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from make_tasks import Chat, held_out_chats, training_chats
from small_llama import Shape, SmallLlama, export, plant_copying
from tokenizers import Tokenizer
from torch import Tensor
from train_tokenizer import CHAT_END, CHAT_START, END_OF_TEXT, FOLDER, ROOT, public_domain_texts

BATCH_TOKENS = 2048  # of padded conversations in one micro-batch
PARTS = 1  # micro-batches of a step, worked on side by side
TEXT_ROWS, TEXT_LENGTH = 1, 256
TEXT_WEIGHT = 0.2
CHUNK = 1536  # conversations that are sorted by length together
MATRIX_RATE, TABLE_RATE, NORM_RATE = 0.02, 0.01, 0.002
WARM_UP = 60


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, and for each position whether the model is asked to predict it."""

    ids: list[int]
    wanted: list[bool]
    kind: str


class Encoder:
    """Chats to token ids in the chat template's layout."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start, self.end = tokenizer.token_to_id(CHAT_START), tokenizer.token_to_id(CHAT_END)
        self.newline = tokenizer.encode("\n").ids
        self.headers = {role: tokenizer.encode(role + "\n").ids for role in ("system", "user", "assistant")}

    def encode(self, chats: list[Chat]) -> list[Sample]:
        """One sample per chat; the assistant's words and their end mark are wanted."""
        texts = [content for chat in chats for _, content in chat.messages]
        encoded = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        samples = []
        for chat in chats:
            ids: list[int] = []
            wanted: list[bool] = []
            for role, _ in chat.messages:
                head, body = [self.start, *self.headers[role]], [*next(encoded).ids, self.end]
                ids += head + body + self.newline
                wanted += [False] * len(head) + [role == "assistant"] * len(body) + [False] * len(self.newline)
            samples.append(Sample(ids, wanted, chat.kinds[-1]))
        return samples


def task_batches(encoder: Encoder, seed: int, first_chunk: int) -> Iterator[tuple[int, list[Sample]]]:
    """Micro-batches of about equal length, with the number of the chunk they come from."""
    for chunk in itertools.count(first_chunk):
        chats = list(itertools.islice(training_chats(seed * 1_000_003 + chunk), CHUNK))
        samples = sorted(encoder.encode(chats), key=lambda sample: len(sample.ids))
        batches: list[list[Sample]] = [[]]
        for sample in samples:
            if (len(batches[-1]) + 1) * len(sample.ids) > BATCH_TOKENS and batches[-1]:
                batches.append([])
            batches[-1].append(sample)
        random.Random(chunk).shuffle(batches)
        for batch in batches:
            yield chunk, batch


def padded(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """(ids [rows, length], wanted [rows, length]); what pads is never wanted."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.int64)
    wanted = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        wanted[row, : len(sample.ids)] = torch.tensor(sample.wanted)
    return ids, wanted


def wanted_logits(model: SmallLlama, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [n, vocabulary], targets [n]) of the wanted positions, which the position before them predicts."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        hidden = model(ids[:, :-1])
        logits = model.logits(hidden[wanted[:, 1:]])
    return logits.float(), ids[:, 1:][wanted[:, 1:]]


class Muon:
    """Momentum whose update is made orthogonal (Newton-Schulz), for matrices; equal shapes are worked on together."""

    def __init__(self, weights: list[Tensor]) -> None:
        groups: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for weight in weights:
            groups[(min(weight.shape), max(weight.shape))].append(weight)
        self.groups = list(groups.values())
        self.momenta = [[torch.zeros_like(weight) for weight in group] for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float, momentum: float = 0.95, decay: float = 0.02) -> None:
        """One update of all weights from their gradients."""
        for group, momenta in zip(self.groups, self.momenta, strict=True):
            wide = []
            for weight, velocity in zip(group, momenta, strict=True):
                assert weight.grad is not None
                velocity.lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(velocity, momentum)
                wide.append(update.T if update.shape[0] > update.shape[1] else update)
            for weight, update in zip(group, orthogonal(torch.stack(wide)), strict=True):
                turned = update.T if weight.shape[0] > weight.shape[1] else update
                weight.mul_(1 - rate * decay)
                weight.add_(turned.to(weight.dtype), alpha=-rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


def orthogonal(stack: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps on [n, rows, columns], rows <= columns: singular values near 1."""
    x = stack.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x


class Run:
    """The whole state of training: model, both optimisers, where in the data it is, and how to save it."""

    def __init__(self, seed: int, threads: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.seed, self.step, self.chunk, self.tokens, self.seconds = seed, 0, 0, 0, 0.0
        self.model = SmallLlama(Shape())
        self.planted = plant_copying(self.model)
        matrices = [weight for name, weight in self.model.named_parameters() if "_proj" in name]
        norms = [weight for name, weight in self.model.named_parameters() if "norm" in name]
        table = [self.model.embed_tokens.weight]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW([{"params": table}, {"params": norms}], betas=(0.9, 0.95), weight_decay=0.0)
        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        self.encoder = Encoder(self.tokenizer)
        self.workers = ThreadPoolExecutor(threads)

    def save(self, path: Path) -> None:
        """Write the state through a temporary file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "counters": (self.step, self.chunk, self.tokens, self.seconds),
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "muon": self.muon.momenta,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Read a state; the data goes on with the next chunk."""
        state = torch.load(path, weights_only=True)
        self.step, self.chunk, self.tokens, self.seconds = state["counters"]
        self.chunk += 1
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.muon.momenta = state["muon"]

    def books(self, path: Path) -> Tensor:
        """The token ids of all books, kept in a file between calls."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.tensor(book_tokens(self.tokenizer), dtype=torch.int16), path)
        return torch.load(path, weights_only=True)

    def export(self, folder: Path) -> None:
        """Write the model files beside the tokenizer."""
        export(self.model, folder, [self.tokenizer.token_to_id(CHAT_END), self.tokenizer.token_to_id(END_OF_TEXT)])

    def train(self, steps: int, decay: int, state_path: Path, stop_after: float) -> None:
        """Go on to `steps`, or until `stop_after` seconds of this call have passed."""
        tasks = task_batches(self.encoder, self.seed, self.chunk)
        books = self.books(state_path.with_name("books.pt"))
        began = saved = said = time.monotonic()
        losses: list[tuple[float, float]] = []
        while self.step < steps and time.monotonic() - began < stop_after:
            losses.append(self.one_step(tasks, books, level(self.step, steps, decay)))
            now = time.monotonic()
            if self.step % 50 == 0:
                task, text = (sum(column) / len(losses) for column in zip(*losses, strict=True))
                speed = (now - said) / len(losses)
                print(
                    f"step {self.step} tokens {self.tokens} task {task:.3f} text {text:.3f} {speed:.2f} s", flush=True
                )
                losses, said = [], now
            if self.step % 500 == 0 or self.step == steps:
                print("  exact: " + "  ".join(f"{kind} {share:.2f}" for kind, share in exact(self).items()), flush=True)
            if now - saved > 180:
                self.seconds += now - saved
                self.save(state_path)
                saved = now
        self.seconds += time.monotonic() - saved
        self.save(state_path)

    def one_step(self, tasks: Iterator[tuple[int, list[Sample]]], books: Tensor, share: float) -> tuple[float, float]:
        """As many micro-batches of tasks and of text as there are workers, one update; returns both mean losses."""
        rng = random.Random(self.seed * 7_919 + self.step)
        jobs = []
        for _ in range(PARTS):
            self.chunk, samples = next(tasks)
            starts = [rng.randrange(len(books) - TEXT_LENGTH) for _ in range(TEXT_ROWS // PARTS)]
            text = torch.stack([books[start : start + TEXT_LENGTH] for start in starts]).long()
            self.tokens += sum(len(sample.ids) for sample in samples) + text.numel()
            jobs.append((*padded(samples), text))
        results = list(self.workers.map(lambda job: self.gradients(*job), jobs))
        for weight, *parts in zip(self.model.parameters(), *(found for _, _, found in results), strict=True):
            weight.grad = torch.stack(parts).mean(0)
        for group, rate in zip(self.adam.param_groups, (TABLE_RATE, NORM_RATE), strict=True):
            group["lr"] = rate * share
        self.adam.step()
        self.muon.step(MATRIX_RATE * share)
        for planted in self.planted:
            planted.restore()
        self.step += 1
        return sum(task for task, _, _ in results) / PARTS, sum(text for _, text, _ in results) / PARTS

    def gradients(self, ids: Tensor, wanted: Tensor, text: Tensor) -> tuple[float, float, tuple[Tensor, ...]]:
        """(task loss, text loss, gradients of their weighted sum) of one worker's share of a step."""
        torch.set_num_threads(1)
        task_loss = F.cross_entropy(*wanted_logits(self.model, ids, wanted))
        text_loss = F.cross_entropy(*wanted_logits(self.model, text, torch.ones_like(text, dtype=torch.bool)))
        found = torch.autograd.grad(task_loss + TEXT_WEIGHT * text_loss, list(self.model.parameters()))
        return task_loss.item(), text_loss.item(), found


def level(step: int, steps: int, decay: int) -> float:
    """The share of the full rate at a step: warm-up, level, then straight down over the last `decay` steps."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / decay)


def book_tokens(tokenizer: Tokenizer) -> list[int]:
    """All books, one after the other, an end mark before each paragraph group of about forty lines."""
    end, newline = tokenizer.token_to_id(END_OF_TEXT), tokenizer.encode("\n").ids
    tokens: list[int] = []
    for text in public_domain_texts():
        for place, encoding in enumerate(tokenizer.encode_batch_fast(text.split("\n"))):
            tokens += [end] * (place % 40 == 0) + encoding.ids + newline
    return tokens


@torch.no_grad()
def exact(run: Run, count: int = 330) -> dict[str, float]:
    """By kind, the share of held-out answers whose every token is the likeliest one, as greedy decoding has it."""
    right: dict[str, list[bool]] = defaultdict(list)
    samples = sorted(run.encoder.encode(held_out_chats(99, count)), key=lambda sample: len(sample.ids))
    for start in range(0, count, 50):
        batch = samples[start : start + 50]
        ids, wanted = padded(batch)
        logits, targets = wanted_logits(run.model, ids, wanted)
        hits = iter((logits.argmax(-1) == targets).tolist())
        for sample in batch:
            right[sample.kind].append(min(list(itertools.islice(hits, sum(sample.wanted)))))
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


def main() -> None:
    """Train to the asked step and export."""
    options = argparse.ArgumentParser(description="Train the embedded model.")
    options.add_argument("--steps", type=int, default=4000)
    options.add_argument("--decay", type=int, default=1000, help="last steps over which the rate falls")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--state", type=Path, default=ROOT / "build" / "minnow.pt")
    options.add_argument("--resume", action="store_true", help="go on from --state")
    options.add_argument("--minutes", type=float, default=1e9, help="stop and save after this long")
    options.add_argument("--output", type=Path, default=FOLDER)
    chosen = options.parse_args()
    run = Run(chosen.seed, chosen.threads)
    if chosen.resume:
        run.load(chosen.state)
    run.train(chosen.steps, chosen.decay, chosen.state, chosen.minutes * 60)
    run.export(chosen.output)
    print(f"{run.step} steps, {run.tokens} tokens, {run.seconds:.0f} s, {chosen.output}")


if __name__ == "__main__":
    main()
