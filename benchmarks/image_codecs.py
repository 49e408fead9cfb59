"""What image codecs make of slices: bits and scores to compare a learned code with.

JPEG, JPEG 2000, WebP and AVIF, as Pillow has them, get 8-bit pictures: a z-scored slice, scaled
from its own minimum and maximum to 0..255. What they return is scaled back by the same two numbers
and scored against the float slice by `metrics.score_slice`, as the model's reconstruction is. Each
codec has the settings that did best on MRI, except AVIF: its speed 0 saves 1 % more than 2 in three
times the time.

A rate is that of the whole file, headers included. In pictures this small they count, and
`overhead` says how much. A curve's rate is the mean over slices at one quality, so a codec may
spend more on harder slices. Between qualities a curve is a monotone cubic (PCHIP) in dB over the
logarithm of the rate, as for Bjontegaard's differences. SSIM in dB is -10 log10(1 - SSIM). None
stands for a rate or score outside the sweep.

    sweep_slice of each slice --> mean_curves over slices --> score_at a rate, bits_at a score
"""

from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageSequence, features
from scipy.interpolate import PchipInterpolator

from support import metrics

# Of one slice: codec -> its rate and scores at each quality.
Points = dict[str, list[dict[str, float]]]
# Of many slices: codec -> rate and scores, (qualities,) each.
Curves = dict[str, dict[str, np.ndarray]]


class Codec(NamedTuple):
    """A codec and how it is called. Of several `settings` the one with the smallest file counts."""

    format: str  # as Pillow calls it
    feature: str  # as PIL.features calls its library
    library: str
    qualities: tuple[float, ...]  # rising; Pillow's own, but bits per pixel for JPEG 2000
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
        # Without the boxes of a .jp2 and the encoder's name, which save 117 bytes.
        ({"irreversible": True, "num_resolutions": 4, "no_jp2": True, "comment": " "},),
    ),
    "WebP": Codec("WEBP", "webp", "libwebp", (1, 12, 30, 52, 74, 86), ({"method": 6},)),
    "AVIF": Codec(
        "AVIF",
        "avif",
        "libavif",
        (6, 25, 40, 54, 68),
        ({"speed": 2, "subsampling": "4:0:0", "max_threads": 1},),
    ),
}


def version(codec: Codec) -> str:
    # For "jpg", PIL.features knows only the version of the interface.
    turbo = codec.feature == "jpg"
    known = features.version_feature("libjpeg_turbo") if turbo else features.version(codec.feature)
    return f"{codec.library} {known or 'of unknown version'}"


# ---- one slice ----


def to_bytes(original: np.ndarray) -> np.ndarray:
    """(H, W) float -> uint8: 0 at the slice's minimum, 255 at its maximum; one value becomes 0."""
    low, span = float(original.min()), metrics.value_range(original)
    return np.round(255 * ((original.astype(np.float64) - low) / span)).astype(np.uint8)


def from_bytes(grey: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Undo `to_bytes(original)` for a decoded picture (H, W): float64, scaled as `original` is."""
    return grey * (metrics.value_range(original) / 255) + float(original.min())


def encode(codec: Codec, grey: np.ndarray, quality: float) -> bytes:
    """The file of a picture (H, W) uint8."""
    # JPEG 2000 takes a compression ratio; 8 bits per pixel are a ratio of 1
    quality_option = (
        {"quality_layers": [8 / quality]} if codec.format == "JPEG2000" else {"quality": quality}
    )
    files = []
    for settings in codec.settings:
        Image.fromarray(grey).save(file := BytesIO(), codec.format, **quality_option, **settings)
        files.append(file.getvalue())
    return min(files, key=len)


def decode(file: bytes) -> np.ndarray:
    """The picture (H, W) uint8 of a file. WebP has three channels, which differ by rounding."""
    with Image.open(BytesIO(file)) as picture:
        return np.asarray(picture.convert("L"))


def sweep_slice(original: np.ndarray, codecs: dict[str, Codec] = CODECS) -> Points:
    """A z-scored slice (H, W) by every codec and quality: its "bits_per_pixel" and scores."""
    grey, points = to_bytes(original), {}
    for name, codec in codecs.items():
        points[name] = []
        for quality in codec.qualities:
            file = encode(codec, grey, quality)
            scores = metrics.score_slice(original, from_bytes(decode(file), original))
            points[name].append({"bits_per_pixel": 8 * len(file) / grey.size, **scores})
    return points


def sweep_volume(planes: Sequence[np.ndarray], codec: Codec) -> list[Points]:
    """As `sweep_slice`, of each plane of a volume that is one AVIF: a tall picture of all planes,
    or a film, which predicts each plane from others. The rate is the volume's.
    """
    greys, how = [to_bytes(plane) for plane in planes], codec.settings[0]
    points: list[Points] = [{"AVIF tall": [], "AVIF film": []} for _ in planes]
    for quality in codec.qualities:
        tall, film = encode(codec, np.concatenate(greys), quality), BytesIO()
        first, *rest = map(Image.fromarray, greys)
        first.save(film, codec.format, save_all=True, append_images=rest, quality=quality, **how)
        with Image.open(film) as frames:
            shown = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(frames)]
        decoded = {"AVIF tall": (tall, np.split(decode(tall), len(planes)))}
        decoded |= {"AVIF film": (film.getvalue(), shown)}
        for name, (file, found) in decoded.items():
            rate = {"bits_per_pixel": 8 * len(file) / sum(grey.size for grey in greys)}
            for point, grey, plane in zip(points, found, planes, strict=True):
                point[name].append(rate | metrics.score_slice(plane, from_bytes(grey, plane)))
    return points


def overhead(codec: Codec, height: int, width: int) -> int:
    """Bytes of a file that holds next to no picture: mid-grey, which codecs subtract first."""
    return len(encode(codec, np.full((height, width), 128, np.uint8), codec.qualities[0]))


# ---- many slices ----


def mean_curves(slices: Sequence[Points]) -> Curves:
    """The rate and the scores of each codec at each quality, averaged over slices."""
    return {
        codec: {
            name: np.mean([[point[name] for point in points[codec]] for points in slices], 0)
            for name in slices[0][codec][0]
        }
        for codec in slices[0]
    }


def _decibels(score: str, values):
    """Scores in dB. SSIM becomes its distance from 1, nearly straight over log bits, as PSNR is."""
    return (
        values
        if score.startswith("psnr")
        else -10 * np.log10(np.maximum(1 - np.asarray(values), 1e-10))
    )


def _fit(curve: dict[str, np.ndarray], score: str) -> PchipInterpolator | None:
    """Decibels over log bits, monotone, to be read both ways; None if more bits gain nothing.

    Straight lines between qualities would cut the corners of a concave curve and cost a codec 0.01
    of SSIM.
    """
    rates, scores = curve["bits_per_pixel"], np.maximum.accumulate(curve[score])
    # Drop a quality that needs more bits for no gain, or no more bits than the one before.
    keep = np.append(True, (np.diff(scores) > 0) & (np.diff(rates) > 0))
    if keep.sum() < 2:
        return None
    return PchipInterpolator(np.log(rates[keep]), _decibels(score, scores[keep]), extrapolate=False)


def score_at(curve: dict[str, np.ndarray], score: str, bits: float) -> float | None:
    """An SSIM or PSNR of one codec's curve at a rate in bits per pixel; None outside the sweep."""
    fit = _fit(curve, score)
    decibels = float(fit(np.log(bits))) if fit else np.nan
    if np.isnan(decibels):
        return None
    return decibels if score.startswith("psnr") else 1 - 10 ** (-decibels / 10)


def bits_at(curve: dict[str, np.ndarray], score: str, value: float) -> float | None:
    """The rate at which one codec's curve reaches an SSIM or PSNR; None outside the sweep."""
    fit = _fit(curve, score)
    rates = fit.solve(_decibels(score, value), extrapolate=False) if fit else ()
    return float(np.exp(rates[0])) if len(rates) else None


def curve_points(curve: dict[str, np.ndarray], score: str) -> tuple[list[float], list[float]]:
    """One codec's curve for a plot: bits per pixel and `score_at` for 60 rates within the sweep."""
    rates = curve["bits_per_pixel"]
    read = [(bits, score_at(curve, score, bits)) for bits in np.geomspace(rates[0], rates[-1], 60)]
    read = [(bits, value) for bits, value in read if value is not None]
    return [bits for bits, _ in read], [value for _, value in read]


def compare(curves: Curves, rates: dict[str, float], scores: dict[str, float]) -> dict[str, dict]:
    """Each codec's scores at a model's `rates`, and the bits that it needs for its `scores`."""
    return {
        codec: {
            "at": {
                kind: {score: score_at(curve, score, bits) for score in scores}
                for kind, bits in rates.items()
            },
            "bits_per_pixel_for": {
                score: bits_at(curve, score, value) for score, value in scores.items()
            },
        }
        for codec, curve in curves.items()
    }


def scoreboard(
    curves: Curves, height: int, width: int, codecs: dict[str, Codec] = CODECS
) -> dict[str, dict]:
    """For JSON, each codec's library, settings, overhead and curve with a row for each quality."""
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
