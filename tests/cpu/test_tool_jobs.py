"""Rows with tools through the whole job: a call that must come is read back, and a bad tool fails its row alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema

import shoal
from shoal.text.checkpoint import EMBEDDED

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} Answer with <tool_call> and a call.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def taught(folder: Path) -> Path:
    """The embedded model with a template that shows tools."""
    shutil.copytree(EMBEDDED, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


def test_calls_that_must_come_are_read_back_and_bad_tools_fail_alone(tmp_path: Path) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    bad = [{"type": "function", "function": {"name": "f", "parameters": unique}}]
    asked: list[dict[str, Any]] = [
        {"tools": TOOLS, "tool_choice": "required", "n": 3, "temperature": 1.0},
        {"tools": TOOLS, "tool_choice": named},
        {"tools": TOOLS},
        {"tools": bad, "tool_choice": "required"},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        for number, fields in enumerate(asked):
            messages = [{"role": "user", "content": "How is the weather in Rome?"}]
            body = {"messages": messages, "max_tokens": 80, "temperature": 0, **fields}
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    report = shoal.run(source, out, model=str(taught(tmp_path / "model")), threads=1)
    assert (report.rows.ok, report.rows.failed) == (3, 1)
    required, chosen, free = (json.loads(line)["response"]["body"]["choices"] for line in out.read_text().splitlines())
    for choice in (*required, *chosen):
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        for call in choice["message"]["tool_calls"]:
            assert call["function"]["name"] == "weather"
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    assert len(required) == 3 and len(chosen[0]["message"]["tool_calls"]) == 1
    assert free[0]["finish_reason"] in ("stop", "length", "tool_calls")
    error = json.loads((tmp_path / "out.errors.jsonl").read_text())["response"]["body"]["error"]
    assert error["code"] == "invalid_constraint" and "uniqueItems" in error["message"] and error["param"] == "tools"
