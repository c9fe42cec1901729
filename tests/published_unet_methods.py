"""Runs of ScaleCrafter and HiDiffusion on a tiny network; their final latents by the published codes lie beside it.

published_unet_methods.npz was made by running github.com/YingqingHe/ScaleCrafter (commit 9dc1185: its loop with eta = 0
and without FreeU; its processor of scaled attention over unfused attention) and github.com/megvii-research/HiDiffusion
(commit e9ec39a: its draws replaced by `Draws.window_shifts`, its thresholds for 4096 pixels where a canvas is four
times the native size) on diffusers' network and DDIM scheduler, with the weights, states and noise of replayed.py.
"""

from __future__ import annotations

STEPS, GUIDANCE = 10, 5.0

RUNS: dict[str, tuple[str, tuple[int, int], int]] = {
    "attention_scaling": ("attention_scaling", (16, 24), 8),
    "scalecrafter_2": ("scalecrafter", (16, 12), 8),
    "scalecrafter_2.5": ("scalecrafter", (20, 20), 8),
    "scalecrafter_4": ("scalecrafter", (16, 16), 4),
    "hidiffusion_2": ("hidiffusion", (16, 24), 8),
    "hidiffusion_4": ("hidiffusion", (16, 24), 4),
}
"""The method, the canvas and the native size in latents of each run."""
