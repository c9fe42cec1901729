"""Timed runs: the seconds of each stage and the peak memory, and the best that the device could do."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import TOKENS
from cutdiff.methods.cutdiffusion import CutDiffusion
from cutdiff.models.compiled import compiled
from cutdiff.models.config import UNetConfig, VAEConfig
from cutdiff.models.layers import TextContext
from cutdiff.models.unet import Context, UNet
from cutdiff.models.vae import VAE
from cutdiff.pipeline import now
from cutdiff.planning.meter import Meter
from cutdiff.sampling.operators import grid_for, view_grid
from cutdiff.settings import Settings

STAGES: tuple[str, ...] = ("structure", "detail")
PARTS = (*STAGES, "network", "decode")
"""The parts of a run that are timed; "network" stands for both stages."""


class Contestant(Protocol):
    """A sampler for one picture, with its weights, that is timed."""

    @property
    def what(self) -> str:
        """The name that the table shows."""
        ...

    @property
    def unet(self) -> Any: ...

    @property
    def vae(self) -> nn.Module: ...

    def predict(self, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, size_ids: Tensor) -> Tensor:
        """The network alone: the arguments are those of `UNet.forward`, with one timestep ()."""
        ...

    def steps(self, num_steps: int) -> Iterator[tuple[str, Tensor]]:
        """Run the sampler and yield after every step the name of its stage and the state, at last a canvas."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (1, C, h, w) -> an image (1, 3, H, W), float32 in [0, 1], on the CPU."""
        ...


@dataclass(frozen=True)
class Ours:
    """The sampler of this package, through the functions that its users call."""

    model: Model
    settings: Settings
    what: str = "cutdiff"
    attention: Sequence[SDPBackend] = ()
    """The attention backends in the order in which they are tried; if empty, torch's own order holds."""

    @property
    def unet(self) -> nn.Module:
        return self.model.unet

    @property
    def vae(self) -> nn.Module:
        return self.model.vae

    @torch.no_grad()
    def predict(self, x: Tensor, timesteps: Tensor, context: Context, pooled: Tensor, size_ids: Tensor) -> Tensor:
        settings, unet = self.settings, self.model.unet
        text = context if isinstance(context, TextContext) else unet.read(context)  # as a run and its compiler have it
        unet = compiled(unet, cuda_graphs=settings.cuda_graphs) if settings.compile else unet
        with self._ways():
            return unet(x, timesteps.expand(len(x)), text, pooled, size_ids)

    def steps(self, num_steps: int) -> Iterator[tuple[str, Tensor]]:
        with self._ways():
            for step in cutdiff.denoise(self.model, "", self.settings, num_steps=num_steps):
                yield step.stage, step.latents

    def decode(self, latents: Tensor) -> Tensor:
        with self._ways():
            return cutdiff.decode(self.model, latents)

    def _ways(self) -> AbstractContextManager[Any]:
        """Let torch take attention as this contestant has it."""
        return sdpa_kernel(list(self.attention), set_priority=True) if self.attention else nullcontext()


@dataclass(frozen=True)
class Timing:
    """The measurements of one run."""

    seconds: dict[str, float]
    """The seconds of each stage with all that surrounds the network, of all ("network"), and of decoding."""
    peak_bytes: dict[str, int | None]
    """The peak memory of both stages ("network") and of decoding, with the weights; None on a CPU."""


def timed(contestant: Contestant, num_steps: int, device: torch.device) -> Timing:
    """Time the drawing of one picture; a GPU marks the end of each step, and nothing waits for it before the last.

    FloatingPointError if the latents are not finite, because such numbers may take another time.
    """
    seconds, latents = dict.fromkeys(STAGES, 0.0), torch.empty(0)
    memory, _ = Memory(device), now(device)
    marks = [("", _mark(device))]
    for stage, state in contestant.steps(num_steps):
        marks.append((stage, _mark(device)))
        latents = state
    now(device)
    for (_, began), (stage, ended) in pairwise(marks):
        seconds[stage] = seconds.get(stage, 0.0) + _between(began, ended)
    seconds["network"] = sum(seconds.values())
    peaks: dict[str, int | None] = {"network": memory.peak(contestant.unet)}
    if not latents.isfinite().all():
        raise FloatingPointError("latents that were timed hold NaN or infinity")
    memory, began = Memory(device), now(device)
    contestant.decode(latents)
    seconds["decode"] = now(device) - began
    return Timing(seconds, peaks | {"decode": memory.peak(contestant.vae)})


def _mark(device: torch.device) -> Any:
    """A moment: on a GPU, when it has done all that it was given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(began: Any, ended: Any) -> float:
    """The seconds between two moments, which have passed."""
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3


class Memory:
    """The peak memory of an accelerator from the moment that this is made."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def peak(self, network: nn.Module) -> int | None:
        """The peak bytes above those allocated before, plus the weights of `network`, which were; None on a CPU."""
        if self.device.type != "cuda":
            return None
        weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        return torch.cuda.max_memory_allocated(self.device) - self.before + weights


def attention_order(device: torch.device) -> list[str]:
    """The attention backends in the order in which torch tries them on a device, where they are enabled.

    On a GPU torch puts them in order at its first attention, which is made here. So what sets an order comes after it.
    """
    values = torch.zeros(1, 1, 64, 64, device=device)
    F.scaled_dot_product_attention(values, values, values)
    return [SDPBackend(number).name for number in torch._C._get_sdp_priority_order()]


def matmul_peak(device: torch.device, dtype: torch.dtype, side: int, repeats: int = 10, launches: int = 5) -> float:
    """The FLOP/s of the fastest of several products of square matrices of random numbers."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out, best = torch.mm(a, b), math.inf
    for _ in range(repeats):
        began = now(device)
        for _ in range(launches):
            torch.mm(a, b, out=out)
        best = min(best, (now(device) - began) / launches)
    return 2 * side**3 / best


def count_flops(unet: UNetConfig, vae: VAEConfig, size: tuple[int, int], num_steps: int) -> dict[str, float]:
    """The FLOPs of each part for one guided picture of `size` latents, at least the native size, with attention."""
    switch = math.ceil(CutDiffusion().structure_fraction * num_steps)
    patches = math.prod(grid_for(size, unet.native_size))
    window, stride = unet.native_size, unet.native_size // 2
    views = len(view_grid(size, (window, window), (stride, stride)))
    pair = 2 * unet_flops(unet)
    structure, detail = pair * patches * switch, pair * views * (num_steps - switch)
    return {"structure": structure, "detail": detail, "network": structure + detail, "decode": vae_flops(vae, size)}


@torch.no_grad()
def unet_flops(config: UNetConfig, size: tuple[int, int] | None = None) -> float:
    """The FLOPs of one evaluation of the U-Net, at native `size` or another, without computing anything."""
    height, width = size or (config.native_size, config.native_size)
    with torch.device("meta"), Meter() as meter:
        latents = torch.empty(1, config.in_channels, height, width)
        text = torch.empty(1, TOKENS, config.context_dim), torch.empty(1, config.pooled_dim)
        UNet(config)(latents, torch.empty(1), *text, torch.empty(1, 6))
    return float(meter.flops)


@torch.no_grad()
def vae_flops(config: VAEConfig, size: tuple[int, int]) -> float:
    """The FLOPs of decoding latents of `size`, counted without computing anything."""
    with torch.device("meta"), Meter() as meter:
        VAE(config).decode(torch.empty(1, config.latent_channels, *size), banded=False)
    return float(meter.flops)
