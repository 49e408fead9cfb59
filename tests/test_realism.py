"""Every measure against brute force or a closed form, and controls that it must see."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.signal import correlate2d

from new_slices import sample_report
from support import metrics


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


# ---- distances between sets ----


def test_kernel_distance_by_a_double_loop():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(size=(6, 5)) + 0.3

    def mean(x, y):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if x is not y or i != j]
        return sum((sum(x[i] * y[j]) / 5 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert metrics.kernel_distance(a, b)[0] == pytest.approx(expected, rel=1e-12)
    assert metrics.kernel_distance(a, b) == metrics.kernel_distance(a, b)  # seeded


@pytest.mark.parametrize(("shift", "low", "high"), [(0.4, 0.8, 1.3), (0.0, 1.0, 2.0)])
def test_kernel_distance_is_unbiased_and_knows_its_error(shift, low, high):
    """Over 200 pairs of sets: 0 on average for one distribution, and the spread that it states."""
    rng = np.random.default_rng(1)
    sets = [(rng.normal(size=(60, 8)), rng.normal(size=(50, 8)) + shift) for _ in range(200)]
    found, errors = np.array([metrics.kernel_distance(*pair) for pair in sets]).T
    assert (abs(found.mean()) < 3 * found.std() / 200**0.5) == (shift == 0)
    assert low < errors.mean() / found.std() < high


def test_halves_are_means_of_both_sides():
    x = np.random.default_rng(0).normal(3, 2, (2, 256, 128))
    cells = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    cells = cells.reshape(2, 16, 16, 8, 16).mean((2, 4))
    first, second = metrics.halves(x)
    np.testing.assert_allclose(first, cells[:, :8].reshape(2, 64), atol=1e-5)
    np.testing.assert_allclose(second, cells[:, 8:].reshape(2, 64), atol=1e-5)


def test_coherence_tells_halves_that_belong_together():
    """A ridge fit by least squares, then each half among all others; and what extremes score."""
    rng = np.random.default_rng(0)
    link = rng.normal(size=(64, 64))

    def draw(n, noise):
        first = rng.normal(size=(n, 64))
        return first, first @ link + noise * rng.normal(size=(n, 64))

    train, slices = draw(300, 8), draw(50, 30)
    score, error = metrics.coherence(train, slices)
    (a, b), (c, d) = (
        [(x - t.mean(0)) / (t.std(0) + 0.05) for x, t in zip(pair, train, strict=True)]
        for pair in (train, slices)
    )
    fit = np.linalg.lstsq(np.vstack([a, 8 * np.eye(64)]), np.vstack([b, 0 * np.eye(64)]))[0]
    guess = c @ fit
    alike = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in d] for x in guess]
    shares = [np.mean(np.delete(alike[i], i) < alike[i][i]) for i in range(50)]
    assert (score, error) == pytest.approx((np.mean(shares), np.std(shares) / 50**0.5))
    assert 0.6 < score < 0.95
    assert metrics.coherence(train, draw(50, 0))[0] == 1
    strangers = slices[0], np.roll(slices[1], 1, 0)
    assert metrics.coherence(train, strangers)[0] == pytest.approx(0.5, abs=3 * error)
    flat = metrics.halves(np.ones((4, 32, 32)))
    assert metrics.coherence(flat, flat) == (0.5, 0)


# ---- variety ----


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
    assert metrics.ms_ssim(x[None], y[None], 4)[0] == pytest.approx(expected, abs=1e-5)


def test_mean_pairwise_ms_ssim_tells_one_slice_from_many():
    x, pairs = slices(4), [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    every = [metrics.ms_ssim(x[[i]], x[[j]], 5)[0] for i, j in pairs]
    mean, error = metrics.mean_pairwise_ms_ssim(x, 5, pairs=600)
    assert abs(mean - np.mean(every)) < 4 * error
    assert error == pytest.approx(np.std(every) / 600**0.5, rel=0.15)
    assert metrics.mean_pairwise_ms_ssim(x, 5, pairs=600) == (mean, error)  # seeded
    assert metrics.mean_pairwise_ms_ssim(x[:1].repeat(5, 0), 5, pairs=9) == (1, 0)


# ---- copying ----


def test_nearest_is_the_best_correlation_of_all():
    train, queries = slices(9), slices(7, 1)

    def correlation(i, j):
        few = (x.reshape(32, 2, 16, 2).mean((1, 3)).ravel() for x in (queries[i], train[j]))
        return np.corrcoef(*few)[0, 1]

    found = metrics.correlations(metrics.thumbnails(queries), metrics.thumbnails(train))
    for i in range(7):
        assert found[i] == pytest.approx([correlation(i, j) for j in range(9)], abs=1e-5)
    flat = np.full((1, 8, 8), 0.1, np.float32)
    assert not metrics.thumbnails(flat).any()  # one value: like nothing


@pytest.mark.parametrize("weighed", [False, True])
def test_code_agreement_by_brute_force(weighed):
    """Every code counts for one, or for what it is given, such as its bits at its place."""
    rng = np.random.default_rng(0)
    train = rng.integers(0, 4, (300, 300))  # 300 codes a slice: more than a byte counts
    queries = np.concatenate([train[[200, 7]], rng.integers(0, 4, (5, 300))])
    bits = metrics.code_bits(train, 4)[np.arange(300), queries]
    found = metrics.code_agreement(queries, train, bits if weighed else np.ones(queries.shape))
    for i, query in enumerate(queries):
        same = train == query
        bits = -np.log2((same.sum(0) + 0.5) / 301) if weighed else np.ones(query.shape)
        assert found[i] == pytest.approx((same * bits).sum(1) / bits.sum(), rel=1e-5)
    assert [found[0, 200], found[1, 7]] == pytest.approx([1, 1])


def test_codes_by_place_are_of_any_map_and_each_of_another():
    codes = np.arange(12, dtype=np.uint16).reshape(3, 2, 2)
    made = sample_report.redrawn(codes, 3000, np.random.default_rng(0))
    assert made.shape == (3000, 2, 2) and made.dtype == np.int64
    for place in np.ndindex(2, 2):
        found, counts = np.unique(made[:, *place], return_counts=True)
        assert found.tolist() == codes[:, *place].tolist() and counts.min() > 900
    assert len(np.unique(made.reshape(3000, 4), axis=0)) == 3**4


def test_air_in_common_is_no_agreement_by_bits():
    """Three quarters of every slice hold one code: in the rest only a copy agrees."""
    rng = np.random.default_rng(0)
    train, queries = rng.integers(1, 500, (200, 40)), rng.integers(1, 500, (3, 40))
    train[:, :30] = queries[:, :30] = 0
    queries[0] = train[17]
    bits = metrics.code_bits(train, 500)
    assert metrics.code_agreement(queries, train, np.ones((3, 40))).min() >= 0.75
    found = metrics.code_agreement(queries, train, bits[np.arange(40), queries])
    assert found[0, 17] == pytest.approx(1) and found[1:].max() < 0.2


def test_a_search_names_the_nearest_of_all_slices_and_variants():
    """Of 600 slices of 7 patients, more than are compared at once, as they are and 1000 higher."""

    def similarity(queries, block):
        return -np.abs(queries[:, None] - block)

    take = lambda variant, indices: 1000 * variant + indices  # noqa: E731
    source = sample_report.Source(np.arange(600) % 7, take, similarity, 2)
    queries = {"samples": np.array([3.2, 599.1, 1000.3, 1577.0]), "honest": np.array([1512.4])}
    found = sample_report.search(source, queries, "by number")
    assert found["samples"].index.tolist() == [3, 599, 0, 577]
    assert found["samples"].variant.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(found["samples"].similarity, [-0.2, -0.1, -0.3, 0])
    assert (found["honest"].index.item(), found["honest"].variant.item()) == (512, 1)


@pytest.mark.parametrize("people", [1, 2, 5, 30])
def test_what_counts_is_how_much_nearer_one_patient_is_than_the_next_eight(people):
    """Beside a brute force over patients; of one patient alone, the similarity as it is."""
    rng = np.random.default_rng(0)
    table = rng.random((2, 600, 5))  # variants, slices, queries
    patients = rng.permutation(np.arange(600) % people)
    source = sample_report.Source(
        patients, lambda v, i: table[v, i], lambda _, block: block.T, 2, True
    )
    found = sample_report.search(source, {"samples": np.zeros(5)}, "at random")["samples"]
    for query in range(5):
        nearest = table[:, :, query]
        whose = [nearest[:, patients == each].max() for each in range(people)]
        next_ones = sorted(whose)[::-1][1:9]
        expected = nearest.max() / np.mean(next_ones) if people > 1 else nearest.max()
        assert found.similarity[query] == pytest.approx(expected)
        assert nearest[found.variant[query], found.index[query]] == nearest.max()


def test_contrast_by_brute_force():
    """The deviation of a cell's pixels and of those around it; beyond the edge, the edge again."""
    x = np.random.default_rng(0).normal(5, 1, (3, 32, 16)).astype(np.float32)
    found = metrics.contrast(x, (8, 4))
    assert found.shape == (3, 8, 4) and found.dtype == np.float32
    wide = np.pad(x.astype(np.float64), ((0, 0), (4, 4), (4, 4)), mode="edge")
    for i, row, column in np.ndindex(found.shape):
        part = wide[i, 4 * row : 4 * row + 12, 4 * column : 4 * column + 12]
        assert found[i, row, column] == pytest.approx(part.std(), rel=1e-5)
    assert not metrics.contrast(np.full((1, 32, 16), 7.0, np.float32), (8, 4)).any()


def test_audit_flags_copies_and_not_the_honest():
    rng, train = np.random.default_rng(0), slices(200)
    small = metrics.thumbnails(train)

    def similarity(x):
        return metrics.correlations(metrics.thumbnails(x), small).max(1)

    honest, novel = (similarity(slices(n, seed)) for n, seed in ((250, 1), (250, 2)))
    copies = similarity(train[:50] + 0.01 * rng.normal(size=(50, 64, 32)))
    found = metrics.audit(np.concatenate([novel[:45], copies[:5]]), honest, copies)
    assert found["honest"]["flagged"] == 2 and found["copies"]["share"] == 1
    assert found["samples"]["flagged"] == pytest.approx(5, abs=2)
    assert found["samples"]["share"] > found["margin"]
    assert sample_report.verdict(found).startswith("COPIES: ")
    assert metrics.audit(novel, honest, copies)["samples"]["share"] <= found["margin"]
    assert list(found["samples"]["percentiles"]) == ["1", "5", "25", "50", "75", "95", "99"]


@pytest.mark.parametrize(("n", "flagged"), [(20, 0), (99, 0), (100, 1), (357, 3)])
def test_audit_s_own_rates(n, flagged):
    """`expected` and `margin` are those of simulated honest slices, whatever their distribution."""
    rng = np.random.default_rng(0)
    found = metrics.audit(np.ones(64), rng.permutation(n) / n, np.zeros(3))
    assert found["honest"]["flagged"] == flagged and found["copies"]["flagged"] == 0
    ends = found["samples"]["low"], found["samples"]["high"]
    assert ends == pytest.approx((0.025 ** (1 / 64), 1))
    draws = rng.random((2000, n + 64))
    thresholds = np.sort(draws[:, :n])[:, n - 1 - flagged]
    shares = (draws[:, n:] > thresholds[:, None]).mean(1)
    assert shares.mean() == pytest.approx(found["expected"], rel=0.15)
    assert (shares > found["margin"]).mean() <= 0.065
    assert (shares >= found["margin"]).mean() >= 0.035


def variety(images, test, patients, twins=range(4)):
    """`score_variety` of new slices (n, h, w), and of test slices of these patients."""
    split = SimpleNamespace(patients=np.array(patients))
    inputs = SimpleNamespace(splits={"test": split}, images=lambda _, indices: test[indices])
    inputs.samples, inputs.twins, inputs.seed = SimpleNamespace(images=images), np.array(twins), 0
    return sample_report.score_variety(inputs, np.arange(4))


def test_variety_beside_slices_of_one_value_is_a_number():
    """Most test slices may be black, as those above and below a body are: their range is 1."""
    flat, noise = np.zeros((4, 32, 32)), np.random.default_rng(0).normal(size=(4, 32, 32))
    found = variety(noise, flat, [0, 1, 2, 3])
    assert found["real"]["ms_ssim"] == 1 and 0 <= found["samples"]["ms_ssim"] < 0.5
    assert found["one patient"]["ms_ssim"] is None  # nobody has two slices
    assert variety(noise[:1], flat, [0, 1, 2, 3]) is None  # nor is one slice varied
    # No test slice beside itself: each counts once, and so does the first sample beside it.
    twice, once = (variety(noise[i], noise, range(4), i) for i in ([2, 2, 1, 3], [2, 1, 3]))
    assert twice == once and once["n"] == 3 and once["samples"] == once["real"]
    assert variety(noise, noise, range(4), [1, 1, 1, 1]) is None


def test_variety_beside_that_of_one_patient():
    """The control pairs slices of one patient: alike here, where those of two patients are not."""
    a, b = noise = np.random.default_rng(0).normal(size=(2, 32, 32))
    found = variety(noise, np.stack([a, b, a, b]), [7, 9, 7, 9])
    assert found["one patient"]["ms_ssim"] == pytest.approx(1) and found["samples"]["ms_ssim"] < 0.5
