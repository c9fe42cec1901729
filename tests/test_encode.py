"""The VAE by itself: `cutdiff.encode` and `cutdiff.decode`, and what a method does with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.evaluation import score
from cutdiff.methods.shared import Run
from cutdiff.sampling.stages import Phase, Stage


def psnr(ours: Tensor, theirs: Tensor) -> float:
    return (-10 * (ours - theirs).square().mean().log10()).item()


def test_decode_of_encode_gives_true_scenes_back(model: Model) -> None:
    images = score.true_renders(score.scenes(6), 128).float() / 255
    latents = cutdiff.encode(model, images)
    assert (latents.shape, latents.dtype) == ((6, 4, 16, 16), torch.float32)
    decoded = cutdiff.decode(model, latents)
    assert (decoded.shape, decoded.dtype, decoded.device.type) == (images.shape, torch.float32, "cpu")
    assert psnr(decoded, images) > 34
    one = cutdiff.encode(model, images[2:3])
    assert torch.allclose(one, latents[2:3], atol=1e-5), "an image does not depend on its neighbours"


def test_integers_are_no_images(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=r"^images of torch\.uint8 cannot be encoded: give floats in \[0, 1\]$"):
        cutdiff.encode(tiny_model, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize(
    "shape", [(3, 64, 64), (0, 3, 64, 64), (1, 4, 64, 64), (1, 3, 60, 64), (1, 3, 64, 4), (1, 1, 3, 64, 64)]
)
def test_what_cannot_be_encoded(shape: tuple[int, ...], tiny_model: Model) -> None:
    given = "images of " + str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"^{given} cannot be encoded: give \(B, 3, H, W\) in multiples of 8$"):
        cutdiff.encode(tiny_model, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 3, 8, 8), (1, 4, 8), (0, 4, 8, 8)])
def test_what_cannot_be_decoded(shape: tuple[int, ...], tiny_model: Model) -> None:
    given = "latents of " + str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"^{given} cannot be decoded: give \(B, 4, h, w\)$"):
        cutdiff.decode(tiny_model, torch.zeros(shape))


def test_a_method_that_starts_from_a_picture(tiny_model: Model) -> None:
    """SDEdit: the latents of a picture, noise of the step where it begins, and the steps from there."""
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    heard = []

    def from_picture(run: Run) -> list[Phase]:
        steps = range(2, run.num_steps)

        def begin(noise: Tensor) -> tuple[Tensor, Stage]:
            latents = run.encode(picture)
            assert torch.equal(latents, cutdiff.encode(tiny_model, picture))
            heard.append(run.decode(latents))
            sigma = run.schedule.sigmas[steps.start]
            drawn = run.draws.noise((1, 4, *run.size))
            return latents + sigma * drawn, Stage("detail", steps, run.denoiser, run.size)

        return [Phase(steps, run.size, begin)]

    result = cutdiff.generate(tiny_model, "a", method=from_picture, height=64, width=64, num_steps=4)
    assert torch.equal(heard[0], cutdiff.decode(tiny_model, cutdiff.encode(tiny_model, picture)))
    assert result.record["network_evaluations"] == 2 * 2
    assert result.record["method"] == "from_picture"
    assert result.latents.isfinite().all()
    assert [*result.record["seconds"]] == ["detail", "decode"]
