"""Runs code in a process of its own, where Triton compiles kernels and interprets none, and tests can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [kept.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)
