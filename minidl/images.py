"""Images that users bring -> uint8 arrays, as data sets hold them. Nothing in a file is trusted: its size least of all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minidl.device import Array
from minidl.errors import DataError
from minidl.extras import library

if TYPE_CHECKING:
    from PIL.Image import Image

# Those that Pillow reads by itself: for EPS it starts a program that executes the file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def read(path: str | os.PathLike[str], side: int) -> Array:
    """The image in a file -> uint8 (3, side, side): upright, the square in its middle, over white where one sees through it.

    Of an animation it is the first picture. Raises DataError where it cannot be read, UsageError without Pillow.
    """
    pillow = library("PIL.Image", "plot")
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for whoever writes to it
            raise ValueError("it is not a file")
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a damaged file may still be
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            if not file.read(1):
                raise ValueError("it is empty")
            file.seek(0)
            with pillow.open(file, formats=FORMATS) as image:
                square = _rgb(_square(image)).resize((side, side), pillow.Resampling.LANCZOS)
    except pillow.UnidentifiedImageError:
        raise DataError(f"{path} cannot be read: it is none of {', '.join(FORMATS)}, or damaged") from None
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError):
        raise DataError(f"{path} cannot be read: it declares more than {pillow.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # a damaged file may raise anything
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0][:200] or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}") from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _square(image: Image) -> Image:
    """The square in the middle of an image, which is turned as its camera says that it was held."""
    image = library("PIL.ImageOps", "plot").exif_transpose(image)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _rgb(image: Image) -> Image:
    """An image of any kind in red, green and blue."""
    pillow = library("PIL.Image", "plot")
    if image.mode == "F":
        raise ValueError("its pixels are real numbers, and nothing says which one is white")
    if image.mode.startswith("I"):  # gray in 16 bits, which Pillow would cut off at 255
        gray = np.rint(np.clip(np.asarray(image), 0, 65535) / 257)
        return pillow.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
