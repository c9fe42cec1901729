"""FreCaS: its published runs."""

from __future__ import annotations

import pytest
from published_frecas import GUIDANCE, HIGH_GUIDANCE, RUNS, WEIGHT, Replayed, make_model, published_latents
from tiny import relative_error

import cutdiff


@pytest.mark.parametrize("name", RUNS)
def test_the_published_code_ends_in_the_same_latents(name: str) -> None:
    published = RUNS[name]
    total = sum(published.steps)
    (height, width) = published.sizes[-1]
    *_, last = cutdiff.denoise(
        make_model(),
        "prompt",
        method="frecas",
        solver="ddim",
        num_steps=total,
        height=8 * height,
        width=8 * width,
        guidance_scale=GUIDANCE,
        high_guidance_scale=HIGH_GUIDANCE,
        map_weight=WEIGHT,
        map_resize="tokens",
        sizes=published.sizes[:-1],
        shares=tuple(steps / total for steps in published.steps[:-1]),
        ends=tuple(end / 1000 for end in published.ends[:-1]),
        gamma=published.gamma,
        draws=Replayed(),
    )
    print(relative_error(last.latents, published_latents(name)))
    assert relative_error(last.latents, published_latents(name)) < 1e-4
