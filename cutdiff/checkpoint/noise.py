"""What the network predicts and whether its noise ends at zero SNR: decided by the first source that says.

In this order: the caller, marker keys in the file, its metadata (ModelSpec), a scheduler's configuration, epsilon.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from cutdiff.schedule import NoiseConfig
from cutdiff.settings import PREDICTION_TYPES, SPACINGS, not_one_of

MARKS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.")
"""How the marker keys begin: empty tensors that some trainers put beside the weights."""
EDM = MARKS[2:]
DEFAULT = "default"
"""The source that is left where no other says anything."""
METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
SPELLINGS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class NoiseOptions:
    """What the caller says; None leaves it to the other sources."""

    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    timestep_spacing: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("prediction_type", PREDICTION_TYPES), ("timestep_spacing", SPACINGS)):
            value = getattr(self, name)
            if value not in (None, *known):
                raise ValueError(f"{name}={not_one_of(value, known)}")


def decide_noise(
    options: NoiseOptions,
    scheduler: NoiseConfig | None,
    *,
    keys: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> tuple[NoiseConfig, dict[str, str]]:
    """The schedule of a model, and for each option the source that decided it, such as "marker key v_pred".

    `keys` and `metadata` are a single file's. Without a scheduler the rest is SDXL's, which SD 1.5 and SD 2.1 share; if
    the noise then ends at zero SNR, timesteps are spaced from the last one on ("trailing", Lin et al. 2023), or no step
    would begin there. Raises ValueError for an EDM model, whose noise has no betas, and for metadata that are unknown.
    """
    edm = sorted(key for key in keys if key.startswith(EDM))
    if edm:
        raise ValueError(f"an EDM model, by its keys {', '.join(edm)}: only models with a beta schedule are built here")
    noise = scheduler or NoiseConfig()
    fallback = "scheduler" if scheduler else DEFAULT
    kind, kind_source = _prediction_type(options.prediction_type, keys, metadata or {}) or (
        noise.prediction_type,
        fallback,
    )
    zero, zero_source = _zero_terminal_snr(options.zero_terminal_snr, keys) or (noise.rescale_betas_zero_snr, fallback)
    spacing = "trailing" if zero and scheduler is None else noise.timestep_spacing
    spacing = options.timestep_spacing or spacing
    decided = replace(noise, prediction_type=kind, rescale_betas_zero_snr=zero, timestep_spacing=spacing)
    return decided, {"prediction_type": kind_source, "zero_terminal_snr": zero_source}


def _prediction_type(option: str | None, keys: Collection[str], metadata: Mapping[str, str]) -> tuple[str, str] | None:
    if option is not None:
        return option, "option"
    if "v_pred" in keys:
        return "v_prediction", "marker key v_pred"
    for name in METADATA:
        if name in metadata:
            value = metadata[name].strip().lower()
            if value not in SPELLINGS:
                raise ValueError(f"metadata {name}={metadata[name]!r} is not known: pass --prediction-type")
            return SPELLINGS[value], f"metadata {name}"
    return None


def _zero_terminal_snr(option: bool | None, keys: Collection[str]) -> tuple[bool, str] | None:
    if option is not None:
        return option, "option"
    return (True, "marker key ztsnr") if "ztsnr" in keys else None
