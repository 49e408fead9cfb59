"""The phantom is what it says: layout, anatomy, smoothness, noise; no other folder is lost."""

import itertools
import json
from dataclasses import asdict, replace

import nibabel
import numpy as np
import pytest
from skimage.measure import label, regionprops
from skimage.metrics import structural_similarity

from support import phantom
from support.phantom import BLADDER, BONE, FAT, MUSCLE, Man, PhantomConfig, planes, write_phantom

TINY = PhantomConfig(train_patients=2, validate_patients=1, test_patients=1, weeks=1, slices=2)
PATIENTS = (4, 5, 36, 40)


def contents(study):
    return {path.relative_to(study).as_posix(): path.read_bytes() for path in study.rglob("*.*z")}


def z_score(pixels):
    return (pixels - pixels.mean()) / pixels.std()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom") / "study", TINY)


def test_layout_of_the_real_study(study):
    split_of = {"004": "train", "005": "train", "036": "validate", "040": "test"}
    expected = {
        f"keras_slices_{seg}{split}/{kind}_{patient}_week_0_slice_{number}.nii.gz"
        for patient, split in split_of.items()
        for seg, kind in (("", "case"), ("seg_", "seg"))
        for number in (0, 59)
    }
    assert contents(study).keys() == expected
    for path in map(study.joinpath, expected):
        image, case = nibabel.load(path), path.name.startswith("case")
        pixels = np.asarray(image.dataobj)
        assert pixels.shape == (256, 128) and pixels.min() == 0
        assert pixels.dtype == (np.float32 if case else np.uint8)
        assert case or {0, 1, 2} <= set(np.unique(pixels)) <= {0, 1, 2, 3, 4, 5}
        assert image.header["descrip"].item() == b"synthetic phantom, not a patient"
        assert nibabel.aff2axcodes(image.affine) == ("R", "S", "P")
    text = (study / "SYNTHETIC.txt").read_text()
    record = json.loads(text.splitlines()[-1])
    assert "SYNTHETIC" in text and record == {"version": 2, **asdict(TINY)}


def test_same_config_gives_same_bytes_and_another_seed_others(study, tmp_path):
    first, again = contents(study), contents(write_phantom(tmp_path / "again", TINY))
    other = contents(write_phantom(tmp_path / "other", replace(TINY, seed=1)))
    assert first == again and first.keys() == other.keys() and len(first) == 16
    assert not set(first.values()) & set(other.values())


def test_a_phantom_is_completed_and_another_left_alone(tmp_path):
    one = PhantomConfig(train_patients=1, validate_patients=1, test_patients=1, weeks=1, slices=2)
    out = write_phantom(tmp_path / "p", one)
    made = {path: path.stat().st_mtime_ns for path in out.glob("keras*/*")}
    write_phantom(out, one)
    assert made == {path: path.stat().st_mtime_ns for path in out.glob("keras*/*")}
    max(out.glob("keras_slices_seg_test/*")).unlink()  # the last slice of a volume
    assert len(contents(write_phantom(out, one))) == 12
    with pytest.raises(ValueError, match="not this phantom"):
        write_phantom(out, replace(one, train_patients=2))
    assert len(contents(out)) == 12


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not this phantom"):
        write_phantom(tmp_path, TINY)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["years of work"]


MANY = PhantomConfig(train_patients=40, validate_patients=6, test_patients=5, weeks=1, slices=1)


@pytest.mark.parametrize("made, files", [(PhantomConfig(), 2 * 1240), (MANY, 2 * 51)])
def test_no_patient_is_in_two_splits(monkeypatch, tmp_path, made, files):
    written = []
    monkeypatch.setattr(phantom.nifti, "write", lambda path, *rest: written.append(path))
    monkeypatch.setattr(Man, "cut", lambda self, number: np.zeros((3, 256, 128), np.uint8))
    write_phantom(tmp_path / "p", made)
    train, validate, test = (
        sorted({int(p.name[5:8]) for p in written if p.parent.name == f"keras_slices_{split}"})
        for split in ("train", "validate", "test")
    )
    assert len({*train, *validate, *test}) == len(train) + len(validate) + len(test)
    sizes = made.train_patients, made.validate_patients, made.test_patients
    assert (len(train), len(validate), len(test)) == sizes
    assert (train[0], validate[0], test[0]) == (4, 36, 40) and len(set(written)) == files


@pytest.mark.parametrize("patient", PATIENTS)
def test_a_coronal_t2_image_of_a_pelvis(patient):
    man = Man(0, patient, 0)
    clean, _, tissues = man.cut(18)
    fat, bladder, muscle = (clean[tissues == tissue].mean() for tissue in (FAT, BLADDER, MUSCLE))
    assert fat > 1.2 * bladder and bladder > 2 * muscle and muscle > 20 * clean[:4].mean()
    # Skewed to the right.
    assert tissues.ravel()[clean.argmax()] == FAT and (z_score(clean) ** 3).mean() > 0.3
    # Air left and right only.
    assert not tissues[[0, -1]].any() and tissues[:, 0].any() and tissues[:, -1].any()
    tissues = man.cut(int(np.abs(man.y).argmin()))[2]  # the plane of the femoral heads
    middle, level, femurs = int(np.abs(man.x).argmin()), int(np.abs(man.z).argmin()), []
    wide = (tissues > 0).sum(0)
    assert wide[level - 16] > wide[level + 37]  # the hips, and 85 mm above them
    for half in (tissues[middle:], tissues[middle::-1]):  # outwards from the midline
        # With its socket.
        femurs.append(max(regionprops(label(half == BONE)), key=lambda bone: bone.area))
        across, along = np.ogrid[: half.shape[0], : half.shape[1]]
        # 90 mm out, 16 of its 25 mm radius.
        head = (across - 56) ** 2 + (along - level) ** 2 < 10**2
        assert (half[head] == BONE).mean() > 0.9
        assert (half[:, 0] == BONE).any()  # the shaft leaves the picture below
    assert np.abs(np.subtract(femurs[0].centroid, femurs[1].centroid)).max() < 25


UNIT, CLEAN = 507.2397, [-142.19, -145.93, 2.58, -159.71, 46.00, -121.14, -305.97]
TISSUES = [2586, 2879, 1766, 1230, 786, 1603, 1589]


def test_the_phantom_is_the_one_that_all_results_are_of():
    """In seven planes of a man, weighed by a wave: who changes the pictures changes VERSION."""
    rows, columns = np.mgrid[:256, :128]
    wave, man, found = np.sin(rows / 9 + columns / 7), Man(0, 4, 0), []
    for number in (3, 12, 20, 28, 35, 44, 54):
        clean, _, tissues = man.cut(number)
        found += [(clean / man.unit * wave).sum(), (tissues * wave).sum()]
    assert phantom.VERSION == 2 and man.unit == pytest.approx(UNIT)
    assert found[::2] == pytest.approx(CLEAN, abs=0.03)
    assert found[1::2] == pytest.approx(TISSUES, abs=6)  # a pixel at an edge may round otherwise


def test_changes_smoothly_by_slice_and_a_little_by_week():
    volumes = itertools.product(PATIENTS, (0, 1))
    clean = {(p, w): [Man(0, p, w).cut(n)[0].ravel() for n in (28, 29)] for p, w in volumes}
    # Another seed, another man.
    men = [clean[p, 0][0] for p in PATIENTS] + [Man(1, 4, 0).cut(28)[0].ravel()]
    others = np.corrcoef(men) - 2 * np.eye(len(men))
    for p in PATIENTS:
        by_slice, by_week = np.corrcoef([clean[p, 0][0], clean[p, 0][1], clean[p, 1][0]])[0, 1:]
        assert 0.99 > by_slice > by_week > others.max()


def test_every_slice_has_noise_of_its_own(study):
    """By patient, week and number; it is in the files."""
    noises = []
    for patient, week, number in ((4, 0, 20), (5, 0, 20), (4, 1, 20), (4, 0, 21)):
        clean, noisy, _ = Man(0, patient, week).cut(number)
        noises.append((noisy - clean)[100:150, 40:90].ravel())
    assert np.abs(np.corrcoef(noises) - np.eye(4)).max() < 0.1
    written = nibabel.load(study / "keras_slices_train" / "case_005_week_0_slice_59.nii.gz")
    assert np.array_equal(written.dataobj, Man(0, 5, 0).cut(59)[1])


def test_noise_leaves_room_for_a_model():
    scores = []
    for patient, number in itertools.product(PATIENTS, (5, 20, 40, 55)):
        clean, noisy = map(z_score, Man(0, patient, 0).cut(number)[:2])
        scores.append(structural_similarity(clean, noisy, data_range=np.ptp(noisy)))
    assert 0.95 <= np.mean(scores) <= 0.97 and min(scores) > 0.92


def test_planes_are_the_ends_and_one_of_each_stretch_between():
    assert planes(PhantomConfig(slices=60), 4, 0) == list(range(60))
    few = np.array([planes(PhantomConfig(), patient, 0) for patient in range(4, 304)])
    assert (few[:, 0] == 0).all() and (few[:, 4] == 59).all() and (np.diff(few) > 0).all()
    assert set(few[:, 1:4].ravel()) == set(range(1, 59))  # all planes are seen in some patient
    assert not np.array_equal(few[0], few[1])
