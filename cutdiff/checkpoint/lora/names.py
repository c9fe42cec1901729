"""The names in LoRA files: each key belongs to a weight of the model, and holds a part of its change.

kohya's scripts write modules with underscores for dots, in the original or in the diffusers layout; diffusers, PEFT and
the Open Model Initiative (OMI) write them with dots. Here the dots of all become underscores, so that one table serves
every spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cutdiff.checkpoint.build import Networks
from cutdiff.checkpoint.keys import unet_keys
from cutdiff.checkpoint.kinds import TEXT_ENCODERS
from cutdiff.checkpoint.text import PREFIX
from cutdiff.models.unet import UNet

PREFIXES = {
    "unet": ("lora_unet_", "unet_", "lycoris_", "diffusion_model_", ""),
    "transformer": ("transformer_", "lora_transformer_", "diffusion_model_", ""),
    "text_encoder": ("lora_te1_", "lora_te_", "text_encoder_", "text_encoders_clip_l_transformer_", "clip_l_"),
    "text_encoder_2": ("lora_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_", "clip_g_"),
}
"""The prefixes of module names; the prefix is empty where the adapter of a U-Net was saved by itself."""
SUFFIXES = {
    ".lora_down.weight": "lora_down",  # kohya
    ".lora_up.weight": "lora_up",
    ".lora_mid.weight": "lora_mid",
    ".lora_A.weight": "lora_down",  # PEFT
    ".lora_B.weight": "lora_up",
    ".lora.down.weight": "lora_down",  # diffusers before it used PEFT: U-Net, text encoders, attention processors
    ".lora.up.weight": "lora_up",
    ".lora_linear_layer.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up",
    "_lora.down.weight": "lora_down",
    "_lora.up.weight": "lora_up",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},  # LyCORIS
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".dora_scale": "magnitude",  # LyCORIS and kohya
    ".lora_magnitude_vector": "magnitude",  # PEFT
    ".lora_magnitude_vector.weight": "magnitude",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    ".alpha": "alpha",
}
"""The ends of keys, and the part that such a key holds."""
ADAPTER = re.compile(r"(\.(?:lora_[AB]|lora_magnitude_vector|(?:hada|lokr)_\w+))\.(?!(?:weight|bias)$)[^.]+")
"""The name of an adapter behind that of a part, as models have it in memory: `default`, or `default_0` in diffusers."""
COMPILED = "_orig_mod_"
"""The mark of a module that `torch.compile` wrapped, in flat names."""
DOUBLED = re.compile(r"^((?:lora_)?(?:unet|te\d?|text_encoder(?:_2)?|diffusion_model|clip_[lg])_)\1+")
"""A prefix that a tool wrote once too often."""
FUSED = re.compile(r"(double|single|joint)_blocks[._]\d+[._](img|txt|linear|x_block|context_block)")
"""Modules of transformers in the original layout, in which queries, keys and values are one matrix."""
UNSUPPORTED = {
    ".oft_": "OFT",
    ".rescale": "OFT",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".bm.weight": "GLoRA",
    ".on_input": "IA3",
    ".ia3_": "IA3",
    ".q_layer": "T-LoRA, whose change depends on the timestep",
    ".p_layer": "T-LoRA, whose change depends on the timestep",
    ".lambda_layer": "T-LoRA, whose change depends on the timestep",
    ".base_q": "T-LoRA, whose change depends on the timestep",
    ".base_p": "T-LoRA, whose change depends on the timestep",
    ".base_lambda": "T-LoRA, whose change depends on the timestep",
    ".scalar": "a factor that LyCORIS multiplies into the others when it saves a finished file",
    ".lora_A.bias": "a bias",
    ".lora_B.bias": "a bias",
    ".lora_embedding_": "an embedding",
    ".lokr_t1": "a Tucker core of LoKr's first factor",
}
"""Marks within keys whose content is known but cannot be merged here, and the name of that content."""
BIAS = ".bias"
OLD_NAMES = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""The names of projections in the attention processors of former releases of diffusers."""


@dataclass(frozen=True)
class Target:
    """A weight or a bias of the model."""

    network: str
    key: str
    shape: torch.Size


def split_key(key: str) -> tuple[str, str]:
    """The module's name as the file spells it, and the part that the key holds; two empty strings if the end of the
    key is not in SUFFIXES."""
    key = ADAPTER.sub(r"\1", key)
    for suffix, part in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    return "", ""


def unsupported(key: str) -> str | None:
    """The name of what the key holds, if that is known but cannot be merged here."""
    if FUSED.search(key):
        return "FLUX.1 or SD3 in the original layout, with joined matrices: convert it to that of diffusers"
    return next((kind for mark, kind in UNSUPPORTED.items() if mark in key), None)


def flat(module: str) -> str:
    """A module's name in the spelling of the table of `targets`."""
    module = module.replace("base_model.model.", "").replace(".processor.", ".").replace(".", "_")
    return DOUBLED.sub(r"\1", module.replace(COMPILED, ""))


def targets(networks: Networks) -> dict[str, Target]:
    """The weights of the networks by all flat names that files give their modules, and biases with BIAS behind that."""
    unet = networks.unet if isinstance(networks.unet, UNet) else None
    original = {} if unet is None else {ours: theirs for theirs, ours in unet_keys(unet).items()}
    table: dict[str, Target] = {}
    for name, network in networks.named().items():
        for key, weight in network.state_dict().items():
            if not key.endswith((".weight", BIAS)):
                continue
            target, bare, end = Target(name, key, weight.shape), key.removeprefix(PREFIX), key[key.rindex(".") :]
            spellings = (bare, PREFIX + bare) if name in TEXT_ENCODERS else (key, original.get(key, key))
            for spelling in spellings:
                for module in _old_and_new(spelling.removesuffix(end)):
                    for prefix in PREFIXES.get(name, ()):
                        place = prefix + flat(module) + (BIAS if end == BIAS else "")
                        registered = table.setdefault(place, target)
                        assert registered == target, f"{registered.key} and {key} have one flat name"
    return table


def _old_and_new(module: str) -> Iterator[str]:
    yield module
    for new, old in OLD_NAMES.items():
        if module.endswith(f".{new}"):
            yield module.removesuffix(new) + old
