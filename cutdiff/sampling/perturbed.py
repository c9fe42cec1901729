"""Perturbed-attention guidance, which needs a third estimate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from cutdiff.models.backbone import Backbone
from cutdiff.models.inside import replaced
from cutdiff.models.unet import TransformerBlock
from cutdiff.options import MAX_FLOAT32, Between, Options, Scale


@dataclass(frozen=True)
class PAG(Options):
    """Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377) beside classifier-free guidance.

    It adds pag_scale · (conditional − third), the third estimate being that of the prompt by a network in which some
    layers of self-attention attend from each position to that alone. With guidance_scale=1 it stands alone.
    """

    changes_network: ClassVar[bool] = True
    unet_only: ClassVar[str] = "changes self-attentions"

    guidance_scale: Scale = 7.5
    """The scale of classifier-free guidance; 1 or less is off."""
    pag_scale: Annotated[float, Between(0, MAX_FLOAT32)] = 3.0
    """The scale of perturbed attention; 0 is off."""
    pag_layers: tuple[str, ...] = ("mid",)
    """The beginnings of the names of the layers that are changed, as checkpoints have them: mid, up_blocks.1, …"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pag_layers:
            raise ValueError("pag_layers=() changes nothing: name a layer, such as mid, or give pag_scale=0")

    def scale_at(self, sigma: float, step: int) -> float:
        return self.guidance_scale

    def change_scale_at(self, sigma: float, step: int) -> float:
        return self.pag_scale

    @contextmanager
    def changed(self, network: Backbone[Any]) -> Iterator[None]:
        """Let layers of self-attention give the values as they are. ValueError where a name is that of no layer."""
        layers = {n: m.attn1 for n, m in network.named_modules() if isinstance(m, TransformerBlock)}
        for name in self.pag_layers:
            if not any(layer.startswith(name) for layer in layers):
                known = ", ".join(dict.fromkeys(layer.partition(".attentions")[0] for layer in layers)) or "none"
                raise ValueError(f"pag_layers={name!r} begins no name of a self-attention layer: they are in {known}")
        with ExitStack() as changes:
            for name, attention in layers.items():
                if name.startswith(self.pag_layers):
                    changes.enter_context(replaced(attention, attend=lambda q, k, v: v))
            yield

    def __call__(
        self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int, third: Tensor | None = None
    ) -> Tensor:
        guided = unconditional + self.guidance_scale * (conditional - unconditional)
        return guided if third is None else guided + self.pag_scale * (conditional - third)
