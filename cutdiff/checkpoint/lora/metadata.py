"""Reading PEFT's configuration of an adapter, which has the alphas that are not among a LoRA's tensors.

diffusers keeps it, for each network, in the file's metadata; PEFT writes `adapter_config.json` beside the file. The
fields are those of PEFT 0.21.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.kinds import TEXT_ENCODERS
from cutdiff.checkpoint.lora.names import Target
from cutdiff.checkpoint.lora.patterns import Pattern
from cutdiff.checkpoint.read import read_json
from cutdiff.checkpoint.text import PREFIX

KEY = "lora_adapter_metadata"
ADAPTER, BESIDE = "adapter_model.safetensors", "adapter_config.json"
PEFT = "base_model.model."
"""The beginning of the keys in a file that PEFT itself wrote."""
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the model's own weights, so that the LoRA is a change of the changed weights."""
OTHER_RULE = (
    "layer_replication",
    "kasa_config",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
)
"""Fields of adapters that are something else than one change of the model's weights for every input."""
TYPES = ("LORA", "LOHA", "LOKR")
"""The kinds of adapters that can be merged here, as PEFT names them."""
PATTERNS = ("alpha_pattern", "rank_pattern")
"""The fields with numbers for some modules, by regular expressions for the ends of their names."""


@dataclass(frozen=True)
class AdapterConfig:
    """PEFT's fields, named `network.field` as diffusers writes them, or `field` in an adapter saved by itself."""

    fields: Mapping[str, Any]
    patterns: dict[str, list[tuple[Pattern, float]]] = field(init=False, default_factory=dict)
    """The fields that give numbers to some modules, with their regular expressions."""

    def __post_init__(self) -> None:
        """Raise ValueError for a field that changes the meaning of the factors, for a value that is no number, and for
        a pattern that is no regular expression."""
        for name, value in self.fields.items():
            kind = name.rpartition(".")[2]
            if kind in OTHER_RULE and value:
                raise ValueError(f"{name}={quoted(value)}, which is not supported: merge the adapter with PEFT")
            if kind == "init_lora_weights" and str(value).lower().startswith(OTHER_BASE):
                raise ValueError(
                    f"{name}={quoted(value)}, so it changes other weights than the model's: let PEFT convert it to a "
                    "LoRA (path_initial_model_for_weight_conversion)"
                )
            if kind == "peft_type" and str(value).upper() not in TYPES:
                raise ValueError(
                    f"{name}={quoted(value)}, which is not supported, only {', '.join(TYPES)}: let PEFT merge it into "
                    "a checkpoint"
                )
            pattern = value or {} if kind in PATTERNS else {}
            if not isinstance(pattern, dict):
                raise ValueError(f"{name}={quoted(value)} is no object of numbers by the names of modules")
            try:
                self.patterns[name] = [(Pattern.of(key), number) for key, number in pattern.items()]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            for number in [value] if kind in ("lora_alpha", "r") else pattern.values():
                if type(number) not in (int, float) or not abs(number) <= sys.float_info.max:
                    raise ValueError(f"{name}={quoted(value)}: {quoted(number)} is no finite number")
                if kind in ("r", "rank_pattern") and number < 1:
                    raise ValueError(f"{name}={quoted(value)}: a rank is at least 1")

    @property
    def base_class(self) -> str:
        """The class of the network that the adapter was trained for, in an adapter saved by itself; else empty."""
        mapping = self.fields.get("auto_mapping")
        return str(mapping.get("base_model_class", "")) if isinstance(mapping, Mapping) else ""

    def strength(self, target: Target, rank: int | None) -> float:
        """alpha / rank, or alpha / √rank for rsLoRA (arXiv 2312.03732); 1 where no alpha is given.

        If no factor has a rank (None), the configuration's takes its place, because PEFT scales a LoKr so.
        """
        alpha, rank = self._of_module(target, "alpha"), rank or self._of_module(target, "rank")
        if alpha is None or rank is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self._field(target.network, "use_rslora") else rank)

    def _of_module(self, target: Target, kind: str) -> Any:
        """The alpha or rank that a pattern gives to the module, or else that of all modules."""
        module = target.key.rpartition(".")[0].removeprefix(PREFIX)
        name = f"{kind}_pattern"
        for pattern, value in self.patterns.get(f"{target.network}.{name}", self.patterns.get(name, [])):
            if pattern.matches(module) or (target.network in TEXT_ENCODERS and pattern.matches(PREFIX + module)):
                return value
        return self._field(target.network, {"alpha": "lora_alpha", "rank": "r"}[kind])

    def _field(self, network: str, name: str) -> Any:
        return self.fields.get(f"{network}.{name}", self.fields.get(name))


def read_adapter_config(path: Path, keys: Collection[str], metadata: Mapping[str, str]) -> AdapterConfig:
    """The configuration in the metadata of a safetensors file or in a file beside it; empty where there is none.

    Raises ValueError where it cannot be used, or is missing although PEFT wrote the file.
    """
    beside, is_peft = path.with_name(BESIDE), any(key.startswith(PEFT) for key in keys)
    if beside.exists() and (is_peft or path.name == ADAPTER):
        return _read_beside(beside)
    if is_peft and KEY not in metadata and not any(key.endswith(".alpha") for key in keys):
        raise ValueError(
            f"{path} was written by PEFT, which keeps alpha in {BESIDE}, and {beside} does not exist: "
            "put the adapter's own there"
        )
    written = metadata.get(KEY, "{}")
    try:
        fields = json.loads(written)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: its metadata {KEY} is no JSON object: {written[:80]!r}")
    try:
        return AdapterConfig(_without_ranks(fields))
    except ValueError as error:
        raise ValueError(f"{path}: its metadata {KEY} has {error}") from None


def _read_beside(path: Path) -> AdapterConfig:
    fields = read_json(path)
    alpha = fields.get("lora_alpha", fields.pop("alpha", None))  # LoHa and LoKr have `alpha`
    if alpha is not None:
        fields["lora_alpha"] = alpha
    try:
        config = AdapterConfig(fields if fields.get("peft_type") == "LOKR" else _without_ranks(fields))
    except ValueError as error:
        raise ValueError(f"{path} has {error}") from None
    if alpha is None:
        raise ValueError(f"{path} has no lora_alpha and no alpha, so no strength: take the adapter's own")
    return config


def _without_ranks(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without ranks, for adapters whose factors have ranks, which count whatever the fields say."""
    return {name: value for name, value in fields.items() if name.rpartition(".")[2] not in ("r", "rank_pattern")}
