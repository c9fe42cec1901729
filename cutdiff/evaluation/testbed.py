"""The testbed, on which one model draws cells for the captions of fixed scenes, and their scores against the truth."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.locate import name_of
from cutdiff.checkpoint.model import Model, dtype_name
from cutdiff.evaluation import score
from cutdiff.evaluation.cells import Cell, cost, draw_cells, folder_of, pictures
from cutdiff.evaluation.features import FeatureNet, load_features
from cutdiff.sampling.operators import view_grid
from cutdiff.scenes import world
from cutdiff.scenes.world import Scenes
from cutdiff.settings import Settings

NATIVE, FLOOR = "native", "other truth"
"""The names of the rows beside the methods': direct inference at native size, and true renders of other scenes."""


@dataclass(frozen=True)
class Testbed:
    """The first `num` scenes of a list, and a folder for the pictures of all cells that are drawn for their captions.

    `base` are the options of the native pictures, with which the cells' pictures of the same seeds are compared.
    """

    __test__ = False  # pytest takes the name for that of a class of tests

    model: Model
    base: Settings
    num: int
    folder: Path
    batch: int = 8
    """The number of pictures that are drawn at once."""
    caption_seed: int = score.CAPTION_SEED
    """The seed of the list of scenes. Options that were chosen on one list must be judged on another."""
    native_name: str = NATIVE
    """The name of the native pictures' cell."""
    _truths: dict[int, score.Facts] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.caption_seed == score.FLOOR_SEED:
            raise ValueError(f"caption_seed={self.caption_seed} is that of the scenes that the truth is compared with")

    @property
    def native(self) -> int:
        """The side of the native pictures, in pixels."""
        return self.model.native_size * self.model.factor

    @cached_property
    def scenes(self) -> Scenes:
        """The scenes whose captions are drawn."""
        return score.scenes(self.num, self.caption_seed)

    @cached_property
    def network(self) -> FeatureNet:
        """The network whose features the distances compare."""
        return load_features()

    @property
    def native_cell(self) -> Cell:
        """The cell of the native pictures."""
        return Cell(self.native_name, replace(self.base, method="direct", height=self.native, width=self.native))

    def draw(self, cells: Sequence[Cell]) -> None:
        """Draw the missing pictures of `cells` and of the native cell."""
        captions = world.captions(self.scenes.choices)
        draw_cells(self.model, [self.native_cell, *cells], captions, self.folder, batch=self.batch)

    def row(self, cell: Cell) -> dict[str, Any]:
        """The scores and the cost of a cell that was drawn."""
        images = pictures(folder_of(self.folder, cell), self.num)
        natives = None if cell.side == self.native else pictures(folder_of(self.folder, self.native_cell), self.num)
        stride = getattr(cell.settings.method, "stride", None) or self.model.native_size // 2
        scores = self._score(images, self.scenes, natives, self.borders(cell.side, stride))
        spent = cost(folder_of(self.folder, cell))
        return row_of(cell.name, cell.side, self.num, scores, spent, cell.settings.described())

    def borders(self, side: int, stride: int) -> list[int]:
        """The rows of pixels, and so the columns, at which views `stride` latents apart begin or end on a canvas of
        `side` pixels, if they do not jitter. A single view has its middle in their place."""
        size = side // self.model.factor
        window = min(self.model.native_size, size)
        begins = view_grid((size, window), (window, window), (min(stride, window), window))[:, 0]
        lines = {*begins.tolist(), *(begins + window).tolist()} - {0, size} or {size // 2}
        return sorted(line * self.model.factor for line in lines)

    def floor(self, side: int) -> dict[str, Any]:
        """The scores of true renders of other scenes, which a perfect method would have."""
        others = score.scenes(self.num, score.FLOOR_SEED)
        scores = self._score(
            score.true_renders(others, side), others, None, self.borders(side, self.model.native_size // 2)
        )
        return row_of(FLOOR, side, self.num, scores, {}, {})

    def truth(self, side: int) -> score.Facts:
        """The facts of the scenes' true renders, which are measured once for each size."""
        if side not in self._truths:
            self._truths[side] = score.gather_facts(score.true_renders(self.scenes, side), self.network, self.native)
        return self._truths[side]

    def _score(
        self, images: Tensor, shown: Scenes, natives: Tensor | None, borders: list[int]
    ) -> dict[str, score.Score]:
        facts = score.gather_facts(images, self.network, self.native)
        truth = self.truth(images.shape[3])
        return score.score(images, shown.choices, facts, truth, natives, native=self.native, borders=borders)


def row_of(
    name: str, side: int, num: int, scores: dict[str, score.Score], spent: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """A row of the results, in values that JSON can hold."""
    values = {key: asdict(value) for key, value in scores.items()}
    return {"name": name, "size": side, "num": num, "scores": values, "cost": spent, "settings": settings}


def environment(model: Model) -> dict[str, Any]:
    """The model and the machine that it runs on, for the results."""
    on_gpu = model.device.type == "cuda"
    loras = [{**vars(lora), "path": name_of(lora.path)} for lora in model.loras]
    return {
        "model": {"sha256": model.hashes, **({"loras": loras} if loras else {})},
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(model.dtype),
        "versions": {"cutdiff": cutdiff.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
