"""Compare the kernels inside of the network with their references, and a U-Net with them with one without.

They run under Triton's interpreter, and with -m gpu on a device.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from cutdiff_kernels import bench_network, network, reference_network
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, few, laid_out, poisoned
from torch import Tensor, nn
from triton import knobs

import cutdiff
from cutdiff.bench.parity import full_precision
from cutdiff.bench.variants import variant
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import network_inputs
from cutdiff.models import fused
from cutdiff.models.compiled import compiled
from cutdiff.models.fp8 import FP8Linear, quantize_transformers
from cutdiff.models.fused import FusedGEGLU, FusedGroupNorm, fuse
from cutdiff.models.layers import GroupNormSiLU
from cutdiff.models.unet import GEGLU
from cutdiff.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # e^400 is as good as infinity: x/∞ = 0


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_as_exact(kernel: Tensor, same_precision: Tensor, truth: Tensor, mean: float = 0.0) -> None:
    """Assert that a kernel is no farther from the truth, in float64, than twice torch in the same precision.

    A rounding of the result and of the input's mean is allowed too.
    """
    assert kernel.isfinite().all()
    roundings = torch.finfo(kernel.dtype).eps * truth.abs().max() + 4 * torch.finfo(torch.float32).eps * mean
    assert (kernel - truth).abs().max() <= 2 * (same_precision - truth).abs().max() + roundings


@few
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 2),
    group=st.sampled_from([1, 3, 10, 16, 40]),
    num_groups=st.integers(1, 8),
    side=st.tuples(st.integers(1, 20), st.integers(2, 13)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    offset=st.sampled_from([0.0, 30.0]),
    silu=st.booleans(),
)
def test_group_norms_are_those_of_the_reference(
    device: str,
    seed: int,
    batch: int,
    group: int,
    num_groups: int,
    side: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    offset: float,
    silu: bool,
) -> None:
    """Groups have any size, tiles may be one or many and not filled, and the mean may be far from zero."""
    channels = group * num_groups
    x = laid_out((drawn(seed, batch, channels, *side) + offset).to(device, dtype), layout)
    weight, bias = (drawn(seed + n, 2 * channels).to(device, dtype)[::2] for n in (1, 2))
    out = poisoned(batch, *side, channels, dtype=dtype, device=device)
    result = network.group_norm(x, num_groups, weight, bias, 1e-5, silu=silu, out=out)
    assert result.data_ptr() == out.data_ptr()
    same = reference_network.group_norm(x, num_groups, weight, bias, 1e-5, silu=silu)
    truth = reference_network.group_norm(x.double(), num_groups, weight.double(), bias.double(), 1e-5, silu=silu)
    assert_as_exact(result, same, truth, offset)


def test_more_tiles_than_are_folded_at_once(device: str) -> None:
    """The last of 66 tiles has four of 128 rows."""
    x = drawn(0, 1, 6, 65 * 16 + 1, 8).to(device)
    weight, bias = torch.ones(6, device=device), torch.zeros(6, device=device)
    result = network.group_norm(x, 2, weight, bias, 1e-5)
    torch.testing.assert_close(result, reference_network.group_norm(x, 2, weight, bias, 1e-5), rtol=1e-5, atol=1e-5)


@few
@given(
    seed=st.integers(0, 2**32),
    rows=st.lists(st.integers(1, 12), min_size=1, max_size=2),
    num_in=st.sampled_from([1, 16, 45, 64, 130]),
    num_out=st.sampled_from([1, 17, 64, 150]),
    transposed=st.booleans(),
    variant=st.sampled_from(list(network.VARIANTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_gated_products_are_those_of_the_reference(
    device: str,
    seed: int,
    rows: list[int],
    num_in: int,
    num_out: int,
    transposed: bool,
    variant: str,
    dtype: torch.dtype,
) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        dtype = torch.float16  # the interpreter multiplies the bits of bfloat16 as if they were numbers
    rows = [*rows[:-1], 17 * rows[-1]]  # up to several tiles, and to more than there are persistent programs
    if network.VARIANTS[variant].tma:
        num_in = (num_in + 7) // 8 * 8  # its rows are multiples of 16 bytes
    x = drawn(seed, *rows, num_in).to(device, dtype)
    if transposed:
        x = x.mT.contiguous().mT
    weight = (drawn(seed + 1, 2 * num_out, num_in) / num_in**0.5).to(device, dtype)
    bias = drawn(seed + 2, 2 * num_out).to(device, dtype)
    out = poisoned(*rows, num_out, dtype=dtype, device=device)
    result = network.geglu(x, weight, bias, variant=variant, out=out)
    assert result is out
    same, truth = (
        reference_network.geglu(x, weight, bias),
        reference_network.geglu(x.double(), weight.double(), bias.double()),
    )
    assert_as_exact(result, same, truth)


def test_what_does_not_fit_is_an_error(device: str) -> None:
    x, weight = torch.zeros(1, 6, 2, 2, device=device), torch.zeros(6, device=device)
    with pytest.raises(ValueError, match=r"4 groups, .* do not fit an input of \(1, 6, 2, 2\)"):
        network.group_norm(x, 4, weight, weight, 1e-5)
    with pytest.raises(ValueError, match="are no gated linear layer"):
        network.geglu(x[0], torch.zeros(3, 2, device=device), torch.zeros(3, device=device))
    rows, gates, bias = x.flatten(1), torch.zeros(4, 24, device=device), torch.zeros(4, device=device)
    with pytest.raises(ValueError, match=r"variant 'tma' needs rows of a multiple of 16 bytes, and 23 of"):
        network.geglu(rows[:, :23], gates[:, :23], bias, variant="tma")
    with pytest.raises(ValueError, match=r"variant='fast' is not one of cp.async, 4 stages, "):
        network.geglu(rows, gates, bias, variant="fast")
    with pytest.raises(ValueError, match="no backward pass"):
        network.geglu(x.requires_grad_(), torch.zeros(4, 2, device=device), torch.zeros(4, device=device))


def test_a_fused_network_predicts_the_same_and_has_the_same_weights(device: str, tiny_model: Model) -> None:
    plain = deepcopy(tiny_model.unet).to(device)
    other = deepcopy(plain)
    fuse(other)
    assert not any(isinstance(module, GEGLU | nn.GroupNorm) for module in other.modules())
    norms = [module for module in other.modules() if isinstance(module, FusedGroupNorm)]
    assert {norm.silu for norm in norms} == {True, False}, "resnets' with their SiLU, transformers' without"
    assert sum(norm.silu for norm in norms) == sum(isinstance(module, GroupNormSiLU) for module in plain.modules())
    before, after = plain.state_dict(), other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    x, timestep, context, pooled, ids = (t.to(device) for t in network_inputs(tiny_model, 2))
    inputs = (x, timestep.expand(2), context, pooled, ids)
    with torch.no_grad(), full_precision():
        torch.testing.assert_close(other(*inputs), plain(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["group norm", "gate"])
def test_a_compiler_is_told_the_truth(device: str, op: str) -> None:
    """Shapes, strides and what is written are declared rightly, also at a single position and channel."""
    for channels, side in ((1, 1), (6, 5)):
        x, weight = drawn(0, 2, channels, side, side).to(device), drawn(1, channels).to(device)
        if op == "group norm":
            torch.library.opcheck(fused.group_norm, (x, 1, weight, weight, 1e-5, True))
        else:
            gates = drawn(2, 6, side).to(device)
            torch.library.opcheck(fused.geglu, (x, gates, drawn(3, 6).to(device)))


def test_a_fused_network_is_one_graph(device: str, tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph serves any number of rows."""
    monkeypatch.setattr("cutdiff.models.compiled.BACKEND", "aot_eager")
    unet = deepcopy(tiny_model.unet).to(device)
    fuse(unet)
    torch.compiler.reset()
    run = compiled(unet)
    with torch.no_grad(), full_precision():
        for rows in (4, 6, 3):
            x, timestep, context, pooled, ids = (t.to(device) for t in network_inputs(tiny_model, rows))
            inputs = (x, timestep.expand(rows), context, pooled, ids)
            torch.testing.assert_close(run(*inputs), unet(*inputs), rtol=1e-4, atol=1e-5)


def test_layers_in_8_bits_stay(device: str, tiny_model: Model) -> None:
    unet = deepcopy(tiny_model.unet).to(device)
    quantize_transformers(unet)
    fuse(unet)
    gates = [module for module in unet.modules() if isinstance(module, GEGLU | FusedGEGLU)]
    assert gates
    assert all(isinstance(gate, GEGLU) and isinstance(gate.proj, FP8Linear) for gate in gates)


def test_where_no_kernel_can_run_nothing_is_fused(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    unet = deepcopy(tiny_model.unet)
    with pytest.raises(ValueError, match=r"fused layers need a GPU .*, and the device is cpu: leave them out"):
        fuse(unet)
    assert any(isinstance(module, GEGLU) for module in unet.modules())


@pytest.mark.parametrize("index", [0, 1])
def test_the_bench_checks_before_it_times(device: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong kernel, of a norm or of a gate, is not timed."""
    monkeypatch.setattr(bench_network, "NORMS", ((64, 5),))
    monkeypatch.setattr(bench_network, "GATES", ((32, 4),))
    if device == "cpu":
        monkeypatch.setattr(bench_network, "NETWORK_DTYPE", torch.float16)  # see above
    layer = bench_network.layers(2, torch.device(device))[index]
    assert bench_network.compare(layer) == ""
    assert [bench_network._variant(layer, call, lambda call: 1e-6) for call in layer.variants.values()] == [
        1e-6 for _ in layer.variants
    ]
    off = bench_network._variant(layer, lambda: layer.plain() + 1, lambda call: 1e-6)
    assert str(off).startswith("differs by ")
    unfit = bench_network._variant(layer, lambda: network.geglu(*3 * [layer.plain()]), lambda call: 1e-6)
    assert str(unfit).startswith("ValueError: ")
    wrong = replace(layer, kernel=lambda: layer.plain() + 1)
    row = bench_network.measure(wrong, 2)
    assert row.failed.startswith("differs by ")
    assert row.kernel_s is None
    assert row.failed in bench_network.line(row, 1e12)


def test_the_bench_of_the_network_says_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_network.main([]) == 2
    assert capsys.readouterr().err == "cutdiff_kernels: there is no GPU here, and nothing else to be timed\n"


def test_the_bench_has_a_fused_copy_of_the_network(device: str, tiny_model: Model) -> None:
    model = replace(tiny_model, unet=deepcopy(tiny_model.unet).to(device))
    contestant = variant("fused", model, Settings())
    assert any(isinstance(module, FusedGEGLU) for module in contestant.unet.modules())
    assert not any(isinstance(module, FusedGEGLU) for module in model.unet.modules())


def test_cuda_graphs_want_a_compiled_network_on_a_gpu(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match="cuda_graphs=True goes with compile, which is off: give --compile too"):
        cutdiff.denoise(tiny_model, "a red house", cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs=True needs a GPU, and the device is cpu: leave it out"):
        cutdiff.denoise(tiny_model, "a red house", compile=True, cuda_graphs=True)
