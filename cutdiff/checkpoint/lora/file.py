"""Reading a LoRA file: the change of each weight, or an error that says what is wrong with the file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cutdiff.checkpoint.files import listed
from cutdiff.checkpoint.lora import formulas
from cutdiff.checkpoint.lora.metadata import AdapterConfig, read_adapter_config
from cutdiff.checkpoint.lora.names import BIAS, UNSUPPORTED, Target, flat, split_key, unsupported
from cutdiff.checkpoint.read import read_tensors_and_metadata

FAMILIES = {768: " (Stable Diffusion 1)", 1024: " (Stable Diffusion 2)", 1280: " (SDXL's refiner)", 2048: " (SDXL)"}
"""The family whose U-Net reads text states of that width."""
READS_TEXT = ("attn2_to_k", "attn2_to_v")
"""The ends of the flat names of the U-Net's modules whose input is the text."""
UNET_BLOCKS = ("down_blocks_", "up_blocks_", "input_blocks_", "output_blocks_")
"""Parts of the flat names of modules that only a U-Net has."""
WIDE = ("lora_down", "hada_w1_b", "diff")
"""The parts whose second dimension is that of the module's input."""
DIFFERENCES = {"diff": "diff", "diff_b": "diff"}
"""The parts that are whole differences, of a module's weight and of its bias."""
ENCODERS = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}
"""The text encoder that each of transformers' classes usually is."""
NO_MODULE = "keys of no module of this model"
NOT_SUPPORTED, REPEATED = "keys of what is not supported", "keys that repeat another"
NO_BIAS = "biases of modules that have none"
INCOMPLETE, QUANTIZED = "incomplete changes", "quantized factors"
OTHER_SHAPE, OTHER_MAGNITUDES = "changes of another shape", "magnitudes of another shape"
NO_RANK, NOT_FINITE = "changes without one rank", "factors that are not finite"
NO_ALPHA = "alphas that are no finite number"
OTHER_MODEL, AGAIN = "use a LoRA that was made for this model", "download it again"
REMEDIES = {
    NO_MODULE: OTHER_MODEL,
    NO_BIAS: OTHER_MODEL,
    OTHER_SHAPE: OTHER_MODEL,
    OTHER_MAGNITUDES: OTHER_MODEL,
    NOT_SUPPORTED: "leave it out, or let the tool that wrote it merge it into a checkpoint",
    REPEATED: "remove one of the two",
    QUANTIZED: "take it in fp16",
    INCOMPLETE: AGAIN,
    NO_RANK: AGAIN,
    NOT_FINITE: AGAIN,
    NO_ALPHA: AGAIN,
}
"""The remedies of all that can be wrong with parts of a file."""
BUNDLED = "bundle_emb."
"""The beginning of the keys of textual inversions that some tools put into a LoRA's file; the name follows."""
EXAMPLES = 3


class LoraError(ValueError):
    """A LoRA that cannot be merged into the model."""


@dataclass(frozen=True)
class Change:
    """The change of one weight. It is not computed yet, and its factors stay memory-mapped."""

    factors: formulas.Factors
    strength: float
    """The factor alpha / rank of the change."""
    magnitude: Tensor | None = None
    """DoRA's magnitudes, in a shape that multiplies the weight; None for other kinds."""

    def of(self, weight: Tensor, scale: float) -> Tensor:
        """Compute in float32 what is added to the weight, with the factors taken `scale` times.

        For DoRA that is what PEFT adds: the weight and `scale` times the change get the lengths of the magnitudes.
        """
        factors = {name: factor.float() for name, factor in self.factors.items()}
        change = scale * self.strength * formulas.change(factors).reshape(weight.shape)
        if self.magnitude is None:
            return change
        return formulas.decomposed(weight.float(), change, self.magnitude.float())


@dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file."""

    changes: dict[Target, Change]
    embeddings: dict[str, dict[str, Tensor]]
    """The tensors of the textual inversions that are bundled with it, by token and key."""


def read_lora(path: Path, table: Mapping[str, Target], context_dim: int) -> LoraFile:
    """The change of every weight that the file changes.

    `table` has the model's weights by flat name, and `context_dim` is the width of the text states that its U-Net
    reads. Differences that are all zero change nothing, so they may be of what the model does not have. Raises
    LoraError, in one line that begins with the path, where anything in the file cannot be merged.
    """
    try:
        tensors, metadata = read_tensors_and_metadata(path)
        config = read_adapter_config(path, tensors, metadata)
    except ValueError as error:
        raise LoraError(str(error)) from None
    embeddings: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in [key for key in tensors if key.startswith(BUNDLED)]:
        token, _, rest = key.removeprefix(BUNDLED).partition(".")
        embeddings[token][rest] = tensors.pop(key)
    if embeddings and not tensors:
        raise LoraError(f"{path} is no LoRA: it holds nothing but the textual inversions {listed(embeddings)}")
    if tensors and not any(split_key(key)[1] or any(mark in key for mark in UNSUPPORTED) for key in tensors):
        examples = ", ".join([*tensors][:EXAMPLES])
        raise LoraError(f"{path} is no LoRA, but may be a whole model: none of its keys changes weights, as {examples}")
    if other := _other_family(tensors, table, context_dim):
        raise LoraError(f"{path} {other}")
    encoders = _lone_encoders(tensors, table)
    if not encoders:
        return LoraFile(_changes(path, tensors, table, config), embeddings)
    return LoraFile(_changes_of_encoder(path, tensors, table, config, encoders), embeddings)


def _lone_encoders(tensors: Mapping[str, Tensor], table: Mapping[str, Target]) -> list[str]:
    """The text encoders that have modules of the file's names, where these do not say of which network they are, as in
    the adapter of a text encoder that was saved by itself."""
    modules = {flat(split_key(key)[0]) for key in tensors}
    if any(module in table for module in modules):
        return []
    return [name for name in ENCODERS.values() if any(f"{name}_{module}" in table for module in modules)]


def _changes_of_encoder(
    path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, Target], config: AdapterConfig, encoders: list[str]
) -> dict[Target, Change]:
    """The changes of the text encoder that the file fits, or which its configuration names where it fits both."""
    own = ENCODERS.get(config.base_class)
    fitting: dict[str, dict[Target, Change]] = {}
    errors: dict[str, LoraError] = {}
    for encoder in encoders:
        try:
            fitting[encoder] = _changes(path, {f"{encoder}.{key}": t for key, t in tensors.items()}, table, config)
        except LoraError as error:
            errors[encoder] = error
    if not fitting:
        raise errors.get(own or "", errors[encoders[0]])
    if len(fitting) > 1 and own is None:
        raise LoraError(
            f"{path} fits both text encoders, and no auto_mapping of its adapter_config.json says of which it is: let "
            f"its keys begin with {encoders[0]}. or {encoders[1]}."
        )
    return fitting[own if own in fitting else next(iter(fitting))]


def _changes(
    path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, Target], config: AdapterConfig
) -> dict[Target, Change]:
    """The changes that the tensors make. LoraError where any of them cannot be merged."""
    placed, problems = _place(tensors, table)
    if len(problems.get(NO_MODULE, ())) == len(tensors):
        raise LoraError(f"{path} {_no_match(tensors, table)}")
    changes: dict[Target, Change] = {}
    for target, keys in placed.items():
        factors = {part: tensors[key] for part, key in keys.items()}
        if problem := _problem(keys, factors, target.shape):
            kind, where = problem
            problems[kind].append(where)
            continue
        alpha, magnitude = factors.pop("alpha", None), factors.pop("magnitude", None)
        rank = next(iter(formulas.ranks(factors)), None)  # an alpha beside factors without a rank has no effect
        strength = config.strength(target, rank) if alpha is None else alpha.item() / rank if rank else 1.0
        if magnitude is not None:
            magnitude = magnitude.reshape(_magnitude_shape(keys, magnitude, target.shape) or ())
        changes[target] = Change(factors, strength, magnitude)
    if problems:
        kinds = (f"{len(where)} {kind}: {listed(where)}: {REMEDIES[kind]}" for kind, where in problems.items())
        raise LoraError(f"{path} cannot be merged into this model: {'; '.join(kinds)}")
    return changes


def _place(
    tensors: Mapping[str, Tensor], table: Mapping[str, Target]
) -> tuple[dict[Target, dict[str, str]], defaultdict[str, list[str]]]:
    """The key of each part of each weight's change, and the keys without a place by the kind of problem."""
    placed: defaultdict[Target, dict[str, str]] = defaultdict(dict)
    problems: defaultdict[str, list[str]] = defaultdict(list)
    for key, tensor in tensors.items():
        module, part = split_key(key)
        name = flat(module)
        if kind := unsupported(key):
            problems[NOT_SUPPORTED].append(f"{key} ({kind})")
            continue
        if part in DIFFERENCES and not (tensor.float() if tensor.is_floating_point() else tensor).any():
            continue
        target = table.get(f"{name}{BIAS}" if part == "diff_b" else name)
        if target is None and part == "diff_b" and name in table:
            problems[NO_BIAS].append(key)
        elif target is None:
            problems[NO_MODULE].append(key)
        elif DIFFERENCES.get(part, part) in placed[target]:
            problems[REPEATED].append(key)
        else:
            placed[target][DIFFERENCES.get(part, part)] = key
    return placed, problems


def _problem(keys: Mapping[str, str], parts: Mapping[str, Tensor], shape: torch.Size) -> tuple[str, str] | None:
    """The kind of problem with one weight's change and its place; None where there is no problem."""
    name, _ = split_key(next(iter(keys.values())))
    factors = {part: factor for part, factor in parts.items() if part not in ("alpha", "magnitude")}
    if factors.keys() not in formulas.COMPLETE:
        # An alpha alone is taken for a part of a LoRA.
        nearest = min(formulas.COMPLETE, key=lambda complete: len(complete ^ (factors.keys() or {"lora_down"})))
        return INCOMPLETE, f"{name} has {' and '.join(keys)} where {' and '.join(sorted(nearest))} belong"
    for part, factor in parts.items():
        if part != "alpha" and not factor.is_floating_point():
            return QUANTIZED, f"{keys[part]} {factor.dtype}"
    made_shape = formulas.change_shape(factors)
    if made_shape is None or not _fits(made_shape, shape):
        sizes = " and ".join(f"{part} {tuple(factor.shape)}" for part, factor in factors.items())
        return OTHER_SHAPE, f"{name} has {sizes} where {tuple(shape)} is to be changed"
    magnitude = parts.get("magnitude")
    if magnitude is not None and _magnitude_shape(keys, magnitude, shape) is None:
        return OTHER_MAGNITUDES, f"{keys['magnitude']} {tuple(magnitude.shape)} beside {tuple(shape)}"
    ranks = formulas.ranks(factors)
    if len(ranks) > 1 or 0 in ranks:
        return NO_RANK, f"{name} has {' and '.join(map(str, sorted(ranks)))}"
    for part, factor in parts.items():
        if part != "alpha" and not factor.float().isfinite().all():
            return NOT_FINITE, keys[part]
    alpha = parts.get("alpha")
    if alpha is not None and not _is_number(alpha):
        value = alpha.item() if alpha.numel() == 1 else f"of shape {tuple(alpha.shape)}"
        return NO_ALPHA, f"{keys['alpha']} is {value}, {alpha.dtype}"
    return None


def _magnitude_shape(keys: Mapping[str, str], magnitude: Tensor, shape: torch.Size) -> tuple[int, ...] | None:
    by_peft = not keys["magnitude"].endswith("dora_scale")
    return formulas.magnitude_shape(tuple(magnitude.shape), shape, by_peft=by_peft)


def _fits(made: tuple[int, ...], shape: torch.Size) -> bool:
    """True for a change of the weight's shape, a matrix for a kernel, or a 1×1 kernel for a matrix."""
    return made in (tuple(shape), (shape[0], shape[1:].numel()), (*shape, 1, 1))


def _is_number(alpha: Tensor) -> bool:
    is_other = alpha.numel() != 1 or alpha.is_complex() or alpha.dtype == torch.bool
    return not is_other and bool(alpha.double().isfinite())


def _other_family(tensors: Mapping[str, Tensor], table: Mapping[str, Target], context_dim: int) -> str | None:
    """The error for a U-Net's file where this model has none, or whose modules all read text of another width than this
    model's; None for other files."""
    if all(target.network != "unet" for target in table.values()):
        is_for_unet = any(mark in flat(split_key(key)[0]) for key in tensors for mark in UNET_BLOCKS)
        fault = "was made for a U-Net, and this model has a transformer: use a LoRA of its family"
        return fault if is_for_unet else None
    widths = set()
    for key, tensor in tensors.items():
        module, part = split_key(key)
        if part in WIDE and tensor.ndim > 1 and flat(module).endswith(READS_TEXT):
            widths.add(tensor.shape[1])
    if not widths or context_dim in widths:
        return None
    width = min(widths)
    return (
        f"was made for a U-Net that reads text of width {width}{FAMILIES.get(width, '')}, and this model's reads width "
        f"{context_dim}{FAMILIES.get(context_dim, '')}: use a LoRA of this model's family"
    )


def _no_match(keys: Collection[str], table: Mapping[str, Target]) -> str:
    """The error for a file that has nothing for this model."""
    examples = ", ".join([*keys][:EXAMPLES]) or "none"
    network = next(target.network for target in table.values())
    module = max((target.key for target in table.values() if target.network == network), key=len).removesuffix(
        ".weight"
    )
    return (
        f"is no LoRA for this model: no key is of one of its modules. It has {examples}; expected were such as "
        f"lora_{network}_{flat(module)}.lora_down.weight or {network}.{module}.lora_A.weight"
    )
