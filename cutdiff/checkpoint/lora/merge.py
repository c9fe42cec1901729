"""Merging LoRA files: every weight W that they change becomes W + scale · alpha / rank · change, in float32.

What each file adds is computed from the model's own W, so files add up in any order, those with DoRA too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cutdiff.checkpoint.build import Networks
from cutdiff.checkpoint.embeddings import Inversion
from cutdiff.checkpoint.files import listed
from cutdiff.checkpoint.lora.file import Change, LoraError, read_lora
from cutdiff.checkpoint.lora.metadata import ADAPTER
from cutdiff.checkpoint.lora.names import Target, targets
from cutdiff.checkpoint.model import MergedLora, sha256

FOLDER_FILES = (ADAPTER, "pytorch_lora_weights.safetensors")
"""The files of a LoRA's folder, as PEFT and diffusers name them."""
Weights = Mapping[str, Mapping[str, Tensor]]


def merge(
    weights: Weights, networks: Networks, loras: Sequence[tuple[str | Path, float]], *, dtype: torch.dtype
) -> tuple[Weights, tuple[MergedLora, ...], list[Inversion]]:
    """Merge LoRAs, given as (path, scale), into the weights; returns the weights, a record of each LoRA, and the
    textual inversions that are bundled with those whose scale is not 0.

    Weights that a LoRA changes are new, in `dtype`; the others are those that were given. All files are read and
    checked before anything is merged. Raises FileNotFoundError where a path does not exist; ValueError for a scale
    that is not finite; LoraError for a folder without a LoRA, and for a file that is damaged, does not fit the model,
    or holds what cannot be merged here.
    """
    if not loras:
        return weights, (), []
    table = targets(networks)
    changes: defaultdict[Target, list[tuple[float, Change]]] = defaultdict(list)
    merged: list[MergedLora] = []
    inversions: list[Inversion] = []
    for path, scale in loras:
        path = Path(path)
        if not math.isfinite(scale):
            raise ValueError(f"the scale {scale} of the LoRA {path} must be a finite number")
        file = lora_file(path)
        lora = read_lora(file, table, networks.unet.config.context_dim)
        for target, change in lora.changes.items():
            if scale:  # with a scale of 0 the weight stays where it lies in its mapped file
                changes[target].append((scale, change))
        merged.append(MergedLora(str(path), scale, sha256(file)))
        if scale:
            inversions += (Inversion(token, file, tensors) for token, tensors in lora.embeddings.items())
    result = {network: dict(tensors) for network, tensors in weights.items()}
    for target, own in changes.items():
        weight = weights[target.network].get(target.key)
        if weight is None or weight.shape != target.shape or not weight.is_floating_point():
            continue  # the strict assignment will list it
        result[target.network][target.key] = _changed(weight, target, own, dtype)
    return result, tuple(merged), inversions


def lora_file(path: Path) -> Path:
    """The file of a LoRA: the path itself, or the one in a folder that PEFT or diffusers wrote.

    Raises FileNotFoundError where the path does not exist, and LoraError for a folder without such a file.
    """
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        others = sorted(str(f.relative_to(path)) for name in ("*.safetensors", f"*/{ADAPTER}") for f in path.glob(name))
        remedy = "pass the folder of an adapter, or a file"
        if any(path.glob("*.bin")):
            remedy = "it has pickled files, which could run code as they are opened: convert them to safetensors"
        raise LoraError(
            f"{path} is a folder without {' or '.join(FOLDER_FILES)}: "
            + (f"name one of its files, {listed(others)}" if others else remedy)
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file or folder: pass a LoRA's .safetensors file, or an adapter's folder")
    return path


def _changed(weight: Tensor, target: Target, changes: Iterable[tuple[float, Change]], dtype: torch.dtype) -> Tensor:
    total = weight.float()
    for scale, change in changes:
        total = total + change.of(weight, scale)
    changed = total.to(dtype)
    if not changed.isfinite().all() and weight.float().isfinite().all():
        raise LoraError(f"{target.network}: {target.key} is not finite in {dtype} with the LoRAs: lower their scales")
    return changed
