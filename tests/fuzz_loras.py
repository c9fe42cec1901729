"""Feed damaged LoRA files to the reader: `python tests/fuzz_loras.py --num 20000 --seed 0`.

Each must be read, or refused with one line of LoraError, in under a second of processor time and 64 MiB of memory. What
is read must change each weight by a tensor of its shape.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from fuzz_read import STRANGE, count_outcomes, limits, mutate_bytes, mutate_json
from loras import SHAPES, Tensors, random_change
from safetensors.torch import save
from torch import Tensor

from cutdiff.checkpoint.lora import LoraError
from cutdiff.checkpoint.lora.file import read_lora
from cutdiff.checkpoint.lora.metadata import ADAPTER, BESIDE, KEY
from cutdiff.checkpoint.lora.names import SUFFIXES, UNSUPPORTED, Target

MODULES: dict[str, tuple[int, ...]] = {"conv_in": (4, 6, 3, 3), "mid_block_proj": (8, 6), "norm": (8,)}
TABLE = {
    f"{prefix}{name}{end}": Target("unet", f"{name}{end or '.weight'}", torch.Size(shape if not end else shape[:1]))
    for name, shape in MODULES.items()
    for end in ("", ".bias")
    for prefix in ("lora_unet_", "unet_", "")
}
ENDS = [*SUFFIXES, *UNSUPPORTED, ".lora_A.default_0.weight", ".lora_B.weight.weight", "", ".", ".bias", ".alpha.alpha"]
STARTS = [
    "lora_unet_",
    "unet.",
    "base_model.model.",
    "bundle_emb.",
    "bundle_emb",
    "lora_unet__orig_mod_",
    "lora_te1_",
    ".",
]
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
FIELDS: dict[str, Any] = {
    "lora_alpha": 4,
    "r": 2,
    "use_rslora": False,
    "alpha_pattern": {"conv_in": 2, r".*(proj|norm)$": 3},
    "rank_pattern": {r"[a-z_]+\d*": 2},
    "init_lora_weights": True,
    "peft_type": "LOKR",
}
EXPRESSIONS = ["(a+)+$", "[", "(?=x)", r"\b", ".{9999999}", "(" * 99, "x" * 2000, "^", "|", r"(\w+)\1", "(?i)x", "*"]


def valid_lora(rng: random.Random) -> Tensors:
    """A LoRA of one to three modules, each of any kind, in the spelling of one tool."""
    generator, tensors = torch.Generator().manual_seed(rng.randrange(2**31)), Tensors()
    prefix = rng.choice(["lora_unet_", "unet.", "base_model.model.unet."])
    for name, shape in MODULES.items():
        rows, *rest = shape
        if not rest:
            tensors |= {f"{prefix}{name}.{end}": torch.randn(8, generator=generator) for end in ("w_norm", "b_norm")}
            continue
        kinds = [kind for kind in SHAPES if len(rest) > 1 or not kind.endswith("core")]
        factors = random_change(rng.choice(kinds), shape, 2, generator)
        tensors |= {f"{prefix}{name}.{part}": factor for part, factor in factors.items()}
        if rng.random() < 0.5:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(2.0)
        if rng.random() < 0.3:
            tensors[f"{prefix}{name}.dora_scale"] = torch.rand(rows, *(1 for _ in rest), generator=generator)
        if rng.random() < 0.3:
            tensors[f"{prefix}{name}.diff_b"] = torch.randn(rows, generator=generator)
    return tensors


def other_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    """The tensor in another shape or dtype, or with other values."""
    match rng.randrange(7):
        case 0:
            return (tensor.real if tensor.is_complex() else tensor).to(rng.choice(DTYPES))
        case 1:
            return torch.full(tensor.shape, rng.choice([float("nan"), float("inf"), 0.0, 1e38, -1.0]))
        case 2:
            return tensor.flatten()[: rng.randrange(4)]
        case 3:
            return tensor[:0] if tensor.ndim else tensor[None]
        case 4:
            return tensor.mT if tensor.ndim > 1 else tensor[None, ..., None]
        case 5:
            return torch.ones([rng.randrange(5) for _ in range(rng.randrange(6))])
        case _:
            return torch.cat([tensor, tensor]) if tensor.ndim else tensor


def mutated(tensors: Tensors, rng: random.Random) -> Tensors:
    """The tensors with a few renamed, left out, doubled or changed."""
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not tensors:
            break
        key = rng.choice([*tensors])
        module = key.partition(".")[0] if key.startswith("lora_unet_") else key.rpartition(".")[0]
        match rng.randrange(5):
            case 0:
                del tensors[key]
            case 1:
                tensors[module + rng.choice(ENDS)] = tensors.pop(key)
            case 2:
                tensors[rng.choice(STARTS) + key] = tensors[key]
            case _:
                tensors[key] = other_tensor(tensors[key], rng)
    return tensors


def mutated_fields(rng: random.Random) -> Any:
    fields = mutate_json(FIELDS, rng)
    if isinstance(fields, dict) and rng.random() < 0.3:
        return {**fields, "alpha_pattern": {rng.choice(EXPRESSIONS): rng.choice([1, *STRANGE])}}
    return fields


def as_json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode("utf-8", "surrogatepass")


def write(folder: Path, rng: random.Random) -> Path:
    """Write a damaged LoRA, and perhaps PEFT's configuration beside it or in its metadata."""
    kind, tensors = rng.randrange(5), valid_lora(rng)
    path, beside = folder / rng.choice([ADAPTER, "style.safetensors"]), folder / BESIDE
    beside.unlink(missing_ok=True)
    if kind < 3:
        tensors = mutated(tensors, rng)
    if rng.random() < 0.4:
        fields = as_json(mutated_fields(rng))
        beside.write_bytes(mutate_bytes(fields, rng) if rng.random() < 0.1 else fields)
    metadata = {KEY: as_json(mutated_fields(rng)).decode("utf-8", "replace")} if rng.random() < 0.4 else None
    content = save({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, metadata)
    path.write_bytes(mutate_bytes(content, rng) if kind == 3 else content)
    return path


def read(path: Path) -> str:
    """ "read", or the words of the refusal that do not depend on the file. Any other error is raised."""
    with limits():
        try:
            lora = read_lora(path, TABLE, 0)
        except LoraError as error:
            message = str(error)
        else:
            for target, change in lora.changes.items():
                assert change.of(torch.ones(target.shape), 0.5).shape == target.shape
            return "read"
    assert message.isprintable(), f"not one printable line: {message!r}"
    assert len(message) < 6000, f"{len(message)} characters"
    assert message.startswith(str(path.parent)), f"does not name the file: {message}"
    return " ".join(re.sub(r"'.*?'|\d+", "·", message.removeprefix(str(path.parent))).split()[1:8])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as name:
        count_outcomes(args.num, args.seed, lambda _, rng: read(write(Path(name), rng)))


if __name__ == "__main__":
    main()
