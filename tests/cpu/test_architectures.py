"""Shoal's decoder says what transformers says, for every listed architecture, through paged keys and values."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from naive import generate
from small_models import CONFIGS, reference, save_model

from shoal.core.errors import ModelError
from shoal.kernels import load, set_threads
from shoal.nn.arch import make_config, read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import load_weights
from shoal.text.checkpoint import resolve_model
from shoal.text.tokenizer import Tokenizer

LENGTHS = (1, 15, 38, 100, 250, 290)  # below and across a page, the window of 40 and the tile of 256
NUM_TOKENS = 12
STORIES = Path(__file__).parents[2].parent / "shared/data/models/stories260K"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(before)


def open_decoder(folder: Path, context: int | None = None) -> Decoder:
    config = read_config(folder, context)
    return Decoder(config, load_weights(folder, config), load("auto"))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    decoder = open_decoder(tmp_path, 512 if name == "phi3-long" else None)
    dice = random.Random(1)
    prompts = [[dice.randrange(model.config.vocab_size) for _ in range(length)] for length in LENGTHS]
    answers = generate(decoder, prompts, NUM_TOKENS, chunk=64)
    for prompt, (tokens, logits) in zip(prompts, answers, strict=True):
        expected_tokens, expected_logits = reference(model, prompt, NUM_TOKENS)
        assert tokens == expected_tokens
        difference = logits.log_softmax(-1) - expected_logits.log_softmax(-1)
        assert difference.abs().max() < 1e-4
        assert expected_logits.std() > 1  # a flat model would prove nothing


@pytest.mark.parametrize(("name", "context"), [("phi3-long", 1024), ("llama-dynamic", 1400)])
def test_length_dependent_rope_is_that_of_the_configured_context(name: str, context: int, tmp_path: Path) -> None:
    """transformers recomputes its frequencies from the current length: we equal it at the length we settled on."""
    model = save_model(name, tmp_path)
    dice = random.Random(2)
    length = 600 if name == "phi3-long" else context
    prompt = [dice.randrange(model.config.vocab_size) for _ in range(length)]
    tokens, logits = generate(open_decoder(tmp_path, context), [prompt], 1)[0]
    expected_tokens, expected_logits = reference(model, prompt, 1)
    assert tokens == expected_tokens
    assert (logits.log_softmax(-1) - expected_logits.log_softmax(-1)).abs().max() < 1e-4


def test_stories260k_tells_its_published_story() -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    cases = json.loads((STORIES / "expected_greedy.json").read_text())["cases"]
    answers = generate(open_decoder(STORIES / "hf"), [case["prompt_ids"] for case in cases], 64)
    assert [tokens for tokens, _ in answers] == [case["greedy_ids"] for case in cases]


def test_the_embedded_model_is_what_transformers_makes_of_it() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve_model(), dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config = transformers.GenerationConfig()
    tokenizer = Tokenizer.load(resolve_model())
    prompts = [list(tokenizer.encode(text)) for text in ("Once upon a time", "It was the best of times, " * 30, "2+2=")]
    for prompt, (tokens, logits) in zip(prompts, generate(open_decoder(resolve_model()), prompts, 12), strict=True):
        expected_tokens, expected_logits = reference(model, prompt, 12)
        assert tokens == expected_tokens
        assert (logits.log_softmax(-1) - expected_logits.log_softmax(-1)).abs().max() < 1e-4


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


def test_both_generations_of_configuration_files_mean_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    assert make_config(old) == make_config(new)
    gemma = {**LLAMA, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7}
    old = {**gemma, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    new = {**gemma, "layer_types": kinds, "rope_parameters": {
        "full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}  # fmt: skip
    assert make_config(old) == make_config(new)
    assert [layer.window for layer in make_config(old).layers] == [4096] * 5 + [0, 4096]


def test_gemma_3_is_found_inside_a_checkpoint_that_also_sees() -> None:
    text = {**LLAMA, "model_type": "gemma3_text", "architectures": None}
    both = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    assert make_config(both).architecture == "gemma3_text"
    assert make_config(both).tied


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*not supported.*Known: llama"),
        ({"model_type": "x", "architectures": None, "auto_map": {}}, r"'x'.*own code is never run"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"hidden_size": None}, "hidden_size must be a number"),
        ({"hidden_size": "64"}, "hidden_size must be a number, found '64'"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope scaling 'spiral' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope parameter factor must be a number"),
        ({"quantization_config": {"bits": 4}}, "quantized checkpoints are not read"),
        ({"model_type": "qwen3", "architectures": [], "layer_types": ["chunked", "chunked"]}, "layer type 'chunked'"),
    ],
)
def test_what_cannot_be_run_is_named(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        make_config({**LLAMA, **changes})
