"""Reading and writing models: both layouts, what diffusers writes and reads, and parts that do not fit."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tiny import (
    LENGTH,
    NOISE,
    UNET,
    VAE_TINY,
    Tiny,
    as_convolution,
    assert_bit_equal,
    edit_json,
    edit_tensors,
    networks,
    put_in_cache,
    tiny_text,
    tiny_tokenizer,
    to_open_clip,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cutdiff.checkpoint import load
from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import assign
from cutdiff.checkpoint.configs import (
    UNET_FIXED,
    VAE_FIXED,
    unet_config,
    unet_to_diffusers,
    vae_config,
    vae_to_diffusers,
)
from cutdiff.checkpoint.families import SDXL
from cutdiff.checkpoint.files import LISTED
from cutdiff.checkpoint.infer import infer_blueprint, infer_unet
from cutdiff.checkpoint.keys import unet_keys, vae_keys
from cutdiff.checkpoint.kinds import TEXT_ENCODERS
from cutdiff.checkpoint.load import load_outline
from cutdiff.checkpoint.model import sha256
from cutdiff.checkpoint.schedulers import NOISE_DEFAULTS, SCHEDULERS, noise_config, noise_to_diffusers
from cutdiff.checkpoint.single import split
from cutdiff.models.config import SDXL_UNET, SDXL_VAE, UNetConfig, VAEConfig
from cutdiff.models.unet import UNet, as_unet
from cutdiff.models.vae import VAE
from cutdiff.sampling.noise import SPREAD_BY, NoiseConfig

CPU = torch.device("cpu")
DOWN, UP, MID = "transformer_layers_per_block", "reverse_transformer_layers_per_block", "mid_block_type"
DEPTHS: dict[str, dict[str, Any]] = {
    "SSD-1B": {"layers_per_block": 2, DOWN: [0, [2, 2], [4, 4]], UP: [[4, 4, 10], [2, 1, 1], 0], MID: "UNetMidBlock2D"},
    "Segmind-Vega": {"layers_per_block": 2, DOWN: [0, 1, 2], UP: [2, [1, 1, 1], 0], MID: "UNetMidBlock2D"},
    "KOALA-700M": {DOWN: [0, 2, 5], MID: None},
    "KOALA-1B": {DOWN: [0, 2, 6], MID: "UNetMidBlock2DCrossAttn"},
    "other depths within a level": {
        "layers_per_block": 2,
        DOWN: [0, [1, 2], [3, 2]],
        UP: [[1, 3, 2], [2, 1, 1], 1],
        MID: "UNetMidBlock2DCrossAttn",
    },
    "other depths on the way down only": {"layers_per_block": 2, DOWN: [1, [1, 3], 2], UP: [2, 1, 1]},
    "no attention in the last level": {
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        DOWN: [1, [2], 0],
        UP: [0, [1, 2], 1],
        MID: "UNetMidBlock2D",
    },
}
"""Fields of U-Nets with other numbers of transformer blocks than SDXL's rule gives. Those that have a name have the
depths by which ComfyUI's `model_detection` knows them."""


def another(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return "another" if isinstance(value, str) or value is None else value + 1


class TestFolder:
    def test_round_trip_is_bit_equal(self, tiny: Tiny, folder: Path) -> None:
        model = load(folder)
        assert_bit_equal(model, tiny)
        assert (model.unet.config, model.vae.config, model.noise) == (UNET, VAE_TINY, NOISE)
        assert not model.zeros_for_empty_negative
        assert (model.source, model.dtype, model.device) == (str(folder), torch.float32, CPU)

    def test_text_states_and_tokens_survive(self, tiny: Tiny, folder: Path) -> None:
        model, prompts = load(folder), ["a red house!", "", "x" * 99]
        for chunks in zip(model.text.tokenize(prompts), tiny.text.tokenize(prompts), strict=True):
            for ours, theirs in zip(*chunks, strict=True):
                assert torch.equal(ours.ids, theirs.ids)
                assert ours.ids.shape == (3, LENGTH)
        ours, theirs = model.text.encode(prompts), tiny.text.encode(prompts)
        assert torch.equal(ours.context, theirs.context)
        assert torch.equal(ours.pooled, theirs.pooled)

    def test_networks_are_ready_to_run(self, folder: Path) -> None:
        for network in networks(load(folder)).values():
            assert not network.training
            assert not any(p.requires_grad or p.is_meta for p in network.parameters())
            assert not any(buffer.is_meta for buffer in network.buffers())

    def test_no_global_random_state_is_touched(self, folder: Path) -> None:
        before = torch.get_rng_state()
        load(folder)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.gpu
    def test_convolutions_lie_in_channels_last_on_a_gpu(self, folder: Path) -> None:
        model = load(folder, device="cuda")
        for network in (model.unet, model.vae):
            weights = [weight for weight in network.parameters() if weight.ndim == 4]
            assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)

    def test_weights_stay_memory_mapped(self, folder: Path) -> None:
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("the kernel does not list mapped files")
        model = load(folder)
        address = as_unet(model.unet).conv_in.weight.data_ptr()
        for line in maps.read_text().splitlines():
            start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            if start <= address < end:
                assert line.endswith("unet/diffusion_pytorch_model.safetensors")
                return
        pytest.fail("the weight lies in no mapped region")

    @pytest.mark.parametrize(
        ("dtype", "upcast", "expected"),
        [
            (torch.float16, True, torch.float32),
            (torch.float16, False, torch.float16),
            (torch.bfloat16, True, torch.bfloat16),
        ],
    )
    def test_dtypes(self, copy: Path, dtype: torch.dtype, upcast: bool, expected: torch.dtype) -> None:
        edit_json(copy / "vae" / "config.json", force_upcast=upcast)
        model = load(copy, dtype=dtype)
        assert {next(network.parameters()).dtype for network in networks(model).values()} == {dtype}
        assert model.vae_dtype == expected

    def test_half_precision_file(self, tiny: Tiny, tmp_path: Path) -> None:
        model = load(tiny.save(tmp_path / "half", torch.float16))
        assert torch.equal(model.unet.conv_in.weight, tiny.unet.conv_in.weight.half().float())

    def test_hashes(self, folder: Path) -> None:
        hashes = load(folder).hashes
        assert {*hashes} == {str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")}
        assert all(sha256(folder / name) == value for name, value in hashes.items())

    def test_no_part_files_are_left_and_files_are_replaced(self, tiny: Tiny, copy: Path) -> None:
        before = load(copy)
        tiny.save(copy)
        assert_bit_equal(before, tiny)
        assert not list(copy.rglob("*.part"))

    def test_weight_that_overflows_is_not_saved(self, tiny: Tiny, tmp_path: Path) -> None:
        unet = UNet(UNET)
        nn.init.constant_(unet.conv_in.weight, 1e6)
        with pytest.raises(ValueError, match=r"unet: conv_in.weight is not finite in torch.float16"):
            replace(tiny, unet=unet).save(tmp_path / "overflow", torch.float16)
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_added_token_is_not_saved(self, tmp_path: Path, tiny: Tiny) -> None:
        tokenizer = tiny_tokenizer("!")
        tokenizer.add_tokens("<new>")
        with pytest.raises(ValueError, match="<new>"):
            replace(tiny, text=replace(tiny.text, tokenizer=tokenizer)).save(tmp_path)

    @pytest.mark.parametrize("variant", [None, "fp16"])
    @pytest.mark.parametrize("shard", ["10GB", "200KB"])
    def test_what_diffusers_writes(self, folder: Path, tmp_path: Path, variant: str | None, shard: str) -> None:
        written = Path(shutil.copytree(folder, tmp_path / "written"))
        for path in written.rglob("*.safetensors"):
            path.unlink()
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        unet.save_pretrained(written / "unet", variant=variant, max_shard_size=shard)
        vae.save_pretrained(written / "vae", variant=variant, max_shard_size=shard)
        model = load(folder)
        for name, encoder in zip(("text_encoder", "text_encoder_2"), model.text.encoders, strict=True):
            encoder.save_pretrained(written / name, variant=variant, max_shard_size=shard)
        assert len(list(written.rglob("*.safetensors"))) >= (4 if shard == "10GB" else 12)
        read = load(written)
        assert_bit_equal(read, model)
        assert (read.unet.config, read.vae.config) == (UNET, VAE_TINY)

    @pytest.mark.parametrize(
        "index",
        ["diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.fp16.json"],
    )
    def test_both_names_of_a_variants_index(self, tiny: Tiny, copy: Path, index: str) -> None:
        (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "shard.safetensors")
        (copy / "unet" / index).write_text(
            json.dumps({"weight_map": dict.fromkeys(tiny.unet.state_dict(), "shard.safetensors")})
        )
        assert_bit_equal(load(copy), tiny)

    def test_diffusers_opens_a_half_precision_folder_in_one_dtype(self, tiny: Tiny, tmp_path: Path) -> None:
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny.save(tmp_path / "half", torch.float16))
        assert {getattr(pipeline, name).dtype for name in ("unet", "vae", *TEXT_ENCODERS[:2])} == {torch.float32}

    def test_diffusers_reads_ours(self, tiny: Tiny, folder: Path) -> None:
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
        assert_bit_equal(load(folder), tiny)
        assert pipeline.config["force_zeros_for_empty_prompt"] is False
        assert pipeline.watermark is None
        assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
        assert noise_config(pipeline.scheduler.config) == NOISE
        for name, network in networks(tiny).items():
            theirs = getattr(pipeline, name).state_dict()
            ours = network.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        for name in ("tokenizer", "tokenizer_2"):
            ours, theirs = getattr(tiny.text, name), getattr(pipeline, name)
            assert ours("a red house!").input_ids == theirs("a red house!").input_ids
            assert (ours.pad_token_id, ours.model_max_length) == (theirs.pad_token_id, theirs.model_max_length)

    def test_hub_id_in_the_local_cache(self, tiny: Tiny, folder: Path, empty_cache: Path) -> None:
        put_in_cache(empty_cache, "someone/tiny", folder)
        assert_bit_equal(load("someone/tiny"), tiny)


class TestSingleFile:
    def test_bit_equal_with_the_folder(self, single_file: Path, folder: Path) -> None:
        model = load(single_file, config=folder)
        assert_bit_equal(model, load(folder))
        assert (model.noise, model.zeros_for_empty_negative) == (NOISE, False)
        assert model.hashes == {single_file.name: sha256(single_file)}

    def test_sizes_are_inferred(self, tiny: Tiny, single_file: Path, folder: Path, empty_cache: Path) -> None:
        put_in_cache(empty_cache, "openai/clip-vit-large-patch14", folder / "tokenizer")
        model = load(single_file)
        assert_bit_equal(model, tiny)
        assert (model.unet.config, model.vae.config) == (UNET, VAE_TINY)
        assert (model.noise, model.zeros_for_empty_negative) == (NoiseConfig(), True)
        ours, theirs = model.text.encode(["a red house!"]), tiny.text.encode(["a red house!"])
        assert torch.equal(ours.context, theirs.context)
        assert torch.equal(ours.pooled, theirs.pooled)

    def test_sdxl_base_is_inferred(self, folder: Path, empty_cache: Path) -> None:
        put_in_cache(empty_cache, "openai/clip-vit-large-patch14", folder / "tokenizer")
        first = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        second = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        first["hidden_act"], second["hidden_act"], second["projection_dim"] = "quick_gelu", "gelu", 1280
        with torch.device("meta"):
            unet, vae = UNet(SDXL_UNET), VAE(SDXL_VAE)
            encoder = CLIPTextModel(CLIPTextConfig(**first))
            encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**second))
            model = Tiny(unet, vae, replace(tiny_text(), text_encoder=encoder, text_encoder_2=encoder_2))
            original = model.original()
        blueprint = infer_blueprint(split(original, SDXL), SDXL, NoiseConfig())
        assert (blueprint.unet, blueprint.vae) == (SDXL_UNET, SDXL_VAE)
        for config, expected in ((blueprint.text_encoder, first), (blueprint.text_encoder_2, second)):
            assert config is not None
            assert {name: getattr(config, name) for name in expected} == expected
            assert (config.vocab_size, config.max_position_embeddings) == (49408, 77)

    def test_diffusers_reads_the_same_file(self, tiny: Tiny, single_file: Path, folder: Path) -> None:
        pipeline = StableDiffusionXLPipeline.from_single_file(str(single_file), config=str(folder))
        for name, network in networks(tiny).items():
            ours, theirs = network.state_dict(), getattr(pipeline, name).state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), name

    def test_no_tokenizer(self, single_file: Path, empty_cache: Path) -> None:
        with pytest.raises(ValueError, match="pass --config FOLDER"):
            load(single_file)

    def test_harmless_extras(self, tiny: Tiny, folder: Path, tmp_path: Path) -> None:
        extras = {
            "denoiser.sigmas": torch.ones(1000),
            "model_ema.decay": torch.ones(()),
            "model_ema.diffusion_modelconv_in": torch.ones(3),
            f"{SDXL.prefixes['text_encoder']}text_model.embeddings.position_ids": torch.arange(LENGTH)[None],
            f"{SDXL.prefixes['text_encoder_2']}logit_scale": torch.ones(()),
        }
        save_file({**tiny.original(), **extras}, tmp_path / "extras.safetensors")
        assert_bit_equal(load(tmp_path / "extras.safetensors", config=folder), tiny)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("model.diffusion_model.extra", r"unet: the weights do not fit .* 1 unexpected: extra$"),
            (
                "conditioner.embedders.1.model.transformer.resblocks.0.gate.weight",
                r"unexpected: .*transformer.resblocks.0.gate",
            ),
            ("lora_unet.down", r"1 keys belong to no network of SDXL: lora_unet.down"),
        ],
    )
    def test_unknown_keys(self, tiny: Tiny, folder: Path, tmp_path: Path, key: str, message: str) -> None:
        path = tmp_path / "model.safetensors"
        save_file({**tiny.original(), key: torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=message):
            load(path, config=folder)

    def test_config_with_a_folder(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="is for single files"):
            load(folder, config=folder)


class TestKeys:
    """The maps on SDXL-base itself and on other shapes, against diffusers' converters, on the meta device."""

    @pytest.mark.parametrize(
        "config", [SDXL_UNET, UNET, replace(UNET, transformer_layers=(1, 0, 2), layers_per_block=3)]
    )
    def test_unet(self, config: UNetConfig) -> None:
        with torch.device("meta"):
            unet = UNet(config)
        keys, state = unet_keys(unet), unet.state_dict()
        assert {*keys.values()} == {*state}
        assert len(keys) == len(state)
        original = {SDXL.prefixes["unet"] + name: state[key] for name, key in keys.items()}
        converted = convert_ldm_unet_checkpoint(original, unet_to_diffusers(config))
        assert converted.keys() == state.keys()
        assert all(converted[key] is state[key] for key in state)

    @pytest.mark.parametrize("config", [SDXL_VAE, VAE_TINY])
    def test_vae(self, config: VAEConfig) -> None:
        with torch.device("meta"):
            vae = VAE(config)
        keys, state = vae_keys(vae), vae.state_dict()
        assert {*keys.values()} == {*state}
        assert len(keys) == len(state)
        numbered = {key: torch.tensor(float(i)).expand(tensor.shape) for i, (key, tensor) in enumerate(state.items())}
        original = {SDXL.prefixes["vae"] + name: as_convolution(name, numbered[key]) for name, key in keys.items()}
        converted = convert_ldm_vae_checkpoint(original, vae_to_diffusers(config, sample_size=64))
        assert converted.keys() == state.keys()
        for i, (key, tensor) in enumerate(state.items()):
            assert converted[key].shape == tensor.shape
            assert converted[key].flatten()[0] == i

    def test_sdxl_base_names(self) -> None:
        with torch.device("meta"):
            unet, vae = unet_keys(UNet(SDXL_UNET)), vae_keys(VAE(SDXL_VAE))
        assert len(unet) == 1680
        assert len(vae) == 248
        assert unet["input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"] == (
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight"
        )
        assert unet["output_blocks.5.2.conv.bias"] == "up_blocks.1.upsamplers.0.conv.bias"
        assert vae["decoder.up.0.block.0.nin_shortcut.weight"] == "decoder.up_blocks.3.resnets.0.conv_shortcut.weight"

    def test_open_clip(self, tiny: Tiny) -> None:
        state = clip.with_prefix(tiny.text.encoders[1].state_dict())
        original = to_open_clip(state)
        ours = clip.from_open_clip(original)
        assert ours.keys() == state.keys()
        assert all(torch.equal(ours[key], state[key]) for key in state)
        prefix = SDXL.prefixes["text_encoder_2"]
        prefixed = {prefix + key: tensor for key, tensor in original.items()}
        theirs = convert_open_clip_checkpoint(tiny.text.text_encoder_2, prefixed, prefix=prefix)
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
        fused = original["transformer.resblocks.0.attn.in_proj_weight"]
        query = ours["text_model.encoder.layers.0.self_attn.q_proj.weight"]
        assert query.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


class TestStrictness:
    def test_long_lists_are_counted(self) -> None:
        with torch.device("meta"):
            unet = UNet(UNET)
        total = len(unet.state_dict())
        with pytest.raises(ValueError, match=rf"{total} missing: .* and {total - LISTED} more") as raised:
            assign(unet, {}, name="unet", device=CPU, dtype=torch.float32)
        assert str(raised.value).partition("Keys ")[2].count(",") == LISTED - 1

    def test_harmless_extras(self, tiny: Tiny, copy: Path) -> None:
        def edit(tensors: dict[str, Tensor]) -> None:
            tensors["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
            tensors["logit_scale"] = torch.ones(())

        for name in ("text_encoder", "text_encoder_2"):
            edit_tensors(copy / name / "model.safetensors", edit)
        assert_bit_equal(load(copy), tiny)

    @pytest.mark.parametrize("prefix", ["text_model.", ""])
    def test_both_names_of_text_weights(self, tiny: Tiny, copy: Path, prefix: str) -> None:
        path = copy / "text_encoder" / "model.safetensors"
        save_file({prefix + k.removeprefix("text_model."): t.clone() for k, t in load_file(path).items()}, path)
        assert_bit_equal(load(copy), tiny)


class TestWrongParts:
    def test_other_pipeline(self, copy: Path) -> None:
        edit_json(copy / "model_index.json", _class_name="KolorsPipeline")
        with pytest.raises(ValueError, match="is a KolorsPipeline"):
            load(copy)

    @pytest.mark.parametrize(
        ("path", "field", "value", "message"),
        [
            ("unet/config.json", "in_channels", 6, "U-Net's input and of the VAE's latents differ, 6 and 4"),
            ("unet/config.json", "in_channels", 7, "7 input channels, so this is an upscaler: pass the text-to-image"),
            ("unet/config.json", "in_channels", 9, "1 of another shape: conv_in.weight"),
            (
                "scheduler/scheduler_config.json",
                "_class_name",
                "FlowMatchEulerDiscreteScheduler",
                "a U-Net and a scheduler with flow matching do not fit: take both from one model",
            ),
            ("unet/config.json", "cross_attention_dim", 64, "context width .* 64 and 192"),
            ("text_encoder_2/config.json", "projection_dim", 32, "pooled width .* 64 and 32"),
            (
                "text_encoder/config.json",
                "hidden_size",
                "wide",
                "text_encoder/config.json: .*'hidden_size' expected int",
            ),
            ("text_encoder/config.json", "hidden_act", "tanhh", "text_encoder/config.json: hidden_act='tanhh' is not"),
            ("text_encoder/config.json", "vocab_size", 9, "eos_token_id=57 must be one of .* ids, 0 … 8"),
            ("tokenizer/tokenizer_config.json", "model_max_length", 9, "different lengths, 9 and 16"),
            ("unet/config.json", "act_fn", "gelu", "unet/config.json: act_fn='gelu' is not supported"),
            ("unet/config.json", "layers_per_block", 10**7, "layers_per_block=10000000 is not supported"),
            ("unet/config.json", "layers_per_block", 1000, "of unet asks for more than "),
            ("unet/config.json", "transformer_layers_per_block", 1000, "of unet asks for more than "),
            ("vae/config.json", "layers_per_block", 1000, "the configuration of vae asks for more than "),
            ("text_encoder/config.json", "num_hidden_layers", 1000, "of text_encoder asks for more than "),
            ("text_encoder_2/config.json", "num_hidden_layers", 999, "of text_encoder_2 asks for more than "),
            ("unet/config.json", "norm_num_groups", 0, "unet/config.json: norm_num_groups=0 is not supported"),
            ("unet/config.json", "attention_head_dim", 0, "unet/config.json: attention_head_dim=0 is not supported"),
            ("unet/config.json", "block_out_channels", [32] * 17, "block_out_channels=.* a list of 1 to 16"),
            ("vae/config.json", "scaling_factor", None, "vae/config.json: scaling_factor=None is not supported"),
            ("text_encoder/config.json", "num_hidden_layers", 10**7, "num_hidden_layers=10000000 must lie in 1"),
            ("scheduler/scheduler_config.json", "beta_start", "0.1", "beta_start='0.1' must lie between 0 and 1"),
            ("scheduler/scheduler_config.json", "beta_end", 2.0, "beta_end=2.0 must lie between 0 and 1"),
            ("scheduler/scheduler_config.json", "beta_end", 0.999, "beta_end=0.999 over 1000 timesteps give sigmas"),
            ("scheduler/scheduler_config.json", "beta_start", 1e-300, "beta_start=1e-300 .* give sigmas from 0 to"),
            ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9, "must be a whole number from 1"),
            ("text_encoder/config.json", "num_attention_heads", 0, "num_attention_heads=0 must be at least 1"),
            ("text_encoder/config.json", "num_attention_heads", -2, "num_attention_heads=-2 must lie in 1 … 10000"),
            (
                "text_encoder/config.json",
                "num_attention_heads",
                5,
                r"transformers cannot read it \(.*: download it again",
            ),
            ("text_encoder/config.json", "eos_token_id", [1, 2], r"eos_token_id=\[1, 2\] must be one of"),
            ("scheduler/scheduler_config.json", "steps_offset", 5000, "steps_offset=5000 must be below the 1000"),
            ("scheduler/scheduler_config.json", "use_karras_sigmas", "false", "'false' is not supported, only true or"),
            ("unet/config.json", "use_linear_projection", "false", "unet/config.json: .*, only true or false"),
            ("vae/config.json", "force_upcast", "no", "vae/config.json: .*, only true or false"),
            ("vae/config.json", "scaling_factor", 1e300, "vae/config.json: scaling_factor=.* a number from 1e-06 to"),
            ("model_index.json", "force_zeros_for_empty_prompt", "no", "model_index.json: .*, only true or false"),
            ("tokenizer/tokenizer_config.json", "model_max_length", "x", "model_max_length='x' is no number of tokens"),
            ("tokenizer/tokenizer_config.json", "model_max_length", 3.5, "model_max_length=3.5 is no number of tokens"),
            ("tokenizer/vocab.json", "red</w>", "3", "vocab.json gives 'red</w>' the id '3': download it again"),
            ("tokenizer/vocab.json", "red</w>", 1.5, "vocab.json gives 'red</w>' the id 1.5"),
            ("tokenizer/vocab.json", "red</w>", -1, "vocab.json gives 'red</w>' the id -1"),
            ("tokenizer/vocab.json", "red</w>", 3, "vocab.json gives 58 tokens 57 different ids"),
            ("tokenizer/vocab.json", "red</w>", 10**6, "has ids to 1000000, its encoder only 58 tokens: take both"),
            ("tokenizer/tokenizer_config.json", "model_max_length", 2, "leave 2 tokens, too few for a prompt"),
        ],
    )
    def test_parts_that_do_not_fit(self, copy: Path, path: str, field: str, value: object, message: str) -> None:
        edit_json(copy / path, **{field: value})
        with pytest.raises(ValueError, match=message):
            load(copy)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("dtype", "int99"),
            ("_attn_implementation", "flash_attention_2"),
            ("use_return_dict", False),
            ("return_dict", False),
            ("rope_scaling", {"type": "yarn"}),
            ("id2label", 3),
            ("pad_token_id", 10**7),
        ],
    )
    def test_what_no_encoder_is_computed_from(
        self, tiny: Tiny, copy: Path, field: str, value: object, capfd: pytest.CaptureFixture[str]
    ) -> None:
        edit_json(copy / "text_encoder/config.json", **{field: value})
        assert_bit_equal(load(copy), tiny)
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("tokenizer.json", "{}", "tokenizer.json has no vocabulary and merges, so it is not CLIP's"),
            ("merges.txt", "#v\nfoo\nbar baz qux\n", "merges.txt: '#v' is no pair of words to merge: download it"),
            ("special_tokens_map.json", '{"bos_token": 3}', "special_tokens_map.json has 3 where a token"),
            (
                "vocab.json",
                '{"a": 0}',
                r"vocab.json has no <\|startoftext\|> and no <\|endoftext\|>, so it is not CLIP's",
            ),
        ],
    )
    def test_broken_tokenizer(
        self, copy: Path, file: str, content: str, message: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (copy / "tokenizer" / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            load(copy)
        assert capfd.readouterr().err == ""

    def test_tokenizer_without_a_length_takes_the_encoders(self, copy: Path) -> None:
        for name in ("tokenizer", "tokenizer_2"):
            edit_json(copy / name / "tokenizer_config.json", model_max_length=10**30)
        assert load(copy).text.tokenizer.model_max_length == LENGTH


class TestPaths:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere does not exist: pass a diffusers folder"):
            load(tmp_path / "nowhere")

    def test_no_such_hub_id(self, empty_cache: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no model in the local Hugging Face cache"):
            load("someone/nothing")

    def test_integer_dtype(self) -> None:
        with pytest.raises(ValueError, match=r"dtype=torch.int8 must be torch.float32, torch.bfloat16, torch.float16"):
            load(dtype=torch.int8)

    @pytest.mark.parametrize("root", ["package", "."])
    def test_embedded(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
        monkeypatch.setattr("cutdiff.checkpoint.locate.PACKAGE", tmp_path / "package")
        monkeypatch.chdir(tmp_path.parent)
        with pytest.raises(FileNotFoundError, match="the embedded model is missing"):
            load()
        tiny.save(tmp_path / root / "weights" / "scenes")
        assert_bit_equal(load(), tiny)
        assert_bit_equal(load("weights/scenes"), tiny)


class TestConfigs:
    @pytest.mark.parametrize(
        "config",
        [
            SDXL_UNET,
            UNET,
            UNetConfig(channels=(8, 16), transformer_layers=(3, 0), num_heads=(2, 4), norm_groups=8, native_size=16),
        ],
    )
    def test_unet_round_trip(self, config: UNetConfig) -> None:
        assert unet_config(json.loads(json.dumps(unet_to_diffusers(config)))) == config

    def test_unet_agrees_with_diffusers(self) -> None:
        for config in (SDXL_UNET, UNET, replace(UNET, transformer_layers=(2, 1, 0), num_heads=(2, 4, 8))):
            with torch.device("meta"):
                ours, theirs = UNet(config), UNet2DConditionModel(**public(unet_to_diffusers(config)))
            assert shapes(ours) == shapes(theirs)
            assert unet_config(theirs.config) == config

    def test_vae_agrees_with_diffusers(self) -> None:
        for config in (SDXL_VAE, VAE_TINY):
            with torch.device("meta"):
                theirs = AutoencoderKL(**public(vae_to_diffusers(config, sample_size=64)))
                ours = VAE(config)
            assert shapes(ours) == shapes(theirs)
            assert vae_config(theirs.config) == config

    def test_missing_fields_take_diffusers_defaults(self) -> None:
        given: dict[str, Any] = {"use_linear_projection": True, "addition_embed_type": "text_time"}
        given |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 112, "sample_size": 32}
        with torch.device("meta"):
            theirs = UNet2DConditionModel(**given)
        assert unet_config(given) == unet_config(theirs.config)
        with torch.device("meta"):
            assert vae_config({}) == vae_config(AutoencoderKL().config)

    @pytest.mark.parametrize("name", DEPTHS)
    @torch.no_grad()
    def test_unets_of_other_depths_agree_with_diffusers(self, name: str) -> None:
        fields = {**public(unet_to_diffusers(UNET)), **DEPTHS[name]}
        config = unet_config(fields)
        assert unet_config(json.loads(json.dumps(unet_to_diffusers(config)))) == config
        torch.manual_seed(0)
        theirs = UNet2DConditionModel(**fields).eval()
        ours = UNet(config).eval()
        ours.load_state_dict(theirs.state_dict())
        x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 192)
        pooled, sizes = torch.randn(2, 64), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        conditions = {"text_embeds": pooled, "time_ids": sizes}
        expected = theirs(x, torch.tensor([5, 900]), context, added_cond_kwargs=conditions).sample
        torch.testing.assert_close(ours(x, torch.tensor([5, 900]), context, pooled, sizes), expected)
        original = {theirs: ours.state_dict()[key] for theirs, key in unet_keys(ours).items()}
        read = infer_unet(original, 64, replace(SDXL, num_heads=1), "epsilon")
        assert read == replace(config, native_size=read.native_size, num_heads=(1, 1, 1))

    @pytest.mark.parametrize(
        "value", [[[1], [1, 2], [2]], [1, [], 2], [1, [0], 2], [1, ["1"], 2], [1, [[1]], 2], [1, 1]]
    )
    def test_depths_within_a_level_that_do_not_fit(self, value: list[Any]) -> None:
        with pytest.raises(ValueError, match=rf"^{DOWN}=.* is not supported"):
            unet_config(unet_to_diffusers(UNET) | {DOWN: value, UP: [1, 1, 1]})

    @pytest.mark.parametrize(
        ("name", "millions"), [("SSD-1B", 1331), ("Segmind-Vega", 745), ("KOALA-700M", 782), ("KOALA-1B", 1161)]
    )
    def test_a_large_unet_of_other_depths_has_the_weights_of_diffusers(self, name: str, millions: int) -> None:
        fields = {**public(unet_to_diffusers(replace(SDXL_UNET, layers_per_block=1))), **DEPTHS[name]}
        with torch.device("meta"):
            theirs, ours = UNet2DConditionModel(**fields), UNet(unet_config(fields))
        assert shapes(ours) == shapes(theirs)
        assert sum(shape.numel() for shape in shapes(ours).values()) // 10**6 == millions

    def test_a_configuration_without_weights_is_bounded(self, copy: Path) -> None:
        edit_json(copy / "unet/config.json", layers_per_block=1000)
        with pytest.raises(ValueError, match="unet asks for more than 5000 tensors, which no model of these"):
            load_outline(copy, dtype=torch.float32)

    def test_unet_with_two_depths_cannot_be_saved(self) -> None:
        with pytest.raises(ValueError, match="mid_transformer_layers=5 must equal"):
            unet_to_diffusers(replace(UNET, mid_transformer_layers=5))

    @pytest.mark.parametrize(
        ("down", "up", "message"),
        [
            ((0, (1,), 2), None, "needs up_transformer_layers"),
            ((0, (1, 1), 2), ((0, 0), (1, 1), (2, 2)), "must have one number for level 1, or 1,"),
            ((0, 1, 2), ((0, 0), (1, 0), (2, 2)), "must have 2 numbers for level 1"),
        ],
    )
    def test_depths_that_are_no_unets(self, down: Any, up: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(UNET, transformer_layers=down, up_transformer_layers=up)

    def test_num_attention_heads_overrides(self) -> None:
        fields = unet_to_diffusers(UNET) | {"num_attention_heads": [2, 4, 8]}
        assert unet_config(fields).num_heads == (2, 4, 8)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *((field, another(value)) for field, value in UNET_FIXED.items()),
            ("up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"]),
            ("down_block_types", ["DownBlock2D", "SimpleCrossAttnDownBlock2D", "CrossAttnDownBlock2D"]),
            ("sample_size", None),
            ("sample_size", [64, 128]),
            ("layers_per_block", [1, 2, 1]),
            ("cross_attention_dim", [1, 2, 1]),
            ("only_cross_attention", [True, False, False]),
            ("attention_head_dim", [1, 2]),
            *((DOWN, value) for value in (None, True, "1", [1, 2], [1, [1], 3], [1, 0, 3], [1, 2, []], [1, 2, "3"])),
            *((UP, value) for value in (2, [1, 2], [1, [1, 2, 3], 1], [1, 0, 1])),
            ("time_cond_proj_dim", 7),
            ("time_cond_proj_dim", 2),
            ("time_cond_proj_dim", "many"),
            ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
            ("norm_num_groups", None),
            ("block_out_channels", 32),
            ("a_field_of_the_future", "yes"),
        ],
    )
    def test_unsupported_unet_field(self, field: str, value: object) -> None:
        with pytest.raises(ValueError, match=rf"^{field}=.* is not supported"):
            unet_config(unet_to_diffusers(UNET) | {field: value})

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("act_fn", "gelu"),
            ("shift_factor", "0.1"),
            ("shift_factor", 1e9),
            ("latents_mean", [0.0, 0.1, 0.2, "0.3"]),
            ("latents_std", [1.0, 1.0, 1.0, None]),
            ("use_quant_conv", "no"),
            ("use_post_quant_conv", False),
            ("mid_block_add_attention", False),
            ("down_block_types", ["DownEncoderBlock2D"]),
            ("up_block_types", ["AttnUpDecoderBlock2D"] * 3),
            ("layers_per_block", None),
        ],
    )
    def test_unsupported_vae_field(self, field: str, value: object) -> None:
        assert field not in VAE_FIXED or VAE_FIXED[field] != value
        with pytest.raises(ValueError, match=rf"^{field}=.* is not supported"):
            vae_config(vae_to_diffusers(VAE_TINY, sample_size=64) | {field: value})

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("_class_name", "FlowMatchLCMScheduler"),
            ("trained_betas", [0.1, 0.2]),
            ("thresholding", True),
            ("use_lu_lambdas", True),
            ("final_sigmas_type", "sigma_min"),
            ("interpolation_type", "log_linear"),
            ("timestep_type", "continuous"),
            ("sigma_min", 0.1),
        ],
    )
    def test_unsupported_scheduler_field(self, field: str, value: object) -> None:
        with pytest.raises(ValueError, match=rf"^{field}=.* is not supported"):
            noise_config(noise_to_diffusers(NOISE) | {field: value})

    @pytest.mark.parametrize("names", [SPREAD_BY[:2], SPREAD_BY[1:], SPREAD_BY])
    def test_sigmas_are_spread_by_one_rule(self, names: tuple[str, ...]) -> None:
        fields = noise_to_diffusers(NoiseConfig()) | dict.fromkeys(names, True)
        with pytest.raises(ValueError, match=f"^{' and '.join(names)} are True, and sigmas are spread by one rule"):
            noise_config(fields)

    def test_sample_prediction(self) -> None:
        with pytest.raises(ValueError, match="prediction_type='sample'"):
            noise_config(noise_to_diffusers(NOISE) | {"prediction_type": "sample"})

    def test_clipping_matters_to_ddim_only(self) -> None:
        fields = noise_to_diffusers(NOISE) | {"clip_sample": True}
        assert noise_config(fields) == NOISE
        with pytest.raises(ValueError, match=r"^clip_sample=True is not supported"):
            noise_config(fields | {"_class_name": "DDIMScheduler"})
        with pytest.raises(ValueError, match=r"^clip_sample=True is not supported"):
            noise_config({"_class_name": "DDIMScheduler"})

    def test_noise_round_trip(self) -> None:
        spread = [NoiseConfig(**{name: True}, beta_schedule="linear") for name in SPREAD_BY]
        for noise in (NoiseConfig(), NOISE, *spread):
            assert noise_config(json.loads(json.dumps(noise_to_diffusers(noise)))) == noise

    @pytest.mark.parametrize("name", [*SCHEDULERS])
    def test_defaults_are_those_of_the_scheduler(self, name: str) -> None:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        for field, value in (NOISE_DEFAULTS | SCHEDULERS[name]).items():
            if field in parameters:
                assert parameters[field].default == value, field


def public(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration as arguments of the class that it is for."""
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}
