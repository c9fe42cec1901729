"""Reading a diffusers folder: a sub-folder for each part, with its config.json and its weights in safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from cutdiff.checkpoint import t5
from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import Blueprint, Networks, check_noise
from cutdiff.checkpoint.configs import unet_config, vae_config
from cutdiff.checkpoint.fields import boolean
from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.keys import modern_vae
from cutdiff.checkpoint.kinds import FLUX, KINDS, SD3, TEXT_ENCODERS, UNET, Kind, t5_length
from cutdiff.checkpoint.read import find_weights, read_json, variants
from cutdiff.checkpoint.schedulers import noise_config
from cutdiff.checkpoint.single import Parts
from cutdiff.checkpoint.tokenizer import read_tokenizer
from cutdiff.checkpoint.transformer_configs import FLUX_TOOLS
from cutdiff.checkpoint.weights import read_weights
from cutdiff.models.config import FLUX_VAE, SD3_VAE, SD_VAE, SDXL_VAE, UNetConfig, VAEConfig
from cutdiff.sampling.edm import AnyNoise
from cutdiff.sampling.flow import FlowConfig
from cutdiff.settings import check_preferred

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """The networks in the folder of a pipeline, and a VAE of its family."""

    kind: Kind
    clips: int
    """The number of CLIP's encoders."""
    vae: VAEConfig
    text_layer: int = 1
    t5: bool = False
    spacing: str = FlowConfig.timestep_spacing
    """The rule by which the pipeline picks times of flow matching."""


SDXL = Layout(UNET, 2, SDXL_VAE, text_layer=2)
SD = Layout(UNET, 1, SD_VAE)
FLUX_1 = Layout(FLUX, 1, FLUX_VAE, t5=True)
SD_3 = Layout(SD3, 2, SD3_VAE, text_layer=2, t5=True, spacing="linspace")
PIPELINES = {
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusionXLImg2ImgPipeline": SDXL,
    "StableDiffusionXLInpaintPipeline": SDXL,
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "LatentConsistencyModelPipeline": SD,
    "LatentConsistencyModelImg2ImgPipeline": SD,
    "FluxPipeline": FLUX_1,
    "FluxImg2ImgPipeline": FLUX_1,
    "FluxInpaintPipeline": FLUX_1,
    "StableDiffusion3Pipeline": SD_3,
    "StableDiffusion3Img2ImgPipeline": SD_3,
    "StableDiffusion3InpaintPipeline": SD_3,
}
"""The pipelines whose folders are read, and what these have. One model may be saved by any of its family."""
SHOWN_PICTURES = ("FluxFillPipeline", "FluxControlPipeline", "FluxKontextPipeline")
PREFERRED = "sampling.json"
"""The file, which diffusers does not read, that says the preferred options of a run."""
OLD_SCHEDULER = {"steps_offset": 1, "clip_sample": False}
OLD_SIZE = 64
"""The least native size, in latents, in a configuration that was written before release 0.9. Like OLD_SCHEDULER it
repairs mistakes in early folders of SD 1, as diffusers' StableDiffusionPipeline does."""
STEMS: dict[str, str] = dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model")
"""The names of weight files without their suffix; a network that is not listed has `model`."""


def read_blueprint(folder: Path, *, needs_vae: bool = True, needs_t5: bool = True) -> Blueprint:
    """Read configurations, tokenizers and schedule of a diffusers folder, but no weights.

    Unless it `needs_vae`, a folder may lack one, and the blueprint has that of the folder's family. Unless it
    `needs_t5`, that of SD3 has no T5 encoder.

    Raises ValueError where the folder is no text-to-image pipeline of a family that is read, a part is missing, or a
    configuration is not supported.
    """
    index_path = folder / "model_index.json"
    if not index_path.exists():
        raise ValueError(f"{folder} is no diffusers model: it has no model_index.json: pass a folder that has one")
    index = read_json(index_path)
    pipeline = str(index.get("_class_name"))
    if pipeline in SHOWN_PICTURES:
        raise ValueError(f"{folder} is a {pipeline}: {FLUX_TOOLS}")
    if pipeline not in PIPELINES:
        raise ValueError(f"{folder} is a {pipeline}: only {' and '.join(PIPELINES)} folders are read")
    layout = PIPELINES[pipeline]
    kind, is_sd = layout.kind, layout is SD
    has_t5 = layout.t5 and (layout is not SD_3 or (needs_t5 and index.get(TEXT_ENCODERS[2]) != [None, None]))
    if has_t5 and layout is SD_3 and not (folder / TEXT_ENCODERS[2]).exists():
        raise ValueError(f"{folder} has no {TEXT_ENCODERS[2]}: download it, or pass --text-encoder-3 none")
    if layout is FLUX_1 and index.get(TEXT_ENCODERS[1]) == [None, None]:
        raise ValueError(f"{folder} has no {TEXT_ENCODERS[1]}, which is T5 and which FLUX.1 needs: download it")
    if layout is SDXL and index.get("text_encoder") == [None, None]:
        raise ValueError(f"{folder} is an SDXL refiner, which only finishes pictures: pass the base model")
    if needs_vae and not (folder / "vae").exists():
        raise ValueError(f"{folder} has no vae: pass one as --vae")
    first, tokenizer = _read_text(folder, "text_encoder", "tokenizer")
    second, tokenizer_2 = _read_text(folder, "text_encoder_2", "tokenizer_2") if layout.clips > 1 else (None, None)
    unet = parse(folder / kind.folder / "config.json", _of_kind(kind, _repaired_unet if is_sd else kind.parse))
    read_noise = _for(kind, _repaired_noise if is_sd else noise_config)
    noise = parse(folder / "scheduler" / "scheduler_config.json", read_noise)
    return Blueprint(
        unet=unet,
        vae=_read_vae(folder / "vae", layout.vae, needed=needs_vae),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_layer=layout.text_layer,
        noise=replace(noise, timestep_spacing=layout.spacing) if isinstance(noise, FlowConfig) else noise,
        zeros_for_empty_negative=layout is SDXL and parse(index_path, _zeros_for_empty),
        t5=_read_t5(folder, TEXT_ENCODERS[layout.clips], t5_length(unet)) if has_t5 else None,
    )


def read_preferred(folder: Path) -> dict[str, Any]:
    """The options of a run that a folder prefers, in its `sampling.json`; none where it has no such file, as
    a single file has none.

    Raises ValueError where the file holds anything else.
    """
    path = folder / PREFERRED
    if not path.exists():
        return {}
    preferred = dict(read_json(path))
    try:
        check_preferred(preferred)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return preferred


def weight_files(folder: Path, names: Iterable[str], variant: str | None = None) -> dict[str, list[Path]]:
    """The weight files of each of the networks in `names`, of the variant where there is one.

    Raises ValueError where a network has none, or no network has the variant.
    """
    stems = {name: STEMS.get(name, "model") for name in names}
    if variant is not None:
        there = sorted({own for name, stem in stems.items() for own in variants(folder / name, stem)})
        if variant not in there:
            has = f"only {', '.join(there)}" if there else "only weights without one, so leave it out"
            raise ValueError(f"variant={quoted(variant)}: {folder} has no weights of that variant, {has}")
    return {name: find_weights(folder / name, stem, variant) for name, stem in stems.items()}


def read_folder(files: Mapping[str, list[Path]], dtype: torch.dtype) -> Parts:
    """Memory-mapped tensors of each network, under the keys of diffusers."""
    weights: Parts = {}
    for name, shards in files.items():
        tensors = {key: tensor for shard in shards for key, tensor in read_weights(shard, dtype)[0].items()}
        weights[name] = modern_vae(tensors) if name == "vae" else tensors
    return weights


def named_for(networks: Networks, weights: Parts) -> Parts:
    """The same tensors under the networks' own keys, which those of text encoders are not in all releases."""
    named = networks.named()
    return {
        name: text_named_for(named[name], tensors) if name in TEXT_ENCODERS else tensors
        for name, tensors in weights.items()
    }


def text_named_for(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a text encoder under its own keys."""
    return t5.with_both_names(tensors) if t5.TABLE in encoder.state_dict() else clip.named_for(encoder, tensors)


def _read_text(folder: Path, encoder: str, tokenizer: str) -> tuple[CLIPTextConfig, CLIPTokenizer]:
    config = parse(folder / encoder / "config.json", clip.clip_config)
    return config, read_tokenizer(folder / tokenizer, config.max_position_embeddings)


def _of_kind(kind: Kind, parser: Callable[[Mapping[str, Any]], T]) -> Callable[[Mapping[str, Any]], T]:
    """The parser, which refuses the configuration of a network of another kind."""

    def parsed(fields: Mapping[str, Any]) -> T:
        if (name := fields.get("_class_name")) in {other.class_name for other in KINDS.values()} - {kind.class_name}:
            raise ValueError(f"it is of {name} where {kind.class_name} belongs: take all parts from one model")
        return parser(fields)

    return parsed


def _for(kind: Kind, parser: Callable[[Mapping[str, Any]], AnyNoise]) -> Callable[[Mapping[str, Any]], AnyNoise]:
    """The parser, which refuses the scheduler of a network of another kind, and names it."""

    def parsed(fields: Mapping[str, Any]) -> AnyNoise:
        noise = parser(fields)
        try:
            check_noise(kind, noise)
        except ValueError as error:
            raise ValueError(f"{fields.get('_class_name')}: {error}") from None
        return noise

    return parsed


def tokenizer_of(encoder: str) -> str:
    """The sub-folder of the tokenizer of a text encoder, by that one's sub-folder."""
    return encoder.replace("text_encoder", "tokenizer")


def _read_t5(folder: Path, encoder: str, length: int) -> t5.T5Part:
    config = parse(folder / encoder / "config.json", t5.t5_config)
    tokenizer = t5.read_t5_tokenizer(folder / tokenizer_of(encoder), length)
    return t5.T5Part(config, tokenizer, min(length, tokenizer.model_max_length))


def _read_vae(folder: Path, family: VAEConfig, *, needed: bool) -> VAEConfig:
    return parse(folder / "config.json", vae_config) if needed or (folder / "config.json").exists() else family


def _zeros_for_empty(index: Mapping[str, Any]) -> bool:
    return boolean({"force_zeros_for_empty_prompt": True, **index}, "force_zeros_for_empty_prompt")


def _repaired_unet(fields: Mapping[str, Any]) -> UNetConfig:
    config = unet_config(fields)
    release = str(fields.get("_diffusers_version", "")).split(".")[:2]
    is_old = release[0] == "0" and release[-1].isdecimal() and int(release[-1]) < 9
    return replace(config, native_size=OLD_SIZE) if is_old and config.native_size < OLD_SIZE else config


def _repaired_noise(fields: Mapping[str, Any]) -> AnyNoise:
    return noise_config({**fields, **OLD_SCHEDULER})


def parse(path: Path, parser: Callable[[Mapping[str, Any]], T]) -> T:
    """Parse a configuration file; the name of the file heads the parser's ValueError."""
    fields = read_json(path)
    try:
        return parser(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
