"""The VAE's decoder on a CPU, whole and in bands, against diffusers' whole and in tiles: `python tests/bench_vae.py`.

Random float32 weights of SDXL's VAE decode the same latents by turns, each time in a process of its own. The script
prints medians of the seconds that pass and of those that the processors work, the peak memory of the process with its
weights, and the largest distance of the image from that in bands, cutdiff's default, in standard deviations of the
image. diffusers' tiles have 512 pixels a side.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cutdiff.bench.baselines import published_vae
from cutdiff.checkpoint.random_model import randomise
from cutdiff.models.config import SDXL_VAE
from cutdiff.models.vae import VAE

WAYS = ("cutdiff in bands", "cutdiff", "diffusers", "diffusers in tiles")


def make_decode(way: str) -> Callable[[Tensor], Tensor]:
    vae = VAE(SDXL_VAE).requires_grad_(False)
    randomise(vae, seed=0)
    if way.startswith("cutdiff"):
        return lambda latents: vae.decode(latents, banded=way.endswith("bands"))
    with torch.device("meta"):
        theirs = published_vae(SDXL_VAE)
    theirs.load_state_dict(vae.state_dict(), assign=True)
    theirs.use_tiling, theirs.tile_sample_min_size, theirs.tile_latent_min_size = way.endswith("tiles"), 512, 64
    return lambda latents: theirs.decode(latents / SDXL_VAE.scaling_factor).sample


@torch.no_grad()
def decode_once(way: str, size: int, out: Path) -> None:
    """Save the image, and print seconds and peak memory as JSON."""
    decode = make_decode(way)
    latents = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(1))
    began, worked = time.perf_counter(), time.process_time()
    image = decode(latents)
    took = {"seconds": time.perf_counter() - began, "work": time.process_time() - worked}
    print(json.dumps(took | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
    torch.save(image, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the decoding of SDXL's VAE on a CPU.")
    parser.add_argument("--size", type=int, default=768, metavar="PIXELS")
    parser.add_argument("--repeats", type=int, default=1, metavar="N")
    parser.add_argument("--way", choices=WAYS, help="decode once and print what it took")
    parser.add_argument("--out", type=Path, help="where the image of --way goes")
    args = parser.parse_args()
    if args.way:
        return decode_once(args.way, args.size, args.out)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    images: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "image.pt"
        for way in WAYS * args.repeats:
            command = [sys.executable, __file__, "--size", str(args.size), "--way", way, "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            images[way] = torch.load(out)
    bands = images["cutdiff in bands"]
    print(f"{args.size}², float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for way, runs in found.items():
        seconds, work = (statistics.median(run[key] for run in runs) for key in ("seconds", "work"))
        peak = max(run["peak"] for run in runs) / 1e9
        difference = ((images[way] - bands).abs().max() / bands.std()).item()
        print(f"{way}: {seconds:.1f} s, {work:.1f} s of work, peak {peak:.2f} GB, differs by {difference:.1e}")


if __name__ == "__main__":
    main()
