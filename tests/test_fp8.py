"""FP8 linear layers: the format's error bound, the layer beside its float one, and what a model with them refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loras import good
from refusal import CommandLine
from safetensors.torch import save_file
from tiny import Tiny, assert_bit_equal
from torch import Tensor, nn

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.models import fp8
from cutdiff.models.fp8 import (
    FORMAT,
    LARGEST,
    FP8Linear,
    check_fp8,
    quantize,
    quantize_transformers,
    scaled_product,
    scaled_product_reference,
)
from cutdiff.models.unet import PixelwiseLinear

RUN = {"num_steps": 2, "height": 128, "width": 128, "guidance_scale": 2.0}
"""The picture is twice the native size of the random network."""


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def linear(seed: int, inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    exponent=st.integers(-90, 120),
    spread=st.integers(0, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_elements_are_within_half_a_step_of_the_format(
    seed: int, shape: tuple[int, int], exponent: int, spread: int, dtype: torch.dtype
) -> None:
    """Rows of sizes from 1e-30 to 1e36, whose elements differ by factors up to 2^12 and more."""
    x = rows(seed, *shape) * torch.exp2(exponent + spread * (rows(seed + 1, *shape).sigmoid() - 1))
    x = x.to(dtype)
    values, scale = quantize(x)
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (FORMAT, x.shape, torch.float32, (len(x), 1))
    error = (values.double() * scale.double() - x.double()).abs()
    assert (error <= 1.0001 * torch.maximum(x.double().abs() * 2**-4, scale.double() * 2**-10)).all()
    assert (values.float().abs().amax(1) == LARGEST).all(), "the largest of a row uses the format up to its end"


def test_rows_of_zeros_stay_zeros_and_leave_their_neighbours() -> None:
    x = rows(0, 3, 32)
    x[1] = 0
    values, scale = quantize(x)
    assert torch.equal(values[1].float(), torch.zeros(32))
    assert scale.isfinite().all()
    assert torch.equal(values[::2].float(), quantize(x[::2])[0].float())


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("product", [scaled_product, scaled_product_reference])
def test_what_is_not_finite_does_not_become_finite(
    bad: float, product: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4M3 has no infinity, and a cast to it may saturate."""
    monkeypatch.setattr(fp8, "scaled_product_reference", product)
    x = rows(0, 2, 3, 64, dtype=torch.bfloat16)
    x[1, 2, 5] = bad
    layer = linear(0, 64, 32, dtype=torch.bfloat16)
    out = FP8Linear(layer)(x)
    assert not out[1, 2].isfinite().any()
    assert out[0].isfinite().all()
    assert out[1, :2].isfinite().all()
    layer.weight[7, 3] = bad
    out = FP8Linear(layer)(x[0])
    assert not out[:, 7].isfinite().any()
    assert out[:, :7].isfinite().all()


@given(
    seed=st.integers(0, 2**32),
    num=st.integers(1, 40),
    inputs=st.integers(1, 12).map(lambda n: 16 * n),
    outputs=st.integers(1, 12).map(lambda n: 16 * n),
    bias=st.booleans(),
)
def test_torchs_own_scaled_product_agrees_with_the_reference(
    seed: int, num: int, inputs: int, outputs: int, bias: bool
) -> None:
    x, weight = quantize(rows(seed, num, inputs)), quantize(rows(seed + 1, outputs, inputs))
    added = rows(seed + 2, outputs, dtype=torch.bfloat16) if bias else None
    arguments = (*x, *weight, added, torch.bfloat16)
    torch.testing.assert_close(
        scaled_product(*arguments), scaled_product_reference(*arguments), rtol=2**-7, atol=1e-5 * inputs
    )


@pytest.mark.parametrize("pixelwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_the_float_one_to_the_formats_precision(pixelwise: bool, dtype: torch.dtype) -> None:
    """Both operands are off by 2^-4 at most and about 0.026 at the root of the mean square: together 0.037."""
    layer = linear(0, 256, 96, dtype=dtype)
    x = rows(1, 2, 256, 33, dtype=dtype).transpose(1, 2)  # as feature maps come in
    expected = layer(x)
    if pixelwise:
        layer, plain = PixelwiseLinear(256, 96).requires_grad_(False).to(dtype), layer
        layer.load_state_dict({"weight": plain.weight[:, :, None, None], "bias": plain.bias})
        assert torch.equal(layer(x), expected)
    out = FP8Linear(layer)(x)
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    assert 0.01 < relative(out - layer.bias, expected - layer.bias) < 0.05
    for i in range(2):  # each token by itself, whatever the strides
        assert torch.equal(FP8Linear(layer)(x[i : i + 1]), out[i : i + 1])


def test_it_compiles_into_one_graph() -> None:
    layer, x = FP8Linear(linear(0, 64, 32)), rows(1, 2, 5, 64)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.fixture
def quantized(tiny_model: Model) -> Model:
    model = deepcopy(tiny_model)
    quantize_transformers(model.unet)
    return model


def test_which_layers_and_under_which_names(tiny_model: Model, quantized: Model) -> None:
    before, after = dict(tiny_model.unet.named_modules()), dict(quantized.unet.named_modules())
    assert before.keys() == after.keys()
    assert tiny_model.unet.state_dict().keys() == quantized.unet.state_dict().keys()
    changed = {name for name, module in after.items() if type(module) is not type(before[name])}
    assert all(isinstance(after[name], FP8Linear) for name in changed)
    block = "mid_block.attentions.0.transformer_blocks.0."
    mid = {name for name in changed if name.startswith("mid_block.attentions.0.")}
    layers = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0")
    assert mid == {
        *(block + name for name in (*layers, "ff.net.0.proj", "ff.net.2")),
        "mid_block.attentions.0.proj_in",
        "mid_block.attentions.0.proj_out",
    }
    assert all(".attentions." in name for name in changed)
    assert (tiny_model.fp8, quantized.fp8) == (False, True)


def test_layers_that_the_hardware_cannot_multiply_are_left(tiny_model: Model) -> None:
    unet = deepcopy(tiny_model.unet)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q = linear(0, 32, 24)
    quantize_transformers(unet)
    assert type(attention.to_q) is nn.Linear
    assert type(attention.to_k) is FP8Linear


def test_a_network_is_a_little_off(model: Model) -> None:
    """It is one pass of the embedded network over noise, with text and without."""
    unet = deepcopy(model.unet)
    quantize_transformers(unet)
    config = unet.config
    x = rows(0, 2, 4, config.native_size, config.native_size)
    context, pooled = rows(1, 2, 77, config.context_dim), rows(2, 2, config.pooled_dim)
    inputs = (x, torch.tensor([500.0, 20.0]), context, pooled, torch.full((2, 6), 128.0))
    with torch.no_grad():
        expected, found = model.unet(*inputs), unet(*inputs)
        assert torch.equal(unet(inputs[0], inputs[1], unet.read(context), *inputs[3:]), found)
    assert 1e-4 < relative(found, expected) < 0.05


@pytest.mark.parametrize("method", ["cutdiffusion", "attention_scaling", "scalecrafter", "hidiffusion", "accdiffusion"])
def test_methods_draw_with_it_and_the_record_says_so(tiny_model: Model, quantized: Model, method: str) -> None:
    result = cutdiff.generate(quantized, "a red house", method=method, **RUN)
    plain = cutdiff.generate(tiny_model, "a red house", method=method, **RUN)
    assert (result.record["fp8"], plain.record["fp8"]) == (True, False)
    assert 0 < relative(result.latents, plain.latents) < 0.1


def test_a_bad_weight_is_still_named(tiny_model: Model) -> None:
    model = deepcopy(tiny_model)
    weight = model.unet.mid_block.attentions[0].proj_in.weight
    weight[0, 0] = float("inf")
    quantize_transformers(model.unet)
    with pytest.raises(
        FloatingPointError, match=r"infinity, unet: mid_block\.attentions\.0\.proj_in\.weight: download"
    ):
        cutdiff.generate(model, "a red house", method="direct", **RUN)


def test_loading_quantizes_what_loras_were_merged_into(
    tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(sys.modules["cutdiff.checkpoint.load"], "check_fp8", lambda *given: asked.append(given))
    save_file(good(tiny), tmp_path / "lora.safetensors")
    options = {"dtype": torch.bfloat16, "loras": [(tmp_path / "lora.safetensors", 0.5)], "check_weights": True}
    found, expected = cutdiff.load(folder, fp8=True, **options), cutdiff.load(folder, **options)
    assert asked == [(torch.device("cpu"), torch.bfloat16)]
    assert (found.fp8, expected.fp8) == (True, False)
    quantize_transformers(expected.unet)
    assert_bit_equal(found, expected)


def test_saving_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    unet = deepcopy(tiny.unet)
    quantize_transformers(unet)
    with pytest.raises(ValueError, match=r"^unet: .*weight is quantized, torch.float8_e4m3fn: save the model loaded "):
        Tiny(unet, tiny.vae, tiny.text).save(tmp_path / "saved")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_command_line_refuses_a_cpu(command_line: CommandLine) -> None:
    expected = "--fp8 needs a GPU (Ada, Hopper or later), and the device is cpu: leave it out"
    assert command_line.refuses(["--fp8", "--dtype", "bfloat16"], 2) == expected


def test_other_devices_and_dtypes_are_refused_by_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("meta")  # stands for one
    with pytest.raises(ValueError, match=r"^fp8=True goes with bfloat16, not torch.float16: choose that dtype$"):
        check_fp8(card, torch.float16)

    def refuse(*_: object) -> None:
        raise RuntimeError("only for capability 8.9\nat line 7")

    monkeypatch.setattr(fp8, "scaled_product", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old Card")
    with pytest.raises(ValueError, match=r"^fp8=True is not for Old Card: leave it out \(only for capability 8.9\)$"):
        check_fp8(card, torch.bfloat16)


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.fixture(autouse=True)
    def _capable(self) -> None:
        try:
            check_fp8(torch.device("cuda"), torch.bfloat16)
        except ValueError as error:
            pytest.skip(str(error))

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(
        ("num", "inputs", "outputs"),
        [(1, 16, 16), (77, 640, 640), (128, 5120, 1280), (1000, 1280, 10240), (2048, 5120, 1280)],
    )
    def test_the_product_is_the_reference(self, num: int, inputs: int, outputs: int, bias: bool) -> None:
        """They differ by bfloat16 and by the accumulators of the tensor cores, which have some 14 bits.

        (128, 5120, 1280) is SD 1.5's middle: cuBLAS has lacked kernels for few rows and many columns.
        """
        x, weight = quantize(rows(0, num, inputs).cuda()), quantize(rows(1, outputs, inputs).cuda())
        added = rows(2, outputs, dtype=torch.bfloat16).cuda() if bias else None
        arguments = (*x, *weight, added, torch.bfloat16)
        assert relative(scaled_product(*arguments), scaled_product_reference(*arguments)) <= 2**-7

    @pytest.mark.parametrize("bad", [float("inf"), float("nan")])
    def test_what_is_not_finite_does_not_become_finite(self, bad: float) -> None:
        x = rows(0, 32, 64, dtype=torch.bfloat16).cuda()
        x[3, 5] = bad
        out = FP8Linear(linear(0, 64, 32, dtype=torch.bfloat16).cuda())(x)
        assert not out[3].isfinite().any()
        assert out[:3].isfinite().all()
        assert out[4:].isfinite().all()

    def test_the_embedded_model_draws_the_same_as_on_a_cpu(self) -> None:
        on_gpu = cutdiff.load(device="cuda", dtype=torch.bfloat16, fp8=True)
        on_cpu = cutdiff.load(dtype=torch.bfloat16)
        quantize_transformers(on_cpu.unet)
        found, expected = (
            cutdiff.generate(m, "a red house", method="direct", **RUN).latents.cpu() for m in (on_gpu, on_cpu)
        )
        assert relative(found, expected) <= 0.1
