"""The speed of the networks on a CPU against diffusers' with the same weights, and of the commands' start and demo:
`python tests/bench_networks.py`.

Networks run by turns in one process, in float32. Our U-Net has kept the text's keys and values, as in a run after its
first step. Ratios are medians over the rounds, each of one pair, with the least and the most.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import cutdiff
from cutdiff.bench.baselines import with_weights_of
from cutdiff.checkpoint.random_model import TOKENS, randomise
from cutdiff.models.config import SDXL_VAE, UNetConfig
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE

PROPORTIONED = UNetConfig(
    channels=(96, 192, 384),
    num_heads=(2, 3, 6),
    context_dim=512,
    pooled_dim=320,
    size_embedding_dim=64,
    transformer_layers=(0, 2, 6),
    mid_transformer_layers=6,
)
"""SDXL's proportions, with 153 million weights."""
COMMANDS = {
    "import cutdiff": ["-c", "import cutdiff"],
    "sample --help": ["-m", "cutdiff.sample", "--help"],
    "sample, the demo": ["-m", "cutdiff.sample"],
}


@dataclass(frozen=True)
class Pair:
    """The same computation by our network and by theirs."""

    name: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]


def unet_pair(name: str, unet: UNet, rows: int, side: int) -> Pair:
    config, theirs = unet.config, with_weights_of(unet, torch.float32)
    rng = torch.Generator().manual_seed(0)
    x, context = (
        torch.randn(*shape, generator=rng) for shape in ((rows, 4, side, side), (rows, TOKENS, config.context_dim))
    )
    pooled, ids = torch.randn(rows, config.pooled_dim, generator=rng), torch.full((rows, 6), 128.0)
    timesteps, kept = torch.full((rows,), 500.0), unet.read(context)
    conditions = {"text_embeds": pooled, "time_ids": ids}
    return Pair(
        f"{name} U-Net, {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M, {rows}×{side}²",
        lambda: unet(x, timesteps, kept, pooled, ids),
        lambda: theirs(x, timesteps, context, added_cond_kwargs=conditions, return_dict=False)[0],
    )


def vae_pair(name: str, vae: VAE, side: int) -> Pair:
    theirs, scale = with_weights_of(vae, torch.float32), vae.config.scaling_factor
    latents = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    return Pair(
        f"{name} VAE, decode {side}²",
        lambda: vae.decode(latents),
        lambda: theirs.decode(latents / scale, return_dict=False)[0],
    )


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time networks and commands on a CPU.")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"float32, {args.threads} thread(s), torch {torch.__version__}, medians of {args.rounds} rounds")
    model = cutdiff.load()
    proportioned, sdxl = UNet(PROPORTIONED).eval().requires_grad_(False), VAE(SDXL_VAE).requires_grad_(False)
    randomise(proportioned, 0)
    randomise(sdxl, 0)
    pairs = [
        unet_pair("embedded", model.unet, 8, model.native_size),
        unet_pair("embedded", model.unet, 18, model.native_size),
        unet_pair("SDXL-proportioned", proportioned, 2, 32),
        *(vae_pair("embedded", model.vae, side) for side in (128, 256, 512)),
        vae_pair("SDXL's", sdxl, 256),
    ]
    for pair in pairs:
        ours, theirs = pair.ours(), pair.theirs()  # which also warms both
        difference = ((ours - theirs).norm() / theirs.norm()).item()
        times = [(seconds(pair.ours), seconds(pair.theirs)) for _ in range(args.rounds)]
        ratios = sorted(a / b for a, b in times)
        own = statistics.median(a for a, _ in times)
        spread = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} – {ratios[-1]:.2f}]"
        print(f"{pair.name}: {own * 1e3:.0f} ms, {spread} of diffusers' time, differs by {difference:.0e}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in COMMANDS.items():
            command = [sys.executable, *arguments, *(["--out", folder, "--overwrite"] if "demo" in name else [])]
            took = [
                seconds(lambda c=command: subprocess.run(c, env=environment, capture_output=True, check=True))
                for _ in range(2 if "demo" in name else 5)
            ]
            print(f"{name}: {statistics.median(took):.2f} s")


if __name__ == "__main__":
    main()
