"""Train the network whose features measure distances between sets of pictures: `python -m cutdiff.training.features`.

It learns from true renders, whole scenes and crops, sharp and blurred, to name what they show and to measure where it
is. Checkpoints and the log go to --work; the weights in float16 and a README with the distances between true sets go to
--out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cutdiff.cli.arguments import Parser, add_debug, add_device
from cutdiff.cli.device import device_of
from cutdiff.cli.ending import exit_status
from cutdiff.evaluation.features import PIXELS, FeatureNet, blur
from cutdiff.models.layers import channels_last
from cutdiff.scenes import world
from cutdiff.scenes.render import Crop, render
from cutdiff.scenes.world import Scenes
from cutdiff.training.features_card import SET_SIZE, write_card
from cutdiff.training.fit import COUNT, Plan, fit

WHOLE_SCENES, SMALLEST_CROP = 0.5, 0.2
"""The share of whole scenes and the side of the smallest crops, the same as in the training of the diffusion model."""
UNSEEN = -100
"""The index of a choice that a crop does not show; cross-entropy leaves it out."""


@dataclass(frozen=True)
class Targets:
    """The right answers for N pictures."""

    choices: Tensor
    """(N, 5) as in `Scenes.choices`, but UNSEEN where a crop does not show the thing."""
    visible: Tensor
    """(N, 2), 1 where the middles of subject and body are in the picture, else 0."""
    measures: Tensor
    """(N, 9): x, y, size of the subject; x, y, radius of the body; y of the horizon, all in sides of the picture, from
    its corner; then log2 of the crop's side and of the blur."""
    measured: Tensor
    """(N, 9), 1 where the measure can be read off the picture, else 0."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: _run(argv), argv, failures=(ValueError, OSError, FloatingPointError))


def _run(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    network = train_features(args.work, steps=args.steps, batch=args.batch, device=device_of(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.half().cpu().contiguous() for key, tensor in network.state_dict().items()}
    save_file(tensors, args.out / "model.safetensors")
    write_card(args.out, args.work / "features.jsonl", batch=args.batch, size=args.set_size)
    print(f"wrote {args.out}")


def train_features(folder: Path, *, steps: int, batch: int, device: torch.device) -> FeatureNet:
    """Train a network, then measure its features' mean and deviation on whole true renders; resumable, see `fit`."""
    torch.manual_seed(0)  # initial weights; every other draw comes from the generator of its step
    network = FeatureNet().to(device)
    channels_last(network)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        scenes = world.sample(batch, generator)
        crop = Crop.sample(batch, generator, min_side=SMALLEST_CROP, whole=WHOLE_SCENES)
        log2_blur = torch.randint(4, (batch,), generator=generator, device=device).sub(1).clamp(min=0)
        images = _blurred(render(scenes, PIXELS, crop) / 2 + 0.5, log2_blur)
        answers = network.answers(images.contiguous(memory_format=torch.channels_last))
        return _losses(answers, targets(scenes, crop, log2_blur))

    plan = Plan(steps, learning_rate=2e-3, muon_learning_rate=0.02, warmup=50, ema_decay=0.99, log_every=min(50, steps))
    fit("features", network, loss, plan, folder, device)
    with torch.no_grad():
        scenes = world.sample(1024, torch.Generator(device).manual_seed(1))
        parts = (scenes[torch.arange(i, i + 64, device=device)] for i in range(0, 1024, 64))
        raw = torch.cat([network.raw_features(render(part, PIXELS) / 2 + 0.5) for part in parts])
        network.mean.copy_(raw.mean(0))
        network.std.copy_(raw.std(0))
    return network


def targets(scenes: Scenes, crop: Crop, log2_blur: Tensor) -> Targets:
    """The right answers for crops of these scenes, blurred by 2 to the power of `log2_blur` (N,)."""
    balloon = scenes.subject == world.SUBJECTS.index("balloon")
    middle = torch.where(balloon, scenes.balloon_y, scenes.horizon + 0.12 - scenes.subject_size)
    x = torch.stack([scenes.subject_x, scenes.body_x], dim=1) - crop.left[:, None]
    y = torch.stack([middle, scenes.body_y, scenes.horizon], dim=1) - crop.top[:, None]
    x, y = x / crop.side[:, None], y / crop.side[:, None]
    size, radius = scenes.subject_size / crop.side, scenes.body_radius / crop.side
    within = ((x - 0.5).abs() < 0.5) & ((y[:, :2] - 0.5).abs() < 0.5)  # (N, 2)
    subject, body, horizon = within[:, 0], within[:, 1], (y[:, 2] - 0.5).abs() < 0.5
    shown = torch.stack([subject, subject, horizon, y[:, 2] < 0.9, torch.ones_like(subject)], dim=1)
    measures = [x[:, 0], y[:, 0], size, x[:, 1], y[:, 1], radius, y[:, 2], crop.side.log2(), log2_blur.float()]
    measured = [subject] * 3 + [body] * 3 + [horizon] + [torch.ones_like(subject)] * 2
    return Targets(
        choices=torch.where(shown, scenes.choices, UNSEEN),
        visible=within.float(),
        measures=torch.stack(measures, dim=1),
        measured=torch.stack(measured, dim=1).float(),
    )


def _blurred(images: Tensor, log2_blur: Tensor) -> Tensor:
    """Blur each picture by a factor of its own, 1, 2 or 4."""
    versions = torch.stack([images, blur(images, 2), blur(images, 4)])
    return versions[log2_blur, torch.arange(len(images), device=images.device)]


def _losses(answers: tuple[Tensor, ...], wanted: Targets) -> dict[str, Tensor]:
    *logits, visible, measures = answers
    choice, correct = visible.new_zeros(()), visible.new_zeros(())
    for guess, right in zip(logits, wanted.choices.unbind(1), strict=True):
        # The sum over the number of pictures, because a mean over what is shown has no value where nothing is.
        choice = choice + F.cross_entropy(guess, right, ignore_index=UNSEEN, reduction="sum") / len(right)
        correct += (guess.argmax(1) == right).sum()
    accuracy = correct / (wanted.choices != UNSEEN).sum()
    presence = F.binary_cross_entropy_with_logits(visible, wanted.visible)
    measure = ((measures - wanted.measures).square() * wanted.measured).mean()
    terms = {"choice": choice, "visible": presence, "measure": measure}
    loss = choice + presence + 10 * measure
    return {"loss": loss, **{name: term.detach() for name, term in terms.items()}, "accuracy": accuracy}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m cutdiff.training.features", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/features"), help="checkpoints and log (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("weights/features"), help="the weights (%(default)s)")
    add_device(parser)
    parser.add_argument("--steps", type=COUNT, default=2400, metavar="N", help="steps of the training (%(default)s)")
    parser.add_argument("--batch", type=COUNT, default=32, metavar="N", help="pictures in each step (%(default)s)")
    parser.add_argument(
        "--set-size", type=COUNT, default=SET_SIZE, metavar="N",
        help="pictures in each of the sets whose distances the README tells (%(default)s)",
    )  # fmt: skip
    add_debug(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
