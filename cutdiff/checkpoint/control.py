"""Reading a ControlNet for a model: a diffusers folder, or a file in diffusers' layout or the original one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutdiff.checkpoint.build import assign, outlined
from cutdiff.checkpoint.configs import control_config, control_to_diffusers
from cutdiff.checkpoint.families import SD15, SD21, SDXL, family_of
from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.folder import parse
from cutdiff.checkpoint.infer import infer_control
from cutdiff.checkpoint.keys import HINT, control_keys
from cutdiff.checkpoint.locate import locate, name_of
from cutdiff.checkpoint.model import Model, sha256
from cutdiff.checkpoint.read import find_weights, read_json
from cutdiff.checkpoint.save import write_network
from cutdiff.checkpoint.weights import read_weights
from cutdiff.models.config import SD15_UNET, SD21_UNET, SDXL_UNET, UNetConfig
from cutdiff.models.controlnet import ControlNet, ControlNetConfig

PREFIX = "control_model."
"""The prefix of the keys of a file in the original layout, where it has one; a whole model may stand beside them."""
FIRST = ("controlnet_cond_embedding.conv_in.weight", f"{HINT}.0.weight")
"""Keys of which every ControlNet has one."""
OTHERS = (
    (r"lora_controlnet$|.*\.(up|down)$", "a control-lora, which changes a U-Net by low rank: pass a whole ControlNet"),
    (r"difference$", "a ControlNet as its difference from SD 1.5, which is not read: pass the whole one"),
    (r"task_embedding$|control_add_embedding\.|transformer_layes\.", "a union of ControlNets, which is not built here"),
    (r".*(base_to_ctrl|ctrl_to_base)", "a ControlNet-XS, whose network is not built here"),
    (r"lllite_", "a ControlNet-LLLite, whose network is not built here"),
    (r"(adapter\.)?body\.\d", "a T2I-Adapter, whose network is not built here"),
)
"""The keys of other files that take a hint, and a description of those files."""
SAME = ("in_channels", "channels", "layers_per_block", "context_dim", "pooled_dim", "size_embedding_dim")
"""The fields in which a ControlNet is as the U-Net that it is for."""


def load_control(path: str | Path, model: Model) -> ControlNet:
    """Read the ControlNet at a path, or of a hub id in the local Hugging Face cache, for a model, on its device.

    A file's sizes are inferred from its shapes. Raises FileNotFoundError where there is none, and ValueError where it
    is no ControlNet, is incomplete, is of another family than the model, or of a kind that is not built here.
    """
    source = locate(path, "control")
    if source.is_dir():
        kind = read_json(source / "config.json").get("_class_name", "ControlNetModel")
        if kind != "ControlNetModel":
            raise ValueError(f"{source}: no ControlNet: it is of {quoted(kind)}: pass a ControlNet")
        config = parse(source / "config.json", control_config)
        shards = weight_files(source)
        tensors = {key: tensor for shard in shards for key, tensor in read_weights(shard, model.dtype)[0].items()}
    else:
        try:
            tensors = _control_of(read_weights(source, model.dtype)[0])
            config = infer_control(tensors, model.unet.config)
        except ValueError as error:
            raise ValueError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
    if fault := _misfit(config, model):
        raise ValueError(f"{source}: {fault}: pass a ControlNet that was made for this model's family, or its model")
    with outlined("control"):
        network = ControlNet(config)
    keys = control_keys(network)
    named = {keys.get(key, key): tensor for key, tensor in tensors.items()}
    assign(network, named, name=str(source), device=model.device, dtype=model.dtype)
    return network


def control_of(model: Model, path: str) -> ControlNet:
    """`load_control`, which is done once for a model and a file that does not change."""
    key = path, model.device, model.dtype, *map(_stamp, weight_files(path))
    if key not in model.controls:
        model.controls[key] = load_control(path, model)
    return model.controls[key]


def described(path: str) -> dict[str, Any]:
    """A ControlNet as a record has it: its name, and the SHA-256 of its weight files."""
    return {"name": name_of(path), "sha256": [_hash(file, _stamp(file)) for file in weight_files(path)]}


def weight_files(path: str | Path) -> list[Path]:
    """The files that hold the weights of the ControlNet at a path."""
    source = locate(path, "control")
    if (source / "model_index.json").exists():
        raise ValueError(f"{source}: no ControlNet: it is a whole model: pass a ControlNet")
    return find_weights(source, "diffusion_pytorch_model") if source.is_dir() else [source]


def _stamp(file: Path) -> tuple[int, ...]:
    """The properties of a file that change when it is written anew."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache
def _hash(file: Path, stamp: tuple[int, ...]) -> str:
    return sha256(file)


def save_control(path: Path, network: ControlNet) -> None:
    """Write a ControlNet in float16 with the keys of diffusers, and beside it, with the ending .json, the config.json
    with which diffusers builds it; each file appears whole."""
    fields = control_to_diffusers(network.control)
    write_network(path, path.with_suffix(".json"), network.state_dict(), fields, torch.float16)


def _control_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file's ControlNet, without their prefix. ValueError, which says what it is, where there is
    none."""
    prefix = PREFIX if any(key.startswith(PREFIX) for key in tensors) else ""
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    for pattern, what in OTHERS:
        if any(re.match(pattern, key) for key in own):
            raise ValueError(what)
    if own.keys().isdisjoint(FIRST):
        raise ValueError(f"no ControlNet: it is {_what(tensors)}: pass a ControlNet")
    return own


def _what(keys: Collection[str]) -> str:
    try:
        return f"a whole {family_of(keys, needs_vae=False).name} model"
    except ValueError as error:
        return str(error).partition(":")[0]  # what follows is how to load it as a model


def _misfit(config: ControlNetConfig, model: Model) -> str:
    """The way in which a ControlNet does not fit a model; "" where it does."""
    ours, theirs = config.unet, model.unet.config
    if config.factor != model.factor:
        return f"its hint has {config.factor} pixels for a latent, and the model's VAE {model.factor}"
    if config.hint_channels != 3:
        return f"its hint has {config.hint_channels} channels, and a picture 3"
    theirs = replace(theirs, in_channels=model.vae.config.latent_channels)
    for name in SAME:
        if (own := getattr(ours, name)) != (other := getattr(theirs, name)):
            families = f"it is of {_family(ours)}, and the model of {_family(theirs)}"
            return f"{families}: it has {name}={own} and the U-Net {other}"
    return ""


def _family(config: UNetConfig) -> str:
    """The family of a U-Net, as far as those fields tell it in which a ControlNet is the same."""
    for family, known in ((SDXL, SDXL_UNET), (SD15, SD15_UNET), (SD21, SD21_UNET)):
        if all(getattr(config, name) == getattr(known, name) for name in SAME):
            return family.name
    return "a family of its own"
