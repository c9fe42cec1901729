"""Operators carry a canvas to the network and what the network answers back; scatter ∘ gather is the identity.

`Patches` and `Views` are the ones that the methods use, in one kernel each way. The plain functions that they are made
of are importable from here too. `to_network` and `carry_back` (`from_network`, then the way back, then `on_canvas`)
make an operator of one's own a few lines, and `check_operator` proves that it keeps the promises of `Operator`:

    class Shift:
        def gather(self, canvas, backend="auto", **how):
            return to_network(canvas.roll((3, 5), (2, 3)), **how)

        def scatter(self, values, backend="auto", **how):
            return carry_back(values, lambda items: items.roll((-3, -5), (2, 3)), **how)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Literal, Protocol, TypeGuard, Unpack

import torch
from cutdiff_kernels import GRAINS, reference
from cutdiff_kernels.checks import check_cover, check_patches
from cutdiff_kernels.conversions import FromNetwork, ToNetwork, carry_back, from_network, on_canvas, to_network
from cutdiff_kernels.geometry import grid_for, pad_to_grid, view_grid
from cutdiff_kernels.permutations import Permutation, SeededPermutation, check_index
from cutdiff_kernels.reference import average, cut, permute, permute_back, relocate, views
from torch import Tensor

from cutdiff.settings import BACKENDS

__all__ = [
    "GRAINS",
    "FromNetwork",
    "Operator",
    "Patches",
    "Permutation",
    "SeededPermutation",
    "ToNetwork",
    "ViewWeights",
    "Views",
    "average",
    "carry_back",
    "check_backend",
    "check_operator",
    "cut",
    "from_network",
    "grid_for",
    "items_of",
    "on_canvas",
    "pad_to_grid",
    "permute",
    "permute_back",
    "relocate",
    "to_network",
    "upload",
    "view_grid",
    "view_weights",
    "views",
]


ViewWeights = Literal["uniform", "gaussian", "cosine"]


class Operator(Protocol):
    """A way from the canvas to the network and back, both linear, whose `scatter` undoes its `gather`.

    `check_operator` tells where an operator breaks these promises. One that must break them is composed by hand, as
    `gather`, a denoiser and `scatter`: `Denoiser.through` relies on them.

    An operator may also have `items(canvas) -> (number, (h, w))`, the number of items that it makes of a canvas
    (B, C, H, W), all images together and copies not counted, and their size. `items_of` calls it, and gathers from an
    empty canvas where there is none.
    """

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        """Canvas (B, C, H, W) -> the network's input (items·copies, C, h, w), images first, copies side by side."""
        ...

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        """The network's output (items·copies, C, h, w) -> canvas (B, C, H, W), float32."""
        ...


@dataclass(frozen=True)
class Patches:
    """permute ∘ cut, and relocate ∘ permute⁻¹: N interleaved patches that exchange pixels, (B·N·copies, C, h, w).

    ValueError where the grid does not divide the canvas (see `pad_to_grid`), where the permutation does not fit, or
    where an explicit index is no permutation at some position. The index is read when the operator is made and not
    again by the kernels, so one that is given on the CPU makes nothing wait for a GPU.
    """

    grid: tuple[int, int]
    permutation: Permutation = None

    def __post_init__(self) -> None:
        if isinstance(self.permutation, Tensor):
            check_index(self.permutation, self.grid[0] * self.grid[1])

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        kernels = _kernels("patches", backend, canvas)
        return kernels.gather_patches(canvas, self.grid, self._permutation_on(canvas.device), **how)

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        return self.flagged(None, values, backend, **how)

    def flagged(self, flag: Tensor | None, values: Tensor, backend: str, **how: Unpack[FromNetwork]) -> Tensor:
        """`scatter`, whose kernel sets `flag` to 1 where a value that it writes is not finite."""
        kernels, flags = _kernels("patches", backend, values), {} if flag is None else {"flag": flag}
        return kernels.scatter_patches(values, self.grid, self._permutation_on(values.device), **how, **flags)

    def items(self, canvas: Tensor) -> tuple[int, tuple[int, int]]:
        """Return the number of patches of all images of the canvas, and their (h, w)."""
        size = check_patches((canvas.shape[2], canvas.shape[3]), self.grid)
        return len(canvas) * self.grid[0] * self.grid[1], size

    def _permutation_on(self, device: torch.device) -> Permutation:
        index = self.permutation
        return upload(index, device) if isinstance(index, Tensor) and index.device != device else index


@dataclass(frozen=True)
class Views:
    """Overlapping windows, (B·V·copies, C, *window), and their mean where they overlap; zeros outside the canvas.

    ValueError where no view covers a pixel, or where a weight is not positive.
    """

    origins: Tensor
    """(B, V, 2) of (top, left), given on the CPU, where their cover is checked without waiting for a GPU."""
    window: tuple[int, int]
    size: tuple[int, int]
    """The size (H, W) of the canvas."""
    weights: Tensor | None = None
    """(h, w), positive, how much each pixel of a view counts; all count alike if None. Given on the CPU too."""
    device: torch.device | str = "cpu"
    """The device of the canvas, which origins and weights are moved to."""

    def __post_init__(self) -> None:
        check_cover(self.origins, self.window, self.size)
        object.__setattr__(self, "origins", upload(self.origins, self.device))
        if self.weights is not None:
            if not bool((self.weights > 0).all()):
                raise ValueError(
                    "weights of a view must all be positive: one that is zero can leave a pixel without any"
                )
            object.__setattr__(self, "weights", upload(self.weights, self.device))

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        return _kernels("views", backend, canvas).gather_views(canvas, self.origins, self.window, **how)

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        return self.flagged(None, values, backend, **how)

    def flagged(self, flag: Tensor | None, values: Tensor, backend: str, **how: Unpack[FromNetwork]) -> Tensor:
        """`scatter`, whose kernel sets `flag` to 1 where a value that it writes is not finite."""
        kernels, flags = _kernels("views", backend, values), {} if flag is None else {"flag": flag}
        return kernels.average_views(
            values, self.origins, self.size, weights=self.weights, covered=True, **how, **flags
        )

    def items(self, canvas: Tensor) -> tuple[int, tuple[int, int]]:
        """Return the number of views of all images of the canvas, and their (h, w)."""
        return len(canvas) * self.origins.shape[1], self.window


def view_weights(kind: ViewWeights, window: tuple[int, int]) -> Tensor | None:
    """The weights (h, w) of a view's pixels, positive; None where all count alike.

    "gaussian" has a deviation of a tenth of the window's side, as in Mixture of Diffusers (Jiménez 2023, arXiv
    2302.02412). "cosine" is sin² of the way across: at a stride of half a window, two views that overlap weigh 1.
    """
    if kind == "uniform":
        return None
    sides = ((side, torch.arange(side, dtype=torch.float32, device="cpu")) for side in window)
    rows, columns = ((places - (side - 1) / 2) / side for side, places in sides)  # from the middle
    if kind == "gaussian":
        return torch.outer(torch.exp(-(rows**2) / 0.02), torch.exp(-(columns**2) / 0.02))
    return torch.outer(torch.cos(torch.pi * rows) ** 2, torch.cos(torch.pi * columns) ** 2)


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError where `backend` cannot run on `device`."""
    if _is_reference(backend, device):
        return
    try:
        launch = import_module("cutdiff_kernels.launch")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"backend={backend!r} needs {error.name} on {device.type}: install it, or take 'reference'"
        ) from None
    launch.check_device(device)


def takes_flag(operator: Operator, backend: str, device: torch.device) -> TypeGuard[Patches | Views]:
    """Tell if the operator's scatter is a kernel that sets a flag where a value is not finite."""
    return type(operator) in (Patches, Views) and not _is_reference(backend, device)


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy values to `device`, contiguous; the host does not wait for a copy to a GPU."""
    values = values.contiguous()
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


@torch.no_grad()
def items_of(operator: Operator, canvas: Tensor) -> tuple[int, tuple[int, int]]:
    """Return the number of items that an operator makes of a canvas (B, C, H, W), and their (h, w).

    Items of all images count, copies do not. An operator that has no `items` gathers from a canvas of this shape: one
    without values, on "meta", or one of zeros on the CPU where it needs values.
    """
    items = getattr(operator, "items", None)
    if callable(items):
        return operator.items(canvas)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        gathered = operator.gather(torch.empty(canvas.shape, dtype=canvas.dtype, device="meta"))
    except Exception:  # an operator that reads values fails on "meta" in any way; on zeros its own errors show
        gathered = operator.gather(torch.zeros(canvas.shape, dtype=canvas.dtype, device="cpu"))
    return len(gathered), (gathered.shape[2], gathered.shape[3])


@torch.no_grad()
def check_operator(operator: Operator, canvas: Tensor, *, atol: float = 1e-5, backend: str = "auto") -> None:
    """Raise ValueError naming the first promise of `Operator` that is broken for a canvas (B, C, H, W), and how far.

    The promises: `gather` and `scatter` are linear and keep images apart, items in the order of their images; `scatter`
    undoes `gather`; scale, dtype, copies, guidance and canvas are honoured; `items`, where there is one, is right.
    Of the canvas the shape and device are taken, and the dtype if it is float64, but not the values: probes in
    [−1, 1] are drawn in their place, and a result may be off by `atol`. Only several images show that they are kept
    apart.
    """
    name = type(operator).__name__
    x = _probe(canvas.shape, 0, canvas)
    items = operator.gather(x, backend)
    if items.ndim != 4 or not len(items) or len(items) % len(x) or items.shape[1] != x.shape[1]:
        raise ValueError(
            f"{name}: gather must give (items, {x.shape[1]}, h, w), a multiple of {len(x)} items; it gives "
            f"{tuple(items.shape)}"
        )
    number, size = items_of(operator, x)
    if (number, tuple(size)) != (len(items), tuple(items.shape[2:])):
        raise ValueError(
            f"{name}: items must say what gather gives, {len(items)} items of {tuple(items.shape[2:])}; it "
            f"says {number} of {tuple(size)}"
        )
    for promise, call, expected in _promises(operator, x, items, backend):
        try:
            result = call()
        except Exception as error:
            raise ValueError(f"{name}: {promise}; it raises {type(error).__name__}: {error}") from error
        if result.shape != expected.shape or result.dtype != expected.dtype:
            raise ValueError(
                f"{name}: {promise}; it gives {tuple(result.shape)} of {result.dtype}, not "
                f"{tuple(expected.shape)} of {expected.dtype}"
            )
        off = (result.to(x.dtype) - expected.to(x.dtype)).abs().max().item()
        allowed = atol + (0 if expected.dtype == x.dtype else torch.finfo(expected.dtype).eps)
        if not off <= allowed:  # NaN is off too
            raise ValueError(f"{name}: {promise}; it is off by {off:.2g}, and {allowed:.2g} is allowed")


Promise = tuple[str, Callable[[], Tensor], Tensor]
"""The wording of a promise, a call of the operator, and the result that keeps the promise."""


def _promises(operator: Operator, x: Tensor, items: Tensor, backend: str) -> Iterator[Promise]:
    """Yield the promises of `Operator` for a canvas x and the items that are gathered from it."""
    gather, scatter = partial(operator.gather, backend=backend), partial(operator.scatter, backend=backend)
    a, b, c_in, scale = 0.75, -1.25, 0.375, 2.5
    y, u, v = _probe(x.shape, 1, x), _probe(items.shape, 2, x), _probe(items.shape, 3, x)
    yield "gather must be linear", lambda: gather(a * x + b * y), a * items + b * gather(y)
    yield "scatter must give the canvas' shape in float32", lambda: torch.zeros_like(scatter(u)), torch.zeros_like(x)
    from_u, from_v = scatter(u), scatter(v)
    yield "scatter must be linear", lambda: scatter(a * u + b * v), a * from_u + b * from_v

    for image in range(len(x)):
        text = f"must keep images apart and in order, item b·N + n to image b; image {image} is not"
        alone, its_items = (_only(values, image, len(x)) for values in (x, items))
        yield f"gather {text}", partial(gather, alone), its_items
        alone, its_canvas = (_only(values, image, len(x)) for values in (u, from_u))
        yield f"scatter {text}", partial(scatter, alone), its_canvas
    yield "scatter must undo gather", lambda: scatter(items), x

    yield "gather must multiply by c_in", lambda: gather(x, c_in=c_in), to_network(items, c_in=c_in)
    half = to_network(items, dtype=torch.bfloat16)
    yield "gather must cast to dtype", lambda: gather(x, dtype=torch.bfloat16), half
    yield "gather must give copies side by side", lambda: gather(x, copies=2), to_network(items, copies=2)
    pairs, guided = torch.stack([u, v], dim=1).flatten(0, 1), from_u + scale * (from_v - from_u)
    yield (
        "scatter must take negative + guidance_scale · (positive − negative) of two copies side by side",
        lambda: scatter(pairs, copies=2, guidance_scale=scale),
        guided,
    )
    yield (
        "scatter must give c_skip · canvas + c_out · values",
        lambda: scatter(u, canvas=y, c_skip=a, c_out=b),
        on_canvas(from_u, y, a, b),
    )
    yield (
        "scatter must lay a guidance pair on a canvas too",
        lambda: scatter(pairs, copies=2, guidance_scale=scale, canvas=y, c_skip=a, c_out=b),
        on_canvas(guided, y, a, b),
    )


def _probe(shape: Sequence[int], seed: int, like: Tensor) -> Tensor:
    """Draw values in [−1, 1] on the device of `like`, in float64 if it is, else in float32."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
    return values.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)


def _only(values: Tensor, image: int, num_images: int) -> Tensor:
    """Return values (B·N, ...) that are zero for all images but one."""
    alone = torch.zeros_like(values).unflatten(0, (num_images, -1))
    alone[image] = values.unflatten(0, (num_images, -1))[image]
    return alone.flatten(0, 1)


def _kernels(name: str, backend: str, values: Tensor) -> ModuleType:
    """Return the module whose operators run: the references, or the Triton kernels, which raise where they cannot."""
    return reference if _is_reference(backend, values.device) else import_module(f"cutdiff_kernels.{name}")


def _is_reference(backend: str, device: torch.device) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    return backend == "reference" or (backend == "auto" and device.type != "cuda")
