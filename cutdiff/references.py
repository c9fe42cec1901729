"""Compare pictures of any model with a folder of reference images: FID, KID, IS and CLIP score, whole and in crops.

FID (Heusel et al. 2017), KID (Bińkowski et al. 2018) and IS (Salimans et al. 2016) are torchmetrics'; the CLIP score
(Hessel et al. 2021, cosines times 100) is that of transformers' CLIP. The networks are files of the user's own, because
nothing is downloaded, and because published numbers differ by them. FID and KID grow and vary with few pictures: the
papers of this field take thousands.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from cutdiff.scenes.score import Score, mean_score

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
CROPS = 10
"""Native-size crops of each picture, at random places: as the papers do (CutDiffusion, section 4.1)."""
SUBSET, SPLITS = 100, 10
"""Pictures in each of KID's subsets (all, where there are fewer), and the parts that IS is averaged over."""


@dataclass(frozen=True)
class References:
    """What pictures are compared with, and by which networks."""

    images: list[Path]
    features: Path
    """TorchScript: (N, 3, H, W) uint8 of any size -> features (N, d) with `return_features=True`, else class
    probabilities (N, k). The Inception file that the StyleGAN family shares, inception-2015-12-05.pt, is such a one."""
    clip: Path | None = None
    """A folder with a CLIP model, its processor and its tokenizer, as transformers saves them."""

    @staticmethod
    def find(folder: Path, features: Path, clip: Path | None) -> References:
        """ValueError, before anything is drawn, where a file is missing or nothing can be compared."""
        for what, path in (("references", folder), ("features", features), ("clip", clip)):
            if path is not None and not path.exists():
                raise ValueError(f"--{what} {path} does not exist: pass a path of your own, nothing is downloaded")
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
        if len(images) < 2:
            raise ValueError(f"--references {folder} holds {len(images)} images ({', '.join(ENDINGS)}): 2 are needed")
        try:
            import torchmetrics  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError("--references needs torchmetrics: pip install 'cutdiff[references]'") from None
        return References(images, features, clip)


def compare(pictures: Sequence[Path], prompts: Sequence[str], references: References, native: int) -> dict[str, Score]:
    """Scores of pictures, one for each prompt and all of one size, against the references at that size.

    Crops are squares of `native` pixels. A reference is enlarged or shrunk to cover the picture's size, its middle is
    taken. KID and IS have two standard deviations over their subsets and splits to either side as an interval, the
    CLIP score its 95% bootstrap interval; FID has none.
    """
    with Image.open(pictures[0]) as first:
        width, height = first.size
    if min(height, width) < native:
        raise ValueError(f"pictures of {height} × {width} px have no crops of {native} px")
    network = torch.jit.load(references.features).eval()
    scores = {}
    for name, crop in (("whole", None), ("crops", native)):
        ours, truth = (
            _Read.by(network, _parts(paths, (width, height), crop)) for paths in (pictures, references.images)
        )
        scores |= {f"{key} {name}": value for key, value in _distances(ours, truth).items()}
    if references.clip is not None:
        scores["CLIP"] = mean_score(clip_scores(pictures, prompts, references.clip))
    return scores


@dataclass(frozen=True)
class _Read:
    """What the network says of a set of N pictures."""

    features: Tensor
    """(N, d)"""
    probabilities: Tensor
    """(N, k)"""

    @staticmethod
    @torch.no_grad()
    def by(network: nn.Module, parts: Iterable[Tensor]) -> _Read:
        answers = [(network(part, return_features=True), network(part)) for part in parts]
        features, probabilities = (torch.cat(column).float() for column in zip(*answers, strict=True))
        return _Read(features, probabilities)


def _distances(ours: _Read, truth: _Read) -> dict[str, Score]:
    """torchmetrics' metrics, which are given features where they expect pictures, so that each is computed once."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    given = nn.Identity()
    given.num_features = ours.features.shape[1]  # pyright: ignore[reportArgumentType]  (where torchmetrics looks)
    num = min(len(ours.features), len(truth.features))
    frechet = FrechetInceptionDistance(given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric .* will save all extracted features")
        kernel = KernelInceptionDistance(given, subset_size=min(SUBSET, num))
        inception = InceptionScore(given, splits=min(SPLITS, len(ours.features)))
    for metric in (frechet, kernel):
        metric.update(truth.features, real=True)
        metric.update(ours.features, real=False)
    inception.update(ours.probabilities.log())  # it takes logits, whose softmax these are
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # subsets and splits are drawn from the global generator
        spread = {"KID": kernel.compute(), "IS": inception.compute()}
    return {"FID": Score(frechet.compute().item(), None, None)} | {
        name: Score(mean.item(), (mean - 2 * std).item(), (mean + 2 * std).item())
        for name, (mean, std) in spread.items()
    }


@torch.no_grad()
def clip_scores(pictures: Sequence[Path], prompts: Sequence[str], folder: Path) -> Tensor:
    """100 times the cosine between each picture and its prompt, not below 0: (N,)."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    cosines = []
    for path, prompt in zip(pictures, prompts, strict=True):
        with Image.open(path) as image:
            given = {"text": [prompt], "images": image.convert("RGB"), "return_tensors": "pt", "truncation": True}
            inputs = processor(**given)
        found = model(**inputs)
        cosines.append(F.cosine_similarity(found.image_embeds, found.text_embeds))
    return 100 * torch.cat(cosines).clamp(min=0)


def _parts(paths: Sequence[Path], size: tuple[int, int], crop: int | None) -> Iterator[Tensor]:
    """Each picture, or its crops, at `size` (width, height): (1 or CROPS, 3, H, W), uint8."""
    generator = np.random.default_rng(0)
    for path in tqdm(paths, desc="features", leave=False, disable=None):
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)  # (3, H, W)
        if crop is None:
            yield pixels[None]
            continue
        corners = generator.integers(0, [size[1] - crop, size[0] - crop], size=(CROPS, 2), endpoint=True)
        yield torch.stack([pixels[:, top : top + crop, left : left + crop] for top, left in corners])
