"""Properties that the plain operators between canvas and network must have for every size, grid and draw."""

from __future__ import annotations

import itertools

import pytest
import torch
from cutdiff_kernels import permutations, reference
from cutdiff_kernels.checks import check_cover
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cutdiff.sampling.draws import Draws
from cutdiff.sampling.operators import (
    GRAINS,
    Patches,
    SeededPermutation,
    average,
    cut,
    grid_for,
    pad_to_grid,
    permute,
    permute_back,
    relocate,
    view_grid,
    views,
)

grids = st.tuples(st.integers(1, 4), st.integers(1, 5))
sides = st.tuples(st.integers(1, 7), st.integers(1, 7))
seeds = st.integers(0, 2**64 - 1)


@st.composite
def canvases(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int]]:
    """Draw a canvas that its grid divides, contiguous, in channels_last or a transposed view."""
    grid, patch = draw(grids), draw(sides)
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), grid[0] * patch[0], grid[1] * patch[1])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed"]))
    if layout == "transposed":
        return torch.randn(*shape[:2], shape[3], shape[2], generator=generator).mT, grid
    canvas = torch.randn(shape, generator=generator)
    return (canvas.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else canvas), grid


def drawn(seed: int, step: int, shape: tuple[int, int, int]) -> Tensor:
    """Draw the index (N, C, h, w) of four patches of `shape`."""
    return permutations.permutation_index(SeededPermutation((seed,), step, "channel"), 4, shape)[0]


@given(canvases())
def test_relocate_inverts_cut(case: tuple[Tensor, tuple[int, int]]) -> None:
    canvas, grid = case
    patches = cut(canvas, grid)
    assert torch.equal(relocate(patches, grid), canvas)
    for b, i, j in itertools.product(range(len(canvas)), range(grid[0]), range(grid[1])):
        patch = patches[b * grid[0] * grid[1] + i * grid[1] + j]
        assert torch.equal(patch, canvas[b, :, i :: grid[0], j :: grid[1]])


@given(canvases(), seeds, st.sampled_from(GRAINS), st.integers(0, 999))
def test_permutation_then_relocation_is_invertible(
    case: tuple[Tensor, tuple[int, int]], seed: int, grain: str, step: int
) -> None:
    canvas, grid = case
    num_patches = grid[0] * grid[1]
    draws = Draws(tuple((seed + b) % 2**64 for b in range(len(canvas))))
    patches = cut(canvas, grid)
    permutation = draws.permutation(step, grid, (len(canvas), *patches.shape[1:]), grain)
    mixed = permute(patches, permutation, num_patches)
    assert torch.equal(permute_back(mixed, permutation, num_patches), patches)
    assert torch.equal(relocate(permute_back(mixed, permutation, num_patches), grid), canvas)

    before, after = (p.unflatten(0, (-1, num_patches)).sort(dim=1).values for p in (patches, mixed))
    assert torch.equal(before, after), "every position keeps its multiset of values"
    if grain == "none":
        assert torch.equal(mixed, patches)


@given(canvases(), st.integers(0, 1000))
def test_explicit_permutations_serve_all_images_or_each(case: tuple[Tensor, tuple[int, int]], seed: int) -> None:
    canvas, grid = case
    num_patches, patches = grid[0] * grid[1], cut(canvas, grid)
    index = torch.rand(num_patches, *patches.shape[1:], generator=torch.Generator().manual_seed(seed)).argsort(0)
    mixed = permute(patches, index, num_patches)
    first = patches[:num_patches]
    assert torch.equal(mixed[:num_patches], first.gather(0, index)), "permuted[n] = patches[index[n]]"
    assert torch.equal(mixed, permute(patches, index.expand(len(canvas), *index.shape), num_patches))
    assert torch.equal(permute_back(mixed, index, num_patches), patches)


def test_a_permutation_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit 4 patches"):
        permute(torch.zeros(4, 3, 2, 2), torch.zeros(9, 3, 2, 2, dtype=torch.int64), 4)


@st.composite
def indexes(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int]]:
    """Draw an index (N, C or 1, h, w) or (B, N, C or 1, h, w) of permutations, and the grid of the patches."""
    grid, shape = draw(grids), (draw(st.integers(1, 3)), *draw(sides))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    keys = torch.rand(*batch, grid[0] * grid[1], *shape, generator=torch.Generator().manual_seed(draw(seeds) % 2**63))
    return keys.argsort(-4), grid


@given(indexes(), st.data())
def test_an_index_must_be_a_permutation_at_every_position(
    case: tuple[Tensor, tuple[int, int]], data: st.DataObject
) -> None:
    """A single wrong number, outside of 0 … N − 1 or a second time, is an error wherever an index is given."""
    index, grid = case
    num_patches = grid[0] * grid[1]
    batch, (channels, h, w) = (len(index) if index.ndim == 5 else 1), index.shape[-3:]
    patches = torch.zeros(batch * num_patches, channels, h, w)
    canvas = torch.zeros(batch, channels, grid[0] * h, grid[1] * w)
    uses = (
        lambda: Patches(grid, index),
        lambda: permute(patches, index, num_patches),
        lambda: permute_back(patches, index, num_patches),
        lambda: reference.gather_patches(canvas, grid, index),
        lambda: reference.scatter_patches(patches, grid, index),
    )
    for use in uses:
        use()
    place = data.draw(st.integers(0, index.numel() - 1))
    wrong = data.draw(st.integers(-3, num_patches + 2).filter(lambda value: value != index.flatten()[place]))
    index.view(-1)[place] = wrong
    message = "names another patch twice" if 0 <= wrong < num_patches else rf"index holds {wrong}, and patches are"
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("index", [torch.zeros(9, 3, 2, 2).long(), torch.zeros(4, 3, 2, 2), torch.arange(4)])
def test_an_index_that_does_not_fit_the_grid_is_an_error(index: Tensor) -> None:
    with pytest.raises(ValueError, match="does not fit 4 patches"):
        Patches((2, 2), index)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.0])
def test_seeds_of_permutations_are_whole_numbers_of_64_bits(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed=.* of a permutation must be a whole number"):
        SeededPermutation((seed,), 0, "channel")


@given(grid=grids, mask=st.sampled_from([0, 1, 6]), grain=st.sampled_from(["channel", "pixel"]), seed=seeds)
def test_equal_keys_still_give_a_permutation(grid: tuple[int, int], mask: int, grain: str, seed: int) -> None:
    """Ties among one, two or four distinct keys are ranked by the patches' numbers."""
    n, shape, drawn_words = grid[0] * grid[1], (2, 4, 3), []

    def few_words(*args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        drawn_words.extend(word & mask for word in philox(*args))
        return tuple(word.clone() for word in drawn_words)

    philox = permutations.philox
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutations, "philox", few_words)
        index = permutations.permutation_index(SeededPermutation((seed,), 3, grain), n, shape)
    assert torch.equal(index.sort(1).values, torch.arange(n).view(1, n, 1, 1, 1).expand(index.shape))
    keys = torch.stack(drawn_words, dim=2).flatten(1, 2)[:, :n]  # (1, N, C or 1, h·w)
    assert torch.equal(index.flatten(3), keys.argsort(dim=1, stable=True))


def test_pixel_grain_moves_the_channels_of_a_pixel_together() -> None:
    patches = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 4, 5, 5)
    by_pixel = permute(patches, SeededPermutation((3,), 0, "pixel"), 9)
    by_channel = permute(patches, SeededPermutation((3,), 0, "channel"), 9)
    assert (by_pixel == by_pixel[:, :1]).all()
    assert not (by_channel == by_channel[:, :1]).all()


def test_permutations_are_uniform() -> None:
    """The chi-square over the 24 orders of 4 patches (23 degrees of freedom) holds for positions, steps and seeds."""
    orders = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    for sample in (
        drawn(7, 0, (1, 100, 240)).flatten(1).T,
        torch.cat([drawn(7, step, (1, 10, 24)).flatten(1).T for step in range(100)]),
        torch.cat([drawn(seed, 0, (1, 10, 24)).flatten(1).T for seed in range(100)]),
    ):
        counts = torch.zeros(24)
        for order in sample.tolist():
            counts[orders[tuple(order)]] += 1
        expected = len(sample) / 24
        assert ((counts - expected) ** 2 / expected).sum() < 49.7, "beyond the 0.1% tail"


def test_permutations_differ_between_steps_seeds_and_channels() -> None:
    base = drawn(1, 0, (2, 16, 16))
    assert not torch.equal(base, drawn(1, 1, (2, 16, 16)))
    assert not torch.equal(base, drawn(2, 0, (2, 16, 16)))
    assert not torch.equal(base, drawn(1 + 2**32, 0, (2, 16, 16))), "all 64 bits count"
    assert not torch.equal(base[:, 0], base[:, 1])
    assert torch.equal(base, drawn(1, 0, (2, 16, 16)))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert tuple(int(word) for word in permutations.philox((c0, c1, c2, c3), (k0, k1))) == expected


@st.composite
def view_cases(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Draw size, window, stride and jitter: any size ≥ window, any stride ≤ window, and a jitter that is promised."""
    axes = []
    for _ in range(2):
        window = draw(st.integers(1, 9))
        stride = draw(st.integers(1, window))
        axes.append((draw(st.integers(window, 30)), window, stride, draw(st.integers(0, (window - stride) // 4))))
    size, window, stride, jitter = (tuple(values) for values in zip(*axes, strict=True))
    return size, window, stride, jitter


@given(view_cases(), seeds, st.integers(0, 5))
def test_views_cover_every_pixel(case: tuple, seed: int, step: int) -> None:
    size, window, stride, jitter = case
    origins = Draws((seed, (seed + 1) % 2**64)).view_origins(step, size, window, stride, jitter)
    covered = torch.zeros(2, *size)
    for b, (y, x) in ((image, origin) for image in range(2) for origin in origins[image].tolist()):
        assert -jitter[0] <= y <= size[0] - window[0] + jitter[0]
        assert -jitter[1] <= x <= size[1] - window[1] + jitter[1]
        covered[b, max(y, 0) : max(y + window[0], 0), max(x, 0) : max(x + window[1], 0)] += 1
    assert (covered > 0).all()


@given(view_cases(), seeds)
def test_averaging_views_of_a_canvas_gives_it_back(case: tuple, seed: int) -> None:
    size, window, stride, jitter = case
    origins = Draws((seed, (seed + 1) % 2**64)).view_origins(0, size, window, stride, jitter)
    constant = torch.full((2, 3, *size), 0.7)
    torch.testing.assert_close(average(views(constant, origins, window), origins, size), constant, rtol=1e-6, atol=0)
    canvas = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(window, generator=torch.Generator().manual_seed(1)) + 0.1
    for w in (None, weights):
        torch.testing.assert_close(average(views(canvas, origins, window), origins, size, w), canvas)


def test_views_read_zeros_outside_and_drop_what_they_write_there() -> None:
    canvas = torch.ones(1, 1, 4, 4)
    origins = torch.tensor([[-1, -2], [0, 0], [1, 1]])
    cuts = views(canvas, origins, (4, 4))
    assert cuts[0, 0, 0].eq(0).all()
    assert cuts[0, 0, :, :2].eq(0).all()
    assert cuts[0, 0, 1:, 2:].eq(1).all()
    assert cuts[2, 0, 3].eq(0).all()
    values = torch.full((3, 1, 4, 4), float("nan"))
    values[1] = 5.0
    values[0, :, 1:, 2:] = 5.0
    values[2, :, :3, :3] = 5.0
    assert average(values, origins, (4, 4)).eq(5).all()


@given(size=sides, window=sides, seed=st.integers(0, 1000), num_views=st.integers(1, 12))
def test_cover_is_what_laying_the_views_out_shows(
    size: tuple[int, int], window: tuple[int, int], seed: int, num_views: int
) -> None:
    """The views of two images may reach past the canvas or miss it."""
    low, high = -torch.tensor(window) - 1, torch.tensor(size) + 2
    rng = torch.Generator().manual_seed(seed)
    origins = low + (torch.rand(2, num_views, 2, generator=rng) * (high - low)).long()
    shown = torch.zeros(2, *size)
    for image, its_origins in zip(shown, origins.tolist(), strict=True):
        for y, x in its_origins:
            image[max(y, 0) : max(y + window[0], 0), max(x, 0) : max(x + window[1], 0)] = 1
    if shown.all():
        check_cover(origins, window, size)
    else:
        with pytest.raises(ValueError, match="uncovered"):
            check_cover(origins, window, size)


def test_an_uncovered_pixel_is_an_error() -> None:
    with pytest.raises(ValueError, match="uncovered"):
        average(torch.ones(2, 1, 2, 2), torch.tensor([[0, 0], [2, 2]]), (4, 4))


@pytest.mark.parametrize(("size", "window", "stride"), [(4, 8, 4), (8, 4, 5), (8, 4, 0)])
def test_views_that_cannot_cover_are_an_error(size: int, window: int, stride: int) -> None:
    with pytest.raises(ValueError, match="stride ≤ window ≤ size"):
        view_grid((size, size), (window, window), (stride, stride))


def test_view_grid_counts_as_the_published_code() -> None:
    """A canvas of twice the window has 9 views at a stride of half the window."""
    assert len(view_grid((256, 256), (128, 128), (64, 64))) == 9
    assert len(view_grid((384, 512), (128, 128), (64, 64))) == 5 * 7
    assert view_grid((20, 16), (16, 16), (8, 8)).tolist() == [[0, 0], [4, 0]]


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 16))
def test_padding_to_the_grid_keeps_patches_within_the_native_size(size: tuple[int, int], native: int) -> None:
    grid = grid_for(size, native)
    canvas = torch.randn(1, 2, *size)
    padded = pad_to_grid(canvas, grid)
    patches = cut(padded, grid)
    assert max(patches.shape[2:]) <= native
    assert torch.equal(padded[:, :, : size[0], : size[1]], canvas)
    assert padded.shape[2] - size[0] < grid[0]
    assert padded.shape[3] - size[1] < grid[1]


def test_draws_are_reproducible_and_independent() -> None:
    shape = (2, 4, 8, 8)
    noise = Draws((5, 6)).noise(shape)
    assert torch.equal(noise, Draws((5, 6)).noise(shape))
    assert torch.equal(noise[1], Draws((6,)).noise((1, 4, 8, 8))[0]), "an image does not depend on its neighbours"
    assert not torch.equal(noise, Draws((5, 6)).noise(shape, step=0)), "a step's noise is another draw"
    state = torch.random.get_rng_state()
    Draws((1,)).view_origins(3, (32, 32), (16, 16), (8, 8), (2, 2))
    Draws((1,)).noise((1, 4, 8, 8))
    assert torch.equal(state, torch.random.get_rng_state()), "no global generator is touched"
    for one, other in ((5, 5 + 2**40), (2**64 - 1, 2**64 - 2)):
        assert not torch.equal(Draws((one,)).noise(shape), Draws((other,)).noise(shape)), "all 64 bits count"
    many = Draws(tuple(range(64))).noise((64, 4, 16, 16))
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_have_64_bits(seed: int) -> None:
    with pytest.raises(ValueError, match="seed="):
        Draws((seed,))
