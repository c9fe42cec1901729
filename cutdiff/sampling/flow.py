"""Flow matching: models that were trained on straight lines between pictures and noise, at times from 0 to 1.

The state of the network is (1 − t)·x0 + t·noise, and its prediction the velocity noise − x0. Here it is that of a sigma
in another scale: (x0 + sigma·noise) / (1 + sigma), with sigma = t / (1 − t). So Euler's step, whatever draws on x0, and
fresh noise are the same as for all models. Only what takes the mean of two slopes has to know that lines are straight
in t, which is `time`.

The times of a run are those of the published FlowMatchEulerDiscreteScheduler, as the pipelines call it.
Sources: Lipman et al. 2022 (arXiv 2210.02747); Liu et al. 2022 (2209.03003); Esser et al. 2024 (2403.03206), section
5.3.2, for the shift.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cutdiff.sampling.noise import LEAST, MAX_TIMESTEPS, MOST, check_spread
from cutdiff.sampling.preconditioning import Coefficients, flow
from cutdiff.sampling.spreads import SPREADS

NOISIEST = 2.0**44
"""The sigma that stands for the infinite one of t = 1: float64 and float32 both know the state there as pure noise."""
SHIFT_TYPES = ("exponential", "linear")
FLOW_SPACINGS = ("trailing", "linspace")
"""The rules for the times before their shift: "trailing" goes in n equal steps from 1 to 0, as the pipelines of FLUX.1
ask for, and "linspace" in n − 1 from 1 to the training's first, as that of SD3 leaves it to the scheduler."""
MAX_MU = 10.0
MAX_TOKENS = 2**31


@dataclass(frozen=True)
class FlowConfig:
    """The times that a model was trained on, and those that its sampler picks.

    Its fields are those of a published scheduler but for the last two. The defaults are FLUX.1-schnell's.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    """The factor s by which the odds t / (1 − t), which are sigma, are larger than those of even times."""
    use_dynamic_shifting: bool = False
    """The shift depends on the tokens of the picture, and not on `shift`."""
    base_shift: float = 0.5
    """The μ of a picture of `base_image_seq_len` tokens; the shift is exp(μ), or with "linear" μ itself."""
    max_shift: float = 1.15
    """The μ of one of `max_image_seq_len` tokens, beyond which it grows on, linear in the tokens."""
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    """The last time above 0, to which all are stretched; None: as they are."""
    use_karras_sigmas: bool = False
    """Between the first time and the last they lie as sigmas do by the rule of Karras et al. 2022."""
    use_exponential_sigmas: bool = False
    """Likewise, even steps of log t."""
    use_beta_sigmas: bool = False
    """Likewise, the quantiles of a beta distribution (Lee et al. 2024)."""
    timestep_spacing: str = "trailing"
    """The times before the shift, one of `FLOW_SPACINGS`."""
    image_seq_len: int | None = None
    """The number of tokens that a dynamic shift is made for; None: `max_image_seq_len`."""

    def __post_init__(self) -> None:
        for name, known in (("time_shift_type", SHIFT_TYPES), ("timestep_spacing", FLOW_SPACINGS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
        check_spread(self)
        bounds = {"shift": (LEAST, MOST), "base_shift": (-MAX_MU, MAX_MU), "max_shift": (-MAX_MU, MAX_MU)}
        for name, (least, most) in bounds.items():
            if type(value := getattr(self, name)) not in (int, float) or not least <= value <= most:
                raise ValueError(f"{name}={value!r} must be a number from {least:g} to {most:g}")
        lengths = ("base_image_seq_len", "max_image_seq_len")
        for name, most in (("num_train_timesteps", MAX_TIMESTEPS), *((name, MAX_TOKENS) for name in lengths)):
            if type(value := getattr(self, name)) is not int or not 1 <= value <= most:
                raise ValueError(f"{name}={value!r} must be a whole number from 1 to {most}")
        if (end := self.shift_terminal) is not None and (type(end) not in (int, float) or not 0 < end < 1):
            raise ValueError(f"shift_terminal={end!r} must lie between 0 and 1, or be left out")
        if not self.use_dynamic_shifting:
            return
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError(
                f"base_image_seq_len={self.base_image_seq_len} must be below max_image_seq_len={self.max_image_seq_len}"
            )
        if not LEAST <= self.factor <= MOST:
            raise ValueError(
                f"base_shift={self.base_shift} and max_shift={self.max_shift} give {self.tokens} tokens the "
                f"shift {self.factor:g}, which must lie in {LEAST:g} … {MOST:g}"
            )

    @property
    def tokens(self) -> int:
        """The number of tokens that a dynamic shift is made for."""
        return self.max_image_seq_len if self.image_seq_len is None else self.image_seq_len

    @property
    def factor(self) -> float:
        """The shift of a run."""
        if not self.use_dynamic_shifting:
            return self.shift
        length, base = self.max_image_seq_len - self.base_image_seq_len, self.base_image_seq_len
        mu = self.base_shift + (self.max_shift - self.base_shift) / length * (self.tokens - base)
        return mu if self.time_shift_type == "linear" else math.exp(min(mu, 700.0))

    @property
    def prediction_type(self) -> str:
        """The published schedulers' name of what the network predicts."""
        return "flow_prediction"

    @property
    def sigma_max(self) -> float:
        """The sigma of the noisiest time."""
        return NOISIEST

    def described(self) -> dict[str, Any]:
        """The entries of a record."""
        return {"prediction_type": self.prediction_type, "flow": asdict(self)}

    def shifted_for(self, tokens: int) -> FlowConfig:
        """The same for a picture of so many tokens."""
        return replace(self, image_seq_len=tokens) if self.use_dynamic_shifting else self

    def shifted_by(self, shift: float) -> FlowConfig:
        """The same with this shift whatever the tokens."""
        return replace(self, shift=shift, use_dynamic_shifting=False)

    def coefficients(self, sigma: float) -> Coefficients:
        """The numbers that turn the network's output into an estimate of x0."""
        return flow(sigma)

    def time(self, sigma: float) -> float:
        """The time t of a sigma, in which the network's state runs along straight lines."""
        return sigma / (1 + sigma)

    def of_time(self, time: float) -> float:
        """The sigma of a time."""
        return min(time / (1 - time), NOISIEST) if time < 1 else NOISIEST

    def timestep(self, sigma: float) -> float:
        """The number that tells the network of a sigma."""
        return self.num_train_timesteps * self.time(sigma)

    def sigma(self, timestep: float) -> float:
        """The sigma that a number tells the network of."""
        return self.of_time(timestep / self.num_train_timesteps)

    def fraction(self, timestep: float) -> float:
        """The place of a timestep in the schedule: its time before the shift, from 1, the noisiest, to 0."""
        return self._shifted(timestep / self.num_train_timesteps, 1 / self.factor)

    def timestep_at(self, fraction: float) -> float:
        """The timestep at such a place."""
        return self.num_train_timesteps * self._shifted(fraction, self.factor)

    def sigmas(self, num_steps: int) -> list[float]:
        """The sigmas of a run, falling, without the 0 at its end."""
        return [self.of_time(time) for time in self._times(num_steps)]

    def ends(self, num_steps: int) -> tuple[float, float]:
        """The first sigma of a run of so many steps and its last one above 0."""
        sigmas = self.sigmas(num_steps)
        return sigmas[0], sigmas[-1]

    def init_scale(self, sigma: float) -> float:
        """The factor of the noise that a run begins with at a sigma: the network is shown the noise as it is."""
        return 1 + sigma

    def _times(self, num_steps: int) -> list[float]:
        last = 1 / num_steps
        if self.timestep_spacing == "linspace":
            # The published scheduler shifts the end of its range by itself, and then all times.
            last = self._shifted(1 / self.num_train_timesteps, 1.0 if self.use_dynamic_shifting else self.shift)
        times = [self._shifted(float(time), self.factor) for time in np.linspace(1.0, last, num_steps)]
        if self.shift_terminal is not None and num_steps > 1:
            stretch = (1 - self.shift_terminal) / (1 - times[-1])
            times = [1 - (1 - time) * stretch for time in times]
        spread = next((make for name, make in SPREADS.items() if getattr(self, name)), None)
        return times if spread is None else spread(times[0], times[-1], num_steps)

    @staticmethod
    def _shifted(time: float, shift: float) -> float:
        """The time whose odds are `shift` times as large."""
        return shift * time / (1 + (shift - 1) * time)
