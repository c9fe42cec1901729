"""The command line `python -m cutdiff.bench [--small] [--json FILE]`.

It times the whole sampler beside the published CutDiffusion loop on diffusers' modules, in one process and on the same
random weights of SDXL's sizes. The loop runs (a) as its README runs it, (b) with view batch 16, (c) with a vectorised
draw as well, and (d) with torch.compile and channels_last as well. --also runs variants of the sampler beside it.

First the networks are compared, in float32 and then in the dtype of the run. (With an empty --only nothing is compared
with diffusers, nor is it needed.) Then every contestant draws one picture of
four steps, during which torch compiles; then all draw in turns, --repeats times. The times of each stage include all
that surrounds the network; the VAE is timed apart. Ratios are medians over the rounds. The floor is the time for the
FLOPs of the network's evaluations at the best rate that a large matrix product reaches in any round.

On a GPU the peak memory of each contestant is reported, including its weights; on every device that of the process,
which holds the weights of all. The exit status is 0, 1 if networks differ or a run failed, and 2 for arguments that
cannot be used.

With --methods, methods are compared with each other instead (`bench.methods`), and nothing needs diffusers.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cutdiff_kernels.lines import Lines, add_lines
from cutdiff_kernels.timing import hardware
from tqdm import trange

import cutdiff
from cutdiff.bench import methods
from cutdiff.bench.measure import (
    Contestant,
    Ours,
    Timing,
    attention_order,
    count_flops,
    matmul_peak,
    timed,
    unet_flops,
)
from cutdiff.bench.parity import NotEqual, prove, prove_again
from cutdiff.bench.report import OURS, heading, summary, table
from cutdiff.bench.variants import DIRECT, EAGER, VARIANTS, check_variant, variant
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import cast, random_model
from cutdiff.cli.arguments import DTYPES, BadArgument, Parser, add_debug, errors_by_flag
from cutdiff.cli.device import device_of, tell_dtype
from cutdiff.cli.ending import Failure, exit_status, say
from cutdiff.models.config import SDXL_UNET, SDXL_VAE, UNetConfig, VAEConfig
from cutdiff.output.images import save_json
from cutdiff.parallel.lines import write_line
from cutdiff.pipeline import now, peak_memory
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.operators import check_backend, grid_for
from cutdiff.sampling.schedules import make_schedule
from cutdiff.settings import BACKENDS, Settings

SMALL_UNET = UNetConfig(
    channels=(64, 128),
    layers_per_block=1,
    transformer_layers=(0, 1),
    mid_transformer_layers=1,
    num_heads=(1, 2),
    context_dim=256,
    pooled_dim=128,
    size_embedding_dim=32,
    native_size=16,
)
SMALL_VAE = VAEConfig(channels=(32, 64, 64, 64), layers_per_block=1)
FULL = {"size": 2048, "steps": 50, "dtype": "bfloat16", "matmul": 8192}
SMALL = {"size": 256, "steps": 4, "dtype": "float32", "matmul": 512}
BASELINES = ("a", "b", "c", "d")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return exit_status(lambda: _run(argv), argv, failures=(NotEqual, FloatingPointError))


def _run(argv: list[str] | None) -> None:
    args, given = _parse(argv), sys.argv[1:] if argv is None else argv
    command = ["python", "-m", "cutdiff.bench", *given]
    if methods.asked(args, given):
        device, networks = device_of(args.device), (SMALL_UNET, SMALL_VAE) if args.small else (SDXL_UNET, SDXL_VAE)
        _check(args, device)
        write_line(methods.report(methods.compare(args, command, device, *networks)), sys.stdout)
        return
    result = _measure(args, command)
    write_line(f"{heading(result)}\n\n{table(result)}", sys.stdout)


def _measure(args: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Compare the networks and time the contestants in turns; the results are saved after every round."""
    baselines = _baselines() if args.only else None
    unet, vae = (SMALL_UNET, SMALL_VAE) if args.small else (SDXL_UNET, SDXL_VAE)
    device = device_of(args.device)
    settings = _settings(args, device, unet, vae)
    size = settings.canvas_size(unet.native_size, vae.factor)

    tell_dtype(args.dtype, device, getattr(torch, args.dtype))
    lines = Lines(*args.lines)
    environment = _environment(args, device)
    say("making random weights" + " and comparing the networks in float32" * (baselines is not None))
    model, parity = random_model(unet, vae, device), {}
    if baselines is not None:
        eager = Ours(model, replace(settings, compile=False))
        parity = prove(model, eager, baselines.make_baselines(model, ["a"], size)["a"])
        lines.add("difference from diffusers' in float32", parity)
    model = cast(model, getattr(torch, args.dtype))
    contestants: dict[str, Contestant] = {OURS: Ours(model, settings)}
    if baselines is not None:
        contestants |= baselines.make_baselines(model, args.only, size)
    contestants |= {name: variant(name, model, settings) for name in args.also}
    num_patches = math.prod(grid_for(size, unet.native_size))
    first = _first_runs(contestants, model, min(settings.view_batch_size or num_patches, num_patches), lines)
    result = {
        "command": command,
        **environment,
        "model": "small" if args.small else "SDXL",
        "settings": settings.described(),
        "parity": parity,
        "matmul_side": args.matmul,
        "peak_flops_per_s": 0.0,
        "flops": count_flops(unet, vae, size, args.steps),
    }
    if DIRECT in contestants:
        result["flops"][DIRECT] = 2 * unet_flops(unet, size) * args.steps
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    for _ in trange(args.repeats, desc="rounds", disable=None):
        rate = matmul_peak(device, model.dtype, args.matmul)
        result["peak_flops_per_s"] = max(result["peak_flops_per_s"], rate)
        lines.add("product of matrices", {"rate_flops_per_s": rate})
        for name, contestant in contestants.items():
            timings[name].append(timed(contestant, args.steps, device))
            _keep(lines, name, timings)
        rows = summary(timings, result["flops"], result["peak_flops_per_s"])
        result["contestants"] = {name: first[name] | rows[name] for name in contestants}
        result["resident_peak_bytes"] = peak_memory(torch.device("cpu"))
        if args.json is not None:
            save_json(args.json, result)
    return result


def _keep(lines: Lines, name: str, timings: dict[str, list[Timing]]) -> None:
    """Append the last run of a contestant, and its time as a multiple of the sampler's in the same round."""
    run, rounds = timings[name][-1], len(timings[name])
    values: dict[str, Any] = {f"{part}_s": seconds or None for part, seconds in run.seconds.items()}
    values |= {f"{part}_peak_bytes": peak for part, peak in run.peak_bytes.items()}
    if name != OURS:
        values["times cutdiff"] = run.seconds["network"] / timings[OURS][rounds - 1].seconds["network"]
    lines.add(name, values, round=rounds)


def _first_runs(
    contestants: dict[str, Contestant], model: Model, num_patches: int, lines: Lines
) -> dict[str, dict[str, Any]]:
    """The name of each contestant, the difference of its U-Net from ours, and the seconds that its first run takes.

    The U-Nets are compared on a batch of as many guidance pairs as patches, so that a compiler sees no shape that a
    run does not have.
    """
    rows = {}
    for name, contestant in contestants.items():
        say(f"first run of {contestant.what}")
        began = now(model.device)
        difference = prove_again(model, name, contestants[OURS], contestant, 2 * num_patches)
        timed(contestant, 4, model.device)  # two steps of each stage: CUDA graphs are recorded at the second one
        rows[name] = {
            "what": contestant.what,
            "difference": difference,
            "first_run_s": now(model.device) - began,
        }
        lines.add(name, rows[name])
    return rows


def _environment(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    versions = {"cutdiff": cutdiff.__version__}
    versions |= {"diffusers": version("diffusers")} if args.only else {}
    precision = {
        "dtype": args.dtype,
        "float32_products": torch.get_float32_matmul_precision(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }
    return {"hardware": hardware(device) | versions, "precision": precision, "attention": attention_order(device)}


def _baselines() -> ModuleType:
    try:
        return import_module("cutdiff.bench.baselines")
    except ModuleNotFoundError as error:
        raise Failure(f'the baselines need {error.name}: pip install -e ".[bench]"') from None


def _check(args: argparse.Namespace, device: torch.device) -> None:
    """BadArgument where an argument cannot be used, whatever is compared."""
    for name, least in (("steps", 2), ("repeats", 1), ("matmul", 1), ("view_batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise BadArgument(f"--{name.replace('_', '-')} {value} must be at least {least}")
    try:
        check_backend(args.backend, device)
    except ValueError as error:
        raise BadArgument(f"--{str(error).replace('=', ' ', 1)}") from None
    for flag, path in (("--json", args.json), ("--lines", Path(args.lines[0]) if args.lines else None)):
        if path is not None and not path.parent.is_dir():
            raise BadArgument(f"{flag} {path} cannot be written, its folder does not exist: create it")


def _settings(args: argparse.Namespace, device: torch.device, unet: UNetConfig, vae: VAEConfig) -> Settings:
    """The options of this package's sampler, checked; the published loop does the same work."""
    native = unet.native_size * vae.factor
    if args.size < native or args.size % native:
        raise BadArgument(f"--size {args.size} must be a multiple of {native}, the native size: so the loop has it")
    _check(args, device)
    if args.compile and len({*args.also} - {EAGER}) > 1:
        raise BadArgument(f"--also {' '.join(args.also)}: with --compile one at a time, each is compiled anew")
    for name in args.also:
        try:
            check_variant(name, device, getattr(torch, args.dtype), args.compile)
        except ValueError as error:
            raise BadArgument(f"--also {name}: {error}") from None
    with errors_by_flag():
        settings = Settings(
            height=args.size,
            width=args.size,
            num_steps=args.steps,
            view_batch_size=args.view_batch_size,
            compile=args.compile,
            backend=args.backend,
        )
        make_schedule(settings.schedule, settings.solver, NoiseConfig(), settings.num_steps)
    return settings


def _parse(argv: list[str] | None) -> argparse.Namespace:
    defaults = Settings()
    parser = Parser(
        prog="python -m cutdiff.bench",
        description="Time the sampler beside the published CutDiffusion loop on diffusers' modules.",
    )
    parser.add_argument("--small", action="store_true", help="a small network, for a CPU")
    for name, text in (
        ("size", "side of the picture, in pixels"),
        ("steps", "number of steps of each run"),
        ("matmul", "side of the matrices whose product gives the floor's rate"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text}{_defaults(name)}")
    parser.add_argument("--dtype", choices=DTYPES, help=f"number format of the networks{_defaults('dtype')}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="none: cuda where there is one")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="number of rounds")
    parser.add_argument("--only", nargs="*", choices=BASELINES, default=BASELINES, help="the baselines that run")
    parser.add_argument("--view-batch-size", type=int, metavar="V", help="the sampler's; none: it chooses by itself")
    parser.add_argument("--compile", action="store_true", help="compile the sampler's network, too")
    parser.add_argument(
        "--also",
        nargs="+",
        choices=VARIANTS,
        default=(),
        help=f"run variants of the sampler, too: {'; '.join(f'{name} – {what}' for name, what in VARIANTS.items())}",
    )
    parser.add_argument("--backend", default=defaults.backend, choices=BACKENDS, help="the sampler's operators")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements to this file")
    methods.add_arguments(parser)
    add_lines(parser)
    add_debug(parser)
    args = parser.parse_args(argv)
    for name, value in (SMALL if args.small else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def _defaults(name: str) -> str:
    return f" ({FULL[name]}; with --small {SMALL[name]})"


if __name__ == "__main__":
    sys.exit(main())
