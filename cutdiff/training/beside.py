"""The parts that trainings beside a finished model share: their arguments, their beginning, and the noise they take."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cutdiff.checkpoint import load
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import BadArgument, Parser
from cutdiff.cli.device import device_of, tell_dtype
from cutdiff.cli.output import check_output
from cutdiff.output.images import save_json
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.training.arguments import Counts, add_how
from cutdiff.training.fit import PLAN, check_plan
from cutdiff.training.unet import Latents, encode_scenes


def parser_beside(name: str, description: str | None, out: Path, product: str, counts: Counts) -> Parser:
    """The parser of `python -m cutdiff.training.NAME`, which makes a `product` for a model that is trained already."""
    parser = Parser(prog=f"python -m cutdiff.training.{name}", description=description)
    parser.add_argument("--model", type=Path, help="a model of the scenes; none: the embedded model")
    parser.add_argument("--work", type=Path, default=Path(f"runs/{name}"), help="checkpoints, log (%(default)s)")
    parser.add_argument("--out", type=Path, default=out, help=f"the {product} (%(default)s)")
    add_how(parser, counts)
    return parser


def begun(args: argparse.Namespace, *planned: str) -> tuple[Model, Latents]:
    """The model of a training and the latents of its pictures. `planned` are the arguments that a training
    which goes on must not change.

    BadArgument where an argument cannot be used, and ValueError where the model does not suit it, before anything is
    written.
    """
    plan = {name: str(getattr(args, name)) for name in planned}
    check_plan(args.work, plan)
    if args.out.suffix != ".safetensors":
        raise BadArgument(f"--out {args.out} must end in .safetensors")
    for flag, folder in (("--work", args.work), ("--out", args.out.parent)):
        check_output(flag, folder)
    model = load(args.model, device=device_of(args.device))
    noise_of(model)
    args.work.mkdir(parents=True, exist_ok=True)
    save_json(args.work / PLAN, plan)
    tell_dtype(args.dtype, model.device, getattr(torch, args.dtype))
    latents = encode_scenes(model.vae, args.num_scenes, args.work, model.device)
    return model, latents


def noise_of(model: Model) -> NoiseConfig:
    """The noise of a model that can be distilled; ValueError where its network does not predict that."""
    if isinstance(model.noise, NoiseConfig) and model.noise.prediction_type == "epsilon":
        return model.noise
    raise ValueError(f"{model.source} does not predict the noise (epsilon): distil a model that does")
