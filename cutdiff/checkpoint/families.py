"""Recognising a single file by its keys: a model of one of the families that are read, or something else."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from cutdiff.models.config import SD15_UNET, SD21_UNET, SD_VAE, SDXL_UNET, SDXL_VAE, VAEConfig

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."


@dataclass(frozen=True)
class TextPart:
    """A text encoder in a single file."""

    name: str
    """The name of its sub-folder in the diffusers layout."""
    prefix: str
    is_open_clip: bool
    """True for OpenCLIP's keys and activation, with prompts padded by "!"; False for CLIP's, padded by the end."""


@dataclass(frozen=True)
class Family:
    """A kind of model: its prefixes in the original layout, and facts that neither keys nor shapes show."""

    name: str
    texts: tuple[TextPart, ...]
    vae: VAEConfig
    """A VAE with the scaling factor and the range of the family's VAEs, which a file does not say."""
    num_heads: int | None
    """The number of heads in every attention of the U-Net; None where a head has 64 channels."""
    text_layer: int
    zeros_for_empty_negative: bool
    native_sizes: dict[str, int]
    """The native size in latents, by prediction type."""

    @property
    def is_ambiguous(self) -> bool:
        """True where the family has models of both prediction types that no key or shape distinguishes."""
        return len({*self.native_sizes.values()}) > 1

    @property
    def prefixes(self) -> dict[str, str]:
        """The prefix of each network's keys, by the name of its sub-folder in the diffusers layout."""
        return {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **{text.name: text.prefix for text in self.texts}}


SDXL = Family(
    name="SDXL",
    texts=(
        TextPart("text_encoder", "conditioner.embedders.0.transformer.", is_open_clip=False),
        TextPart("text_encoder_2", "conditioner.embedders.1.model.", is_open_clip=True),
    ),
    vae=SDXL_VAE,
    num_heads=None,
    text_layer=2,
    zeros_for_empty_negative=True,
    native_sizes={"epsilon": SDXL_UNET.native_size, "v_prediction": SDXL_UNET.native_size},
)
SD15 = Family(
    name="SD 1.5",
    texts=(TextPart("text_encoder", "cond_stage_model.transformer.", is_open_clip=False),),
    vae=SD_VAE,
    num_heads=SD15_UNET.num_heads[0],
    text_layer=1,
    zeros_for_empty_negative=False,
    native_sizes={"epsilon": SD15_UNET.native_size, "v_prediction": SD15_UNET.native_size},
)
SD21 = Family(
    name="SD 2.1",
    texts=(TextPart("text_encoder", "cond_stage_model.model.", is_open_clip=True),),
    vae=SD_VAE,
    num_heads=None,
    text_layer=2,
    zeros_for_empty_negative=False,
    native_sizes={"epsilon": SD15_UNET.native_size, "v_prediction": SD21_UNET.native_size},
)
SD21_SGM = replace(SD21, texts=(TextPart("text_encoder", "conditioner.embedders.0.model.", is_open_clip=True),))
"""SD 2.1 in the layout of SDXL's code, as SD-Turbo has it. A refiner's text encoder has the same prefix."""
FAMILIES = (SDXL, SD15, SD21, SD21_SGM)

LORA = re.compile(r"^lora_|\.lora[._]|_lora\.|\.(hada|lokr)_")
"""The keys of a LoRA, whichever tool wrote them."""
REFINER = f"{UNET_PREFIX}label_emb."
"""The keys that distinguish a refiner, which embeds sizes, from SD 2.1."""
OTHERS = (
    (r"conditioner\.embedders\.0\.model\.", "an SDXL refiner, which only finishes pictures: pass the base model"),
    (
        r"control_model\.|controlnet_|input_hint_block\.",
        "a ControlNet, which guides a model and is none: pass it as --control beside one",
    ),
    (r"image_proj\.|ip_adapter\.", "an IP-Adapter, which guides a model and is none"),
    (r".*motion_modules\.", "a motion module (AnimateDiff), which makes a model draw films and is none"),
    (
        r"(model\.diffusion_model\.)?joint_blocks\.",
        "SD3's transformer without its first block: download it again",
    ),
    (
        r"(model\.diffusion_model\.)?double_blocks\.",
        "no whole transformer of FLUX.1: its first block lacks layers",
    ),
    (r"emb_params|clip_l|clip_g|string_to_param", "a textual inversion, which is not built"),
    (r"shared\.weight|encoder\.block\.", "a T5 text encoder alone, which is read as a part of a model's folder"),
    (r"decoder\.layers\.|encoder\.layers\.\d+\.(conv|weight)", "a tiny autoencoder (TAESD), which is not built here"),
    (
        r"down_blocks\.|text_model\.|encoder\.layers\.|embeddings\.",
        "one network in the diffusers layout: pass the folder of the whole model, or beside a U-Net --config FOLDER, "
        "whose other networks it then has",
    ),
    (
        r"model\.diffusion_model\.",
        "a U-Net without its text encoders: pass --config FOLDER, whose other networks it then has",
    ),
    (r"encoder\.|decoder\.|first_stage_model\.", "a VAE alone: pass it as --vae beside a model"),
)
"""The beginnings of the keys of other files, the most specific first, and a description of those files."""


def family_of(keys: Collection[str], *, needs_vae: bool = True) -> Family:
    """The family of a file by its keys. A file of no family is a ValueError that says what it is instead."""
    is_refiner = any(key.startswith(REFINER) for key in keys)
    for family in FAMILIES:
        missing = [name for name, prefix in family.prefixes.items() if not any(key.startswith(prefix) for key in keys)]
        if missing not in ([], ["vae"]) or (family is SD21_SGM and is_refiner):
            continue
        if missing and needs_vae:
            raise ValueError(f"an {family.name} model without a VAE: pass one as --vae")
        return family
    if any(LORA.search(key) for key in keys):
        raise ValueError("a LoRA, no model: pass it as --lora beside one")
    for start, what in OTHERS:
        if any(re.match(start, key) for key in keys):
            raise ValueError(what)
    names = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    contents = f"its keys begin with {', '.join(sorted(keys)[:3])}" if keys else "it holds no tensors"
    raise ValueError(f"no checkpoint of {names} in the original layout: {contents}")
