"""Takes the compiled kernels from the file that SHOAL_CHECKED names: a pytest plugin, for `make sanitize`.

It knows how an extension is found, and must not know what it computes.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch  # noqa: F401  first, so that both use the OpenMP runtime that torch brings

_NAME = "shoal.kernels._cpu"

spec = importlib.util.spec_from_file_location(_NAME, os.environ["SHOAL_CHECKED"])
assert spec is not None and spec.loader is not None, "SHOAL_CHECKED must name an extension"
sys.modules[_NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[_NAME])
