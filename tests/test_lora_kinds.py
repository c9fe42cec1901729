"""LoRA files as other tools write them, beside what PEFT, diffusers or the tool's own formula makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import CONVOLUTION, CROSS, FEED, Tensors, good, whole_lora
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from tiny import Tiny, assert_bit_equal, networks
from torch import Tensor, nn

from cutdiff.checkpoint import LoraError, load
from cutdiff.checkpoint.lora.names import flat
from cutdiff.checkpoint.lora.patterns import Pattern

NORM = "mid_block.attentions.0.transformer_blocks.1.norm1"


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.double().abs().max()


def assert_is(network: nn.Module, expected: dict[str, Tensor]) -> None:
    assert network.state_dict().keys() == expected.keys()
    for key, weight in network.state_dict().items():
        assert_near(weight, expected[key])


def randomise(adapted: Any) -> None:
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
                parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.1 * noise)


def test_weights_that_are_decomposed_by_peft(folder: Path, tmp_path: Path) -> None:
    """DoRA, in the folder that PEFT writes, with alphas and ranks by regular expressions."""
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        use_dora=True,
        target_modules=["to_q", "to_k", "conv1", "proj_in"],
        alpha_pattern={r".*attn[12]\.to_k": 2, r"^down_blocks\.\d+.*(to_q|conv1)": 3, "to_k": 5},
        rank_pattern={r"(mid|up)_blocks?\..*conv1": 2},
    )
    adapted: Any = get_peft_model(UNet2DConditionModel.from_pretrained(folder / "unet"), config)
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "style")
    model = load(folder, loras=[(tmp_path / "style", 1.0)])
    assert model.loras[0].path == str(tmp_path / "style")
    assert_is(model.unet, adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize("name", [None, "default", "default_0", "my-style"])
def test_what_diffusers_writes_with_an_adapters_name(folder: Path, tmp_path: Path, name: str | None) -> None:
    """DoRA at a strength that is not 1, in the keys of the saved file and of the adapter in memory."""
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    config = LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["to_q", "ff.net.2", "conv_shortcut"])
    inject_adapter_in_model(config, pipeline.unet, adapter_name="default_0")
    randomise(pipeline.unet)
    tensors = {f"unet.{key}": tensor for key, tensor in pipeline.unet.state_dict().items() if ".lora_" in key}
    within = "." if name is None else f".{name}."
    save_file({key.replace(".default_0.", within): t for key, t in tensors.items()}, tmp_path / "lora.safetensors")
    assert len(tensors) % 3 == 0
    pipeline.fuse_lora(lora_scale=0.6)
    pipeline.unload_lora_weights()
    assert_is(load(folder, loras=[(tmp_path / "lora.safetensors", 0.6)]).unet, pipeline.unet.state_dict())


@pytest.mark.parametrize("by", ["output", "input"])
@pytest.mark.parametrize("module", [CROSS, CONVOLUTION])
def test_weights_that_are_decomposed_by_lycoris(tiny: Tiny, folder: Path, tmp_path: Path, module: str, by: str) -> None:
    """LyCORIS gives a length to all that belongs to one output, or as older files to one input."""
    weight, name = tiny.unet.get_parameter(f"{module}.weight"), f"lora_unet_{flat(module)}"
    tensors = {key: tensor for key, tensor in good(tiny).items() if key.startswith(name)}
    axis = 0 if by == "output" else 1
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    lengths = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(0))
    save_file({**tensors, f"{name}.dora_scale": lengths}, tmp_path / "lora.safetensors")
    down, up = (tensors[f"{name}.lora_{part}.weight"] for part in ("down", "up"))
    change = (2.0 / len(down) * (up.flatten(1) @ down.flatten(1))).reshape(weight.shape)
    changed = (weight + change).double().movedim(axis, 0)
    rows = changed.flatten(1) / changed.flatten(1).square().sum(1, keepdim=True).sqrt() * lengths.reshape(-1, 1)
    expected = rows.reshape(changed.shape).movedim(0, axis)
    model = load(folder, loras=[(tmp_path / "lora.safetensors", 1.0)])
    assert_near(model.unet.get_parameter(f"{module}.weight"), expected)
    assert_bit_equal(load(folder, loras=[(tmp_path / "lora.safetensors", 0.0)]), tiny)


def test_two_that_are_decomposed_add_up(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    name, key = f"lora_unet_{flat(FEED)}", f"{FEED}.weight"
    files = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for seed, file in enumerate(files):
        tensors = {k: t for k, t in whole_lora(tiny, original=False, seed=seed).items() if k.startswith(f"{name}.")}
        save_file({**tensors, f"{name}.dora_scale": torch.full((512, 1), seed + 0.5)}, file)
    one, two, both, reverse = (
        load(folder, loras=[(file, 1.0) for file in some]).unet.get_parameter(key)
        for some in (files[:1], files[1:], files, files[::-1])
    )
    assert_near(both, one + two - tiny.unet.get_parameter(key))
    assert_near(both, reverse, 1e-6)


def test_whole_differences_of_weights_biases_and_norms(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    """`full` and `train_norm` of LyCORIS; differences of zero have no effect, wherever they are."""
    names = {f"unet.{FEED}": "lora_unet_" + flat(FEED), f"unet.{NORM}": "lora_unet_" + flat(NORM)}
    names["te1"] = "lora_te1_" + flat("text_model.encoder.layers.1.layer_norm1")
    differences = {
        f"{names[f'unet.{FEED}']}.diff": (tiny.unet, f"{FEED}.weight"),
        f"{names[f'unet.{FEED}']}.diff_b": (tiny.unet, f"{FEED}.bias"),
        f"{names[f'unet.{NORM}']}.w_norm": (tiny.unet, f"{NORM}.weight"),
        f"{names[f'unet.{NORM}']}.b_norm": (tiny.unet, f"{NORM}.bias"),
        "lora_unet_out_0.w_norm": (tiny.unet, "conv_norm_out.weight"),
        f"{names['te1']}.b_norm": (tiny.text.text_encoder, "layer_norm1.bias"),
    }
    generator, tensors, expected = torch.Generator().manual_seed(0), Tensors(), dict[str, Tensor]()
    for key, (network, end) in differences.items():
        (own,) = (k for k in network.state_dict() if k.endswith(end) and ("layers.1" in k or network is tiny.unet))
        before = network.state_dict()[own]
        tensors[key] = torch.randn(before.shape, generator=generator)
        expected[own.removeprefix("text_model.")] = before - 0.5 * tensors[key]
    zeros = (f"lora_unet_{flat(CROSS)}.diff_b", f"lora_unet_{flat(CONVOLUTION)}.diff", "lora_te3_odd.diff")
    save_file({**tensors, **{key: torch.zeros(7) for key in zeros}}, tmp_path / "lora.safetensors")
    model = load(folder, loras=[(tmp_path / "lora.safetensors", -0.5)])
    for name, network in networks(model).items():
        for key, weight in network.state_dict().items():
            assert_near(weight, expected.pop(key.removeprefix("text_model."), networks(tiny)[name].state_dict()[key]))
    assert not expected


SPELLINGS = {
    "OMI": [("lora_unet_", "unet."), ("lora_te1_", "clip_l."), ("lora_te2_", "clip_g.")],
    "compiled": [("lora_unet_", "lora_unet__orig_mod_"), ("lora_te1_", "lora_te1__orig_mod_")],
    "compiled, by diffusers": [("lora_unet_", "unet._orig_mod.")],
    "a prefix twice": [("lora_unet_", "lora_unet_lora_unet_")],
    "a prefix twice, by diffusers": [("lora_unet_", "unet.unet."), ("lora_te1_", "text_encoder.text_encoder.")],
    "by PEFT twice": [("lora_unet_", "base_model.model.base_model.model.")],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_names_of_modules(tiny: Tiny, folder: Path, tmp_path: Path, name: str) -> None:
    plain, file = tmp_path / "plain.safetensors", tmp_path / "lora.safetensors"
    tensors = whole_lora(tiny, original=name == "OMI")
    save_file(tensors, plain)
    for old, new in SPELLINGS[name]:
        tensors = {re.sub(f"^{old}", new, key): tensor for key, tensor in tensors.items()}
    assert tensors.keys() != load_file(plain).keys()
    save_file(tensors, file)
    assert_bit_equal(load(folder, loras=[(file, 1.0)]), load(folder, loras=[(plain, 1.0)]))


def test_prompts_know_the_textual_inversions_inside(quick_folder: Path, tmp_path: Path) -> None:
    lora, alone = tmp_path / "lora.safetensors", tmp_path / "alone.safetensors"
    widths = [encoder.config.hidden_size for encoder in load(quick_folder).text.encoders]
    vectors = {key: torch.randn(2, width) for key, width in zip(("clip_l", "clip_g"), widths, strict=True)}
    save_file(vectors, alone)
    bundled = {f"bundle_emb.catty.{key}": values for key, values in vectors.items()}
    save_file({"lora_unet_conv_in.diff": torch.zeros(16, 4, 3, 3), **bundled}, lora)
    ours, theirs = load(quick_folder, loras=[(lora, 0.5)]), load(quick_folder, embeddings=[("catty", alone)])
    states = [model.text.encode(["a catty"]).context for model in (ours, theirs, load(quick_folder, loras=[(lora, 0)]))]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert [embedding.token for embedding in ours.embeddings] == ["catty"]
    save_file({**load_file(lora), "bundle_emb.cat.clip_g": torch.ones(1, 3)}, lora)
    with pytest.raises(LoraError, match="has the keys clip_g, where this model needs clip_l and clip_g"):
        load(quick_folder, loras=[(lora, 1.0)])


MODULES = ["up_blocks.0.resnets.2.conv1", "conv_in", "encoder.layers.1.self_attn.q_proj", "attn2.to_out.0", "to_q"]
ATOMS = [
    "attn",
    r"\.",
    ".",
    "to_q",
    "to_",
    "[qkv]",
    "[^.]",
    r"[\d_]",
    "[0-2]",
    r"\d",
    r"\D",
    r"\w",
    r"\s",
    "1",
    "^",
    "$",
]


@st.composite
def expressions(draw: st.DrawFn, depth: int = 0) -> str:
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        is_group = depth < 1 and draw(st.booleans())
        part = f"({draw(expressions(depth + 1))})" if is_group else draw(st.sampled_from(ATOMS))
        repeated = draw(st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,3}", "*?"]))
        parts.append(part if part in "^$" else part + repeated)
    return draw(st.sampled_from(["", "", "|"])).join(parts)


class TestPatterns:
    @settings(max_examples=150)
    @given(text=expressions(), module=st.sampled_from(MODULES))
    def test_match_as_peft_matches(self, text: str, module: str) -> None:
        assert Pattern.of(text).matches(module) == (get_pattern_key([text], module) is text)

    @pytest.mark.parametrize("text", ["to_q", "^to_q", "attn2.to.out.0", "n", "", "^attn2.to_out.0", "o_q", "layers.1"])
    @pytest.mark.parametrize("module", MODULES)
    def test_names_match_as_peft_matches(self, text: str, module: str) -> None:
        assert Pattern.of(text).matches(module) == (re.match(rf"(.*\.)?({text})$", module) is not None)

    @pytest.mark.parametrize(
        "text", ["(a+)+$" * 9, "((.?.?)*.?)*Z", ".?" * 400 + "Z", "(a|a)" * 150, "(.{9999}){9999}"]
    )
    def test_none_takes_long(self, text: str) -> None:
        assert not Pattern.of(text).matches("a" * 100)
