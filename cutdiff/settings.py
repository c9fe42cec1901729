"""What a run can be told, checked where it enters. Imports neither torch nor the networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from cutdiff_kernels import GRAINS as INTERACTIONS

METHOD_NAMES = (
    "direct",
    "attention_scaling",
    "scalecrafter",
    "hidiffusion",
    "multidiffusion",
    "cutdiffusion",
    "demofusion",
    "accdiffusion",
    "magnify",
)
WITHOUT_VIEWS = ("direct", "attention_scaling", "scalecrafter", "hidiffusion")
"""The methods that take the canvas whole, so that a stride means nothing to them."""
STAGED = ("cutdiffusion", "magnify")
"""The methods whose detail stage begins where `structure_fraction` says."""
CHANGING_THE_NETWORK = ("attention_scaling", "scalecrafter", "hidiffusion", "accdiffusion")
"""The methods that look into the U-Net or change its inside, for some steps."""
SOLVER_NAMES = ("euler", "ddim")
SIZE_CONDITIONINGS = ("native", "target")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
BACKENDS = ("auto", "triton", "reference")
MAX_FLOAT32 = 2.0**128 * (1 - 2**-24)
"""What tensors can be multiplied by."""
MAX_SIDE = 32768
"""Of a picture, in pixels: its latents alone then take a quarter of a gigabyte, and its pixels 12."""


def not_one_of(value: object, known: Iterable[str]) -> str:
    """What an error says of a name that is not known."""
    names = [*known]
    return f"{value!r} is not one of {', '.join(names)}{nearest(value, names)}"


def nearest(value: object, known: Iterable[str]) -> str:
    """What an error adds where a known name looks much like the one that was given."""
    near = get_close_matches(str(value), [*known], n=1)
    return f": did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Settings:
    """The options of a run. ValueError, naming option, value and remedy, where one cannot be used."""

    negative_prompt: str = ""
    prompt_2: str | None = None
    """What the second text encoder reads; the prompt where it is None."""
    negative_prompt_2: str | None = None
    clip_skip: int | None = None
    """Which layer of the text encoders is read, counted from the end: 1 is the last; as trained where it is None."""
    height: int | None = None
    """In pixels, a multiple of 8; twice the model's native size where it is None."""
    width: int | None = None
    method: str | Callable[..., Any] = "cutdiffusion"
    """A name, or a method of your own: a function of a `methods.Run` that returns its stages."""
    num_steps: int = 50
    """Of each phase, where a method draws a cascade of sizes."""
    guidance_scale: float = 7.5
    """uncond + scale·(cond − uncond); 1 evaluates the prompt alone."""
    detail_guidance_scale: float | None = None
    """In the detail stage; what the method is made for where it is None: 1 for magnify, else `guidance_scale`."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """From which share of the steps to which guidance is on; elsewhere the prompt alone is evaluated, at half the cost
    (Kynkäänniemi et al. 2024, arXiv 2404.07724). Both ends are rounded up to whole steps."""
    solver: str = "euler"
    eta: float = 0.0
    """DDIM's fresh noise, 0 to 1."""
    seed: int = 0
    """Of the first image; the others count on from it."""
    stride: int | None = None
    """Between views, in latents; half of the model's native size where it is None."""
    structure_fraction: float | None = None
    """Where the detail stage begins, as a share of the steps, rounded up; the method's own default where it is None:
    0.5 for cutdiffusion, 0.3 for magnify."""
    interaction: str = "channel"
    """How the patches of CutDiffusion and AccDiffusion exchange pixels: "channel", "pixel" or "none"."""
    size_conditioning: str = "native"
    """What the network is told of picture sizes: "native" patches and crops, or "target" as the published code."""
    cosine_scales: tuple[float, float, float] = (3.0, 1.0, 1.0)
    """How fast DemoFusion's skip residual, dilated sampling and blur fade, each a power of a cosine."""
    word_threshold: float = 0.3
    """Share of a view that a word must fill to stand in its prompt (AccDiffusion's c)."""
    view_batch_size: int | None = None
    """Patches or views that go through the network at once; halved where a GPU's memory does not suffice. None: 16 on a
    CPU, all of a step on a GPU."""
    compile: bool = False
    """Whether the network goes through torch.compile, which takes minutes once; not for methods that change it."""
    cuda_graphs: bool = False
    """Whether the compiled network is recorded as a CUDA graph for each number of rows: fewer waits where batches are
    small."""
    backend: str = "auto"
    """Of the operators around the network: "triton", "reference" (plain torch), or "auto", which is Triton on a GPU."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SIDE:
                raise ValueError(f"{name}={value} must be a positive multiple of 8, at most {MAX_SIDE}")
        for name in ("num_steps", "view_batch_size", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.structure_fraction is not None and not 0 <= self.structure_fraction <= 1:
            raise ValueError(f"structure_fraction={self.structure_fraction} must lie in 0 … 1")
        for name in ("cosine_scales", "guidance_interval"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a list of numbers")
        if len(self.cosine_scales) != 3 or not all(0 <= scale < math.inf for scale in self.cosine_scales):
            raise ValueError(f"cosine_scales={self.cosine_scales} must be three finite numbers, none below 0")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval={self.guidance_interval} must be two shares, 0 ≤ from ≤ to ≤ 1")
        if not 0 <= self.word_threshold <= 1:
            raise ValueError(f"word_threshold={self.word_threshold} must lie in 0 … 1")
        for name in ("guidance_scale", "detail_guidance_scale"):
            value = getattr(self, name)
            if value is not None and not abs(value) <= MAX_FLOAT32:
                raise ValueError(f"{name}={value} must be a finite number (of float32)")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie in 0 … 1")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta={self.eta} needs solver='ddim', not {self.solver!r}")
        if self.compile and self.method in CHANGING_THE_NETWORK:
            raise ValueError(f"compile={self.compile} is not for {self.method}, which changes the network on the way")
        if self.cuda_graphs and not self.compile:
            raise ValueError(f"cuda_graphs={self.cuda_graphs} goes with compile, and that is off: ask for both")
        if self.method == "accdiffusion" and self.prompt_2 is not None:
            raise ValueError(
                f"prompt_2={self.prompt_2!r} is not for accdiffusion, whose views are told words of one prompt"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must lie in 0 … 2⁶⁴ − 1")
        for name, known in (
            *([] if callable(self.method) else [("method", METHOD_NAMES)]),
            ("solver", SOLVER_NAMES),
            ("interaction", INTERACTIONS),
            ("size_conditioning", SIZE_CONDITIONINGS),
            ("backend", BACKENDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={not_one_of(getattr(self, name), known)}")

    def described(self) -> dict[str, Any]:
        """All options as JSON can hold them; a method of one's own by its name."""
        return {**vars(self), "method": self.method_name}

    @property
    def method_name(self) -> str:
        return getattr(self.method, "__name__", type(self.method).__name__) if callable(self.method) else self.method

    def canvas_size(self, native_size: int, factor: int) -> tuple[int, int]:
        """Height and width in latents for a model of `native_size` latents and `factor` pixels for each."""
        height, width = (2 * native_size * factor if v is None else v for v in (self.height, self.width))
        for name, value in (("height", height), ("width", width)):
            if value % factor:
                raise ValueError(
                    f"{name}={value} must be a multiple of {factor}; try {value // factor * factor or factor}"
                )
        if self.stride is not None and self.stride > native_size:
            raise ValueError(f"stride={self.stride} must not exceed the window of {native_size} latents")
        return height // factor, width // factor
