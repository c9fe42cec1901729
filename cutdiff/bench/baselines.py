"""The published CutDiffusion loop on diffusers' modules, as its README runs it and made faster in three ways.

It is written anew after what the published code computes (github.com/lmbxmu/CutDiffusion). The state has the network's
dtype and is a list of patches first and a canvas later; diffusers' scheduler steps each batch of views before they are
averaged. Two faults are put right, at no cost in time: the published scheduler's step index runs on within a step that
takes more than one batch of views, and with an odd number of steps the published loop misses the switch of stages.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from cutdiff.checkpoint.model import Model
from cutdiff.models.config import Size, UNetConfig, VAEConfig
from cutdiff.models.text import TextStates
from cutdiff.models.unet import UNet, as_unet
from cutdiff.models.vae import VAE
from cutdiff.sampling.operators import grid_for

GUIDANCE = 7.5
FACTOR = 8
"""The pixels of a picture for one latent, on each axis."""
TILED_FROM = 2048
"""Pictures with a longer side, in pixels, are decoded in tiles."""


@dataclass(frozen=True)
class Variant:
    """A way of running the published loop."""

    what: str
    view_batch_size: int
    lean: bool = False
    """Draw permutations in one call on the device, and do not call `torch.cuda.empty_cache()` before each step."""
    compiled: bool = False
    """Use torch.compile, for each shape by itself, and channels_last."""


VARIANTS = {
    "a": Variant("published loop, view batch 1", view_batch_size=1),
    "b": Variant("a, view batch 16", view_batch_size=16),
    "c": Variant("b, vectorised draw, cache kept", view_batch_size=16, lean=True),
    "d": Variant("c, torch.compile, channels_last", view_batch_size=16, lean=True, compiled=True),
}


class PublishedDraws:
    """The loop's draws: noise on the device, permutations and jitter on the host, each from its own generator."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.host_generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """The noise of every patch, (N, C, h, w)."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def permutation(self, step: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """An index of the N patches for every channel and position, and its inverse, both (N, C, h, w)."""
        count, positions = shape[0], math.prod(shape[1:])
        drawn = [torch.randperm(count, generator=self.host_generator) for _ in range(positions)]
        index = torch.stack(drawn).view(*shape[1:], count)
        inverse = torch.zeros_like(index).scatter_(3, index, torch.arange(count).expand_as(index))
        return index.permute(3, 0, 1, 2).to(self.device), inverse.permute(3, 0, 1, 2).to(self.device)

    def windows(self, step: int, size: Size, window: int, stride: int) -> list[tuple[int, int]]:
        """The top left corners of the views, row by row, on a canvas that is padded by the jitter's reach."""
        reach = (window - stride) // 4

        def jittered(start: int, side: int) -> int:
            low = 0 if start + window == side else -reach
            return start + reach + self.random.randint(low, 0 if start == 0 else reach)

        rows, columns = (range(0, side - window + 1, stride) for side in size)
        return [(jittered(top, size[0]), jittered(left, size[1])) for top in rows for left in columns]


class VectorisedDraws(PublishedDraws):
    """The same draws, with all permutations of a step made by one sort on the device."""

    def permutation(self, step: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.rand(shape, generator=self.generator, device=self.device).argsort(dim=0)
        return index, index.argsort(dim=0)


@dataclass(frozen=True)
class PublishedLoop:
    """The loop for one picture, with guidance."""

    what: str
    unet: Any
    """diffusers' network, or the same network compiled."""
    vae: AutoencoderKL
    context: Tensor
    """The text states of the negative prompt and of the prompt, (2, L, D)."""
    pooled: Tensor
    """The pooled states of both, (2, D)."""
    size: Size
    """The size of the canvas in latents, in multiples of the window."""
    window: int
    """The native size, in latents."""
    stride: int
    view_batch_size: int
    seed: int = 0
    draws: Callable[[torch.device, int], PublishedDraws] = PublishedDraws
    """The class of the draws, which each run makes anew for its device and seed."""
    empties_cache: bool = False
    """Call `torch.cuda.empty_cache()` before each step."""

    @property
    def dtype(self) -> torch.dtype:
        return self.context.dtype

    @torch.no_grad()
    def predict(self, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, size_ids: Tensor) -> Tensor:
        """The network alone: the arguments are those of `UNet.forward`, with one timestep ()."""
        conditions = {"text_embeds": pooled, "time_ids": size_ids}
        return self.unet(x, timesteps, context, added_cond_kwargs=conditions, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (1, C, h, w) -> an image (1, 3, H, W), float32 in [0, 1], on the CPU."""
        scaled = latents.to(self.vae.dtype) / self.vae.config["scaling_factor"]
        return (self.vae.decode(scaled, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).float().cpu()

    @torch.no_grad()
    def steps(self, num_steps: int) -> Iterator[tuple[str, Tensor]]:
        """Run the loop and yield after every step the name of its stage and the state, at last a canvas (1, C, H, W).

        There must be at least two steps, one for each stage.
        """
        device = self.context.device
        scheduler = EulerDiscreteScheduler(  # with the values of SDXL-base
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        )
        scheduler.set_timesteps(num_steps, device=device)
        draws = self.draws(device, self.seed)
        grid = grid_for(self.size, self.window)
        shape = (grid[0] * grid[1], 4, self.window, self.window)
        state = draws.noise(shape).to(self.dtype) * scheduler.init_noise_sigma
        switch = math.ceil(num_steps / 2)
        for i, t in enumerate(scheduler.timesteps):
            if self.empties_cache and device.type == "cuda":
                torch.cuda.empty_cache()
            scheduler._init_step_index(t)
            if i < switch:
                state = self._structure_step(scheduler, state, t, *draws.permutation(i, shape))
                yield "structure", state
                continue
            if i == switch:
                state = _relocated(state, grid)
            state = self._detail_step(scheduler, state, t, draws.windows(i, self.size, self.window, self.stride))
            yield "detail", state

    def _structure_step(
        self, scheduler: EulerDiscreteScheduler, patches: Tensor, t: Tensor, index: Tensor, inverse: Tensor
    ) -> Tensor:
        shown = patches.gather(0, index)
        crops = torch.zeros(len(patches), 2)
        parts = zip(shown.split(self.view_batch_size), crops.split(self.view_batch_size), strict=True)
        eps = torch.cat([self._guided(scheduler, part, t, corners) for part, corners in parts])
        return scheduler.step(eps.gather(0, inverse), t, patches, return_dict=False)[0]

    def _detail_step(
        self, scheduler: EulerDiscreteScheduler, canvas: Tensor, t: Tensor, windows: list[tuple[int, int]]
    ) -> Tensor:
        reach, side = (self.window - self.stride) // 4, self.window
        padded = F.pad(canvas, (reach,) * 4)
        value, count = torch.zeros_like(padded), torch.zeros_like(padded)
        for first in range(0, len(windows), self.view_batch_size):
            batch = windows[first : first + self.view_batch_size]
            views = torch.cat([padded[:, :, y : y + side, x : x + side] for y, x in batch])
            scheduler._init_step_index(t)
            eps = self._guided(scheduler, views, t, FACTOR * torch.tensor(batch))
            stepped = scheduler.step(eps, t, views, return_dict=False)[0]
            for view, (y, x) in zip(stepped, batch, strict=True):
                value[0, :, y : y + side, x : x + side] += view
                count[0, :, y : y + side, x : x + side] += 1
        inner = (..., slice(reach, reach + self.size[0]), slice(reach, reach + self.size[1]))
        return value[inner] / count[inner]

    def _guided(self, scheduler: EulerDiscreteScheduler, items: Tensor, t: Tensor, crops: Tensor) -> Tensor:
        """The network's guided eps for items (n, C, h, w).

        The size conditioning is the full size, the crop's corner (n, 2) in pixels, and the full size again.
        """
        scaled = scheduler.scale_model_input(items.repeat_interleave(2, dim=0), t)
        full = (FACTOR * torch.tensor(self.size)).expand(len(items), 2)
        size_ids = torch.cat([full, crops, full], dim=1).repeat_interleave(2, dim=0).to(self.context)
        context, pooled = (
            states.repeat(len(items), *[1] * (states.ndim - 1)) for states in (self.context, self.pooled)
        )
        eps = self.predict(scaled, t, context, pooled, size_ids)
        negative, positive = eps[::2], eps[1::2]
        return negative + GUIDANCE * (positive - negative)


def _relocated(patches: Tensor, grid: Size) -> Tensor:
    """Put interleaved patches (N, C, h, w) in their places on the canvas, (1, C, H, W)."""
    count, channels, h, w = patches.shape
    canvas = patches.new_zeros(1, channels, h * grid[0], w * grid[1])
    for n in range(count):
        canvas[0, :, n // grid[1] :: grid[0], n % grid[1] :: grid[1]] += patches[n]
    return canvas


def published_unet(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' U-Net of the same shape, as its configuration files for SDXL spell it."""
    attended = [any(layers) for layers in config.down_layers]
    shape: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "cross_attention_dim": config.context_dim,
        # diffusers takes the middle block's depth from the last level, whose own is not read if it has no attention.
        "transformer_layers_per_block": (
            *(max(n, 1) for n in config.transformer_layers[:-1]),
            config.mid_transformer_layers,
        ),
        "attention_head_dim": config.num_heads,  # diffusers' name for the number of heads
        "use_linear_projection": config.linear_projections,
        "addition_embed_type": "text_time" if config.added_dim else None,
        "addition_time_embed_dim": config.size_embedding_dim or None,
        "projection_class_embeddings_input_dim": config.added_dim or None,
    }
    return UNet2DConditionModel(**shape)


def published_vae(config: VAEConfig) -> AutoencoderKL:
    """diffusers' autoencoder of the same shape."""
    levels = len(config.channels)
    shape: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.quant_conv,
    }
    return AutoencoderKL(**shape)


def with_weights_of(
    network: UNet | VAE, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> Any:
    """diffusers' network of the same shape on the same weights, which are shared if they have this dtype and layout.

    diffusers loads weights as contiguous; ours are channels_last on a GPU.
    """
    with torch.device("meta"):
        theirs = published_unet(network.config) if isinstance(network, UNet) else published_vae(network.config)
    weights = {key: weight.to(dtype) for key, weight in network.state_dict().items()}
    weights |= {key: weight.contiguous(memory_format=layout) for key, weight in weights.items() if weight.ndim == 4}
    theirs.load_state_dict(weights, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


def make_baselines(model: Model, names: Sequence[str], size: Size, seed: int = 0) -> dict[str, PublishedLoop]:
    """The variants of the loop by their names, on the weights of `model`; `size` is in latents.

    The variants share those weights that have the same layout.
    """
    positive = model.text.encode([""])
    negative = TextStates.zeros_like(positive)
    vae = with_weights_of(model.vae, model.vae_dtype)
    if max(size) * FACTOR > TILED_FROM:
        vae.enable_tiling()
    plain = with_weights_of(as_unet(model.unet), model.dtype)
    native = model.native_size
    made = {}
    for name in names:
        variant, unet = VARIANTS[name], plain
        if variant.compiled:
            unet = with_weights_of(as_unet(model.unet), model.dtype, torch.channels_last)
            unet = torch.compile(unet, fullgraph=True, dynamic=False)
        made[name] = PublishedLoop(
            what=variant.what,
            unet=unet,
            vae=vae,
            context=torch.cat([negative.context, positive.context]),
            pooled=torch.cat([negative.pooled, positive.pooled]),
            size=size,
            window=native,
            stride=native // 2,
            view_batch_size=variant.view_batch_size,
            seed=seed,
            draws=VectorisedDraws if variant.lean else PublishedDraws,
            empties_cache=not variant.lean,
        )
    return made
