"""Whole steps of a run: what they put on a device around the network, and what makes the host wait for it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import QUICK_UNET, QUICK_VAE, on
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.utils._python_dispatch import TorchDispatchMode

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import random_model
from cutdiff.models.inside import replaced
from cutdiff.models.layers import TextContext
from cutdiff.planning.forecast import SDXL, SizedDraws, sized
from cutdiff.sampling import flags, operators, rows
from cutdiff.sampling.flags import Flags
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.schedules import euler_schedule
from cutdiff.sampling.solvers import Euler
from cutdiff.sampling.stages import NotFinite, Stage, solve

METHODS = ("direct", "multidiffusion", "cutdiffusion")


class Counted(TorchDispatchMode):
    """Names the operations that write a tensor of the "meta" device, which stands for a GPU; uploads are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        writes = not func.is_view and isinstance(result, Tensor) and result.device.type == "meta"
        uploads = writes and func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu"
        if writes and not uploads and not str(func).startswith("aten.empty"):
            self.names.append(str(func))
        return result


def kernels_of_one_operation(*_: Any) -> SimpleNamespace:
    """Stand-ins for the kernels, of one operation each: a gather negates, a scatter takes the reciprocal."""

    def gather(canvas: Tensor, *args: Any, dtype: torch.dtype, copies: int, **_: Any) -> Tensor:
        items = 4 * copies if isinstance(args[0], tuple) and args[0] == (2, 2) else copies
        items = args[0].shape[1] * copies if isinstance(args[0], Tensor) else items
        return torch.empty(items, 4, 8, 8, dtype=dtype, device="meta").neg()

    def scatter(values: Tensor, *_: Any, canvas: Tensor, flag: Tensor, **__: Any) -> Tensor:
        assert flag.device.type == "cpu"
        return canvas.reciprocal()

    return SimpleNamespace(gather_patches=gather, gather_views=gather, scatter_patches=scatter, average_views=scatter)


@pytest.mark.parametrize("solver", ["euler", "ddim"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_four_launches_and_reads_nothing(monkeypatch: pytest.MonkeyPatch, method: str, solver: str) -> None:
    """On "meta" there are no values: a step that read one, which on a GPU is a wait, would fail."""
    model = sized(SDXL._replace(network=QUICK_UNET, vae=QUICK_VAE), torch.float32)
    monkeypatch.setattr(operators, "_kernels", kernels_of_one_operation)
    monkeypatch.setattr(operators, "_is_reference", lambda *_: False)
    monkeypatch.setattr(flags.Flags, "begin", lambda self, _: setattr(self, "device", torch.device("cpu")))
    sizes = {"height": 64, "width": 64} if method == "direct" else {"height": 128, "width": 128}
    draws = SizedDraws((0,), "meta")
    by_step: list[list[str]] = []
    with replaced(model.unet, forward=lambda x, *_: torch.empty_like(x)), Counted() as counted:
        for _ in cutdiff.denoise(model, "", draws=draws, method=method, solver=solver, num_steps=8, **sizes):
            by_step.append(counted.names)
            counted.names = []
    kinds = ["aten.full.default", "aten.lerp.Scalar", "aten.neg.default", "aten.reciprocal.default"]
    ends = ["aten.mul.Tensor"] if solver == "ddim" else []  # its last sigma is not 0
    assert all(sorted(names) == kinds for names in by_step[1:4] + by_step[5:-1]), "others make the text of every row"
    assert sorted(by_step[-1]) == sorted(kinds + ends)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_four_kernels_and_no_wait_on_a_gpu(tiny_model: Model, method: str) -> None:
    """Three steps in the middle of a stage, with a network that is nothing."""
    model = on("cuda", tiny_model)
    options = {"method": method, "num_steps": 16, "height": 128, "width": 128}
    with replaced(model.unet, forward=lambda x, *_: x):
        list(cutdiff.denoise(model, "a red house", **options))  # compiles the kernels
        steps = cutdiff.denoise(model, "a red house", **options)
        for _ in range(3):
            next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(3):
                    next(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    on_device = [event for event in profile.events() or () if event.device_type == DeviceType.CUDA]
    kernels = [event.name for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    assert len(kernels) <= 4 * 3, kernels


class Indexed(TorchDispatchMode):
    """Counts the gathers of four-dimensional tensors, which keys and values of the text are."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten.index.Tensor and args[0].ndim == 4
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [["a red house"], ["a red house", "a blue tree"]])
def test_the_text_of_a_small_call_is_gathered_once(
    tiny_model: Model, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four patches, and later nine views, go through the network four at a time."""
    options = {
        "num_steps": 6,
        "height": 128,
        "width": 128,
        "view_batch_size": 4,
        "stride": 4,
        "structure_fraction": 0.5,
    }
    row_bytes = tiny_model.unet.read(torch.zeros(1, 77, tiny_model.unet.config.context_dim)).row_bytes
    latents, gathers = [], []
    for most in (0, 8, 1000):
        monkeypatch.setattr(rows, "GATHERED_BYTES", most * row_bytes)
        with Indexed() as indexed:
            *_, last = cutdiff.denoise(tiny_model, prompts, **options)
        latents.append(last.latents)
        gathers.append(indexed.num)
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])
    layers = 2 * len(tiny_model.unet.read(torch.zeros(1, 77, tiny_model.unet.config.context_dim)).kept)
    calls = len(prompts) * 3 * 1 + 3 * -(-9 * len(prompts) // 4)
    kinds = {1: 2, 2: 4}[len(prompts)]  # four of either picture, and the last view; four of both, and the last two
    assert gathers[0] == layers * calls
    assert gathers[2] == layers * kinds
    assert gathers[2] <= gathers[1] < gathers[0]


def test_a_network_that_reads_no_text_draws() -> None:
    plain = replace(QUICK_UNET, transformer_layers=(0, 0), mid_transformer_layers=0)
    model = random_model(plain, QUICK_VAE, torch.device("cpu"))
    assert cutdiff.generate(model, "a red house", num_steps=2).latents.isfinite().all()


def test_what_is_kept_of_other_calls_makes_room_for_a_small_one(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine views go through eight at a time: the text of the ninth fits only where that of the eight is given up."""
    options = {"method": "multidiffusion", "stride": 4, "num_steps": 2, "height": 128, "width": 128}
    whole = cutdiff.generate(tiny_model, "a red house", view_batch_size=8, **options)
    gather = TextContext.gathered
    failed: list[int] = []

    def gathered(context: TextContext) -> TextContext:
        if len(context) == 2 and not failed:
            failed.append(len(context))
            raise torch.OutOfMemoryError
        return gather(context)

    monkeypatch.setattr(TextContext, "gathered", gathered)
    again = cutdiff.generate(tiny_model, "a red house", view_batch_size=8, **options)
    assert failed == [2]
    assert again.record["view_batch_size"] == 8
    assert torch.equal(again.latents, whole.latents)


def test_text_that_memory_does_not_hold_halves_the_batch(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_steps": 2, "height": 128, "width": 128, "view_batch_size": 4}
    whole = cutdiff.generate(tiny_model, "a red house", **options)
    gather = TextContext.gathered

    def gathered(context: TextContext) -> TextContext:
        if len(context) > 4:
            raise torch.OutOfMemoryError
        return gather(context)

    monkeypatch.setattr(TextContext, "gathered", gathered)
    halved = cutdiff.generate(tiny_model, "a red house", **options)
    assert halved.record["view_batch_size"] == 2
    torch.testing.assert_close(halved.latents, whole.latents, rtol=1e-4, atol=1e-4)


def test_a_kernel_tells_of_the_step_that_is_not_finite(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter runs it; the flag is that of the kernel, which nobody asks a second time."""
    unet, calls = tiny_model.unet, []

    def forward(x: Tensor, *conditions: Tensor) -> Tensor:
        calls.append(len(x))
        return x.new_full(x.shape, float("nan") if len(calls) == 3 else 0.0)

    options = {"method": "direct", "num_steps": 5, "height": 64, "width": 64, "backend": "triton"}
    monkeypatch.setattr(
        Tensor, "isfinite", lambda values: pytest.fail("asked") if len(calls) < 3 else values.abs() < float("inf")
    )
    steps = cutdiff.denoise(tiny_model, "a red house", **options)
    with replaced(unet, forward=forward), pytest.raises(FloatingPointError, match=r"^step 2 \(direct"):
        list(steps)
    monkeypatch.undo()
    with torch.inference_mode():  # whose tensors count no changes: what they hold is asked
        assert len(list(cutdiff.denoise(tiny_model, "a red house", **options))) == 5
    assert calls[2:] == [2, 2], "the step is taken once more, to name the item"


@pytest.mark.parametrize("change", ["none", "cropped", "in place", "another", "set"])
def test_only_what_a_kernel_wrote_is_not_looked_at_again(change: str) -> None:
    """An estimate that was dropped does not count, though its flag is set, nor does what was cropped."""
    watch, written = Flags(), torch.zeros(1, 4, 8, 8)
    watch.begin(written.device)
    dropped, flag = watch.new(), watch.new()
    assert dropped is not None
    assert flag is not None
    watch.written(written.clone(), dropped.fill_(1))
    watch.written(written, flag)
    estimate = written[:, :, :5, :5] if change == "cropped" else written
    if change == "in place":
        estimate[0, 0, 0, 0] = float("nan")
    if change == "another":
        estimate = written + float("inf")
    if change in ("set", "cropped"):
        flag.fill_(1)
    if change in ("none", "cropped"):
        watch.check(estimate, ValueError)
        return
    with pytest.raises(ValueError):  # noqa: PT011
        watch.check(estimate, ValueError)


class Event:
    """A moment in the work of a device, which does nothing before it is asked to."""

    waits = 0

    def __init__(self, blocking: bool) -> None:
        assert blocking
        self.recorded = False

    def record(self, stream: object) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded
        Event.waits += 1


@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_gpu_tells_one_step_late_and_names_the_right_one(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """A device that is done with a step when the next one is launched."""
    monkeypatch.setattr(flags, "_is_gpu", lambda device: True)
    monkeypatch.setattr(flags, "_new_flag", lambda device: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Event, "waits", 0)

    def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
        return x * (float("nan") if step == bad else 0.5)

    schedule = euler_schedule(NoiseConfig(), 5)
    steps = solve([Stage("direct", range(5), denoise)], torch.ones(1, 4, 8, 8), schedule, Euler(), torch.zeros)
    taken = []
    with pytest.raises(NotFinite, match=rf"^step {bad} \(direct") as error:
        taken.extend(step.index for step in steps)
    assert taken == [*range(min(bad + 1, 5))]
    assert (error.value.step, error.value.latents.isfinite().all()) == (bad, True)
    assert Event.waits == bad + 1 + (bad < 4), "the step after it, too, before its flag is given up"


def test_a_run_that_is_left_gives_up_no_flag_that_a_kernel_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_is_gpu", lambda device: True)
    monkeypatch.setattr(flags, "_new_flag", lambda device: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Event, "waits", 0)
    schedule = euler_schedule(NoiseConfig(), 5)
    stage = Stage("direct", range(5), lambda x, sigma, step: x * 0.5)
    steps = solve([stage], torch.ones(1, 4, 8, 8), schedule, Euler(), torch.zeros)
    next(steps)
    assert Event.waits == 0
    steps.close()
    assert Event.waits == 1
