"""The bench: its proofs before it times, its counts, and its command line. The baselines' arithmetic is in
test_published_loop.py."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import QUICK_UNET, QUICK_VAE
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import cutdiff
from cutdiff.bench import __main__ as command
from cutdiff.bench.baselines import PublishedLoop, make_baselines
from cutdiff.bench.measure import PARTS, STAGES, Ours, Timing, count_flops, timed, unet_flops
from cutdiff.bench.parity import NotEqual, prove, prove_again
from cutdiff.bench.report import summary, table
from cutdiff.bench.variants import check_variant, variant
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import cast, network_inputs, random_model
from cutdiff.models.config import SDXL_UNET
from cutdiff.models.fused import FusedGEGLU, FusedGroupNorm
from cutdiff.models.layers import channels_last
from cutdiff.models.unet import as_unet
from cutdiff.planning.meter import Meter
from cutdiff.settings import Settings

CPU = torch.device("cpu")
SIZE = (16, 16)
SETTINGS = Settings(height=128, width=128)


@pytest.fixture
def small() -> Model:
    return random_model(QUICK_UNET, QUICK_VAE, CPU)


def pair(model: Model) -> tuple[Ours, PublishedLoop]:
    return Ours(model, SETTINGS), make_baselines(model, ["a"], SIZE)["a"]


def test_both_sides_hold_the_same_weights_once_and_compute_the_same(small: Model) -> None:
    """The compiled loop has convolutions of its own, in channels_last."""
    ours, theirs = pair(small)
    compiled = make_baselines(small, ["d"], SIZE)["d"].unet
    for name, weight in small.unet.named_parameters():
        assert theirs.unet.get_parameter(name).data_ptr() == weight.data_ptr()
        assert compiled.get_parameter(name).equal(weight)
        assert weight.ndim < 4 or compiled.get_parameter(name).is_contiguous(memory_format=torch.channels_last)
    assert max(prove(small, ours, theirs).values()) <= 1e-5


def test_one_wrong_weight_is_caught_whichever_it_is(small: Model) -> None:
    ours, theirs = pair(small)
    unread = ("encoder", "quant_conv", "decoder.mid_block.attentions.0.to_k.bias")  # the last cancels in the softmax
    decoding = [weight for name, weight in theirs.vae.named_parameters() if not name.startswith(unread)]
    for weight in [*theirs.unet.parameters(), *decoding]:
        right = weight.data
        weight.data = right + 0.1 * torch.randn(right.shape, generator=torch.Generator().manual_seed(0))
        with pytest.raises(NotEqual, match=r"in float32 differs from diffusers' by .*: nothing was timed"):
            prove(small, ours, theirs)
        weight.data = right


def test_an_output_that_is_not_a_number_is_no_parity(small: Model) -> None:
    ours, theirs = pair(small)
    theirs.unet.conv_out.bias = nn.Parameter(torch.full((4,), math.nan))
    with pytest.raises(NotEqual, match="unet in float32 differs"):
        prove(small, ours, theirs)
    with pytest.raises(NotEqual, match="unet of a in float32 differs"):
        prove_again(small, "a", ours, theirs, rows=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_run_in_low_precision(small: Model, dtype: torch.dtype) -> None:
    """float16 decodes in float32, as SDXL's VAE must."""
    ours, theirs = pair(cast(small, dtype))
    assert prove_again(small, "a", ours, theirs, rows=2) < 1e-2
    for contestant in (ours, theirs):
        assert min(timed(contestant, 2, CPU).seconds.values()) > 0
    assert theirs.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_the_compiled_loop_is_captured_whole_and_ends_in_the_same_latents(
    small: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop is tested as dynamo captures it, whatever a backend makes of that."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    loops = make_baselines(small, ["c", "d"], SIZE)
    (*_, (_, plain)), (*_, (_, compiled)) = (loop.steps(2) for loop in loops.values())
    assert ((compiled - plain).norm() / plain.norm()).item() < 1e-4
    assert loops["d"].unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert as_unet(small.unet).conv_in.weight.is_contiguous()


@pytest.mark.parametrize("num_steps", [4, 5])
def test_flops_are_those_of_the_evaluations_that_a_run_takes(small: Model, num_steps: int) -> None:
    flops = count_flops(QUICK_UNET, QUICK_VAE, SIZE, num_steps)
    record = cutdiff.generate(small, "", SETTINGS, num_steps=num_steps).record
    assert flops["network"] == sum(flops[stage] for stage in STAGES)
    assert flops["network"] == record["network_evaluations"] * unet_flops(QUICK_UNET)


def test_flops_of_sdxl_are_those_of_its_layers_with_attention() -> None:
    """Without attention's two products, SDXL is known to take 5.98 TFLOP at 1024²."""
    scores = 0.0
    for level, blocks in ((1, 5 * 2), (2, 5 * 10 + 10)):
        tokens, width = (SDXL_UNET.native_size >> level) ** 2, SDXL_UNET.channels[level]
        scores += blocks * 4 * width * tokens * (tokens + 77)
    assert (unet_flops(SDXL_UNET) - scores) / 1e12 == pytest.approx(5.98, abs=0.02)


class Fake:
    """A contestant that ends in given latents."""

    what = "fake"
    unet = vae = nn.Identity()

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def predict(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def steps(self, num_steps: int) -> Iterator[tuple[str, Tensor]]:
        for i in range(num_steps):
            yield STAGES[2 * i // num_steps], self.latents

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def test_latents_that_are_not_finite_are_not_timed() -> None:
    timed(Fake(torch.zeros(1, 4, 8, 8)), 2, CPU)
    with pytest.raises(FloatingPointError, match="latents that were timed hold NaN or infinity"):
        timed(Fake(torch.full((1, 4, 8, 8), math.nan)), 2, CPU)


def timing(structure: float, detail: float) -> Timing:
    seconds = {"structure": structure, "detail": detail, "network": structure + detail, "decode": 1.0}
    return Timing(seconds, {"network": None, "decode": None})


def test_ratios_are_medians_over_the_rounds_and_the_floor_is_flops_at_the_peak() -> None:
    """A slow round, in which everything takes three times as long, changes no ratio."""
    ours = [timing(1, 1), timing(3, 3), timing(1, 1)]
    others = [timing(2, 3), timing(6, 9), timing(4, 4)]
    flops = {"structure": 10.0, "detail": 10.0, "network": 20.0, "decode": 5.0}
    numbers = summary({"cutdiff": ours, "a": others}, flops, peak_flops=40.0)
    assert numbers["a"]["times_ours"]["network"] == {"median": 2.5, "least": 2.5, "most": 4.0}
    assert numbers["a"]["times_ours"]["structure"]["median"] == 2.0
    assert numbers["cutdiff"]["seconds"]["network"] == {"median": 2, "least": 2, "most": 6}
    assert numbers["cutdiff"]["flops_per_s"] == 10.0
    assert numbers["cutdiff"]["times_floor"] == 4.0
    about = {name: {"what": name, "first_run_s": 1.0, **row} for name, row in numbers.items()}
    lines = table({"contestants": about, "flops": flops, "peak_flops_per_s": 40.0}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["cutdiff", "a: a", "floor"]
    assert "| 2.50 [2.50 – 4.00] |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


SMALLEST = ["--small", "--size", "128", "--steps", "2", "--repeats", "2", "--matmul", "64", "--device", "cpu"]


def test_the_command_line_compares_times_and_writes_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    assert command.main([*SMALLEST, "--only", "a", "c", "--json", str(path)]) == 0
    numbers = json.loads(path.read_text())
    assert list(numbers["contestants"]) == ["cutdiff", "a", "c"]
    for row in numbers["contestants"].values():
        assert [set(run["seconds"]) for run in row["runs"]] == [set(PARTS)] * 2
        assert min(run["seconds"][part] for run in row["runs"] for part in PARTS) > 0
        assert row["difference"] <= 1e-5
        assert row["first_run_s"] > 0
    assert max(numbers["parity"].values()) <= 1e-5
    assert numbers["command"][:4] == ["python", "-m", "cutdiff.bench", "--small"]
    assert {"cpu", "torch", "python", "cutdiff", "diffusers"} <= set(numbers["hardware"])
    assert numbers["precision"]["dtype"] == "float32"
    assert (numbers["peak_flops_per_s"] > 0) & (numbers["resident_peak_bytes"] > 0)
    out = capsys.readouterr().out
    assert "small network, random weights; 128² px, 2 steps, 2 rounds; float32" in out
    assert "| c: b, vectorised draw, cache kept |" in out


def test_numbers_are_kept_as_soon_as_they_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round never ends; all of the first one, and what went before, is there."""
    runs = []

    def once(contestant: Any, num_steps: int, device: torch.device) -> Timing:
        runs.append(contestant)
        if len(runs) > 4:  # two first runs, and a round
            raise FloatingPointError("made up")
        return timed(contestant, num_steps, device)

    monkeypatch.setattr(command, "timed", once)
    path = tmp_path / "numbers.jsonl"
    assert command.main([*SMALLEST, "--only", "a", "--lines", str(path), "pictures"]) == 1
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert {line["stage"] for line in lines} == {"pictures"}
    numbers = {(line["of"], line["name"], line.get("round")): (line["value"], line["unit"]) for line in lines}
    assert numbers["a", "first_run", None][1] == "s"
    assert numbers["product of matrices", "rate", None][1] == "FLOP/s"
    times = {name: numbers[name, "network", 1] for name in ("cutdiff", "a")}
    assert numbers["a", "times cutdiff", 1][0] == times["a"][0] / times["cutdiff"][0]
    assert {unit for _, unit in times.values()} == {"s"}
    assert max(key[2] or 0 for key in numbers) == 1


def test_the_whole_canvas_at_once_has_flops_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert command.main([*SMALLEST, "--size", "256", "--only", "--also", "direct", "--json", str(path)]) == 0
    numbers = json.loads(path.read_text())
    settings = Settings(method="direct", height=256, width=256)
    model = random_model(command.SMALL_UNET, command.SMALL_VAE, CPU)
    with Meter() as meter:
        list(cutdiff.denoise(model, "", settings, num_steps=2))
    assert numbers["flops"]["direct"] == pytest.approx(meter.flops, rel=0.01)
    row = numbers["contestants"]["direct"]
    assert row["flops_per_s"] == numbers["flops"]["direct"] / row["seconds"]["network"]["median"]
    assert "| cutdiff, direct | – | – |" in capsys.readouterr().out


def test_ours_in_8_bits_is_one_more_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert command.main([*SMALLEST, "--only", "--also", "fp8", "--json", str(path)]) == 0
    row = json.loads(path.read_text())["contestants"]["fp8"]
    assert 1e-3 < row["difference"] < 0.1
    assert "| cutdiff, fp8 |" in capsys.readouterr().out


class Operators(TorchDispatchMode):
    """The names of the contestants that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_attention_is_that_of_the_backend_asked_for(small: Model, backend: SDPBackend) -> None:
    contestant = Ours(small, SETTINGS, attention=[backend])
    with Operators() as whole:
        list(contestant.steps(2))
    with Operators() as once:
        contestant.predict(*network_inputs(small, 2))
    for ran in (whole, once):
        fused = any("flash_attention" in name for name in ran.names)
        assert fused == (backend == SDPBackend.FLASH_ATTENTION)


def test_flash_attention_comes_first_in_its_variant_alone(small: Model) -> None:
    def first() -> str:
        return SDPBackend(torch._C._get_sdp_priority_order()[0]).name

    inside = []
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        contestant = variant("flash", small, SETTINGS)
        with contestant.model.unet.conv_in.register_forward_pre_hook(lambda *_: inside.append(first())):
            contestant.predict(*network_inputs(small, 2))
        assert first() == "MATH"
    assert inside == ["FLASH_ATTENTION"]
    with pytest.raises(ValueError, match="a compiler keeps the attention that it saw first"):
        check_variant("flash", torch.device("cuda"), torch.bfloat16, compiled=True)


def test_each_variant_of_layers_changes_what_it_names(small: Model) -> None:
    """A copy has one kind alone of the norms and gates, or the layout that a GPU's network does not have."""
    channels_last(small.unet)
    kinds = {}
    for name in ("fused", "fused-norm", "fused-gate", "contiguous"):
        unet = variant(name, small, SETTINGS).model.unet
        modules = [type(module) for module in unet.modules()]
        kinds[name] = FusedGroupNorm in modules, FusedGEGLU in modules, as_unet(unet).conv_in.weight.is_contiguous()
    assert kinds == {
        "fused": (True, True, False),
        "fused-norm": (True, False, False),
        "fused-gate": (False, True, False),
        "contiguous": (False, False, True),
    }
    assert not any(isinstance(module, FusedGroupNorm | FusedGEGLU) for module in small.unet.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "200"], "--size 200 must be a multiple of 128, the native size: so the loop has it"),
        (["--steps", "1"], "--steps 1 must be at least 2"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--view-batch-size", "0"], "--view-batch-size 0 must be at least 1"),
        (["--steps", "1001"], "--steps 1001 must be between 1 and the 1000 timesteps"),
        (["--size", "40960"], "--height 40960 must be a positive multiple of 8, at most 32768"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json cannot be written, its folder does not exist"),
        (["--also", "graphs"], "--also graphs: only a GPU has it, and the device is cpu: leave it out"),
        (["--also", "flash"], "--also flash: only a GPU has it, and the device is cpu: leave it out"),
        (["--also", "eager"], "--also eager: the sampler is not compiled anyway: add --compile"),
        (["--compile", "--also", "fp8", "fused"], "--also fp8 fused: with --compile one at a time"),
        (["--lines", "/nowhere/x.jsonl", "a"], "--lines /nowhere/x.jsonl cannot be written, its folder does not"),
        (["--only", "e"], "argument --only: 'e' is not one of a, b, c, d (see --help)"),
        (["--sizes", "2048"], "--sizes is no option: did you mean '--size'? (see --help)"),
    ],
)
def test_an_argument_that_cannot_be_used_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.main([*SMALLEST, *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"cutdiff: {message}")
    assert told.count("\n") == 1


def test_without_diffusers_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(command, "import_module", missing)
    assert command.main(SMALLEST) == 1
    assert capsys.readouterr().err == 'cutdiff: the baselines need diffusers: pip install -e ".[bench]"\n'


def test_without_baselines_no_diffusers_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "cutdiff.bench.baselines")
    assert command.main([*SMALLEST, "--only", "--also", "fp8"]) == 0
    out = capsys.readouterr().out
    assert "not compared with diffusers' networks, as no baseline runs" in out
    assert "| cutdiff, fp8 |" in out


def test_networks_that_differ_end_the_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cutdiff.bench.parity.TOLERANCE", -1.0)
    assert command.main([*SMALLEST, "--only", "a"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("past -1e+00: nothing was timed")
