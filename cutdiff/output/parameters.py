"""The text of a PNG that says how it was drawn, in the convention of A1111's web UI, which other tools read too."""

from __future__ import annotations

import json
from typing import Any

from cutdiff import specs

SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE",
    "heun": "Heun",
    "lcm": "LCM",
}
"""A1111's names of solvers."""
SPACINGS = {"karras": " Karras", "exponential": " Exponential", "beta": " Beta"}
"""The words that A1111 adds to them for the spacing of the sigmas."""


def parameters_text(record: dict[str, Any]) -> str:
    """The record in the A1111 convention: the prompt, the negative prompt, and one line of `Name: value` pairs."""
    if not isinstance(record["prompt"], str):
        raise ValueError("a picture's record names one prompt, not a list: generate pictures to be saved one by one")
    hashes = record["model"]["sha256"]
    unet = next((value for name, value in hashes.items() if name.startswith("unet")), next(iter(hashes.values()), ""))
    guidance = specs.parse("guidance", record["guidance"])[1]
    pairs = {
        "Steps": record["num_steps"],
        "Sampler": _sampler(record),
        "CFG scale": guidance.get("guidance_scale"),
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": unet[:10],
        "Model": _stem(record["model"]["source"]),
        "Loras": ", ".join(f"{_stem(lora['path'])}: {lora['scale']}" for lora in record["model"]["loras"]) or None,
        **{kind.capitalize(): record[kind] for kind in specs.TABLES},
        "Version": f"cutdiff {record['versions']['cutdiff']}",
        "Clip skip": record["clip_skip"],
    }
    lines = [record["prompt"]]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    said = (f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None)
    return "\n".join([*lines, ", ".join(said)])


def _sampler(record: dict[str, Any]) -> str:
    """A1111's name of the solver and of the spacing of its sigmas; of another solver than those, its own name."""
    solver, schedule = (specs.parse(kind, record[kind])[0] for kind in ("solver", "schedule"))
    if solver not in SAMPLERS:
        return solver
    if schedule == "model" and record["noise"].get("use_karras_sigmas") and solver != "ddim":
        schedule = "karras"
    return f"{SAMPLERS[solver]}{SPACINGS.get(schedule, '')}"


def _stem(name: str) -> str:
    """The name of a model or a LoRA without the ending of a file; what follows another dot is part of the name."""
    return name.removesuffix(".safetensors")


def _quoted(value: Any) -> str:
    """A value as A1111 writes it, who reads up to the next comma what is not in quotes. A byte of a file's name that is
    not UTF-8, which a PNG's text cannot hold, is escaped."""
    text = str(value).encode(errors="backslashreplace").decode()
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ',:"\n') else text
