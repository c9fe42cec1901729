"""`load`: from a path, a hub id or nothing at all to a model that runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from cutdiff.checkpoint import edm, folder, lora, single, transformers
from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import Blueprint, Networks, build_model, check_inputs, empty_networks, model_of, outlined
from cutdiff.checkpoint.embeddings import EmbeddingError, add_embeddings, read_inversion
from cutdiff.checkpoint.families import Family, family_of
from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.infer import infer_blueprint, infer_vae, unet_channels
from cutdiff.checkpoint.keys import unet_keys
from cutdiff.checkpoint.kinds import TEXT_ENCODERS, Kind, kind_of, published_preferences
from cutdiff.checkpoint.locate import locate, name_of
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.noise import DEFAULT, NoiseOptions, decide_noise
from cutdiff.checkpoint.read import check_end
from cutdiff.checkpoint.vae import OtherVAE, read_vae
from cutdiff.checkpoint.weights import read_weights
from cutdiff.models.config import UNetConfig
from cutdiff.models.fp8 import check_fp8, quantize_transformers
from cutdiff.models.joint_text import SD3Text
from cutdiff.models.machine import keep_freed_memory
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.options import checked
from cutdiff.sampling.edm import AnyNoise


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which would take 0.2 s (with torch and transformers imported) and find nothing:
    a load makes thousands of objects, all of which stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that a model may have."""


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r} is no device that torch has here: pass 'cpu' or 'cuda'") from None


@_collector_paused()
def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
    timestep_spacing: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[tuple[str, str | Path]] = (),
    check_weights: bool = False,
    fp8: bool = False,
    text_encoder_3: str | None = None,
) -> Model:
    """Read a model of the families SDXL, SD 1.5, SD 2.1, FLUX.1 and SD3.

    path: a diffusers folder, a .safetensors file in the original layout, or the id of a model in the local Hugging Face
        cache (nothing is downloaded); by default the embedded model, which has the name "weights/scenes" in every
        working directory too.
    dtype: the dtype of all weights, one of DTYPES. A VAE that overflows in float16 decodes in float32 all the same.
    config: a diffusers folder from which a single file takes its configurations, schedule and tokenizers. Without it
        sizes are inferred from the file, the rest is its family's, and tokenizers come from the local Hugging Face
        cache. A file of a U-Net alone, in either layout, takes the other networks from that folder too.
    variant: the variant of a folder's weights, such as "bf16" or "non_ema", which networks without it have not. None:
        weights without a variant, or fp16 where there are no others.
    vae: a folder or file whose VAE takes the place of the model's own, which a single file may then lack.
    prediction_type: "epsilon" or "v_prediction"; None: as the file's marker keys, its metadata or its scheduler say,
        else epsilon.
    zero_terminal_snr: True if the model was trained with noise that ends at zero SNR; None: as the file's marker keys
        or its scheduler say, else False.
    timestep_spacing: the rule by which a run picks its timesteps, "leading", "trailing" or "linspace"; None: as the
        scheduler says. Few-step models (Lightning, Turbo) are made for "trailing", which a single file does not say.
        For an EDM model this option and the one before are errors.
    loras: LoRA files (LoRA, LoCon, LoHa, LoKr) that are merged into the weights, each times its scale. Prompts know the
        tokens of textual inversions that they bundle.
    embeddings: tokens and the files of textual inversion whose vectors they stand for in prompts.
    check_weights: read all weights now and raise ValueError where one is NaN or infinite, or where a file ends in
        matrices of zeros, as after a broken download. Without this, a run that meets a value that is not finite names
        the weights.
    fp8: multiply the linear layers of the U-Net's transformers in 8 bits, after LoRAs were merged; ValueError where
        `dtype` is not bfloat16 or the device cannot. `models.fp8.quantize_transformers` does the same to a loaded
        model on any device; on a CPU that is slower, and only for measuring.

    text_encoder_3: "none" leaves out SD3's T5 encoder, which is the largest of its networks but one; the states of CLIP
        alone are then read, as SD3 was trained for too. None: as the model has it.

    Weights that need no conversion stay memory-mapped. Raises FileNotFoundError where `path` or another path does not
    exist; ValueError where it is no such model, is incomplete, does not fit its configuration, or needs what is not
    built here; and LoraError or EmbeddingError, ValueErrors, where a LoRA or an embedding does not fit it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be {', '.join(map(str, DTYPES))}")
    checked("path", path, str | Path | None)
    checked("loras", loras, list[tuple[str | Path, float]] | tuple[tuple[str | Path, float], ...])
    checked("zero_terminal_snr", zero_terminal_snr, bool | None)
    for name, value in {"check_weights": check_weights, "fp8": fp8}.items():
        checked(name, value, bool)
    checked("text_encoder_3", text_encoder_3, Literal["none"] | None)
    source, device = locate(path), _device(device)
    if fp8:
        check_fp8(device, dtype)
    options, needs_t5 = NoiseOptions(prediction_type, zero_terminal_snr, timestep_spacing), text_encoder_3 is None
    preferred = folder.read_preferred(source if config is None or source.is_dir() else locate(config, "config"))
    vae = None if vae is None else locate(vae, "vae")
    if source.is_dir():
        if config is not None:
            raise ValueError(
                f"config={str(config)!r} is for single files, and {source} is a folder with its own: omit it"
            )
        parts = _read_folder(source, vae, options, dtype, variant, needs_t5=needs_t5)
    else:
        if variant is not None:
            raise ValueError(f"variant={quoted(variant)} is for folders, and {source} is a single file: omit it")
        folder_of_config = None if config is None else locate(config, "config")
        parts = _read_single(source, vae, options, folder_of_config, dtype, needs_t5=needs_t5)
    if not needs_t5 and not issubclass(kind_of(parts.blueprint.unet).text, SD3Text):
        raise ValueError("text_encoder_3=none is for models of SD3, which can do without T5: leave it out")
    options.check_fit(parts.blueprint.noise)
    if check_weights:
        for file in parts.files.values():
            check_end(file)
    weights, merged, bundled = lora.merge(parts.weights, parts.networks, loras, dtype=dtype)
    model = build_model(
        parts.blueprint,
        parts.networks,
        weights,
        device=device,
        dtype=dtype,
        source=str(source),
        files=parts.files,
        decided_by=parts.decided_by,
        loras=merged,
        sources=parts.sources,
    )
    try:
        model = add_embeddings(model, bundled)
    except EmbeddingError as error:
        raise lora.LoraError(str(error)) from None
    model = add_embeddings(model, [read_inversion(token, Path(file)) for token, file in embeddings])
    if check_weights and (bad := model.bad_weights()):
        raise ValueError(f"{source}: {bad}")
    if fp8:
        quantize_transformers(model.unet)
    if device.type == "cpu":
        keep_freed_memory()
    return replace(model, preferred=preferred or published_preferences(model.unet.config, model.noise))


def load_outline(path: str | Path | None, *, dtype: torch.dtype, config: str | Path | None = None) -> Model:
    """A model without its weights, on the meta device: its sizes and its noise. Arguments and errors are `load`'s."""
    source = locate(path)
    if source.is_dir():
        blueprint = folder.read_blueprint(source)
        noise, decided_by = decide_noise(NoiseOptions(), blueprint.noise)
        blueprint = replace(blueprint, noise=noise)
        parts = _Parts(blueprint, empty_networks(blueprint, {}), {}, {}, decided_by)
    else:
        parts = _read_single(source, None, NoiseOptions(), None if config is None else locate(config, "config"), dtype)
    networks = parts.networks
    for network in networks.named().values():
        network.to(dtype).eval().requires_grad_(False)
    preferred = folder.read_preferred(source if config is None or source.is_dir() else locate(config, "config"))
    preferred = preferred or published_preferences(parts.blueprint.unet, parts.blueprint.noise)
    origin = {"files": parts.files, "decided_by": parts.decided_by, "preferred": preferred}
    return model_of(parts.blueprint, networks, source=str(source), **origin)


@dataclass(frozen=True)
class _Parts:
    """The parts of a model that were read: empty networks, and the weights that they will have."""

    blueprint: Blueprint
    networks: Networks
    weights: dict[str, dict[str, Tensor]]
    files: dict[str, Path]
    decided_by: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)
    """The file or folder of each network that does not come from the model's own."""


def _read_folder(
    source: Path,
    vae: Path | None,
    options: NoiseOptions,
    dtype: torch.dtype,
    variant: str | None = None,
    *,
    needs_t5: bool = True,
) -> _Parts:
    blueprint = folder.read_blueprint(source, needs_vae=vae is None, needs_t5=needs_t5)
    noise, decided_by = decide_noise(options, blueprint.noise)
    other = None if vae is None else read_vae(vae, blueprint.vae, dtype=dtype, variant=variant)
    blueprint = replace(blueprint, noise=noise)
    if other is not None:
        with _named(vae):
            blueprint = replace(blueprint, vae=other.config)
    shards = folder.weight_files(source, [name for name in blueprint.names if name != "vae" or other is None], variant)
    weights = folder.read_folder(shards, dtype)
    files = {str(file.relative_to(source)): file for some in shards.values() for file in some}
    if other is not None:
        weights["vae"] = other.tensors
        files |= _named_files(vae, other)
    with _named(source):
        networks = empty_networks(blueprint, weights)
    weights = folder.named_for(networks, weights)
    return _Parts(blueprint, networks, weights, files, decided_by, {} if vae is None else {"vae": str(vae)})


def _read_unet(
    unet: dict[str, Tensor], noise: tuple[AnyNoise, dict[str, str]], parts: _Parts, source: Path, config: Path
) -> _Parts:
    """The `parts` of a folder with another U-Net and its noise; `source` is the file of the U-Net."""
    blueprint = _reading_as(replace(parts.blueprint, noise=noise[0]), unet)
    networks = parts.networks
    if blueprint.unet != parts.blueprint.unet:
        with outlined("unet", unet):
            networks = replace(networks, unet=UNet(cast(UNetConfig, blueprint.unet)))
    keys = unet_keys(cast(UNet, networks.unet))
    weights = {**parts.weights, "unet": {keys.get(key, key): tensor for key, tensor in unet.items()}}
    files = {name: path for name, path in parts.files.items() if not name.startswith("unet/")}
    sources = {name: str(config) for name in weights if name != "unet"} | parts.sources
    return replace(
        parts,
        blueprint=blueprint,
        networks=networks,
        weights=weights,
        files={source.name: source, **files},
        decided_by=noise[1],
        sources=sources,
    )


def _read_single(
    source: Path,
    vae: Path | None,
    options: NoiseOptions,
    config: Path | None,
    dtype: torch.dtype,
    *,
    needs_t5: bool = True,
) -> _Parts:
    tensors, metadata = read_weights(source, dtype)
    with _named(source):
        tensors = single.with_averages(tensors)
        if transformer := transformers.kind_in(tensors):
            return _read_transformer(tensors, *transformer, source, vae, options, config, dtype, needs_t5=needs_t5)
        if unet := single.lone_unet(tensors):
            if config is None:
                raise ValueError("a U-Net alone: pass --config FOLDER, whose other networks it then has")
            check_inputs(*unet_channels(unet))
            parts = _read_folder(config, vae, options, dtype)
            noise = decide_noise(options, parts.blueprint.noise, tensors=tensors, metadata=metadata)
            return _read_unet(unet, noise, parts, source, config)
        family = family_of(tensors, needs_vae=vae is None)
        parts = single.split(tensors, family)
        check_inputs(*unet_channels(parts["unet"]))
    configured = None if config is None else folder.read_blueprint(config, needs_vae=False)
    with _named(source):
        scheduler = configured.noise if configured else None
        noise, decided_by = decide_noise(options, scheduler, tensors=tensors, metadata=metadata)
        if decided_by["prediction_type"] == DEFAULT and family.is_ambiguous:
            decided_by["prediction_type"] = (
                f"{DEFAULT}, {family.name} has both kinds: if the picture is noise, say the other"
            )
        like = edm.marked_latents(tensors, configured.vae if configured else family.vae)
    other = None if vae is None else read_vae(vae, like, dtype=dtype)
    with _named(source):
        if configured is None:
            blueprint = infer_blueprint(parts, replace(family, vae=like), noise, other.config if other else None)
        else:
            _check_family(configured, family, config)
            configured = _reading_as(configured, parts["unet"])
            blueprint = replace(configured, noise=noise, vae=other.config if other else like)
            if len(family.texts) == 1:
                depth = blueprint.text_encoder.num_hidden_layers
                parts["text_encoder"] = clip.cut_to_depth(parts["text_encoder"], depth)
    with _named(source):
        networks = empty_networks(blueprint, parts if other is None else {**parts, "vae": other.tensors})
    weights = single.convert(parts, networks)
    files = {source.name: source}
    if other is not None:
        weights["vae"] = other.tensors
        files |= _named_files(vae, other)
    return _Parts(blueprint, networks, weights, files, decided_by, {} if vae is None else {"vae": str(vae)})


def _read_transformer(
    tensors: dict[str, Tensor],
    kind: Kind,
    prefix: str,
    source: Path,
    vae: Path | None,
    options: NoiseOptions,
    config: Path | None,
    dtype: torch.dtype,
    *,
    needs_t5: bool,
) -> _Parts:
    """A file's networks, and for those that it lacks the ones of the folder `config`."""
    weights = transformers.split(tensors, kind, prefix)
    if config is None:
        missing = [name for name in (*TEXT_ENCODERS[: kind.encoders], "vae") if name not in weights]
        lacking = f" and the networks that it lacks, {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"{kind.family} without tokenizers, which no file holds: pass --config FOLDER, a diffusers folder of its "
            f"model, for these, its scheduler{lacking}"
        )
    blueprint = folder.read_blueprint(config, needs_vae=vae is None and "vae" not in weights, needs_t5=needs_t5)
    if kind_of(blueprint.unet) is not kind:
        raise ValueError(f"its {kind.class_name} does not fit the folder {config}: pass one of its own family")
    if blueprint.t5 is None:
        weights.pop(TEXT_ENCODERS[kind.encoders - 1], None)
    unet = transformers.infer(weights[kind.folder], blueprint.unet)
    if unet.guidance_dim != blueprint.unet.guidance_dim:
        reads = "reads the guidance scale" if unet.guidance_dim else "reads no guidance scale"
        raise ValueError(f"its transformer {reads}, unlike that of {config}: pass the folder of its own model")
    other = None if vae is None else read_vae(vae, blueprint.vae, dtype=dtype)
    noise, decided_by = decide_noise(options, blueprint.noise)
    own_vae = infer_vae(weights["vae"], blueprint.vae) if "vae" in weights else blueprint.vae
    blueprint = replace(blueprint, unet=unet, noise=noise, vae=other.config if other else own_vae)
    if other is not None:
        weights["vae"] = other.tensors
    elif "vae" in weights:
        with outlined("vae", weights["vae"]):
            weights["vae"] = single.convert_vae(weights["vae"], VAE(blueprint.vae))
    shards = folder.weight_files(config, [name for name in blueprint.names if name not in weights])
    files = {str(file.relative_to(config)): file for some in shards.values() for file in some}
    weights = {**weights, **folder.read_folder(shards, dtype)}
    networks = empty_networks(blueprint, weights)
    return _Parts(
        blueprint,
        networks,
        folder.named_for(networks, weights),
        {source.name: source, **files} | ({} if other is None else _named_files(vae, other)),
        decided_by,
        dict.fromkeys(shards, str(config)) | ({} if vae is None else {"vae": str(vae)}),
    )


def _reading_as(blueprint: Blueprint, unet: Mapping[str, Tensor]) -> Blueprint:
    """The blueprint of a folder for a U-Net from elsewhere, which alone says if it reads a mask: an inpainting model's
    folder serves for the model that it was made from, and that one's for the inpainting model."""
    return replace(blueprint, unet=replace(cast(UNetConfig, blueprint.unet), in_channels=unet_channels(unet)[0]))


def _named_files(vae: Path | None, other: OtherVAE) -> dict[str, Path]:
    """The files of another VAE by their names in records, such as "vae=name of a folder/name of the file"."""
    assert vae is not None
    return {f"vae={Path(name_of(vae)) / file.relative_to(vae)}": file for file in other.files}


def _check_family(configured: Blueprint, family: Family, config: Path | None) -> None:
    """Raise ValueError unless a single file and the folder with its configuration are of one family."""
    if (configured.text_encoder_2 is not None) != (len(family.texts) == 2):
        raise ValueError(f"an {family.name} model, and {config} is a folder of another family: pass one of its own")


@contextmanager
def _named(source: Path | None) -> Iterator[None]:
    """Put the name of the file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
