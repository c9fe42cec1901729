"""ControlNets in a run: their hints go the way of the canvas in every method, and count when they are to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from refusal import CommandLine
from safetensors.torch import load_file, save_file
from tiny import QUICK_UNET, SD15_TINY
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.control import load_control, save_control
from cutdiff.checkpoint.locate import embedded
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import randomise
from cutdiff.models import compiled
from cutdiff.models.config import UNetConfig
from cutdiff.models.controlnet import ControlNet, ControlNetConfig
from cutdiff.planning.forecast import walk
from cutdiff.sample import main
from cutdiff.sampling.controls import Control, Hint
from cutdiff.sampling.denoiser import Call, Observer
from cutdiff.sampling.edges import edges
from cutdiff.sampling.operators import Patches, Views
from cutdiff.sampling.resize import resize
from cutdiff.settings import Settings
from cutdiff.specs import METHODS

WIDTHS = (4, 4, 4, 8)


def random_control(unet: UNetConfig, seed: int = 0, widths: tuple[int, ...] = WIDTHS) -> ControlNet:
    network = ControlNet(ControlNetConfig(unet, widths))
    randomise(network, seed)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def control(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a random ControlNet for `tiny_model`."""
    path = tmp_path_factory.mktemp("controls") / "edges.safetensors"
    save_control(path, random_control(tiny_model.unet.config))
    return path


def hint(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(values)


def as_tensor(picture: PIL.Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@dataclass
class Hints(Observer):
    """The rows' hints of every call."""

    calls: list[Call]

    def call(self, call: Call, prediction: Tensor) -> None:
        self.calls.append(call)


def test_a_view_has_the_part_of_the_hint_that_it_shows(tiny_model: Model, control: Path) -> None:
    picture, heard = hint(96, 128), Hints([])
    options: dict[str, Any] = {"method": "multidiffusion", "num_steps": 1, "stride": 3, "view_batch_size": 4}
    cutdiff.generate(tiny_model, "a", control=str(control), control_image=picture, observer=heard, **options)
    padded = F.pad(as_tensor(picture), (64, 64, 64, 64))[0]
    number = 0
    for call in heard.calls:
        operator, values = call.operator, call.inputs[5].values
        assert isinstance(operator, Views)
        assert values.shape[1:] == (3, 64, 64)
        for row, item in zip(values, call.items.tolist(), strict=True):
            top, left = (8 * operator.origins[0, item] + 64).tolist()
            assert torch.equal(row, padded[:, top : top + 64, left : left + 64])
            number += 1
    assert number > 20


def test_a_patch_has_the_whole_hint_at_its_own_size(tiny_model: Model, control: Path) -> None:
    picture, heard = hint(128, 192), Hints([])
    options: dict[str, Any] = {"num_steps": 1, "structure_fraction": 1.0, "view_batch_size": 4}
    cutdiff.generate(tiny_model, "a", control=str(control), control_image=picture, observer=heard, **options)
    small = F.interpolate(as_tensor(picture), (64, 64), mode="bilinear", antialias=True)[0]
    hints = [part for call in heard.calls for part in call.inputs[5:] if isinstance(part, Hint)]
    rows = [row for each in hints for row in each.values.unbind()]
    assert isinstance(heard.calls[0].operator, Patches)
    assert len(rows) == 12, "six patches, each with and without the prompt"
    for row in rows:
        torch.testing.assert_close(row, small)


def test_each_image_has_its_own_hint(tiny_model: Model, control: Path) -> None:
    both = torch.cat([as_tensor(hint(64, 128, seed)) for seed in (0, 1)])
    options: dict[str, Any] = {"method": "multidiffusion", "num_steps": 2, "control": str(control), "seed": 5}
    together = cutdiff.generate(tiny_model, ["a", "a"], control_image=both, **options).latents
    for i in range(2):
        alone = cutdiff.generate(tiny_model, "a", control_image=both[i], **{**options, "seed": 5 + i}).latents
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="control_image holds 2 pictures for 3 prompts"):
        cutdiff.generate(tiny_model, ["a"] * 3, control_image=both, **options)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_controlled(tiny_model: Model, control: Path, method: str) -> None:
    """At a scale near 0 nothing is added."""
    options: dict[str, Any] = {"method": method, "num_steps": 2, "height": 128, "width": 96, "seed": 1}
    plain = cutdiff.generate(tiny_model, "a red house", **options)
    options |= {"control": str(control), "control_image": hint(128, 96)}
    controlled = cutdiff.generate(tiny_model, "a red house", **options)
    assert controlled.latents.isfinite().all()
    assert (controlled.latents - plain.latents).norm() > 1e-3 * plain.latents.norm()
    assert controlled.record["network_evaluations"] == plain.record["network_evaluations"]
    nothing = cutdiff.generate(tiny_model, "a red house", control_scale=1e-9, **options)
    torch.testing.assert_close(nothing.latents, plain.latents, rtol=1e-4, atol=1e-4)


def test_a_control_counts_between_its_shares_of_the_steps(tiny_model: Model, control: Path) -> None:
    heard = Hints([])
    options: dict[str, Any] = {"method": "direct", "num_steps": 5, "control": [str(control)] * 2}
    pictures = [hint(64, 64), hint(64, 64, 1)]
    intervals = ((0, 0.4), (0.2, 1))
    cutdiff.generate(tiny_model, "a", control_image=pictures, control_interval=intervals, observer=heard, **options)
    shown = [[each.values[0] for each in call.inputs[5:]] for call in heard.calls]
    first, second = (as_tensor(picture)[0] for picture in pictures)
    assert [len(each) for each in shown] == [1, 2, 1, 1, 1]
    assert torch.equal(shown[0][0], first)
    assert torch.equal(shown[1][0], first)
    assert torch.equal(shown[1][1], second)
    assert torch.equal(shown[4][0], second)


def test_a_control_that_no_step_reads_is_told_of(
    quick_folder: Path, control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """magnify takes a given picture without its first steps, which the settings alone do not say."""
    hint(128, 128).save(tmp_path / "hint.png")
    command = ["a", "--model", str(quick_folder), "--device", "cpu", "--method", "magnify", "--steps", "4", "--out"]
    command += [str(tmp_path / "out"), "--control", str(control), "--control-image", str(tmp_path / "hint.png")]
    command += ["--image", str(tmp_path / "hint.png")]
    for interval, is_told in ((["0", "0.2"], True), (["0", "1"], False)):
        assert main([*command, "--control-interval", *interval]) == 0
        said = "the ControlNet of --control-interval 0 0.2 was not read: this method evaluates the network in none of"
        assert (said in capsys.readouterr().err) is is_told


def test_the_hint_says_the_size_where_an_image_is_given_too(tiny_model: Model, control: Path) -> None:
    """The other side of it too where one is given; only its own fits."""
    own: dict[str, Any] = {"control": str(control), "control_image": hint(64, 128), "image": hint(64, 64)}
    for given in ({}, {"width": 128}, {"height": 64}):
        assert Settings(**own, **given).canvas_size(8, 8) == (8, 16)


@torch.no_grad()
def test_several_add_up(tiny_model: Model, control: Path) -> None:
    """Two of one network and hint at scales that add up to 1 are that one."""
    options: dict[str, Any] = {"method": "multidiffusion", "num_steps": 2, "height": 64, "width": 96}
    one = cutdiff.generate(tiny_model, "a", control=str(control), control_image=hint(64, 96), **options).latents
    two = cutdiff.generate(
        tiny_model,
        "a",
        control=[str(control)] * 2,
        control_image=[hint(64, 96)] * 2,
        control_scale=(0.25, 0.75),
        **options,
    ).latents
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


def test_a_compiled_run_draws_the_same(tiny_model: Model, control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    options: dict[str, Any] = {"num_steps": 2, "control": str(control), "control_image": hint(128, 128)}
    made: list[object] = []
    real = compiled.compiled
    monkeypatch.setattr("cutdiff.pipeline.compiled", lambda net, **how: made.append(net) or real(net, **how))
    one, other = (cutdiff.generate(tiny_model, "a", compile=on, **options).latents for on in (False, True))
    assert [type(network).__name__ for network in made] == ["UNet", "ControlNet"]
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_planner_counts_the_control(tiny_model: Model, control: Path, quick_folder: Path) -> None:
    from cutdiff.planning.forecast import outline

    settings = Settings(method="multidiffusion", num_steps=4, height=128, width=128)
    controlled = Settings(
        method="multidiffusion",
        num_steps=4,
        control=str(control),
        control_image=hint(128, 128),
        control_interval=(0, 0.5),
    )
    plain = walk(outline(str(quick_folder), "float32"), settings)
    with_it = walk(outline(str(quick_folder), "float32"), controlled)
    flops, more = ([step.flops for step in each.stages[0].steps] for each in (plain, with_it))
    assert [a == b for a, b in zip(flops, more, strict=True)] == [False, False, True, True]
    share = (more[1] - flops[1]) / flops[1]
    assert 0.2 < share < 1.0, "the way down and the hint, but not the way up"
    weights = sum(p.nbytes for p in load_control(control, tiny_model).parameters())
    assert with_it.peak_bytes >= plain.peak_bytes + weights


def test_a_record_names_control_and_hint_by_what_is_in_them(
    quick_folder: Path, control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line: two of each; a picture that is finished is not drawn again, and with another hint it is."""
    hint(64, 96).save(tmp_path / "one.png")
    hint(64, 96, 1).save(tmp_path / "two.png")
    command = ["a", "--model", str(quick_folder), "--steps", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    for name, scale in (("one", "0.5"), ("two", "1.5")):
        command += ["--control", str(control), "--control-image", str(tmp_path / f"{name}.png")]
        command += ["--control-scale", scale, "--control-interval", "0", "0.5"]
    assert main(command) == 0
    (path,) = capsys.readouterr().out.split()
    record = json.loads(Path(path).with_suffix(".json").read_text())
    assert path.endswith("cutdiffusion-96x64-seed0.png"), "the hint says the size"
    assert [each["name"] for each in record["control"]] == ["edges.safetensors"] * 2
    assert [each["name"] for each in record["control_image"]] == ["one.png", "two.png"]
    assert (record["control_scale"], record["control_interval"]) == ([0.5, 1.5], [[0, 0.5], [0, 0.5]])
    assert str(tmp_path) not in json.dumps(record)
    copy = control.with_name("other name.safetensors")
    copy.write_bytes(control.read_bytes())
    renamed = [str(copy) if word == str(control) else word for word in command]
    for again in (command, renamed):
        assert main(again) == 0
        assert "1 of 1 pictures are finished already" in capsys.readouterr().err
    assert main([*command[:-1], "0.6"]) == 0
    assert len([*(tmp_path / "out").glob("*.png")]) == 2


def test_a_line_of_prompts_has_its_own(
    quick_folder: Path, control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "edges.safetensors").write_bytes(control.read_bytes())
    hint(64, 64).save(tmp_path / "hint.png")
    lines = [
        {"prompt": "a", "control": "edges.safetensors", "control_image": "hint.png"},
        {"prompt": "a", "control": ["edges.safetensors"], "control_image": ["hint.png"], "control_scale": [1.0]},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\na --control edges.safetensors --control-image hint.png\n"
    (tmp_path / "prompts.txt").write_text(f"{text}a --control none.safetensors --control-image hint.png\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--model", str(quick_folder), "--steps", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    paths = [Path(path) for path in printed.out.split()]
    assert len(paths) == 3
    records = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    assert len({record["fingerprint"] for record in records}) == 1
    assert "line 4" in printed.err
    assert "none.safetensors does not exist" in printed.err


Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FILES: dict[str, tuple[Damage, str]] = {
    "control-lora": (lambda t: {**t, "lora_controlnet": torch.zeros(1)}, "a control-lora"),
    "difference": (lambda t: {**t, "difference": torch.zeros(1)}, "its difference from SD 1.5"),
    "union": (lambda t: {**t, "task_embedding": torch.zeros(6, 1)}, "a union of ControlNets"),
    "LLLite": (lambda t: {"lllite_unet_conv": torch.zeros(1)}, "a ControlNet-LLLite"),
    "T2I-Adapter": (lambda t: {"adapter.body.0.weight": torch.zeros(1)}, "a T2I-Adapter"),
    "LoRA": (lambda t: {"lora_unet_a.lora_up.weight": torch.zeros(1, 1)}, "no ControlNet: it is a LoRA"),
    "nothing": (lambda t: {}, "no ControlNet: it is no checkpoint"),
    "incomplete": (lambda t: {k: v for k, v in t.items() if "mid_block.res" not in k}, "the file is incomplete"),
    "another size": (
        lambda t: {**t, "controlnet_mid_block.bias": torch.zeros(3)},
        "1 of another shape: controlnet_mid_block.bias (3,)",
    ),
    "depth of a hint": (
        lambda t: {**t, "controlnet_cond_embedding.conv_in.weight": torch.zeros(4, 1, 3, 3)},
        "its hint has 1 channels",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none(name: str, control: Path, quick_folder: Path, command_line: CommandLine) -> None:
    damage, message = FILES[name]
    path, picture = command_line.out.parent / "given.safetensors", command_line.out.parent / "hint.png"
    save_file(damage(load_file(control)), path)
    hint(64, 64).save(picture)
    arguments = ["a", "--model", quick_folder, "--control", path, "--control-image", picture]
    command_line.refuses(arguments, 1, f"--control {path}", message)


@pytest.mark.parametrize(
    ("unet", "widths", "message"),
    [
        (SD15_TINY, WIDTHS, "own: it has channels=(32, 64, 64, 64) and the U-Net (16, 32)"),
        (replace(QUICK_UNET, context_dim=30), WIDTHS, "context_dim=30 and the U-Net 128"),
        (replace(QUICK_UNET, context_dim=128), (4, 4, 8), "its hint has 4 pixels for a latent, and the model's VAE 8"),
    ],
)
def test_a_control_of_another_family(
    unet: UNetConfig, widths: tuple[int, ...], message: str, quick_folder: Path, command_line: CommandLine
) -> None:
    path, picture = command_line.out.parent / "given.safetensors", command_line.out.parent / "hint.png"
    save_control(path, random_control(unet, widths=widths))
    hint(64, 64).save(picture)
    arguments = ["a", "--model", quick_folder, "--control", path, "--control-image", picture]
    command_line.refuses(arguments, 1, f"--control {path}", message, "made for this model's family")


BAD: dict[str, tuple[list[str], str]] = {
    "no hint": (["--control", "edges.safetensors"], "--control edges.safetensors has no hint: give --control-image"),
    "one hint for two": (
        ["--control", "edges.safetensors", "--control", "edges.safetensors", "--control-image", "hint.png"],
        "--control-image hint.png has 1 for 2 of control: give one with each",
    ),
    "a hint alone": (["--control-image", "hint.png"], "--control-image 'hint.png' goes with --control"),
    "a scale alone": (["--control-scale", "1"], "--control-scale 1.0 goes with --control"),
    "scale": (
        ["OK", "--control-scale", "11"],
        "--control-scale 11.0 must be a finite number in 0 … 10",
    ),
    "scale 0": (["OK", "--control-scale", "0"], "--control-scale 0.0 would evaluate a ControlNet for nothing: leave"),
    "one scale of 0": (
        ["OK", "OK", "--control-scale", "1", "--control-scale", "0"],
        "--control-scale 1.0, 0.0 would evaluate a ControlNet for nothing",
    ),
    "scale below 0": (["OK", "--control-scale", "-0.5"], "--control-scale -0.5 must be"),
    "scale NaN": (["OK", "--control-scale", "nan"], "--control-scale"),
    "two scales": (
        ["OK", "--control-scale", "1", "--control-scale", "1"],
        " 1.0, 1.0 has 2 for 1 of control",
    ),
    "interval": (["OK", "--control-interval", "0.5", "1.5"], "--control-interval"),
    "interval backwards": (["OK", "--control-interval", "0.5", "0.2"], "--control-interval 0.5,0.2 must be two shares"),
    "empty interval": (["OK", "--control-interval", "0.5", "0.5"], "0 ≤ from < to ≤ 1"),
    "one end": (["OK", "--control-interval", "0.5"], "--control-interval"),
    "size": (["OK", "--width", "64", "--height", "64"], "--control-image hint.png has 96×64 pixels, and the picture"),
    "one value": (
        ["--control", "edges.safetensors", "--control-image", "gray.png"],
        "--control-image gray.png has one value throughout",
    ),
    "no picture": (["--control", "edges.safetensors", "--control-image", "edges.safetensors"], "has no format"),
    "no file": (
        ["--control", "no.safetensors", "--control-image", "hint.png"],
        "--control no.safetensors does not exist",
    ),
    "a whole model": (
        ["--control", str(embedded("weights/scenes")), "--control-image", "hint.png"],
        "scenes: no ControlNet: it is a whole model: pass a ControlNet",
    ),
    "a U-Net": (
        ["--control", str(embedded("weights/scenes") / "unet"), "--control-image", "hint.png"],
        "unet: no ControlNet: it is of 'UNet2DConditionModel': pass a ControlNet",
    ),
    "a U-Net's file": (
        ["--control", str(next(embedded("weights/scenes").glob("unet/*.safetensors"))), "--control-image", "hint.png"],
        ".safetensors: no ControlNet: it is one network in the diffusers layout: pass a ControlNet",
    ),
    "empty name": (["--control", "", "--control-image", "hint.png"], "--control '' must be a file or a folder"),
    "a picture for a network": (["--control", "hint.png", "--control-image", "hint.png"], "--control hint.png"),
    "a hint without a name": (
        ["--control", "edges.safetensors", "--control-image", ""],
        "'' names no file",
    ),
    "an interval between two steps": (
        ["OK", "--steps", "10", "--control-interval", "0.51", "0.59"],
        "--control-interval 0.51,0.59 holds none of the 10 steps that are taken, at 0, 0.1, … 0.9, so",
    ),
    "an interval before the steps of img2img": (
        ["OK", "--steps", "10", "--control-interval", "0", "0.6", "--image", "hint.png", "--strength", "0.4"],
        "--control-interval 0,0.6 holds none of the 4 steps that are taken, at 0.6, 0.7, … 0.9, so that the "
        "ControlNet would not count: widen it, or give a greater strength",
    ),
    "an odd hint": (
        ["--control", "edges.safetensors", "--control-image", "odd.png"],
        "--control-image odd.png has 92×61 pixels, and its height must be a multiple of 8; try 56 or 64",
    ),
    "an odd hint beside an image": (
        ["--control", "edges.safetensors", "--control-image", "odd.png", "--image", "hint.png", "--width", "96"],
        "--control-image odd.png has 92×61 pixels, and its height must be a multiple of 8",
    ),
    "a hint and half of another size": (["OK", "--width", "64"], "--control-image hint.png has 96×64 pixels, and the"),
}
BAD_HINTS = ("a whole model", "a U-Net", "a U-Net's file", "one value", "no picture", "a picture for a network")
"""The input of which a file is no good."""


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, control: Path, quick_folder: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = command_line.out.parent
    monkeypatch.chdir(folder)
    (folder / "edges.safetensors").write_bytes(control.read_bytes())
    hint(64, 96).save(folder / "hint.png")
    hint(61, 92).save(folder / "odd.png")
    PIL.Image.new("RGB", (96, 64), "gray").save(folder / "gray.png")
    arguments, message = BAD[name]
    status = 1 if name in BAD_HINTS else 2
    usable = ["--control", "edges.safetensors", "--control-image", "hint.png"]
    given = [word for each in arguments for word in (usable if each == "OK" else [each])]
    command_line.refuses(["a", "--model", quick_folder, *given], status, message)


def test_items_without_a_canvas_have_no_hints(tiny_model: Model, control: Path) -> None:
    def cut_by_hand(run: Any) -> list[Any]:
        from cutdiff.sampling.stages import Stage

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            left, right = x.chunk(2, dim=3)
            halves = run.denoiser(torch.cat([left, right]), sigma, step)
            return torch.cat([*halves.chunk(2)], dim=3)

        return [Stage("halves", range(run.num_steps), denoise)]

    with pytest.raises(ValueError, match="2 items of 1 images have none"):
        cutdiff.generate(
            tiny_model, "a", method=cut_by_hand, num_steps=1, control=str(control), control_image=hint(64, 128)
        )


def test_a_hint_is_resized_once_for_a_size(tiny_model: Model) -> None:
    network = random_control(tiny_model.unet.config)
    control = Control(network, as_tensor(hint(128, 128)))
    small = control.at((8, 8))
    assert small.shape == (1, 3, 64, 64)
    assert control.at((8, 8)) is small
    assert torch.equal(control.at((16, 16)), control.hint)


def test_accdiffusion_v2_draws_views_by_the_edges_of_the_phase_before(tiny_model: Model, control: Path) -> None:
    heard = Hints([])
    options: dict[str, Any] = {"num_steps": 2, "height": 192, "width": 128, "control": str(control), "observer": heard}
    steps = [*cutdiff.denoise(tiny_model, "a red house", method="accdiffusion,hints=edges", **options)]
    sizes = {2: (16, 10), 4: (24, 16)}
    assert [tuple(step.latents.shape[2:]) for step in steps[1::2]] == [(8, 5), *sizes.values()]
    for call in heard.calls:
        assert len(call.inputs) == (6 if isinstance(call.operator, Views) else 5), "neither phase 1 nor patches"
    for first, (height, width) in sizes.items():
        previous = cutdiff.decode(tiny_model, steps[first - 1].latents)
        hints = resize(edges(previous, 0.6), (8 * height, 8 * width), "bilinear")
        padded = F.pad(hints, (64, 64, 64, 64))[0]
        views = [call for call in heard.calls if call.step in (first, first + 1) and isinstance(call.operator, Views)]
        assert views
        for call in views:
            operator, hint = call.operator, call.inputs[5]
            assert isinstance(operator, Views)
            for row, item in zip(hint.values, call.items.tolist(), strict=True):
                top, left = (8 * operator.origins[0, item] + 64).tolist()
                rows, columns = row.shape[1:]
                torch.testing.assert_close(row, padded[:, top : top + rows, left : left + columns])


def test_edges_are_cannys() -> None:
    """OpenCV's Canny finds the same pixels in these pictures, as many as here."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    disc = ((x - 8).square() + (y - 9).square() < 30).float()
    lines = edges((0.3 + 0.5 * disc)[None, None].expand(1, 3, -1, -1), 0.6)
    assert lines.shape == (1, 3, 24, 24)
    assert set(lines.unique().tolist()) == {0.0, 1.0}
    assert lines[0, 0].sum() == 40
    assert not lines[0, 0, 9, 8], "nothing lies inside of the disc"
    noise = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(1))
    assert edges(noise, 0.33)[:, 0].sum((1, 2)).tolist() == [743, 743]
    assert not edges(torch.full((1, 3, 8, 8), 0.5), 0.6).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "accdiffusion,hints=edges"}, "hints='edges' are for a ControlNet"),
        (
            {"method": "accdiffusion,hints=edges", "control": "a", "control_image": np.eye(64)},
            "control_image=pixels is not for accdiffusion, which makes hints itself: leave it out",
        ),
        ({"method": "accdiffusion,edge_spread=0.5"}, "edge_spread=0.5 is for hints='edges'"),
        ({"method": "accdiffusion", "control": "a"}, "control=a has no hint: give control_image"),
    ],
)
def test_hints_that_a_method_makes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**options)
