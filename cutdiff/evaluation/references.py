"""Compare pictures of any model with a folder of reference images: FID, KID, IS and CLIP score, whole and in crops.

FID (Heusel et al. 2017), KID (Bińkowski et al. 2018) and IS (Salimans et al. 2016) are torchmetrics'; the CLIP score
(Hessel et al. 2021, cosines times 100) is computed with transformers' CLIP. The networks are files of the user's own,
because nothing is downloaded and because published numbers depend on them. FID and KID grow and vary where there are
few pictures: the papers of this field take thousands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from cutdiff.checkpoint.read import read_json
from cutdiff.checkpoint.tokenizer import read_tokenizer
from cutdiff.evaluation.score import Score, mean_score
from cutdiff.files import opened, size_of

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

Size = tuple[int, int]
"""Width and height, in Pillow's order."""
ZIP = b"PK\x03\x04"
"""The first bytes of a TorchScript file, which is a zip archive."""
PREPARING = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
"""The fields of a CLIP model's files that say how a picture is prepared for it."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
CROPS = 10
"""Number of native-size crops of each picture, at random places, as in the papers (CutDiffusion, section 4.1)."""
SUBSET, SPLITS = 100, 10
"""The number of pictures in each of KID's subsets (all, where there are fewer), and the number of splits that IS is
averaged over (one, where there are fewer than a hundred pictures)."""


@dataclass(frozen=True)
class References:
    """The images that pictures are compared with, and the networks that compare them."""

    images: list[Path]
    network: torch.jit.ScriptModule
    """(N, 3, H, W) uint8 of any size -> features (N, d) with `return_features=True`, else class probabilities (N, k).

    An example is the Inception file that the StyleGAN family shares, inception-2015-12-05.pt.
    """
    clip: tuple[CLIPModel, CLIPProcessor] | None = None
    device: torch.device | str = "cpu"
    _features: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def load(folder: Path, features: Path, clip: Path | None, device: torch.device | str = "cpu") -> References:
        """Read the networks and open every image; ValueError where one of them is of no use.

        features: a TorchScript file.
        clip: a folder with a CLIP model, its processor and tokenizer, as transformers saves them.
        """
        for what, path in (("references", folder), ("features", features), ("clip", clip)):
            if path is not None and not path.exists():
                raise ValueError(f"--{what} {path} does not exist: pass a path of your own, nothing is downloaded")
        if find_spec("torchmetrics") is None:
            raise ValueError("--references needs torchmetrics: pip install 'cutdiff[references]'")
        no_script = ValueError(
            f"--features {features} is no TorchScript file: pass one such as inception-2015-12-05.pt"
        )
        with opened(features) as file:
            if file.read(min(len(ZIP), size_of(file))) != ZIP:
                raise no_script
        try:
            network = torch.jit.load(features, map_location=device).eval()
        except RuntimeError:
            raise no_script from None
        return References(_images(folder), network, None if clip is None else _load_clip(clip, device), device)

    @torch.no_grad()
    def features(self, paths: Sequence[Path], size: Size, crop: int | None) -> Tensor:
        """Features of pictures at `size` (width, height), or of their crops: (N or N·CROPS, d)."""
        parts = _parts(paths, size, crop)
        return torch.cat([self.network(part.to(self.device), return_features=True).float().cpu() for part in parts])

    @torch.no_grad()
    def probabilities(self, paths: Sequence[Path], size: Size, crop: int | None) -> Tensor:
        """Class probabilities of pictures at `size` (width, height), or of their crops: (N or N·CROPS, k).

        The bias of the last layer is left out where the network has an option for that, as in the published IS.
        """
        known = {argument.name for argument in self.network.forward.schema.arguments}  # pyright: ignore[reportFunctionMemberAccess]
        options = {"no_output_bias": True} if "no_output_bias" in known else {}
        parts = _parts(paths, size, crop)
        return torch.cat([self.network(part.to(self.device), **options).float().cpu() for part in parts])

    @property
    def num_features(self) -> int:
        """The features of a picture, once any was measured."""
        return next(iter(self._features.values())).shape[1]

    def truth(self, size: Size, crop: int | None) -> Tensor:
        """Features of the references at `size`, or of their crops, computed once for each size."""
        key = (*size, crop)
        if key not in self._features:
            self._features[key] = self.features(self.images, size, crop)
        return self._features[key]


def compare(pictures: Sequence[Path], prompts: Sequence[str], references: References, native: int) -> dict[str, Score]:
    """Score pictures, one for each prompt and all of one size, against the references at that size.

    Crops are squares of `native` pixels. A reference is enlarged or shrunk until it covers the picture's size, and its
    middle is taken. The interval of the CLIP score is the 95% bootstrap interval. That of KID and IS reaches two
    standard deviations over their subsets and splits to either side, where there are enough pictures for more than one
    of these. FID has none.
    """
    with Image.open(pictures[0]) as first:
        size = first.size
    scores = {}
    for name, crop in (("whole", None), ("crops", native)):
        ours, truth = references.features(pictures, size, crop), references.truth(size, crop)
        scores |= {f"{key} {name}": value for key, value in _distances(ours, truth).items()}
        scores[f"IS {name}"] = _inception_score(references.probabilities(pictures, size, crop))
    if references.clip is not None:
        scores["CLIP"] = mean_score(clip_scores(pictures, prompts, *references.clip))
    return scores


def _distances(ours: Tensor, truth: Tensor) -> dict[str, Score]:
    """Compute torchmetrics' FID and KID of features (N, d) and (M, d), which they are given in place of pictures."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    given = nn.Identity()
    given.num_features = ours.shape[1]  # pyright: ignore[reportArgumentType]  (torchmetrics reads it)
    subset = min(SUBSET, len(ours), len(truth))
    frechet, kernel = FrechetInceptionDistance(given), _buffering(KernelInceptionDistance, given, subset_size=subset)
    for metric in (frechet, kernel):
        metric.update(truth, real=True)
        metric.update(ours, real=False)
    spread = None if subset == len(ours) == len(truth) else 2
    return {"FID": Score(frechet.compute().item(), None, None), "KID": _drawn(kernel, spread)}


def _inception_score(probabilities: Tensor) -> Score:
    """Compute torchmetrics' IS of class probabilities (N, k), in one split where there are few pictures."""
    from torchmetrics.image.inception import InceptionScore

    splits = SPLITS if len(probabilities) >= SPLITS**2 else 1
    inception = _buffering(InceptionScore, nn.Identity(), splits=splits)
    # It expects logits, and the softmax of these is the probabilities; it takes the deviation even of a single split.
    inception.update(probabilities.clamp(min=torch.finfo(torch.float32).tiny).log())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "std\\(\\): degrees of freedom")
        return _drawn(inception, None if splits == 1 else 2)


def _buffering(metric: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Make a metric that keeps all that it is given; it warns of the memory, which is little for features."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric .* will save all extracted features")
        return metric(*args, **options)


def _drawn(metric: Any, spread: float | None) -> Score:
    """Compute a metric that draws its subsets from the global generator so that it is the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, std = (value.item() for value in metric.compute())
    return Score(mean, None, None) if spread is None else Score(mean, mean - spread * std, mean + spread * std)


@torch.no_grad()
def clip_scores(pictures: Sequence[Path], prompts: Sequence[str], model: CLIPModel, processor: CLIPProcessor) -> Tensor:
    """100 times the cosine between each picture and its prompt, at least 0: (N,)."""
    cosines = []
    for path, prompt in zip(pictures, prompts, strict=True):
        with Image.open(path) as image:
            given = {"text": [prompt], "images": image.convert("RGB"), "return_tensors": "pt", "truncation": True}
            inputs = processor(**given).to(model.device)
        output = model(**inputs)
        cosines.append(F.cosine_similarity(output.image_embeds, output.text_embeds).cpu())
    return 100 * torch.cat(cosines).clamp(min=0)


def _load_clip(folder: Path, device: torch.device | str) -> tuple[CLIPModel, CLIPProcessor]:
    """The model and its processor. Only the model is read by transformers, which for the rest would open whatever the
    files of the folder name."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        text: Any = model.config.text_config
        tokenizer = read_tokenizer(folder, text.max_position_embeddings)
        file, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
        fields = read_json(file) if file.exists() else read_json(nested).get("image_processor", {})
        images = CLIPImageProcessor(**{name: fields[name] for name in PREPARING if name in fields})
        processor = CLIPProcessor(images, tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(f"--clip {folder} is no CLIP model: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), processor  # pyright: ignore[reportArgumentType]  (transformers' own annotation)


def _images(folder: Path) -> list[Path]:
    """List the images in a folder; ValueError unless there are two, and each can be opened."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if len(paths) < 2:
        raise ValueError(f"--references {folder} holds {len(paths)} images ({', '.join(ENDINGS)}): 2 are needed")
    for path in paths:
        with opened(path) as file:
            try:
                Image.open(file).close()
            except UnidentifiedImageError:
                raise ValueError(f"--references: {path} is no image: remove or replace it") from None
    return paths


def _parts(paths: Sequence[Path], size: Size, crop: int | None) -> Iterator[Tensor]:
    """Read each picture at `size` (width, height), or CROPS crops of it: (1 or CROPS, 3, H, W), uint8."""
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
