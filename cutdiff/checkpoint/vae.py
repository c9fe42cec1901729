"""Reading another VAE to take the place of a model's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cutdiff.checkpoint.build import outlined
from cutdiff.checkpoint.configs import vae_config
from cutdiff.checkpoint.families import VAE_PREFIX
from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.folder import STEMS, parse
from cutdiff.checkpoint.infer import infer_vae
from cutdiff.checkpoint.keys import modern_vae
from cutdiff.checkpoint.read import find_weights, read_json
from cutdiff.checkpoint.single import convert_vae
from cutdiff.checkpoint.weights import read_weights
from cutdiff.models.config import VAEConfig
from cutdiff.models.vae import VAE

KIND = "AutoencoderKL"
REMEDY = "pass a VAE's folder or file, or a whole model's"


@dataclass(frozen=True)
class OtherVAE:
    """A VAE that was read from a folder or file of its own."""

    config: VAEConfig
    tensors: dict[str, Tensor]
    """The weights, memory-mapped, under our keys."""
    files: list[Path]


def read_vae(path: Path, like: VAEConfig, *, dtype: torch.dtype, variant: str | None = None) -> OtherVAE:
    """The VAE of a diffusers folder (a VAE's or a whole model's) or of a file in either layout (likewise).

    A file says neither its scaling factor nor whether it overflows in float16: both are then as in `like`, the VAE
    that is replaced. The statistics of the latents' channels belong to the U-Net, which was trained on them: if a
    folder has other ones than `like`, or none, those of `like` stay, and its scaling factor with them. Raises
    ValueError where there is no VAE.
    """
    if path.is_dir():
        folder = _folder(path)
        config, files = parse(folder / "config.json", vae_config), find_weights(folder, STEMS["vae"], variant)
        if (config.latents_mean, config.latents_std) != (like.latents_mean, like.latents_std):
            kept = {name: getattr(like, name) for name in ("latents_mean", "latents_std", "scaling_factor")}
            config = replace(config, **kept)
        tensors = modern_vae({key: tensor for file in files for key, tensor in read_weights(file, dtype)[0].items()})
    else:
        files, all_tensors = [path], read_weights(path, dtype)[0]
        prefix = VAE_PREFIX if any(key.startswith(VAE_PREFIX) for key in all_tensors) else ""
        tensors = {key.removeprefix(prefix): tensor for key, tensor in all_tensors.items() if key.startswith(prefix)}
        try:
            config = infer_vae(tensors, like)
        except ValueError as error:
            raise ValueError(f"{path} is no VAE: {error}: {REMEDY}") from None
        with outlined("vae"):
            tensors = modern_vae(convert_vae(tensors, VAE(config)))
    return OtherVAE(config, tensors, files)


def _folder(path: Path) -> Path:
    """The folder of the VAE: `path`, or its sub-folder if `path` is a whole model. ValueError where it is no VAE's."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no VAE: it has no config.json: {REMEDY}")
    fields = read_json(folder / "config.json")
    kind = fields.get("_class_name", fields.get("architectures", KIND))
    if kind != KIND:
        raise ValueError(f"{folder} is no VAE: its config.json is of {quoted(kind)} where {KIND!r} belongs: {REMEDY}")
    return folder
