"""Changing the inside of a network: all that is replaced comes back in its place, and only one thread may do it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.models.attention import recorded_attention
from cutdiff.models.inside import replaced
from cutdiff.models.layers import Attention
from cutdiff.models.unet import UNet


class Everything(nn.Module):
    """A module that has one attribute of each kind, and two of those whose order matters."""

    on_the_class = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.bias = nn.Parameter(torch.zeros(2))
        self.nothing = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_parameter("empty", None)
        self.mean = nn.Buffer(torch.ones(1))
        self.table = nn.Buffer(torch.ones(1), persistent=False)
        self.variance = nn.Buffer(torch.ones(1))
        self.first = nn.Linear(1, 1)
        self.second = nn.Linear(1, 1)
        self.plain = "plain"

    def method(self) -> str:
        return "method"


VALUES: dict[str, Callable[[], Any]] = {
    "parameter": lambda: nn.Parameter(torch.zeros(3)),
    "buffer": lambda: nn.Buffer(torch.zeros(3)),
    "transient buffer": lambda: nn.Buffer(torch.zeros(3), persistent=False),
    "module": lambda: nn.Conv2d(1, 1, 1),
    "tensor": lambda: torch.zeros(3),
    "function": lambda: lambda *_: "replaced",
    "text": lambda: "replaced",
    "none": lambda: None,
}
PLAIN = ("tensor", "function", "text", "none")
OWN = ("weight", "bias", "nothing", "empty", "mean", "table", "variance", "first", "second", "plain", "new")
ON_THE_CLASS = ("method", "forward", "on_the_class")
changes = st.lists(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(OWN), st.sampled_from(sorted(VALUES))),
            st.tuples(st.sampled_from(ON_THE_CLASS), st.sampled_from(PLAIN)),
        ),
        unique_by=lambda change: change[0],
    ),
    max_size=4,
)
"""The attributes that each of a few nested blocks replaces, and the kinds of their values."""


def snapshot(module: nn.Module) -> tuple[Any, ...]:
    """All that a module holds, by identity, and the order of what is registered."""
    own = vars(module)
    return (
        {name: id(value) for name, value in own.items()},
        *(
            [(name, id(value)) for name, value in own[store].items()]
            for store in ("_parameters", "_buffers", "_modules")
        ),
        set(own["_non_persistent_buffers_set"]),
        list(module.state_dict()),
    )


def change_in_turn(module: nn.Module, blocks: list[list[tuple[str, str]]], error: type[BaseException] | None) -> None:
    """Nested blocks, each of which must leave the module as it was; the innermost raises `error`."""
    if not blocks:
        if error is not None:
            raise error
        return
    before, values = snapshot(module), {name: VALUES[kind]() for name, kind in blocks[0]}
    try:
        with replaced(module, **values):
            assert all(getattr(module, name) is value for name, value in values.items())
            change_in_turn(module, blocks[1:], error)
    finally:
        assert snapshot(module) == before


@given(changes)
def test_all_that_is_replaced_comes_back_in_its_place(blocks: list[list[tuple[str, str]]]) -> None:
    change_in_turn(Everything(), blocks, None)


@given(changes)
def test_it_comes_back_after_an_error_too(blocks: list[list[tuple[str, str]]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        change_in_turn(Everything(), blocks, KeyboardInterrupt)


@given(st.permutations(OWN[:-1]), st.sampled_from(sorted(VALUES)), st.sampled_from(OWN[:-1]))
def test_what_the_block_itself_does_to_other_attributes_stays(order: list[str], kind: str, name: str) -> None:
    module = Everything()
    names = list(module.state_dict())
    with replaced(module, **{name: VALUES[kind]()}):
        module.later = nn.Parameter(torch.ones(1))
        for other in order:  # all move to the end of their kind
            value = getattr(module, other)
            delattr(module, other)
            setattr(module, other, value)
    kept = [key for key in module.state_dict() if key != "later"]
    assert sorted(kept) == sorted(names)
    assert "later" in module.state_dict()


def test_a_replaced_weight_is_what_the_network_computes_with() -> None:
    conv, block = nn.Conv2d(1, 1, 1, bias=False), nn.Sequential(nn.Identity())
    x = torch.ones(1, 1, 1, 1)
    plain = conv(x)
    with replaced(conv, weight=nn.Parameter(2 * conv.weight.detach())):
        assert torch.equal(conv(x), 2 * plain)
    with replaced(conv, weight=3 * conv.weight.detach()):
        assert torch.equal(conv(x), 3 * plain)
        assert not list(conv.state_dict())
    with replaced(block, **{"0": conv}):
        assert torch.equal(block(x), plain)
    assert torch.equal(conv(x), plain)
    assert block(x) is x


def test_objects_that_are_no_modules_can_be_changed_too() -> None:
    class Thing:
        size = 3

        def __init__(self) -> None:
            self.scale = 1.0

        @property
        def area(self) -> float:
            return self.scale**2

        @area.setter
        def area(self, area: float) -> None:
            self.scale = area**0.5

    thing = Thing()
    with replaced(thing, scale=2.0, size=4, extra=5):
        assert (thing.scale, thing.size, vars(thing)["extra"]) == (2.0, 4, 5)
    assert vars(thing) == {"scale": 1.0}
    assert thing.size == 3
    with pytest.raises(TypeError, match=r"Thing\.area is a property or a slot: replace what it reads instead"):
        replaced(thing, area=4.0).__enter__()
    assert vars(thing) == {"scale": 1.0}


def test_an_attribute_that_refuses_its_value_leaves_nothing_changed() -> None:
    module = Everything()
    before = snapshot(module)
    with pytest.raises(KeyError), replaced(module, plain="replaced", method=nn.Parameter(torch.ones(1))):
        pytest.fail("the method cannot become a parameter")
    assert snapshot(module) == before
    with replaced(module, plain="replaced"):
        assert module.plain == "replaced"


# ---- Threads


def in_a_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as other:
        return other.submit(work).result()


def test_another_thread_cannot_change_the_same_object_before_the_first_is_done() -> None:
    module = Everything()
    before = snapshot(module)

    def change() -> str:
        with replaced(module, plain="other", method=lambda: "other"):
            return module.plain

    expected = (
        r"Everything\.plain, Everything\.method cannot be replaced while another thread has changed the same Everything"
        ": load the model once for each thread, or draw one picture after the other"
    )
    with replaced(module, weight=torch.zeros(2)):
        with replaced(module, plain="nested"), pytest.raises(RuntimeError, match=f"^{expected}$"):
            in_a_thread(change)
        with pytest.raises(RuntimeError, match=expected):
            in_a_thread(change)
        with replaced(Everything(), plain="another module") as _:
            assert in_a_thread(lambda: module.plain) == "plain"
    assert snapshot(module) == before
    assert in_a_thread(change) == "other"
    assert snapshot(module) == before


def test_threads_that_change_one_module_at_random_leave_it_as_it_was() -> None:
    module = Everything()
    before, start = snapshot(module), threading.Barrier(4)
    kinds = [(name, kind) for name in OWN for kind in VALUES]

    def change(thread: int) -> tuple[int, int]:
        start.wait()
        entered, refused = 0, 0
        for turn in range(500):
            name, kind = kinds[(turn * (2 * thread + 1)) % len(kinds)]
            value = VALUES[kind]()
            try:
                with replaced(module, **{name: value}), replaced(module, other=turn):
                    assert getattr(module, name) is value
                    assert module.other == turn
                entered += 1
            except RuntimeError:
                refused += 1
        return entered, refused

    with ThreadPoolExecutor(4) as threads:
        counts = list(threads.map(change, range(4)))
    assert all(entered + refused == 500 for entered, refused in counts)
    assert sum(entered for entered, _ in counts) > 0
    assert snapshot(module) == before


def network_snapshot(unet: UNet) -> list[Any]:
    return [snapshot(module) for module in unet.modules()]


@pytest.mark.parametrize("method", ["attention_scaling", "scalecrafter", "hidiffusion", "freescale"])
def test_two_threads_that_draw_with_one_model_leave_it_as_it_was(tiny_model: Model, method: str) -> None:
    unet = tiny_model.unet
    side = 2 * tiny_model.native_size * tiny_model.factor
    before, start = network_snapshot(unet), threading.Barrier(2)

    def draw(seed: int) -> Tensor:
        options: dict[str, Any] = {"method": method, "num_steps": 2, "seed": seed}
        return cutdiff.generate(tiny_model, "a house", height=side, width=side, **options).latents

    refusals: list[str] = []

    def draw_beside_another(seed: int) -> Tensor | None:
        start.wait()
        try:
            return draw(seed)
        except RuntimeError as error:
            refusals.append(str(error))
            return None

    with ThreadPoolExecutor(2) as threads:
        drawn = list(threads.map(draw_beside_another, range(2)))
    assert network_snapshot(unet) == before
    if method == "freescale":  # its native picture may be drawn on the other's changes, whose sizes do not fit it
        return
    finished = {seed: latents for seed, latents in enumerate(drawn) if latents is not None}
    assert all("another thread has changed the same" in message for message in refusals)
    assert finished, "only a thread that another one is ahead of is refused"
    if method == "attention_scaling":  # it changes the network in every step, so no step runs on the other's changes
        assert all(torch.equal(latents, draw(seed)) for seed, latents in finished.items())


def test_a_recording_is_of_its_own_thread(tiny_model: Model) -> None:
    unet, config = tiny_model.unet, tiny_model.unet.config
    generator = torch.Generator().manual_seed(0)

    def inputs(items: int) -> tuple[Tensor, ...]:
        context = torch.randn(items, 9, config.context_dim, generator=generator)
        pooled, sizes = torch.randn(items, config.pooled_dim, generator=generator), torch.ones(items, 6)
        return torch.randn(items, 4, 8, 8, generator=generator), torch.ones(items), context, pooled, sizes

    own, other = inputs(2), inputs(3)
    with recorded_attention(unet) as alone:
        unet(*own)
    with recorded_attention(unet) as maps:
        in_a_thread(lambda: unet(*other))
        unet(*own)
        in_a_thread(lambda: unet(*other))
    assert torch.equal(maps.mean(), alone.mean())


# ---- Recorded attention


def test_recorded_weights_have_the_scale_that_the_layer_attends_with() -> None:
    torch.manual_seed(0)
    layer = Attention(16, 2, context_dim=6)
    x, context = torch.randn(3, 5, 16), torch.randn(3, 7, 6)
    plain = layer.weights(x, context)
    values = layer.keys_and_values(context)[1]
    for scale in (2 * layer.scale, 0.0):
        with replaced(layer, scale=scale):
            weights = layer.weights(x, context)
            attended = layer.to_out[0]((weights @ values).transpose(1, 2).flatten(2))
            torch.testing.assert_close(attended, layer(x, context))
        assert not torch.allclose(weights, plain)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 7))


def test_recorded_maps_have_the_scale_of_a_changed_layer(tiny_model: Model) -> None:
    unet, config = tiny_model.unet, tiny_model.unet.config
    inputs = (torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 9, config.context_dim))
    conditions = (torch.randn(1, config.pooled_dim), torch.ones(1, 6))
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    with ExitStack() as changes, recorded_attention(unet) as maps:
        for layer in layers:
            changes.enter_context(replaced(layer, scale=0.0))
        unet(*inputs, *conditions)
    torch.testing.assert_close(maps.mean(), torch.full_like(maps.mean(), 1 / 9))


@pytest.mark.parametrize("keeps", [False, True])
def test_recorded_maps_of_some_rows_are_those_of_all(tiny_model: Model, keeps: bool) -> None:
    """Also where the text stands as keys and values that were computed before."""
    unet, config = tiny_model.unet, tiny_model.unet.config
    context: Any = torch.randn(4, 9, config.context_dim)
    context = unet.read(context) if keeps else context
    inputs = (torch.randn(4, 4, 8, 8), torch.ones(4), context, torch.randn(4, config.pooled_dim), torch.ones(4, 6))
    with recorded_attention(unet) as whole, recorded_attention(unet, rows=slice(1, None, 2)) as part:
        plain = unet(*inputs)
    assert torch.equal(plain, unet(*inputs))
    torch.testing.assert_close(part.mean(), whole.mean()[1::2])
    assert part.passes == whole.passes == 1
