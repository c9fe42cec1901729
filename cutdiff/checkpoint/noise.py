"""Deciding what a network predicts and whether its noise ends at zero SNR: the first source that says so decides.

The sources are, in this order: the caller, marker keys in the file, its metadata (ModelSpec), a scheduler's
configuration, and epsilon.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from cutdiff.checkpoint import edm
from cutdiff.options import not_one_of
from cutdiff.sampling.edm import AnyNoise, EDMConfig
from cutdiff.sampling.flow import FlowConfig
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.settings import PREDICTION_TYPES, SPACINGS

MARKS = ("v_pred", "ztsnr", *edm.LATENTS, *edm.SIGMAS)
"""The marker keys that some trainers put beside the weights: empty tensors, or the numbers of an EDM model."""
DEFAULT = "default"
"""The name of the source that decides where no other does."""
METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
SPELLINGS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class NoiseOptions:
    """The options of the caller; None leaves a decision to the other sources."""

    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    timestep_spacing: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("prediction_type", PREDICTION_TYPES), ("timestep_spacing", SPACINGS)):
            value = getattr(self, name)
            if value not in (None, *known):
                raise ValueError(f"{name}={not_one_of(value, known)}")

    def check_fit(self, noise: AnyNoise) -> None:
        """Raise ValueError for an option about betas or timesteps if the model is an EDM model, which has neither, and
        for any if it is one of flow matching."""
        for name, value in asdict(self).items():
            if isinstance(noise, FlowConfig) and value is not None:
                raise ValueError(
                    f"{name}={value} is not for a model of flow matching, which predicts velocities at times from 1 to "
                    "0 whatever it says: leave it out"
                )
        for name in ("zero_terminal_snr", "timestep_spacing"):
            value = getattr(self, name)
            if isinstance(noise, EDMConfig) and value is not None:
                raise ValueError(
                    f"{name}={value} is not for an EDM model, whose sigmas go from {noise.sigma_max:g} "
                    f"to {noise.sigma_min:g} whatever it says: leave it out"
                )


def decide_noise(
    options: NoiseOptions,
    scheduler: AnyNoise | None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[AnyNoise, dict[str, str]]:
    """The schedule of a model, and for each option the source that decided it, such as "marker key v_pred".

    `tensors` and `metadata` are those of a single file. Without a scheduler the rest is as in SDXL, SD 1.5 and SD 2.1,
    which agree. If a source other than the scheduler says that the noise ends at zero SNR, timesteps are spaced from
    the last one on ("trailing", Lin et al. 2023), or no step would begin there. The markers of an EDM model decide all
    of its noise, whatever stands beside them, and flow matching leaves nothing to decide; `check_fit` refuses options
    that are of no use then. Raises ValueError for metadata that are unknown or contradict each other, and for markers
    without numbers.
    """
    keys, metadata, source = tensors or {}, metadata or {}, "scheduler" if scheduler else DEFAULT
    if marked := edm.marked_noise(keys, scheduler):
        (scheduler, source), keys, metadata = marked, {}, {}
    noise = scheduler or NoiseConfig()
    if isinstance(noise, FlowConfig):
        return noise, {"prediction_type": source, "flow": source}
    kind, kind_source = _prediction_type(options.prediction_type, keys, metadata) or (noise.prediction_type, source)
    if isinstance(noise, EDMConfig):
        return replace(noise, prediction_type=kind), {"prediction_type": kind_source, "edm": source}
    if isinstance(noise, FlowConfig):
        return noise, dict.fromkeys(noise.described(), source)
    zero, zero_source = _zero_terminal_snr(options.zero_terminal_snr, keys) or (noise.rescale_betas_zero_snr, source)
    spacing, spacing_source = noise.timestep_spacing, source
    if options.timestep_spacing is not None:
        spacing, spacing_source = options.timestep_spacing, "option"
    elif zero and zero_source != "scheduler":
        spacing, spacing_source = "trailing", f"zero_terminal_snr, {zero_source}"
    decided = replace(noise, prediction_type=kind, rescale_betas_zero_snr=zero, timestep_spacing=spacing)
    decided_by = {"zero_terminal_snr": zero_source, "timestep_spacing": spacing_source}
    return decided, {"prediction_type": kind_source, **decided_by}


def _prediction_type(option: str | None, keys: Collection[str], metadata: Mapping[str, str]) -> tuple[str, str] | None:
    if option is not None:
        return option, "option"
    if "v_pred" in keys:
        return "v_prediction", "marker key v_pred"
    said = {name: SPELLINGS.get(metadata[name].strip().lower()) for name in METADATA if name in metadata}
    for name, value in said.items():
        if value is None:
            raise ValueError(f"metadata {name}={metadata[name]!r} is not known: pass --prediction-type")
        if value != next(iter(said.values())):
            both = " and ".join(f"{other}={metadata[other]!r}" for other in said)
            raise ValueError(f"metadata {both} contradict each other: pass --prediction-type")
    return next(((value, f"metadata {name}") for name, value in said.items() if value), None)


def _zero_terminal_snr(option: bool | None, keys: Collection[str]) -> tuple[bool, str] | None:
    if option is not None:
        return option, "option"
    return (True, "marker key ztsnr") if "ztsnr" in keys else None
