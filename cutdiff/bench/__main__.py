"""The command line: `python -m cutdiff.bench [--small] [--json FILE]`.

The whole sampler beside the published CutDiffusion loop on diffusers' modules, in one process, on the same random
weights of SDXL's sizes: (a) as its README runs it, (b) with view batch 16, (c) with a vectorised draw, (d) with
torch.compile and channels_last; with --also ours a second time, its linear layers in 8 bits, its norms and gates by
Triton kernels, compiled and recorded as CUDA graphs, or its attention by cuDNN. First the networks are compared, in
float32 and then in the dtype of the run. Then everyone draws once with four steps, which compiles what is compiled, and
then by turns, --repeats times. Seconds are of each stage, with all that surrounds the network, and of the VAE apart;
ratios are medians over the rounds. The floor is the FLOPs of the network's evaluations at the best rate that a large
matrix product has in any round.

Peak memory is told for each on a GPU, its weights included; of the process, which holds the weights of all, on any.
Exit status: 0, 1 where networks differ or a run failed, 2 for arguments that cannot be used.
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
from cutdiff_kernels.timing import hardware
from torch.nn.attention import SDPBackend
from tqdm import trange

import cutdiff
from cutdiff.bench.measure import Contestant, Ours, Timing, count_flops, matmul_peak, timed
from cutdiff.bench.parity import NotEqual, prove, prove_again
from cutdiff.bench.report import CUDNN, FP8, FUSED, GRAPHS, OURS, VARIANTS, heading, summary, table
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import cast, changed, random_model
from cutdiff.cli.arguments import DTYPES, BadArgument, Parser, errors_by_flag
from cutdiff.models.config import SDXL_UNET, SDXL_VAE, UNetConfig, VAEConfig
from cutdiff.models.fp8 import check_fp8, quantize_transformers
from cutdiff.models.fused import check_fused, fuse
from cutdiff.output.images import save_json
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
CUDNN_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""torch asks FlashAttention first on every card."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        args = _parse(argv)
        result = _measure(args, ["python", "-m", "cutdiff.bench", *(sys.argv[1:] if argv is None else argv)])
    except BadArgument as error:
        return _complain(error, 2)
    except (NotEqual, FloatingPointError, RuntimeError, OSError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain(Exception("interrupted"), 1)
    print(f"{heading(result)}\n\n{table(result)}")
    return 0


def _measure(args: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Compare, then time by turns; what was found is saved after every round."""
    baselines = _baselines()
    unet, vae = (SMALL_UNET, SMALL_VAE) if args.small else (SDXL_UNET, SDXL_VAE)
    settings, device = _settings(args, unet, vae), torch.empty(0, device=args.device).device
    size = settings.canvas_size(unet.native_size, vae.factor)

    _say("making random weights, and comparing the networks in float32")
    model = random_model(unet, vae, device)
    eager = Ours(model, replace(settings, compile=False))
    parity = prove(model, eager, baselines.make_baselines(model, ["a"], size)["a"])
    model = cast(model, getattr(torch, args.dtype))
    contestants = {OURS: Ours(model, settings), **baselines.make_baselines(model, args.only, size)}
    for name in args.also:
        contestants[name] = _variant(name, model, settings)
    num_patches = math.prod(grid_for(size, unet.native_size))
    first = _first_runs(contestants, model, min(settings.view_batch_size or num_patches, num_patches))
    result = {
        "command": command,
        **_environment(args, device),
        "model": "small" if args.small else "SDXL",
        "settings": settings.described(),
        "parity": parity,
        "matmul_side": args.matmul,
        "peak_flops_per_s": 0.0,
        "flops": count_flops(unet, vae, size, args.steps),
    }
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    for _ in trange(args.repeats, desc="rounds", disable=None):
        rate = matmul_peak(device, model.dtype, args.matmul)
        result["peak_flops_per_s"] = max(result["peak_flops_per_s"], rate)
        for name, contestant in contestants.items():
            timings[name].append(timed(contestant, args.steps, device))
        found = summary(timings, result["flops"], result["peak_flops_per_s"])
        result["contestants"] = {name: first[name] | found[name] for name in contestants}
        result["resident_peak_bytes"] = peak_memory(torch.device("cpu"))
        if args.json is not None:
            save_json(args.json, result)
    return result


def _variant(name: str, model: Model, settings: Settings) -> Ours:
    if name == CUDNN:  # a copy, which a compiler does not know
        return Ours(changed(model, lambda unet: None), settings, "cutdiff, attention by cuDNN", CUDNN_FIRST)
    if name == GRAPHS:
        return Ours(model, replace(settings, compile=True, cuda_graphs=True), "cutdiff, compiled, CUDA graphs")
    return Ours(changed(model, {FP8: quantize_transformers, FUSED: fuse}[name]), settings, f"cutdiff, {name}")


def _check_variant(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError where a variant cannot be had."""
    if name == FP8 and device.type == "cuda":
        check_fp8(device, dtype)
    if name == FUSED:
        check_fused(device)
    if name in (GRAPHS, CUDNN) and device.type != "cuda":
        raise ValueError(f"only a GPU has it, and the device is {device}: leave it out")


def _first_runs(contestants: dict[str, Contestant], model: Model, num_patches: int) -> dict[str, dict[str, Any]]:
    """Of each contestant its name, how far its U-Net is from ours, and the seconds of all that happens once.

    Compared is a batch of as many guidance pairs as patches, so that a compiler sees no shape that a run does not.
    """
    found = {}
    for name, contestant in contestants.items():
        _say(f"first run of {contestant.what}")
        began = now(model.device)
        difference = prove_again(model, name, contestants[OURS], contestant, 2 * num_patches)
        timed(contestant, 4, model.device)  # each stage twice: CUDA graphs are recorded at the second time
        found[name] = {
            "what": contestant.what,
            "difference": difference,
            "first_run_s": now(model.device) - began,
        }
    return found


def _environment(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    versions = {"cutdiff": cutdiff.__version__, "diffusers": version("diffusers")}
    precision = {
        "dtype": args.dtype,
        "float32_products": torch.get_float32_matmul_precision(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }
    return {"hardware": hardware(device) | versions, "precision": precision}


def _baselines() -> ModuleType:
    try:
        return import_module("cutdiff.bench.baselines")
    except ModuleNotFoundError as error:
        raise RuntimeError(f'the baselines need {error.name}: pip install -e ".[bench]"') from None


def _settings(args: argparse.Namespace, unet: UNetConfig, vae: VAEConfig) -> Settings:
    """The run of this package's sampler; the loop beside it does the same work."""
    native = unet.native_size * vae.factor
    if args.size < native or args.size % native:
        raise BadArgument(f"--size {args.size} must be a multiple of {native}, the native size: so the loop has it")
    for name, least in (("steps", 2), ("repeats", 1), ("matmul", 1), ("view_batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise BadArgument(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadArgument("--device cuda is not available here: use --device cpu")
    try:
        check_backend(args.backend, torch.device(args.device))
    except ValueError as error:
        raise BadArgument(f"--{str(error).replace('=', ' ', 1)}") from None
    if args.json is not None and not args.json.parent.is_dir():
        raise BadArgument(f"--json {args.json} cannot be written, its folder does not exist: create it")
    if args.compile and len(args.also) > 1:
        raise BadArgument(f"--also {' '.join(args.also)}: with --compile one at a time, each is compiled anew")
    for name in args.also:
        try:
            _check_variant(name, torch.device(args.device), getattr(torch, args.dtype))
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
    for name, what in (
        ("size", "side of the picture, in pixels"),
        ("steps", "of each run"),
        ("matmul", "side of the matrices whose product is the floor's rate"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what}{_defaults(name)}")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of the networks{_defaults('dtype')}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="none: cuda where there is one")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (5)")
    parser.add_argument("--only", nargs="*", choices=BASELINES, default=BASELINES, help="baselines (all)")
    parser.add_argument("--view-batch-size", type=int, metavar="V", help="of ours; none: as sampling chooses it")
    parser.add_argument("--compile", action="store_true", help="ours too")
    parser.add_argument(
        "--also",
        nargs="+",
        choices=VARIANTS,
        default=(),
        help="ours a second time: linear layers in 8 bits (on a CPU by reference), norms and gates by Triton kernels, "
        "compiled and recorded as CUDA graphs, attention by cuDNN where it can",
    )
    parser.add_argument("--backend", default=defaults.backend, choices=BACKENDS, help="of ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    args = parser.parse_args(argv)
    for name, value in (SMALL if args.small else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def _defaults(name: str) -> str:
    return f" ({FULL[name]}; with --small {SMALL[name]})"


def _say(what: str) -> None:
    print(f"cutdiff: {what}", file=sys.stderr, flush=True)


def _complain(error: Exception, status: int) -> int:
    _say(str(error).strip().partition("\n")[0] or type(error).__name__)
    return status


if __name__ == "__main__":
    sys.exit(main())
