"""The text of a PNG that says how it was drawn, in the convention of A1111's web UI, which other tools read too."""

from __future__ import annotations

import json
from typing import Any

from cutdiff import specs

SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "ddim": "DDIM",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
"""A1111's names of solvers."""
SCHEDULE_TYPES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
    "trailing": "SGM Uniform",
    "linspace": "Uniform",
    "align_your_steps": "Align Your Steps",
}
"""A1111's names of schedules, and of the spacings of a model's own: the "trailing" one is its SGM Uniform to less than
two timesteps, and it has none for the "leading" one."""
OWN_TIMESTEPS = ("ddim", "lcm")
"""The solvers whose model's own schedule A1111 has as a part of the sampler."""


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
        "Schedule type": _schedule_type(record),
        "CFG scale": guidance.get("guidance_scale"),
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": unet[:10],
        "Model": _stem(record["model"]["source"]),
        "Loras": ", ".join(f"{_stem(lora['path'])}: {lora['scale']}" for lora in record["model"]["loras"]) or None,
        **{kind.capitalize(): record[kind] for kind in specs.TABLES},
        "Shift": record.get("shift"),
        "Positions": record.get("positions"),
        "Version": f"cutdiff {record['versions']['cutdiff']}",
        "Clip skip": record["clip_skip"],
    }
    lines = [record["prompt"]]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    said = (f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None)
    return "\n".join([*lines, ", ".join(said)])


def _sampler(record: dict[str, Any]) -> str:
    """A1111's name of the solver; of another solver than those that ship, its own name."""
    solver = specs.parse("solver", record["solver"])[0]
    return SAMPLERS.get(solver, solver)


def _schedule_type(record: dict[str, Any]) -> str | None:
    """A1111's name of the schedule; None where it has none for it, or it is part of the sampler."""
    solver, schedule = (specs.parse(kind, record[kind])[0] for kind in ("solver", "schedule"))
    if schedule != "model":
        return SCHEDULE_TYPES.get(schedule)
    if solver in OWN_TIMESTEPS:
        return None
    noise = record["noise"]
    spread = (name for name in SCHEDULE_TYPES if noise.get(f"use_{name}_sigmas") or noise.get("sigma_schedule") == name)
    return SCHEDULE_TYPES.get(next(spread, noise.get("timestep_spacing", "")))


def _stem(name: str) -> str:
    """The name of a model or a LoRA without the ending of a file; what follows another dot is part of the name."""
    return name.removesuffix(".safetensors")


def _quoted(value: Any) -> str:
    """A value as A1111 writes it, who reads up to the next comma what is not in quotes. A byte of a file's name that is
    not UTF-8, which a PNG's text cannot hold, is escaped."""
    text = str(value).encode(errors="backslashreplace").decode()
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ',:"\n') else text
