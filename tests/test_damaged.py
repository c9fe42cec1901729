"""LoRAs and single files that are damaged at random: each is read, or refused in one line that names the file."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_loras import DTYPES, other_tensor
from fuzz_read import limits, mutate_bytes
from safetensors.torch import save
from tiny import Tiny

from cutdiff.checkpoint import load
from cutdiff.checkpoint.families import UNET_PREFIX

MEMORY = 512 * 2**20
"""The bytes by which the process may grow: the networks of the tiny model, a few times over."""
ENDS = [".scale_weight", ".weight_scale", ".comfy_quant", ".SCB", ".lora_up.weight", ".x", ""]
STARTS = ["_orig_mod.", "model.", UNET_PREFIX, "model_ema.", "first_stage_model.", "module.", "text_model.", "unet."]


@pytest.mark.parametrize("num", [1000, 20_000])
def test_loras(num: int) -> None:
    """This is a run of `python tests/fuzz_loras.py`, in a process whose memory it can limit."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the kernel does not tell the memory of a process")
    command = [sys.executable, str(Path(__file__).with_name("fuzz_loras.py")), "--num", str(num), "--seed", str(num)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = {words: int(count) for count, words in (line.split(maxsplit=1) for line in done.stdout.splitlines())}
    assert sum(counts.values()) == num
    assert counts["read"] > num / 20
    assert len(counts) > 20


def damaged(tiny: Tiny, rng: random.Random) -> bytes:
    """A single file with a few tensors renamed, left out or changed, or with a few bytes changed."""
    tensors = dict(tiny.original())
    for _ in range(rng.choice((1, 1, 2, 5))):
        key = rng.choice([*tensors])
        match rng.randrange(6):
            case 0:
                del tensors[key]
            case 1:
                tensors[key.rpartition(".")[0] + rng.choice(ENDS)] = tensors[key].clone()
            case 2:
                tensors[rng.choice(STARTS) + key] = tensors.pop(key)
            case 3:
                tensors[key] = tensors[key].to(rng.choice(DTYPES))
            case 4:
                tensors[key] = other_tensor(tensors[key], rng)
            case _:
                start = rng.choice(STARTS)
                tensors = {f"{start}{name}" if rng.random() < 0.99 else name: t for name, t in tensors.items()}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return mutate_bytes(content, rng) if rng.random() < 0.1 else content


def outcomes(tiny: Tiny, folder: Path, path: Path, num: int, seed: int) -> Iterator[str]:
    for i in range(num):
        rng = random.Random(f"{seed}/{i}")
        path.write_bytes(damaged(tiny, rng))
        config = folder if rng.random() < 0.8 else None
        with limits(MEMORY, 5):
            try:
                load(path, config=config)
            except ValueError as error:
                message = str(error)
            else:
                yield "read"
                continue
        assert message.isprintable(), f"case {i}: {message!r}"
        assert len(message) < 6000, f"case {i}"
        assert message.startswith((f"{path}: ", f"{path} ", "channels of")), f"case {i}: {message}"
        yield "refused"


@pytest.mark.parametrize("num", [30, 600])
@pytest.mark.usefixtures("tokenizer_in_cache")
def test_single_files(num: int, tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("the kernel does not tell the memory of a process")
    load(folder)  # what it imports takes memory
    counts = Counter(outcomes(tiny, folder, tmp_path / "model.safetensors", num, num))
    assert counts["refused"] > counts["read"] > num / 20
