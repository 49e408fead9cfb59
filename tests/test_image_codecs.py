"""Codecs: every number is checked against Pillow, NumPy or a file on the disk."""

import numpy as np
import pytest
from PIL import Image
from skimage.data import camera
from skimage.transform import resize

from benchmarks import image_codecs
from support import metrics

SHAPE = 128, 96
# A photograph as a slice: uint16 in steps far finer than 8 bits, then z-scored.
FINE = np.round(resize(camera() / 255.0, SHAPE, anti_aliasing=True) * 60_000)
SLICE = ((FINE - FINE.mean()) / FINE.std()).astype(np.float32)
OTHER = np.ascontiguousarray(SLICE[::-1]) * 3 + 1
AVIF = image_codecs.CODECS["AVIF"]
FASTER = {**AVIF.settings[0], "speed": 8}  # a test needs no better
CODECS = image_codecs.CODECS | {"AVIF": AVIF._replace(settings=(FASTER,))}
EXTENSIONS = {"JPEG": ".jpg", "JPEG 2000": ".j2k", "WebP": ".webp", "AVIF": ".avif"}


@pytest.fixture(scope="module")
def swept():
    return [image_codecs.sweep_slice(slice_, CODECS) for slice_ in (SLICE, OTHER)]


@pytest.mark.parametrize("name", CODECS)
def test_bits_and_pixels_are_those_of_a_file_on_the_disk(name, swept, tmp_path):
    """The smallest of the files that Pillow writes itself, whole, and what it reads back."""
    codec, at = CODECS[name], 3
    grey = np.uint8(np.round((SLICE.astype(float) - SLICE.min()) / np.ptp(SLICE) * 255))
    np.testing.assert_array_equal(image_codecs.to_bytes(SLICE), grey)
    quality, files = codec.qualities[at], []
    asked = {"quality_layers": [8 / quality]} if name == "JPEG 2000" else {"quality": quality}
    for i, settings in enumerate(codec.settings):
        files.append(tmp_path / f"{i}{EXTENSIONS[name]}")
        Image.fromarray(grey).save(files[-1], **asked, **settings)
    smallest = min(files, key=lambda path: path.stat().st_size)
    file = image_codecs.encode(codec, grey, quality)
    assert file == smallest.read_bytes()
    with Image.open(smallest) as picture:
        pixels = np.asarray(picture.convert("L"))
    np.testing.assert_array_equal(image_codecs.decode(file), pixels)
    back = SLICE.min() + pixels / 255 * np.ptp(SLICE)
    expected = metrics.score_slice(SLICE, back)
    expected["bits_per_pixel"] = 8 * smallest.stat().st_size / SLICE.size
    assert swept[0][name][at] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", CODECS)
def test_more_quality_is_more_bits_and_a_higher_ssim(name, swept):
    curve = image_codecs.mean_curves(swept)[name]
    for of in ("bits_per_pixel", "ssim_report", "ssim_standard", "psnr"):
        assert len(curve[of]) == len(CODECS[name].qualities) and (np.diff(curve[of]) > 0).all(), of


@pytest.mark.parametrize("scale, shift", [(1, 0), (1e-3, 7), (5e3, -2e4)])
def test_a_lossless_codec_loses_the_8_bits_rounding_and_no_more(scale, shift):
    original = (SLICE * scale + shift).astype(np.float32)
    lossless = CODECS["JPEG 2000"]._replace(settings=({"irreversible": False},))
    grey = image_codecs.to_bytes(original)
    decoded = image_codecs.decode(image_codecs.encode(lossless, grey, 8))
    np.testing.assert_array_equal(decoded, grey)
    assert grey.min() == 0 and grey.max() == 255
    assert len(np.unique(original)) > 2 * len(np.unique(grey))
    step = np.ptp(original.astype(float)) / 255
    errors = np.abs(image_codecs.from_bytes(decoded, original) - original)
    assert 0.4 * step < errors.max() <= 0.5 * step * (1 + 1e-6)


def test_a_slice_of_one_value_comes_back(swept):
    flat = np.full(SHAPE, 2.5, np.float32)
    np.testing.assert_array_equal(image_codecs.from_bytes(image_codecs.to_bytes(flat), flat), flat)


@pytest.mark.parametrize("name", CODECS)
def test_the_overhead_is_a_whole_file_and_the_least_of_any(name, swept):
    size = image_codecs.overhead(CODECS[name], *SHAPE)
    assert 20 < size < swept[0][name][3]["bits_per_pixel"] * SLICE.size / 8


BITS = np.array([0.1, 0.25, 0.5, 1.0])
CURVE = {
    "bits_per_pixel": BITS,
    "ssim_report": 1 - 0.02 / BITS,  # straight in the scale that curves are read in
    "psnr": np.array([20.0, 26.0, 31.0, 37.0]),  # not straight
    "psnr_body": 30 + 7 * np.log2(BITS),
}


def test_between_qualities_curves_are_read_in_dB_over_the_logarithm_of_the_rate():
    for bits in (0.1, 0.13, 0.25, 0.4, 0.703, 1.0):
        found = [image_codecs.score_at(CURVE, of, bits) for of in ("ssim_report", "psnr_body")]
        expected = np.interp(np.log2(bits), np.log2(BITS), CURVE["psnr_body"])
        assert found == pytest.approx([1 - 0.02 / bits, expected], abs=1e-9)
        for score in ("ssim_report", "psnr", "psnr_body"):
            value = image_codecs.score_at(CURVE, score, bits)
            assert image_codecs.bits_at(CURVE, score, value) == pytest.approx(bits, rel=1e-9)
    for bits, value in zip(BITS, CURVE["psnr"], strict=True):
        assert image_codecs.score_at(CURVE, "psnr", bits) == pytest.approx(value)
    bits, scores = image_codecs.curve_points(CURVE, "ssim_report")
    np.testing.assert_allclose(scores, 1 - 0.02 / np.array(bits))
    assert bits[0] < 0.11 and bits[-1] > 0.9


def test_outside_the_sweep_is_none_and_not_a_guess():
    flat = {"bits_per_pixel": BITS, "psnr": np.full(4, 100.0)}  # it gains nothing by more bits
    for curve, bits, score in ((CURVE, 0.09, 19.9), (CURVE, 1.01, 37.1), (flat, 0.5, 100.0)):
        assert image_codecs.score_at(curve, "psnr", bits) is None
        assert image_codecs.bits_at(curve, "psnr", score) is None


def test_a_quality_that_is_worse_for_more_bits_is_passed_over():
    dented = {"bits_per_pixel": BITS, "psnr": np.array([20.0, 26.0, 25.0, 37.0])}
    assert image_codecs.bits_at(dented, "psnr", 26.0) == pytest.approx(0.25)


def test_interpolation_finds_a_quality_that_the_sweep_left_out(swept):
    """Why the scale: with every other quality left out, straight lines are out by far more."""
    full = image_codecs.mean_curves(swept)["JPEG"]
    thin = {name: values[::2] for name, values in full.items()}
    for bits, ssim in zip(full["bits_per_pixel"][1:-1:2], full["ssim_report"][1:-1:2], strict=True):
        error = abs(image_codecs.score_at(thin, "ssim_report", bits) - ssim)
        straight = abs(np.interp(bits, thin["bits_per_pixel"], thin["ssim_report"]) - ssim)
        assert error < min(0.004, 0.5 * straight)


def test_beside_reads_each_codec_at_the_model_s_rates_and_scores():
    curves = {"A": CURVE, "B": {**CURVE, "psnr": CURVE["psnr"] + 1}}
    rates, scores = {"nominal": 0.5, "prior": 0.05}, {"ssim_report": 0.92, "psnr": 26.5}
    found = image_codecs.compare(curves, rates, scores)
    assert found["A"]["at"]["nominal"] == pytest.approx({"ssim_report": 0.96, "psnr": 31.0})
    assert found["B"]["at"]["prior"] == {"ssim_report": None, "psnr": None}
    assert found["A"]["bits_per_pixel_for"]["ssim_report"] == pytest.approx(0.25)
    assert found["B"]["bits_per_pixel_for"]["psnr"] < found["A"]["bits_per_pixel_for"]["psnr"]
