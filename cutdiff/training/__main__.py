"""Train the embedded model from nothing, or further from --init: `python -m cutdiff.training`.

The training has three phases, each of which can be resumed: the VAE, the latents of rendered scenes, and the U-Net with
its text encoders. Checkpoints and logs go to --work; the finished model, a diffusers folder in float16, goes to --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from cutdiff.checkpoint import load, save_folder
from cutdiff.cli.device import tell_dtype
from cutdiff.models.unet import UNet
from cutdiff.output.images import save_json
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.scenes.vocabulary import make_text_encoders
from cutdiff.training.card import phase, read_history, write_card
from cutdiff.training.unet import CONFIG, NATIVE_PIXELS, WHOLE_SCENES, encode_scenes, train_unet
from cutdiff.training.vae import CROP_PIXELS, train_vae


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if not 0 <= args.whole_scenes <= 1:
        parser.error(f"--whole-scenes {args.whole_scenes} must lie in 0 … 1")
    plan = {name: str(getattr(args, name)) for name in ("init", "vae", "whole_scenes", "num_scenes")}
    described = args.work / "plan.json"
    if described.exists() and json.loads(described.read_text()) != plan:
        parser.error(f"--work {args.work} holds another training ({described}): take another folder")
    args.work.mkdir(parents=True, exist_ok=True)
    save_json(described, plan)
    device = torch.device(args.device)
    tell_dtype(args.dtype, device, getattr(torch, args.dtype))
    bfloat16 = args.dtype == "bfloat16"
    conditions: Any = {"device": device, "dtype": args.dtype}
    if args.init is not None:
        start = load(args.init, device=device)
        vae, text, unet = start.vae, start.text, start.unet
        history = read_history(args.init)
    else:
        if args.vae is not None:
            vae, history = load(args.vae, device=device).vae, read_history(args.vae)[:1]
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
    save_folder(args.out, unet=unet, vae=vae, text=text, noise=NoiseConfig(), zeros_for_empty_negative=True)
    pictures = f"{args.num_scenes} pictures of {NATIVE_PIXELS} px, {args.whole_scenes:.0%} of them whole scenes"
    data = f"{args.unet_batch} of {pictures}"
    history.append(phase("U-Net and text encoders", "loss", args.work / "unet.jsonl", data=data, **conditions))
    write_card(args.out, history)
    print(f"wrote {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cutdiff.training", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/scenes"), help="checkpoints and logs (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("weights/scenes"), help="the finished model (%(default)s)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init", type=Path, help="continue from this model: keep its VAE and train its U-Net further")
    start.add_argument("--vae", type=Path, help="keep this model's VAE and train everything else from nothing")
    parser.add_argument(
        "--whole-scenes", type=float, default=WHOLE_SCENES, metavar="SHARE",
        help="share of the pictures that show a whole scene, the others being magnified crops (%(default)s); "
        "1 trains a model that never sees a magnified part",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="type of the arithmetic (%(default)s)"
    )
    parser.add_argument("--vae-steps", type=int, default=2000, metavar="N", help="steps of the VAE (%(default)s)")
    parser.add_argument("--vae-batch", type=int, default=12, metavar="N", help="crops in each of them (%(default)s)")
    parser.add_argument("--num-scenes", type=int, default=16384, metavar="N", help="pictures to encode (%(default)s)")
    parser.add_argument("--unet-steps", type=int, default=1900, metavar="N", help="steps of the U-Net (%(default)s)")
    parser.add_argument("--unet-batch", type=int, default=40, metavar="N", help="latents in each of them (%(default)s)")
    return parser


if __name__ == "__main__":
    main()
