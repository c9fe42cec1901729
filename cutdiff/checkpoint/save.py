"""Writing a model as a diffusers folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from cutdiff.checkpoint import t5
from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.configs import vae_to_diffusers
from cutdiff.checkpoint.fields import DIFFUSERS_VERSION
from cutdiff.checkpoint.folder import PREFERRED, tokenizer_of
from cutdiff.checkpoint.kinds import FLUX, SD3, TEXT_ENCODERS, Kind, kind_of
from cutdiff.checkpoint.schedulers import noise_to_diffusers
from cutdiff.models.backbone import Backbone
from cutdiff.models.vae import VAE
from cutdiff.sampling.edm import AnyNoise
from cutdiff.settings import check_preferred

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Tokenizer

    from cutdiff.models.text import TextEncoders

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def save_folder(
    folder: str | Path,
    *,
    unet: Backbone[Any],
    vae: VAE,
    text: TextEncoders,
    noise: AnyNoise,
    zeros_for_empty_negative: bool,
    dtype: torch.dtype = torch.float16,
    preferred: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a model, with its weights in `dtype`, so that `load` and diffusers' pipeline of its family can read it.

    `preferred` are options of a run, of `settings.PREFERENCES`, that `generate` and the command lines then take where
    nobody says otherwise.

    Every file appears whole or not at all, and replaces one of the same name. Raises ValueError for a weight that is
    not finite in `dtype` or has 8 bits, a network or a layer of text states that the layout cannot express, or a
    tokenizer with tokens beside its vocabulary.
    """
    folder = Path(folder)
    check_preferred(preferred)
    kind = kind_of(unet.config)
    unet_fields = kind.write(unet.config)
    layer = len(text.clips)
    if type(text) is not kind.text:
        raise ValueError(f"text={type(text).__name__} is not for a {kind.folder}, which needs {kind.text.__name__}")
    if text.layer != layer:
        raise ValueError(f"text.layer={text.layer} cannot be saved: the folder's pipeline reads {layer} from the end")
    vae_fields = vae_to_diffusers(vae.config, sample_size=unet.config.native_size * vae.config.factor)
    scheduler_fields = noise_to_diffusers(noise)
    index: dict[str, Any] = {
        **_pipeline(kind, text, "Inpaint" if unet.config.inpaints else "", zeros_for_empty_negative),
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_fields["_class_name"]],
        kind.folder: ["diffusers", kind.class_name],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    texts = [*zip(TEXT_ENCODERS, text.parts, strict=False)]
    for name, (encoder, _) in texts:
        tokenizer = "CLIPTokenizer" if encoder in text.clips else "T5TokenizerFast"
        index |= {name: ["transformers", type(encoder).__name__], tokenizer_of(name): ["transformers", tokenizer]}
    _write_network(folder / kind.folder, "diffusion_pytorch_model", unet.state_dict(), unet_fields, dtype)
    _write_network(folder / "vae", "diffusion_pytorch_model", vae.state_dict(), vae_fields, dtype)
    for name, (encoder, tokenizer) in texts:
        if encoder in text.clips:
            tensors, fields, write = clip.with_prefix(encoder.state_dict()), _clip_fields(encoder), _write_tokenizer
        else:
            tensors, fields, write = t5.with_one_name(encoder.state_dict()), t5.fields(encoder), _write_t5_tokenizer
        _write_network(folder / name, "model", tensors, fields, dtype)
        write(folder / tokenizer_of(name), tokenizer)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_fields)
    if preferred:
        _write_json(folder / PREFERRED, preferred)
    _write_json(folder / "model_index.json", index)


def _pipeline(kind: Kind, text: TextEncoders, task: str, zeros_for_empty_negative: bool) -> dict[str, Any]:
    """The pipeline in a model_index.json, and what it is without."""
    none = [None, None]
    if kind is FLUX:
        return {"_class_name": "FluxPipeline", "image_encoder": none, "feature_extractor": none}
    if kind is SD3:
        without = [] if len(text.parts) > 2 else [TEXT_ENCODERS[2], tokenizer_of(TEXT_ENCODERS[2])]
        names = ("image_encoder", "feature_extractor", *without)
        return {"_class_name": "StableDiffusion3Pipeline", **dict.fromkeys(names, none)}
    if text.text_encoder_2 is None:
        beside = {"requires_safety_checker": False, "safety_checker": none, "feature_extractor": none}
        return {"_class_name": f"StableDiffusion{task}Pipeline", **beside}
    beside = {"add_watermarker": False, "force_zeros_for_empty_prompt": zeros_for_empty_negative}
    return {"_class_name": f"StableDiffusionXL{task}Pipeline", **beside}


def _write_network(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], dtype: torch.dtype
) -> None:
    write_network(folder / f"{stem}.safetensors", folder / "config.json", tensors, fields, dtype)


def write_network(
    path: Path, config: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Write the weights of a network to `path`, in `dtype`, and the fields of its configuration to `config`."""
    name = path.parent.name
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize < 2:
            raise ValueError(f"{name}: {key} is quantized, {tensor.dtype}: save the model loaded without fp8")
    converted = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    for key, tensor in converted.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: {key} is not finite in {dtype}: save with dtype=torch.float32")
    _write(path, lambda part: save_file(converted, part, metadata={"format": "pt"}))
    _write_json(config, fields)


def _clip_fields(encoder: PreTrainedModel) -> dict[str, Any]:
    """The config.json of a text encoder; its dtype is that in which diffusers opens the other networks by default."""
    fields = {name: getattr(encoder.config, name) for name in clip.CONFIG_FIELDS}
    return {"architectures": [type(encoder).__name__], "model_type": "clip_text_model", "dtype": "float32", **fields}


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder.name} is a {type(tokenizer).__name__}: pass a CLIPTokenizer, which can be saved")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    beside = sorted({*tokenizer.get_vocab()} - {*model["vocab"]})
    if beside:
        raise ValueError(
            f"{folder.name} has tokens beside its vocabulary, {beside}: CLIP's file format cannot hold them"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {name: str(getattr(tokenizer, name)) for name in SPECIAL_TOKENS}
    fields = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.model_max_length, **special}
    _write_json(folder / "vocab.json", model["vocab"])
    _write(folder / "merges.txt", lambda part: part.write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8"))
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", fields)


def _write_t5_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    content = json.loads(cast("T5Tokenizer", tokenizer).backend_tokenizer.to_str())
    extra = sum(piece.startswith(t5.EXTRA) for piece, _ in content["model"]["vocab"])
    fields = {"tokenizer_class": "T5Tokenizer", "model_max_length": tokenizer.model_max_length, "extra_ids": extra}
    _write_json(folder / "tokenizer.json", content)
    _write_json(folder / "special_tokens_map.json", t5.SPECIAL)
    _write_json(folder / "tokenizer_config.json", {**fields, **t5.SPECIAL})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    _write(path, lambda part: part.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and then move it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.chmod(0o644)  # safetensors makes files that only their owner can read
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
