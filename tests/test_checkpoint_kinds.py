"""Checkpoints as other tools write them: names, variants, 8-bit weights, files and folders of some networks only."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from refusal import CommandLine
from safetensors.torch import load_file, save_file
from tiny import Tiny, assert_bit_equal, edit_json, edit_tensors, networks
from torch import Tensor

import cutdiff
from cutdiff.checkpoint import load
from cutdiff.checkpoint.families import UNET_PREFIX, VAE_PREFIX
from cutdiff.checkpoint.keys import VAE_ATTENTION, unet_keys
from cutdiff.checkpoint.single import with_averages
from cutdiff.checkpoint.weights import FP8

Tensors = dict[str, Tensor]
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
QUERY = "mid_block.attentions.0.transformer_blocks.1.attn1.to_q.weight"


def renamed(tensors: Tensors, pattern: str, name: str) -> Tensors:
    new = {re.sub(pattern, name, key): tensor.clone() for key, tensor in tensors.items()}
    assert new.keys() != tensors.keys()
    assert len(new) == len(tensors)
    return new


class TestNames:
    @pytest.mark.parametrize(
        ("pattern", "name"),
        [("^", "_orig_mod."), ("^", "module."), (r"(resnets|attentions)\.0\.", r"\1.0._orig_mod.")],
    )
    def test_in_a_folder(self, tiny: Tiny, copy: Path, pattern: str, name: str) -> None:
        for file in (UNET, VAE):
            save_file(renamed(load_file(copy / file), pattern, name), copy / file)
        assert_bit_equal(load(copy), tiny)

    @pytest.mark.parametrize(
        ("pattern", "name"),
        [
            (rf"^{re.escape(UNET_PREFIX)}", UNET_PREFIX * 2),
            (rf"^{re.escape(UNET_PREFIX)}", f"{UNET_PREFIX}diffusion_model."),
            (rf"^{re.escape(UNET_PREFIX)}", f"{UNET_PREFIX}_orig_mod."),
            ("^model", "model.model"),
            (rf"^{VAE_PREFIX}", VAE_PREFIX * 3),
            (r"text_model\.", "text_model.text_model."),
            ("^conditioner", "conditioner.conditioner"),
        ],
    )
    def test_in_a_single_file(self, tiny: Tiny, folder: Path, tmp_path: Path, pattern: str, name: str) -> None:
        save_file(renamed(tiny.original(), pattern, name), tmp_path / "model.safetensors")
        assert_bit_equal(load(tmp_path / "model.safetensors", config=folder), tiny)

    def test_one_weight_under_two(self, copy: Path) -> None:
        edit_tensors(copy / UNET, lambda tensors: tensors.update({"_orig_mod.conv_in.bias": torch.zeros(32)}))
        expected = "conv_in.bias and _orig_mod.conv_in.bias are two names of one weight: remove one of them"
        with pytest.raises(ValueError, match=rf"{UNET}: (_orig_mod\.)?{expected.split(' ')[0]}|{expected}"):
            load(copy)

    @pytest.mark.parametrize("layout", ["matrices", "kernels"])
    @pytest.mark.parametrize("place", ["model", "vae", "vae alone"])
    def test_of_attention_in_a_vae(self, tiny: Tiny, folder: Path, tmp_path: Path, layout: str, place: str) -> None:
        """Some converters leave the names of diffusers in the original layout."""
        tensors, path = tiny.original(), tmp_path / "model.safetensors"
        if place == "vae alone":
            tensors = {k.removeprefix(VAE_PREFIX): v for k, v in tensors.items() if k.startswith(VAE_PREFIX)}
        for ours, theirs in VAE_ATTENTION.items():
            if ours != "group_norm":
                tensors = renamed(tensors, rf"(mid\.attn_1)\.{theirs}\.", rf"\1.{ours}.")
        if layout == "matrices":
            tensors = {
                k: v.flatten(1).clone() if v.shape[2:] == (1, 1) and ".attn_1." in k else v for k, v in tensors.items()
            }
        save_file(tensors, path)
        assert_bit_equal(load(path, config=folder) if place == "model" else load(folder, vae=path), tiny)


class TestEightBits:
    @pytest.mark.parametrize("dtype", FP8)
    def test_without_scales(self, tiny: Tiny, copy: Path, dtype: torch.dtype) -> None:
        def convert(tensors: Tensors) -> None:
            for key, tensor in tensors.items():
                tensors[key] = tensor.to(dtype) if tensor.ndim > 1 else tensor

        edit_tensors(copy / UNET, convert)
        model = load(copy)
        for key, weight in tiny.unet.state_dict().items():
            expected = weight.to(dtype).float() if weight.ndim > 1 else weight
            assert torch.equal(model.unet.state_dict()[key], expected)
        if dtype is torch.float8_e4m3fn:
            theirs = UNet2DConditionModel.from_pretrained(copy / "unet", torch_dtype=torch.float32)
            assert all(torch.equal(weight, model.unet.state_dict()[key]) for key, weight in theirs.state_dict().items())

    @pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
    @pytest.mark.parametrize("rows", [False, True])
    @pytest.mark.parametrize("place", ["folder", "single file"])
    def test_with_scales(
        self, tiny: Tiny, copy: Path, tmp_path: Path, names: tuple[str, str], rows: bool, place: str
    ) -> None:
        path = copy / UNET if place == "folder" else tmp_path / "model.safetensors"
        weights = tiny.unet.state_dict()
        originals = {ours: UNET_PREFIX + theirs for theirs, ours in unet_keys(tiny.unet).items()}
        tensors = dict(weights) if place == "folder" else tiny.original()
        expected = {}
        for key in (QUERY, "conv_in.weight", "time_embedding.linear_1.weight"):
            scale = weights[key].flatten(1).abs().amax(1, keepdim=True) / 448 if rows else torch.tensor(0.03)
            spread = scale.reshape(-1, *(1 for _ in weights[key].shape[1:]))
            stored = (weights[key] / spread).to(torch.float8_e4m3fn)
            expected[key] = stored.float() * spread
            name = key if place == "folder" else originals[key]
            module = name.removesuffix(".weight")
            described = torch.tensor([*b'{"format": "float8_e4m3fn"}'], dtype=torch.uint8)
            tensors |= {name: stored, f"{module}.{names[0]}": scale, f"{module}.{names[1]}": torch.tensor(3.0)}
            tensors[f"{module}.comfy_quant"] = described
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        save_file(tensors, path)
        for dtype in (torch.float32, torch.bfloat16):
            own = load(copy, dtype=dtype) if place == "folder" else load(path, config=copy, dtype=dtype)
            for key, weight in weights.items():
                assert torch.equal(own.unet.state_dict()[key], expected.get(key, weight).to(dtype)), key

    @pytest.mark.parametrize(
        ("key", "tensor", "message"),
        [
            ("conv_in.weight_scale", torch.ones(1), r"conv_in\.weight is torch.float32 beside its scale"),
            ("odd.scale_weight", torch.ones(1), r"odd\.weight is missing beside its scale"),
            ("conv_in.SCB", torch.ones(1), r"in a format that is not read \(by conv_in\.SCB\): take its fp16 file"),
            ("conv_in.comfy_quant", torch.tensor([*b'{"format": "nvfp4"}']).byte(), r"comfy_quant is 'nvfp4'"),
            ("conv_in.comfy_quant", torch.ones(3), r"comfy_quant is None"),
            (
                "time_embedding.linear_2.scale_weight",
                torch.ones(7),
                r"the scale of .* has the shape \(7,\)",
            ),
        ],
    )
    def test_other_formats(self, copy: Path, key: str, tensor: Tensor, message: str) -> None:
        def edit(tensors: Tensors) -> None:
            layer = "time_embedding.linear_2.weight"
            tensors.update({layer: tensors[layer].to(torch.float8_e5m2), key: tensor})

        edit_tensors(copy / UNET, edit)
        with pytest.raises(ValueError, match=f"^{copy / UNET}: .*{message}"):
            load(copy)


class TestVariants:
    @pytest.fixture
    def varied(self, copy: Path) -> Path:
        """A folder whose U-Net has the variants ema and non_ema, and whose VAE has bf16 only."""
        edit_tensors(copy / UNET, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
        (copy / UNET).rename((copy / UNET).with_suffix(".non_ema.safetensors"))
        tensors = load_file((copy / UNET).with_suffix(".non_ema.safetensors"))
        save_file({key: tensor / 2 for key, tensor in tensors.items()}, (copy / UNET).with_suffix(".ema.safetensors"))
        return copy

    def test_are_chosen(self, tiny: Tiny, varied: Path) -> None:
        assert_bit_equal(load(varied, variant="ema"), tiny)
        other = load(varied, variant="non_ema").unet.state_dict()
        assert all(torch.equal(other[key], 2 * weight) for key, weight in tiny.unet.state_dict().items())

    def test_are_asked_for_before_plain_weights(self, tiny: Tiny, copy: Path) -> None:
        double = {key: 2 * tensor for key, tensor in load_file(copy / UNET).items()}
        save_file(double, (copy / UNET).with_suffix(".bf16.safetensors"))
        assert_bit_equal(load(copy), tiny)
        unet = load(copy, variant="bf16").unet.state_dict()
        assert all(torch.equal(unet[key], tensor) for key, tensor in double.items())

    def test_of_a_vae_in_the_place_of_the_models(self, tiny: Tiny, folder: Path, copy: Path) -> None:
        (copy / VAE).rename((copy / VAE).with_suffix(".bf16.safetensors"))
        (copy / UNET).rename((copy / UNET).with_suffix(".bf16.safetensors"))
        assert_bit_equal(load(copy, vae=copy, variant="bf16"), tiny)

    def test_are_listed(self, varied: Path, command_line: CommandLine) -> None:
        listed = "unet holds no diffusion_pytorch_model.safetensors, only the variants ema, non_ema: choose one with"
        command_line.refuses(["--model", varied], 1, listed)
        expected = f"--variant 'bf16': {varied} has no weights of that variant, only ema, non_ema"
        command_line.refuses(["--model", varied, "--variant", "bf16"], 2, expected)

    @pytest.mark.parametrize("variant", ["../unet", "", "*", "fp16"])
    def test_that_are_none(self, variant: str, folder: Path, single_file: Path, command_line: CommandLine) -> None:
        expected = f"--variant {variant!r}: {folder} has no weights of that variant, only weights without one, so"
        command_line.refuses(["--model", folder, "--variant", variant], 2, expected)
        expected = f"--variant {variant!r} is for folders, and {single_file} is a single file: omit it"
        command_line.refuses(["--model", single_file, "--variant", variant], 2, expected)

    @pytest.mark.parametrize("index", ["{}.safetensors.index.bf16.json", "{}.bf16.safetensors.index.json"])
    def test_in_shards(self, tiny: Tiny, copy: Path, index: str) -> None:
        shard = "diffusion_pytorch_model.bf16-00001-of-00001.safetensors"
        (copy / UNET).rename(copy / "unet" / shard)
        places = dict.fromkeys(tiny.unet.state_dict(), shard)
        (copy / "unet" / index.format("diffusion_pytorch_model")).write_text(json.dumps({"weight_map": places}))
        assert_bit_equal(load(copy, variant="bf16"), tiny)
        with pytest.raises(ValueError, match="only the variants bf16: choose one with --variant"):
            load(copy)


class TestSomeNetworks:
    def test_a_folder_without_a_vae_beside_another(self, tiny: Tiny, copy: Path, command_line: CommandLine) -> None:
        vae = copy.with_name("vae")
        (copy / "vae").rename(vae)
        assert_bit_equal(load(copy, vae=vae), tiny)
        command_line.refuses(["--model", copy], 1, f"{copy} has no vae: pass one as --vae")

    @pytest.mark.parametrize("prefix", ["", UNET_PREFIX, "unet.", "diffusion_model."])
    @pytest.mark.parametrize("layout", ["diffusers", "original"])
    def test_a_unet_alone(self, tiny: Tiny, folder: Path, tmp_path: Path, prefix: str, layout: str) -> None:
        unet = {key: 2 * tensor for key, tensor in tiny.unet.state_dict().items()}
        named = {ours: theirs for theirs, ours in unet_keys(tiny.unet).items()}
        path = tmp_path / "unet.safetensors"
        tensors = {prefix + (key if layout == "diffusers" else named[key]): tensor for key, tensor in unet.items()}
        save_file({**tensors, "v_pred": torch.zeros(0)}, path)
        model = load(path, config=folder)
        for name, network in networks(model).items():
            factor = 2 if name == "unet" else 1
            for key, weight in network.state_dict().items():
                assert torch.equal(weight, factor * networks(tiny)[name].state_dict()[key])
        assert {*model.files} == {
            path.name,
            *(str(f.relative_to(folder)) for f in folder.rglob("*.s*") if f.parent.name != "unet"),
        }
        assert model.decided_by["prediction_type"] == "marker key v_pred"
        with pytest.raises(ValueError, match="a U-Net alone: pass --config FOLDER, whose other networks it then has"):
            load(path)

    def test_a_unet_alone_that_is_broken(self, tiny: Tiny, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "unet.safetensors"
        save_file({key: tensor for key, tensor in tiny.unet.state_dict().items() if key != "conv_in.bias"}, path)
        with pytest.raises(ValueError, match=rf"^{path}: unet: .*1 missing: conv_in\.bias"):
            load(path, config=folder)

    @pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
    def test_a_pipeline_that_draws_from_pictures(self, tiny: Tiny, copy: Path, kind: str) -> None:
        edit_json(copy / "model_index.json", _class_name=f"StableDiffusionXL{kind}Pipeline")
        assert_bit_equal(load(copy), tiny)

    def test_a_refiner(self, copy: Path) -> None:
        edit_json(copy / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None])
        with pytest.raises(ValueError, match="is an SDXL refiner, which only finishes pictures: pass the base model"):
            load(copy)


class TestAverages:
    @staticmethod
    def flat(key: str) -> str:
        return "model_ema." + key.removeprefix("model.").replace(".", "")

    def test_every_name_of_a_real_file(self) -> None:
        for keys in json.loads(
            gzip.decompress((Path(__file__).parent / "fixtures/checkpoint_keys.json.gz").read_bytes())
        ).values():
            unet = [key for key in keys if key.startswith(UNET_PREFIX)]
            assert len(unet) > 600
            assert [*with_averages({self.flat(key): torch.zeros(0) for key in unet})] == unet

    @pytest.mark.parametrize("both", [False, True])
    def test_are_read_where_there_is_nothing_else(self, tiny: Tiny, folder: Path, tmp_path: Path, both: bool) -> None:
        tensors = tiny.original()
        averages = {self.flat(key): 2 * t for key, t in tensors.items() if key.startswith(UNET_PREFIX)}
        rest = tensors if both else {key: t for key, t in tensors.items() if not key.startswith(UNET_PREFIX)}
        decay = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(9)}
        save_file({**rest, **averages, **decay}, tmp_path / "model.safetensors")
        unet = load(tmp_path / "model.safetensors", config=folder).unet.state_dict()
        assert all(torch.equal(unet[k], w if both else 2 * w) for k, w in tiny.unet.state_dict().items())


class TestGuidanceThatTheNetworkReads:
    @pytest.fixture
    def lcm(self, tiny: Tiny, tmp_path: Path) -> Path:
        """A folder whose U-Net reads the guidance scale, as those of LCM do."""
        torch.manual_seed(0)
        unet = type(tiny.unet)(replace(tiny.unet.config, guidance_dim=16, native_size=8)).eval()
        folder = replace(tiny, unet=unet).save(tmp_path / "lcm")
        assert json.loads((folder / "unet" / "config.json").read_text())["time_cond_proj_dim"] == 16
        return folder

    @torch.no_grad()
    def test_is_what_diffusers_draws(self, lcm: Path) -> None:
        pipeline = StableDiffusionXLPipeline.from_pretrained(lcm, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        model, start = load(lcm), cutdiff.Draws((3,)).noise((1, 4, 8, 8))
        told = {"guidance_scale": 5.0, "height": 32, "width": 32}
        theirs = pipeline("red", num_inference_steps=3, latents=start, output_type="latent", **told).images
        ours = cutdiff.generate(model, "red", method="direct", num_steps=3, seed=3, **told)
        torch.testing.assert_close(ours.latents, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
        assert ours.record["network_evaluations"] == 3
        other = cutdiff.generate(model, "red", method="direct", num_steps=3, seed=3, **told | {"guidance_scale": 2.0})
        assert (other.latents - ours.latents).abs().max() > 1e-3 * ours.latents.abs().max()

    def test_another_guidance(self, lcm: Path) -> None:
        with pytest.raises(ValueError, match="guidance=rescale needs two estimates, and this model reads the scale"):
            cutdiff.generate(load(lcm), "red", method="direct", num_steps=1, height=32, width=32, guidance="rescale")
