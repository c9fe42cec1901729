"""Stages of `gpu.sh` that no bench covers: `python -m cutdiff.bench.stages STAGE [--small] [--lines FILE STAGE]`.

`machine` reads what the hardware is and does at best, `correct` compares every kernel with its reference at SDXL's
shapes, `call` times single calls of the U-Net and profiles one, `benchmark` times them with the convolutions that
cuDNN finds to be fastest, `variants` times calls of the sampler's variants, `parts` compiles the network's blocks and
the whole, and `tests` runs the tests marked gpu. Each number is appended to the file of `--lines` as it is known. With
--small a small network and small shapes take the place of SDXL's, and a CPU will do. The exit status is 0, 1 if
something is wrong or failed, and 2 for arguments that cannot be used.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from cutdiff_kernels import bench as operators
from cutdiff_kernels.launch import runs_on
from cutdiff_kernels.lines import Lines, add_lines
from cutdiff_kernels.timing import copy_rate, graph_seconds, hardware, host_seconds
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from cutdiff.bench.__main__ import SMALL_UNET, SMALL_VAE
from cutdiff.bench.measure import Memory, Ours, attention_order, matmul_peak, unet_flops
from cutdiff.bench.parity import TOLERANCES, NotEqual, check, prove_again, relative_difference
from cutdiff.bench.variants import DIRECT, EAGER, VARIANTS, check_variant, variant
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import cast, network_inputs, random_model
from cutdiff.cli.arguments import BadArgument, Parser, add_debug
from cutdiff.cli.device import device_of
from cutdiff.cli.ending import Failure, exit_status, say
from cutdiff.models import fp8
from cutdiff.models.compiled import compiled
from cutdiff.models.config import SDXL_UNET, SDXL_VAE, UNetConfig
from cutdiff.models.unet import as_unet
from cutdiff.pipeline import now
from cutdiff.sampling.rows import GATHERED_BYTES
from cutdiff.settings import Settings

ROWS = (2, 8, 18)
"""The rows of a call: a guidance pair, and all patches and all views of a picture of twice the native size."""
CALLS = {8: 25, 18: 25}
"""The calls of such a picture in 50 steps, by their rows: 650 rows."""
SHOWN = 15
"""The most kernels, and operators, of a profile that are kept."""
ROOT = Path(__file__).parents[2]
GPU_TESTS = ("test_kernels.py", "test_kernels_flag.py", "test_kernels_launch.py", "test_launches.py", "test_fused.py")
GPU_TESTS += ("test_fp8.py", "test_compiled.py", "test_offload.py")
GPU_TESTS += ("test_checkpoint.py",)
"""The files that have tests marked gpu; the last one imports diffusers."""
FP8_TOLERANCE = 1e-2
"""The largest relative difference of an 8-bit product from its reference: a rounding to bfloat16, and short sums."""


@dataclass(frozen=True)
class Where:
    """The device of a stage, the file of its numbers, and whether the network is small."""

    device: torch.device
    lines: Lines
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.small else torch.bfloat16

    @property
    def config(self) -> UNetConfig:
        return SMALL_UNET if self.small else SDXL_UNET

    def model(self) -> Model:
        vae = SMALL_VAE if self.small else SDXL_VAE
        return cast(random_model(self.config, vae, self.device), self.dtype)

    def seconds(self, call: Callable[[], Tensor]) -> float:
        """The seconds of a call on the device, in a CUDA graph on a GPU."""
        if self.on_gpu:
            return graph_seconds(lambda i: (call(),), 2)
        return host_seconds(lambda i: (call(),), 1, self.device, repeats=3)


def machine(where: Where) -> None:
    """The hardware and its versions, the order of attention backends, and the best rates of copies and products."""
    lines, device = where.lines, where.device
    lines.add("hardware", {**hardware(device), **_driver_says()})
    if where.on_gpu:
        memory = torch.cuda.get_device_properties(device).total_memory
        lines.add("hardware", {"cudnn": torch.backends.cudnn.version(), "memory_bytes": memory})
    lines.add("attention", {"torch's order": ", ".join(attention_order(device))})
    _attention(where)
    if where.on_gpu:
        lines.add("copy", {"rate_bytes_per_s": copy_rate(device)})
    side, seconds = (512, 1.0) if where.small else (8192, 10.0)
    of = f"product of matrices of {side}²"
    lines.add(of, {"burst_flops_per_s": matmul_peak(device, where.dtype, side)})
    with ThreadPoolExecutor(1) as beside:
        asked: list[Future[dict[str, str]]] = []
        rates = sustained(device, where.dtype, side, seconds, lambda: asked.append(beside.submit(_driver_says)))
    lines.add(of, {"sustained_flops_per_s": mean(rates), "first_flops_per_s": rates[0], "last_flops_per_s": rates[-1]})
    lines.add("hardware during it", asked[0].result())


def sustained(
    device: torch.device, dtype: torch.dtype, side: int, seconds: float, at_the_seventh: Callable[[], object]
) -> list[float]:
    """The FLOP/s of products of random matrices in each tenth of so many seconds without a pause."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out, rates = torch.mm(a, b), []
    for tenth in range(10):
        if tenth == 6:
            at_the_seventh()
        began, count = now(device), 0
        while (passed := now(device) - began) < seconds / 10:
            for _ in range(8):
                torch.mm(a, b, out=out)
            count += 8
        rates.append(2 * side**3 * count / passed)
    return rates


def _driver_says() -> dict[str, str]:
    """The values that nvidia-smi gives for the first GPU; there are none without one."""
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit")
    names += ("temperature.gpu", "ecc.mode.current", "clocks_event_reasons.active")
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    values = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].split(",")
    return dict(zip(names, (value.strip() for value in values), strict=False))


def _attention(where: Where) -> None:
    """The backend that torch takes for each attention of the U-Net in a call of 18 rows, and the time of each one."""
    config, rows = where.config, ROWS[-1]
    for level, layers in enumerate(config.transformer_layers):
        if not layers:
            continue
        tokens, heads, width = (config.native_size >> level) ** 2, config.num_heads[level], config.channels[level]
        for read in (tokens, 77):
            drawn = (torch.randn(rows, n, width, device=where.device) for n in (tokens, read, read))
            q, k, v = (x.to(where.dtype).unflatten(2, (heads, -1)).transpose(1, 2) for x in drawn)
            of = f"attention of {tokens} tokens to {read}, {heads} heads, {rows} rows"
            taken = torch._fused_sdp_choice(q, k, v)  # pyright: ignore[reportPrivateImportUsage]
            where.lines.add(of, {"taken": SDPBackend(taken).name})
            flops = 4 * rows * tokens * read * width
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
                name = backend.name.removesuffix("_ATTENTION").lower()
                try:
                    with sdpa_kernel(backend):
                        seconds = where.seconds(partial(F.scaled_dot_product_attention, q, k, v))
                except RuntimeError as error:
                    where.lines.add(of, {f"{name} failed": str(error).partition("\n")[0]})
                else:
                    where.lines.add(of, {f"{name}_s": seconds, f"{name} rate_flops_per_s": flops / seconds})


def correct(where: Where) -> None:
    """Every kernel beside its reference at the shapes of SDXL's pictures, and a product in 8 bits; Failure if wrong."""
    wrong: list[str] = []

    def check(of: str, compare: Callable[[], str]) -> None:
        """Keep how a result is wrong, or that it is right; an error of one kernel does not end the stage."""
        try:
            difference = compare()
        except Exception as error:
            difference = f"{type(error).__name__}: {error}".partition("\n")[0]
        where.lines.add(of, {"right": not difference, "failed": difference})
        if difference:
            wrong.append(f"{of} {difference}")

    if where.on_gpu:  # not on a CPU: there torch 2.11 has no scale for each row
        check("product in 8 bits", partial(_compare_fp8, where))
    if runs_on(where.device):
        for size in operators.SIZES[:1] if where.small else operators.SIZES:
            # The interpreter cuts where bfloat16 should be rounded.
            for dtype in (torch.float32, torch.bfloat16) if where.on_gpu else (torch.float32,):
                inputs = operators.Inputs(size, where.device, dtype)
                references = {operation.name: operation.reference for operation in inputs.operations(False)}
                for name, call in inputs.kernels().items():
                    of = f"{name}, {size}², {str(dtype).removeprefix('torch.')}"
                    check(of, partial(_compare_operators, call, references[name]))
    else:
        where.lines.add("kernels", {"skipped": "no kernel runs here, there is no GPU"})
    if where.on_gpu:
        from cutdiff_kernels import bench_network

        for layer in bench_network.layers(ROWS[-1], where.device):
            check(layer.name, partial(bench_network.compare, layer))
    if wrong:
        raise Failure(f"{len(wrong)} kernels are wrong, the first: {wrong[0]}")


def _compare_operators(kernel: operators.Call, reference: operators.Call) -> str:
    return operators.compare(kernel(0), reference(0))


def _compare_fp8(where: Where) -> str:
    """The difference of a product in 8 bits from its reference, at a shape of SDXL's transformers."""
    rows, size_in, size_out = (64, 64, 128) if where.small else (ROWS[-1] * 4096, 640, 5120)
    x, weight = (torch.randn(n, size_in, device=where.device).to(torch.bfloat16) for n in (rows, size_out))
    bias = torch.randn(size_out, device=where.device).to(torch.bfloat16)
    factors = (*fp8.quantize(x), *fp8.quantize(weight), bias, torch.bfloat16)
    difference = relative_difference(fp8.scaled_product(*factors), fp8.scaled_product_reference(*factors))
    where.lines.add("product in 8 bits", {"relative difference": difference})
    return "" if difference <= FP8_TOLERANCE else f"differs by {difference:.1e}, allowed {FP8_TOLERANCE:.0e}"


@torch.no_grad()
def call(where: Where) -> None:
    """The seconds of a call of the U-Net for each number of rows and of all calls of a picture, and a profile."""
    model = where.model()
    ours, flops = Ours(model, Settings()), unet_flops(where.config)
    _calls(where, ours, flops)
    inputs = _inputs(model, ROWS[-1])
    ours.predict(*inputs)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where.on_gpu else [])]
    with profile(activities=activities) as profiled:
        began = now(where.device)
        ours.predict(*inputs)
        whole = now(where.device) - began
    events = profiled.key_averages()
    by = "self_device_time_total" if where.on_gpu else "self_cpu_time_total"
    print(events.table(sort_by=by, row_limit=50, max_name_column_width=90))
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    ran = {"launches": sum(event.count for event in kernels), "kernels_s": busy} if kernels else {}
    where.lines.add(f"profile of {ROWS[-1]} rows", {**ran, "profiled call_s": whole})
    for kind, some in (("kernel", kernels), ("operator", [e for e in events if e.device_type == DeviceType.CPU])):
        for event in sorted(some, key=lambda event: -getattr(event, by))[:SHOWN]:
            taken = getattr(event, by) / 1e6
            if taken:
                values = {"total_s": taken, "share": taken / (busy or whole), "count": event.count}
                where.lines.add(f"{kind} {event.key}", values)


def _calls(where: Where, ours: Ours, flops: float) -> None:
    """The seconds of a call for each number of rows, and of all calls of a picture; `flops` are those of a row."""
    seconds = {}
    for rows in ROWS:
        memory = Memory(where.device)
        seconds[rows] = call_seconds(ours, rows)
        values = {"call_s": seconds[rows], "rate_flops_per_s": rows * flops / seconds[rows]}
        where.lines.add(f"{rows} rows", values | {"peak_bytes": memory.peak(ours.unet)})
    rows, whole = sum(count * rows for rows, count in CALLS.items()), _picture(seconds)
    where.lines.add(f"{rows} rows, by these calls", {"calls_s": whole, "rate_flops_per_s": rows * flops / whole})


@torch.no_grad()
def benchmark(where: Where) -> None:
    """The seconds of the same calls with the convolutions that cuDNN finds to be fastest.

    It is a stage and no variant, because cuDNN keeps for the whole process what it took for a shape first.
    """
    torch.backends.cudnn.benchmark = True
    _calls(where, Ours(where.model(), Settings()), unet_flops(where.config))


@torch.no_grad()
def variants(where: Where) -> None:
    """The seconds of a picture's calls by each variant that changes a call, beside the sampler's own by turns."""
    model, wrong = where.model(), []
    ours = Ours(model, Settings())
    for name in VARIANTS:
        if name in (EAGER, DIRECT, "graphs", "fused"):  # they change no call, compile, or are two others together
            continue
        try:
            check_variant(name, where.device, where.dtype, compiled=False)
        except ValueError as error:
            where.lines.add(name, {"skipped": str(error)})
            continue
        try:
            changed = variant(name, model, Settings())
            difference = prove_again(model, name, ours, changed, 2)
            where.lines.add(name, {"difference": difference})
            seconds, own = {}, {}
            for rows in CALLS:
                own[rows], seconds[rows] = (call_seconds(one, rows, repeats=3) for one in (ours, changed))
                where.lines.add(name, {f"{rows} rows_s": seconds[rows], f"{rows} rows of cutdiff_s": own[rows]})
            where.lines.add(name, {"times cutdiff": _picture(seconds) / _picture(own)})
        except Exception as error:  # the others are worth measuring all the same
            message = f"{type(error).__name__}: {error}".partition("\n")[0]
            where.lines.add(name, {"failed": message})
            wrong.append(f"{name}: {message}")
    if wrong:
        raise Failure(f"{len(wrong)} variants failed, the first: {wrong[0]}")


def _picture(seconds: dict[int, float]) -> float:
    """The seconds of all calls of a picture, by those of a call for each number of rows."""
    return sum(count * seconds[rows] for rows, count in CALLS.items())


@torch.no_grad()
def parts(where: Where) -> None:
    """The seconds of a call that is compiled by blocks or as a whole, and of the first one, which compiles."""
    import torch._inductor.config as inductor  # its import takes more than a second of every stage

    inductor.force_disable_caches = True
    model = where.model()
    inputs = _inputs(model, ROWS[-1])
    plain = {"call_s": _seconds(model.unet, inputs, where.device)}
    where.lines.add(f"{ROWS[-1]} rows, not compiled", plain)
    for name in ("blocks", "whole"):
        run, began = compiled(model.unet, parts=name), now(where.device)
        difference = relative_difference(run(*inputs), model.unet(*inputs))
        first = {"first_s": now(where.device) - began, "difference": difference}
        where.lines.add(f"{ROWS[-1]} rows, compiled: {name}", first)
        check(difference, TOLERANCES[where.dtype], f"U-Net compiled by {name} differs")
        where.lines.add(f"{ROWS[-1]} rows, compiled: {name}", {"call_s": _seconds(run, inputs, where.device)})


def call_seconds(contestant: Ours, rows: int, repeats: int = 7) -> float:
    """The median seconds of a call of the U-Net for so many rows."""
    model = contestant.model
    return _seconds(contestant.predict, _inputs(model, rows), model.device, repeats)


def _seconds(run: Callable[..., Tensor], inputs: Sequence[Any], device: torch.device, repeats: int = 7) -> float:
    """The median seconds of a run, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        began = now(device)
        run(*inputs)
        times.append(now(device) - began)
    return median(times[2:])


def _inputs(model: Model, rows: int) -> tuple[Any, ...]:
    """Random inputs of the U-Net for so many rows of native size, which read the keys of two texts."""
    x, timestep, context, pooled, size_ids = network_inputs(model, rows)
    text = as_unet(model.unet).read(context[:2])[torch.arange(rows, device=x.device) % 2]
    if rows * text.row_bytes <= GATHERED_BYTES:  # as a run has it
        text = text.gathered()
    return x, timestep.expand(rows), text, pooled, size_ids


class Outcomes:
    """A plugin of pytest that appends the outcome of each test as soon as it is known."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self.lines.add(report.nodeid, {"outcome": report.outcome, "test_s": report.duration})
        elif report.when == "call":
            self.lines.add("tests", {"passed": report.nodeid, "test_s": report.duration})


def tests(where: Where) -> None:
    """The tests marked gpu; Failure if one fails."""
    files = GPU_TESTS if find_spec("diffusers") else GPU_TESTS[:-1]
    spread = ("-n", "8") if find_spec("xdist") else ()  # most of the time goes to compiling, which takes one core each
    run_tests(where.lines, [*spread, "-m", "gpu", *(str(ROOT / "tests" / name) for name in files)])


def run_tests(lines: Lines, arguments: list[str]) -> None:
    """Run the tests of pytest's arguments; Failure if one fails, or if there are none."""
    import pytest

    options = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    status = pytest.main([*options, *arguments], [Outcomes(lines)])
    if status != 0:
        raise Failure(f"pytest ended with {pytest.ExitCode(status).name}")


STAGES = {
    "machine": machine,
    "correct": correct,
    "call": call,
    "benchmark": benchmark,
    "variants": variants,
    "parts": parts,
    "tests": tests,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return exit_status(lambda: _run(argv), argv, failures=(NotEqual,))


def _run(argv: list[str] | None) -> None:
    parser = Parser(prog="python -m cutdiff.bench.stages", description="Run one stage of gpu.sh.")
    parser.add_argument("stage", choices=STAGES, help="what is measured")
    parser.add_argument("--small", action="store_true", help="a small network and small shapes, for a CPU")
    add_lines(parser)
    add_debug(parser)
    args = parser.parse_args(argv)
    device = device_of(None)
    if device.type != "cuda" and (args.stage == "tests" or not args.small):
        remedy = "" if args.stage == "tests" else ": --small rehearses on a CPU"
        raise BadArgument(f"{args.stage} needs a GPU, and there is none here{remedy}")
    say(f"{args.stage} on {device}")
    STAGES[args.stage](Where(device, Lines(*args.lines), args.small))


if __name__ == "__main__":
    sys.exit(main())
