"""Every number against a reference in float64, or against what must be true of it."""

from itertools import product

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from support import metrics


def slices(seed=0, shape=(32, 24)):
    """An original with structure and a noisy copy of it, as float32 z-scores."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    original = np.sin(rows / 4) + np.cos(columns / 3) + 0.1 * rng.normal(size=shape)
    original = ((original - original.mean()) / original.std()).astype(np.float32)
    return original, (0.9 * original + 0.2 * rng.normal(size=shape) + 0.1).astype(np.float32)


def brute_ssim(x, y, weights, bessel, data_range):
    """SSIM by windows inside the slice (Wang et al. 2004, equation 13)."""
    size, (c1, c2) = len(weights), ((0.01 * data_range) ** 2, (0.03 * data_range) ** 2)
    values = np.empty((x.shape[0] - size + 1, x.shape[1] - size + 1))
    for i, j in np.ndindex(values.shape):
        a, b = (image[i : i + size, j : j + size].astype(np.float64) for image in (x, y))
        ma, mb = (weights * a).sum(), (weights * b).sum()
        va, vb = bessel * (weights * (a - ma) ** 2).sum(), bessel * (weights * (b - mb) ** 2).sum()
        vab = bessel * (weights * (a - ma) * (b - mb)).sum()
        values[i, j] = (2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return values


# SSIM


@pytest.mark.parametrize("noise", [0.05, 0.5, 3.0])
def test_ssim_of_a_batch_is_skimage_s(noise):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 1, 40, 24)).cumsum(2)
    y = x + noise * rng.normal(size=x.shape)
    pairs = zip(x, y, strict=True)
    expected = [structural_similarity(a[0], b[0], data_range=np.ptp(a)) for a, b in pairs]
    found = metrics.ssim(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9)


def test_window_means_are_the_same_on_a_cpu_and_elsewhere():
    x = torch.randn(2, 3, 20, 9, dtype=torch.float64)
    torch.testing.assert_close(metrics.window_means(x), torch.nn.functional.avg_pool2d(x, 7, 1))


@pytest.mark.parametrize("flat", [0.0, 0.7])
def test_a_constant_slice_has_one_ssim_in_training_and_in_the_scores(flat):
    """The range of a slice of one value is 1 for both, beside a slice whose range is its own."""
    x = torch.stack([torch.full((16, 12), flat), torch.randn(16, 12)])[:, None].double()
    for error in (0.0, 1e-3, 0.05, 1.0):
        y = x + error * torch.randn_like(x)
        pairs = zip(x[:, 0].numpy(), y[:, 0].numpy(), strict=True)
        expected = [metrics.ssim_report(*pair)[0] for pair in pairs]
        assert metrics.ssim(x, y).tolist() == pytest.approx(expected, abs=1e-9)
    assert metrics.ssim(x, x).tolist() == pytest.approx([1, 1])
    assert metrics.value_range(x[0].numpy()) == 1 and metrics.value_range(3 * x[1].numpy()) > 3


def test_ssim_report_is_the_uniform_window_with_sample_covariance():
    x, y = slices()
    expected = brute_ssim(x, y, np.full((7, 7), 1 / 49), 49 / 48, float(x.max() - x.min()))
    mean, ssim_map = metrics.ssim_report(x, y)
    np.testing.assert_allclose(ssim_map, expected, atol=1e-9)
    assert mean == pytest.approx(expected.mean(), abs=1e-9)


def test_ssim_standard_is_the_gaussian_window_on_the_original_s_range():
    x, y = slices()
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    low, span = float(x.min()), float(x.max() - x.min())
    scaled = ((image.astype(float) - low) / span for image in (x, y))
    expected = brute_ssim(*scaled, window, 1, 1)
    mean, ssim_map = metrics.ssim_standard(x, y)
    np.testing.assert_allclose(ssim_map, expected, atol=1e-9)
    assert mean == pytest.approx(expected.mean(), abs=1e-9)


# ---- errors ----


def test_psnr_and_mae_by_formula():
    x, y = (image.astype(np.float64) for image in slices())
    mse = ((x - y) ** 2).sum() / x.size
    assert metrics.psnr(x, y) == pytest.approx(20 * np.log10((x.max() - x.min()) / np.sqrt(mse)))
    assert metrics.psnr(x, x) == 100  # finite, so that JSON can hold it


def test_psnr_inside_a_mask_sees_only_the_mask():
    x, y = slices()
    mask = np.zeros(x.shape, bool)
    mask[4:20, 4:20] = True
    elsewhere = np.where(mask, y, y + 50)
    assert metrics.psnr(x, elsewhere, mask) == metrics.psnr(x, y, mask)
    assert metrics.psnr(x, elsewhere) < metrics.psnr(x, y) - 10


# ---- the body ----


def body_scene(shape=(128, 96), noise=0.02):
    """A bright-rimmed disc with a dark hole, cut by the slice's left edge, shaded, in noisy air."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    radius = np.hypot(rows - 64, columns - 24)
    inside = radius < 44
    image = np.where(inside, 0.35 + 0.65 * (radius > 36), 0.0) * (1.2 - rows / 200)
    image[np.hypot(rows - 72, columns - 32) < 10] = 0
    # Rician.
    image = np.hypot(image + noise * rng.normal(size=shape), noise * rng.normal(size=shape))
    return ((image - image.mean()) / image.std()).astype(np.float32), inside


def dice(mask, other):
    return 2 * (mask & other).sum() / (mask.sum() + other.sum())


def test_body_mask_is_the_disc_with_its_hole_filled():
    image, inside = body_scene()
    mask = metrics.body_mask(image)
    assert dice(mask, inside) > 0.95 and mask[72, 32]  # in the hole
    assert (mask != metrics.body_mask(300 * image + 1000)).mean() < 1e-3  # no scale, no unit
    image[8:12, 85:89] = image.max()  # a speck
    image[50:120, 80:92] = image.max() / 2  # an arm
    mask = metrics.body_mask(image)
    assert not mask[10, 87] and mask[85, 86]


def test_dark_muscle_beside_a_bright_organ_is_body():
    """Otsu's own threshold would part the two."""
    image, inside = body_scene()
    rows, columns = np.mgrid[:128, :96]
    darkest, brightest = image.min(), image.max()
    image[inside] = darkest + 0.2 * (brightest - darkest)
    image[np.hypot(rows - 64, columns - 24) < 20] = brightest
    assert dice(metrics.body_mask(image), inside) > 0.95


def test_body_scores_ignore_the_air():
    """Errors that no body pixel's window reaches change the slice's scores, not the body's."""
    image, _ = body_scene()
    body = metrics.body_mask(image)
    near = np.zeros_like(body)
    for i, j in product(range(-6, 7), repeat=2):
        near |= np.roll(body, (i, j), (0, 1))
    noise = np.random.default_rng(0).normal(size=image.shape)
    air = np.where(near, image, image + noise).astype(np.float32)
    clean, dirty = metrics.score_slice(image, image), metrics.score_slice(image, air)
    for name in ("ssim_report", "ssim_standard", "psnr"):
        assert dirty[name] < clean[name] - 0.01
        assert dirty[f"{name}_body"] == pytest.approx(clean[f"{name}_body"], abs=1e-6)


# ---- a slice's scores ----


def test_score_slice_collects_them_all():
    x, y = slices()
    score, (mean, ssim_map) = metrics.score_slice(x, y), metrics.ssim_report(x, y)
    body = metrics.body_mask(x)[3:-3, 3:-3]
    expected = pytest.approx([mean, np.abs(x - y).mean() / x.std()], abs=1e-6)
    assert [score["ssim_report"], score["mae"]] == expected
    assert score["ssim_report_body"] == pytest.approx(ssim_map[body].mean())
    assert all(isinstance(value, float) for value in score.values())


def test_a_slice_of_one_value_has_finite_scores():
    flat = np.zeros((32, 24), np.float32)
    assert metrics.body_mask(flat).all()
    exact, noisy = metrics.score_slice(flat, flat), metrics.score_slice(flat, slices()[1])
    assert exact["ssim_report"] == exact["ssim_standard"] == pytest.approx(1)
    assert np.isfinite(list(noisy.values())).all() and noisy["ssim_report"] < 0.1
    assert noisy["psnr"] == pytest.approx(-10 * np.log10(np.mean(slices()[1].astype(float) ** 2)))


def test_score_slice_names_what_it_cannot_score():
    x, y = slices()
    with pytest.raises(ValueError, match=r"\(32, 24\) and \(32, 23\)"):
        metrics.score_slice(x, y[:, :-1])
    with pytest.raises(ValueError, match="at least 11"):
        metrics.score_slice(x[:8], y[:8])
    y[3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        metrics.score_slice(x, y)


# ---- over patients ----


def test_bootstrap_is_the_exact_distribution_over_patients():
    """Five patients of 1 to 9 slices: against all 5^5 draws written out, slices pooled."""
    rng, sizes = np.random.default_rng(0), (1, 9, 2, 1, 5)
    means = (0.7, 0.8, 0.85, 0.9, 0.95)
    scores = [rng.normal(mean, 0.01, n) for mean, n in zip(means, sizes, strict=True)]
    draws = product(range(5), repeat=5)
    exact = [np.concatenate([scores[i] for i in draw]).mean() for draw in draws]
    patients = np.repeat([40, 7, 9, 41, 8], sizes)
    found = metrics.bootstrap_interval(np.concatenate(scores), patients, seed=1, draws=100_000)
    assert found == pytest.approx(tuple(np.percentile(exact, [2.5, 97.5])), abs=2e-3)


# ---- rates ----


def test_code_entropy_by_hand():
    assert metrics.code_entropy(np.full(512, 3)) == pytest.approx(9)
    assert metrics.code_entropy(np.array([0, 40, 0])) == 0
    assert metrics.code_entropy(np.array([2, 1, 1, 0])) == pytest.approx(1.5)
