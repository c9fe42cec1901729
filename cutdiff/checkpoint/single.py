"""Taking a single file in the original (Stability) layout apart: the tensors of each network, under its own keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from torch import Tensor

from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import Networks, is_harmless
from cutdiff.checkpoint.families import UNET_PREFIX, Family
from cutdiff.checkpoint.files import listed
from cutdiff.checkpoint.keys import original_attention, unet_keys, vae_keys
from cutdiff.checkpoint.noise import MARKS
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE

Parts = dict[str, dict[str, Tensor]]

AVERAGED = "model_ema.diffusion_model"
FLAT = re.compile(
    AVERAGED + r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)(\d+)(\D.*?)?(weight|bias)"
)
FLAT_PARTS = re.compile(
    r"transformer_blocks|(?:in|out|emb)_layers|skip_connection|proj_(?:in|out)|attn\d|to_(?:q|k|v|out)|norm\d?|ff|net|[a-z]+|\d+"
)
"""The parts of a name inside a block, which its average has without dots between them."""
ENDS = (("conv_in", "conv_out"), ("input_blocks.0.0", "out.2"))
"""The first and the last layer of a U-Net, in the diffusers layout and in the original."""


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
    if unexpected:
        raise ValueError(f"{len(unexpected)} keys belong to no network of {family.name}: {listed(unexpected)}")
    for text in family.texts:
        named = clip.from_open_clip if text.is_open_clip else clip.with_prefix
        parts[text.name] = named(parts[text.name])
    # Some files have a projection, but only a second encoder's pooled text is read.
    parts["text_encoder"].pop(clip.PROJECTION, None)
    return parts


def with_averages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with the averages of a U-Net's weights under the names of the weights if those are missing.

    Trainers write averages under names without dots, such as `model_ema.diffusion_modelout2weight`.
    """
    if any(key.startswith(UNET_PREFIX) for key in tensors) or not any(key.startswith(AVERAGED) for key in tensors):
        return tensors
    return {_dotted(key) if key.startswith(AVERAGED) else key: tensor for key, tensor in tensors.items()}


def _dotted(key: str) -> str:
    """The name of the weight whose average has this key; the key itself where it is no U-Net's."""
    match = FLAT.fullmatch(key)
    if match is None:
        return key
    head, numbers, inner, kind = match.groups()
    numbers = [*numbers] if head == "label_emb" else [numbers]
    if head in ("input_blocks", "output_blocks"):  # the second number, of a part in a block, has one digit
        numbers = [numbers[0][:-1], numbers[0][-1]]
    return f"{UNET_PREFIX}{'.'.join([head, *numbers, *FLAT_PARTS.findall(inner or ''), kind])}"


def lone_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of a U-Net, in either layout and without a prefix, if the file holds no other network; else None."""
    for prefix in (UNET_PREFIX, "diffusion_model.", "unet.", ""):
        if any({f"{prefix}{first}.weight", f"{prefix}{last}.weight"} <= tensors.keys() for first, last in ENDS):
            others = [key for key in tensors if not key.startswith(prefix)]
            is_alone = all(is_harmless(key) or key.startswith(MARKS) for key in others)
            unet = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            return {key: tensor for key, tensor in unet.items() if not key.startswith(MARKS)} if is_alone else None
    return None


def convert(parts: Parts, networks: Networks) -> Parts:
    """The same tensors under the networks' own keys. Unknown keys stay, so that the strict assignment lists them."""
    unet = unet_keys(cast(UNet, networks.unet))
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
    tensors = {original_attention(key): tensor for key, tensor in tensors.items()}
    named = ((keys.get(key, key), tensor) for key, tensor in tensors.items())
    return {key: _linear(tensor) if key in state and state[key].ndim == 2 else tensor for key, tensor in named}


def _linear(weight: Tensor) -> Tensor:
    """The weight of a 1×1 convolution (C', C, 1, 1) as that of a linear layer (C', C); other weights as they are."""
    return weight.flatten(1) if weight.shape[2:] == (1, 1) else weight
