"""Pictures that a run is given: checked whole where they are named, and read again where they are drawn from.

This module imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutdiff.files import BadFile, contents, reworded
from cutdiff.options import short

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 1 << 27
"""The most pixels of a picture, 11585 × 11585: in float32, as they are resized, 1.6 gigabytes."""
MAX_BYTES = 1 << 30
"""The size of the largest file of a picture that is read."""
WIDE = ("PNG", "PPM")
"""The formats whose "I", as some versions of Pillow call it, has 16 bits."""


@dataclass(frozen=True)
class Picture:
    """A picture, or as many as there are prompts, all of one size, by their name and the hash of what is in them."""

    option: str
    """The option of the run that it is."""
    name: str
    """The name of its file, or "pixels"."""
    sha256: str
    """The hash of the bytes of its file, or of its pixels."""
    width: int
    height: int
    count: int = 1
    notices: tuple[str, ...] = field(default=(), compare=False)
    """The things that a user should know of how it was read."""
    source: Any = field(default=None, compare=False, repr=False)
    """The path of its file, or its pixels."""

    def pixels(self) -> np.ndarray:
        """Its pixels (count, height, width, 3), float32 in [0, 1]. ValueError where its file has changed."""
        if not isinstance(self.source, Path):
            return self.source
        pixels, sha256, _ = _of_file(self.option, self.source)
        if sha256 != self.sha256:
            raise BadFile(f"{self.option}={self.source} has changed since the run began: start again")
        return pixels

    @cached_property
    def white(self) -> float:
        """The share of its pixels that are white, or nearer to white than to black, as a mask has it."""
        return float(is_white(self.pixels()).mean())

    def described(self) -> dict[str, str]:
        """The picture as a record has it."""
        return {"name": self.name, "sha256": self.sha256}


def is_white(pixels: np.ndarray) -> np.ndarray:
    """True for the pixels of (B, H, W, 3) whose channels' mean is nearer to white than to black, (B, H, W)."""
    return pixels.mean(axis=3) >= 0.5


def as_picture(option: str, value: Any) -> Picture | None:
    """The picture that an option is given: a path, a PIL image, an array (H, W), (H, W, 3) or (B, H, W, 3), or a tensor
    (3, H, W) or (B, 3, H, W), of 8 bits or floats in [0, 1]; None where that is None.

    ValueError, which names option, value and remedy, where it is none; BadFile where a file is none, or one that cannot
    be read to its end.
    """
    if value is None or isinstance(value, Picture):
        return value
    if isinstance(value, str | os.PathLike):
        if not os.fspath(value):
            raise ValueError(f"{option}='' names no file: give a picture")
        path = Path(value)
        pixels, sha256, notices = _of_file(option, path)
        return _picture(option, path.name, sha256, pixels, notices, path)
    pixels, notices = _of_object(option, value)
    sha256 = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    return _picture(option, "pixels", sha256, pixels, notices, pixels)


def _picture(
    option: str, name: str, sha256: str, pixels: np.ndarray, notices: list[str], source: Path | np.ndarray
) -> Picture:
    count, height, width, _ = pixels.shape
    return Picture(option, name, sha256, width, height, count, tuple(notices), source)


def _of_file(option: str, path: Path) -> tuple[np.ndarray, str, list[str]]:
    """The pixels of a file (1, H, W, 3), the hash of its bytes, and notices."""
    try:
        data = contents(path, MAX_BYTES)
    except (FileNotFoundError, ValueError) as error:
        raise reworded(error, f"{option}={error}") from None
    if not data:
        raise BadFile(f"{option}={path} has 0 bytes: give a picture")
    try:
        pixels, notices = _decoded(option, str(path), lambda: _opened(data))
    except ValueError as error:
        raise BadFile(str(error)) from None
    return pixels, hashlib.sha256(data).hexdigest(), notices


def _opened(data: bytes) -> Any:
    """The first picture of a file, not yet decoded; its checksums are compared, which decoding alone does not."""
    from PIL import Image

    Image.open(BytesIO(data)).verify()
    return Image.open(BytesIO(data))


def _decoded(option: str, what: str, open_it: Callable[[], Any]) -> tuple[np.ndarray, list[str]]:
    """The pixels (1, H, W, 3) of a PIL image, upright, and notices."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    notices: list[str] = []
    said = f"{option}={what}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures below its own limit, and of odd tags
        try:
            image = open_it()
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                notices.append(f"{said} holds {frames} pictures: the first is taken")
            _check_size(said, image.width * image.height)
            if image.format == "EPS":
                raise _Refused(f"{said} is PostScript, which another program would draw: save it as a PNG")
            image.load()
            kind, wide = image.mode, image.format in WIDE
            image = ImageOps.exif_transpose(image)
            pixels = _rgb(said, image, kind, wide, notices)
            return _shape_of_alpha(said, image, pixels, notices) if option == "mask" else pixels, notices
        except _Refused as error:
            raise ValueError(str(error)) from None
        except Image.DecompressionBombError as error:  # Pillow has a limit of its own, which is greater
            digits = re.findall(r"\d{9,}", str(error))
            raise ValueError(_too_large(said, digits[0] if digits else "too many")) from None
        except UnidentifiedImageError:
            raise ValueError(f"{said} has no format that is known here: give a PNG or a JPEG") from None
        except Exception as error:  # Pillow lets its decoders raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{said} cannot be read to its end ({reason:.200}): save it anew") from None


class _Refused(ValueError):
    """An error whose message names its cause."""


def _check_size(said: str, num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise _Refused(_too_large(said, num_pixels))
    if not num_pixels:
        raise _Refused(f"{said} has no pixels: give a picture")


def _too_large(said: str, num_pixels: object) -> str:
    return f"{said} has {num_pixels} pixels, more than MAX_PIXELS={MAX_PIXELS}, the most that are read: make it smaller"


def _rgb(said: str, image: Any, kind: str, wide: bool, notices: list[str]) -> np.ndarray:
    """The pixels (1, H, W, 3) of a PIL image of the mode `kind`."""
    import numpy as np
    from PIL import Image

    if kind.startswith("I;16") or (kind == "I" and wide):
        gray = np.asarray(image, dtype=np.float32) / 65535
        return np.repeat(gray[None, :, :, None], 3, axis=3)
    try:
        if _has_alpha(image):
            rgba = image.convert("RGBA")
            if rgba.getextrema()[3][0] < 255:
                notices.append(f"{said} has transparent parts, which are laid on white")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        if kind in ("I", "F"):
            raise ValueError
        rgb = image.convert("RGB")
    except ValueError:
        raise _Refused(f"{said} has pixels of the mode {kind}: save it as RGB, of 8 or 16 bits") from None
    pixels = np.array(rgb, dtype=np.float32)[None]
    pixels /= 255  # in place, as large pictures take gigabytes
    return pixels


def _has_alpha(image: Any) -> bool:
    return "A" in image.mode or "transparency" in image.info


def _shape_of_alpha(said: str, image: Any, pixels: np.ndarray, notices: list[str]) -> np.ndarray:
    """The pixels (1, H, W, 3) of a mask: those of its alpha channel where it is white on nothing, so that it would be
    white all over; the notice that it is laid on white is then another."""
    import numpy as np

    if not _has_alpha(image) or not is_white(pixels).all():
        return pixels
    alpha = np.asarray(image.convert("RGBA"), dtype=np.float32)[None, :, :, 3:].repeat(3, axis=3) / 255
    if is_white(alpha).all() or not is_white(alpha).any():
        return pixels
    notices[-1] = f"{said} is white all over but for its transparent parts, which are taken for black"
    return alpha


def _of_object(option: str, value: Any) -> tuple[np.ndarray, list[str]]:
    """The pixels (B, H, W, 3) of a PIL image, an array or a tensor, and notices."""
    import numpy as np
    from PIL import Image

    if isinstance(value, Image.Image):
        return _decoded(option, f"{type(value).__name__} of {value.size}", lambda: value.copy())
    is_tensor = not isinstance(value, np.ndarray)
    if is_tensor and not hasattr(value, "detach"):
        several = "; several, as one array (B, H, W, 3) or tensor (B, 3, H, W)" * isinstance(value, tuple | list)
        raise ValueError(
            f"{option}={short(value)} must be a file, a PIL image, an array (H, W, 3) or a tensor (3, H, W){several}"
        )
    array: Any = value
    if is_tensor:
        array = value.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        array = np.moveaxis(array, -3, -1) if array.ndim > 2 else array
    array = array[..., None] if array.ndim == 2 else array
    array = array[None] if array.ndim == 3 else array
    said = f"{option}={type(value).__name__} of {tuple(value.shape)}"
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape:
        shapes, place = ("(3, H, W) or (B, 3, H, W)", "first") if is_tensor else ("(H, W, 3) or (B, H, W, 3)", "last")
        remedy = "give a picture"
        if array.ndim == 4 and 0 in array.shape:
            remedy = "it has no pixels"
        elif array.ndim == 4 and array.shape[1 if not is_tensor else 2] in (1, 3):
            remedy = f"move channels {place}"
        elif array.ndim == 4:
            remedy = f"it has {array.shape[3]} channels, and 1 or 3 are read"
        raise ValueError(f"{said} must be {shapes}: {remedy}")
    _check_size(said, array.shape[1] * array.shape[2])
    pixels = np.array(np.broadcast_to(array, (*array.shape[:3], 3)), dtype=np.float32, order="C")
    if array.dtype == np.uint8:
        return pixels / 255, []
    low, high = pixels.min(), pixels.max()
    if array.dtype.kind not in "fb" or not (low >= 0 and high <= 1):  # NaN is not either
        values = f"{value.dtype} from {low:g} to {high:g}"
        raise ValueError(f"{said} holds {values}: give 8 bits, or floats in [0, 1]")
    return pixels, []
