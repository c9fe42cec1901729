"""Runs of DiffuseHigh on tiny networks; their final latents by the published code lie beside this file.

published_diffusehigh.npz was made by running github.com/yhyun225/DiffuseHigh (commit 05dc747), its pipeline whole, on
diffusers' networks and Euler scheduler, with the weights, states and noise of replayed.py. What was patched: the noise
of a size and the deviation of its blur are those of `Draws` in the place of the global generator's; the autoencoder has
a sample size that no picture exceeds, so that it works on whole pictures and not on tiles; `enable_vae_tiling`, gone
from diffusers, calls `vae.enable_tiling()`; torchvision's package import is stubbed, as its compiled operators do not
load on the machine where it ran; the picture is given back as latents, by an `_decode_vae_latent` that keeps what it
was given last.
"""

from __future__ import annotations

from typing import NamedTuple

GUIDANCE, SEED = 5.0, 3


class PublishedRun(NamedTuple):
    """A run: its method, the sizes of its canvases in latents, the native size and the number of steps."""

    method: str
    sizes: list[tuple[int, int]]
    native: int
    num_steps: int
    arguments: dict[str, object]
    """The other arguments of the published pipeline's call."""


RUNS = {
    "2x2": PublishedRun("diffusehigh", [(12, 12), (16, 16)], 8, 20, {"noising_steps": 6, "dwt_steps": 2}),
    "3x3": PublishedRun(
        "diffusehigh,strength=0.5,held_fraction=0.3,blur=(0.8,0.8),sharpness=2,detail_guidance_scale=3",
        [(8, 8), (12, 12)],
        4,
        10,
        {
            "noising_steps": 5,
            "dwt_steps": 3,
            "sharpening_sigma": 0.8,
            "sharpening_alpha": 2,
            "diffusehigh_guidance_scale": 3.0,
        },
    ),
    "4x4": PublishedRun("diffusehigh", [(8, 8), (12, 12), (16, 16)], 4, 10, {"noising_steps": 3, "dwt_steps": 1}),
    "stretched": PublishedRun(
        "diffusehigh,native_shape=square,factors=(2.5,)",
        [(10, 20), (12, 24)],
        8,
        10,
        {"noising_steps": 3, "dwt_steps": 1},
    ),
    "one size": PublishedRun(
        "diffusehigh,native_shape=square,factors=(),held_fraction=0,sharpness=0",
        [(6, 20)],
        8,
        10,
        {"noising_steps": 3, "enable_dwt": False, "enable_sharpening": False},
    ),
}
