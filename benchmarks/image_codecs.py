"""What image codecs make of slices: bits and scores, the yardstick for a learned code. Slices in, numbers out.

JPEG, JPEG 2000, WebP and AVIF, as Pillow has them, get 8-bit pictures: a z-scored slice scaled by its own minimum
and maximum to 0..255. What they give back is scaled by the same two numbers and scored against the float slice
by `metrics.score_slice`, as the model's reconstruction is. Each codec has the settings that served it best on real
MR slices, but for AVIF, whose last few per cent take minutes: see `with_avif_speed`.

A rate is the whole file's, headers too; in pictures as small as these they weigh, and `overhead` says how much.

    sweep_slice of every slice --> mean_curves of some of them --> score_at a rate, bits_at a score
"""

from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, features
from scipy.interpolate import PchipInterpolator

import metrics
from runtime import UserError

Points = dict[str, list[dict[str, float]]]  # of a slice: codec -> at each quality, rate and scores
Curves = dict[str, dict[str, np.ndarray]]  # of many: codec -> rate and scores, each (qualities,)


class Codec(NamedTuple):
    """A codec and how it is asked for: of the files that `settings` make, the smallest counts."""

    format: str  # Pillow's name of it
    feature: str  # and of the library, in PIL.features
    library: str
    qualities: tuple[float, ...]  # rising: Pillow's, of JPEG 2000 bits per pixel
    settings: tuple[dict, ...]


CODECS = {
    "JPEG": Codec(
        "JPEG",
        "jpg",
        "libjpeg-turbo",
        (5, 12, 22, 35, 50, 65, 80),
        ({"optimize": True}, {"progressive": True}),
    ),
    "JPEG 2000": Codec(
        "JPEG2000",
        "jpg_2000",
        "OpenJPEG",
        (0.12, 0.2, 0.32, 0.5, 0.72, 1.0, 1.4),
        # neither the boxes of a .jp2 nor the encoder's name: 117 bytes less
        ({"irreversible": True, "num_resolutions": 4, "no_jp2": True, "comment": " "},),
    ),
    "WebP": Codec("WEBP", "webp", "libwebp", (1, 12, 30, 52, 74, 86), ({"method": 6},)),
    "AVIF": Codec(
        "AVIF",
        "avif",
        "libavif",
        (6, 25, 40, 54, 68),
        ({"speed": 4, "subsampling": "4:0:0", "max_threads": 1},),
    ),
}


def with_avif_speed(speed: int) -> dict[str, Codec]:
    """`CODECS` with AVIF at a speed from 10 down to 0, the best; Pillow's own is 6.

    On the slices that chose the settings, 4 took 6 % fewer bits than 6 for the same SSIM, and five times as long;
    2 took 3 % fewer than 4, three times as long; 0 another 1 %, again three times as long.
    """
    avif = CODECS["AVIF"]
    return CODECS | {"AVIF": avif._replace(settings=({**avif.settings[0], "speed": speed},))}


def check() -> None:
    """UserError if this Pillow was built without one of the codecs."""
    if missing := [name for name, codec in CODECS.items() if not features.check(codec.feature)]:
        raise UserError(
            f"Pillow {PIL.__version__} has no {', '.join(missing)}; expected {', '.join(CODECS)}. "
            "Fix: pip install --upgrade 'pillow>=11.3'"
        )


def version(codec: Codec) -> str:
    turbo = codec.feature == "jpg"  # PIL.features knows "jpg" by the version of its interface alone
    found = features.version_feature("libjpeg_turbo") if turbo else features.version(codec.feature)
    return f"{codec.library} {found or 'of unknown version'}"


# ---- one slice -----------------------------------------------------------------------------------


def to_bytes(original: np.ndarray) -> np.ndarray:
    """(H, W) float -> uint8; the slice's minimum is 0 and its maximum 255. A slice of one value is 0."""
    low, span = float(original.min()), metrics.value_range(original)
    return np.round(255 * ((original.astype(np.float64) - low) / span)).astype(np.uint8)


def from_bytes(grey: np.ndarray, original: np.ndarray) -> np.ndarray:
    """What `to_bytes(original)` became, back on the scale of `original`: (H, W) float64."""
    return grey * (metrics.value_range(original) / 255) + float(original.min())


def encode(codec: Codec, grey: np.ndarray, quality: float) -> bytes:
    """The file of an (H, W) uint8 picture."""
    # JPEG 2000 takes a compression ratio, and 8 bits a pixel are 1
    asked = {"quality_layers": [8 / quality]} if codec.format == "JPEG2000" else {"quality": quality}
    files = []
    for settings in codec.settings:
        Image.fromarray(grey).save(file := BytesIO(), codec.format, **asked, **settings)
        files.append(file.getvalue())
    return min(files, key=len)


def decode(file: bytes) -> np.ndarray:
    """The (H, W) uint8 picture in a file; WebP has no grey, and its three channels differ by a rounding."""
    with Image.open(BytesIO(file)) as picture:
        return np.asarray(picture.convert("L"))


def sweep_slice(original: np.ndarray, codecs: dict[str, Codec] = CODECS) -> Points:
    """A z-scored slice (H, W) through every codec at every quality: "bits_per_pixel", `metrics.score_slice`."""
    grey, points = to_bytes(original), {}
    for name, codec in codecs.items():
        points[name] = []
        for quality in codec.qualities:
            file = encode(codec, grey, quality)
            scores = metrics.score_slice(original, from_bytes(decode(file), original))
            points[name].append({"bits_per_pixel": 8 * len(file) / grey.size, **scores})
    return points


def overhead(codec: Codec, height: int, width: int) -> int:
    """Bytes of the smallest file of a slice of one value: mid-grey is 0 to codecs that subtract it."""
    return len(encode(codec, np.full((height, width), 128, np.uint8), codec.qualities[0]))


# ---- many slices ---------------------------------------------------------------------------------


def mean_curves(slices: Sequence[Points]) -> Curves:
    """The rate and every score of each codec, means over slices."""
    return {
        codec: {
            name: np.mean([[point[name] for point in points[codec]] for points in slices], 0)
            for name in slices[0][codec][0]
        }
        for codec in slices[0]
    }


def _decibels(score: str, values):
    """SSIM as its distance from 1, which over the logarithm of the rate is as nearly straight as PSNR is."""
    return values if score.startswith("psnr") else -10 * np.log10(np.maximum(1 - np.asarray(values), 1e-10))


def _fit(curve: dict[str, np.ndarray], score: str) -> PchipInterpolator | None:
    """Decibels over log bits, monotone so that it can be read both ways; None where bits gain nothing at all.

    Straight lines between qualities would cut the corners of a concave curve and cost a codec 0.01 of SSIM.
    """
    rates, scores = curve["bits_per_pixel"], np.maximum.accumulate(curve[score])
    # where more bits gained nothing fewer would do, and where none were added there is one point
    keep = np.append(True, (np.diff(scores) > 0) & (np.diff(rates) > 0))
    if keep.sum() < 2:
        return None
    return PchipInterpolator(np.log(rates[keep]), _decibels(score, scores[keep]), extrapolate=False)


def score_at(curve: dict[str, np.ndarray], score: str, bits: float) -> float | None:
    """An SSIM or PSNR of one codec's curve at a rate in bits per pixel; None outside the sweep."""
    fit = _fit(curve, score)
    found = float(fit(np.log(bits))) if fit else np.nan
    if np.isnan(found):
        return None
    return found if score.startswith("psnr") else 1 - 10 ** (-found / 10)


def bits_at(curve: dict[str, np.ndarray], score: str, value: float) -> float | None:
    """The rate at which one codec's curve reaches an SSIM or PSNR; None outside the sweep."""
    fit = _fit(curve, score)
    found = fit.solve(_decibels(score, value), extrapolate=False) if fit else ()
    return float(np.exp(found[0])) if len(found) else None


def drawn(curve: dict[str, np.ndarray], score: str) -> tuple[list[float], list[float]]:
    """One codec's curve as `score_at` reads it, bits per pixel and score, at 60 rates."""
    rates = curve["bits_per_pixel"]
    read = [(bits, score_at(curve, score, bits)) for bits in np.geomspace(rates[0], rates[-1], 60)]
    read = [(bits, found) for bits, found in read if found is not None]
    return [bits for bits, _ in read], [found for _, found in read]


def beside(curves: Curves, rates: dict[str, float], scores: dict[str, float]) -> dict[str, dict]:
    """By codec: its scores at each of a model's `rates` (named), and its bits for each of the model's `scores`."""
    return {
        codec: {
            "at": {
                kind: {score: score_at(curve, score, bits) for score in scores}
                for kind, bits in rates.items()
            },
            "bits_per_pixel_for": {score: bits_at(curve, score, value) for score, value in scores.items()},
        }
        for codec, curve in curves.items()
    }


def scoreboard(curves: Curves, height: int, width: int, codecs: dict[str, Codec] = CODECS) -> dict[str, dict]:
    """By codec, for JSON: library, settings, headers, and a row for every quality."""
    board = {}
    for name, codec in codecs.items():
        size = overhead(codec, height, width)
        rows = zip(*(values.tolist() for values in curves[name].values()), strict=True)
        board[name] = {
            "library": version(codec),
            "settings": list(codec.settings),
            "overhead_bytes": size,
            "overhead_bits_per_pixel": 8 * size / (height * width),
            "curve": [
                {"quality": quality, **dict(zip(curves[name], row, strict=True))}
                for quality, row in zip(codec.qualities, rows, strict=True)
            ],
        }
    return board
