"""The names in LoRA files: each key belongs to a weight of the model, and holds a part of its change.

kohya's scripts write modules with underscores for dots, in the original or in the diffusers layout; diffusers and PEFT
write them with dots. Here the dots of all become underscores, so that one table serves every spelling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cutdiff.checkpoint.build import Networks
from cutdiff.checkpoint.keys import unet_keys
from cutdiff.checkpoint.text import PREFIX

PREFIXES = {
    "unet": ("lora_unet_", "unet_", "lycoris_", "diffusion_model_", ""),
    "text_encoder": ("lora_te1_", "lora_te_", "text_encoder_", "text_encoders_clip_l_transformer_"),
    "text_encoder_2": ("lora_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_"),
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
    ".diff": "diff",
    ".alpha": "alpha",
}
"""The ends of keys, and the part that such a key holds."""
UNSUPPORTED = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".oft_": "OFT",
    ".rescale": "OFT",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".bm.weight": "GLoRA",
    ".on_input": "IA3",
    ".ia3_": "IA3",
    ".diff_b": "a bias",
    ".lora_A.bias": "a bias",
    ".lora_B.bias": "a bias",
    ".w_norm": "a norm",
    ".b_norm": "a norm",
    ".lora_embedding_": "an embedding",
    ".lokr_t1": "a Tucker core of LoKr's first factor",
}
"""Marks within keys whose content is known but cannot be merged here, and the name of that content."""
OLD_NAMES = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""The names of projections in the attention processors of former releases of diffusers."""


@dataclass(frozen=True)
class Target:
    """A weight of the model."""

    network: str
    key: str
    shape: torch.Size


def split_key(key: str) -> tuple[str, str]:
    """The module's name as the file spells it, and the part that the key holds; two empty strings if the end of the
    key is not in SUFFIXES."""
    for suffix, part in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    return "", ""


def unsupported(key: str) -> str | None:
    """The name of what the key holds, if that is known but cannot be merged here."""
    return next((kind for mark, kind in UNSUPPORTED.items() if mark in key), None)


def flat(module: str) -> str:
    """A module's name in the spelling of the table of `targets`."""
    return module.replace("base_model.model.", "").replace(".processor.", ".").replace(".", "_")


def targets(networks: Networks) -> dict[str, Target]:
    """The weights of the networks, by all flat names that files give them."""
    original = {ours: theirs for theirs, ours in unet_keys(networks.unet).items()}
    table: dict[str, Target] = {}
    for name, network in networks.named().items():
        for key, weight in network.state_dict().items():
            if weight.ndim < 2 or not key.endswith(".weight"):
                continue
            target, bare = Target(name, key, weight.shape), key.removeprefix(PREFIX)
            for spelling in (key, original[key]) if name == "unet" else (bare, PREFIX + bare):
                for module in _old_and_new(spelling.removesuffix(".weight")):
                    for prefix in PREFIXES.get(name, ()):
                        registered = table.setdefault(prefix + flat(module), target)
                        assert registered == target, f"{registered.key} and {key} have one flat name"
    return table


def _old_and_new(module: str) -> Iterator[str]:
    yield module
    for new, old in OLD_NAMES.items():
        if module.endswith(f".{new}"):
            yield module.removesuffix(new) + old
