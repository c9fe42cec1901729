"""`load`: a path, a hub id or nothing at all to a model that runs."""

from __future__ import annotations

from pathlib import Path

import torch

from cutdiff.checkpoint import folder, single
from cutdiff.checkpoint.build import build_model, empty_networks
from cutdiff.checkpoint.locate import locate
from cutdiff.checkpoint.read import read_tensors, sha256
from cutdiff.model import Model


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: str | Path | None = None,
) -> Model:
    """Read a model of the SDXL family.

    path: a diffusers folder, an SDXL .safetensors file in the original layout, or the id of a model in the local
        Hugging Face cache (nothing is downloaded); by default the embedded model, which is also found as
        "weights/scenes" from every working directory.
    dtype: of the U-Net and the text encoders. The VAE runs in float32 where this is float16 and it would overflow.
    config: a diffusers folder from which a single file takes its configurations, schedule and tokenizers. Without it
        sizes are inferred from the file, the rest is SDXL's, and tokenizers come from the local Hugging Face cache.

    Weights stay memory-mapped where they need not be converted. Raises FileNotFoundError where there is nothing at
    `path`; ValueError where it is no such model, is incomplete, does not fit its configuration, or needs what is not
    built here.
    """
    if not dtype.is_floating_point:
        raise ValueError(
            f"dtype={dtype} is no floating-point type: pass torch.float32, torch.bfloat16 or torch.float16"
        )
    source, device = locate(path), torch.device(device)
    if source.is_dir():
        if config is not None:
            raise ValueError(
                f"config={str(config)!r} is for single files, and {source} is a folder with its own: omit it"
            )
        blueprint = folder.read_blueprint(source)
        networks = empty_networks(blueprint)
        files = folder.weight_files(source)
        weights = folder.read_weights(files, networks)
        hashes = {str(file.relative_to(source)): sha256(file) for shards in files.values() for file in shards}
    else:
        parts = single.split(read_tensors(source), name=str(source), has_config=config is not None)
        blueprint = single.infer_blueprint(parts) if config is None else folder.read_blueprint(locate(config))
        networks = empty_networks(blueprint)
        weights = single.convert(parts, networks)
        hashes = {source.name: sha256(source)}
    return build_model(blueprint, networks, weights, device=device, dtype=dtype, source=str(source), hashes=hashes)
