"""Train the embedded model from nothing, or further from --init: `python -m cutdiff.training`.

The training has three phases, each of which can be resumed: the VAE, the latents of rendered scenes, and the U-Net with
its text encoders. Checkpoints and logs go to --work; the finished model, a diffusers folder in float16, goes to --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from cutdiff.checkpoint import load, save_folder
from cutdiff.cli.arguments import Parser, number
from cutdiff.cli.device import device_of, tell_dtype
from cutdiff.cli.ending import exit_status
from cutdiff.cli.output import check_output
from cutdiff.models.unet import UNet, as_unet
from cutdiff.output.images import save_json
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.scenes.vocabulary import make_text_encoders
from cutdiff.training.arguments import add_how
from cutdiff.training.card import PREFERRED, phase, read_history, write_card
from cutdiff.training.fit import PLAN, check_plan
from cutdiff.training.unet import CONFIG, NATIVE_PIXELS, WHOLE_SCENES, encode_scenes, train_unet
from cutdiff.training.vae import CROP_PIXELS, train_vae


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: _run(argv), argv, failures=(ValueError, OSError, FloatingPointError))


def _run(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    for flag in ("work", "out"):
        check_output(f"--{flag}", getattr(args, flag))
    plan = {name: str(getattr(args, name)) for name in ("init", "vae", "whole_scenes", "num_scenes")}
    check_plan(args.work, plan)
    device = device_of(args.device)
    start = None if (given := args.init or args.vae) is None else load(given, device=device)
    args.work.mkdir(parents=True, exist_ok=True)
    save_json(args.work / PLAN, plan)
    tell_dtype(args.dtype, device, getattr(torch, args.dtype))
    bfloat16 = args.dtype == "bfloat16"
    conditions: Any = {"device": device, "dtype": args.dtype}
    if start is not None and args.init is not None:
        vae, text, unet = start.vae, start.text, as_unet(start.unet)
        history = read_history(args.init)
    else:
        if start is not None:
            vae, history = start.vae, read_history(args.vae)[:1]
        else:
            vae = train_vae(args.work, steps=args.vae_steps, batch=args.vae_batch, device=device, bfloat16=bfloat16)
            data = f"{args.vae_batch} crops of {CROP_PIXELS} px"
            history = [phase("VAE", "psnr", args.work / "vae.jsonl", data=data, **conditions)]
        torch.manual_seed(0)
        text, unet = make_text_encoders(), UNet(CONFIG)
    torch.nn.ModuleList([*text.encoders, unet]).to(device).requires_grad_(True)
    latents = encode_scenes(vae, args.num_scenes, args.work, device, whole=args.whole_scenes)
    train_unet(
        unet, text, latents, args.work, steps=args.unet_steps, batch=args.unet_batch, device=device, bfloat16=bfloat16
    )
    save_folder(
        args.out, unet=unet, vae=vae, text=text, noise=NoiseConfig(), zeros_for_empty_negative=True, preferred=PREFERRED
    )
    pictures = f"{args.num_scenes} pictures of {NATIVE_PIXELS} px, {args.whole_scenes:.0%} of them whole scenes"
    data = f"{args.unet_batch} of {pictures}"
    history.append(phase("U-Net and text encoders", "loss", args.work / "unet.jsonl", data=data, **conditions))
    write_card(args.out, history)
    print(f"wrote {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m cutdiff.training", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/scenes"), help="checkpoints and logs (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("weights/scenes"), help="the finished model (%(default)s)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init", type=Path, help="continue from this model: keep its VAE and train its U-Net further")
    start.add_argument("--vae", type=Path, help="keep this model's VAE and train everything else from nothing")
    parser.add_argument(
        "--whole-scenes", type=number(0, 1, float), default=WHOLE_SCENES, metavar="SHARE",
        help="share of the pictures that show a whole scene, the others being magnified crops (%(default)s); "
        "1 trains a model that never sees a magnified part",
    )  # fmt: skip
    counts = (
        ("vae-steps", 2000, "steps of the VAE"),
        ("vae-batch", 12, "crops in each of them"),
        ("num-scenes", 16384, "pictures to encode"),
        ("unet-steps", 1900, "steps of the U-Net"),
        ("unet-batch", 40, "latents in each of them"),
    )
    add_how(parser, counts)
    return parser


if __name__ == "__main__":
    sys.exit(main())
