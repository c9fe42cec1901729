"""Inpainting models, whose U-Net reads a mask and a masked picture beside the state: read, shown, planned."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from tiny import Tiny, assert_bit_equal, random_model, relative_error, with_nine
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.families import SD15, SDXL
from cutdiff.checkpoint.model import Model
from cutdiff.pipeline import prepare
from cutdiff.sampling.denoiser import Call, Denoiser, Span
from cutdiff.sampling.masks import GREY, MaskedPicture
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.operators import Operator, Patches
from cutdiff.settings import Settings
from cutdiff.specs import METHODS

PROMPT = "a red house at night"


@pytest.fixture(scope="module", params=[SDXL, SD15], ids=lambda family: family.name)
def nine(request: pytest.FixtureRequest) -> Tiny:
    model = random_model(request.param)
    return replace(model, unet=with_nine(model.unet))


@pytest.fixture(scope="module")
def quick(tiny_model: Model) -> Model:
    """The quick model as one that inpaints."""
    return replace(tiny_model, unet=with_nine(tiny_model.unet))


class TestFiles:
    def test_a_folder(self, nine: Tiny, tmp_path: Path) -> None:
        """Diffusers takes it for an inpainting pipeline."""
        model = cutdiff.load(nine.save(tmp_path / "nine"))
        assert_bit_equal(model, nine)
        assert model.unet.config.inpaints
        name = f"StableDiffusion{'XL' if nine.family is SDXL else ''}InpaintPipeline"
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "nine", local_files_only=True)
        assert type(pipeline).__name__ == name

    @pytest.mark.parametrize("alone", [False, True])
    def test_a_single_file(self, nine: Tiny, alone: bool, tmp_path: Path) -> None:
        """The file is of the whole model, and of its U-Net alone beside a folder of four channels."""
        tensors = {key: value for key, value in nine.original().items() if not alone or "diffusion_model" in key}
        save_file(tensors, tmp_path / "nine.safetensors")
        folder = random_model(nine.family).save(tmp_path / "folder")
        model = cutdiff.load(tmp_path / "nine.safetensors", config=folder)
        assert_bit_equal(model, nine)
        assert model.unet.config.in_channels == 9


@pytest.mark.parametrize("strength", [1.0, 0.6])
@torch.no_grad()
def test_diffusers_draws_the_same(nine: Tiny, strength: float, tmp_path: Path) -> None:
    """From the same noise, picture and mask, whose border does not follow the latents'. The encoder's distribution is
    narrow, as diffusers draws a sample of it."""
    vae = deepcopy(nine.vae)
    weight, bias = vae.quant_conv.parameters()
    weight[4:], bias[4:] = 0, -30
    folder = replace(nine, vae=vae).save(tmp_path / "nine", noise=NoiseConfig())
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    model = cutdiff.load(folder)
    side = 12 * model.factor
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype="u1")
    mask = np.zeros((side, side), dtype="u1")
    mask[5 : side // 2 + 3, 9:-7] = 255
    how = {"height": side, "width": side, "guidance_scale": 5.0, "strength": strength}
    noise = cutdiff.Draws((3,)).noise((1, 4, 12, 12))
    ours = cutdiff.generate(
        model, "red", method="direct", num_steps=5, seed=3, image=picture, mask=mask, feather=0, **how
    )
    if strength < 1:  # it takes latents for a state as they are, of which the picture is a part already
        pipeline.scheduler.set_timesteps(5)
        sigma = float(pipeline.scheduler.sigmas[2])
        image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        noise = (cutdiff.encode(model, image) + sigma * noise) / pipeline.scheduler.init_noise_sigma
    theirs = pipeline(
        "red",
        image=Image.fromarray(picture),
        mask_image=Image.fromarray(mask),
        num_inference_steps=5,
        latents=noise,
        output_type="latent",
        **how,
    ).images
    assert relative_error(ours.latents, theirs) < 1e-5
    held = torch.from_numpy(mask == 0)
    assert torch.equal(ours.images[0][:, held], torch.from_numpy(picture).permute(2, 0, 1)[:, held] / 255)


class Echo(Denoiser):
    """The state itself is the masked picture: what the network is shown beside a row must be that row."""

    checked = 0

    def through(self, operator: Operator, canvas: Tensor, sigma: float, step: int, **how: Any) -> Tensor:
        shown = how.get("shown")
        source = canvas if shown is None else shown
        c_in, *_ = self.coefficients(sigma)

        def beside(size: tuple[int, int], span: Span) -> tuple[Tensor, Tensor]:
            assert size == canvas.shape[2:]
            assert all(0 < part <= whole for part, whole in zip(span, size, strict=True))
            return (source > 0).float(), source

        def network(call: Call) -> Tensor:
            state, mask, picture = call.inputs[0].split([4, 1, 4], dim=1)
            torch.testing.assert_close(picture * c_in, state)
            assert torch.equal(mask[:, 0] > 0, (state > 0).any(dim=1))
            Echo.checked += 1
            return self.evaluate(call.inputs) if self.network is None else self.network(call)

        plain = Denoiser(**{**vars(self), "beside": beside, "network": network})
        return plain.through(operator, canvas, sigma, step, **how)


@pytest.mark.parametrize("method", [*METHODS, "cutdiffusion,interaction=pixel", "cutdiffusion,structure=mean"])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (136, 200)])
def test_every_method_shows_mask_and_picture_where_the_state_is(
    quick: Model, method: str, height: int, width: int
) -> None:
    Echo.checked = 0
    settings = Settings(method=method, height=height, width=width, num_steps=2)
    *_, last = prepare(quick, PROMPT, settings, make_denoiser=Echo).steps
    assert last.latents.isfinite().all()
    assert Echo.checked > 1


@pytest.mark.parametrize(("structure", "span"), [("patches", (17, 25)), ("mean", (17 / 3, 25 / 4))])
def test_a_padded_canvas_says_how_much_of_it_is_the_picture(
    quick: Model, structure: str, span: tuple[float, float]
) -> None:
    spans: list[tuple[tuple[int, int], Span | None]] = []

    class Ear(Denoiser):
        def with_beside(self, inputs: Tensor, rows: Any, canvas: Tensor, span: Span | None) -> Tensor:
            spans.append(((canvas.shape[2], canvas.shape[3]), span))
            return super().with_beside(inputs, rows, canvas, span)

    options = {"method": f"cutdiffusion,structure={structure}", "height": 136, "width": 200, "num_steps": 1}
    list(prepare(quick, PROMPT, Settings(**options), make_denoiser=Ear).steps)
    assert spans == [({"patches": (18, 28), "mean": (6, 7)}[structure], span)]


@pytest.mark.parametrize("grain", ["channel", "pixel"])
def test_patches_that_exchange_pixels_take_the_mask_along(quick: Model, grain: str) -> None:
    """A pixel whose channels come from several patches has the mask of any."""
    draws = cutdiff.Draws((0,))
    permutation = draws.permutation(0, (2, 2), (1, 4, 8, 8), grain)
    operator, canvas = Patches((2, 2), permutation), draws.noise((1, 4, 16, 16))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:9, 5:12] = 1
    denoiser = replace(prepare(quick, PROMPT, Settings()).denoiser, beside=lambda size, span: (mask, canvas))
    rows = denoiser.rows_of(operator, 1.0, 0)._replace(copies=1)
    rows = denoiser.with_beside(operator.gather(canvas), rows, canvas, None)
    places = operator.gather(torch.arange(256.0).view(1, 1, 16, 16).expand(1, 4, -1, -1)).long()
    of_channels = mask.flatten()[places]
    assert torch.equal(rows[:, 4], of_channels.amax(dim=1))
    assert bool((of_channels.amin(dim=1) != of_channels.amax(dim=1)).any()) == (grain == "channel")
    assert torch.equal(rows[:, 5:], canvas[0, torch.arange(4)[None, :, None, None], places // 16, places % 16])


def test_from_the_text_alone_all_is_masked_and_grey(quick: Model) -> None:
    """As an inpainting pipeline whose mask is all white shows it."""
    rows: list[Tensor] = []

    class Ear(cutdiff.Observer):
        def call(self, call: Call, prediction: Tensor) -> None:
            rows.append(call.inputs[0])

    cutdiff.generate(quick, PROMPT, method="direct", height=64, width=72, num_steps=1, observer=Ear())
    grey = cutdiff.encode(quick, torch.full((1, 3, 64, 72), GREY))
    assert torch.equal(rows[0][:, 4], torch.ones(2, 8, 9))
    torch.testing.assert_close(rows[0][:, 5:], grey.expand(2, -1, -1, -1))


class TestMaskedPicture:
    def given(self, mask: Tensor) -> MaskedPicture:
        """With an encoder that gives each latent the mean of its pixels, four times."""
        picture = torch.rand(1, 3, *mask.shape, generator=torch.Generator().manual_seed(1))

        def encode(images: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8).expand(-1, 4, -1, -1)

        return MaskedPicture(picture, mask[None, None], encode, 8)

    def test_a_mask_has_the_first_pixel_of_each_latent(self) -> None:
        """As diffusers' nearest interpolation has it; under the mask the picture is grey, pixel by pixel."""
        mask = torch.zeros(64, 80)
        mask[3:20, 9:33] = 1
        given = self.given(mask)
        shown, latents = given.beside((8, 10), (8, 10))
        assert torch.equal(shown[0, 0], mask[::8, ::8])
        grey = torch.where(mask > 0, GREY, given.picture)
        torch.testing.assert_close(latents, given.encode(grey))

    def test_on_a_smaller_canvas_no_white_pixel_is_lost(self) -> None:
        mask = torch.zeros(64, 64)
        mask[7, 13] = 1
        assert self.given(mask).beside((2, 2), (2, 2))[0].sum() == 0
        mask[1, 13], mask[1, 0] = 1, 1  # the first pixel of a latent on the smaller canvas is 4 × 4 of the mask's
        assert self.given(mask).beside((2, 2), (2, 2))[0].tolist() == [[[[1, 0], [0, 0]]]]

    def test_a_padded_canvas_shows_the_reflected_picture(self) -> None:
        given = self.given((torch.rand(56, 72, generator=torch.Generator().manual_seed(2)) > 0.8).float())
        mask, latents = given.beside((8, 10), (7, 9))
        whole_mask, whole = given.beside((7, 9), (7, 9))
        torch.testing.assert_close(latents[:, :, :7, :9], whole)
        assert torch.equal(mask[:, :, :7, :9], whole_mask)
        small, small_latents = given.beside((4, 5), (3.5, 4.5))
        assert small.shape == (1, 1, 4, 5)
        assert small_latents.shape == (1, 4, 4, 5)
        assert math.isfinite(relative_error(small_latents[:, :, :3, :4], latents[:, :, :6:2, :8:2]))


def test_patches_without_an_operator_have_no_mask(quick: Model) -> None:
    denoiser = prepare(quick, PROMPT, Settings(height=128, width=128)).denoiser
    with pytest.raises(ValueError, match=r"whole canvases, and 4 items of 1 images have none: let `through`"):
        denoiser(torch.zeros(4, 4, 8, 8), 1.0, 0)


@pytest.mark.parametrize("method", ["cutdiffusion", "spotdiffusion"])
def test_triton_kernels_show_the_same(quick: Model, method: str) -> None:
    pytest.importorskip("triton")
    mask, picture = np.tril(np.full((72, 80), 255, dtype="u1")), np.full((72, 80, 3), 90, dtype="u1")
    options = {"method": method, "num_steps": 2, "height": 72, "width": 80, "image": picture, "mask": mask}
    ours, kernels = (cutdiff.generate(quick, PROMPT, **options, backend=name) for name in ("reference", "triton"))
    assert relative_error(kernels.latents, ours.latents) < 1e-4
