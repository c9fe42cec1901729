"""The dtype that a machine chooses, the one that it warns of, and memory that is used again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from cutdiff import evaluate, sample
from cutdiff.checkpoint.model import Model
from cutdiff.cli.device import dtype_of, tell_dtype
from cutdiff.models import machine

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, *, avx512_bf16: bool, amx: bool) -> None:
    """Let torch say that the CPU has these instructions, and no others for 16 bits."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "dtype"),
    [
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (True, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool, dtype: torch.dtype
) -> None:
    pretend(monkeypatch, avx512_bf16=avx512_bf16, amx=amx)
    assert dtype_of("auto", CPU) == dtype
    assert dtype_of("float32", CPU) == torch.float32
    assert dtype_of("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bfloat16_on_a_gpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    pretend(monkeypatch, avx512_bf16=not supported, amx=not supported)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert dtype_of("auto", torch.device("cuda")) == (torch.bfloat16 if supported else torch.float32)


def test_torch_knows_what_this_cpu_multiplies() -> None:
    """The names that torch answers to are its private ones: every version must have them."""
    assert machine.multiplies(CPU, torch.float32)
    assert {machine.multiplies(CPU, dtype) for dtype in (torch.bfloat16, torch.float16)} <= {True, False}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_says_once_that_the_cpu_emulates_its_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, quick_folder: Path, dtype: str
) -> None:
    command = ["--model", str(quick_folder), "--steps", "1", "--num-images", "2", "--out", str(tmp_path), "--overwrite"]

    def notices(*arguments: str) -> list[str]:
        assert sample.main([*command, "--width", "64", "--method", "direct", *arguments]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "--dtype" in line]

    pretend(monkeypatch, avx512_bf16=False, amx=False)
    line = f"cutdiff: --dtype {dtype} is emulated by this CPU, which takes several times as long as --dtype float32"
    assert notices("--dtype", dtype) == [line]
    assert notices() == []


def test_only_the_first_process_tells_and_only_what_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Model
) -> None:
    model = replace(tiny_model, unet=deepcopy(tiny_model.unet).bfloat16())
    lines = {}
    for rank, fast in product(range(2), (False, True)):
        pretend(monkeypatch, avx512_bf16=fast, amx=False)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        tell_dtype("bfloat16", model.device, model.dtype)
        lines[rank, fast] = capsys.readouterr().err.count("is emulated by this CPU")
    assert lines == {(0, False): 1, (0, True): 0, (1, False): 0, (1, True): 0}


def test_an_evaluation_chooses_by_the_machine_and_says_so_but_goes_on_in_one_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["--methods", "direct", "--sizes", "128", "--num", "2", "--steps", "1", "--out", str(tmp_path)]
    pretend(monkeypatch, avx512_bf16=False, amx=False)
    assert evaluate.main(command) == 0
    assert "cutdiff: --dtype auto is float32 on this machine\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["dtype"] == "float32"
    pretend(monkeypatch, avx512_bf16=True, amx=False)
    assert evaluate.main(command) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "cutdiff: --dtype auto is bfloat16 on this machine"
    assert last.endswith("was drawn in float32: pass --dtype float32, or another --out")
    assert evaluate.main([*command, "--dtype", "float32"]) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library's malloc is not glibc's")
def test_feature_maps_come_from_the_heap_whose_memory_is_used_again() -> None:
    """Without it, glibc maps a first tensor of 20 MB by itself, with pages of its own."""
    script = """
    import sys, torch
    from cutdiff.models.machine import keep_freed_memory
    if sys.argv[1] == "kept":
        keep_freed_memory()
    tensor = torch.empty(5 << 20)
    heap = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")).split()[0]
    first, end = (int(address, 16) for address in heap.split("-"))
    print(first <= tensor.data_ptr() < end)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def in_heap(how: str) -> str:
        command = [sys.executable, "-c", dedent(script), how]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert in_heap("kept") == "True"
    assert in_heap("not kept") == "False"
