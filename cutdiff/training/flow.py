"""Train the embedded rectified-flow transformer: `python -m cutdiff.training.flow`.

It has FLUX.1's architecture, the VAE of a model that is trained already, and text encoders of its own, which are
trained with it. Checkpoints and the log go to --work, the finished model, a diffusers folder in float16, to --out. A
training that was stopped goes on.

Sources: Liu et al. 2022 (arXiv 2209.03003) for the flow, Esser et al. 2024 (arXiv 2403.03206), section 3.1, for the
distribution of the times.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutdiff.checkpoint import load, save_folder
from cutdiff.cli.arguments import Parser
from cutdiff.cli.device import device_of, tell_dtype
from cutdiff.cli.ending import exit_status
from cutdiff.cli.output import check_output
from cutdiff.models.flux import Flux, FluxConfig, Modulation
from cutdiff.models.joint_text import FluxText
from cutdiff.output.images import save_json
from cutdiff.sampling.flow import FlowConfig
from cutdiff.scenes.vocabulary import PART, WIDTH, make_flow_text
from cutdiff.training.arguments import add_how
from cutdiff.training.card import PREFERRED, phase, write_flow_card
from cutdiff.training.fit import PLAN, Plan, check_plan, fit
from cutdiff.training.unet import NATIVE_PIXELS, Batch, Latents, encode_scenes

CONFIG = FluxConfig(
    latent_channels=4,
    num_layers=2,
    num_single_layers=4,
    num_heads=4,
    axes=(8, 20, 20),
    context_dim=WIDTH,
    pooled_dim=WIDTH,
    reads_guidance=False,
    native_size=16,
)
WHOLE_SCENES = 0.75
"""The share of the pictures that show a whole scene. The captions of the others begin with "part of": unlike SDXL, the
network is told no crop."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: _run(argv), argv, failures=(ValueError, OSError, FloatingPointError))


def _run(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    plan = {name: str(getattr(args, name)) for name in ("vae", "num_scenes", "steps", "batch")}
    check_plan(args.work, plan)
    for flag in ("work", "out"):
        check_output(f"--{flag}", getattr(args, flag))
    device = device_of(args.device)
    vae = load(args.vae, device=device).vae
    if vae.config.latent_channels != CONFIG.latent_channels:
        raise ValueError(f"--vae {args.vae} has {vae.config.latent_channels} channels: take one of the scenes, of 4")
    args.work.mkdir(parents=True, exist_ok=True)
    save_json(args.work / PLAN, plan)
    tell_dtype(args.dtype, device, getattr(torch, args.dtype))
    torch.manual_seed(0)  # initial weights; every other draw comes from the generator of its step
    flux, text = started(CONFIG).to(device), make_flow_text().on(device)
    latents = encode_scenes(vae, args.num_scenes, args.work, device, whole=WHOLE_SCENES)
    how = {"device": device, "bfloat16": args.dtype == "bfloat16"}
    train_flow(flux, text, latents, args.work, steps=args.steps, batch=args.batch, **how)
    save_folder(
        args.out, unet=flux, vae=vae, text=text, noise=FlowConfig(), zeros_for_empty_negative=False, preferred=PREFERRED
    )
    data = f"{args.batch} of {args.num_scenes} pictures of {NATIVE_PIXELS} px, {WHOLE_SCENES:.0%} of them whole scenes"
    made = phase(
        "Transformer and text encoders",
        "loss",
        args.work / "flow.jsonl",
        data=data,
        device=device,
        dtype=args.dtype,
    )
    write_flow_card(args.out, made)
    print(f"wrote {args.out}")


def train_flow(
    flux: Flux,
    text: FluxText,
    latents: Latents,
    folder: Path,
    *,
    steps: int,
    batch: int,
    device: torch.device,
    bfloat16: bool,
) -> None:
    """Train the transformer and its text encoders in place to predict the velocity, noise − x0; see `fit`."""

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        index, clean, noise, captions = Batch.draw(latents, batch, generator)
        are_parts = (latents.size_ids[index, 0] > NATIVE_PIXELS).tolist()
        captions = [
            f"{PART} {caption}" if caption and is_part else caption
            for caption, is_part in zip(captions, are_parts, strict=True)
        ]
        t = times(torch.rand(batch, generator=generator, device=device))
        noised = torch.lerp(clean, noise, t[:, None, None, None])
        (tokens,) = text.tokenize(captions)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), sdpa_kernel(SDPBackend.MATH):
            states = text.encode_tokens(*(part.ids for part in tokens))
            predicted = flux(noised, 1000 * t, states.context, states.pooled)
        return {"loss": (predicted.float() - (noise - clean)).square().mean()}

    both = nn.ModuleDict({"transformer": flux, "text": text.text_encoder, "text_2": text.t5.encoder})
    fit("flow", both, loss, Plan(steps, learning_rate=1e-3, muon_learning_rate=0.01, warmup=100), folder, device)


def times(draws: Tensor) -> Tensor:
    """Times t in (0, 1), one from each of as many equal strata as there are draws in [0, 1): the logistic function of
    normal numbers, so that the middle, where the velocity is the hardest to predict, is drawn the most often."""
    shares = (torch.arange(len(draws), device=draws.device) + draws.clamp(1e-4, 1 - 1e-4)) / len(draws)
    return torch.special.ndtri(shares).sigmoid()


def started(config: FluxConfig) -> Flux:
    """A transformer whose blocks and last layer give nothing at first (Peebles & Xie 2022, arXiv 2212.09748)."""
    flux = Flux(config)
    for layer in [flux.proj_out, *(module.linear for module in flux.modules() if isinstance(module, Modulation))]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return flux


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m cutdiff.training.flow", description=__doc__)
    parser.add_argument("--vae", type=Path, help="the model whose VAE is kept; none: the embedded model")
    parser.add_argument("--work", type=Path, default=Path("runs/flow"), help="checkpoints and the log (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("weights/scenes-flow"), help="the model (%(default)s)")
    counts = (
        ("num-scenes", 20480, "pictures to encode"),
        ("steps", 3000, "steps of the training"),
        ("batch", 64, "latents in each of them"),
    )
    add_how(parser, counts)
    return parser


if __name__ == "__main__":
    sys.exit(main())
