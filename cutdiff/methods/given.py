"""The pictures, masks and hints of a run, checked for its model and its canvas, and as methods take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cutdiff.checkpoint.control import control_of
from cutdiff.checkpoint.model import Model
from cutdiff.files import BadFile
from cutdiff.given.pictures import Picture
from cutdiff.given.regions import check_sizes
from cutdiff.methods.shared import between, step_at
from cutdiff.models.config import Size
from cutdiff.models.unet import Encoder
from cutdiff.sampling.controls import Control
from cutdiff.sampling.fitted import Fitted
from cutdiff.sampling.masks import MaskedPicture, is_white
from cutdiff.sampling.schedules import Schedule
from cutdiff.sampling.solvers import adds_noise
from cutdiff.settings import Fit, Settings
from cutdiff.specs import name_of


def check_counts(prompts: Sequence[str], settings: Settings) -> None:
    """ValueError where there are several pictures of a kind and another number of prompts."""
    for picture in settings.all_pictures():
        if picture.count not in (1, len(prompts)):
            counts = f"{picture.count} pictures for {len(prompts)} prompts"
            raise ValueError(f"{picture.option} holds {counts}: give one, or as many")


def check_given(model: Model, settings: Settings, size: Size, schedule: Schedule) -> None:
    """ValueError where what a run is given does not go with its model, its canvas of `size` latents or its steps;
    BadFile where a file of a ControlNet is no good."""
    if settings.regions:
        check_sizes(settings.regions, size)
        _check_bootstrapping(settings)
    if settings.invert and adds_noise(settings.solver, schedule):
        name = name_of("solver", settings.solver)
        raise ValueError(
            f"invert=True leads back to the image by steps without noise, and {name} adds some: choose euler, or an "
            "eta of 0 where it has one"
        )
    for hint in settings.control_image or ():
        sides = tuple(side * model.factor for side in size)
        if (hint.height, hint.width) != sides:
            raise ValueError(
                f"control_image={hint.name} has {hint.width}×{hint.height} pixels, and the picture will have "
                f"{sides[1]}×{sides[0]}: resize it, or leave width and height out"
            )
    for path, interval in zip(settings.control or (), settings.control_interval or (), strict=True):
        _check_interval(settings, interval)
        try:
            control_of(model, path)
        except (OSError, ValueError) as error:
            kind = ValueError if isinstance(error, OSError) else BadFile
            raise kind(f"control={str(error).removeprefix('control=')}") from None


def _first_step(settings: Settings) -> int:
    """The first step that is taken on the first canvas, where an image leaves those before out."""
    if settings.image is None:
        return 0
    return settings.num_steps - step_at(settings.img2img_strength, settings.num_steps)


def _check_bootstrapping(settings: Settings) -> None:
    """ValueError where regions are to be drawn on a plain colour in steps that an image leaves out."""
    share, first = settings.bootstrapping, _first_step(settings)
    if settings.image is None or not share:
        return
    if getattr(settings.method, "takes_picture", False) and not settings.redraws:
        cause, remedy = f"{settings.method_name} takes the image in the place of these", "leave it out"
    elif step_at(share, settings.num_steps) <= first:
        cause, remedy = f"the image leaves out {first} of {settings.num_steps}", "leave it out, or give more strength"
    else:
        return
    raise ValueError(f"bootstrapping={share:g} is of the first steps, and {cause}: {remedy}")


def _check_interval(settings: Settings, interval: tuple[float, float]) -> None:
    """ValueError where a ControlNet counts in none of the steps, of which img2img leaves the first out."""
    num_steps, is_img2img = settings.num_steps, settings.image is not None
    is_img2img &= not getattr(settings.method, "takes_picture", False)
    begin = _first_step(settings) if is_img2img else 0
    first, last = (step_at(share, num_steps) for share in interval)
    if max(first, begin) >= last:
        shares = [f"{step / num_steps:.3g}" for step in range(begin, num_steps)]
        places = ", ".join(shares if len(shares) < 4 else [*shares[:2], f"… {shares[-1]}"])
        taken = f"the {num_steps - begin} steps that are taken, at {places}"
        raise ValueError(
            f"control_interval={interval[0]:g},{interval[1]:g} holds none of {taken}, so that the ControlNet would not "
            f"count: widen it{', or give a greater strength' * is_img2img}"
        )


def controls_of(
    model: Model, settings: Settings, schedule: Schedule, compiled: Callable[[Encoder], Any]
) -> tuple[Control, ...]:
    """The ControlNets of a run, which were checked, with their hints; `compiled` is asked for their forward pass."""
    if not settings.control:
        return ()
    hints = settings.control_image or [None] * len(settings.control)  # a method makes them
    controls = []
    given = zip(settings.control, hints, settings.control_scale, settings.control_interval, strict=True)
    for path, hint, scale, interval in given:
        network = control_of(model, path)
        pixels = torch.empty(0) if hint is None else pixels_of(hint, model)
        controls.append(Control(network, pixels, scale, between(schedule, interval), compiled(network)))
    return tuple(controls)


def pixels_of(picture: Picture, model: Model) -> Tensor:
    """The pixels of a picture (B, 3, h, w), on the model's device."""
    return torch.from_numpy(picture.pixels()).movedim(3, 1).to(model.device)


def fitted(picture: Picture, model: Model, size: Size, fit: Fit) -> Fitted:
    """The pixels of a picture for canvases of the shape of `size`, in latents, on the model's device."""
    return Fitted.to(size, pixels_of(picture, model), fit, model.factor)


def masked_picture(
    model: Model, settings: Settings, size: Size, encode: Callable[[Tensor], Tensor]
) -> MaskedPicture | None:
    """The given picture and what is redrawn of it, on the canvas of `size` latents; None where nothing is held."""
    if not settings.redraws:
        return None
    given = settings.image, settings.mask
    if settings.place is None:
        image, mask = (fitted(picture, model, size, settings.fit)(size) for picture in given)
        white = is_white(mask)
        if not white.is_meta and not white.any():
            raise ValueError(
                f"mask={settings.mask.name} has nothing white where the canvas shows the image, so that nothing would "
                "be redrawn: choose another fit or size"
            )
        return MaskedPicture(image, white, encode, model.factor)
    image, mask = (picture and pixels_of(picture, model) for picture in given)
    mask = mask if mask is None else is_white(mask)
    return MaskedPicture.placed(image, mask, settings.place, size, encode, model.factor)
