"""Lets the tests of this folder import each other's fixtures by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from echo_job import job, unbroken  # noqa: E402, F401  # fixtures of the main job's tests
