"""The network, text and draws that the cascades were run on beside the published code; nothing else changes them.

The fixtures hold what the published pipelines ended with on them (github.com/PRIS-CV/DemoFusion at 5024487 and
github.com/lzhxmu/AccDiffusion at d8b52c7: their `__call__`, in one view batch, at guidance 7.5 and a blur of 0.8), and
the draws that they made: a generator gave the noise, first of the smallest canvas, then of each phase.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tiny import QUICK_UNET
from torch import Tensor

from cutdiff.checkpoint.model import Model
from cutdiff.models.text import TextStates
from cutdiff.models.unet import UNet
from cutdiff.sampling.draws import Draws

PROMPT = "a red house with mountains over a meadow at sunset"
LENGTH, CONTEXT_DIM, POOLED_DIM = 14, 16, 8


class Words:
    """A stand-in for text encoders: its tokens are words, each with a random vector, as have the start and the end."""

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        return [(word, [i]) for i, word in enumerate(prompt.split(), start=1)]

    def skipping(self, clip_skip: int | None) -> Words:
        return self

    def length(self, prompt: str) -> int:
        return LENGTH

    def encode(self, prompts: list[str], prompt_2: str | None = None, **_: int) -> TextStates:
        context = torch.stack([torch.stack([_vector(token) for token in self._tokens(prompt)]) for prompt in prompts])
        return TextStates(4 * context, context.mean(dim=1)[:, :POOLED_DIM])

    def _tokens(self, prompt: str) -> list[str]:
        tokens = ["<start>", *prompt.split(), "<end>"]
        return tokens + ["<end>"] * (LENGTH - len(tokens))


def _vector(token: str) -> Tensor:
    seed = int.from_bytes(token.encode()) % 2**62
    return torch.randn(CONTEXT_DIM, generator=torch.Generator().manual_seed(seed))


def network(model: Model, native_size: int, levels: int) -> Model:
    """Give `model` a U-Net that reads the text on its coarsest level only, and `Words` as its text encoders."""
    torch.manual_seed(0)
    unet = UNet(
        replace(
            QUICK_UNET,
            channels=(8,) + (16,) * (levels - 1),
            transformer_layers=(0,) * (levels - 1) + (1,),
            num_heads=(2,) * levels,
            context_dim=CONTEXT_DIM,
            pooled_dim=POOLED_DIM,
            native_size=native_size,
        )
    )
    return replace(model, unet=unet.eval().requires_grad_(False), text=Words())


@dataclass(frozen=True)
class Replayed(Draws):
    """The draws of a published run."""

    seeds: tuple[int, ...] = (0,)
    num_steps: int = 0
    origins: tuple[Any, ...] = ()
    """(V, 2) of (top, left) for each step of the phases after the first, or for each such phase."""
    noises: tuple[Tensor, ...] = ()
    index: tuple[Tensor, ...] = ()
    """(N, C, h, w) for each step of the phases after the first."""

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return self.phase_noise(shape, 1)

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        assert self.noises[phase - 1].shape == shape
        return self.noises[phase - 1]

    def permutation(self, step: int, grid: Any, shape: Any, grain: str) -> Any:
        return None if grain == "none" else self.index[step - self.num_steps]

    def view_origins(self, step: int, size: Any, window: Any, stride: Any, jitter: Any) -> Tensor:
        late = step - self.num_steps
        return torch.tensor(self.origins[late if len(self.origins) > 1 else 0])


def noises(shapes: list[tuple[int, ...]], seed: int) -> tuple[Tensor, ...]:
    """Standard normal noise of each shape, one after another."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def shuffles(count: int, shape: tuple[int, ...], seed: int) -> tuple[Tensor, ...]:
    """Random permutations along the first axis of (N, C, h, w), drawn for each position by itself."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(shape, generator=generator).argsort(dim=0) for _ in range(count))


def fixture(name: str) -> list[dict[str, Any]]:
    return json.loads((Path(__file__).parent / "fixtures" / f"{name}.json").read_text())
