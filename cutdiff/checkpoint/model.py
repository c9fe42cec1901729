"""A loaded model: its networks, the noise that they were trained with, and the files that they came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cutdiff.checkpoint.kinds import networks_of
from cutdiff.files import opened
from cutdiff.models.backbone import Backbone
from cutdiff.models.controlnet import ControlNet
from cutdiff.models.fp8 import FP8Linear
from cutdiff.models.vae import VAE
from cutdiff.sampling.edm import AnyNoise

if TYPE_CHECKING:
    from cutdiff.models.text import TextEncoders

LISTED = 5
"""The number of weights that an error names before it only counts them."""


@dataclass(frozen=True)
class MergedLora:
    """A LoRA that was merged into a model's weights, `scale` times."""

    path: str
    """The file or the folder, as it was given."""
    scale: float
    sha256: str


@dataclass(frozen=True)
class AddedEmbedding:
    """A file of textual inversion, or a LoRA that bundles one, whose vectors a token stands for."""

    path: str
    token: str
    sha256: str


@dataclass(frozen=True)
class Model:
    """The model that `cutdiff.load` returns and every run reads.

    Its networks are in evaluation mode, and a run leaves no trace in them.
    """

    unet: Backbone[Any]
    """The network that is sampled with, a U-Net or a transformer."""
    vae: VAE
    text: TextEncoders
    noise: AnyNoise
    zeros_for_empty_negative: bool
    """True where an empty negative prompt is zeros, as SDXL was trained, and not the encoding of an empty string."""
    source: str
    """The folder or file that the weights were read from."""
    files: dict[str, Path]
    """The weight files, by their paths relative to `source`; those of another VAE by "vae=" and their names."""
    decided_by: dict[str, str] = field(default_factory=dict)
    """The source that decided each part of `noise`, by the names of `noise.described()`: "option", "marker key …",
    "metadata …", "scheduler" or "default"."""
    loras: tuple[MergedLora, ...] = ()
    embeddings: tuple[AddedEmbedding, ...] = ()
    preferred: dict[str, Any] = field(default_factory=dict)
    """The options that a run has where nobody says otherwise, of `settings.PREFERENCES`."""
    controls: dict[Any, ControlNet] = field(default_factory=dict, compare=False, repr=False)
    """The ControlNets that runs have read for the model, so that none is read twice."""

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every weight file, by the names of `files`; computed on first use, as it reads all bytes."""
        return {name: sha256(path) for name, path in self.files.items()}

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def fp8(self) -> bool:
        """True where the network's transformers multiply in 8 bits."""
        return any(isinstance(module, FP8Linear) for module in self.unet.modules())

    @property
    def vae_dtype(self) -> torch.dtype:
        """The dtype in which the VAE decodes: its weights', or float32 where it would overflow in float16."""
        own = self.vae.dtype
        return torch.float32 if own == torch.float16 and self.vae.config.force_upcast else own

    def bad_weights(self) -> str:
        """A message that names the weights that hold NaN or infinity; empty where there are none."""
        bad = {
            f"{name}: {key}": weight
            for name, network in networks_of(self.unet, self.vae, self.text.encoders).items()
            for key, weight in network.state_dict().items()
            if weight.is_floating_point() and not (weight if weight.itemsize > 1 else weight.float()).isfinite().all()
        }
        if not bad:
            return ""
        more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        named = f"{', '.join([*bad][:LISTED])}{more}"
        if self.dtype == torch.float16 and not any(weight.isnan().any() for weight in bad.values()):
            return f"weights do not fit float16, {named}: use bfloat16 or float32"
        return f"weights hold NaN or infinity, {named}: download them again"

    def why_not_finite(self) -> str:
        """The cause, as an error says it, of a value that the model computed and that is not finite."""
        bad = self.bad_weights()
        if bad or self.dtype == torch.float32:
            return bad or "all weights are finite"
        return f"all weights are finite, so {dtype_name(self.dtype)} overflowed: use float32 or bfloat16"

    @property
    def native_size(self) -> int:
        """The side, in latents, of the pictures that the model was trained on."""
        return self.unet.config.native_size

    @property
    def factor(self) -> int:
        """The pixels of an image for one latent, on each axis."""
        return self.vae.config.factor


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in options and records, such as "float32"."""
    return str(dtype).removeprefix("torch.")
