"""Distil the embedded model for few steps without guidance, as a LoRA: `python -m cutdiff.training.consistency`.

The student learns to estimate at every point of a guided path of the teacher what it estimates one step further down,
so that all points of a path come to have the picture at its end. Checkpoints and the log go to --work, the LoRA in
float16 to --out, with a card beside it that says how it was made. A training that was stopped goes on.

Sources: Luo et al. 2023 (arXiv 2310.04378, algorithm 1), and for LoRAs Luo et al. 2023 (arXiv 2311.05556), in whose
published training the student itself gives the estimate further down, not a moving average of it.
"""

from __future__ import annotations

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import number
from cutdiff.cli.ending import exit_status
from cutdiff.models.layers import channels_last
from cutdiff.models.text import TextStates
from cutdiff.models.unet import UNet, as_unet
from cutdiff.sampling.schedules import DISTILLED_STEPS, lcm_schedule
from cutdiff.scenes import world
from cutdiff.training.beside import begun, noise_of, parser_beside
from cutdiff.training.card import phase, write_lora_card
from cutdiff.training.fit import Plan, fit
from cutdiff.training.lora import add_lora, save_lora
from cutdiff.training.unet import DROPPED_CLAUSE, WHOLE_SCENES, Latents

GUIDANCE_SCALE = 4.0
"""The guidance of the teacher, which the student does without."""
HUBER = 0.001
"""The difference at which the loss turns from squared to absolute."""
DATA_DEVIATION, TIME_SCALE = 0.5, 10.0
"""The constants of the boundary condition, by which the estimate at timestep 0 is the state itself."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: _run(argv), argv, failures=(ValueError, OSError, FloatingPointError))


def _run(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    model, latents = begun(args, "model", "num_scenes", "rank")
    changes = distil(
        model, latents, args.work, rank=args.rank, steps=args.steps, batch=args.batch,
        bfloat16=args.dtype == "bfloat16",
    )  # fmt: skip
    save_lora(args.out, changes)
    data = f"{args.batch} of {args.num_scenes} pictures, {WHOLE_SCENES:.0%} of them whole scenes"
    made: dict[str, Any] = phase(
        "Distillation", "loss", args.work / "consistency.jsonl", data=data, device=model.device, dtype=args.dtype
    )
    write_lora_card(args.out, model, made, guidance_scale=GUIDANCE_SCALE, grid=DISTILLED_STEPS, rank=args.rank)
    print(f"wrote {args.out}")


def distil(
    model: Model, latents: Latents, folder: Path, *, rank: int, steps: int, batch: int, bfloat16: bool
) -> nn.ModuleDict:
    """Train a LoRA of the model's U-Net and return its changes, as `add_lora` names them; resumable, see `fit`."""
    noise, device, teacher = noise_of(model), model.device, as_unet(model.unet)
    channels_last(teacher)
    student = deepcopy(teacher)
    torch.manual_seed(0)  # initial factors; every other draw comes from the generator of its step
    changes = add_lora(student, rank)
    # The timesteps that the solver picks from, in which the teacher goes from noise to picture, and the end.
    steps_down = [0, *(int(t) for t in reversed(lcm_schedule(noise, DISTILLED_STEPS).timesteps))]
    timesteps = torch.tensor(steps_down, device=device)
    sigmas = torch.tensor([noise.sigma(t) for t in steps_down], device=device)

    def denoised(unet: UNet, x: Tensor, place: Tensor, *conditions: Tensor) -> Tensor:
        """The network's estimate of x0 at x = x0 + sigma·noise, on the places (B,) of the grid."""
        sigma = sigmas[place][:, None, None, None]
        state = (x / (1 + sigma.square()).sqrt()).contiguous(memory_format=torch.channels_last)
        return x - sigma * unet(state, timesteps[place], *conditions).float()

    def consistent(x: Tensor, place: Tensor, *conditions: Tensor) -> Tensor:
        """The student's estimate, which is the state itself at timestep 0."""
        scaled, sigma = (part[place][:, None, None, None] for part in (TIME_SCALE * timesteps, sigmas))
        root = (scaled.square() + DATA_DEVIATION**2).sqrt()
        state = x / (1 + sigma.square()).sqrt()
        return (DATA_DEVIATION / root).square() * state + scaled / root * denoised(student, x, place, *conditions)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)  # noqa: E731
        index = torch.randint(len(latents.mean), (batch,), generator=generator, device=device)
        normal = torch.randn(2, batch, *latents.mean.shape[1:], generator=generator, device=device)
        clean = latents.mean[index].float() + latents.std[index].float() * normal[0]
        captions = world.captions(latents.choices[index], rand(batch, 3) >= DROPPED_CLAUSE)
        text, sizes = model.text.encode(captions), latents.size_ids[index]
        empty = TextStates.zeros_like(text)

        # One place from each of `batch` equal strata.
        share = (torch.arange(batch, device=device) + rand(batch)) / batch
        upper = 1 + (share * DISTILLED_STEPS).long().clamp(max=DISTILLED_STEPS - 1)
        lower = upper - 1
        sigma = sigmas[:, None, None, None]
        x = clean + sigma[upper] * normal[1]
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            with torch.no_grad():
                conditional, unconditional = (
                    denoised(teacher, x, upper, states.context, states.pooled, sizes) for states in (text, empty)
                )
                guided = torch.lerp(unconditional, conditional, GUIDANCE_SCALE)
                down = torch.lerp(guided, x, sigma[lower] / sigma[upper])
                wanted = consistent(down, lower, text.context, text.pooled, sizes)
            with sdpa_kernel(SDPBackend.MATH):
                error = consistent(x, upper, text.context, text.pooled, sizes) - wanted
        huber = (error.square() + HUBER**2).sqrt() - HUBER
        return {"loss": huber.mean(), "mse": error.detach().square().mean()}

    plan = Plan(
        steps,
        learning_rate=1e-3,
        muon_learning_rate=None,
        warmup=20,
        ema_decay=0.99,
        checkpoint_every=50,
        log_every=min(50, steps),
    )
    fit("consistency", changes, loss, plan, folder, device)
    return changes


def _parser() -> argparse.ArgumentParser:
    counts = (
        ("num-scenes", 8192, "pictures to encode"),
        ("steps", 900, "steps of the training"),
        ("batch", 32, "latents in each of them"),
    )
    parser = parser_beside("consistency", __doc__, Path("weights/scenes-lcm.safetensors"), "LoRA", counts)
    parser.add_argument(
        "--rank", type=number(1, 512), default=16, metavar="N", help="rank of every weight's change (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
