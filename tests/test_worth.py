"""benchmarks/features.py and benchmarks/utility.py: measures by hand, and a run of each."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command
from scipy.linalg import sqrtm

from benchmarks import features, few_patients, twin_halves, utility
from dataset import DataConfig, open_study
from modules import VQVAE2, VQVAE2Config
from new_slices import organs, sample_report
from new_slices.code_maps import Variants
from new_slices.picture_features import picture_features
from support import metrics, nifti, phantom, runtime

needs_efficientnet = pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite_pytorch"),
    reason="EfficientNet-Lite is not installed",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A study with masks, and a folder as generate.py writes it: a bright disc is label 4."""
    out = tmp_path_factory.mktemp("worth")
    rows, columns = np.mgrid[:64, :32]

    def write(folder, split, patient, number):
        rng = np.random.default_rng([patient, number])
        disc = np.hypot(rows - rng.integers(20, 44), columns - 16) < 9
        pixels = (100 * disc + 5 * rng.normal(size=disc.shape)).astype(np.float32)
        name = f"{patient:03d}_week_0_slice_{number}.nii.gz"
        nifti.write(folder / f"keras_slices_{split}" / f"case_{name}", pixels, np.eye(4))
        mask = (4 * disc).astype(np.uint8)
        nifti.write(folder / f"keras_slices_seg_{split}" / f"seg_{name}", mask, np.eye(4))

    for split, patients in {"train": (4, 5, 104), "validate": (36,), "test": (40, 41, 140)}.items():
        for patient in patients:
            for number in range(6):
                write(out / "study", split, patient, number)
    for i in range(8):
        write(out / "generated", "synthetic", 900 + i, 0)
    return out


def test_frechet_is_heusel_s_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(150, 6)) + 0.5
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert features.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_with_fewer_rows_than_features():
    """Features that lie in 3 of 40 dimensions have the distance they have there."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 3)), 2 * rng.normal(size=(15, 3))
    turn = np.linalg.qr(rng.normal(size=(40, 3)))[0].T
    there = features.frechet_distance(a @ turn, b @ turn)
    assert there == pytest.approx(features.frechet_distance(a, b))
    assert features.frechet_distance(a @ turn, a @ turn) == pytest.approx(0, abs=1e-9)


def test_the_linear_test_tells_sets_apart_and_patients_not():
    """Chance for one distribution, even where rows of one patient are alike; near 1 for a shift."""
    rng = np.random.default_rng(0)
    groups, spread = np.repeat(np.arange(20), 5), 0.1 * rng.normal(size=(2, 100, 30))
    real, fake = rng.normal(size=(2, 20, 30))[:, groups] + spread
    same = features.linear_auc(real, rng.normal(size=(100, 30)), groups)
    assert same == pytest.approx(0.5, abs=0.15)
    assert features.linear_auc(real, fake + 1.5, groups) > 0.95


def test_half_of_a_mixed_batch_is_real():
    one, two = (
        utility.Pairs(lambda i, k=k: (torch.full((len(i), 1), k), torch.tensor(i)), n)
        for k, n in ((1, 3), (2, 5))
    )
    mixed = utility.mixture(one, two)
    assert mixed.count == 15
    kinds, indices = mixed.take(np.array([14, 7, 9, 4]))
    assert kinds.flatten().tolist() == [1, 1, 2, 2] and indices.tolist() == [2, 1, 4, 4]


def test_generated_slices_are_read_in_the_order_of_their_positions(tmp_path):
    names = [f"case_{number}_week_0_slice_{number % 7}.nii.gz" for number in range(996, 1004)]
    with pytest.raises(ValueError, match="no slices in keras_slices_synthetic"):
        utility.generated_slices(tmp_path)
    (tmp_path / "keras_slices_synthetic").mkdir()
    for name in names:
        (tmp_path / "keras_slices_synthetic" / name).touch()
    assert [path.name for path in utility.generated_slices(tmp_path)] == names


def test_generated_slices_and_masks_are_paired(folders):
    images, masks = utility.read_generated(folders / "generated", (0, 4))
    assert images.shape == (8, 1, 64, 32) and masks.shape == (8, 64, 32) and masks.max() == 1
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    assert images[:, 0][masks == 1].mean() > 1
    with pytest.raises(ValueError, match="labels that the study does not have"):
        utility.read_generated(folders / "generated", (0, 1))


def test_a_summary_by_hand():
    runs = [np.array([[0.5, np.nan], [0.7, 0.9]]), np.array([[0.7, np.nan], [0.7, 0.9]])]
    found = utility.summarise(runs, (0, 3, 8))
    assert found["dice"] == pytest.approx((0.6 + 0.8) / 2)
    assert found["organs"] == pytest.approx({"label 3": 0.65, "label 8": 0.9})
    assert found["seeds"] == pytest.approx([(0.5 + 0.8) / 2, (0.7 + 0.8) / 2])
    assert (found["low"], found["high"]) == pytest.approx((0.5, 0.8))


def test_the_gain_by_generated_slices_is_paired_by_patient_and_seed():
    with_samples = [np.array([[0.5, np.nan], [0.7, 0.9]]), np.array([[0.7, 0.8], [0.7, 0.9]])]
    without = [np.array([[0.4, np.nan], [0.7, 0.8]]), np.array([[0.4, 0.7], [0.9, 0.9]])]
    found = utility.gain(with_samples, without)
    assert found["mean"] == pytest.approx((0.1 + 0.05 + 0.2 - 0.1) / 4)
    # The worst and the best patient of the same seed, drawn twice: one draw in 16 each.
    assert (found["low"], found["high"]) == pytest.approx((-0.1, 0.2))


def test_an_interval_is_over_patients_and_seeds():
    """Of one seed as `bootstrap_interval` says; wider where seeds differ more than patients."""
    rng = np.random.default_rng(0)
    one = rng.normal(0.7, 0.1, (1, 24))
    expected = metrics.bootstrap_interval(one[0], np.arange(24))
    assert utility.mean_and_interval(one)[1:] == pytest.approx(expected, abs=0.003)
    three = one + np.array([[0.2], [0], [-0.2]])
    mean, low, high = utility.mean_and_interval(three)
    assert mean == pytest.approx(one.mean())
    draws = [
        three[rng.integers(3, size=3)][:, rng.integers(24, size=24)].mean() for _ in range(4000)
    ]
    assert (low, high) == pytest.approx(np.percentile(draws, (2.5, 97.5)), abs=0.01)
    assert high - low > 4 * (expected[1] - expected[0])


def test_an_altered_slice_takes_its_mask_along(folders):
    train = open_study(DataConfig(data=str(folders / "study"), height=64, width=32))["train"]
    chosen = np.array([3, 5, 7])
    pairs = utility.altered(train, chosen, Variants(2 + utility.WAYS, len(train), train.mirror))
    (images, masks), (again, _) = pairs.take(np.array([0, 2])), pairs.take(np.array([0, 2]))
    assert not images.equal(again) and not images.equal(train.images(chosen[[0, 2]]))
    for image, mask in zip(images[:, 0], masks, strict=True):  # the organ is the bright disc
        assert image[mask == 1].mean() > 1 > -0.2 > image[mask == 0].mean()


def test_a_study_of_few_patients_keeps_the_others_out_of_training_alone(folders, tmp_path):
    flags = ["--data", folders / "study", "--patients", 1, "--below", 100]
    command(few_patients, *flags, "--out", tmp_path / "few")
    splits = open_study(DataConfig(data=str(tmp_path / "few"), height=64, width=32))
    people = {name: {each.patient for each in split.names} for name, split in splits.items()}
    assert len(people["train"]) == 1 and people["train"] < {4, 5} and people["test"] == {40, 41}
    assert len(splits["train"]) == 6 and splits["train"].has_mask.all()


def test_copies_tell_which_half_a_model_learnt_and_two_of_one_half_do_not(folders, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    flags = ["--data", folders / "study", "--patients", 2]
    command(few_patients, *flags, "--out", a)
    command(few_patients, *flags, "--rest", "--out", b)
    people = [
        {name.name[:8] for name in (half / "keras_slices_train").iterdir()} for half in (a, b)
    ]
    assert people[0] and people[1] and not people[0] & people[1]
    for half in (a, b):  # models that give back what they learnt
        copies = half / "generated" / "keras_slices_synthetic"
        shutil.copytree(half / "keras_slices_train", copies)
    generated = [half / "generated" for half in (a, b, a)]
    out = tmp_path / "twin.json"
    command(twin_halves, a, b, "--generated", *generated, "--out", out)
    found = json.loads(out.read_text())
    for name, auc in (("halves", 1), ("control", 0.5)):  # and so of every draw of patients
        assert [found[name][key] for key in ("auc", "low", "high")] == [auc] * 3


def test_utility_of_slices_as_good_as_real(folders, tmp_path, monkeypatch):
    """Both sets are tested apart, and a network that saw one real patient is among the rows."""
    small = organs.Segmenter.__init__
    monkeypatch.setattr(organs.Segmenter, "__init__", lambda self, labels: small(self, labels, 8))
    flags = "--below 100 --patients 1 --steps 40 --seeds 1 --device cpu".split()
    flags += ["--data", folders / "study", "--out", tmp_path / "utility.json"]
    _, out, _ = command(utility, folders / "generated", *flags)
    sets = json.loads((tmp_path / "utility.json").read_text())["sets"]
    tested = {name: of["test_patients"] for name, of in sets.items()}
    assert tested == {"patients < 100": 2, "patients >= 100": 1}
    kinds = {"generated alone"}
    for name in ("study", "1 patients"):
        kinds |= {name, f"{name}, altered", f"{name}, altered, and generated"}
    for of in sets.values():
        assert of["rows"].keys() == kinds
        assert of["rows"]["generated alone"]["dice"] > 0.7 and of["rows"]["study"]["dice"] > 0.7
    assert "generated alone" in out


@needs_efficientnet
def test_features_of_a_folder(folders, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, seen = VQVAE2(VQVAE2Config(K=16, channels=8, top_channels=8)).eval(), []
    monkeypatch.setattr(features, "load_model", {"ours.pth": SimpleNamespace(model=model)}.get)
    see = lambda x: (seen.append(x), picture_features(x))[1]  # noqa: E731
    monkeypatch.setattr(features, "picture_features", see)
    flags = ["--data", folders / "study", "--out", tmp_path / "features.json"]
    command(features, folders / "generated", *flags, "--checkpoint", "ours.pth")
    rows = json.loads((tmp_path / "features.json").read_text())["rows"]
    assert [row["n"] for row in rows.values()] == [6, 6, 6] and "validation slices" in rows
    with torch.inference_mode():
        made = torch.cat([model(x[None, None]).reconstruction for x in torch.from_numpy(seen[1])])
    splits = open_study(DataConfig(data=str(folders / "study"), height=64, width=32))
    test, x = splits["test"], splits["test"].images(range(18))[:, 0].numpy()
    assert np.array_equal(seen[1], splits["validate"].images(range(6))[:, 0])
    people = [test.names[(x == each).all((1, 2)).tolist().index(True)].patient for each in seen[0]]
    both = map(picture_features, (seen[0], made[:, 0].numpy()))
    expected = features.compare(*both, np.array(people))
    assert rows["reconstructions"] == pytest.approx(expected, rel=1e-3)
    shutil.copytree(folders / "generated", tmp_path / "one")
    for path in sorted((tmp_path / "one" / "keras_slices_synthetic").iterdir())[1:]:
        path.unlink()
    assert "one slice; expected at least 2" in command(features, tmp_path / "one")[2]
    for row in rows.values():
        assert np.isfinite(list(row.values())).all() and 0 <= row["auc"] <= 1
    alone = picture_features(x[:1])  # they know no scale, also beside slices of another one
    for found in picture_features(np.concatenate([7 * x[:1] - 3, x[:3]]))[:2]:
        np.testing.assert_allclose(found, alone[0], atol=1e-4)


def test_small_slices_have_the_features_of_slices_with_their_edges_drawn_out():
    small = np.random.default_rng(0).normal(size=(2, 16, 24)).astype(np.float32)
    large = np.pad(small, ((0, 0), (0, 16), (0, 8)), mode="edge")
    np.testing.assert_allclose(picture_features(small), picture_features(large), atol=1e-5)


def test_features_are_the_means_of_the_last_maps(monkeypatch):
    maps = torch.arange(6.0).view(1, 1, 2, 3)
    network = SimpleNamespace(extract_features=lambda x: maps.expand(len(x), 4, 2, 3))
    monkeypatch.setattr("new_slices.picture_features.network", lambda: network)
    assert np.array_equal(picture_features(np.ones((3, 8, 8))), np.full((3, 4), 2.5))


def test_what_the_priors_cost_is_told_inside_the_organs_and_around_them(monkeypatch):
    real = np.random.default_rng(0).normal(size=(8, 64, 32)).astype(np.float32)
    mask = np.zeros(real.shape, np.uint8)
    mask[:, 20:26, 10:16] = 1
    sampled = real + 9 * mask  # the organ alone is wrong
    monkeypatch.setattr(organs, "segment", lambda _, x: mask[: len(x)])
    features = lambda x: x.reshape(len(x), -1).astype(float)  # noqa: E731
    monkeypatch.setattr(sample_report, "picture_features", features)
    shown = {sample_report.FLOOR: real, sample_report.RECONSTRUCTIONS: real}
    shown[sample_report.SAMPLES] = sampled
    rows = {kind: sample_report.Row(images, None) for kind, images in shown.items()}
    train = SimpleNamespace(images=lambda _: torch.from_numpy(real)[:, None])
    inputs = sample_report.Inputs(None, None, {"train": train}, {}, None, None, None, object())
    table = {kind: {"kernel_distance": 0.0} for kind in shown}
    costs = sample_report.score_costs(inputs, rows, table, np.arange(8))
    assert costs["organs"]["priors"] > 0 and costs["around organs"]["priors"] == pytest.approx(0)


def test_an_appraisal_by_anatomy_sees_what_is_broken(folders, monkeypatch):
    """Slices in two pieces, or with the disc elsewhere, are less plausible; masks are compared."""
    splits = open_study(DataConfig(data=str(folders / "study"), height=64, width=32))
    train, validate = splits["train"], splits["validate"]

    def pairs(indices):
        return train.images(indices), train.masks(indices)

    net = organs.train_segmenter(pairs, len(train), 2, train.mirror, steps=60)
    inputs = sample_report.Inputs(None, None, splits, {}, None, np.zeros(6), np.arange(6), net)
    real = validate.images(range(6))[:, 0].numpy()
    split, moved = real.copy(), np.roll(real, 12, axis=2)
    split[:, :, 14:18] = real.min()
    kinds = {"real": real, "split": split, "moved": moved}
    rows = {name: sample_report.Row(x, validate.positions) for name, x in kinds.items()}
    rows["real"] = rows["real"]._replace(masks=validate.masks(range(6)).numpy())
    compared, plausible = [], organs.plausible
    monkeypatch.setattr(organs, "plausible", lambda *x: compared.append(x) or plausible(*x))
    order = np.arange(len(train))[::-1]
    table, verdicts = sample_report.score_anatomy(inputs, rows, order)
    assert np.array_equal(compared[0][3], train.positions[order])  # of the slices measured
    broken = max(table[name]["plausible"] for name in ("split", "moved"))
    assert table["real"]["plausible"] > 0.5 > broken
    assert table["real"]["agreement"] > 0.8 and "agreement" not in table["split"]
    assert not verdicts  # there are no new slices
    noise = np.random.default_rng(0).integers(0, 2, real.shape).astype(np.uint8)
    for masks, line in ((rows["real"].masks, ""), (noise, "label_4 was not learnt")):
        rows[sample_report.SAMPLES] = rows["real"]._replace(masks=masks)
        _, verdicts = sample_report.score_anatomy(inputs, rows, np.arange(len(train)))
        assert organs.not_learnt(verdicts).startswith(line) and set(verdicts) == {"label_4"}
        assert bool(organs.not_learnt(verdicts)) == bool(line)
    runtime.write_json(folders / "report.json", sample_report.plain({"rows": table}))


def test_planted_failures_are_called_bad(tmp_path, monkeypatch):
    """One organ is right, and all around it is texture without anatomy; two patients' halves."""
    made = phantom.PhantomConfig(
        train_patients=16, validate_patients=16, test_patients=16, weeks=1, slices=3
    )
    splits = open_study(DataConfig(str(phantom.write_phantom(tmp_path / "phantom", made))))
    validate, test = splits["validate"], splits["test"]
    held_out, good = (s.images(range(len(s)))[:, 0].numpy() for s in (validate, test))
    rng, known = np.random.default_rng(0), {}

    def features(images):  # each slice goes through the network once
        key = images.tobytes()
        known[key] = known[key] if key in known else picture_features(images)
        return known[key]

    monkeypatch.setattr(sample_report, "picture_features", features)

    def cloud(images, split):
        noise = np.angle(np.fft.fft2(rng.normal(size=images.shape)))
        smooth = np.fft.ifft2(np.abs(np.fft.fft2(images)) * np.exp(1j * noise)).real
        organ = split.masks(range(len(images))).numpy() == 2
        return np.where(organ, images, smooth).astype(np.float32)

    def halves(images):  # each with that of another patient at this position
        return np.concatenate([images[:, :128], np.roll(images, 3, 0)[:, 128:]], 1)

    controls = dict.fromkeys(sample_report.CONTROLS, cloud(held_out, validate))
    controls[sample_report.HALVES] = halves(held_out)

    def failed(samples) -> str:
        """What the report's conclusion says that these slices do not pass."""
        rows = {sample_report.FLOOR: held_out, sample_report.SAMPLES: samples}
        rows |= {sample_report.RECONSTRUCTIONS: held_out} | controls
        rows = {name: sample_report.Row(images, None) for name, images in rows.items()}
        inputs = sample_report.Inputs(None, None, splits, {}, None, None, None)
        table, errors = sample_report.score_likeness(inputs, rows, np.arange(48))
        seen = sample_report.seen_controls(table, errors)
        assert sample_report.HALVES in seen["coherence"]
        realism = {"rows": table, "seen": seen, "unseen": []}
        report = {"realism": realism, "variety": None, "copying": {}}
        card = sample_report.scorecard(report)
        return sample_report.conclusion({"scorecard": card, "realism": realism})

    assert failed(good).startswith("No fault found")
    assert "likeness" in failed(cloud(good, test))
    assert failed(halves(good)) == "Bad: the new slices do not pass coherence."
