"""Proof: answers are kept to their schemas, end, and cost little more than free ones.

It knows the schemas beside the repository, jobs and the engine process; it must not know how masks are made.
Claims, by part:
  judged      of MaskBench's first schemas those that compile accept their valid instances and reject the others, token
              by token; at least as many compile as in the grammar library by itself
  rows        rows of JSONSchemaBench answered by the embedded model: what ends in `stop` validates with jsonschema, at
              most 1 % ends in `length`, a schema that cannot be kept fails its row and is named a keyword of its own
  cost        64 rows at once in the engine process, embedded model: at most 1.3 times the time of free rows of the same
              lengths; with one schema for all rows, new to the engine in each turn, and with one for each row, which it
              has seen. What 64 schemas cost that it has not seen is told beside them
  cost_large  the same on a 387M-parameter random model: at most 1.1 times

    python -m benchmarks.prove_structured [judged rows cost cost_large]
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import jsonschema
import numpy as np

import shoal
from benchmarks.common import RESULTS, ROOT, SHARED, commit, write_result
from benchmarks.prove_planning import model
from shoal.client import Begin, EngineProcess
from shoal.core.config import EngineConfig
from shoal.core.errors import RowError
from shoal.core.types import TOKEN, Constraint, Finish, Request, Sampling
from shoal.text import constraint
from shoal.text.chat import ChatTemplate
from shoal.text.checkpoint import resolve_model
from shoal.text.constraint import Checker
from shoal.text.grammar import Grammars, Matching
from shoal.text.tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "tests" / "null"))  # how a schema would have its instances written

from schema_order import writings

SCHEMAS = SHARED / "data" / "json_schema"
SEED = 5
JUDGED, ROWS, BATCH = 200, 500, 64
LIMIT_TOKENS = 1024  # of a row of JSONSchemaBench
MOST_CUT = 0.01  # of those rows may end in `length`
SMALL_COST, LARGE_COST = 1.3, 1.1
ONE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "description": {"type": "string", "maxLength": 120},
        "price": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
    },
    "required": ["name", "description", "price", "tags"],
    "additionalProperties": False,
}

Part = tuple[dict[str, Any], dict[str, bool]]  # what was found, and which claims hold


def schemas(*names: str) -> list[Any]:
    """The schemas of these files of JSONSchemaBench, of all where none is named."""
    found = []
    for path in sorted((SCHEMAS / "jsonschemabench").iterdir()):
        if not names or path.name.split(".")[0] in names:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            found += [json.loads(line)["schema"] for line in text.splitlines()]
    return [json.loads(each) if isinstance(each, str) else each for each in found]


# -- token by token ---------------------------------------------------------------------------------


class Judge:
    """Whether a constraint lets a text come, in the embedded model's tokens."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.load(resolve_model(""))
        self.grammars = Grammars(self.tokenizer, self.tokenizer.vocab_size)

    def accepts(self, wanted: Constraint, text: str) -> bool:
        """Whether every token of the text may come, and then the end."""
        row = self.grammars.begin(wanted, self.tokenizer.eos, 1 << 20, ())
        assert not row.problem, row.problem
        for token in self.tokenizer.encode(text, special=False).tolist():
            if not may_come(row, token):
                return False
            self.grammars.advance([(row, token)])
        return any(may_come(row, end) for end in self.tokenizer.eos)


def may_come(row: Matching, token: int) -> bool:
    return row.bits is not None and bool(row.bits.view(np.uint32)[token >> 5] >> (token & 31) & 1)


def library_compiles(schema: Any) -> bool:
    """Whether the grammar library by itself takes a schema."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    from shoal.text.constraint import _Bytes

    matcher = LLMatcher(
        LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=256),
        LLMatcher.grammar_from_json_schema(json.dumps(schema)),
        log_level=0,
    )
    return not matcher.is_error()


def judged() -> Part:
    """MaskBench's instances, with spaces between their words and without."""
    judge, checker = Judge(), Checker()
    compiled = library = instances = 0
    wrong: list[str] = []
    with gzip.open(SCHEMAS / "maskbench_sample.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(JUDGED), strict=False)]
    for row in rows:
        library += library_compiles(row["schema"])
        wanted = constraint.json_schema(row["schema"])
        try:
            checker.check(wanted)
        except RowError:
            continue
        compiled += 1
        for test in row["tests"]:
            for texts in writings(test["data"], row["schema"]):
                instances += 1
                if any(judge.accepts(wanted, text) for text in texts) is not test["valid"]:
                    wrong.append(row["id"])
    found = {
        "schemas": len(rows), "compiled": compiled, "library_compiles": library, "instances": instances, "wrong": wrong
    }  # fmt: skip
    claims = {"instances_are_judged_right": not wrong, "as_many_compile_as_in_the_library": compiled >= library}
    return found, claims


# -- rows -------------------------------------------------------------------------------------------


def write_rows(path: Path, wanted: Sequence[Any]) -> Path:
    """A row for each schema, every other greedy."""
    with path.open("w") as file:
        for number, schema in enumerate(wanted):
            subject = str(schema.get("title") or schema.get("description") or "anything")[:200]
            body = {
                "messages": [{"role": "user", "content": f"Write JSON about {subject}."}],
                "max_tokens": LIMIT_TOKENS, "temperature": number % 2 * 0.8,
                "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
            }  # fmt: skip
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def words(schema: Any) -> set[str]:
    """Every key of a schema, and every text that is a format or a reference."""
    if isinstance(schema, list):
        return set().union(*map(words, schema))
    if not isinstance(schema, dict):
        return set()
    said = {value for name, value in schema.items() if name in ("format", "$ref", "pattern") and isinstance(value, str)}
    return set(schema) | said | set().union(*map(words, schema.values()))


def named(message: str, schema: Any) -> bool:
    """Whether a refusal names something that stands in the schema."""
    own = words(schema) - {"type", "properties", "title", "description"}
    return any(word and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message) for word in own)


def validator(schema: Any) -> Any:
    """jsonschema's, with multiples told exactly: it divides floats, which are too small for what a model may write."""
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return jsonschema.validators.extend(kind, {"multipleOf": _multiple})(schema)


def _multiple(_: Any, of: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if type(value) in (int, float) and Fraction(str(value)) % Fraction(str(of)):
        yield jsonschema.ValidationError(f"{value} is not a multiple of {of}")


def rows() -> Part:
    """Rows of all kinds of schemas through the whole job."""
    luck, found = Random(SEED), schemas()
    wanted = [each for each in luck.sample(found, len(found)) if isinstance(each, dict)][:ROWS]
    ends: Counter[str] = Counter()
    invalid, unnamed, reasons = [], [], Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        began, out = time.monotonic(), Path(name) / "out.jsonl"
        report = shoal.run(write_rows(Path(name) / "in.jsonl", wanted), out)
        seconds = time.monotonic() - began
        for line in out.read_text().splitlines():
            row = json.loads(line)
            choice, schema = row["response"]["body"]["choices"][0], wanted[int(row["custom_id"])]
            ends[choice["finish_reason"]] += 1
            if choice["finish_reason"] == "stop":
                try:
                    validator(schema).validate(json.loads(choice["message"]["content"]))
                except (ValueError, jsonschema.ValidationError) as error:
                    invalid.append(f"{row['custom_id']}: {str(error)[:200]}")
        for line in (Path(name) / "out.errors.jsonl").read_text().splitlines():
            row = json.loads(line)
            error = row["response"]["body"]["error"]
            ends[error["code"]] += 1
            reasons[re.sub(r'"[^"]*"|\d+', "…", error["message"])[:90]] += 1
            if not named(error["message"], wanted[int(row["custom_id"])]):
                unnamed.append(f"{row['custom_id']}: {error['message']}")
    data = {
        "rows": len(wanted), "ends": dict(ends), "output_tokens": report.tokens.output, "seconds": round(seconds, 1),
        "invalid": invalid, "unnamed": unnamed, "reasons": dict(reasons.most_common()),
    }  # fmt: skip
    claims = {
        "what_stops_is_valid": not invalid and ends["stop"] > 0.8 * len(wanted),
        "few_end_in_length": ends["length"] <= MOST_CUT * len(wanted),
        "the_rest_fail_with_the_keyword": not unnamed
        and ends["stop"] + ends["length"] + ends["invalid_constraint"] == len(wanted),
    }
    return data, claims


# -- cost -------------------------------------------------------------------------------------------


class Turns:
    """One model in the engine process, answering the same rows with constraints and without."""

    def __init__(self, folder: Path | str, tokens: int) -> None:
        path = resolve_model(str(folder))
        self.tokenizer, self.tokens = Tokenizer.load(path), tokens
        template = ChatTemplate.load(path)
        texts = [f"Describe the thing number {i} in a few words." for i in range(BATCH)]
        if template.sources:
            texts = [template.render([{"role": "user", "content": text}]) for text in texts]
        self.prompts = [array(TOKEN, self.tokenizer.encode(text, special=False).tolist()) for text in texts]
        self.engine, self.asked = EngineProcess(), 0
        self.engine.begin(Begin(EngineConfig.from_mapping({"model": str(folder), "context": 1024}), None))
        while self.engine.ready(1.0) is None:
            pass

    def run(self, requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
        """Seconds until all have ended, and their tokens."""
        self.asked += 1
        began, left = time.perf_counter(), {f"{self.asked}.{each.id}": each for each in requests}
        found: dict[str, list[int]] = {}
        self.engine.submit([replace(each, id=id) for id, each in left.items()])
        while len(found) < len(left):
            news = self.engine.outputs(1.0)
            for output in news.outputs if news is not None else ():
                assert output.finish in (Finish.STOP, Finish.LENGTH), output
                found[output.id] = output.tokens
        return time.perf_counter() - began, [found[id] for id in left]

    def structured(self, wanted: Sequence[Any], new: bool) -> list[Request]:
        """A row under each schema, with a remark that can make it a new one to the engine."""
        remark = {"$comment": str(self.asked if new else 0)}
        sampling = Sampling(max_tokens=self.tokens, stop=self.tokenizer.eos)
        return [
            Request(str(i), prompt, sampling, constraint=constraint.json_schema(schema | remark))
            for i, (prompt, schema) in enumerate(zip(self.prompts, wanted, strict=True))
        ]

    def free(self, lengths: Sequence[int]) -> list[Request]:
        """Rows without constraints that are as long."""
        return [
            Request(str(i), prompt, Sampling(max_tokens=length))
            for i, (prompt, length) in enumerate(zip(self.prompts, lengths, strict=True))
        ]

    def compare(self, wanted: Sequence[Any], new: bool, turns: int) -> dict[str, Any]:
        """The time of both by turns, after one turn that is not counted."""
        _, answers = self.run(self.structured(wanted, new))
        lengths = [len(tokens) for tokens in answers]
        self.run(self.free(lengths))
        seconds = []
        for turn in range(turns):
            order = ("structured", "free") if turn % 2 else ("free", "structured")
            took = {}
            for kind in order:
                asked = self.structured(wanted, new) if kind == "structured" else self.free(lengths)
                took[kind], again = self.run(asked)
                assert kind == "free" or again == answers, "another answer to the same question"
            seconds.append((took["structured"], took["free"]))
        ratios = [one / other for one, other in seconds]
        return {"ratio": median(ratios), "ratios": ratios, "seconds": seconds, "tokens": sum(lengths)}


def kept(found: Sequence[Any], count: int) -> Iterator[Any]:
    """The first schemas that can be kept."""
    checker = Checker()
    for schema in found:
        try:
            checker.check(constraint.json_schema(schema))
        except RowError:
            continue
        yield schema
        count -= 1
        if not count:
            return


def cost_of(folder: Path | str, tokens: int, turns: int, most: float) -> Part:
    """Both kinds of batches on one model."""
    own = list(kept(Random(SEED).sample(schemas("Glaiveai2K", "Github_easy"), 4 * BATCH), BATCH))
    by, data, claims = Turns(folder, tokens), {}, {}
    kinds = (("one_schema", [ONE] * BATCH, True), ("own_schemas", own, False), ("own_new_schemas", own, True))
    for name, wanted, new in kinds:
        data[name] = by.compare(wanted, new, turns)
        if name != "own_new_schemas":
            claims[f"{name}_cost_at_most_{most}"] = data[name]["ratio"] <= most
        print(f"{name}: {data[name]['ratio']:.3f} times the time of {data[name]['tokens']} free tokens", flush=True)
    by.engine.close()
    return data, claims


PARTS: dict[str, Callable[[], Part]] = {
    "judged": judged,
    "rows": rows,
    "cost": lambda: cost_of("", 256, 9, SMALL_COST),
    "cost_large": lambda: cost_of(model(), 24, 3, LARGE_COST),
}


def main() -> int:
    """Run some parts or all; what was found of the others is kept, each with its commit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    wanted = parser.parse_args().parts or list(PARTS)
    before = RESULTS / "structured.json"
    record = json.loads(before.read_text()) if before.exists() else {}
    parts, good = record.get("parts", {}), True
    for name in wanted:
        data, holds = PARTS[name]()
        parts[name] = {"commit": commit(), "claims": holds, **data}
        for claim, held in holds.items():
            print(f"{name}: {claim}: {'holds' if held else 'DOES NOT HOLD'}", flush=True)
        good = good and all(holds.values())
        whole = set(parts) == set(PARTS) and len({part["commit"] for part in parts.values()}) == 1
        shown = whole and all(all(part["claims"].values()) for part in parts.values())
        write_result("structured", {"shown": shown, "parts": parts}, SEED)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
