"""Knows which model ships with the package and where its folder is; must not know how a model is read."""

from __future__ import annotations

from pathlib import Path

DEFAULT = "minnow"


def embedded_path() -> Path:
    """The folder of the embedded model, in the layout of a Hugging Face checkpoint."""
    return Path(__file__).resolve().parent / DEFAULT
