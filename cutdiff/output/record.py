"""The part of a record that is known before a picture is drawn, and the part of that which determines the picture."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from itertools import takewhile
from typing import Any

import torch

from cutdiff.checkpoint.control import described
from cutdiff.checkpoint.locate import name_of
from cutdiff.checkpoint.model import Model, dtype_name
from cutdiff.given.controls import CONTROL_FILES
from cutdiff.models.editing import described as read_terms
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.schedules import Schedule
from cutdiff.settings import LATER as LATER_OPTIONS
from cutdiff.settings import PICTURES, VERSION, Settings
from cutdiff.sources import source_hash
from cutdiff.specs import described_options

LATER = (
    "up_transformer_layers",
    "guidance_dim",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift_factor",
    "quant_conv",
)
"""The fields of configurations that old records do not know, in which models had the defaults."""
NO_RECORD = (AttributeError, KeyError, TypeError)
"""The errors of `comparable`."""
ROUNDING = ("view_batch_size", "backend", "compile", "cuda_graphs", "device")
"""The options that change a picture by rounding only, so that a run may go on with another."""


def describe(
    model: Model,
    prompt: str | Sequence[str],
    settings: Settings,
    draws: Draws,
    schedule: Schedule,
    sources: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The part of a record that is known before the run. It names files without the folders that they lie in.

    Draws of one's own are named by their class and the fields that it adds. Their source, and that of other objects
    which are not the package's, stands under "sources": as `sources` has them, which were made before a run could
    change the objects.
    """
    height, width = (side * model.factor for side in settings.canvas_size(model.native_size, model.factor))
    seeds = list(getattr(draws, "seeds", ()))  # draws of one's own may have none
    added = {name: text for name, text in described_options(draws).items() if name not in vars(Draws(()))}
    embeddings = [{**vars(embedding), "path": name_of(embedding.path)} for embedding in model.embeddings]
    return {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        **_changing(prompt, settings),
        **settings.described(),
        **({"control": [described(path) for path in settings.control]} if settings.control else {}),
        "height": height,
        "width": width,
        "model": {
            "source": name_of(model.source),
            "sha256": model.hashes,
            "loras": [{**vars(lora), "path": name_of(lora.path)} for lora in model.loras],
            **({"embeddings": embeddings} if embeddings else {}),
            "configuration": _digest(
                [*map(_shape, (model.unet.config, model.vae.config)), model.text.layer, model.zeros_for_empty_negative]
            ),
            "decided_by": model.decided_by,
        },
        **model.noise.described(),
        "noise": {"class": type(model.noise).__name__, **_shape(model.noise), "schedule": schedule.digest},
        "sources": sources_of(settings, draws) if sources is None else sources,
        "seed": seeds[0] if seeds else None,
        "draws": {"class": type(draws).__qualname__, "seeds": seeds} | added,
        "device": _device_name(model.device),
        "dtype": dtype_name(model.dtype),
        "fp8": model.fp8,
        "vae_dtype": dtype_name(model.vae_dtype),
        "versions": {"cutdiff": VERSION, **_versions(), "python": platform.python_version()},
    }


def _changing(prompt: str | Sequence[str], settings: Settings) -> dict[str, Any]:
    """The terms of those texts that change by step or are sums, by the names of their options."""
    prompts = {"prompt": prompt} if isinstance(prompt, str) else {f"prompt {i}": text for i, text in enumerate(prompt)}
    others = {name: getattr(settings, name) or "" for name in ("prompt_2", "negative_prompt", "negative_prompt_2")}
    terms = {name: read_terms(text, settings.num_steps) for name, text in prompts.items()}
    terms |= {name: read_terms(text, settings.num_steps, sums=False) for name, text in others.items()}
    changing = {name: value for name, value in terms.items() if value is not None}
    return {"prompt_terms": changing} if changing else {}


def sources_of(settings: Settings, draws: Draws) -> dict[str, str]:
    """The source hashes of all that a run is given and that is not the package's."""
    source = source_hash(draws)
    return settings.sources() | ({} if source is None else {"draws": source})


def _shape(config: Any) -> dict[str, Any]:
    """The fields of a configuration, without those of `LATER` that have their defaults."""
    shape = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    return {name: value for name, (value, default) in shape.items() if name not in LATER or value != default}


def fingerprint(described: dict[str, Any]) -> str:
    """SHA-256 of all that determines the picture that `describe` describes, in hexadecimal."""
    return _digest(_determining(described))


def is_of(described: dict[str, Any], record: dict[str, Any]) -> bool:
    """True if a record is of the picture that is described. The fingerprint of an old one may name a VAE's file by its
    path, which determines nothing."""
    return record.get("fingerprint") == fingerprint(described) or not changes(described, record)


def is_alike(record: dict[str, Any], other: dict[str, Any]) -> bool:
    """True if a record is of the same picture as that of one which was just drawn."""
    if record["fingerprint"] == other.get("fingerprint"):
        return True
    described = dict(takewhile(lambda item: item[0] != "fingerprint", record.items()))  # what follows is its cost
    return is_of(described, other)


def changes(described: dict[str, Any], record: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """All that determines a picture and differs in the record of another, by its name there: (in the record, now)."""
    known = {name: value for name, value in record.items() if name in described or name in LATER_OPTIONS}
    now, then = comparable(described), comparable(known)
    return {name: (then.get(name), now.get(name)) for name in {**now, **then} if now.get(name) != then.get(name)}


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """All that determines the picture of a record, with the values of inner dictionaries by names such as "noise
    beta_start"; of the model, files by their contents alone. What is no record gives one of the errors of `NO_RECORD`.
    """
    flat: dict[str, Any] = {}
    for name, value in _determining(record).items():
        if name == "model":
            flat[name] = {**value, "sha256": sorted((value["sha256"] or {}).values())}
        elif isinstance(value, dict):
            flat |= {f"{name} {key}": part for key, part in value.items()}
        else:
            flat[name] = value
    return flat


def _determining(described: dict[str, Any]) -> dict[str, Any]:
    """All that determines a picture, as JSON has it. Files count by their contents, wherever they lie."""
    kept = {name: value for name, value in described.items() if name not in ROUNDING}
    model = described.get("model", {})
    loras = [(lora["sha256"], lora["scale"]) for lora in model.get("loras", ())]
    kept["model"] = {"sha256": model.get("sha256"), "loras": loras, "configuration": model.get("configuration")}
    if embeddings := model.get("embeddings"):
        kept["model"]["embeddings"] = [(embedding["sha256"], embedding["token"]) for embedding in embeddings]
    kept |= {name: kept[name]["sha256"] for name in PICTURES if name in kept}
    if regions := kept.get("regions"):
        kept["regions"] = [{**region, "mask": region.get("mask", {}).get("sha256")} for region in regions]
    kept |= {name: [each["sha256"] for each in kept[name]] for name in CONTROL_FILES if name in kept}
    kept["cutdiff"] = kept.pop("versions", {}).get("cutdiff")
    return json.loads(json.dumps(kept, default=str))


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}  # each reads the metadata of a package


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
