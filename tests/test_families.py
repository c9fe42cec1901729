"""SDXL, SD 1.5 and SD 2.1: told apart by keys, built from shapes, and computing what diffusers computes."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tiny import Tiny, assert_bit_equal, edit_json, random_model
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import cutdiff
from cutdiff.checkpoint.build import empty_networks, is_harmless
from cutdiff.checkpoint.families import SD15, SD21, SDXL, Family, family_of
from cutdiff.checkpoint.infer import infer_blueprint
from cutdiff.checkpoint.noise import NoiseOptions, decide_noise
from cutdiff.checkpoint.single import convert, split
from cutdiff.methods import METHODS
from cutdiff.models.config import SD15_UNET, SD21_UNET, SD_VAE, SDXL_UNET, SDXL_VAE
from cutdiff.sampling.noise import NoiseConfig

KEYS = Path(__file__).parent / "fixtures" / "checkpoint_keys.json.gz"
"""Keys and shapes of the single files of SDXL-base 1.0, SD 1.5 and SD 2.1."""
PROMPT = "a red house"


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, list[int]]]:
    return json.loads(gzip.decompress(KEYS.read_bytes()))


@pytest.fixture(scope="module", params=[SD15, SD21], ids=lambda family: family.name)
def other(request: pytest.FixtureRequest) -> Tiny:
    """A model with one text encoder."""
    return random_model(request.param)


def as_saved(model: Tiny) -> Tiny:
    """The model in diffusers' layout: without the text encoder's last layer where that one is not read."""
    encoder = model.text.text_encoder
    if model.text.layer == 1:
        return model
    config = type(encoder.config)(**{**encoder.config.to_dict(), "num_hidden_layers": 2})
    shorter = CLIPTextModel(config)
    shorter.load_state_dict({key: value for key, value in encoder.state_dict().items() if ".layers.2." not in key})
    return replace(model, text=replace(model.text, text_encoder=shorter.eval().requires_grad_(False), layer=1))


class TestRealFiles:
    @pytest.mark.parametrize(
        ("family", "unet", "vae"),
        [
            (SDXL, SDXL_UNET, SDXL_VAE),
            (SD15, SD15_UNET, SD_VAE),
            (SD21, replace(SD21_UNET, native_size=64), SD_VAE),
        ],
        ids=["SDXL", "SD 1.5", "SD 2.1"],
    )
    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_every_key_has_its_place_and_every_place_a_key(
        self, listed: dict[str, dict[str, list[int]]], family: Family, unet: object, vae: object
    ) -> None:
        tensors = {key: torch.empty(shape, device="meta") for key, shape in listed[family.name].items()}
        assert family_of(tensors) is family
        parts = split(tensors, family)
        blueprint = infer_blueprint(parts, family, NoiseConfig())
        assert (blueprint.unet, blueprint.vae) == (unet, vae)
        built = empty_networks(blueprint, parts)
        for name, part in convert(parts, built).items():
            expected = shapes(built.named()[name])
            found = {key: tensor.shape for key, tensor in part.items() if key in expected or not is_harmless(key)}
            assert found == expected, name
            assert len(found) == len(part) or name.startswith("text"), "two keys of the file have one place"

    def test_native_size_of_sd21_follows_the_prediction(self) -> None:
        assert SD21.native_sizes == {"epsilon": 64, "v_prediction": 96}


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}


class TestLayouts:
    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_single_file(self, other: Tiny, tmp_path: Path) -> None:
        save_file(other.original(), tmp_path / "model.safetensors")
        model = cutdiff.load(tmp_path / "model.safetensors")
        assert_bit_equal(model, other)
        native = other.family.native_sizes["epsilon"]
        assert (model.unet.config, model.vae.config) == (
            replace(other.unet.config, native_size=native),
            other.vae.config,
        )
        assert model.text.layer == other.family.text_layer
        assert not model.zeros_for_empty_negative
        assert model.decided_by["prediction_type"].startswith("default")
        assert ("has both kinds" in model.decided_by["prediction_type"]) == (other.family is SD21)
        ours, theirs = model.text.encode([PROMPT]), other.text.encode([PROMPT])
        assert torch.equal(ours.context, theirs.context)
        assert ours.pooled.shape == (1, 0)

    def test_folder(self, other: Tiny, tmp_path: Path) -> None:
        saved = as_saved(other)
        model = cutdiff.load(saved.save(tmp_path))
        assert_bit_equal(model, saved)
        assert model.unet.config == other.unet.config
        torch.testing.assert_close(model.text.encode([PROMPT]).context, other.text.encode([PROMPT]).context)

    def test_a_layer_that_no_pipeline_reads_is_not_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"text\.layer=2 cannot be saved"):
            random_model(SD21).save(tmp_path)
        assert [*tmp_path.iterdir()] == []

    def test_old_names_of_the_text_encoder(self, folder: Path, tmp_path: Path) -> None:
        """Early files of SD 1 lack `text_model.` and have tables of the noise schedule."""
        model = random_model(SD15)
        named = {key.replace("text_model.", ""): tensor for key, tensor in model.original().items()}
        save_file(
            {**named, "betas": torch.zeros(1000), "sqrt_alphas_cumprod": torch.zeros(9)}, tmp_path / "old.safetensors"
        )
        saved = as_saved(model).save(tmp_path / "folder")
        assert_bit_equal(cutdiff.load(tmp_path / "old.safetensors", config=saved), model)


class TestWhatOtherToolsWrite:
    @pytest.mark.parametrize("place", ["folder", "option"])
    def test_old_names_of_the_vae(self, other: Tiny, tmp_path: Path, place: str) -> None:
        """diffusers wrote these names before version 0.13, and folders on the hub still have them."""
        folder = as_saved(other).save(tmp_path)
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(path)
        for new, old in names.items():
            tensors = {key.replace(f".attentions.0.{new}.", f".attentions.0.{old}."): t for key, t in tensors.items()}
        assert sum("query" in key for key in tensors) == 4
        save_file(tensors, path)
        model = cutdiff.load(folder, vae=path if place == "option" else None)
        for key, tensor in other.vae.state_dict().items():
            assert torch.equal(model.vae.state_dict()[key], tensor)

    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_sd21_in_the_layout_of_sdxls_code(self, tmp_path: Path) -> None:
        """SD-Turbo is published in this layout."""
        model = random_model(SD21)
        tensors = {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in model.original().items()}
        save_file(tensors, tmp_path / "turbo.safetensors")
        assert_bit_equal(cutdiff.load(tmp_path / "turbo.safetensors"), model)
        tensors["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(1)
        save_file(tensors, tmp_path / "refiner.safetensors")
        with pytest.raises(ValueError, match="an SDXL refiner"):
            cutdiff.load(tmp_path / "refiner.safetensors")

    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_sd21_without_the_layer_that_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cutdiff.checkpoint.infer.CUT_DEPTH", 2)
        model = random_model(SD21)
        save_file(as_saved(model).original(), tmp_path / "cut.safetensors")
        found = cutdiff.load(tmp_path / "cut.safetensors").text
        assert found.layer == 1
        torch.testing.assert_close(found.encode([PROMPT]).context, model.text.encode([PROMPT]).context)

    def test_sd21_with_the_configuration_of_a_folder(self, tmp_path: Path) -> None:
        model = random_model(SD21)
        folder = as_saved(model).save(tmp_path / "folder")
        save_file(model.original(), tmp_path / "model.safetensors")
        assert_bit_equal(cutdiff.load(tmp_path / "model.safetensors", config=folder), as_saved(model))

    def test_a_configuration_of_another_family(self, other: Tiny, folder: Path, tmp_path: Path) -> None:
        save_file(other.original(), tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"an {other.family.name} model, and .* is a folder of another family"):
            cutdiff.load(tmp_path / "model.safetensors", config=folder)

    def test_early_folders_of_sd_1_are_repaired_as_diffusers_does(self, tmp_path: Path) -> None:
        folder = as_saved(random_model(SD15)).save(tmp_path)
        edit_json(folder / "unet" / "config.json", sample_size=32, _diffusers_version="0.4.1")
        old = {"steps_offset": 0, "clip_sample": True, "_class_name": "DDIMScheduler"}
        edit_json(folder / "scheduler" / "scheduler_config.json", **old)
        model = cutdiff.load(folder)
        assert (model.native_size, model.noise.steps_offset) == (64, 1)

    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_extras_without_effect(self, tiny: Tiny, tmp_path: Path) -> None:
        extras = [
            "conditioner.embedders.0.text_projection",
            "conditioner.embedders.0.transformer.text_projection.weight",
            "first_stage_model.loss.logvar",
            "model.diffusion_model.scale_factor",
            "cond_stage_model.logit_scale",
        ]
        save_file({**tiny.original(), **{key: torch.zeros(2, 2) for key in extras}}, tmp_path / "model.safetensors")
        assert_bit_equal(cutdiff.load(tmp_path / "model.safetensors"), tiny)


class TestAgainstDiffusers:
    @pytest.mark.parametrize("noise", [NoiseConfig(), NoiseConfig(prediction_type="v_prediction")])
    @torch.no_grad()
    def test_a_picture(self, other: Tiny, tmp_path: Path, noise: NoiseConfig) -> None:
        model = cutdiff.load(as_saved(other).save(tmp_path, noise=noise))
        pipeline: Any = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
        assert_bit_equal(
            model, Tiny(pipeline.unet, pipeline.vae, replace(model.text, text_encoder=pipeline.text_encoder))
        )
        side = 16
        start = cutdiff.Draws((3,)).noise((1, 4, side, side))
        told = {"negative_prompt": "a tent", "guidance_scale": 5.0, "height": side * 4, "width": side * 4}
        theirs = pipeline(PROMPT, num_inference_steps=4, latents=start, output_type="latent", **told).images
        ours = cutdiff.generate(model, PROMPT, method="direct", num_steps=4, seed=3, **told)
        scale = model.vae.config.scaling_factor
        assert scale == pipeline.vae.config.scaling_factor
        torch.testing.assert_close(ours.latents, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))

    def test_text_states(self, other: Tiny, tmp_path: Path) -> None:
        pipeline: Any = StableDiffusionPipeline.from_pretrained(as_saved(other).save(tmp_path), local_files_only=True)
        theirs, _ = pipeline.encode_prompt(PROMPT, "cpu", 1, False)
        torch.testing.assert_close(other.text.encode([PROMPT]).context, theirs)


@pytest.mark.parametrize("layout", ["OpenCLIP", "transformers"])
@pytest.mark.usefixtures("tokenizer_in_cache")
@torch.no_grad()
def test_a_square_projection_is_read_the_way_its_layout_has_it(tmp_path: Path, layout: str) -> None:
    """OpenCLIP multiplies states by its matrix from the right, transformers' linear layer by its transpose."""
    model = random_model(SDXL)
    encoder = CLIPTextModelWithProjection(
        type(model.text.text_encoder.config)(**{**model.text.encoders[1].config.to_dict(), "projection_dim": 128})
    ).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    unet = type(model.unet)(replace(model.unet.config, pooled_dim=128))
    original = replace(model, unet=unet, text=replace(model.text, text_encoder_2=encoder)).original()
    matrix, key = encoder.text_projection.weight, f"{SDXL.prefixes['text_encoder_2']}text_projection"
    assert matrix.shape == (128, 128)
    assert torch.equal(original[key], matrix.T)
    if layout == "transformers":
        original[f"{key}.weight"] = original.pop(key).T.contiguous()
    save_file(original, tmp_path / "model.safetensors")
    pooled = cutdiff.load(tmp_path / "model.safetensors").text.encode([PROMPT]).pooled
    (_, tokens), *_ = model.text.tokenize([PROMPT])
    states = encoder(tokens.ids).last_hidden_state
    end = int((tokens.ids[0] == model.text.tokenizer.eos_token_id).int().argmax())
    torch.testing.assert_close(pooled, states[:, end] @ matrix.T)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_with_every_family(other: Tiny, tmp_path: Path, method: str) -> None:
    model = cutdiff.load(as_saved(other).save(tmp_path))
    model = replace(
        model, unet=type(model.unet)(replace(model.unet.config, native_size=8)).eval().requires_grad_(False)
    )
    result = cutdiff.generate(model, PROMPT, method=method, num_steps=2, height=64, width=48, guidance_scale=2.0)
    assert result.images.shape == (1, 3, 64, 48)


class TestOtherFiles:
    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
            ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "a LoRA"),
            ("conditioner.embedders.0.model.ln_final.weight", "an SDXL refiner"),
            ("control_model.time_embed.0.weight", "a ControlNet"),
            ("image_proj.proj.weight", "an IP-Adapter"),
            ("model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight", "SD3's transformer without its first"),
            ("double_blocks.1.img_attn.qkv.weight", "no whole transformer of FLUX.1"),
            ("clip_g", "a textual inversion"),
            ("down_blocks.0.resnets.0.conv1.weight", "one network in the diffusers layout"),
            ("encoder.layers.0.self_attn.q_proj.weight", "one network in the diffusers layout"),
            ("embeddings.token_embedding.weight", "one network in the diffusers layout"),
            ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
            ("decoder.layers.1.conv.0.weight", "a tiny autoencoder"),
            ("encoder.layers.0.weight", "a tiny autoencoder"),
            ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "a motion module"),
            ("encoder.down_blocks.0.resnets.0.conv1.weight", "a VAE alone"),
            ("first_stage_model.encoder.conv_in.weight", "a VAE alone"),
            ("model.diffusion_model.input_blocks.0.0.weight", "a U-Net without its text encoders: pass --config"),
            ("diffusion_model.input_blocks.1.0.emb_layers.1.lora_up.weight", "a LoRA"),
            ("x", "no checkpoint of SDXL, SD 1.5, SD 2.1 in the original layout: its keys begin with x"),
        ],
    )
    def test_are_told_by_name(self, tmp_path: Path, key: str, message: str) -> None:
        save_file({key: torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=f"other.safetensors: {message}"):
            cutdiff.load(tmp_path / "other.safetensors")

    @pytest.mark.usefixtures("empty_cache")
    @pytest.mark.parametrize("configured", [False, True])
    @pytest.mark.parametrize(
        ("channels", "what"), [(5, "one that also reads a depth map"), (8, "one that edits pictures")]
    )
    def test_more_than_text_to_image(self, channels: int, what: str, configured: bool, tmp_path: Path) -> None:
        """The message comes before the rest of the model is looked at."""
        model = random_model(SD15)
        config = model.save(tmp_path / "folder") if configured else None
        wider = replace(model, unet=type(model.unet)(replace(model.unet.config, in_channels=channels)))
        save_file(wider.original(), tmp_path / "wider.safetensors")
        with pytest.raises(ValueError, match=f"{channels} input channels, so this is {what}.*: pass the text-to-image"):
            cutdiff.load(tmp_path / "wider.safetensors", config=config)


class TestDecision:
    """The order for the prediction type and zero terminal SNR is option, marker key, metadata, scheduler, default."""

    V = NoiseConfig(prediction_type="v_prediction")

    @pytest.mark.parametrize(
        ("option", "scheduler", "keys", "metadata", "expected"),
        [
            (None, None, [], {}, ("epsilon", "default")),
            (None, V, [], {}, ("v_prediction", "scheduler")),
            (None, V, [], {"modelspec.predict_key": "epsilon"}, ("epsilon", "metadata modelspec.predict_key")),
            (
                None,
                None,
                [],
                {"modelspec.prediction_type": "v"},
                ("v_prediction", "metadata modelspec.prediction_type"),
            ),
            (None, None, ["v_pred"], {"modelspec.prediction_type": "epsilon"}, ("v_prediction", "marker key v_pred")),
            ("epsilon", V, ["v_pred"], {"modelspec.prediction_type": "v"}, ("epsilon", "option")),
        ],
    )
    def test_prediction_type(
        self,
        option: str | None,
        scheduler: NoiseConfig | None,
        keys: list[str],
        metadata: dict[str, str],
        expected: tuple[str, str],
    ) -> None:
        noise, decided_by = decide_noise(
            NoiseOptions(option), scheduler, tensors=dict.fromkeys(keys, torch.zeros(0)), metadata=metadata
        )
        assert (noise.prediction_type, decided_by["prediction_type"]) == expected

    @pytest.mark.parametrize(
        ("option", "scheduler", "keys", "expected"),
        [
            (None, None, [], (False, "default", "leading")),
            (None, None, ["ztsnr"], (True, "marker key ztsnr", "trailing")),
            (None, NoiseConfig(rescale_betas_zero_snr=True), [], (True, "scheduler", "leading")),
            (None, NoiseConfig(), ["ztsnr"], (True, "marker key ztsnr", "trailing")),
            (True, NoiseConfig(), [], (True, "option", "trailing")),
            (False, None, ["ztsnr"], (False, "option", "leading")),
        ],
    )
    def test_zero_terminal_snr(
        self, option: bool | None, scheduler: NoiseConfig | None, keys: list[str], expected: tuple[bool, str, str]
    ) -> None:
        tensors = dict.fromkeys(keys, torch.zeros(0))
        noise, decided_by = decide_noise(NoiseOptions(None, option), scheduler, tensors=tensors)
        assert isinstance(noise, NoiseConfig)
        found = (noise.rescale_betas_zero_snr, decided_by["zero_terminal_snr"], noise.timestep_spacing)
        assert found == expected
        spaced_by = decided_by["timestep_spacing"]
        assert spaced_by == (f"zero_terminal_snr, {expected[1]}" if expected[2] == "trailing" else spaced_by)
        said, decided_by = decide_noise(NoiseOptions(None, option, "linspace"), scheduler, tensors=tensors)
        assert isinstance(said, NoiseConfig)
        assert (said.timestep_spacing, decided_by["timestep_spacing"]) == ("linspace", "option")

    def test_metadata_that_contradict_each_other(self) -> None:
        metadata = {"modelspec.prediction_type": "epsilon", "modelspec.predict_key": "v"}
        with pytest.raises(ValueError, match="predict_key='v' contradict each other: pass --prediction-type"):
            decide_noise(NoiseOptions(), None, metadata=metadata)
        assert decide_noise(NoiseOptions("epsilon"), None, metadata=metadata)[1]["prediction_type"] == "option"

    def test_timestep_spacing(self) -> None:
        noise, _ = decide_noise(NoiseOptions(timestep_spacing="trailing"), NoiseConfig())
        assert noise == NoiseConfig(timestep_spacing="trailing")

    def test_unknown_metadata(self) -> None:
        with pytest.raises(ValueError, match=r"modelspec\.prediction_type='flow' is not known"):
            decide_noise(NoiseOptions(), None, metadata={"modelspec.prediction_type": "flow"})

    def test_unknown_option(self) -> None:
        with pytest.raises(ValueError, match="prediction_type='flow' is not one of epsilon, v_prediction"):
            NoiseOptions("flow")

    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_from_a_file_to_the_record(self, tiny: Tiny, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
        save_file({**tiny.original(), **marks}, path, metadata={"modelspec.prediction_type": "epsilon"})
        model = cutdiff.load(path)
        record = cutdiff.generate(model, PROMPT, method="direct", num_steps=1, height=16, width=16).record
        assert (record["prediction_type"], record["zero_terminal_snr"]) == ("v_prediction", True)
        assert record["model"]["decided_by"]["prediction_type"] == "marker key v_pred"
