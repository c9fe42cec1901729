"""Taking a single file in the original (Stability) layout apart: the tensors of each network, under its own keys."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import Networks, is_harmless
from cutdiff.checkpoint.families import QUANTIZED, Family
from cutdiff.checkpoint.files import listed
from cutdiff.checkpoint.keys import unet_keys, vae_keys
from cutdiff.checkpoint.noise import MARKS
from cutdiff.models.vae import VAE

Parts = dict[str, dict[str, Tensor]]


def split(tensors: Mapping[str, Tensor], family: Family) -> Parts:
    """The tensors of each network, under original keys without their prefix in U-Net and VAE, and under those of
    transformers in text encoders.

    Nothing is copied but the projection of an OpenCLIP encoder. Raises ValueError for keys that belong to no network.
    """
    parts: Parts = {network: {} for network in family.prefixes}
    rest: list[str] = []
    for key, tensor in tensors.items():
        for network, prefix in family.prefixes.items():
            if key.startswith(prefix):
                parts[network][key.removeprefix(prefix)] = tensor
                break
        else:
            rest.append(key)
    unexpected = [key for key in rest if not is_harmless(key) and not key.startswith(MARKS)]
    if scale := next((key for key in tensors if QUANTIZED.search(key)), None):
        raise ValueError(
            f"its weights are quantized and scaled ({scale}), which is not read: take its fp16 or bf16 file"
        )
    if unexpected:
        raise ValueError(f"{len(unexpected)} keys belong to no network of {family.name}: {listed(unexpected)}")
    for text in family.texts:
        named = clip.from_open_clip if text.is_open_clip else clip.with_prefix
        parts[text.name] = named(parts[text.name])
    # Some files have a projection, but only a second encoder's pooled text is read.
    parts["text_encoder"].pop(clip.PROJECTION, None)
    return parts


def convert(parts: Parts, networks: Networks) -> Parts:
    """The same tensors under the networks' own keys. Unknown keys stay, so that the strict assignment lists them."""
    unet = unet_keys(networks.unet)
    return {
        "unet": {unet.get(key, key): tensor for key, tensor in parts["unet"].items()},
        "vae": convert_vae(parts["vae"], networks.vae),
        **{
            name: clip.named_for(network, parts[name])
            for name, network in networks.named().items()
            if name.startswith("text")
        },
    }


def convert_vae(tensors: Mapping[str, Tensor], vae: VAE) -> dict[str, Tensor]:
    """The tensors of a VAE, from original keys without their prefix to its own keys."""
    keys, state = vae_keys(vae), vae.state_dict()
    named = ((keys.get(key, key), tensor) for key, tensor in tensors.items())
    return {key: _linear(tensor) if key in state and state[key].ndim == 2 else tensor for key, tensor in named}


def _linear(weight: Tensor) -> Tensor:
    """The weight of a 1×1 convolution (C', C, 1, 1) as that of a linear layer (C', C); other weights as they are."""
    return weight.flatten(1) if weight.shape[2:] == (1, 1) else weight
