"""A VAE from elsewhere, in the place of a model's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cutdiff.checkpoint.configs import vae_config
from cutdiff.checkpoint.families import VAE_PREFIX
from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.folder import STEMS, parse
from cutdiff.checkpoint.infer import infer_vae
from cutdiff.checkpoint.keys import modern_vae
from cutdiff.checkpoint.read import find_weights, read_json, read_tensors
from cutdiff.checkpoint.single import convert_vae
from cutdiff.models.config import VAEConfig
from cutdiff.models.vae import VAE

KIND = "AutoencoderKL"
REMEDY = "pass a VAE's folder or file, or a whole model's"


@dataclass(frozen=True)
class OtherVAE:
    config: VAEConfig
    tensors: dict[str, Tensor]
    """Memory-mapped, under our keys."""
    files: list[Path]


def read_vae(path: Path, like: VAEConfig) -> OtherVAE:
    """The VAE of a diffusers folder, its own or a whole model's, or of a file in either layout, alone or in a model's.

    A file says neither its scaling factor nor whether it overflows in float16: these are then as in `like`, the VAE
    that is replaced. Statistics of the latents' channels belong to the U-Net that was trained on them: where a folder
    says others than `like`, or none, those of `like` stay, and its scaling factor with them. Raises ValueError where
    there is no VAE.
    """
    if path.is_dir():
        folder = _folder(path)
        config, files = parse(folder / "config.json", vae_config), find_weights(folder, STEMS["vae"])
        if (config.latents_mean, config.latents_std) != (like.latents_mean, like.latents_std):
            kept = {name: getattr(like, name) for name in ("latents_mean", "latents_std", "scaling_factor")}
            config = replace(config, **kept)
        tensors = modern_vae({key: tensor for file in files for key, tensor in read_tensors(file).items()})
    else:
        files, found = [path], read_tensors(path)
        prefix = VAE_PREFIX if any(key.startswith(VAE_PREFIX) for key in found) else ""
        tensors = {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
        try:
            config = infer_vae(tensors, like)
        except ValueError as error:
            raise ValueError(f"{path} is no VAE: {error}: {REMEDY}") from None
        with torch.device("meta"):
            tensors = modern_vae(convert_vae(tensors, VAE(config)))
    return OtherVAE(config, tensors, files)


def _folder(path: Path) -> Path:
    """The VAE's own folder: `path`, or its sub-folder where that is a whole model's. ValueError where it is none."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no VAE: it has no config.json: {REMEDY}")
    fields = read_json(folder / "config.json")
    kind = fields.get("_class_name", fields.get("architectures", KIND))
    if kind != KIND:
        raise ValueError(f"{folder} is no VAE: its config.json is of {quoted(kind)} where {KIND!r} belongs: {REMEDY}")
    return folder
