"""Policies, one idea a file. It knows their short names; whoever has an import path needs no name here."""

from __future__ import annotations

import importlib

from shoal.sched.policy import Policy

POLICIES = {
    "first-come": "shoal.sched.policy:Policy",
    "batch": "shoal.sched.policies.batch:BatchPolicy",
    "stall-free": "shoal.sched.policies.stall_free:StallFree",
    "decode-maximal": "shoal.sched.policies.decode_maximal:DecodeMaximal",
    "past-future": "shoal.sched.policies.past_future:PastFuture",
    "just-in-time": "shoal.sched.policies.just_in_time:JustInTime",
    "time-to-live": "shoal.sched.policies.time_to_live:TimeToLive",
    "mixed": "shoal.sched.policies.mixed:Mixed",
    "prefill-first": "shoal.sched.policies.whole_prompts:PrefillFirst",  # as vLLM at first
    "hybrid": "shoal.sched.policies.whole_prompts:Hybrid",  # as Orca
    "request-level": "shoal.sched.policies.whole_prompts:RequestLevel",  # as FasterTransformer
    "aggressive": "shoal.sched.policies.watermarks:Aggressive",
    "conservative": "shoal.sched.policies.watermarks:Conservative",
    "shortest-first": "shoal.sched.policies.orders:ShortestFirst",
    "earliest-deadline": "shoal.sched.policies.orders:EarliestDeadline",
    "least-attained": "shoal.sched.policies.orders:LeastAttained",
}


def find_policy(name: str) -> type[Policy]:
    """The class of a short name, or of an import path module:Class. ValueError says why there is none."""
    module, _, cls = POLICIES.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(sorted(POLICIES))
        raise ValueError(
            f"policy {name!r} cannot be imported ({error}): write it as module:Class, or as one of {known}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ValueError(f"policy {name!r} is not a Policy class of shoal.sched.policy")
    return found
