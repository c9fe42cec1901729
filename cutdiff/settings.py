"""The options of a run that belong to no method, solver, schedule or guidance, and these four objects themselves.

This module imports no torch; what the objects need is imported where `Settings` are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

from cutdiff import specs
from cutdiff.files import BadFile
from cutdiff.given.controls import CONTROL_FILES, CONTROLS, check_hints, read_controls
from cutdiff.given.pictures import Picture, as_picture
from cutdiff.given.regions import as_regions, notices
from cutdiff.options import Between, Count, Options, Share, checked, options_of, read, short
from cutdiff.sources import described, source_hash
from cutdiff.specs import TABLES

VERSION = "0.1.0"
"""The version of the package, as records have it."""
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)
PREFERENCES = ("num_steps", "guidance_scale", "solver", "schedule")
"""The options that a model may say a preference of."""
PICTURES = ("image", "mask")
"""The options that are pictures: a file, or what `given.as_picture` takes."""
FILES = (*PICTURES, "regions", *CONTROL_FILES)
"""The options that are files."""
LATER = (
    "image", "strength", "fit", "invert", "mask", "feather", "place", "regions", "bootstrapping", *CONTROLS, "shift",
    "positions",
)  # fmt: skip
"""The options that old records do not know, which no record names where they have their defaults."""
OWNERS = {"fit": ("image",), "feather": ("mask", "place"), "bootstrapping": ("regions",)}
"""The options with a default that mean nothing without one of others."""
STRENGTH = 0.5
"""The share of the steps that a picture is drawn on by, where nobody says."""
BOOTSTRAPPED = 0.2
"""The share of the steps in which regions are drawn on a plain colour, where nobody says."""
Fit = Literal["cover", "contain", "stretch"]
Pixels = Annotated[int, Between(0)]
MAX_SIDE = 32768
"""The longest side of a picture in pixels: its latents then take a quarter of a gigabyte, and its pixels 12."""


def left_to_model(options: Mapping[str, Any], preferred: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's preferences that these options of a run leave open: a guidance scale where the guidance has
    one, and neither its spec nor an object that is given says which."""
    left = {name: value for name, value in preferred.items() if name not in options}
    guidance = options.get("guidance", Settings.guidance)
    if "guidance_scale" in left:
        thing = specs.named("guidance", guidance)
        in_spec = isinstance(guidance, str) and "guidance_scale" in specs.parse("guidance", guidance)[1]
        if in_spec or not isinstance(thing, type) or "guidance_scale" not in options_of(thing):
            del left["guidance_scale"]
    return left


def check_preferred(preferred: Mapping[str, Any]) -> None:
    """ValueError where a model's preferences are none that a run can have. A solver and a schedule are names of what
    ships, so that a model never names code of its own."""
    for name, value in preferred.items():
        if name not in PREFERENCES:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(PREFERENCES)}")
        if name in TABLES and (not isinstance(value, str) or specs.parse(name, value)[0] not in TABLES[name]):
            raise ValueError(f"{name}={value!r} is not one of {', '.join(TABLES[name])}")
    Settings(**preferred)


def check_owned(names: Iterable[str], options: Mapping[str, Any]) -> None:
    """ValueError where an option of these names, if only with its default, belongs to others that are not given."""
    for name in names:
        owners = OWNERS.get(name, ())
        if owners and all(options.get(owner) is None for owner in owners):
            what = f"{short(options[name])} goes with {' or '.join(owners)}"
            raise ValueError(f"{name}={what}: give that, or leave it out")
        if name == "fit" and options.get("place") is not None:
            what = f"{short(options[name])} resizes the image, and place puts it where it is"
            raise ValueError(f"{name}={what}: leave one out")


def _of_one_value(mask: Picture) -> str:
    """The fault of a mask that is white nowhere, or everywhere, with its value where that is another."""
    gray = mask.pixels().mean(axis=3) * 255
    if not mask.white:
        lightest = round(float(gray.max()))
        cause = f"nowhere lighter than {lightest} of 255, where white begins at 128" if lightest else "black all over"
        return f"is {cause}, so that nothing would be redrawn: make that white"
    darkest = round(float(gray.min()))
    cause = "white all over" if darkest == 255 else f"nowhere darker than {darkest} of 255, where white begins at 128"
    alpha = ", as its transparent parts are laid on white" * any("transparent" in notice for notice in mask.notices)
    return (
        f"is {cause}{alpha}, so that nothing of the image would be held: paint black what is to stay, or leave it out"
    )


@dataclass(frozen=True, init=False)
class Settings(Options):
    """All that a run can be given. `Settings(method="magnify", structure_fraction=0.5)` takes the options below, and by
    their names those of the method, the solver, the schedule and the guidance, which then have them. ValueError, with
    option, value and remedy, where one cannot be used.

    `dataclasses.replace` changes options of any of these in the same way; another method, solver, schedule or guidance
    comes with its own options, not with those of the one before.
    """

    negative_prompt: str = ""
    prompt_2: str | None = None
    """The text that the second text encoder reads; None: the prompt."""
    negative_prompt_2: str | None = None
    clip_skip: int | None = None
    """The layer of the text encoders that is read, counted from the end, 1 the last; None: as trained."""
    height: int | None = None
    """The height in pixels, a multiple of 8; None: twice the model's native size, or as the image's shape has it."""
    width: int | None = None
    """The width in pixels, a multiple of 8; None: twice the model's native size, or as the image's shape has it."""
    image: Any = None
    """The picture to start from, a file: methods that draw a native picture first take it for that one, all others
    begin with it, noised, at `strength`."""
    strength: Share | None = None
    """The share of the steps that are taken on the image, rounded up; None: 0.5, or as the method has it, but all of
    them where a mask says what is redrawn."""
    fit: Fit = "cover"
    """The way to the size where the image has another shape: "cover" crops it, "contain" goes on with its border,
    "stretch" stretches it."""
    invert: bool = False
    """Begin with the noise that leads to the image, by DDIM inversion, and not with a drawn one: for methods that begin
    with the image at `strength`, which may be 1."""
    mask: Any = None
    """A picture of the image's size, a file: what is white is redrawn, and all else of the image is held."""
    feather: Annotated[int, Between(0, 1024)] = 16
    """The width in pixels of the border around the mask in which what is drawn fades into the image."""
    place: tuple[Pixels, Pixels] | None = None
    """The place X,Y of the image's upper left corner on a larger canvas, in pixels, what lies beside it being drawn;
    None: the image is fitted to the canvas."""
    control: Any = None
    """A ControlNet that guides by a hint, its file or folder, or several."""
    control_image: Any = None
    """The hint of the ControlNet of the same number, a picture of the size to be drawn, a file; it says the size unless
    width and height do, beside an image too."""
    control_scale: Any = None
    """The factor of what a ControlNet adds, above 0 and at most 10, one for each; None: 1."""
    control_interval: Any = None
    """The shares of the steps between which a ControlNet counts, a pair for each; None: in all steps."""
    method: Any = "cutdiffusion"
    """A spec, a dataclass with `stages(run)`, or a function of a `Run` that returns its stages."""
    solver: Any = "euler"
    """A spec, or an object with `start(schedule, noise)`."""
    schedule: Any = "model"
    """A spec, an object with `sigmas(model_noise, num_steps)`, or a list of sigmas that ends with 0."""
    guidance: Any = "cfg"
    """A spec, or a function of (conditional, unconditional, sigma, step)."""
    positions: Any = None
    """The way in which a transformer is told where tokens lie beyond its native size, in all methods: a spec, or an
    object with `angles` and `sharpness`; None: as it was trained. Views of native size have nothing beyond it."""
    num_steps: Count = 50
    """The steps of each phase, where a method draws a cascade of sizes."""
    shift: Annotated[float, Between(1e-3, 1e3)] | Literal["native", "canvas"] | None = None
    """The shift of a flow model's times towards noise, a factor, or as its schedule has it for a picture of the
    "native" size or the "canvas"; None: for the smaller of both, so that a large canvas has the one of the training."""
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    """The shares of the steps between which guidance is on; elsewhere the prompt alone is evaluated, at half the cost.
    Both ends are rounded up to whole steps (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""
    seed: int = 0
    """The seed of the first image; the others count on from it."""
    regions: Any = None
    """Prompts of parts of the picture, of which the prompt of the run draws the rest: a file of regions, or a list of
    `Region`."""
    bootstrapping: Share | None = None
    """The share of the steps, rounded up, in which each region is drawn on a plain colour, so that its subject stays
    within; None: 0.2, of which an image may leave nothing."""
    view_batch_size: Count | None = None
    """The patches or views that go through the network at once, halved where a GPU's memory does not suffice; None: 16
    on a CPU, all of a step on a GPU."""
    compile: bool = False
    """Compile the network's blocks, which takes a while for each number of rows: for a GPU, and not for methods that
    change the network."""
    cuda_graphs: bool = False
    """Compile the network as a whole, and record it as a CUDA graph for each number of rows: fewer waits where batches
    are small."""
    backend: Backend = "auto"
    """The operators around the network: "triton", "reference" (plain torch), or "auto", which is Triton on a GPU."""

    def __init__(self, /, **options: Any) -> None:
        own = {field.name: options.pop(field.name, field.default) for field in fields(Settings)}
        check_owned([name for name in OWNERS if own[name] != getattr(Settings, name)], own)
        own |= {name: as_picture(name, own[name]) for name in PICTURES}
        own["regions"] = as_regions(own["regions"])
        own |= read_controls(own)
        if own["positions"] is not None:
            own["positions"] = specs.part("positions", "positions", own["positions"])
        self._give_strength(own, options)
        things = {kind: specs.resolve(kind, own[kind], options) for kind in TABLES}
        for kind, thing in things.items():
            if same := [name for name in options_of(thing) if name in own and name != "strength"]:
                raise ValueError(
                    f"{kind}={specs.name_of(kind, thing)} has an option {same[0]!r}, which every run has: rename it"
                )
        things = specs.changed(things, options, also=own)
        for name, value in {**own, **things, "_sources": self._hashes(things)}.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SIDE:
                raise ValueError(f"{name}={short(value)} must be a positive multiple of 8, at most {MAX_SIDE}")
        self._check_mask()
        if self.invert and (self.image is None or getattr(self.method, "takes_picture", False)):
            cause = "no image is given" if self.image is None else f"{self.method_name} takes the image without noise"
            raise ValueError(f"invert={self.invert} is of the noise on an image, and {cause}: leave it out")
        makes_hints = getattr(self.method, "makes_hints", False)
        check_hints(self.control, self.control_image, self.method_name if makes_hints else "")
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval={self.guidance_interval} must be two shares, 0 ≤ from ≤ to ≤ 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={short(self.seed)} must lie in 0 … 2⁶⁴ − 1")
        for kind in ("method", "guidance"):
            if self.compile and getattr(thing := getattr(self, kind), "changes_network", False):
                name = specs.name_of(kind, thing)
                raise ValueError(f"compile={self.compile} is not for {name}, which changes the network on the way")
        if self.cuda_graphs and not self.compile:
            raise ValueError(f"cuda_graphs={self.cuda_graphs} goes with compile, which is off: give --compile too")
        for thing in (self.method, self.guidance):
            if callable(check := getattr(thing, "check_settings", None)):
                check(self)

    def _check_mask(self) -> None:
        """ValueError where a mask, its feather or the place of the image cannot be used."""
        image, mask, place = self.image, self.mask, self.place
        said = f"mask={mask.name}" if mask is not None else place and f"place={place[0]},{place[1]}"
        if image is None and said:
            raise ValueError(f"{said} is of an image, and none is given: give one, or leave it out")
        if self.redraws and self.invert:
            raise ValueError(f"invert={self.invert} is of the whole image, and {said} draws a part anew: leave one out")
        if image is not None and mask is not None:
            own, other = (f"{picture.width}×{picture.height}" for picture in (mask, image))
            if own != other:
                raise ValueError(f"{said} has {own} pixels, and the image {other}: give one of the image's size")
            if mask.white in (0, 1):
                raise BadFile(f"mask={mask.name} {_of_one_value(mask)}")
        if place is not None:
            self._check_place(place)

    def _check_place(self, place: tuple[int, int]) -> None:
        """ValueError where an image does not lie on a larger canvas."""
        said, image = f"place={place[0]},{place[1]}", self.image
        if self.height is None or self.width is None:
            raise ValueError(f"{said} needs the size of the canvas: give width and height")
        most = self.width - image.width, self.height - image.height
        sizes = f"the image has {image.width}×{image.height} pixels and the canvas {self.width}×{self.height}"
        if min(most) < 0:
            raise ValueError(f"{said} needs a larger canvas: {sizes}")
        if any(side > largest for side, largest in zip(place, most, strict=True)):
            raise ValueError(f"{said} lies beside the canvas: {sizes}, so that it must be at most {most[0]},{most[1]}")
        if most == (0, 0) and self.mask is None:
            raise ValueError(f"{said} leaves nothing to draw: {sizes}, give a larger width or height")

    def described(self) -> dict[str, Any]:
        """All options as JSON can hold them: the four objects by their full specs."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.redraws or (self.image is not None and not getattr(self.method, "takes_picture", False)):
            own["strength"] = self.img2img_strength
        own |= {name: picture.described() for name, picture in self.pictures().items()}
        own["regions"] = self.regions and [region.described() for region in self.regions]
        if self.positions is not None and not isinstance(self.positions, str):
            own["positions"] = described(self.positions)
        if self.control_image:
            own["control_image"] = [hint.described() for hint in self.control_image]
        own = {name: value for name, value in own.items() if name not in LATER or value != getattr(Settings, name)}
        if self.regions:
            own["bootstrapping"] = self.bootstrapped
        return {**own, **{kind: specs.spec_of(kind, getattr(self, kind)) for kind in TABLES}}

    def pictures(self) -> dict[str, Picture]:
        """The pictures that the run is given, by their options, without hints."""
        return {name: picture for name in PICTURES if (picture := getattr(self, name)) is not None}

    def all_pictures(self) -> list[Picture]:
        """The pictures that the run is given, and the hints of its ControlNets."""
        return [*self.pictures().values(), *(self.control_image or ())]

    def notices(self) -> list[str]:
        """The things that a user should know of how pictures and regions were read, each beginning with its option."""
        return [notice for picture in self.all_pictures() for notice in picture.notices] + notices(self.regions or ())

    @property
    def img2img_strength(self) -> float:
        """The share of the steps that are taken on the image, by a method which draws no picture first, or where a part
        is redrawn by any."""
        usual = 1.0 if self.redraws else STRENGTH
        return usual if self.strength is None else self.strength

    @property
    def bootstrapped(self) -> float:
        """The share of the steps in which regions are drawn on a plain colour."""
        return BOOTSTRAPPED if self.bootstrapping is None else self.bootstrapping

    @property
    def redraws(self) -> bool:
        """True where a part of the image is redrawn, or what lies beside it, and the rest is held."""
        return self.mask is not None or self.place is not None

    def has(self, option: str) -> bool:
        """True where an option of this name belongs to the run, or to one of its four objects."""
        return any(option in options_of(thing) for thing in (self, *(getattr(self, kind) for kind in TABLES)))

    def sources(self) -> dict[str, str]:
        """The source hashes of those of the four objects that are not the package's, before a run could change them."""
        return dict(vars(self)["_sources"])

    @staticmethod
    def _give_strength(own: dict[str, Any], options: dict[str, Any]) -> None:
        """Move `strength` from the run's `own` options to those of the method, where it has one of this name or says
        which of its options do the same."""
        strength, method = own["strength"], specs.named("method", own["method"])
        if strength is None:
            return
        redraws = own["mask"] is not None or own["place"] is not None
        if "strength" in options_of(method) and not redraws:
            options["strength"], own["strength"] = strength, None
            return
        is_text = isinstance(strength, specs.Text)
        share = read("strength", strength, Share) if is_text else checked("strength", strength, Share)
        if own["image"] is None:
            raise ValueError(f"strength={share:g} is of an image, and none is given: give one, or leave it out")
        may_be_all = redraws or own["invert"]  # what is held stays, and the noise of an inversion holds the image
        if not 0 < share < 1 and not (may_be_all and share == 1):
            what = "leave nothing of the image" if share else "draw nothing on the image"
            raise ValueError(f"strength={share:g} would {what}: give a share between 0 and 1, such as {STRENGTH}")
        own["strength"], name = share, specs.name_of("method", method)
        if redraws:
            return
        of_strength: Any = getattr(method, "of_strength", None)
        if of_strength is not None:
            own["strength"], same = None, of_strength(share)
            if both := [option for option in same if option in options]:
                raise ValueError(f"strength={share:g} is another word for {both[0]} of {name}: give one of them")
            options |= same
        elif getattr(method, "takes_picture", False):
            raise ValueError(f"strength={share:g} means nothing to {name}, which takes all of its steps: leave it out")

    @staticmethod
    def _hashes(things: dict[str, Any]) -> dict[str, str]:
        hashes = {kind: source_hash(thing) for kind, thing in things.items()}
        return {kind: value for kind, value in hashes.items() if value is not None}

    @property
    def method_name(self) -> str:
        """The method's name, as file names have it."""
        return specs.name_of("method", self.method)

    def canvas_size(self, native_size: int, factor: int) -> tuple[int, int]:
        """Height and width in latents for a model of `native_size` latents and `factor` pixels for each."""
        height, width = self._sides(2 * native_size * factor, factor)
        for name, value in (("height", height), ("width", width)):
            if value % factor:
                below = value // factor * factor
                near = f"{below} or {below + factor}" if below else factor
                raise ValueError(f"{self._giver(name)} must be a multiple of {factor}; try {near}")
        return height // factor, width // factor

    def _giver(self, side: str) -> str:
        """The option that gives the height or width, and its value, as the beginning of an error."""
        own = getattr(self, side)
        if own is None and self.control_image:
            hint = self.control_image[0]
            return f"control_image={hint.name} has {hint.width}×{hint.height} pixels, and its {side}"
        return f"{side}={own}"

    def _sides(self, usual: int, factor: int) -> tuple[int, int]:
        """Height and width in pixels; one that is not given is `usual`, or as the shape of the image has it, to whole
        latents, where then the longer one is `usual`."""
        height, width, image = self.height, self.width, self.image
        if self.control_image:
            hint = self.control_image[0]
            height, width = height or hint.height, width or hint.width
        if image is None or (height is not None and width is not None):
            return usual if height is None else height, usual if width is None else width
        share = image.height / image.width
        if height is None and width is None:
            height, width = (usual, None) if share > 1 else (None, usual)
        name, other = ("width", height / share) if height is not None else ("height", (width or 0) * share)
        side = max(1, round(other / factor)) * factor
        if side > MAX_SIDE:
            shape = f"the shape of the image, {image.width}×{image.height}"
            raise ValueError(f"{name}={side} follows from {shape}, and is more than {MAX_SIDE}: give {name}")
        return (side if height is None else height, side if width is None else width)
