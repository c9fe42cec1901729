"""The tiers of tests: what slow.txt names is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_slow_test_is_there() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", str(TESTS)]
    collected = subprocess.run(
        command, cwd=TESTS.parent, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = {line.removeprefix("tests/") for line in collected}
    names |= {name.partition("[")[0] for name in names}
    lines = (TESTS / "slow.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#") and line not in names] == []
