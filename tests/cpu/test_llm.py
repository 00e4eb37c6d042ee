"""`LLM` answers as vLLM's callers expect, over a small random model with a tokenizer and a chat template."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from byte_model import save_byte_model
from tokenizers import pre_tokenizers

from shoal.core.errors import ShoalError, UsageError
from shoal.llm import LLM, SamplingParams
from shoal.llm.params import default_params
from shoal.runtime.runner import StepInFlight

SHARED = Path(__file__).resolve().parents[3] / "shared"
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LETTERS = [sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter) for letter in string.ascii_letters] + [256, 257]
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=0, allowed_token_ids=LETTERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bytes")
    save_byte_model(path)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    made = LLM(str(folder), threads=1)
    yield made
    made.close()


def texts(outputs: list[Any]) -> list[str]:
    return [each.outputs[0].text for each in outputs]


# -- the same surface ---------------------------------------------------------------------------------


def test_the_script_of_vllm_runs_with_another_import(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = LLM(str(folder), max_model_len=128, tensor_parallel_size=1, enable_prefix_caching=True)
    for o in made.generate(["A", "B"], SamplingParams(temperature=0, max_tokens=8)):
        print(o.request_id, o.outputs[0].text, o.outputs[0].finish_reason, o.num_cached_tokens)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    made.close()


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"{letter} the cat" for letter in reversed(string.ascii_letters)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [each.prompt for each in outputs] == prompts
    assert [int(each.request_id) for each in outputs] == sorted(int(each.request_id) for each in outputs)
    assert texts(outputs) == texts([llm.generate(each, GREEDY, use_tqdm=False)[0] for each in prompts])
    assert all(each.prompt_token_ids == list(llm.get_tokenizer().encode(each.prompt)) for each in outputs)


def test_greedy_text_is_that_of_transformers(llm: LLM, folder: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = ["the hen", "there is", "Was it he?", "x", "the other thing that he ate: "]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=30), use_tqdm=False):
        ids = torch.tensor([output.prompt_token_ids])
        wanted = model.generate(ids, do_sample=False, max_new_tokens=30, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert output.outputs[0].token_ids == wanted
        assert output.outputs[0].finish_reason == ("stop" if wanted[-1] == 258 else "length")
        assert output.outputs[0].text == llm.get_tokenizer().decode(wanted)


def test_prompts_may_be_texts_tokens_or_dictionaries(llm: LLM) -> None:
    ids = list(llm.get_tokenizer().encode("the hen"))
    forms = [
        ["the hen"],
        "the hen",
        {"prompt": "the hen"},
        {"prompt_token_ids": ids},
        ids,
        [ids],
        [{"prompt": "the hen"}],
    ]
    answers = [llm.generate(form, GREEDY, use_tqdm=False) for form in forms]  # type: ignore[arg-type]
    assert all(len(each) == 1 for each in answers)
    assert len({tuple(each[0].outputs[0].token_ids) for each in answers}) == 1
    assert [each[0].prompt for each in answers] == ["the hen", "the hen", "the hen", None, None, None, "the hen"]


def test_chat_is_the_template_then_generate(llm: LLM) -> None:
    chat = [{"role": "Q", "content": "who is the hen?"}]
    text = "Q: who is the hen?\nA: "
    assert llm.chat(chat, GREEDY, use_tqdm=False)[0].prompt == text
    many = llm.chat([chat, chat[:0], chat], GREEDY, use_tqdm=False)
    assert texts(many[::2]) == texts(llm.generate([text, text], GREEDY, use_tqdm=False))
    assert many[1].outputs[0].finish_reason == "error" and "messages is empty" in str(many[1].error)
    other = llm.chat(chat, GREEDY, use_tqdm=False, chat_template="{{ messages[0].content }}!")
    assert other[0].prompt == "who is the hen?!"


def test_without_parameters_the_model_decides(llm: LLM) -> None:
    default = llm.get_default_sampling_params()
    assert (default.temperature, default.top_k, default.max_tokens) == (0.7, 40, 16)
    output = llm.generate("the hen", use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 16 or output.finish_reason == "stop"
    default.max_tokens, default.ignore_eos = 3, True  # as vLLM's own example does
    assert len(llm.generate("the hen", default, use_tqdm=False)[0].outputs[0].token_ids) == 3
    default.top_p = 7.0
    with pytest.raises(UsageError, match="top_p is 7.0"):
        llm.generate("the hen", default, use_tqdm=False)


def test_a_model_that_is_not_to_be_sampled_from_is_not() -> None:
    from types import SimpleNamespace

    info: Any = SimpleNamespace(sampling={"temperature": 0.0, "repetition_penalty": 1.1}, max_tokens=99)
    params = default_params(info)
    assert (params.temperature, params.repetition_penalty, params.max_tokens) == (0.0, 1.1, 99)


# -- samples and seeds --------------------------------------------------------------------------------


def test_samples_differ_and_a_seed_brings_them_back(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=4, seed=7, max_tokens=10)
    first, again = (llm.generate(["the hen", "he"], params, use_tqdm=False) for _ in range(2))
    assert [[o.text for o in each.outputs] for each in first] == [[o.text for o in each.outputs] for each in again]
    assert [o.index for o in first[0].outputs] == [0, 1, 2, 3]
    assert len({o.text for o in first[0].outputs}) == 4
    alone = llm.generate("he", params, use_tqdm=False)[0]
    assert [o.text for o in alone.outputs] == [o.text for o in first[1].outputs]


def test_without_a_seed_every_prompt_has_its_own(folder: Path) -> None:
    def answers(seed: int) -> list[str]:
        made = LLM(str(folder), seed=seed)
        params = SamplingParams(temperature=1.0, max_tokens=10)
        found = texts(made.generate(["the hen"] * 3, params, use_tqdm=False))
        made.close()
        return found

    assert len(set(answers(0))) == 3
    assert answers(0) == answers(0) != answers(1)


def test_a_list_of_parameters_goes_with_the_prompts(llm: LLM) -> None:
    each = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (3, 9, 1)]
    outputs = llm.generate(["the", "hen", "ate"], each, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 9, 1]
    with pytest.raises(UsageError, match="2 sampling_params for 1 prompts"):
        llm.generate(["a"], each[:2], use_tqdm=False)


# -- where answers end --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(llm: LLM) -> Any:
    """A long greedy answer of letters to stop in."""
    return llm.generate("then the hen", LONG, use_tqdm=False)[0].outputs[0]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("place", [3, 17, 40])
def test_a_stop_string_ends_the_answer_across_tokens(llm: LLM, long: Any, place: int, include: bool) -> None:
    stop = long.text[place : place + 4]
    params = replace(LONG, stop=["zzzz", stop], include_stop_str_in_output=include)
    output = llm.generate("then the hen", params, use_tqdm=False)[0].outputs[0]
    end = long.text.index(stop)
    assert output.text == long.text[: end + len(stop) * include]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == long.token_ids[: len(output.token_ids)]
    tokenizer = llm.get_tokenizer()
    assert stop in tokenizer.decode(output.token_ids) and stop not in tokenizer.decode(output.token_ids[:-1])
    assert len(output.logprobs) == len(output.token_ids)
    assert output.cumulative_logprob == pytest.approx(sum(p.logprob for d in output.logprobs for p in d.values()))


def test_a_stop_token_ends_it_and_leaves_no_text(llm: LLM, long: Any) -> None:
    token = long.token_ids[20]
    first = long.token_ids.index(token)
    params = replace(LONG, stop_token_ids=[token])
    output = llm.generate("then the hen", params, use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    assert output.token_ids == long.token_ids[: first + 1]
    assert output.text == llm.get_tokenizer().decode(output.token_ids[:-1])
    later = replace(params, min_tokens=first + 2, detokenize=False)
    output = llm.generate("then the hen", later, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) >= first + 2 and output.text == ""


def test_without_a_limit_the_context_is_the_limit(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for limit in (params, SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True)):
        output = llm.generate("the", limit, use_tqdm=False)[0]
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 160
        assert output.outputs[0].finish_reason == "length"


# -- log-probabilities --------------------------------------------------------------------------------


def test_logprobs_have_the_shape_of_vllm(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True, n=2)
    output = llm.generate("the hen", params, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, position in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert position is not None and next(iter(position)) == token and len(position) in (2, 3)
    for answer in output.outputs:
        assert answer.logprobs is not None
        for token, position in zip(answer.token_ids, answer.logprobs, strict=True):
            assert next(iter(position)) == token and len(position) in (3, 4)
            assert {p.rank for p in position.values()} >= {1, 2, 3}
            assert position[token].decoded_token == llm.get_tokenizer().token_text(token)
    assert llm.generate("the", GREEDY, use_tqdm=False)[0].outputs[0].logprobs is None


def test_minus_one_means_all_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    position = llm.generate("the", params, use_tqdm=False)[0].outputs[0].logprobs[0]  # type: ignore[index]
    assert len(position) == 259


def test_bad_words_and_allowed_tokens_are_obeyed(llm: LLM, long: Any) -> None:
    word = long.text[2:4]
    params = replace(LONG, bad_words=[word])
    assert word in long.text
    assert word not in llm.generate("then the hen", params, use_tqdm=False)[0].outputs[0].text
    params = SamplingParams(temperature=1.0, max_tokens=20, allowed_token_ids=[65, 66], ignore_eos=True)
    assert set(llm.generate("then", params, use_tqdm=False)[0].outputs[0].token_ids) <= {65, 66}


# -- one bad prompt is one bad answer -----------------------------------------------------------------


def test_a_prompt_that_cannot_be_run_is_an_error_output(llm: LLM) -> None:
    prompts: list[Any] = ["the", "lone \ud800", "", "x" * 500, [1, 2, 9999], {"prompt": "a", "image": 1}, ["no"], "hen"]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    reasons = [each.outputs[0].finish_reason for each in outputs]
    assert reasons == [reasons[0], *["error"] * 6, reasons[-1]] and "error" not in (reasons[0], reasons[-1])
    words = ["surrogate", "empty", "160", "vocabulary of 259", "'image'", "text or a list"]
    assert all(word in str(each.error) for word, each in zip(words, outputs[1:-1], strict=True))
    assert texts(outputs[::7]) == texts(llm.generate(["the", "hen"], GREEDY, use_tqdm=False))


def test_a_prompt_larger_than_memory_is_refused_with_numbers_and_the_rest_runs(folder: Path) -> None:
    made = LLM(str(folder), memory_bytes=2 * 2 * 32 * 32 * 4 * 2, block_size=32)  # two blocks, heads filled up to 32
    outputs = made.generate(["x" * 100, "the"], GREEDY, use_tqdm=False)
    assert "64 are available" in str(outputs[0].error) and outputs[1].error is None
    made.close()


# -- streams ------------------------------------------------------------------------------------------


def test_an_iterator_in_is_an_iterator_out_with_a_window(llm: LLM) -> None:
    taken = 0

    def prompts() -> Iterator[str]:
        nonlocal taken
        for i in range(30):
            taken += 1
            yield f"{i} hens"

    got = {}
    for count, output in enumerate(llm.generate_iter(prompts(), GREEDY, window=4)):
        assert taken <= count + 1 + 4
        got[output.prompt] = output.outputs[0].text
    expected = llm.generate([f"{i} hens" for i in range(30)], GREEDY, use_tqdm=False)
    assert got == {each.prompt: each.outputs[0].text for each in expected}


def test_iterators_may_be_interleaved_and_left(llm: LLM) -> None:
    endless = llm.generate_iter(("the hen" for _ in iter(int, 1)), GREEDY, window=8)
    other = llm.generate_iter(["he", "then"], GREEDY)
    assert next(endless).outputs[0].text == next(endless).outputs[0].text
    assert len(list(other)) == 2
    next(endless)
    endless.close()  # type: ignore[attr-defined]
    assert not llm._loop._samples
    assert len(llm.generate(["he"], GREEDY, use_tqdm=False)) == 1


def test_an_interrupted_call_leaves_an_engine_that_answers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = texts(llm.generate(["the hen", "he"], LONG, use_tqdm=False))
    steps = 0

    def interrupted(self: StepInFlight) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return waited(self)

    waited = StepInFlight.wait
    monkeypatch.setattr(StepInFlight, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["the hen", "then"], LONG, use_tqdm=False)
    assert texts(llm.generate(["the hen", "he"], LONG, use_tqdm=False)) == expected


# -- what cannot be had -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not available"),
        ({"quantization": "awq"}, "quantization"),
        ({"kv_cache_dtype": "fp8"}, "kv is 'fp8'; it must be one of auto, int8"),
        ({"max_modle_len": 5}, "did you mean 'max_model_len'"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"block_size": 5}, "must divide 256"),
    ],
)
def test_arguments_that_would_change_answers_are_refused(folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LLM(str(folder), **arguments)


def test_arguments_about_other_machines_are_ignored_aloud(folder: Path) -> None:
    with pytest.warns(UserWarning, match="gpu_memory_utilization, enforce_eager"):
        LLM(str(folder), gpu_memory_utilization=0.5, enforce_eager=True, quantization=None).close()


def test_vllms_name_of_how_keys_and_values_are_kept_is_known(folder: Path) -> None:
    for asked, kept in ((None, "fp32"), ("auto", "fp32"), ("int8", "int8")):
        dtype = "bfloat16" if asked == "int8" else "auto"
        made = LLM(str(folder), dtype=dtype, kv_cache_dtype=asked)
        assert made.facts.kv == kept
        made.close()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1}, {"top_p": 0}, {"top_k": -2}, {"min_p": 2}, {"n": 0}, {"max_tokens": 0}, {"min_tokens": 20},
        {"repetition_penalty": 0}, {"presence_penalty": 3}, {"logprobs": -2}, {"stop": [""]},
        {"stop": "a", "detokenize": False}, {"best_of": 2},
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="SamplingParams: "):
        SamplingParams(**values)


def test_token_ids_out_of_range_are_refused_for_the_whole_call(llm: LLM) -> None:
    for wrong in ({"logit_bias": {259: 1.0}}, {"stop_token_ids": [-1]}, {"allowed_token_ids": [1000]}):
        with pytest.raises(UsageError, match="outside the vocabulary of 259"):
            llm.generate("a", SamplingParams(**wrong), use_tqdm=False)
    with pytest.raises(ShoalError, match="lora_request"):
        llm.generate("a", GREEDY, lora_request=object())  # type: ignore[arg-type]


def test_stories_are_told_as_recorded() -> None:
    place = SHARED / "data" / "models" / "stories260K"
    if not place.is_dir():
        pytest.skip("the shared folder with stories260K is not beside the repository")
    cases = json.loads((place / "expected_greedy.json").read_text())["cases"]
    made = LLM(str(place / "hf"), threads=1)
    prompts = [{"prompt_token_ids": case["prompt_ids"]} for case in cases]
    longest = max(len(case["greedy_ids"]) for case in cases)
    outputs = made.generate(prompts, SamplingParams(temperature=0, max_tokens=longest), use_tqdm=False)
    assert [each.outputs[0].token_ids for each in outputs] == [case["greedy_ids"] for case in cases]
    made.close()
