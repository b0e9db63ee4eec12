"""The four Mini sets, drawn from what pip packages bring: scikit-learn's handwritten digits,
characters in matplotlib's fonts (by their names in `unicodedata`), coloured shapes. The sets' files
and the training of `mini` (`clip.train_mini`) draw on random streams that never meet.
"""

import json
import math
import os
import unicodedata
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.log import logger
from forgetting.errors import ProblemError, unknown
from forgetting.io import atomic_path

from .table import SETS, spec
from .words.lexicon import read_list

SIDE = 32  # pixels of a finished picture
CANVAS = 64  # pixels of a master mask: twice the side, so that halving it smooths the edges
INK = 40  # pixels of the longer side of what a master mask shows
TEST_IMAGES = 20
TRAIN_IMAGES = 5
DIGIT_EVERY = 6  # every sixth handwritten digit is a test image and is never trained on
_LINE = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)

# Set -> its classes, for which words/ has other words.
MINI = {name: list(read_list(name)) for name, row in SETS.items() if row.rendered}
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# fmt: off
COLOURS = {
    "red": (215, 35, 35), "orange": (250, 140, 10), "yellow": (250, 225, 40),
    "green": (35, 150, 50), "turquoise": (50, 210, 200), "blue": (35, 65, 215),
    "purple": (130, 40, 165), "pink": (255, 140, 195), "white": (250, 250, 250),
    "black": (15, 15, 15),
}
UNICODE_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
)
# fmt: on
ASCII_FONTS = ("cmr10", "cmb10", "cmss10", "cmtt10")  # beyond ASCII their tables name other glyphs

Outline = list[tuple[float, float]]


def _polygon(corners: int, inner: float = 1.0, turn: float = -90.0) -> Outline:
    """Corners of a regular polygon in the unit circle, or of a star if `inner` is below 1."""
    count = corners if inner == 1.0 else 2 * corners
    angles = [math.radians(turn + 360 * i / count) for i in range(count)]
    radii = [1.0 if i % 2 == 0 else inner for i in range(count)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, angles, strict=True)]


def _heart() -> Outline:
    def height(t: float) -> float:
        return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)

    return [(math.sin(t) ** 3, -height(t) / 16) for t in (2 * math.pi * i / 60 for i in range(60))]


# Outlines in [-1, 1] x [-1, 1], y downwards; a second outline is cut out of the first.
# fmt: off
_CIRCLE, _SQUARE = _polygon(72), _polygon(4, turn=45.0)
SHAPES: dict[str, tuple[Outline, ...]] = {
    "circle": (_CIRCLE,), "square": (_SQUARE,), "triangle": (_polygon(3),),
    "star": (_polygon(5, inner=0.42),), "heart": (_heart(),),
    "cross": ([
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],),
    "ring": (_CIRCLE, [(0.58 * x, 0.58 * y) for x, y in _CIRCLE]),
    "frame": (_SQUARE, [(0.6 * x, 0.6 * y) for x, y in _SQUARE]),
    "crescent": (_CIRCLE, [(0.85 * x + 0.45, 0.85 * y) for x, y in _CIRCLE]),
    "semicircle": ([p for p in _CIRCLE if p[1] <= 0.01],),
    "lozenge": ([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)],),
    "bar": ([(-1, -0.25), (1, -0.25), (1, 0.25), (-1, 0.25)],),
}
# fmt: on


@lru_cache(maxsize=20)
def _handwritten(digit: int, test: bool) -> np.ndarray:
    """A part of scikit-learn's 8 x 8 images of a digit, (n, 8, 8) uint8. They hold 0 to 16; two
    thirds of that count as full ink, so that thin strokes are seen."""
    from sklearn.datasets import load_digits  # here: it takes a second that only digits need

    digits = load_digits()
    images = np.clip(digits.images[digits.target == digit] * 24, 0, 255).astype(np.uint8)
    return images[(np.arange(len(images)) % DIGIT_EVERY == 0) == test]


@lru_cache(maxsize=1)
def _font_tables() -> dict[str, frozenset[int]]:
    """The code points that each font really has, so that no missing-glyph box is ever drawn."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    tables = {}
    for font in UNICODE_FONTS + ASCII_FONTS:
        path = str(folder / f"{font}.ttf")
        points = frozenset(FT2Font(path).get_charmap())
        tables[path] = points if font in UNICODE_FONTS else points & frozenset(range(128))
    return tables


def _fit(mask: Image.Image) -> Image.Image:
    """Scale what a mask shows to INK pixels on its longer side, centred on a CANVAS square."""
    mask = mask.crop(mask.getbbox())
    scale = INK / max(mask.size)
    size = tuple(max(1, round(scale * side)) for side in mask.size)
    canvas = Image.new("L", (CANVAS, CANVAS))
    place = tuple((CANVAS - side) // 2 for side in size)
    canvas.paste(mask.resize(size, Image.Resampling.BICUBIC), place)
    return canvas


@lru_cache(maxsize=8192)
def _glyph_mask(character: str, font: str) -> Image.Image:
    mask = Image.new("L", (4 * CANVAS, 4 * CANVAS))
    pen = ImageDraw.Draw(mask)
    pen.text((CANVAS, CANVAS), character, fill=255, font=ImageFont.truetype(font, 80))
    return _fit(mask)


@lru_cache(maxsize=64)
def _shape_mask(shape: str) -> Image.Image:
    mask = Image.new("L", (4 * CANVAS, 4 * CANVAS))
    pen = ImageDraw.Draw(mask)
    for outline, fill in zip(SHAPES[shape], (255, 0), strict=False):
        pen.polygon([(2 * CANVAS + 80 * x, 2 * CANVAS + 80 * y) for x, y in outline], fill=fill)
    return _fit(mask)


def _digit_mask(digit: int, test: bool, rng: np.random.Generator) -> Image.Image:
    images = _handwritten(digit, test)
    small = Image.fromarray(images[rng.integers(len(images))])
    mask = Image.new("L", (CANVAS, CANVAS))
    edge = (CANVAS - INK) // 2
    mask.paste(small.resize((INK, INK), Image.Resampling.BICUBIC), (edge, edge))
    return mask


def _master(name: str, test: bool, rng: np.random.Generator) -> Image.Image:
    """What `name` looks like, (CANVAS, CANVAS) in grey."""
    match name.split():
        case [colour, shape] if colour in COLOURS and shape in SHAPES:
            return _shape_mask(shape)
        case ["digit", word] if word in DIGITS:
            return _digit_mask(DIGITS.index(word), test, rng)
    try:
        character = unicodedata.lookup(name.upper())
    except KeyError:
        raise ProblemError(f"nothing to draw for {name!r}: no digit, shape or character") from None
    fonts = [path for path, points in _font_tables().items() if ord(character) in points]
    if not fonts:
        raise ProblemError(f"no font of matplotlib's has the character {name!r}")
    return _glyph_mask(character, fonts[rng.integers(len(fonts))])


def _colours(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ink and ground, each (3,) in 0..1, far enough apart to be seen."""
    fixed = COLOURS.get(name.split(" ")[0]) if name.split(" ")[-1] in SHAPES else None
    while True:
        ground = rng.uniform(0.0, 1.0, 3)
        if fixed is None:
            ink = rng.uniform(0.0, 1.0, 3)
            contrast = abs(float((ink - ground) @ (0.3, 0.59, 0.11)))
        else:
            ink = np.clip(np.array(fixed) / 255 + rng.normal(0.0, 0.025, 3), 0.0, 1.0)
            contrast = float(np.linalg.norm(ink - ground)) * 0.7
        if contrast > 0.4:
            return ink.astype(np.float32), ground.astype(np.float32)


def draw(name: str, rng: np.random.Generator, test: bool = False) -> np.ndarray:
    """One picture of a name, (32, 32, 3) uint8 RGB, with random size, place, turn, font and
    colours. `test` chooses the part of the handwritten digits; the empty name is a ground with
    nothing on it. Raises ProblemError for a name that cannot be drawn."""
    ink, ground = _colours(name, rng)
    slope = rng.uniform(-0.12, 0.12, 2).astype(np.float32)
    tilt = slope[0] * _LINE[:, None] + slope[1] * _LINE[None, :]
    picture = ground + tilt[:, :, None]  # (s, s, 3)
    if name:
        longer = rng.uniform(19.0, 26.0)  # pixels of the longer side in the finished picture
        zoom = INK / (2 * longer)
        turn = math.radians(rng.uniform(-10.0, 10.0))
        a, b = zoom * math.cos(turn), zoom * math.sin(turn)
        reach = (SIDE - longer) / 2
        x, y = CANVAS / 2 + 2 * rng.uniform(-reach, reach, 2)
        affine = (a, b, CANVAS / 2 - a * x - b * y, -b, a, CANVAS / 2 + b * x - a * y)
        mask = _master(name, test, rng).transform(
            (CANVAS, CANVAS), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
        )
        cover = np.asarray(mask.reduce(2), dtype=np.float32)[:, :, None] / 255  # (s, s, 1)
        picture = picture + cover * (ink - picture)
    grain = rng.uniform(0.0, 0.05)
    noise = np.float32(grain) * rng.standard_normal((SIDE, SIDE, 1), dtype=np.float32)
    return np.clip((picture + noise) * 255, 0, 255).astype(np.uint8)


def pictures(name: str, part: str) -> Iterator[tuple[str, int, np.ndarray]]:
    """The pictures of a Mini set's `part` ("train" or "test"): (class name, label, picture). Each
    class and part has a random stream of its own: they are the same on every call."""
    count = {"train": TRAIN_IMAGES, "test": TEST_IMAGES}[part]
    for label, class_name in enumerate(MINI[name]):
        rng = np.random.default_rng(zlib.crc32(f"{name}/{part}/{class_name}".encode()))
        for _ in range(count):
            yield class_name, label, draw(class_name, rng, test=part == "test")


def render(name: str, folder: str | os.PathLike[str]) -> None:
    """Draw a Mini set into `folder` unless it is there: PNG files of 32 x 32 pixels and the split
    file, all or nothing, also when two processes draw it at once. Raises ProblemError for an
    unknown set, if the disk refuses, or if the folder holds something else."""
    if name not in MINI:
        raise unknown("Mini set", name, MINI)
    folder = Path(folder)
    split_file = folder / spec(name).split_file
    if split_file.is_file():
        return
    # The file is checked again, after the folder: another process may have finished just now.
    if folder.is_dir() and any(folder.iterdir()) and not split_file.is_file():
        raise ProblemError(
            f"data set {name}: {folder} exists, but holds no {split_file.name}; "
            "move it away, and the set is drawn anew"
        )
    logger.info(f"{name}: drawing the images into {folder}")
    split = {"train": [], "val": [], "test": []}
    try:
        with atomic_path(folder) as whole:
            for part in ("train", "test"):
                for number, (class_name, label, picture) in enumerate(pictures(name, part)):
                    path = f"{part}/{class_name.replace(' ', '_')}/{number:04d}.png"
                    (whole / path).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(whole / path, compress_level=1)
                    split[part].append([path, label, class_name])
            (whole / split_file.name).write_text(json.dumps(split), encoding="utf-8")
    except ProblemError:
        if not split_file.is_file():  # otherwise another process was first
            raise
