"""Single files with a transformer, FLUX.1's or SD3's, in the original layout or that of diffusers.

Most hold the transformer alone; some have text encoders and a VAE beside it, as ComfyUI writes them. In the original
layout queries, keys and values are one matrix, which is split here without a copy, and the last modulation has its
shift before its scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import is_harmless
from cutdiff.checkpoint.files import listed
from cutdiff.checkpoint.infer import Shapes
from cutdiff.checkpoint.kinds import FLUX, SD3, TEXT_ENCODERS, Kind
from cutdiff.checkpoint.single import Parts
from cutdiff.checkpoint.transformer_configs import PACKED, check_flux_channels
from cutdiff.models.flux import FluxConfig
from cutdiff.models.sd3 import SD3Config

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
MARKS = {
    "double_blocks.0.img_attn.qkv.weight": FLUX,
    "single_transformer_blocks.0.attn.to_q.weight": FLUX,
    "joint_blocks.0.x_block.attn.qkv.weight": SD3,
    "pos_embed.proj.weight": SD3,
}
"""A key of each layout of each kind."""
VAE_PREFIXES = ("first_stage_model.", "vae.")
CLIP_L, CLIP_G, T5XXL = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
TEXT_PREFIXES = {FLUX.text: (CLIP_L, T5XXL), SD3.text: (CLIP_L, CLIP_G, T5XXL)}
"""The prefixes of text encoders, in the order of `TEXT_ENCODERS`."""

_TIME = "time_text_embed."
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
MODULES: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "context_embedder": ("context_embedder",),
    "x_embedder.proj": ("pos_embed.proj",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    **{
        f"{theirs}.{layer}": (f"{_TIME}{ours}.linear_{number}",)
        for theirs, ours, layers in (
            ("time_in", "timestep_embedder", ("in_layer", "out_layer")),
            ("vector_in", "text_embedder", ("in_layer", "out_layer")),
            ("guidance_in", "guidance_embedder", ("in_layer", "out_layer")),
            ("t_embedder", "timestep_embedder", ("mlp.0", "mlp.2")),
            ("y_embedder", "text_embedder", ("mlp.0", "mlp.2")),
        )
        for number, layer in enumerate(layers, start=1)
    },
}
"""Our modules that each one in the original layout is, outside of blocks."""
BLOCKS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "double_blocks": (
        "transformer_blocks",
        {
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
            "img_attn.qkv": _QKV,
            "txt_attn.qkv": _ADDED,
            "img_attn.norm.query_norm": ("attn.norm_q",),
            "img_attn.norm.key_norm": ("attn.norm_k",),
            "txt_attn.norm.query_norm": ("attn.norm_added_q",),
            "txt_attn.norm.key_norm": ("attn.norm_added_k",),
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {
            "modulation.lin": ("norm.linear",),
            "linear1": (*_QKV, "proj_mlp"),
            "linear2": ("proj_out",),
            "norm.query_norm": ("attn.norm_q",),
            "norm.key_norm": ("attn.norm_k",),
        },
    ),
    "joint_blocks": (
        "transformer_blocks",
        {
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.adaLN_modulation.1": ("norm1_context.linear",),
            "x_block.attn.qkv": _QKV,
            "context_block.attn.qkv": _ADDED,
            "x_block.attn2.qkv": tuple(name.replace("attn.", "attn2.") for name in _QKV),
            "x_block.attn.ln_q": ("attn.norm_q",),
            "x_block.attn.ln_k": ("attn.norm_k",),
            "x_block.attn2.ln_q": ("attn2.norm_q",),
            "x_block.attn2.ln_k": ("attn2.norm_k",),
            "context_block.attn.ln_q": ("attn.norm_added_q",),
            "context_block.attn.ln_k": ("attn.norm_added_k",),
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "context_block.attn.proj": ("attn.to_add_out",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
        },
    ),
}
"""The blocks in the original layout: our name of their list, and our modules that each of their modules is."""
BLOCK = re.compile(rf"({'|'.join(BLOCKS)})\.(\d+)\.(.+)")


def kind_in(keys: Collection[str]) -> tuple[Kind, str] | None:
    """The kind of the transformer in a file, and the prefix of its keys; None where there is none."""
    there = ((kind, prefix) for prefix in PREFIXES for mark, kind in MARKS.items() if prefix + mark in keys)
    return next(there, None)


def split(tensors: Mapping[str, Tensor], kind: Kind, prefix: str) -> Parts:
    """The tensors of each network in a file, the transformer's under our keys and a VAE's under its own. Raises
    ValueError for keys that belong to no network."""
    prefixes = {kind.folder: (prefix,), "vae": VAE_PREFIXES}
    prefixes |= {name: (each,) for name, each in zip(TEXT_ENCODERS, TEXT_PREFIXES[kind.text], strict=False)}
    parts, rest = Parts(), list[str]()
    for key, tensor in tensors.items():
        # The transformer's comes last, as it may be empty.
        for name in reversed(prefixes):
            start = next((each for each in prefixes[name] if key.startswith(each)), None)
            if start is not None:
                parts.setdefault(name, {})[key.removeprefix(start)] = tensor
                break
        else:
            rest.append(key)
    if unexpected := [key for key in rest if not is_harmless(key)]:
        raise ValueError(f"{len(unexpected)} keys belong to no network of this transformer's: {listed(unexpected)}")
    parts[kind.folder] = from_original(parts[kind.folder])
    for name in parts.keys() & {*TEXT_ENCODERS}:
        if prefixes[name] != (T5XXL,):
            parts[name] = clip.with_prefix(parts[name])
    return parts


def from_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a transformer under our keys, from either layout; unknown keys stay as they are."""
    blocks = [int(match[2]) for key in tensors if (match := BLOCK.match(key)) and match[1] == "joint_blocks"]
    last = f"transformer_blocks.{max(blocks, default=-1)}.norm1_context.linear"
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key == "pos_embed":
            named["pos_embed.pos_embed"] = tensor
            continue
        module, _, kind = key.rpartition(".")
        modules = _modules(module)
        parts = [tensor]
        if len(modules) > 1 and tensor.ndim:
            width = tensor.shape[0] // (3 if len(modules) == 3 else 7)  # a hidden layer is four times as wide
            parts = tensor.split([width] * 3 + [tensor.shape[0] - 3 * width] * (len(modules) > 3))
        elif modules in (("norm_out.linear",), (last,)):
            parts = [torch.cat(tensor.chunk(2)[::-1])] if tensor.ndim else parts
        ours = {"scale": "weight"}.get(kind, kind)
        if not modules or len(parts) != len(modules):
            named[key] = tensor
        else:
            named |= {f"{name}.{ours}": part for name, part in zip(modules, parts, strict=True)}
    return named


def _modules(module: str) -> tuple[str, ...]:
    """Our names of a module in the original layout; none where it has another name."""
    if (match := BLOCK.fullmatch(module)) is None:
        return MODULES.get(module, ())
    name, own = BLOCKS[match[1]]
    return tuple(f"{name}.{match[2]}.{part}" for part in own.get(match[3], ()))


def infer(tensors: Mapping[str, Tensor], like: Any) -> Any:
    """The sizes of a transformer under our keys; what no shape shows is as in `like`. Raises ValueError where a key is
    missing that shows a size."""
    shapes = Shapes("transformer", tensors)
    shared = {
        "num_layers": shapes.count("transformer_blocks."),
        "context_dim": shapes.of("context_embedder.weight")[1],
        "pooled_dim": shapes.of(f"{_TIME}text_embedder.linear_1.weight")[1],
    }
    dim = shapes.of("context_embedder.weight")[0]
    norm = tensors.get("transformer_blocks.0.attn.norm_q.weight")
    head_dim = like.head_dim if norm is None or not norm.ndim else norm.shape[0]
    if dim % head_dim:
        raise ValueError(f"its transformer has {dim} features, which heads of {head_dim} do not divide")
    shared["num_heads"] = dim // head_dim
    if isinstance(like, FluxConfig):
        width = shapes.of("x_embedder.weight")[1]
        check_flux_channels(width, shapes.of("proj_out.weight")[0])
        if sum(like.axes) != head_dim:
            raise ValueError(f"its heads have {head_dim} features, and those of the folder {sum(like.axes)}")
        return replace(
            like,
            **shared,
            latent_channels=width // PACKED**2,
            num_single_layers=shapes.count("single_transformer_blocks."),
            reads_guidance=f"{_TIME}guidance_embedder.linear_1.weight" in tensors,
        )
    patches, table = shapes.of("pos_embed.proj.weight"), shapes.of("pos_embed.pos_embed")
    dual = {int(key.split(".")[1]) for key in tensors if re.match(r"transformer_blocks\.\d+\.attn2\.", key)}
    return SD3Config(
        **shared,
        latent_channels=patches[1],
        patch=patches[-1],
        native_size=like.native_size,
        head_dim=head_dim,
        table_size=math.isqrt(table[1]),
        dual_layers=tuple(sorted(dual)),
        qk_norm=norm is not None,
    )
