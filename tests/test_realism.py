"""Every measure against brute force or a closed form, and against controls that it must tell from real slices."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.signal import correlate2d
from scipy.stats import wasserstein_distance

import realism


def z_scored(x):
    return ((x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)).astype(np.float32)


def slices(n, seed=0, shape=(64, 32)):
    """Bodies of varying width and place with an off-centre organ: no slice is its own mirror."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    height, width, shift = rng.uniform(18, 26, n), rng.uniform(9, 14, n), rng.uniform(-3, 3, n)
    x = [
        ((rows - 32 - s) ** 2 / h**2 + (columns - 16) ** 2 / w**2 < 1)
        + 1.5 * (np.hypot(rows - 22 - 2 * s, columns - w) < 6)
        for h, w, s in zip(height, width, shift, strict=True)
    ]
    return z_scored(np.array(x) + 0.1 * rng.normal(size=(n, *shape)))


# features


def test_pooled_features_by_hand():
    maps = np.random.default_rng(0).normal(1000, 1, (2, 3, 8, 6))
    top, bottom = maps[:, :, :4], maps[:, :, 4:]
    halves = [
        np.stack([top.mean((2, 3)), bottom.mean((2, 3))], 2),
        np.stack([top.std((2, 3)), bottom.std((2, 3))], 2),
    ]
    expected = np.concatenate(halves, 1).reshape(2, -1)
    np.testing.assert_allclose(realism.pooled_features(maps, (2, 1)), expected, rtol=1e-9)


def test_plain_features_of_a_ramp():
    """3 down and 4 across: a gradient of 5 everywhere, of 10 and 20 on coarser pixels, and it never varies."""
    rows, columns = np.mgrid[:64, :32]
    found = realism.plain_features((3.0 * rows + 4.0 * columns)[None].repeat(11, 0))
    assert found.shape == (11, 64) and found.dtype == np.float64
    blocks = found[0].reshape(4, 2, 8)  # map, mean or standard deviation, cell
    np.testing.assert_allclose(blocks[1:, 0], np.array([5, 10, 20])[:, None].repeat(8, 1))
    np.testing.assert_allclose(blocks[1:, 1], 0, atol=1e-6)
    assert blocks[0, 0, 0] == pytest.approx(3 * 7.5 + 4 * 7.5)  # of the first 16x16 pixels


# distances between sets


def test_frechet_is_heusel_s_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(150, 6)) + 0.5
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert realism.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_diagonal_gaussians():
    """Samples with exactly these moments: sum of (m_a - m_b)^2 + (s_a - s_b)^2."""
    white = np.linalg.qr(np.c_[np.ones(50), np.random.default_rng(0).normal(size=(50, 3))])[0][:, 1:] * 7
    a, b = white * [1, 2, 3] + [0, 1, 0], white * [2, 2, 0.5] + [1, 1, -2]
    assert realism.frechet_distance(a, b) == pytest.approx((1 + 0 + 4) + (1 + 0 + 2.5**2))
    assert realism.frechet_distance(b, a) == pytest.approx(realism.frechet_distance(a, b))
    assert realism.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_with_fewer_rows_than_features():
    """Features that lie in 3 of 40 dimensions have the distance they have there."""
    rng = np.random.default_rng(0)
    a, b, turn = (
        rng.normal(size=(12, 3)),
        2 * rng.normal(size=(15, 3)),
        np.linalg.qr(rng.normal(size=(40, 3)))[0],
    )
    assert realism.frechet_distance(a @ turn.T, b @ turn.T) == pytest.approx(realism.frechet_distance(a, b))
    assert realism.frechet_distance(a @ turn.T, a @ turn.T) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_neighbour_measures_by_brute_force(k):
    rng = np.random.default_rng(k)
    real, fake = rng.normal(size=(25, 2)), 0.7 * rng.normal(size=(18, 2)) + 0.4

    def balls(x):
        return [
            (c, sorted(np.linalg.norm(c - o) for j, o in enumerate(x) if j != i)[k - 1])
            for i, c in enumerate(x)
        ]

    def within(ball, point):
        return np.linalg.norm(ball[0] - point) <= ball[1]

    hits = [[within(ball, point) for point in fake] for ball in balls(real)]
    back = [any(within(ball, point) for ball in balls(fake)) for point in real]
    assert realism.precision_recall(real, fake, k) == pytest.approx((np.any(hits, 0).mean(), np.mean(back)))
    expected = np.sum(hits) / (k * len(fake)), np.any(hits, 1).mean()
    assert realism.density_coverage(real, fake, k) == pytest.approx(expected)


def test_compare_has_its_best_at_the_real_set_and_units_do_not_matter():
    real = np.random.default_rng(0).normal(size=(80, 5))
    same = realism.compare(real, real, 80)
    assert same["frechet"] == pytest.approx(0, abs=1e-9)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    far = [realism.compare(real, real + shift, 80) for shift in (0.5, 1, 2, 10)]
    assert [row["frechet"] for row in far] == pytest.approx(
        [5 * s**2 / real.var() for s in (0.5, 1, 2, 10)], rel=0.3
    )
    assert far[-1]["precision"] == far[-1]["recall"] == far[-1]["density"] == far[-1]["coverage"] == 0
    units, fake = np.array([1, 10, 1e4, 0.1, 1]), np.random.default_rng(1).normal(size=(60, 5))
    assert realism.compare(real * units, fake * units, 50) == pytest.approx(realism.compare(real, fake, 50))


def test_controls_score_worse_than_real_slices():
    real, other = slices(60, 0), slices(60, 1)
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(other.reshape(60, -1), axis=0).reshape(
        real.shape
    )  # pixel by pixel: right on average
    bad = {
        "noise": rng.normal(size=real.shape),
        "shuffled": shuffled,
        "mean": np.repeat(real.mean(0)[None], 60, 0),
    }
    of_real = realism.plain_features(real)
    floor = realism.compare(of_real, realism.plain_features(other), 60)
    assert floor["precision"] > 0.7 and floor["recall"] > 0.7
    spectrum = realism.power_spectrum(real)
    for images in bad.values():
        found = realism.compare(of_real, realism.plain_features(images), 60)
        assert found["frechet"] > 10 * floor["frechet"] and found["precision"] == found["coverage"] == 0
        distance = realism.spectrum_distance(spectrum, realism.power_spectrum(images))
        assert distance > 5 * realism.spectrum_distance(spectrum, realism.power_spectrum(other))


# spectrum and intensities


def test_power_spectrum_of_noise_and_of_a_wave():
    noise = realism.power_spectrum(np.random.default_rng(0).normal(0, 10, (200, 64, 48)))
    assert noise.shape == (200, 24)
    np.testing.assert_allclose(noise.mean(0)[3:], 20, atol=0.5)  # variance 100 is 20 dB, at every frequency
    wave = realism.power_spectrum(np.cos(2 * np.pi * np.arange(64) / 8)[None, :, None].repeat(48, 2))[0]
    assert wave.argmax() == 5  # 1/8 cycles per pixel is (5 + 1) / 48
    assert realism.spectrum_distance(noise, noise + 3) == pytest.approx(3)


def test_histogram_distance_is_scipy_s():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 40, 30)), rng.gamma(2, size=(5, 40, 30))
    assert realism.histogram_distance(a, b) == pytest.approx(
        wasserstein_distance(a.ravel(), b.ravel()), rel=2e-3
    )
    assert realism.histogram_distance(a, a + 0.25) == pytest.approx(0.25)


# variety


def brute_ms_ssim(x, y, data_range, weights):
    """Wang et al. 2003 in float64, by two-dimensional windows."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window, score = np.outer(line, line) / line.sum() ** 2, 1.0
    for scale, weight in enumerate(weights):
        mx, my, xx, yy, xy = (correlate2d(i, window, "valid") for i in (x, y, x * x, y * y, x * y))
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        value = (2 * (xy - mx * my) + c2) / (xx - mx**2 + yy - my**2 + c2)
        if scale == len(weights) - 1:
            value = value * (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        score *= value.mean() ** (weight / sum(weights))
        x, y = ((i[::2, ::2] + i[1::2, ::2] + i[::2, 1::2] + i[1::2, 1::2]) / 4 for i in (x, y))
    return score


@pytest.mark.parametrize(("shape", "scales"), [((96, 48), 3), ((256, 128), 4), ((192, 224), 5)])
def test_ms_ssim_by_brute_force(shape, scales):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    x = np.sin(rows / 30) + np.cos(columns / 25)
    y = 0.8 * x + 0.3 * np.random.default_rng(0).normal(size=shape) + 0.2
    expected = brute_ms_ssim(x, y, 4, (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales])
    assert realism.ms_ssim(x[None], y[None], 4)[0] == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_falls_with_noise():
    x = slices(1).repeat(4, 0)
    noise = np.random.default_rng(0).normal(size=x.shape) * np.array([0, 0.1, 0.5, 2])[:, None, None]
    scores = realism.ms_ssim(x, x + noise, 5)
    assert scores[0] == 1 and (np.diff(scores) < 0).all()


def test_mean_pairwise_ms_ssim_tells_one_slice_from_many():
    x, pairs = slices(4), [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    every = [realism.ms_ssim(x[[i]], x[[j]], 5)[0] for i, j in pairs]
    mean, error = realism.mean_pairwise_ms_ssim(x, 5, pairs=600)
    assert abs(mean - np.mean(every)) < 4 * error and error == pytest.approx(
        np.std(every) / 600**0.5, rel=0.15
    )
    assert realism.mean_pairwise_ms_ssim(x, 5, pairs=600) == (mean, error)  # seeded
    assert realism.mean_pairwise_ms_ssim(x[:1].repeat(5, 0), 5, pairs=9) == (1, 0)


# copying


def test_nearest_finds_copies_and_mirrored_copies():
    train, rng = slices(150), np.random.default_rng(0)
    copies = np.concatenate([train[:70], train[70:, ::-1]]) * 2 + 0.5 + 0.05 * rng.normal(size=train.shape)
    found = realism.nearest(realism.thumbnails(copies), realism.thumbnails(train))
    np.testing.assert_array_equal(found.index, np.arange(150))
    np.testing.assert_array_equal(found.mirrored, np.arange(150) >= 70)
    assert found.similarity.min() > 0.99


def test_nearest_is_the_best_correlation_of_all():
    train, queries = slices(9), slices(7, 1)

    def correlation(i, j, flip):
        few = (
            x.reshape(32, 2, 16, 2).mean((1, 3)).ravel()
            for x in (queries[i], train[j][::-1] if flip else train[j])
        )
        return np.corrcoef(*few)[0, 1]

    exclude = [3, 0, 0, 8, 5, 5, 2]
    for left_out in (None, exclude):
        found = realism.nearest(realism.thumbnails(queries), realism.thumbnails(train), left_out)
        for i in range(7):
            choices = {(j, f): correlation(i, j, f) for j in range(9) for f in (False, True)}
            choices = {key: v for key, v in choices.items() if left_out is None or key[0] != left_out[i]}
            best = max(choices, key=choices.get)
            assert (found.index[i], found.mirrored[i]) == best
            assert found.similarity[i] == pytest.approx(choices[best], abs=1e-5)
    assert not realism.thumbnails(np.full((1, 8, 8), 0.1, np.float32)).any()  # one value: like nothing


def test_code_agreement_by_brute_force():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 4, (300, 6, 50))  # 300 codes a slice: more than a byte counts
    queries = np.concatenate([train[[200, 7]], rng.integers(0, 4, (5, 6, 50))])
    for exclude in (None, np.array([200, 7, 1, 2, 3, 4, 5])):
        shares = np.array([[(q == t).mean() for t in train] for q in queries])
        if exclude is not None:
            shares[np.arange(7), exclude] = 0
        found = realism.code_agreement(queries, train, exclude)
        np.testing.assert_array_equal(found.index, shares.argmax(1))
        np.testing.assert_allclose(found.similarity, shares.max(1))
    assert realism.code_agreement(queries, train).similarity[:2].tolist() == [1, 1]


def test_code_agreement_by_bits_by_brute_force():
    rng = np.random.default_rng(0)
    train, queries = rng.integers(0, 4, (150, 5, 8)), rng.integers(0, 4, (6, 5, 8))
    bits = realism.code_bits(train, 4)
    found = realism.code_agreement(queries, train, None, bits)
    for i, query in enumerate(queries):
        share = (train == query).mean(0)  # of training slices with the query's code, at every place
        worth = -np.log2((share * 150 + 0.5) / 151)
        scores = ((train == query) * worth).sum((1, 2)) / worth.sum()
        assert found.index[i] == scores.argmax()
        assert found.similarity[i] == pytest.approx(scores.max(), rel=1e-5)


def test_air_in_common_is_no_agreement_by_bits():
    """Three quarters of every slice hold the same code: all agree in them, and only a copy agrees in the rest."""
    rng = np.random.default_rng(0)
    train, queries = rng.integers(1, 500, (200, 40)), rng.integers(1, 500, (3, 40))
    train[:, :30] = queries[:, :30] = 0
    queries[0] = train[17]
    bits = realism.code_bits(train, 500)
    assert realism.code_agreement(queries, train).similarity.min() >= 0.75
    found = realism.code_agreement(queries, train, None, bits)
    assert found.index[0] == 17 and found.similarity[0] == pytest.approx(1)
    assert found.similarity[1:].max() < 0.2


def test_audit_flags_copies_and_not_the_honest():
    rng, train = np.random.default_rng(0), slices(200)
    small = realism.thumbnails(train)

    def similarity(x):
        return realism.nearest(realism.thumbnails(x), small).similarity

    honest, novel = (similarity(slices(n, seed)) for n, seed in ((250, 1), (250, 2)))
    copies = similarity(train[:50, ::-1] + 0.01 * rng.normal(size=(50, 64, 32)))
    found = realism.audit(np.concatenate([novel[:45], copies[:5]]), honest, copies)
    assert found["honest"]["flagged"] == 2 and found["copies"]["share"] == 1
    assert (
        found["samples"]["flagged"] == pytest.approx(5, abs=2) and found["samples"]["share"] > found["margin"]
    )
    assert realism.audit(novel, honest, copies)["samples"]["share"] <= found["margin"]
    assert list(found["samples"]["percentiles"]) == ["1", "5", "25", "50", "75", "95", "99"]


@pytest.mark.parametrize(("n", "flagged"), [(20, 0), (99, 0), (100, 1), (357, 3)])
def test_audit_s_own_rates(n, flagged):
    """`expected` and `margin` are those of simulated honest slices, whatever their distribution."""
    rng = np.random.default_rng(0)
    found = realism.audit(np.ones(64), rng.permutation(n) / n, np.zeros(3))
    assert found["honest"]["flagged"] == flagged and found["copies"]["flagged"] == 0
    assert (found["samples"]["low"], found["samples"]["high"]) == pytest.approx((0.025 ** (1 / 64), 1))
    draws = rng.random((2000, n + 64))
    thresholds = np.sort(draws[:, :n])[:, n - 1 - flagged]
    shares = (draws[:, n:] > thresholds[:, None]).mean(1)
    assert shares.mean() == pytest.approx(found["expected"], rel=0.15)
    assert (shares > found["margin"]).mean() <= 0.065 and (shares >= found["margin"]).mean() >= 0.035


# bad input


def test_what_cannot_be_measured_is_named():
    x, features = slices(3), np.zeros((5, 4))
    for call, message in (
        (lambda: realism.plain_features(x[:, :8]), "at least 16"),
        (lambda: realism.power_spectrum(x * np.nan), "NaN"),
        (lambda: realism.frechet_distance(features, features[:, :3]), r"\(5, 3\)"),
        (lambda: realism.compare(features, features, 6), "from 2 to 5"),
        (lambda: realism.precision_recall(features, features, 5), "from 1 to 4"),
        (lambda: realism.ms_ssim(x, x[:, :-1], 4), r"\(3, 63, 32\)"),
        (lambda: realism.mean_pairwise_ms_ssim(x[:1], 4), "1 slices"),
        (lambda: realism.nearest(x, x[:, ::2]), r"\(3, 32, 32\)"),
        (lambda: realism.audit(np.ones(3), np.ones(0), np.ones(3)), "0 honest"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
