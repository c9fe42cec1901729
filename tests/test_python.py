"""The arguments that a program passes to `load` and `generate`, and torch's defaults for what it does not pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_faults import VARIANTS
from torch import Tensor

import cutdiff
from cutdiff import Settings
from cutdiff.checkpoint.model import Model
from cutdiff.specs import GUIDANCE, SCHEDULES, SOLVERS

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "text for a size": ({"height": "64"}, "height='64' must be a whole number or None"),
    "float for a size": ({"width": 64.0}, "width=64.0 must be a whole number or None"),
    "float for a seed": ({"seed": 1.5}, "seed=1.5 must be a whole number"),
    "bool for a seed": ({"seed": True}, "seed=True must be a whole number"),
    "float for a stride": ({"stride": 1.5}, "stride=1.5 must be a whole number at least 1 or None"),
    "bool for a batch": ({"view_batch_size": True}, "view_batch_size=True must be a whole number at least 1 or None"),
    "text for a scale": ({"guidance_scale": "7"}, "guidance_scale='7' must be a finite number"),
    "NaN for a scale": ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
    "number for a bool": ({"compile": 1}, "compile=1 must be True or False"),
    "text for steps": ({"num_steps": "5"}, "num_steps='5' must be a whole number at least 1"),
    "one share": ({"guidance_interval": (0,)}, "guidance_interval=0 must be 2 values, each a finite number in"),
    "float for a layer": ({"clip_skip": 1.0}, "clip_skip=1.0 must be a whole number or None"),
    "number for a text": ({"negative_prompt": 3}, "negative_prompt=3 must be a text"),
    "bytes for a text": ({"prompt_2": b"x"}, "prompt_2=b'x' must be a text or None"),
    "number for a backend": ({"backend": 3}, "backend=3 must be one of auto, triton, reference"),
    "number for a method": ({"method": 3}, "method=3 must be a dataclass with `stages(run)`"),
    "digits for a seed": ({"seed": 10**5000}, "seed=a number of thousands of digits must lie in 0 … 2⁶⁴ − 1"),
    "digits for a size": ({"height": 10**5000}, "height=a number of thousands of digits must be a positive multiple"),
    "digits for a scale": ({"guidance_scale": 10**5000}, "guidance_scale=a number of thousands of digits must be a"),
    "a long text for a seed": ({"seed": "x" * 10**6}, f"seed='{'x' * 99}…{'x' * 99}' must be a whole number"),
    "huge number": ({"height": 2**70}, f"height={2**70} must be a positive multiple of 8"),
}
LOADED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": torch.float64}, "dtype=torch.float64 must be torch.float32, torch.bfloat16, torch.float16"),
    "float8": ({"dtype": torch.float8_e4m3fn}, "dtype=torch.float8_e4m3fn must be torch.float32"),
    "text for a dtype": ({"dtype": "float32"}, "dtype='float32' must be torch.float32"),
    "unknown device": ({"device": "abacus"}, "device='abacus' is no device that torch has here: pass 'cpu' or 'cuda'"),
    "number for a path": ({"path": 3}, "path=3 must be a text or a Path or None"),
    "text for LoRAs": ({"loras": "x.safetensors"}, "loras='x.safetensors' must be a list, each 2 values"),
    "a LoRA without a scale": ({"loras": [("x.safetensors",)]}, "loras=['x.safetensors'] must be a list, each 2"),
    "text for a bool": ({"zero_terminal_snr": "no"}, "zero_terminal_snr='no' must be True or False or None"),
    "number for a bool": ({"check_weights": 1}, "check_weights=1 must be True or False"),
    "text for fp8": ({"fp8": "e4m3"}, "fp8='e4m3' must be True or False"),
    "unknown prediction": ({"prediction_type": 3}, "prediction_type=3 is not one of epsilon, v_prediction"),
}
PROMPTS = (3, None, [3], ["a", None], b"x", {"a": 1}, [b"a"])


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_another_type(name: str) -> None:
    options, expected = OPTIONS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        Settings(**options)


@pytest.mark.parametrize("name", LOADED)
def test_what_cannot_be_loaded_so(name: str) -> None:
    options, expected = LOADED[name]
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        cutdiff.load(**options)


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_prompts_that_are_no_texts(tiny_model: Model, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"^prompt=.* must be a list, each a text$"):
        next(cutdiff.denoise(tiny_model, prompt))


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    """Let torch make tensors of this type on this device where neither is said."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def drawn(model: Model, *, summed: bool = False, **options: Any) -> Tensor:
    prompt = "a (red:1.37) house with mountains, and a long [lake] at night"
    prompt += " AND [a kite|a moon]:0.3" * summed
    options = {"num_steps": 2, "height": 136, "width": 160, "seed": 3, "negative_prompt": "a (tent:0.7)", **options}
    return cutdiff.generate(model, prompt, **options).images


SPECS = [
    *(("method", spec) for spec in VARIANTS),
    *(("solver", spec) for spec in SOLVERS),
    *(("schedule", spec) for spec in SCHEDULES if spec != "list"),
    *(("guidance", spec) for spec in GUIDANCE),
    ("method", "cutdiffusion,view_weights=gaussian"),
    ("regions", (cutdiff.Region("a red tent", (0, 0, 0.5, 1), weight=3), cutdiff.Region("a moon", (0.3, 0, 1, 0.5)))),
]


@pytest.mark.parametrize(("kind", "spec"), SPECS)
def test_the_defaults_of_torch_do_not_change_a_picture(tiny_model: Model, kind: str, spec: Any) -> None:
    options: dict[str, Any] = {"method": "direct", kind: spec, "summed": kind == "guidance"}
    expected = drawn(tiny_model, **options)
    for dtype, device in ((torch.float64, None), (torch.float16, "meta")):
        with defaults(dtype, device):
            picture = drawn(tiny_model, **options)
        assert torch.equal(picture, expected)


def test_the_defaults_of_torch_do_not_change_a_model() -> None:
    expected = cutdiff.load()
    for dtype, device in ((torch.float64, None), (torch.float16, "meta")):
        with defaults(dtype, device):
            model = cutdiff.load(check_weights=True)
            picture = drawn(replace(model, text=model.text.on(model.device)))
        assert model.hashes == expected.hashes
        assert torch.equal(picture, drawn(expected))
