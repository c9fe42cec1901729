"""The training loop that all networks share: Muon and AdamW, a warm-up, a moving average, checkpoints and a log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cutdiff.checkpoint.read import read_json
from cutdiff.cli.arguments import BadArgument, number
from cutdiff.files import json_lines
from cutdiff.training.muon import Muon

COUNT = number(1, 10**9)
"""The type of an argument that counts steps or pictures."""

PLAN = "plan.json"
"""The file in a folder of checkpoints with the options that must not change while a training goes on."""


@dataclass(frozen=True)
class Plan:
    """The length of a training, its learning rates, and when it writes."""

    steps: int
    learning_rate: float
    """The rate of AdamW, which trains what Muon does not."""
    muon_learning_rate: float | None
    """The rate of Muon; None where AdamW trains everything."""
    warmup: int = 100
    ema_decay: float = 0.999
    checkpoint_every: int = 250
    log_every: int = 50
    seed: int = 0


def check_plan(folder: Path, options: Mapping[str, str]) -> None:
    """Raise BadArgument where `folder` has the checkpoints of a training with other options."""
    if (described := folder / PLAN).exists() and read_json(described) != options:
        raise BadArgument(f"--work {folder} holds another training ({described}): take another folder")


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[torch.Generator], dict[str, Tensor]],
    plan: Plan,
    folder: Path,
    device: torch.device,
) -> None:
    """Train `module` in place and leave the moving average of its weights in it.

    `loss(generator)` draws a batch and returns named scalars, of which "loss" is minimised. The generator of a step
    depends on nothing but the plan's seed and the step, so that a run that was stopped continues as if it had not been.
    `fit` writes `folder/<name>.pt` (the checkpoint) and `folder/<name>.jsonl` (one line every `log_every` steps).
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    parameters = list(module.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizers = _optimizers(module, plan)
    start, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average, start, seconds = state["average"], state["step"], state["seconds"]
        lines = json_lines(log) if log.exists() else []
        log.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start))

    began = time.perf_counter() - seconds
    sums: dict[str, float] = {}
    module.train()
    for step in tqdm(range(start, plan.steps), desc=name, initial=start, total=plan.steps, mininterval=5):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * _rate(step, plan)
        terms = loss(torch.Generator(device).manual_seed(plan.seed * 1_000_003 + step))
        module.zero_grad()
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(plan.ema_decay, (1 + step) / (10 + step))
        for mean, p in zip(average, parameters, strict=True):
            mean.lerp_(p.detach(), 1 - decay)

        for key, value in terms.items():
            sums[key] = sums.get(key, 0.0) + value.item()
        done = step + 1
        if done % plan.log_every == 0:
            entry = {key: round(total / plan.log_every, 5) for key, total in sums.items()}
            entry |= {"step": done, "seconds": round(time.perf_counter() - began)}
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            sums = {}
        if done % plan.checkpoint_every == 0 or done == plan.steps:
            state = {"module": module.state_dict(), "average": average, "step": done}
            state |= {"optimizers": [o.state_dict() for o in optimizers], "seconds": time.perf_counter() - began}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)

    with torch.no_grad():
        for mean, p in zip(average, parameters, strict=True):
            p.copy_(mean)
    module.eval()


def _optimizers(module: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Make Muon for the hidden matrices, and AdamW for embeddings, biases, norms and the layers at either end."""
    adamw = partial(torch.optim.AdamW, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    if plan.muon_learning_rate is None:
        return [adamw(module.parameters())]
    ends = (
        "conv_in",
        "conv_out",
        "quant_conv",
        "embed",
        "text_projection",
        "heads",
        "transformer.proj_out",
        "shared",
        "bias.weight",
    )
    named = list(module.named_parameters())
    hidden = [p for name, p in named if p.ndim >= 2 and not any(end in name for end in ends)]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    return [Muon(hidden, plan.muon_learning_rate), adamw(rest)]


def _rate(step: int, plan: Plan) -> float:
    """The factor on the learning rate at a step: a linear warm-up, times a straight line from 1 down to 0.01."""
    return min(1.0, (step + 1) / plan.warmup) * (1 - 0.99 * step / plan.steps)
