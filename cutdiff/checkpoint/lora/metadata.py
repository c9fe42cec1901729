"""Alphas that are not in a LoRA's tensors: PEFT's configuration of an adapter.

diffusers keeps it, for each network, in the file's metadata; PEFT writes `adapter_config.json` beside the file.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutdiff.checkpoint.lora.names import Target
from cutdiff.checkpoint.read import read_json
from cutdiff.checkpoint.text import PREFIX

KEY = "lora_adapter_metadata"
ADAPTER, BESIDE = "adapter_model.safetensors", "adapter_config.json"
FIELDS = ("lora_alpha", "alpha", "alpha_pattern", "use_rslora")
"""Of the file beside an adapter, what says how strong it is."""


@dataclass(frozen=True)
class AdapterConfig:
    """PEFT's fields as diffusers writes them, `network.field`; of an adapter that was saved by itself, `field`."""

    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raise ValueError for an alpha that is no finite number, or that is for a pattern and not for a module."""
        for name, value in self.fields.items():
            field = name.rpartition(".")[2]
            pattern = value or {} if field == "alpha_pattern" else {}
            if not isinstance(pattern, dict) or not all(re.fullmatch(r"\^?[\w.]+", module) for module in pattern):
                raise ValueError(f"{name}={value!r} is not supported, only alphas by the names of modules")
            for alpha in [value] if field == "lora_alpha" else pattern.values():
                if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max:
                    raise ValueError(f"{name}={value!r}: {alpha!r} is no finite number")

    def strength(self, target: Target, rank: int) -> float:
        """alpha / rank, or alpha / √rank for rsLoRA (arXiv 2312.03732); 1 where no alpha is given."""
        alpha = self._field(target.network, "lora_alpha")
        module = target.key.removesuffix(".weight").removeprefix(PREFIX)
        for pattern, value in (self._field(target.network, "alpha_pattern") or {}).items():
            name = pattern.removeprefix("^").removeprefix(PREFIX)
            if module == name or (module.endswith(f".{name}") and pattern[0] != "^"):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self._field(target.network, "use_rslora") else rank)

    def _field(self, network: str, name: str) -> Any:
        return self.fields.get(f"{network}.{name}", self.fields.get(name))


def read_adapter_config(path: Path, metadata: Mapping[str, str]) -> AdapterConfig:
    """The configuration in a safetensors file's metadata, or beside it; empty where there is none.

    Raises ValueError where it cannot be used.
    """
    beside = path.with_name(BESIDE)
    if path.name == ADAPTER and beside.exists():
        fields = read_json(beside)
        kept = {name: value for name, value in fields.items() if name in FIELDS}
        if "alpha" in kept:  # LoHa's and LoKr's
            kept["lora_alpha"] = kept.pop("alpha")
        try:
            return AdapterConfig(kept)
        except ValueError as error:
            raise ValueError(f"{beside} has {error}") from None
    written = metadata.get(KEY, "{}")
    try:
        fields = json.loads(written)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: its metadata {KEY} is no JSON object: {written[:80]!r}")
    try:
        return AdapterConfig(fields)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata {KEY} has {error}") from None
