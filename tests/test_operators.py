"""Prove that `check_operator` passes what ships and what the helpers make, and names what broken operators break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cutdiff.sampling.draws import Draws
from cutdiff.sampling.operators import (
    FromNetwork,
    Operator,
    Patches,
    SeededPermutation,
    ToNetwork,
    Views,
    carry_back,
    check_operator,
    from_network,
    items_of,
    on_canvas,
    to_network,
)

CANVAS = torch.zeros(2, 3, 6, 8)


class Shift:
    """A torus shift, two items of each image: one to the right and down, one a flip of that."""

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        shifted = canvas.roll((2, 3), (2, 3))
        return to_network(torch.stack([shifted, shifted.flip(3)], dim=1).flatten(0, 1), **how)

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        return carry_back(values, self.back, **how)

    def back(self, items: Tensor) -> Tensor:
        shifted, flipped = items.unflatten(0, (-1, 2)).unbind(1)
        return ((shifted + flipped.flip(3)) / 2).roll((-2, -3), (2, 3))


def views_of(seed: int, weights: Tensor | None = None) -> Views:
    origins = Draws((seed, seed + 1)).view_origins(0, (6, 8), (4, 4), (2, 3), (0, 0))
    return Views(origins, (4, 4), (6, 8), weights)


@pytest.mark.parametrize(
    "operator",
    [
        Patches((1, 1)),
        Patches((2, 4)),
        Patches((3, 2), SeededPermutation((1, 2**64 - 1), 4, "channel")),
        Patches((2, 2), SeededPermutation((1, 2), 4, "none")),
        Patches((2, 2), torch.rand(2, 4, 3, 3, 4, generator=torch.Generator().manual_seed(0)).argsort(1)),
        views_of(3),
        views_of(3, torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) + 0.1),
        Shift(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_that_keep_their_promises_pass(operator: Operator, dtype: torch.dtype) -> None:
    check_operator(operator, CANVAS.to(dtype))


class Broken(Shift):
    """An operator that does wrong what a test gives it to do."""

    def __init__(self, **wrong: Callable[..., Tensor]) -> None:
        for name, method in wrong.items():
            setattr(self, name, method)


def without(name: str, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the method with an option that it ignores."""
    return lambda values, backend="auto", **how: method(values, **{k: v for k, v in how.items() if k != name})


def copies_in_blocks(canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
    copies = how.pop("copies", 1)
    return torch.cat([Shift().gather(canvas, **how)] * copies)


GATHER, SCATTER = Shift().gather, Shift().scatter


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Broken(back=lambda items: items[::2]), "scatter must undo gather; it is off by"),
        (
            Broken(back=lambda items: Shift().back(items) * 1.01),
            "scatter must undo gather; it is off by 0.01, and 1e-05",
        ),
        (Broken(gather=without("c_in", GATHER)), "gather must multiply by c_in; it is off by 0.62"),
        (
            Broken(gather=without("dtype", GATHER)),
            "gather must cast to dtype; it gives .* of torch.float32, not .*bfloat16",
        ),
        (Broken(gather=without("copies", GATHER)), r"gather must give copies side by side; it gives \(4, 3, 6, 8\)"),
        (Broken(gather=copies_in_blocks), "gather must give copies side by side; it is off by"),
        (Broken(scatter=without("guidance_scale", SCATTER)), r"negative \+ guidance_scale .*; it is off by"),
        (Broken(scatter=without("copies", SCATTER)), r"guidance_scale .*; it gives \(4, 3, 6, 8\)"),
        (Broken(scatter=without("canvas", SCATTER)), "c_skip · canvas .*; it is off by"),
        (Broken(scatter=without("c_skip", SCATTER)), "c_skip · canvas .*; it is off by"),
        (Broken(scatter=without("c_out", SCATTER)), "c_skip · canvas .*; it is off by"),
        (Broken(scatter=lambda values, backend="auto": SCATTER(values)), "guidance_scale .*; it raises TypeError"),
        (Broken(gather=lambda canvas, backend="auto", **how: GATHER(canvas.flip(0), **how)), "gather must keep images"),
        (Broken(back=lambda items: Shift().back(items.flip(0))), "scatter must keep images apart .* image 0"),
        (
            Broken(gather=lambda canvas, backend="auto", **how: GATHER(canvas.clamp(-0.5, 0.5), **how)),
            "gather must be lin",
        ),
        (Broken(gather=lambda canvas, backend="auto", **how: GATHER(canvas, **how) + 1), "gather must be linear"),
        (Broken(back=lambda items: Shift().back(items) * float("nan")), "scatter must be linear; it is off by nan"),
        (Broken(back=lambda items: Shift().back(items).abs()), "scatter must be linear; it is off by"),
        (Broken(back=lambda items: Shift().back(items)[:1]), r"shape in float32; it gives \(1, 3, 6, 8\)"),
        (Broken(scatter=lambda values, backend="auto", **how: SCATTER(values, **how).half()), "of torch.float16, not"),
        (Broken(gather=lambda canvas, backend="auto", **how: canvas[:1]), r"a multiple of 2 items; it gives \(1, 3"),
        (Broken(items=lambda canvas: (7, (6, 8))), r"items must say .*, 4 items of \(6, 8\); it says 7 of \(6, 8\)"),
    ],
)
def test_a_broken_promise_is_named(operator: Operator, message: str) -> None:
    with pytest.raises(ValueError, match=f"^Broken: .*{message}") as raised:
        check_operator(operator, CANVAS)
    assert "\n" not in str(raised.value)


def test_a_guidance_that_ignores_the_canvas_is_named() -> None:
    """An operator may honour a canvas for one copy and drop it for a pair."""

    def scatter(values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        if how.get("copies", 1) == 2:
            how.pop("canvas", None)
        return SCATTER(values, **how)

    with pytest.raises(ValueError, match="a guidance pair on a canvas too; it is off by"):
        check_operator(Broken(scatter=scatter), CANVAS)


def test_the_tolerance_is_the_callers() -> None:
    nearly = Broken(back=lambda items: Shift().back(items) * 1.001)
    with pytest.raises(ValueError, match=r"off by 0\.001, and 1e-05 is allowed"):
        check_operator(nearly, CANVAS)
    check_operator(nearly, CANVAS, atol=0.01)


def test_an_error_of_the_operator_itself_stays() -> None:
    with pytest.raises(ValueError, match=r"^a grid of \(5, 1\) does not divide a canvas of \(6, 8\): pad it first"):
        check_operator(Patches((5, 1)), CANVAS)


@given(
    number=st.integers(1, 3),
    c_in=st.sampled_from([1.0, 0.37]),
    copies=st.integers(1, 3),
    dtype=st.sampled_from([None, torch.bfloat16, torch.float64]),
    given_dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_to_network_scales_casts_and_copies(
    number: int, c_in: float, copies: int, dtype: torch.dtype | None, given_dtype: torch.dtype
) -> None:
    items = torch.randn(number, 2, 3, 4, generator=torch.Generator().manual_seed(0)).to(given_dtype)
    result = to_network(items, c_in=c_in, dtype=dtype, copies=copies)
    assert result.shape == (number * copies, 2, 3, 4)
    assert result.dtype == (dtype or given_dtype)
    scaled = items * c_in if given_dtype == torch.float64 else items.float() * c_in
    for i in range(number):
        for copy in range(copies):
            assert torch.equal(result[i * copies + copy], scaled[i].to(result.dtype))


def test_from_network_guides_and_on_canvas_adds_the_skip() -> None:
    negative, positive, canvas = torch.randn(3, 2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    pairs = torch.stack([negative, positive], dim=1).flatten(0, 1)
    guided = from_network(pairs, copies=2, guidance_scale=7.5)
    torch.testing.assert_close(guided, negative + 7.5 * (positive - negative))
    assert torch.equal(from_network(pairs, guidance_scale=7.5), pairs), "one copy has no pair to guide"
    assert from_network(pairs.bfloat16(), copies=2).dtype == from_network(pairs.half()).dtype == torch.float32
    assert from_network(pairs.double()).dtype == torch.float64
    assert torch.equal(on_canvas(guided), guided)
    torch.testing.assert_close(on_canvas(guided, canvas, 0.3, -2.0), 0.3 * canvas - 2 * guided)
    assert on_canvas(guided.half(), canvas.half(), 0.3).dtype == torch.float32


def test_helpers_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="copies=3 cannot be joined: pass 1, or 2 for a guidance pair"):
        from_network(torch.zeros(3, 1, 2, 2), copies=3)
    with pytest.raises(ValueError, match="3 items are no whole number of images of 2 each"):
        from_network(torch.zeros(3, 1, 2, 2), copies=2)
    with pytest.raises(ValueError, match=r"a canvas of \(1, 1, 2, 3\) does not fit a result of \(1, 1, 2, 2\)"):
        on_canvas(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3))


@pytest.mark.parametrize("operator", [Patches((3, 2)), views_of(1), Shift()])
def test_items_are_what_gather_makes(operator: Operator) -> None:
    gathered = operator.gather(CANVAS)
    assert items_of(operator, CANVAS) == (len(gathered), tuple(gathered.shape[2:]))


def test_items_of_an_operator_that_reads_values_are_counted_on_zeros() -> None:
    devices = []

    class Reads(Shift):
        def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
            devices.append(canvas.device.type)
            assert canvas.max().item() == 0
            return super().gather(canvas, backend, **how)

    assert items_of(Reads(), CANVAS) == (4, (6, 8))
    assert devices == ["meta", "cpu"]
    assert items_of(Shift(), torch.empty(5, 4, 2**15, 2**15, device="meta")) == (10, (2**15, 2**15))
