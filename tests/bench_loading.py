"""The time to load a checkpoint of SDXL's size, against diffusers: `python tests/bench_loading.py FOLDER`.

The script writes random float16 weights of SDXL's sizes (6.9 GB) into FOLDER in the diffusers layout where there are
none, and ends. Started again, it loads them by turns with cutdiff and with diffusers, each time in a process of its own
with the files in the page cache, and prints medians of the seconds from path to model, the peak memory, and the time
that reading takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tiny import tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cutdiff.checkpoint import save_folder
from cutdiff.models.config import SDXL_UNET, SDXL_VAE
from cutdiff.models.text import TextEncoders
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.sampling.noise import NoiseConfig

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
LOADERS = ("cutdiff", "diffusers")


def write(folder: Path) -> None:
    """Write SDXL-base with random weights."""
    special = {"bos_token_id": 56, "eos_token_id": 57}
    with torch.device("meta"):
        unet, vae = UNet(SDXL_UNET), VAE(SDXL_VAE)
        first = CLIPTextModel(CLIPTextConfig(**CLIP_L, **special, pad_token_id=57, hidden_act="quick_gelu"))
        config = CLIPTextConfig(**CLIP_G, **special, pad_token_id=0, hidden_act="gelu", projection_dim=1280)
        second = CLIPTextModelWithProjection(config)
    for network in (unet, vae, first, second):
        network.half().to_empty(device="cpu")
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    text = TextEncoders(tiny_tokenizer("<|endoftext|>"), tiny_tokenizer("!"), first, second)
    save_folder(folder, unet=unet, vae=vae, text=text, noise=NoiseConfig(), zeros_for_empty_negative=True)


def load(loader: str, folder: Path) -> None:
    """Load once, and print seconds and peak memory as JSON."""
    if loader == "cutdiff":
        import cutdiff

        began = time.perf_counter()
        cutdiff.load(folder, dtype=torch.float16)
    else:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

        began = time.perf_counter()
        StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float16, local_files_only=True)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def read(folder: Path) -> tuple[float, int]:
    """Read all weight files; returns the seconds that it took and their bytes."""
    began, total = time.perf_counter(), 0
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                total += len(block)
    return time.perf_counter() - began, total


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the loading of an SDXL-sized checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--loader", choices=LOADERS, help="load once and print what it took")
    args = parser.parse_args()
    if args.loader:
        return load(args.loader, args.folder)
    if not (args.folder / "model_index.json").exists():
        write(args.folder)
        return print(f"wrote {args.folder}: run again to load it, in a process that has not held it")
    read(args.folder)  # into the page cache
    found: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
    for _ in range(args.repeats):
        for loader in LOADERS:
            command = [sys.executable, __file__, str(args.folder), "--loader", loader]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[loader].append(json.loads(done.stdout.splitlines()[-1]))
    seconds, size = read(args.folder)
    print(f"reading {size / 1e9:.2f} GB from the page cache: {seconds:.2f} s")
    medians = {loader: statistics.median(run["seconds"] for run in runs) for loader, runs in found.items()}
    for loader, runs in found.items():
        peak = max(run["peak"] for run in runs)
        print(f"{loader}: {medians[loader]:.2f} s, peak {peak / 1e9:.2f} GB, {peak / size:.2f} of the files")
    print(f"cutdiff / diffusers: {medians['cutdiff'] / medians['diffusers']:.2f}")


if __name__ == "__main__":
    main()
