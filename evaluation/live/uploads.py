"""Images that somebody hands in: looked at before they are decoded, and refused in one line."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageOps

from datasets.reader import read_image
from forgetting.errors import ProblemError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # none of them starts a program
FILES, MEGABYTES, MEGAPIXELS = 12, 20, 50  # at most: at once, of a file, of what it unpacks to
THUMB = 192  # pixels of the longer side of what is shown


def read_upload(path: str | Path) -> Image.Image:
    """A file as RGB, upright.

    Raises:
        ProblemError: no image of `FORMATS`, one that is too large, or torn; with the file's name.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > MEGABYTES * 1e6:
            raise ProblemError(f"larger than {MEGABYTES} MB")
        try:
            with Image.open(path, formats=FORMATS) as image:  # reads the header alone
                width, height = image.size
        except Image.DecompressionBombError:
            width = height = 10**6
        except Exception as error:  # Pillow raises whatever broken bytes lead it to
            raise ProblemError(f"no image that is read here ({', '.join(FORMATS)})") from error
        if width * height > MEGAPIXELS * 1e6:
            raise ProblemError(f"more than {MEGAPIXELS} million pixels")
        return ImageOps.exif_transpose(read_image(path))
    except ProblemError as error:
        raise ProblemError(f"{path.name[-60:]}: {error}") from error


def thumbnail(image: Image.Image) -> str:
    """A small copy as a data URI."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((THUMB, THUMB))
    small.save(file, "WEBP", lossless=max(small.size) < THUMB, quality=90)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
