"""The README: its Python runs, its links lead somewhere, and it is short."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

import cutdiff
from cutdiff.pipeline import denoise, generate

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = [path for path in ROOT.rglob("README.md") if not {".ci", "venv", ".venv"} & {*path.parts}]


@pytest.mark.parametrize("name", ["README.md", "cutdiff/cli/README.md"])
def test_its_python_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It runs as it stands there, in a clone, but with two steps."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    options = {"num_steps": 2}
    monkeypatch.setattr(cutdiff, "generate", partial(generate, **options), raising=False)
    monkeypatch.setattr(cutdiff, "denoise", partial(denoise, **options), raising=False)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {"__name__": "readme"})


def test_a_newcomer_reads_it_at_a_sitting() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 160
    for heading in ("## The idea", "## What to change, and where"):
        table = lines.index(heading)
        assert next(n for n in range(table, len(lines)) if lines[n].startswith("|---")) < 60
    assert next(n for n, line in enumerate(lines) if "`observer=`" in line) < 60


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), target
