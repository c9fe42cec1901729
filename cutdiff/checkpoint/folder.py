"""Reading the diffusers folder layout: a sub-folder for each part, a config.json in each, weights in safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import NETWORKS, Blueprint, Networks
from cutdiff.checkpoint.configs import noise_config, unet_config, vae_config
from cutdiff.checkpoint.read import find_weights, read_json, read_tensors

T = TypeVar("T")
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
"""What weight files are called; `model` where a network is not listed."""


def read_blueprint(folder: Path) -> Blueprint:
    """Configurations, tokenizers and schedule of a diffusers folder; no weights are read.

    Raises ValueError where the folder is no SDXL pipeline, a part is missing, or a configuration is not supported.
    """
    index_path = folder / "model_index.json"
    if not index_path.exists():
        raise ValueError(f"{folder} is no diffusers model: it has no model_index.json")
    index = read_json(index_path)
    pipeline = str(index.get("_class_name"))
    if not pipeline.startswith("StableDiffusionXL"):
        raise ValueError(f"{folder} is a {pipeline}: only StableDiffusionXLPipeline folders are read")
    first = _parse(folder / "text_encoder" / "config.json", clip.clip_config)
    second = _parse(folder / "text_encoder_2" / "config.json", clip.clip_config)
    return Blueprint(
        unet=_parse(folder / "unet" / "config.json", unet_config),
        vae=_parse(folder / "vae" / "config.json", vae_config),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=clip.read_tokenizer(folder / "tokenizer", first.max_position_embeddings),
        tokenizer_2=clip.read_tokenizer(folder / "tokenizer_2", second.max_position_embeddings),
        noise=_parse(folder / "scheduler" / "scheduler_config.json", noise_config),
        zeros_for_empty_negative=bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def weight_files(folder: Path) -> dict[str, list[Path]]:
    """The weight files of each network. Raises ValueError where there are none."""
    return {name: find_weights(folder / name, STEMS.get(name, "model")) for name in NETWORKS}


def read_weights(files: Mapping[str, list[Path]], networks: Networks) -> dict[str, dict[str, Tensor]]:
    """Memory-mapped tensors of each network, under the network's own keys."""
    weights: dict[str, dict[str, Tensor]] = {}
    for name, shards in files.items():
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            tensors |= read_tensors(shard)
        weights[name] = clip.named_for(getattr(networks, name), tensors) if name.startswith("text") else tensors
    return weights


def _parse(path: Path, parse: Callable[[Mapping[str, Any]], T]) -> T:
    fields = read_json(path)
    try:
        return parse(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
