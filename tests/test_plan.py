"""A plan tells what a run takes: evaluations and FLOPs exactly, memory within 15%."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_transformers import FLUX, SD3_TINY
from tiny import QUICK_UNET, QUICK_VAE, Tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cutdiff
from cutdiff.bench.__main__ import SMALL_UNET
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import random_model
from cutdiff.given.regions import Region
from cutdiff.models.backbone import Shape
from cutdiff.plan import main
from cutdiff.planning.forecast import SDXL, decoding, outline, sized, walk, weight_bytes
from cutdiff.planning.meter import Meter
from cutdiff.settings import Settings
from cutdiff.specs import METHODS, SOLVERS

UNET = replace(
    QUICK_UNET, channels=(16, 32, 32), transformer_layers=(0, 1, 3), mid_transformer_layers=2, num_heads=(2, 4, 4)
)
CPU = torch.device("cpu")


def sizes_of(model: Model) -> Model:
    """The same model on the meta device."""
    return sized(SDXL._replace(network=model.unet.config, vae=model.vae.config, noise=model.noise), model.dtype)


@pytest.fixture(scope="module")
def small() -> Model:
    return random_model(UNET, QUICK_VAE, CPU)


@pytest.fixture(scope="module")
def sdxl() -> Model:
    return outline(None, "bfloat16")


# ---- Counts


CASES: list[tuple[int, int, dict[str, Any]]] = [
    (128, 128, {"num_steps": 3}),
    (200, 104, {"num_steps": 3, "guidance_interval": (0.2, 0.7)}),
    (72, 128, {"num_steps": 2, "guidance_scale": 1.0}),
    (64, 64, {"num_steps": 1}),
    (
        *(64, 128),
        {
            "num_steps": 3,
            "bootstrapping": 0.5,
            "regions": [Region("a", (0, 0, 0.5, 1)), Region("b", (0.25, 0, 1, 0.5))],
        },
    ),
]


@pytest.mark.parametrize(("height", "width", "options"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_counts_of_every_step_are_those_of_the_run(
    method: str, height: int, width: int, options: dict[str, Any], small: Model
) -> None:
    assert_counted(small, Settings(method=method, height=height, width=width, **options))


def assert_counted(model: Model, settings: Settings) -> None:
    """Attention is counted by its formula, because torch's counter does not know the CPU's kernel."""
    flops, stages = [0], []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:

        def hear(step: cutdiff.Step, _num_steps: int) -> None:
            flops.append(counter.get_total_flops())
            stages.append(step.stage)

        record = cutdiff.generate(model, "", settings, on_step=hear).record
    planned = walk(sizes_of(model), settings)
    costs = [cost for stage in planned.stages for cost in stage.steps]
    assert [stage.name for stage in planned.stages for _ in stage.steps] == stages
    assert [cost.flops for cost in costs] == [b - a for a, b in pairwise(flops)]
    assert sum(cost.evaluations for cost in costs) == record["network_evaluations"]


@pytest.mark.parametrize("method", ["direct", "cutdiffusion", "magnify"])
@pytest.mark.parametrize(
    "config",
    [
        replace(FLUX, native_size=8, num_layers=2, num_single_layers=3),
        replace(FLUX, native_size=8, num_layers=1, num_single_layers=0, reads_guidance=False),
        replace(SD3_TINY, native_size=8, num_layers=5, dual_layers=(0, 1)),
    ],
    ids=["reads guidance", "guided", "SD3"],
)
def test_counts_of_transformers_whose_blocks_differ(config: Shape, method: str) -> None:
    assert_counted(random_model(config, QUICK_VAE, CPU), Settings(method=method, height=128, width=104, num_steps=3))


def test_flux_takes_what_arithmetic_on_its_layers_says() -> None:
    """4608 tokens, of which those of the text have layers of their own: 2 FLOPs for each weight of a token's way, and
    4·dim for each pair of tokens in each block."""
    planned = walk(outline("FLUX.1-dev", "bfloat16"), Settings(method="direct", height=1024, width=1024, num_steps=1))
    dim, tokens = 3072, 4096 + 512
    double, single = 12 * dim**2, (3 + 4 + 5) * dim**2
    expected = 2 * tokens * (19 * double + 38 * single) + (19 + 38) * 4 * dim * tokens**2
    assert planned.stages[0].total == (1, pytest.approx(expected, rel=0.01), 0)
    assert planned.peak_bytes == pytest.approx(2 * (11.9e9 + 4.88e9 + 0.08e9), rel=0.03)


@pytest.mark.parametrize(
    ("name", "weights", "preferred"),
    [
        ("flux.1-DEV", 11.9e9 + 4.88e9, {"guidance_scale": 3.5, "num_steps": 28}),
        ("FLUX.1-schnell", 11.89e9 + 4.88e9, {"guidance_scale": 1.0, "num_steps": 4}),
        ("SD3-medium", 2.03e9 + 5.58e9, {"guidance_scale": 7.0, "num_steps": 28}),
        ("sd3.5-medium", 2.24e9 + 5.58e9, {"guidance_scale": 7.0, "num_steps": 28}),
        ("SD3.5-Large", 8.06e9 + 5.58e9, {"guidance_scale": 7.0, "num_steps": 28}),
    ],
)
def test_published_transformers_in_any_case(name: str, weights: float, preferred: dict[str, Any]) -> None:
    model = outline(name, "bfloat16")
    assert model.preferred == preferred
    assert model.source.lower() == name.lower()
    assert weight_bytes(model) == pytest.approx(2 * (weights + 0.08e9), rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnify", "detail_guidance_scale": 4.0, "structure_fraction": 0.5},
        {"method": "cutdiffusion", "structure_fraction": 0.0, "stride": 2},
        {"method": "accdiffusion", "guidance_interval": (0.0, 0.5)},
    ],
)
def test_evaluations_are_those_of_a_run_with_prompts(options: dict[str, Any], tiny_model: Model) -> None:
    settings = Settings(height=128, width=192, num_steps=4, **options)
    record = cutdiff.generate(tiny_model, "a red house at night", settings).record
    planned = walk(sizes_of(tiny_model), settings)
    assert sum(stage.total.evaluations for stage in planned.stages) == record["network_evaluations"]


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        *(("direct", name) for name in SOLVERS),
        ("cutdiffusion", "heun"),
        ("magnify,hold=trajectory", "heun"),
        ("frecas", "dpmpp_sde"),
    ],
)
def test_every_solver_evaluates_the_network_as_often_as_planned(tiny_model: Model, method: str, solver: str) -> None:
    """Those too that take two estimates in a step, of which the guidance may be on for one alone."""
    options = {"method": method, "solver": solver, "num_steps": 5, "height": 128, "width": 96}
    for more in ({}, {"guidance_interval": (0.2, 0.6)}):
        settings = Settings(**options, **more)
        record = cutdiff.generate(tiny_model, "a red house", settings).record
        planned = sum(stage.total.evaluations for stage in walk(sizes_of(tiny_model), settings).stages)
        assert planned == record["network_evaluations"]
    twice = {"heun", "dpmpp_sde"}
    if method == "direct":
        assert record["network_evaluations"] == {True: 4 + 5 + 2 + 2, False: 2 + 5}[solver in twice]


@pytest.mark.parametrize(
    ("method", "side", "seconds"),
    [("cutdiffusion", 2048, 5.6), ("cutdiffusion", 4096, 27.8), ("direct", 2048, 4.6), ("demofusion", 2048, 12.0)],
)
def test_sdxl_takes_what_arithmetic_on_its_layers_says(method: str, side: int, seconds: float, sdxl: Model) -> None:
    """The seconds are for 790 TFLOP/s; keys and values of the text, computed once, spare 0.8%."""
    planned = walk(sdxl, Settings(method=method, height=side, width=side))
    assert sum(stage.total.flops for stage in planned.stages) / 790e12 == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (5, 7)])
def test_flops_of_decoding_are_counted(size: tuple[int, int], small: Model) -> None:
    latents = torch.zeros(1, 4, *size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small.vae.decode(latents)
    assert decoding(sizes_of(small), size).flops == counter.get_total_flops()


# ---- Memory


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_within_15_percent_of_what_lives_in_a_run(method: str) -> None:
    """It is the memory besides the weights, on a CPU, whose operators keep more than kernels do."""
    model = random_model(SMALL_UNET, QUICK_VAE, CPU)
    settings = Settings(method=method, height=256, width=192, num_steps=2, view_batch_size=4)
    with Meter() as meter:
        for _ in cutdiff.denoise(model, "", settings):
            pass
    planned = walk(sizes_of(model), settings).peak_bytes - weight_bytes(sizes_of(model))
    assert planned == pytest.approx(meter.peak_bytes, rel=0.15)


def test_a_product_with_a_dtype_of_its_own_is_counted() -> None:
    a, b = (torch.empty(3, 4, 4, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with Meter() as meter:
        torch.bmm(a, b, out_dtype=torch.float32)
    assert meter.flops == 2 * 3 * 4**3


@torch.no_grad()
def test_memory_of_decoding_is_what_lives(small: Model) -> None:
    sizes, latents = sizes_of(small), torch.zeros(1, 4, 32, 48)
    with Meter() as meter:
        small.vae.decode(latents)
    assert decoding(sizes, (32, 48)).peak_bytes - weight_bytes(sizes) == pytest.approx(meter.peak_bytes, rel=0.15)


@torch.no_grad()
def test_memory_of_decoding_in_bands_is_what_lives(sdxl: Model) -> None:
    latents = torch.empty(1, 4, 384, 384, dtype=torch.bfloat16, device="meta")
    with Meter() as meter:
        sdxl.vae.decode(latents)
    assert decoding(sdxl, (384, 384)).peak_bytes - weight_bytes(sdxl) == pytest.approx(meter.peak_bytes, rel=0.03)


def test_weights_are_those_of_the_networks(sdxl: Model) -> None:
    """SDXL-base has 6.94 GB of weights in 16 bits."""
    assert weight_bytes(sdxl) == pytest.approx(6.94e9, rel=1e-3)
    float16 = outline(None, "float16")
    assert float16.vae_dtype == torch.float32
    vae = sum(parameter.numel() for parameter in float16.vae.parameters())
    assert decoding(float16, (8, 8)).peak_bytes > weight_bytes(float16) + 4 * vae


def test_what_memory_does_not_hold_is_halved_as_a_run_halves_it(small: Model) -> None:
    model, settings = sizes_of(small), Settings(height=192, width=192, num_steps=4)
    whole = walk(model, settings)
    assert whole.view_batch_size is None
    memory = weight_bytes(model) + 0.6 * (whole.peak_bytes - weight_bytes(model))
    halved = walk(model, settings, memory=memory)
    assert halved.view_batch_size == 25 // 2
    assert halved.peak_bytes <= memory
    assert [stage.total for stage in halved.stages] == [stage.total for stage in whole.stages]
    assert walk(model, settings, memory=1).view_batch_size == 1


# ---- Devices


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32])
def test_the_busiest_device_has_its_share_and_is_sent_the_rest(devices: int, small: Model) -> None:
    """It has 18, 9, 5, 3, 2 and 1 of the 18 rows of nine views, also where there are more devices than rows."""
    settings = Settings(method="multidiffusion", height=128, width=128, num_steps=2)
    (stage,) = walk(sizes_of(small), settings, devices).stages
    mine, row_bytes = math.ceil(18 / devices), 4 * 8 * 8 * 4
    assert [cost.evaluations for cost in stage.steps] == [mine] * 2
    assert [cost.received_bytes for cost in stage.steps] == [(18 - mine) * row_bytes] * 2


def test_devices_share_what_has_a_prompt_of_its_own(small: Model) -> None:
    settings = Settings(method="accdiffusion", height=128, width=128, num_steps=2)
    one, four = (walk(sizes_of(small), settings, devices).stages[1].steps[1] for devices in (1, 4))
    assert (one.evaluations, four.evaluations) == (2 * (9 + 4), 5 + 2)
    assert four.flops < one.flops / 3


# ---- The command line


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def test_the_table_says_what_the_json_says(capsys: pytest.CaptureFixture[str], folder: Any, tiny: Tiny) -> None:
    arguments = ("--model", str(folder), "--dtype", "float32", "--devices", "4", "--steps", "4", "--bandwidth", "1e-6")
    plan = json.loads(told(capsys, *arguments, "--json"))
    network, (structure, detail) = plan["network"], plan["stages"]
    assert (structure["evaluations"], detail["evaluations"]) == (2 * 4 * 2, 2 * 9 * 2)
    for name in ("steps", "evaluations", "flops", "expected_s"):
        assert network[name] == structure[name] + detail[name]
    assert detail["expected_s"] == pytest.approx(detail["floor_s"] / 0.5 + detail["received_bytes"] / 1e3)
    held = sum(p.nbytes for network in (tiny.unet, tiny.vae, *tiny.text.encoders) for p in network.parameters())
    assert held < plan["peak_bytes"]["network"] < 1e9
    head, columns, *rows, decode, memory = told(capsys, *arguments).splitlines()
    assert head.startswith("cutdiffusion, ")
    assert head.endswith("4 devices of 790 TFLOP/s: computed, not measured")
    assert columns.split()[:3] == ["stage", "steps", "evaluations"]
    assert [row.split()[:3] for row in rows] == [
        ["structure", "2", "16"],
        ["detail", "2", "36"],
        ["network", "4", "52"],
    ]
    assert decode.startswith("decode")
    assert memory.startswith("memory of a device: ")


def test_the_largest_size_on_many_devices(capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(told(capsys, "--width", "32768", "--height", "32768", "--devices", "64", "--json"))
    assert plan["network"]["evaluations"] == 50 * (32**2 + 63**2)
    lines = told(capsys, "--width", "16384", "--height", "8192", "--method", "direct", "--memory", "40").splitlines()
    assert lines[-1].endswith("; more than the 40 GB that it has")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--width", "100"], 2, "--width 100 must be a multiple of 8"),
        (["--steps", "0"], 2, "argument --steps: 0 must be a whole number at least 1"),
        (["--steps", "2000"], 2, "--steps 2000 must be between 1 and the 1000 timesteps"),
        (["--devices", "0"], 2, "argument --devices: 0 must be a whole number in 1"),
        (["--utilisation", "2"], 2, "--utilisation 2.0 must be above 0, at most 1"),
        (["--tflops", "nan"], 2, "--tflops nan must be above 0"),
        (["--method", "magnfy"], 2, "did you mean 'magnify'?"),
        (
            ["--method", "direct", "--stride", "8"],
            2,
            "--stride is no option of method direct (none), solver euler (none)",
        ),
        (["--method", "magnify,strid=8"], 2, "did you mean 'stride'?"),
        (["--method", "nowhere:Mine"], 2, "there is no module 'nowhere'"),
        (["--model", "nowhere"], 2, "nowhere does not exist"),
        (["--model", "flux.1-devv"], 2, "FLUX.1-dev, FLUX.1-schnell, SD3-medium, SD3.5-medium, SD3.5-large are known"),
        (
            ["--control", "weights/scenes-control.safetensors", "--control-image", "hint.png"],
            1,
            "it is of a family of its own, and the model of SDXL: it has channels=(64, 128, 192) and the U-Net (320, ",
        ),
        (["--fit", "cover"], 2, "--fit 'cover' goes with --image: give that, or leave it out"),
        (["--feather", "16"], 2, "--feather 16 goes with --mask or --place: give that, or leave it out"),
        (["--model", "README.md"], 1, "README.md is no safetensors file"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str],
    status: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    Image.effect_noise((128, 128), 50).save(tmp_path / "hint.png")
    for folder in (request.config.rootpath, tmp_path):
        arguments = [str(folder / word) if (folder / word).is_file() else word for word in arguments]
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("cutdiff: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
