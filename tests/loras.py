"""Random LoRAs, in every format."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny import Tiny, networks
from torch import Tensor

from cutdiff.checkpoint.keys import unet_keys
from cutdiff.checkpoint.lora.names import flat

Tensors = dict[str, Tensor]
CROSS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
FEED = "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj"
CONVOLUTION = "up_blocks.0.resnets.0.conv1"
QUERY = "text_model.encoder.layers.1.self_attn.q_proj"
MLP = "text_model.encoder.layers.0.mlp.fc1"

SHAPES: dict[str, Callable[..., dict[str, tuple[int, ...]]]] = {
    "LoRA": lambda o, i, k, r: {"lora_up.weight": (o, r, *(1 for _ in k)), "lora_down.weight": (r, i, *k)},
    "LoCon with a core": lambda o, i, k, r: {
        "lora_up.weight": (o, r, 1, 1),
        "lora_mid.weight": (r, r, *k),
        "lora_down.weight": (r, i, 1, 1),
    },
    "LoHa": lambda o, i, k, r: {
        f"hada_w{half}_{side}": (o, r) if side == "a" else (r, i * torch.Size(k).numel())
        for half in (1, 2)
        for side in "ab"
    },
    "LoHa with a core": lambda o, i, k, r: {
        name: shape
        for half in (1, 2)
        for name, shape in {
            f"hada_w{half}_a": (r, o),
            f"hada_w{half}_b": (r, i),
            f"hada_t{half}": (r, r, *k),
        }.items()
    },
    "LoKr": lambda o, i, k, r: {"lokr_w1": (2, 2), "lokr_w2": (o // 2, i // 2, *k)},
    "LoKr, second in factors": lambda o, i, k, r: {
        "lokr_w1": (2, 2),
        "lokr_w2_a": (o // 2, r),
        "lokr_w2_b": (r, i // 2 * torch.Size(k).numel()),
    },
    "LoKr, first in factors": lambda o, i, k, r: {
        "lokr_w1_a": (2, r),
        "lokr_w1_b": (r, 2),
        "lokr_w2": (o // 2, i // 2, *k),
    },
    "LoKr, both in factors": lambda o, i, k, r: {
        "lokr_w1_a": (2, r),
        "lokr_w1_b": (r, 2),
        "lokr_w2_a": (o // 2, r),
        "lokr_w2_b": (r, i // 2 * torch.Size(k).numel()),
    },
    "LoKr with a core": lambda o, i, k, r: {
        "lokr_w1": (2, 2),
        "lokr_w2_a": (r, o // 2),
        "lokr_w2_b": (r, i // 2),
        "lokr_t2": (r, r, *k),
    },
    "difference": lambda o, i, k, r: {"diff": (o, i, *k)},
}
"""The factors in a file, by format, for a weight (o, i, *k) and rank r; o and i are even."""
UNRANKED = {"LoKr", "difference"}
CORED = {name for name in SHAPES if name.endswith("core")}


def random_change(kind: str, shape: tuple[int, ...], rank: int, generator: torch.Generator) -> Tensors:
    out, inner, *kernel = shape
    sizes = SHAPES[kind](out, inner, kernel, rank)
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def whole_lora(model: Tiny, *, original: bool, seed: int = 0, alpha: float = 2.0) -> Tensors:
    """A kohya LoRA of ranks 2 to 4 for every matrix and convolution of a model but its embeddings."""
    generator, tensors = torch.Generator().manual_seed(seed), Tensors()
    spelled = {ours: theirs for theirs, ours in unet_keys(model.unet).items()} if original else {}
    prefixes = dict(
        zip(networks(model), ("unet", "", "te1" if model.text.text_encoder_2 else "te", "te2"), strict=False)
    )
    for network, module in networks(model).items():
        for key, weight in module.state_dict().items():
            if network == "vae" or weight.ndim < 2 or "embeddings" in key or not key.endswith(".weight"):
                continue
            if network != "unet" and not key.startswith("text_"):
                key = f"text_model.{key}"  # in files it has that, in some releases of transformers it has not
            name = f"lora_{prefixes[network]}_{flat(spelled.get(key, key).removesuffix('.weight'))}"
            factors = random_change("LoRA", tuple(weight.shape), 2 + len(tensors) % 3, generator)
            tensors |= {f"{name}.{part}": 0.1 * factor for part, factor in factors.items()}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def good(tiny: Tiny) -> Tensors:
    """A file with a LoRA of four modules."""
    modules = {"unet": (CROSS, FEED, CONVOLUTION), "te1": (QUERY,)}
    names = {f"lora_{prefix}_{flat(module)}" for prefix, own in modules.items() for module in own}
    return {key: tensor for key, tensor in whole_lora(tiny, original=False).items() if key.partition(".")[0] in names}
