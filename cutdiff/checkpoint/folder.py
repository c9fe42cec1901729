"""Reading the diffusers folder layout: a sub-folder for each part, a config.json in each, weights in safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import Blueprint, Networks
from cutdiff.checkpoint.configs import noise_config, unet_config, vae_config
from cutdiff.checkpoint.read import find_weights, read_json, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

T = TypeVar("T")
PIPELINES = {"StableDiffusionXLPipeline": True, "StableDiffusionPipeline": False}
"""The pipelines whose folders are read, and whether they have two text encoders."""
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
"""What weight files are called; `model` where a network is not listed."""


def read_blueprint(folder: Path) -> Blueprint:
    """Configurations, tokenizers and schedule of a diffusers folder; no weights are read.

    Raises ValueError where the folder is no text-to-image pipeline of a family that is read, a part is missing, or a
    configuration is not supported.
    """
    index_path = folder / "model_index.json"
    if not index_path.exists():
        raise ValueError(f"{folder} is no diffusers model: it has no model_index.json")
    index = read_json(index_path)
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ValueError(f"{folder} is a {pipeline}: only {' and '.join(PIPELINES)} folders are read")
    first, tokenizer = _read_text(folder, "text_encoder", "tokenizer")
    second, tokenizer_2 = _read_text(folder, "text_encoder_2", "tokenizer_2") if PIPELINES[pipeline] else (None, None)
    return Blueprint(
        unet=_parse(folder / "unet" / "config.json", unet_config),
        vae=_parse(folder / "vae" / "config.json", vae_config),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_layer=2 if second else 1,
        noise=_parse(folder / "scheduler" / "scheduler_config.json", noise_config),
        zeros_for_empty_negative=second is not None and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def weight_files(folder: Path, networks: Networks) -> dict[str, list[Path]]:
    """The weight files of each network. Raises ValueError where there are none."""
    return {name: find_weights(folder / name, STEMS.get(name, "model")) for name in networks.named()}


def read_weights(files: Mapping[str, list[Path]], networks: Networks) -> dict[str, dict[str, Tensor]]:
    """Memory-mapped tensors of each network, under the network's own keys."""
    weights: dict[str, dict[str, Tensor]] = {}
    for name, network in networks.named().items():
        tensors: dict[str, Tensor] = {}
        for shard in files[name]:
            tensors |= read_tensors(shard)
        weights[name] = clip.named_for(network, tensors) if name.startswith("text") else tensors
    return weights


def _read_text(folder: Path, encoder: str, tokenizer: str) -> tuple[CLIPTextConfig, CLIPTokenizer]:
    config = _parse(folder / encoder / "config.json", clip.clip_config)
    return config, clip.read_tokenizer(folder / tokenizer, config.max_position_embeddings)


def _parse(path: Path, parse: Callable[[Mapping[str, Any]], T]) -> T:
    fields = read_json(path)
    try:
        return parse(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
