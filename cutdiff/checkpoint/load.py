"""`load`: a path, a hub id or nothing at all to a model that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from cutdiff.checkpoint import folder, single
from cutdiff.checkpoint.build import build_model, empty_networks
from cutdiff.checkpoint.families import family_of
from cutdiff.checkpoint.infer import infer_blueprint
from cutdiff.checkpoint.locate import locate
from cutdiff.checkpoint.noise import NoiseOptions, decide_noise
from cutdiff.checkpoint.read import read_metadata, read_tensors, sha256
from cutdiff.model import Model


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
) -> Model:
    """Read a model of the families SDXL, SD 1.5 and SD 2.1.

    path: a diffusers folder, a .safetensors file in the original layout, or the id of a model in the local Hugging Face
        cache (nothing is downloaded); by default the embedded model, which is also found as "weights/scenes" from every
        working directory.
    dtype: of the U-Net and the text encoders. The VAE runs in float32 where this is float16 and it would overflow.
    config: a diffusers folder from which a single file takes its configurations, schedule and tokenizers. Without it
        sizes are inferred from the file, the rest is its family's, and tokenizers come from the local Hugging Face
        cache.
    prediction_type: "epsilon" or "v_prediction"; None: as the file's marker keys, its metadata or its scheduler say,
        else epsilon.
    zero_terminal_snr: whether the noise that the model was trained with ends at zero SNR; None: likewise, else not.

    Weights stay memory-mapped where they need not be converted. Raises FileNotFoundError where there is nothing at
    `path`; ValueError where it is no such model, is incomplete, does not fit its configuration, or needs what is not
    built here.
    """
    if not dtype.is_floating_point:
        raise ValueError(
            f"dtype={dtype} is no floating-point type: pass torch.float32, torch.bfloat16 or torch.float16"
        )
    source, device = locate(path), torch.device(device)
    options = NoiseOptions(prediction_type, zero_terminal_snr)
    if source.is_dir():
        if config is not None:
            raise ValueError(
                f"config={str(config)!r} is for single files, and {source} is a folder with its own: omit it"
            )
        blueprint = folder.read_blueprint(source)
        noise, decided_by = decide_noise(options, blueprint.noise)
        networks = empty_networks(blueprint)
        files = folder.weight_files(source, networks)
        weights = folder.read_weights(files, networks)
        hashes = {str(file.relative_to(source)): sha256(file) for shards in files.values() for file in shards}
    else:
        configured = folder.read_blueprint(locate(config)) if config is not None else None
        tensors, metadata = read_tensors(source), read_metadata(source)
        with _named(source):
            family = family_of(tensors)
            parts = single.split(tensors, family)
            scheduler = configured.noise if configured else None
            noise, decided_by = decide_noise(options, scheduler, keys=tensors, metadata=metadata)
            blueprint = configured or infer_blueprint(parts, family, noise)
        networks = empty_networks(blueprint)
        weights = single.convert(parts, networks)
        hashes = {source.name: sha256(source)}
    return build_model(
        replace(blueprint, noise=noise),
        networks,
        weights,
        device=device,
        dtype=dtype,
        source=str(source),
        hashes=hashes,
        decided_by=decided_by,
    )


@contextmanager
def _named(source: Path) -> Iterator[None]:
    """Head an error with the file that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
