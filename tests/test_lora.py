"""LoRA files: every format against its formula and against diffusers, merging, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import (
    CONVOLUTION,
    CORED,
    CROSS,
    FEED,
    MLP,
    QUERY,
    SHAPES,
    UNRANKED,
    Tensors,
    good,
    random_change,
    whole_lora,
)
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import Tiny, assert_bit_equal, networks, random_model, tiny_text
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from cutdiff.checkpoint import LoraError, load
from cutdiff.checkpoint.build import Networks
from cutdiff.checkpoint.families import SD15
from cutdiff.checkpoint.keys import unet_keys
from cutdiff.checkpoint.lora import merge
from cutdiff.checkpoint.lora.file import ENCODERS, read_lora
from cutdiff.checkpoint.lora.names import Target, flat, split_key, targets
from cutdiff.checkpoint.model import MergedLora, Model, sha256
from cutdiff.models.config import SD15_UNET, SDXL_UNET, SDXL_VAE
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.sample import main


def formula(factors: Tensors, shape: tuple[int, ...]) -> Tensor:
    """The change in float64 before it is scaled, for each format by one sum over all indices."""
    f = {name.removesuffix(".weight"): factor.double() for name, factor in factors.items()}
    core = "rs..., ro, si -> oi..."
    if "diff" in f:
        return f["diff"]
    if "lora_mid" in f:
        return torch.einsum(core, f["lora_mid"], f["lora_up"].flatten(1).T, f["lora_down"].flatten(1))
    if "lora_up" in f:
        return torch.einsum("or, ri... -> oi...", f["lora_up"].flatten(1), f["lora_down"]).reshape(shape)
    if "hada_t1" in f:
        halves = (torch.einsum(core, f[f"hada_t{n}"], f[f"hada_w{n}_a"], f[f"hada_w{n}_b"]) for n in (1, 2))
        return next(halves) * next(halves)
    if "hada_w1_a" in f:
        return torch.einsum("or, ri, os, si -> oi", *(f[f"hada_w{n}_{side}"] for n in (1, 2) for side in "ab")).reshape(
            shape
        )
    first = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    if "lokr_t2" in f:
        second = torch.einsum(core, f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    else:
        second = f["lokr_w2"] if "lokr_w2" in f else f["lokr_w2_a"] @ f["lokr_w2_b"]
    second = second.reshape(shape[0] // len(first), shape[1] // first.shape[1], -1)
    return torch.einsum("ac, bdk -> abcdk", first, second).reshape(shape)


def one_module(path: Path, factors: Tensors, shape: tuple[int, ...], alpha: Tensor | None = None) -> Tensor:
    """The sum that a file adds to a weight of that shape, the only one that it changes."""
    save_file({f"lora_unet_layer.{name}": factor for name, factor in with_alpha(factors, alpha).items()}, path)
    target = Target("unet", "layer.weight", torch.Size(shape))
    changes = read_lora(path, {"lora_unet_layer": target}, 0).changes
    assert [*changes] == [target]
    return changes[target].of(torch.zeros(shape), 1.0)


def with_alpha(factors: Tensors, alpha: Tensor | None) -> Tensors:
    return factors if alpha is None else {**factors, "alpha": alpha}


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.double().abs().max()


class TestFormulas:
    @pytest.mark.parametrize("kind", SHAPES)
    @settings(max_examples=40)
    @given(
        size=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda size: (2 * size[0], 2 * size[1])),
        kernel=st.sampled_from([(), (1, 1), (3, 3), (1, 2)]),
        rank=st.integers(1, 9),
        alpha=st.none() | st.floats(-16, 16, width=16),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        seed=st.integers(0, 99),
    )
    def test_change(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        kind: str,
        size: tuple[int, int],
        kernel: tuple[int, ...],
        rank: int,
        alpha: float | None,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        if kind in CORED and not kernel:
            kernel = (3, 3)
        shape = (*size, *kernel)
        factors = random_change(kind, shape, rank, torch.Generator().manual_seed(seed))
        factors = {name: factor.to(dtype) for name, factor in factors.items()}
        given_alpha = None if alpha is None else torch.tensor(alpha)
        strength = 1 if alpha is None or kind in UNRANKED else alpha / rank
        path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
        assert_near(one_module(path, factors, shape, given_alpha), strength * formula(factors, shape))

    @pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1, 1)])
    @pytest.mark.parametrize("trained_as", [(4, 6), (4, 6, 1, 1)])
    def test_matrices_and_convolutions_of_one_pixel_are_the_same(
        self, tmp_path: Path, shape: tuple[int, ...], trained_as: tuple[int, ...]
    ) -> None:
        factors = random_change("LoRA", trained_as, 2, torch.Generator().manual_seed(0))
        change = one_module(tmp_path / "lora.safetensors", factors, shape)
        assert_near(change.flatten(1), formula(factors, trained_as).flatten(1))

    @pytest.mark.parametrize("alpha", [torch.tensor(4), torch.tensor([4.0]), torch.tensor(4.0, dtype=torch.float64)])
    def test_every_spelling_of_a_number_is_an_alpha(self, tmp_path: Path, alpha: Tensor) -> None:
        factors = random_change("LoRA", (4, 6), 2, torch.Generator().manual_seed(0))
        change = one_module(tmp_path / "lora.safetensors", factors, (4, 6), alpha)
        assert torch.equal(change, 2.0 * (factors["lora_up.weight"] @ factors["lora_down.weight"]))


NAMES = [
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight",
        "unet",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
        "lora_down",
    ),
    ("lora_unet_output_blocks_2_2_conv.lora_mid.weight", "unet", "up_blocks.0.upsamplers.0.conv", "lora_mid"),
    ("lora_unet_input_blocks_1_0_emb_layers_1.alpha", "unet", "down_blocks.0.resnets.0.time_emb_proj", "alpha"),
    ("lora_unet_label_emb_0_2.hada_w1_a", "unet", "add_embedding.linear_2", "hada_w1_a"),
    ("lora_unet_out_2.lokr_w2_b", "unet", "conv_out", "lokr_w2_b"),
    ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "unet", "mid_block.attentions.0.proj_in", "lora_up"),
    ("lycoris_mid_block_resnets_1_conv2.lokr_t2", "unet", "mid_block.resnets.1.conv2", "lokr_t2"),
    ("unet.up_blocks.1.attentions.2.proj_out.lora_A.weight", "unet", "up_blocks.1.attentions.2.proj_out", "lora_down"),
    ("base_model.model.unet.conv_in.lora_B.weight", "unet", "conv_in", "lora_up"),
    ("base_model.model.conv_in.lora_B.weight", "unet", "conv_in", "lora_up"),
    (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.lora.up.weight",
        "unet",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
        "lora_up",
    ),
    (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.down.weight",
        "unet",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "lora_down",
    ),
    (
        "diffusion_model.input_blocks.1.0.emb_layers.1.lora_up.weight",
        "unet",
        "down_blocks.0.resnets.0.time_emb_proj",
        "lora_up",
    ),
    (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj.alpha",
        "text_encoder",
        QUERY,
        "alpha",
    ),
    (
        "text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.q_proj.alpha",
        "text_encoder_2",
        QUERY,
        "alpha",
    ),
    ("lora_te_text_model_encoder_layers_1_self_attn_q_proj.alpha", "text_encoder", QUERY, "alpha"),
    ("lora_te1_text_model_encoder_layers_1_self_attn_q_proj.diff", "text_encoder", QUERY, "diff"),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight", "text_encoder", MLP, "lora_up"),
    ("text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight", "text_encoder", MLP, "lora_down"),
    ("text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.down.weight", "text_encoder", QUERY, "lora_down"),
    ("lora_te2_text_model_encoder_layers_1_self_attn_q_proj.alpha", "text_encoder_2", QUERY, "alpha"),
    ("text_encoder_2.text_projection.lora_A.weight", "text_encoder_2", "text_projection", "lora_down"),
]
"""Keys as the tools write them, the network and module that each is for, and the part that it holds."""


@pytest.fixture(scope="module")
def sdxl() -> dict[str, Target]:
    """The names in SDXL's U-Net and in small text encoders."""
    text = tiny_text()
    with torch.device("meta"):
        return targets(Networks(UNet(SDXL_UNET), VAE(SDXL_VAE), text.text_encoder, text.text_encoder_2))


class TestNames:
    @pytest.mark.parametrize(("key", "network", "module", "part"), NAMES)
    def test_keys_of_sdxl(self, sdxl: dict[str, Target], key: str, network: str, module: str, part: str) -> None:
        name, found = split_key(key)
        target = sdxl[flat(name)]
        assert (found, target.network) == (part, network)
        assert target.key.removeprefix("text_model.") == f"{module.removeprefix('text_model.')}.weight"

    def test_every_weight_and_bias_of_the_unet_has_its_names(self, sdxl: dict[str, Target]) -> None:
        with torch.device("meta"):
            unet = UNet(SDXL_UNET)
        shapes = {key: weight.shape for key, weight in unet.state_dict().items()}
        for original, key in unet_keys(unet).items():
            for name in (original, key):
                module, _, kind = name.rpartition(".")
                place = f"lora_unet_{flat(module)}" + (".bias" if kind == "bias" else "")
                assert sdxl[place] == Target("unet", key, shapes[key])
        assert {target.key for target in sdxl.values() if target.network == "unet"} == shapes.keys()

    def test_sd_1_5_has_its_names_too(self) -> None:
        with torch.device("meta"):
            table = targets(Networks(UNet(SD15_UNET), VAE(SDXL_VAE), tiny_text().text_encoder, None))
        name = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
        assert table[f"lora_unet_{name}"].shape == (320, 320)
        assert table[f"lora_unet_{name}"] is table["lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k"]


def by_diffusers(folder: Path, file: Path, scale: float) -> Any:
    """diffusers' pipeline with a LoRA fused into its weights."""
    is_sdxl = (folder / "text_encoder_2").exists()
    kind = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    pipeline: Any = kind.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline


def assert_agrees(model: Model, pipeline: Any) -> None:
    """Assert that all weights are those of the pipeline, to rounding."""
    for name, network in networks(model).items():
        theirs = getattr(pipeline, name).state_dict()
        assert theirs.keys() == network.state_dict().keys()
        for key, weight in network.state_dict().items():
            assert_near(weight, theirs[key])


class TestAgainstDiffusers:
    def test_kohya_for_sdxl(self, tiny: Tiny, folder: Path, tmp_path: Path) -> None:
        """kohya's scripts train SDXL in the original layout."""
        file = tmp_path / "lora.safetensors"
        save_file(whole_lora(tiny, original=True), file)
        model, pipeline = load(folder, loras=[(file, 0.7)]), by_diffusers(folder, file, 0.7)
        assert_agrees(model, pipeline)
        assert not torch.equal(model.unet.conv_in.weight, tiny.unet.conv_in.weight)
        generator = torch.Generator().manual_seed(0)
        x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 192, generator=generator)
        pooled, sizes = torch.randn(2, 64, generator=generator), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        with torch.no_grad():
            ours = model.unet(x, torch.tensor([5, 900]), context, pooled, sizes)
            conditions = {"text_embeds": pooled, "time_ids": sizes}
            theirs = pipeline.unet(x, torch.tensor([5, 900]), context, added_cond_kwargs=conditions).sample
            before = tiny.unet(x, torch.tensor([5, 900]), context, pooled, sizes)
        assert_near(ours, theirs)
        assert (ours - before).abs().max() > 0.1

    def test_kohya_for_sd_1_5(self, tmp_path: Path) -> None:
        """kohya's scripts train SD 1.5 in diffusers' layout."""
        tiny = random_model(SD15)
        folder, file = tiny.save(tmp_path / "model"), tmp_path / "lora.safetensors"
        save_file(whole_lora(tiny, original=False), file)
        assert_agrees(load(folder, loras=[(file, -1.5)]), by_diffusers(folder, file, -1.5))

    def test_what_diffusers_trains_and_writes(self, folder: Path, tmp_path: Path) -> None:
        """The file has PEFT's names, and alphas in the metadata."""
        pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
        adapters = {
            "unet": LoraConfig(
                r=4,
                lora_alpha=6,
                target_modules=["to_q", "to_out.0", "conv1", "proj_in"],
                alpha_pattern={"mid_block.attentions.0.proj_in": 3, "attn2.to_q": 1.5},
                rank_pattern={"conv1": 2},
            ),
            "text_encoder": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "fc1"], use_rslora=True),
            "text_encoder_2": LoraConfig(r=3, lora_alpha=1, target_modules=["v_proj", "text_projection"]),
        }
        written: dict[str, Any] = {}
        for name, config in adapters.items():
            network = getattr(pipeline, name)
            inject_adapter_in_model(config, network)  # as add_adapter does, of which transformers asks a later PEFT
            state = get_peft_model_state_dict(network, adapter_name="default")
            written[f"{name}_lora_layers"] = {key: torch.randn(t.shape) for key, t in state.items()}
            written[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
        pipeline.save_lora_weights(tmp_path, **written)
        (file,) = tmp_path.glob("*.safetensors")
        assert_agrees(load(folder, loras=[(file, 0.5)]), by_diffusers(folder, file, 0.5))

    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "conv1"], alpha_pattern={"attn2.to_q": 2}),
            LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "conv1"], use_rslora=True),
            LoHaConfig(r=4, alpha=16, target_modules=["to_q", "conv1"]),
            LoKrConfig(r=2, alpha=8, target_modules=["to_q", "conv1"]),
            LoKrConfig(r=64, alpha=8, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 48}),
            LoKrConfig(r=3, alpha=8, target_modules=["to_q", "conv1", "conv_shortcut"], decompose_both=True),
            LoKrConfig(r=3, alpha=8, target_modules=["conv1", "conv_out"], use_effective_conv2d=True),
        ],
        ids=["LoRA", "rsLoRA", "LoHa", "LoKr", "whole LoKr", "LoKr, both in factors", "LoKr with a core"],
    )
    @pytest.mark.parametrize("name", ["adapter_model", "style"])
    def test_what_peft_writes(self, folder: Path, tmp_path: Path, config: Any, name: str) -> None:
        """The alpha of a U-Net's adapter stands in adapter_config.json beside it, whatever the file's name."""
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        adapted: Any = get_peft_model(unet, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(
                        0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    )
        adapted.save_pretrained(tmp_path)
        file = (tmp_path / "adapter_model.safetensors").rename(tmp_path / f"{name}.safetensors")
        model = load(folder, loras=[(file, 1.0)])
        theirs = adapted.merge_and_unload().state_dict()
        for key, weight in model.unet.state_dict().items():
            assert_near(weight, theirs[key])

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT 0.21
    @pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
    def test_a_text_encoder_alone_in_a_folder(self, tiny: Tiny, folder: Path, tmp_path: Path, name: str) -> None:
        kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "fc1"], alpha_pattern={"fc1": 2})
        adapted: Any = get_peft_model(kind.from_pretrained(folder / name), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(tmp_path)
        theirs = {**networks(tiny), name: adapted.merge_and_unload()}
        for network, ours in networks(load(folder, loras=[(tmp_path, 1.0)])).items():
            for key, weight in theirs[network].state_dict().items():
                assert_near(ours.state_dict()[key], weight)

    @pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", None])
    def test_a_text_encoder_alone_that_fits_both(self, tmp_path: Path, kind: str | None) -> None:
        prefix = "base_model.model.text_model.layer"
        factors = {f"{prefix}.lora_A.weight": torch.ones(1, 2), f"{prefix}.lora_B.weight": torch.ones(2, 1)}
        save_file(factors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"lora_alpha": 2, "auto_mapping": kind and {"base_model_class": kind}})
        )
        encoders = [Target(name, "text_model.layer.weight", torch.Size((2, 2))) for name in ENCODERS.values()]
        table = {f"{target.network}_text_model_layer": target for target in encoders}
        if kind in ENCODERS:
            (target,) = read_lora(tmp_path / "adapter_model.safetensors", table, 0).changes
            assert target.network == ENCODERS[kind]
        else:
            with pytest.raises(LoraError, match="fits both text encoders, and no auto_mapping of its adapter_config"):
                read_lora(tmp_path / "adapter_model.safetensors", table, 0)


@pytest.fixture
def two(tiny: Tiny, tmp_path: Path) -> tuple[Path, Path]:
    """Two LoRAs for the tiny model."""
    paths = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for seed, path in enumerate(paths):
        save_file(whole_lora(tiny, original=seed == 0, seed=seed), path)
    return paths


class TestMerging:
    def test_is_the_formula_bit_by_bit(self, tiny: Tiny, folder: Path, two: tuple[Path, Path]) -> None:
        tensors, weight = load_file(two[1]), tiny.unet.get_parameter(f"{CROSS}.weight")
        name = f"lora_unet_{flat(CROSS)}"
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        expected = weight + 0.8 * (2.0 / len(down)) * (up @ down)
        for dtype in (torch.float32, torch.float16):
            model = load(folder, dtype=dtype, loras=[(two[1], 0.8)])
            assert torch.equal(model.unet.get_parameter(f"{CROSS}.weight"), expected.to(dtype))

    def test_two_add_up_in_any_order(self, tiny: Tiny, folder: Path, two: tuple[Path, Path]) -> None:
        one, other = (two[0], 0.5), (two[1], -2.0)
        models = [load(folder, loras=loras) for loras in ([one], [other], [one, other], [other, one])]
        for name, network in networks(tiny).items():
            first, second, both, reversed_ = (networks(model)[name].state_dict() for model in models)
            for key, weight in network.state_dict().items():
                assert_near(both[key], first[key] + second[key] - weight)
                assert_near(both[key], reversed_[key], 1e-6)

    def test_scale_0_changes_no_bit(self, tiny: Tiny, folder: Path, two: tuple[Path, Path]) -> None:
        assert_bit_equal(load(folder, loras=[(two[0], 0.0)]), tiny)

    def test_both_layouts_of_the_model_take_the_same_file(
        self, folder: Path, single_file: Path, two: tuple[Path, Path]
    ) -> None:
        """In a single file, the second text encoder's queries, keys and values lie in one matrix."""
        assert_bit_equal(load(single_file, config=folder, loras=[(two[0], 1)]), load(folder, loras=[(two[0], 1)]))

    def test_only_what_is_changed_is_copied(self, tiny: Tiny, tmp_path: Path) -> None:
        file = tmp_path / "lora.safetensors"
        save_file(good(tiny), file)
        text = tiny.text
        built = Networks(tiny.unet, tiny.vae, text.text_encoder, text.text_encoder_2)
        weights = {name: network.state_dict() for name, network in networks(tiny).items()}
        before = {name: {key: weight.clone() for key, weight in part.items()} for name, part in weights.items()}
        merged, *_ = merge(weights, built, [(file, 1.0)], dtype=torch.float32)
        changed = {key for name in weights for key in weights[name] if merged[name][key] is not weights[name][key]}
        assert {key.removeprefix("text_model.") for key in changed} == {
            f"{module.removeprefix('text_model.')}.weight" for module in (CROSS, FEED, CONVOLUTION, QUERY)
        }
        for name, part in weights.items():
            assert all(torch.equal(part[key], before[name][key]) for key in part)

    def test_model_knows_its_loras(self, folder: Path, two: tuple[Path, Path]) -> None:
        model = load(folder, loras=[(two[0], 0.5), (str(two[1]), -2)])
        assert model.loras == (
            MergedLora(str(two[0]), 0.5, sha256(two[0])),
            MergedLora(str(two[1]), -2, sha256(two[1])),
        )

    def test_a_merge_that_overflows(self, folder: Path, two: tuple[Path, Path]) -> None:
        with pytest.raises(LoraError, match=r"is not finite in torch\.float16 with the LoRAs: lower their scales"):
            load(folder, dtype=torch.float16, loras=[(two[0], 1e6)])

    def test_arguments(self, folder: Path, two: tuple[Path, Path]) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere is no file or folder: pass a LoRA's"):
            load(folder, loras=[(two[0], 1), ("nowhere", 1)])
        with pytest.raises(ValueError, match=r"^loras=.*one\.safetensors.*nan.* must be .* a finite number"):
            load(folder, loras=[(two[0], float("nan"))])


class TestCommandLine:
    @pytest.fixture
    def file(self, model: Model, tmp_path: Path) -> Path:
        """A LoRA for the embedded model."""
        path, weight = tmp_path / "style:2.safetensors", model.unet.get_parameter("mid_block.resnets.0.conv1.weight")
        factors = random_change("LoCon with a core", tuple(weight.shape), 4, torch.Generator().manual_seed(0))
        save_file({f"lora_unet_mid_block_resnets_0_conv1.{name}": 0.1 * part for name, part in factors.items()}, path)
        return path

    def test_the_picture_and_its_record(self, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        draw = ["--steps", "2", "--width", "128", "--height", "128", "--method", "direct", "--out", str(tmp_path)]
        pictures, records = [], []
        for loras in ([], ["--lora", f"{file}:0"], ["--lora", f"{file}:-0.5", "--lora", str(file)]):
            assert main([*draw, *loras]) == 0
            picture = Path(capsys.readouterr().out.strip())
            with Image.open(picture) as image:
                pictures.append((image.tobytes(), image.info["parameters"]))
            records.append(json.loads(picture.with_suffix(".json").read_text())["model"]["loras"])
        (plain, text), (unchanged, _), (changed, text_with_loras) = pictures
        assert plain == unchanged
        assert plain != changed
        digest = sha256(file)
        assert records[0] == []
        told = {"path": file.name, "sha256": digest}
        assert records[2] == [{**told, "scale": scale} for scale in (-0.5, 1.0)]
        assert "Loras" not in text
        assert ', Loras: "style:2: -0.5, style:2: 1.0", ' in text_with_loras

    def test_a_prompt_names_one_of_a_folder(
        self, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The picture and the fingerprint are those of --lora and a prompt without the name."""
        (folder := tmp_path / "loras" / "inner").mkdir(parents=True)
        (folder / "style.safetensors").write_bytes(file.read_bytes())
        lines = tmp_path / "lines.txt"
        lines.write_text("a <lora:style:-0.5>tent<lora:style>\na house\na tent <lora:style:-0.5><lyco:style:1>\n")
        draw = ["--steps", "1", "--width", "128", "--height", "128", "--method", "direct", "--out", str(tmp_path)]
        named, listed = ["--lora-dir", str(tmp_path / "loras")], ["--lora", f"{file}:-0.5", "--lora", str(file)]
        assert main([*draw, *named, "--prompts", str(lines)]) == 1
        printed = capsys.readouterr()
        assert "line 2: the prompt names other LoRAs than line 1, and a run has one model: draw it in" in printed.err
        assert main([*draw, *listed, "a tent"]) == 0
        paths = [Path(line) for line in [*printed.out.split(), *capsys.readouterr().out.split()]]
        assert [path.name[:4] for path in paths] == ["0001", "0003", "dire"]
        records = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
        assert {record["fingerprint"] for record in records} == {records[0]["fingerprint"]}
        assert {record["prompt"] for record in records} == {"a tent"}
        assert len({path.read_bytes()[-5000:] for path in paths}) == 1

    def test_a_name_that_no_file_of_the_folder_has_is_an_error(
        self, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder := tmp_path / "loras").mkdir()
        (folder / "style.safetensors").write_bytes(file.read_bytes())
        for arguments, expected in (
            (["<lora:stile:1>", "--lora-dir", folder], f"the LoRA 'stile', and {folder} holds no stile.safetensors"),
            (["<lora:stile:1>", "--lora-dir", folder], ": did you mean 'style'?"),
            (["a tent", "--lora-dir", file], f"--lora-dir {file} is no folder"),
            (["<lora:../loras/style:1>", "--lora-dir", folder], f"{folder} holds no ../loras/style.safetensors"),
            (
                ["<lora:style:0.3>"],
                "give --lora-dir DIR, a folder that holds style.safetensors, or leave it out of the",
            ),
            (["<lora:style:0.3>"], "prompt and give --lora FILE:0.3"),
        ):
            assert main(["--out", str(tmp_path / "out"), *map(str, arguments)]) == 2
            assert expected in capsys.readouterr().err
        (folder / "other").mkdir()
        (folder / "other" / "style.safetensors").write_bytes(file.read_bytes())
        assert main(["--out", str(tmp_path / "out"), "<lora:style:1>", "--lora-dir", str(folder)]) == 2
        assert "give one as --lora FILE:1" in capsys.readouterr().err
