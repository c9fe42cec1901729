"""Adaptive projected guidance, CFG++ and perturbed attention: their formulas, and each guidance on every method."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import AdaptiveProjectedGuidance, MomentumBuffer
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from test_plan import sizes_of
from tiny import QUICK_UNET, relative_error
from torch import Tensor

import cutdiff
from cutdiff.bench.baselines import published_unet
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import randomise
from cutdiff.models.inside import replaced
from cutdiff.models.unet import UNet
from cutdiff.pipeline import prepare
from cutdiff.planning.forecast import walk
from cutdiff.sampling.denoiser import Call, Observer
from cutdiff.sampling.guidance import CFG, CFGPlusPlus, Renoising
from cutdiff.sampling.perturbed import PAG
from cutdiff.sampling.projected import APG
from cutdiff.sampling.schedules import Schedule
from cutdiff.sampling.solvers import DDIM, Euler
from cutdiff.scenes.vocabulary import WIDTH
from cutdiff.settings import Settings
from cutdiff.specs import GUIDANCE, METHODS, resolve

PROMPTS = ["a red house at night", "a blue tree"]
RUN: dict[str, Any] = {"num_steps": 4, "height": 96, "width": 128, "seed": 3}
NEUTRAL = {"apg": "apg,eta=1,norm_threshold=0,momentum=0", "pag": "pag,pag_scale=0", "rescale": "rescale,phi=0"}
"""The guidances whose other options can be set so that plain guidance remains."""


def latents(model: Model, prompt: str | list[str] = PROMPTS, **options: Any) -> Tensor:
    return list(cutdiff.denoise(model, prompt, **{**RUN, **options}))[-1].latents


def of_any_guidance(method: str) -> str:
    """The method, none of whose stages asks for a guidance scale above 1 of its own."""
    for option in ("detail_guidance_scale", "max_guidance_scale", "high_guidance_scale"):
        if getattr(resolve("method", method), option, None) not in (None, 1):
            method += f",{option}=None"
    return method


@pytest.fixture(scope="module")
def tiny_sd15(tiny_model: Model) -> Model:
    """A random model of SD 1.5's architecture: no pooled text, no sizes, attention at every level."""
    layout = {"pooled_dim": 0, "size_embedding_dim": 0, "transformer_layers": (1, 1), "linear_projections": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet(replace(QUICK_UNET, context_dim=2 * WIDTH, **layout))
    return replace(tiny_model, unet=unet.eval().requires_grad_(False))


# ---- Each on every method


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
@pytest.mark.parametrize("method", METHODS)
def test_on_every_method_and_family(tiny_model: Model, tiny_sd15: Model, method: str, family: str) -> None:
    """Every guidance gives pictures of its own, and at its neutral options those of plain guidance."""
    model, options = tiny_model if family == "sdxl" else tiny_sd15, {"method": of_any_guidance(method), "num_steps": 2}
    plain = latents(model, "a tent", **options, guidance="cfg,guidance_scale=4")
    drawn = [plain]
    for name in GUIDANCE:
        scale = {} if name == "cfg_plus_plus" else {"guidance_scale": 4.0}
        own = latents(model, "a tent", **options, guidance=name, **scale)
        assert own.isfinite().all()
        if name != "cfg":
            assert min(relative_error(own, other) for other in drawn) > 1e-5, name
            drawn.append(own)
        if name in NEUTRAL:
            same = latents(model, "a tent", **options, guidance=NEUTRAL[name], **scale)
            assert relative_error(same, plain) < 1e-4, name
            assert torch.equal(same, plain) or name != "pag", "nothing else is evaluated"


@pytest.mark.parametrize("name", [*GUIDANCE])
def test_an_interval_and_a_scale_of_a_stage(tiny_model: Model, name: str) -> None:
    """Outside of the interval, and in a stage whose scale is 1, the prompt alone is evaluated."""
    rows = {"pag": 3}.get(name, 2)
    options = {"method": "direct", "guidance": name, **RUN}
    record = cutdiff.generate(tiny_model, "a tent", **options, guidance_interval=(0.25, 0.75)).record
    assert record["network_evaluations"] == 1 + 2 * rows + 1
    record = cutdiff.generate(tiny_model, "a tent", **{**options, "method": "magnify,stride=8"}).record
    assert record["network_evaluations"] == 4 * rows + 2 * 4
    stage = {**options, "method": "magnify,stride=8,detail_guidance_scale=3"}
    if name == "cfg_plus_plus":
        with pytest.raises(ValueError, match=r"^detail_guidance_scale=3.0 needs .* which cfg_plus_plus lacks"):
            cutdiff.generate(tiny_model, "a tent", **stage)
    else:
        assert cutdiff.generate(tiny_model, "a tent", **stage).record["network_evaluations"] == (4 + 2 * 4) * rows


class Remembering:
    """A guidance that keeps what it was begun with, and the steps that it was asked in since."""

    def __init__(self, begun: list[tuple[Schedule, list[int]]]) -> None:
        self.begun = begun

    def begin(self, schedule: Schedule) -> Any:
        steps: list[int] = []
        self.begun.append((schedule, steps))

        def guide(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
            steps.append(step)
            return conditional

        return guide


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("cutdiffusion", [[0, 1, 2, 3]]),
        ("demofusion", [[0, 1, 2, 3], [4, 4, 5, 5, 6, 6, 7, 7]]),
        ("rectifiedhr,max_guidance_scale=None", [[0, 1], [2, 3]]),
        ("frecas,high_guidance_scale=None", [[0, 1, 2], [3]]),
    ],
)
def test_a_memory_begins_anew_where_the_solver_does(tiny_model: Model, method: str, steps: list[list[int]]) -> None:
    begun: list[tuple[Schedule, list[int]]] = []
    for _ in cutdiff.denoise(tiny_model, "a tent", method=method, guidance=Remembering(begun), **RUN):
        pass
    assert [taken for _, taken in begun] == steps
    if method.startswith("frecas"):
        assert [len(schedule.sigmas) for schedule, _ in begun] == [4, 2]


# ---- Adaptive projected guidance


def estimates(count: int, size: tuple[int, int] = (7, 9)) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield tuple(torch.randn(3, 4, *size, generator=generator) for _ in range(2))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 5.0, 15.0])
@pytest.mark.parametrize("momentum", [0.0, -0.5, 0.8])
@pytest.mark.parametrize("scale", [1.5, 10.0])
def test_apg_is_the_published_one(eta: float, threshold: float, momentum: float, scale: float) -> None:
    """diffusers' original formulation adds its scale to the estimate with the prompt, the paper's less 1."""
    theirs = AdaptiveProjectedGuidance(
        scale - 1, None, adaptive_projected_guidance_rescale=threshold, eta=eta, use_original_formulation=True
    )
    theirs.momentum_buffer = MomentumBuffer(momentum)
    ours = APG(scale, eta, threshold, momentum).begin(None)  # pyright: ignore[reportArgumentType]
    for step, (conditional, unconditional) in enumerate(estimates(3)):
        expected = theirs.forward(conditional, unconditional).pred
        assert relative_error(ours(conditional, unconditional, 1.0, step), expected) < 1e-5


def test_apg_is_plain_guidance_at_its_neutral_options_to_the_bit() -> None:
    guide = resolve("guidance", NEUTRAL["apg"] + ",guidance_scale=5.5").begin(None)
    for step, (conditional, unconditional) in enumerate(estimates(3)):
        expected = CFG(5.5)(conditional, unconditional, 1.0, step)
        assert torch.equal(guide(conditional, unconditional, 1.0, step), expected)


def test_apgs_own_threshold_is_the_papers_at_sdxls_size_and_follows_the_canvas() -> None:
    for size, threshold in (((128, 128), 15.0), ((256, 256), 30.0), ((16, 16), 15 / 8), ((64, 256), 15.0)):
        ((c, u),) = estimates(1, size)
        own, given = (APG(5.0, norm_threshold=t).begin(None)(c, u, 1.0, 0) for t in (None, threshold))  # pyright: ignore
        assert relative_error(own, given) < 1e-6
        assert relative_error(own, APG(5.0, norm_threshold=0).begin(None)(c, u, 1.0, 0)) > 1e-3  # pyright: ignore


def test_apgs_momentum_advances_once_in_a_step_for_each_of_its_estimates() -> None:
    """The k-th estimate of a step adds to the k-th of the step before; another size begins anew."""
    apg = APG(3.0, 1.0, 0.0, -0.5)
    both, small = apg.begin(None), apg.begin(None)  # pyright: ignore[reportArgumentType]
    alone = [apg.begin(None) for _ in range(2)]  # pyright: ignore[reportArgumentType]
    for step in range(3):
        for guide, (c, u) in zip(alone, estimates(2), strict=True):
            c = c + step
            assert torch.equal(both(c, u, 1.0, step), guide(c, u, 1.0, step))
    ((c, u),) = estimates(1)
    small(c, u, 1.0, 0)
    half = c[..., ::2], u[..., ::2]
    fresh = apg.begin(None)  # pyright: ignore[reportArgumentType]
    assert torch.equal(small(*half, 1.0, 1), fresh(*half, 1.0, 1))


def test_under_apg_an_image_does_not_depend_on_its_neighbours(tiny_model: Model) -> None:
    both = latents(tiny_model, method="demofusion", guidance="apg")
    for i, prompt in enumerate(PROMPTS):
        alone = latents(tiny_model, prompt, method="demofusion", guidance="apg", seed=RUN["seed"] + i)
        assert relative_error(both[i], alone[0]) < 1e-4


# ---- CFG++


def by_hand(model: Model, lam: float, solver: Any) -> Tensor:
    """The paper's algorithm, with the estimate without the prompt written out: D_λ + σ'·(x − D_∅)/σ."""
    run = prepare(model, PROMPTS, Settings(method="direct", solver=solver, **RUN))
    pairs: list[tuple[Tensor, Tensor]] = []

    def keep(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        pairs.append((conditional, unconditional))
        return conditional

    denoiser, schedule = replace(run.denoiser, guidance=keep), run.schedule
    x = run.draws.noise((len(PROMPTS), 4, *run.size)) * schedule.init_scale
    for i, sigma in enumerate(schedule.sigmas[:-1]):
        denoiser(x, sigma, i)
        conditional, unconditional = pairs.pop()
        eps = (x - unconditional) / sigma
        target = schedule.targets[i] if solver == "ddim" else schedule.sigmas[i + 1]
        x = unconditional + lam * (conditional - unconditional) + target * eps
        x = x * (schedule.rescale(i) if solver == "ddim" else 1.0)
    return x


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_cfg_plus_plus_is_the_papers_algorithm(tiny_model: Model, lam: float, solver: str) -> None:
    ours = latents(tiny_model, method="direct", guidance=CFGPlusPlus(lam), solver=solver)
    assert relative_error(ours, by_hand(tiny_model, lam, solver)) < 1e-5


@pytest.mark.parametrize("solver", [Euler(), DDIM()], ids=["euler", "ddim"])
@pytest.mark.parametrize("method", METHODS)
def test_cfg_plus_plus_knows_where_each_step_goes(
    tiny_model: Model, method: str, solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """λ is the scale of each step times what the solver itself gives to the estimate, in all phases and stages."""
    shares: list[float] = []
    scales: dict[int, set[float]] = {}
    scale_at = Renoising.scale_at

    def note(self: Renoising, sigma: float, step: int) -> float:
        scales.setdefault(step, set()).add(scale := scale_at(self, sigma, step))
        return scale

    monkeypatch.setattr(Renoising, "scale_at", note)
    start = type(solver).start

    def noting(self: Any, schedule: Schedule, noise: Any) -> Any:
        take = start(self, schedule, noise)

        def step(x: Tensor, denoised: Tensor, i: int) -> Tensor:
            out = take(x, denoised, i)
            rescale = schedule.rescale(i) if isinstance(self, DDIM) else 1.0
            direction = x - denoised
            along, square = ((v * direction).sum().item() for v in (out / rescale - denoised, direction))
            shares.append(1 - along / square if square else math.nan)
            return out

        return step

    monkeypatch.setattr(type(solver), "start", noting)
    options = {"method": of_any_guidance(method), "guidance": "cfg_plus_plus", "solver": solver}
    steps = [step.index for step in cutdiff.denoise(tiny_model, "a tent", **{**RUN, **options})]
    assert scales
    for share, step in zip(shares, steps, strict=True):
        for scale in scales.get(step, ()):
            assert scale * share == pytest.approx(0.6, rel=1e-3), step


def test_cfg_plus_plus_is_fused_and_a_scale_below_1_is_not_off(tiny_model: Model) -> None:
    record = cutdiff.generate(tiny_model, "a tent", method="direct", guidance="cfg_plus_plus,lam=0.2", **RUN).record
    assert record["network_evaluations"] == 2 * 4
    assert record["guidance"] == "cfg_plus_plus,lam=0.2"


# ---- Perturbed attention


LAYERS = {("mid",): "mid_block", ("up_blocks.0",): "up_blocks.0", ("down_blocks.1", "mid"): "mid_block|down_blocks.1"}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_perturbed_attention_is_the_published_one(layers: tuple[str, ...], guided: bool) -> None:
    config = replace(QUICK_UNET, transformer_layers=(1, 2), mid_transformer_layers=2)
    theirs, ours = published_unet(config), UNet(config).eval()
    randomise(theirs, 0)
    ours.load_state_dict(theirs.state_dict())
    generator, rows = torch.Generator().manual_seed(1), 2 + guided
    x = torch.randn(1, 4, 9, 8, generator=generator).expand(rows, -1, -1, -1)
    context, pooled = (torch.randn(rows, *shape, generator=generator) for shape in ((5, 24), (12,)))
    context[-1], pooled[-1] = context[-2], pooled[-2]  # the last row reads the prompt as well
    inputs = x, torch.full((rows,), 700.0), context, pooled, torch.randint(0, 999, (rows, 6), generator=generator)
    inputs[-1][-1] = inputs[-1][-2]
    processor = PAGCFGIdentitySelfAttnProcessor2_0() if guided else PAGIdentitySelfAttnProcessor2_0()
    for name, module in theirs.named_modules():
        if name.endswith("attn1") and any(name.startswith(layer) for layer in LAYERS[layers].split("|")):
            module.processor = processor  # pyright: ignore[reportAttributeAccessIssue]
    conditions = {"text_embeds": pooled, "time_ids": inputs[-1]}
    expected = theirs(*inputs[:3], added_cond_kwargs=conditions, return_dict=False)[0]
    plain = ours(*inputs)
    with PAG(pag_layers=layers).changed(ours):
        third = ours(*inputs)
    assert relative_error(torch.cat([plain[:-1], third[-1:]]), expected) < 1e-5
    assert relative_error(third[-1:], expected[-2:-1]) > 1e-3
    assert torch.equal(ours(*inputs), plain), "nothing remains"


class Ear(Observer):
    def __init__(self) -> None:
        self.calls: list[Call] = []

    def call(self, call: Call, prediction: Tensor) -> None:
        self.calls.append(call)


@dataclass(frozen=True)
class OnTheCanvas:
    """Any guidance that needs a third estimate, as one that is not linear."""

    inner: Any
    changes_network: ClassVar[bool] = True

    def changed(self, unet: UNet) -> Any:
        return self.inner.changed(unet)

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int, third: Tensor) -> Tensor:
        return self.inner(conditional, unconditional, sigma, step, third)


@pytest.mark.parametrize("prompt", ["a red house at night", "a tent AND a moon:0.5"])
@pytest.mark.parametrize("method", ["direct", "multidiffusion", "cutdiffusion", "demofusion", "hidiffusion"])
def test_one_scatter_gives_what_three_estimates_of_the_canvas_do(tiny_model: Model, method: str, prompt: str) -> None:
    pag = PAG(4.0, 2.0)
    ours, canvas = (latents(tiny_model, prompt, method=method, guidance=g) for g in (pag, OnTheCanvas(pag)))
    assert relative_error(ours, canvas) < 1e-4


def test_pag_without_classifier_free_guidance(tiny_model: Model) -> None:
    """One row with the prompt, and one of the changed network; the negative prompt is not read."""
    ear, options = Ear(), {**RUN, "method": "direct", "guidance": "pag,guidance_scale=1"}
    result = cutdiff.generate(tiny_model, "a tent", observer=ear, negative_prompt="a moon", **options)
    assert [(call.copies, call.is_changed, len(call.inputs[0])) for call in ear.calls] == [
        (1, False, 1), (1, True, 1),
    ] * 4  # fmt: skip
    assert result.record["negative_prompt_unread"]
    (step, *_), (first, second) = cutdiff.denoise(tiny_model, "a tent", **options), ear.calls[:2]
    plain = tiny_model.unet(*first.inputs)
    with PAG().changed(tiny_model.unet):
        third = tiny_model.unet(*second.inputs)
    run = prepare(tiny_model, "a tent", Settings(**options))
    x = run.draws.noise((1, 4, *run.size)) * run.schedule.init_scale
    _, c_skip, c_out = run.denoiser.coefficients(step.sigma)
    assert relative_error(step.denoised, c_skip * x + c_out * (plain + 3.0 * (plain - third))) < 1e-5


def test_the_rows_of_a_third_estimate(tiny_model: Model) -> None:
    """They are those that read the prompt, in the same order, and their network alone is changed."""
    ear = Ear()
    for _ in cutdiff.denoise(tiny_model, PROMPTS, method="multidiffusion", guidance="pag", observer=ear, **RUN):
        break
    plain, changed = ([call for call in ear.calls if call.is_changed == kind] for kind in (False, True))
    for part in (0, 3):  # latents and pooled text
        every, third = (torch.cat([_rows(call.inputs[part]) for call in calls]) for calls in (plain, changed))
        assert torch.equal(third, every[1::2])
    assert torch.cat([call.images for call in changed]).tolist() == sorted([0, 1] * (len(third) // 2))
    assert all(call.prompted.all() for call in changed)


def _rows(values: Any) -> Tensor:
    assert isinstance(values, Tensor)
    return values


@pytest.mark.parametrize("method", ["cutdiffusion", "accdiffusion", "frecas,high_guidance_scale=None"])
def test_pag_does_not_depend_on_the_view_batch(tiny_model: Model, method: str) -> None:
    one, all_at_once = (latents(tiny_model, method=method, guidance="pag", view_batch_size=size) for size in (1, 100))
    assert relative_error(one, all_at_once) < 1e-4


@pytest.mark.parametrize("method", ["cutdiffusion,detail_guidance_scale=1", "accdiffusion", "magnify", "direct"])
def test_the_planner_counts_the_third_estimate(tiny_model: Model, method: str) -> None:
    settings = Settings(method=method, guidance="pag", guidance_interval=(0.0, 0.5), **RUN)
    record = cutdiff.generate(tiny_model, "a red house at night", settings).record
    planned = walk(sizes_of(tiny_model), settings)
    assert sum(stage.total.evaluations for stage in planned.stages) == record["network_evaluations"]


# ---- Of one's own: another third estimate


class SkippingLayers:
    """Skip-layer guidance in a few lines: the third estimate is that of a network whose middle block does nothing."""

    changes_network = True

    def scale_at(self, sigma: float, step: int) -> float:
        return 4.0

    def change_scale_at(self, sigma: float, step: int) -> float:
        return 2.5 if step < 2 else 0.0

    @contextmanager
    def changed(self, unet: UNet) -> Iterator[None]:
        with replaced(unet.mid_block, forward=lambda x, time, context: x):
            yield

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return CFG(4.0)(conditional, unconditional, sigma, step)


def test_a_guidance_of_ones_own_with_another_third_estimate(tiny_model: Model) -> None:
    result = cutdiff.generate(tiny_model, "a tent", method="multidiffusion", guidance=SkippingLayers(), **RUN)
    plain = cutdiff.generate(tiny_model, "a tent", method="multidiffusion", guidance="cfg,guidance_scale=4", **RUN)
    assert relative_error(result.latents, plain.latents) > 1e-3
    views = plain.record["network_evaluations"] // 8
    assert result.record["network_evaluations"] == views * (3 + 3 + 2 + 2)


# ---- What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "cfg_plus_plus", "solver": "dpmpp_2m"}, "guidance=cfg_plus_plus is for .* solver=dpmpp_2m takes"),
        ({"guidance": "cfg_plus_plus", "solver": "euler_ancestral"}, "guidance=cfg_plus_plus is for .*eta=1.0 takes"),
        ({"guidance": "cfg_plus_plus", "solver": "ddim,eta=0.5"}, "guidance=cfg_plus_plus is for .* choose euler"),
        ({"guidance": "cfg_plus_plus,lam=1.5"}, "lam=1.5 must be a finite number in 0 … 1"),
        ({"guidance": "cfg_plus_plus", "guidance_scale": 4.0}, "guidance_scale=4.0 is no option of .* but of cfg"),
        ({"guidance": "cfg_plus_plus", "method": "diffusehigh"}, "detail_guidance_scale=10.0 needs a guidance with a"),
        ({"guidance": "cfg_plus_plus", "method": "frecas"}, "high_guidance_scale=35.0 needs a guidance with a"),
        ({"guidance": "apg,eta=2"}, "eta=2 must be a finite number in 0 … 1"),
        ({"guidance": "apg,momentum=-2"}, "momentum=-2 must be a finite number in -1 … 1"),
        ({"guidance": "apg,norm_threshold=-1"}, "norm_threshold=-1 must be"),
        ({"guidance": "pag,pag_scale=-1"}, "pag_scale=-1 must be"),
        (
            {"guidance": PAG(pag_layers=("middle",))},
            "pag_layers='middle' begins no name .* down_blocks.1, mid_block",
        ),
        ({"guidance": "pag,pag_layers=()"}, r"pag_layers=\(\) changes nothing"),
        ({"guidance": "pag", "compile": True}, "compile=True is not for pag, which changes the network"),
        (
            {"guidance": "pag", "method": "scalecrafter", "height": 256, "width": 256},
            "guidance=pag needs the estimate with the prompt, which past three times",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_what_cannot_be_is_an_error(tiny_model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        cutdiff.denoise(tiny_model, "a tent", **{**RUN, **options})


@pytest.mark.parametrize("name", ["apg", "cfg_plus_plus", "rescale"])
def test_a_model_that_reads_the_scale_itself_has_no_two_estimates(tiny_model: Model, name: str) -> None:
    unet = UNet(replace(tiny_model.unet.config, guidance_dim=8)).eval().requires_grad_(False)
    with pytest.raises(ValueError, match=f"^guidance={name} needs two estimates"):
        cutdiff.denoise(replace(tiny_model, unet=unet), "a tent", guidance=name, method="direct", **RUN)
    options = {"method": "direct", "guidance": "pag", **RUN}
    assert cutdiff.generate(replace(tiny_model, unet=unet), "a tent", **options).record["network_evaluations"] == 2 * 4
