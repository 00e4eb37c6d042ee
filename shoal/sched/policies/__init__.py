"""Policies, one idea a file. It knows their short names; whoever has an import path needs no name here."""

from __future__ import annotations

import importlib

from shoal.sched.policy import Policy

POLICIES = {
    "first-come": "shoal.sched.policy:Policy",
    "batch": "shoal.sched.policies.batch:BatchPolicy",
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
