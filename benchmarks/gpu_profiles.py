"""The measured profiles of GPUs in ../shared/data/traces/gpu_profiles, as points to fit and points to be predicted.

It knows their files and which part of each is held out; it must not know how a prediction is judged.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from benchmarks.common import SHARED
from shoal.sim.hardware import A100, A100_KEPT, ENGINES, H100, Efficiency, Hardware, Wire
from shoal.sim.roofline import Load, Roofline, all_reduce, send
from shoal.sim.shapes import SHAPES

FOLDER = SHARED / "data" / "traces" / "gpu_profiles"
PRODUCTS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
LIGHT = ("input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add")
PROMPTS = ((1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 2048), (2, 512), (4, 256), (8, 128), (16, 64))
DECODES, CONTEXTS, MOST = (1, 2, 4, 8, 16, 32, 64, 94, 128, 192, 256), (128, 256, 512, 1024), 60_000
KERNELS = {"compute": 0.7, "memory": 0.8, "hidden": 0.8, "light": 0.5, "kernel": 3e-6}  # where searches start
ENGINE = {"compute": 0.6, "memory": 0.7, "layer": 4e-4, "step": 3e-3, "row": 1e-5}
ATTENTION = {"attention": 0.3, "reading": 0.7}
WIRE = {"share": 0.5, "latency": 3e-5, "soon": 1e-5, "soon_share": 0.1, "small": 2e6}

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds by key; `price` predicts those of a key on a machine. Without `start` nothing is fitted to it."""

    name: str
    points: Mapping[Key, float]
    fitted: Callable[[Key], bool]
    judged: Callable[[Key], bool]
    shipped: Hardware
    price: Callable[[Hardware, Key], float]
    start: Mapping[str, float]
    change: Callable[[Hardware, Mapping[str, float]], Hardware]
    held: str  # what is held out, in words
    note: str = ""
    parts: tuple[str, ...] = ()  # of what is judged: the last of a key, for a look inside
    used: bool = True  # whether the machine's numbers of it are those by which steps are priced

    def fit_points(self) -> list[Key]:
        """At most about 300 of those to fit, evenly."""
        keys = [key for key in self.points if self.fitted(key)]
        return keys[:: max(1, len(keys) // 300)]


def rows(name: str) -> list[dict[str, str]]:
    """A CSV file's lines."""
    path = FOLDER / name
    opened = gzip.open(path, "rt") if name.endswith(".gz") else path.open()
    with opened as file:
        return list(csv.DictReader(file))


def gathered(found: Mapping[Key, list[float]]) -> dict[Key, float]:
    """Medians of what was measured several times, by key in order."""
    return {key: median(found[key]) for key in sorted(found, key=str)}


def efficiency(hardware: Hardware, found: Mapping[str, float]) -> Hardware:
    """The machine with some of its shares found anew."""
    return replace(hardware, efficiency=replace(hardware.efficiency, **found))


def near(hardware: Hardware, found: Mapping[str, float]) -> Hardware:
    """The machine with other numbers of its near wire."""
    return replace(hardware, near=replace(hardware.near, **found))


def layer_profile(name: str, file: str, shape: str, shipped: Hardware, fits: bool, held: str) -> Profile:
    """Vidur: all that a layer does to tokens beside its attention, one kernel after the other, by (tensor, tokens)."""
    found: dict[Key, list[float]] = defaultdict(list)
    for row in rows(file):
        key = int(row["num_tensor_parallel_workers"]), int(row["num_tokens"])
        products = sum(float(row[f"time_stats.{each}.median"]) for each in PRODUCTS)
        light = sum(float(row[f"time_stats.{each}.median"]) for each in LIGHT)
        for part, seconds in (("products", products), ("light", light), ("all", products + light)):
            found[(*key, part)].append(1e-3 * seconds)

    def price(hardware: Hardware, key: Key) -> float:
        products, light = Roofline(hardware, SHAPES[shape], key[0]).layer_seconds(key[1])
        return {"products": products, "light": light, "all": products + light}[key[2]]

    points = gathered(found)
    some = set(sorted({key[:2] for key in points})[::8]) if fits else set()
    return Profile(
        name, points, lambda key: key[:2] in some and key[2] == "all",
        lambda key: key[:2] not in some and key[2] == "all", shipped, price, KERNELS if fits else {}, efficiency, held,
        parts=("products", "light"),
    )  # fmt: skip


def wire_profile(
    name: str, file: str, kind: str, shipped: Hardware, groups: set[Key], note: str = "", used: bool = True
) -> Profile:  # fmt: skip
    """Vidur: messages by (devices, bytes); `groups` are of (devices, of them in one machine)."""
    found: dict[Key, list[float]] = defaultdict(list)
    for row in rows(file):
        devices, together = int(row["num_workers"]), int(row["devices_per_node"])
        if (devices, together) in groups:
            found[devices, int(row["size"])].append(1e-3 * float(row[f"time_stats.{kind}.median"]))

    def price(hardware: Hardware, key: Key) -> float:
        if kind == "all_reduce":
            return all_reduce(hardware.near, key[0], key[1])
        return send(hardware.near, key[1])

    points = gathered(found)
    some = set(list(points)[::6])
    return Profile(
        name, points, lambda key: key in some, lambda key: key not in some, shipped, price, WIRE, near,
        "five points of six", note, used=used,
    )  # fmt: skip


def engine_price(hardware: Hardware, key: Key) -> float:
    """A step of a whole engine; keys are (model, tensor, load)."""
    return sum(Roofline(hardware, SHAPES[key[0]], key[1]).stage_seconds(key[2]))


def distserve(engine: str, shipped: Efficiency, note: str) -> Profile:
    """DistServe: what its fits of prompts and decodes say where they were measured, by (model, tensor, load)."""
    found: dict[Key, float] = {}
    profile = json.loads((FOLDER / f"distserve_profiler-a100-80g.{engine}.json").read_text())
    for model, by_tensor in profile.items():
        for tensor, said in by_tensor.items():
            first = model.split("/")[1], int(tensor)
            base, token, square = said["prefill"]
            for count, length in PROMPTS:
                load = Load(count * length, count, count * length * (length + 1) / 2, count * length)
                found[*first, load] = 1e-3 * (base + token * count * length + square * count * length**2)
            for count in DECODES:
                few = count < said["decoding_large_small_bs_threshold"]
                base, position, row = said["decoding_smallbs" if few else "decoding_largebs"]
                for read in (count * context for context in CONTEXTS if count * context <= MOST):
                    found[*first, Load(count, count, decodes=read)] = 1e-3 * (base + position * read + row * count)
    machine = replace(A100, efficiency=shipped)
    name = f"{'DistServe engine' if engine == 'distserve' else 'vLLM 2023'}, A100, OPT 13B and 66B"
    some = {key for key in found if key[0] == "opt-13b" and key[1] in {1, 4}}
    return Profile(
        name, found, lambda key: key in some, lambda key: key not in some, machine, engine_price, ENGINE | ATTENTION,
        efficiency, "OPT-13B on 2 devices, OPT-66B on 2, 3, 4, 8", note,
    )  # fmt: skip


def splitwise(device: str, shipped: Hardware, note: str) -> Profile:
    """Splitwise: prompts and tokens of Llama-2-70B and BLOOM-176B, by (model, tensor, load)."""
    found: dict[Key, list[float]] = defaultdict(list)
    for row in rows("splitwise_perf_model.csv"):
        if row["hardware"] != f"{device}-80gb":
            continue
        model, tensor = row["model"].replace("llama2", "llama-2"), int(row["tensor_parallel"])
        length, count, answer = (int(row[name]) for name in ("prompt_size", "batch_size", "token_size"))
        prompt = Load(count * length, count, count * length * (length + 1) / 2, count * length)
        found[model, tensor, prompt].append(1e-3 * float(row["prompt_time"]))
        token = Load(count, count, decodes=count * (length + answer / 2))
        found[model, tensor, token].append(1e-3 * float(row["token_time"]))
    name = f"Splitwise engine, {device.upper()}, Llama-2-70B and BLOOM-176B"
    some = {key for key in found if key[0] == "llama-2-70b" and key[1] in {2, 8}}
    return Profile(
        name, gathered(found), lambda key: key in some, lambda key: key not in some, shipped, engine_price, ENGINE,
        efficiency, "Llama-2-70B on 4 devices, BLOOM-176B on 8", note,
    )  # fmt: skip


def memory_profile() -> Profile:
    """DistServe: positions that have room beside the weights, by (model, tensor, pipeline)."""
    found: dict[Key, list[float]] = defaultdict(list)
    for row in rows("distserve_max_num_tokens.csv"):
        found[row["model"].split("/")[1], int(row["tp"]), int(row["pp"])].append(float(row["max_num_tokens"]))

    def price(hardware: Hardware, key: Key) -> float:
        return Roofline(hardware, SHAPES[key[0]], key[1], key[2]).positions

    def change(hardware: Hardware, found: Mapping[str, float]) -> Hardware:
        return replace(hardware, usable=found["usable"])

    some = {key for key in found if key[0] == "opt-13b" and key[2] == 1}
    return Profile(
        "tokens that fit in memory, A100, OPT 13B, 66B, 175B", gathered(found), lambda key: key in some,
        lambda key: key not in some, A100, price, {"usable": 0.9}, change, "all with a pipeline, OPT-66B, OPT-175B",
    )  # fmt: skip


def profiles() -> list[Profile]:
    """All of them."""
    inside = {(2, 2), (4, 4), (8, 8)}
    joint, apart = replace(A100, near=A100.joint), replace(A100, near=A100.far)
    bridge = replace(A100, near=Wire(300e9, 1.0, 1.4e-6, 8e-6, 1.0, 1.9e6))
    return [
        layer_profile(
            "layer, A100, Llama-2-7B", "a100_Llama-2-7b-hf_mlp.csv.gz", "llama-2-7b", A100, True,
            "seven points of eight",
        ),
        layer_profile(
            "layer, A100, Llama-3-8B", "a100_Meta-Llama-3-8B_mlp.csv.gz", "llama-3-8b", A100, False, "all of it"
        ),
        layer_profile(
            "layer, H100, Llama-2-7B", "h100_Llama-2-7b-hf_mlp.csv.gz", "llama-2-7b", H100, True,
            "seven points of eight",
        ),
        wire_profile("all-reduce, A100, one machine", "a100_dgx_all_reduce.csv.gz", "all_reduce", A100, inside),
        wire_profile("all-reduce, H100, one machine", "h100_dgx_all_reduce.csv", "all_reduce", H100, inside),
        *(
            wire_profile(
                f"all-reduce, A100, {devices} devices in {devices // each} machines", "a100_dgx_all_reduce.csv.gz",
                "all_reduce", joint, {(devices, each)}, note="parameters of its own: each uses other wires",
                used=devices > A100.devices,  # fewer are in one machine, where steps are priced
            )
            for devices, each in ((2, 1), (4, 2), (8, 4), (16, 8))
        ),
        wire_profile(
            "send, A100, one machine", "a100_pairwise_nvlink_send_recv.csv", "send_recv", bridge, {(2, 2)},
            note="another machine than all-reduce's: pairs with a bridge",
        ),
        wire_profile(
            "send, A100, two machines", "a100_pairwise_nvlink_send_recv.csv", "send_recv", apart, {(2, 1)},
        ),
        distserve("distserve", A100_KEPT, ""),
        distserve("vllm", ENGINES["vllm-2023 a100"], ""),
        splitwise("a100", replace(A100, efficiency=ENGINES["splitwise a100"]), ""),
        splitwise("h100", replace(H100, efficiency=ENGINES["splitwise h100"]), ""),
        memory_profile(),
    ]  # fmt: skip
