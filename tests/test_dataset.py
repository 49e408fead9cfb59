"""Reading, cache and splits of tiny files; skimage and nibabel are the references."""

import gzip
import os
import pickle
import re
import shutil
import struct
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from skimage.transform import resize

import dataset
from dataset import SPLITS, DataConfig, StudyInfo, open_study, parse_name
from support import nifti
from support.runtime import UserError

SIZE = (32, 16)
MIRRORED = np.diag([-1, 1, 1, 1])
AFFINE = np.array([[-1.5, 0, 0, 40], [0, 0, 2, -30], [0, 1.25, 0, 7], [0, 0, 0, 1]])


def noise(seed, shape=SIZE):
    return np.random.default_rng(seed).gamma(2, 100, shape).astype(np.float32)


def name_of(patient, number, week=0):
    return f"case_{patient:03d}_week_{week}_slice_{number}.nii.gz"


def save(path, pixels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(pixels, affine), path)
    return path


@pytest.fixture
def study(tmp_path):
    """Patients 4 (12 slices), 36 and 40 (2 slices each), in the layout of the sliced set."""
    for split, patient, count in zip(SPLITS, (4, 36, 40), (12, 2, 2), strict=True):
        for number in range(count):
            path = tmp_path / "s" / f"keras_slices_{split}" / name_of(patient, number)
            save(path, noise(100 * patient + number))
    return tmp_path / "s"


@pytest.fixture
def config(study, tmp_path):
    return DataConfig(data=str(study), height=SIZE[0], width=SIZE[1], cache=str(tmp_path / "cache"))


def put(study, pixels, number=0, affine=AFFINE):
    return save(study / "keras_slices_train" / name_of(4, number), pixels, affine)


# ---- names and folders ----


@pytest.mark.parametrize(
    "name, expected",
    [
        ("case_004_week_0_slice_0.nii.gz", (4, 0, 0)),
        ("x/case_042_week_11_slice_59.nii", (42, 11, 59)),
        ("seg_019_week_1_slice_7.nii.gz", (19, 1, 7)),
        ("Case_004_Week3_LFOV.nii.gz", (4, 3, 0)),
        ("B006_Week2_SEMANTIC.nii.gz", (6, 2, 0)),
        ("CASE_004_WEEK_1_SLICE_2.NII.GZ", (4, 1, 2)),
        ("patient012_z034.nii.gz", (12, 0, 34)),
        ("patient012/T2_z34.nii", (12, 0, 34)),
        ("sub-01_ses-2_T2w.nii.gz", (1, 2, 0)),
        ("sub-01/ses-2/anat/T2w_z7.nii.gz", (1, 2, 7)),
        ("visit3_subject7_plane_8.nii", (7, 3, 8)),
        ("BraTS20_Training_004_slice_5.nii.gz", (4, 0, 5)),
        ("BraTS-GLI-00005-100-t2w_slice_7.nii.gz", (5, 100, 7)),
        ("OAS1_0004_MR2_slice_6.nii.gz", (4, 2, 6)),
        ("OAS30001_MR_d0757_z1.nii.gz", (30001, 757, 1)),
        ("ADNI_002_S_0004_slice_3.nii.gz", (4, 0, 3)),
        ("T2_case_004_slice_1.nii.gz", (4, 0, 1)),
        ("patient7_week2/case_004_slice_1.nii.gz", (4, 2, 1)),
        ("Patient 7 week 2 slice 1.nii.gz", (7, 2, 1)),
        ("case_12-05.nii", (12, 0, 0)),
    ],
)
def test_names_give_patient_week_slice(name, expected):
    assert parse_name(name) == expected


UNANNOUNCED = [
    "brain.nii.gz",
    "week_3_slice_4.nii.gz",
    "case_week_3.nii.gz",
    "T2_slice_3.nii.gz",
    "12-05-2024_prostate.nii.gz",
    "case_12-05-2024.nii.gz",  # announced, but still a date
    "sub-2024-05-12_T2w.nii.gz",
    "patient 12.5.2024.nii",
    "IM-0001-0034.nii",
    "0012/T2.nii.gz",
    "prostate_07_slice_3.nii.gz",
    "case_12-05-24_z3.nii",
    "patient-12-2024_z1.nii",
    "case_12May2024_z1.nii",
    "sub_12-May-2024.nii",
    "BraTS_12-05-2024.nii",
    "patient_3T_012_z1.nii",
    "subject_1.5T_07_z1.nii",
    "patient_20240512_T2.nii",
    "patient_12-May-24_T2.nii",
    "patient-2024-05_z1.nii",
    "case_20240105_week_0_slice_0.nii.gz",
    "case_20240512101500_z3.nii",
    "case_12052024_z3.nii",
    "case_05312024_z3.nii",
    "case_5-12-24_z3.nii",
    "case_5.12.24_z3.nii",
    "case_10h15_z3.nii",
    "case_2024-May-12_z3.nii",
    "B20240512_Week0_z1.nii",
]
NO_DATES = [
    "case_12_aug_01",
    "patient_12_OCT_05",
    "case_12_septum_01",
    "patient_12-20240101_z1",
    "patient-12-1-10",
    "sub-12",
    "sub_12_OCT",
    "case_12_T2w",
]


@pytest.mark.parametrize("name", NO_DATES)
def test_a_patient_s_number_beside_others_is_no_date(name):
    assert parse_name(f"{name}.nii").patient == 12
    assert dataset.name_parts("sub-7T01_T1w.nii")["patient"] == "7T01"


@pytest.mark.parametrize("name", UNANNOUNCED)
def test_a_number_that_nothing_announces_is_no_patient(name):
    with pytest.raises(UserError, match=r"no patient in its name.* --name-pattern"):
        parse_name(name)


def test_a_name_that_tells_two_patients_is_refused():
    for name in ("case_004_patient_007_week_0_slice_0.nii.gz", "sub-04_ses-1_sub-007_T2w.nii"):
        with pytest.raises(UserError, match=r"tells two patients, 00?4 and 007\. .*--name-pattern"):
            parse_name(name)
    assert parse_name("case_004_subject_4_slice_1.nii").patient == 4
    assert parse_name("case_1_of_subject_9/case_004_slice_1.nii").patient == 4


@pytest.mark.parametrize("name", ["case_%d_week_0_slice_0.nii.gz", "sub-%d_T2w.nii.gz"])
def test_a_number_that_int64_cannot_hold_is_refused(name):
    assert parse_name(name % (10**18 - 1)).patient == 10**18 - 1
    with pytest.raises(UserError, match="9223372036854775809; expected 18 digits or fewer"):
        parse_name(name % (2**63 + 1))


def test_a_pattern_of_one_s_own_names_patient_week_and_slice(study, config, tmp_path):
    pattern = r"(?P<patient>\d+)/(?:day(?P<week>\d+)_)?(?P<slice>\d+)"
    assert parse_name("0012/day3_07.nii.gz", pattern) == (12, 3, 7)
    assert parse_name("a\\0012\\07.nii.gz", pattern) == (12, 0, 7)
    with pytest.raises(UserError, match="no patient in its name"):
        parse_name("case_004_week_0_slice_0.nii.gz", pattern)
    with pytest.raises(UserError, match="expected numbers"):
        parse_name("ctl.nii.gz", "(?P<patient>[a-z]+)")
    for wrong in ("(?P<week>.)", "("):
        with pytest.raises(UserError, match="--name-pattern"):
            DataConfig(name_pattern=wrong)
    for path in list(study.rglob("case_*")):
        name = parse_name(path)
        (path.parent / f"{name.patient}").mkdir(exist_ok=True)
        path.rename(path.parent / f"{name.patient}" / f"{name.slice}.nii.gz")
    with pytest.raises(UserError, match="--name-pattern"):
        open_study(config)
    splits = open_study(replace(config, name_pattern=pattern))
    assert [len(splits[split]) for split in SPLITS] == [12, 2, 2]
    info = StudyInfo.from_splits(splits)  # the checkpoint knows what its files are called
    other = replace(info, name_pattern="Case(?P<patient>.)")  # but who tells it anew is heard
    for told, by_user in ((info, ""), (other, pattern)):
        again = dataset.open_trained_study(told, replace(config, name_pattern=by_user), "x.pth")
        assert again["train"].names == splits["train"].names


def test_slices_come_in_numerical_order_with_the_right_pixels(config):
    train = open_study(config)["train"]
    # Lexical order is 0, 1, 10, 11, 2.
    assert [name.slice for name in train.names] == list(range(12))
    for number in range(12):
        np.testing.assert_array_equal(train.pixels[number], noise(400 + number))


def test_missing_study_and_missing_or_empty_split_are_named(study, config, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert dataset.find_study() is None
    every_split = "keras_slices_train, keras_slices_validate, keras_slices_test"
    for data, words in (("", "keras_slices_data"), ("nowhere", "nowhere: no such study")):
        with pytest.raises(FileNotFoundError, match=words):
            open_study(DataConfig(data=data))
    with pytest.raises(FileNotFoundError, match=every_split):
        open_study(DataConfig(data="."))
    for file in (study / "keras_slices_test").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no keras_slices_test with"):
        open_study(config)
    for name in reversed(dataset.STUDY_NAMES):  # the first of them wins
        Path(name).mkdir()
        assert dataset.find_study() == Path(name)


def test_shared_patients_are_named_unless_allowed(study, config, capsys):
    save(study / "keras_slices_test" / name_of(4, 90, week=1), noise(1))
    with pytest.raises(ValueError, match="004 in train and test"):
        open_study(config)
    assert len(open_study(replace(config, allow_patient_overlap=True))["test"]) == 3
    assert "004 in train and test" in capsys.readouterr().out


# ---- reading ----


def test_z_score_is_per_slice_with_population_deviation(config):
    train = open_study(config)["train"]
    pixels = noise(403).astype(np.float64)
    expected = (pixels - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(train[3]["image"][0], expected, atol=2e-6)
    assert train[3]["mean"] == pytest.approx(pixels.mean())
    assert train[3]["std"] == pytest.approx(pixels.std())
    np.testing.assert_array_equal(train[3]["affine"], AFFINE)
    assert train[3]["path"].endswith(name_of(4, 3)) and train[-1]["index"] == 11
    chosen = torch.stack([train[i]["image"] for i in (7, 3, 3)])
    torch.testing.assert_close(train.images([7, 3, 3]), chosen)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float64, ">i2"])
def test_any_real_dtype_and_its_scale_are_honoured(study, config, dtype):
    raw = (noise(5) % 120).astype(dtype)
    image = nibabel.Nifti1Image(raw, AFFINE)
    data = bytearray(image.to_bytes())
    struct.pack_into(image.header.endianness + "2f", data, 112, 2.5, -3)  # slope and intercept
    (study / "keras_slices_train" / name_of(4, 0)).write_bytes(gzip.compress(bytes(data)))
    expected = raw.astype(np.float64) * 2.5 - 3
    np.testing.assert_allclose(open_study(config)["train"].pixels[0], expected, rtol=1e-6)


@pytest.mark.parametrize("across", [0, 1, 2])
def test_an_axis_of_one_is_welcome_and_a_volume_is_sent_to_the_slicer(study, config, across):
    pixels, axes = noise(7), [axis for axis in range(3) if axis != across]
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    put(study, np.expand_dims(pixels, across), 1, affine)
    put_mask(study, "train", 4, 1, np.expand_dims(blocks(1), across), affine)
    train = open_study(config)["train"]
    np.testing.assert_array_equal(train.pixels[1], pixels)
    assert [train.labels[k] for k in train.masks([1])[0].flatten()] == blocks(1).flatten().tolist()
    np.testing.assert_array_equal(train.affines[1], affine[:, [*axes, across, 3]])
    put(study, noise(6, (*SIZE, 3)), 0)
    with pytest.raises(ValueError, match=r"slice_0.*an array of 32x16x3 .*slice_volumes\.py"):
        open_study(config)


def test_other_sizes_are_resized_as_skimage_does(study, config, capsys):
    wide = noise(8, (64, 40))  # so much that the smoothing shows
    put(study, wide, 0)
    stretched = open_study(replace(config, fit="stretch"))["train"]
    expected = resize(wide, SIZE, anti_aliasing=True)
    np.testing.assert_allclose(stretched.pixels[0], expected, rtol=1e-6)
    capsys.readouterr()
    train = open_study(config)["train"]
    padded = np.full(SIZE, wide.min())
    padded[3:29] = resize(wide, (26, 16), anti_aliasing=True)
    np.testing.assert_allclose(train.pixels[0], padded, rtol=1e-6)
    assert tuple(train.shapes[0]) == (64, 40) and tuple(train.shapes[1]) == SIZE
    assert "1 slices of 64x40 fill 81% of the model's grid" in capsys.readouterr().out
    open_study(config)
    assert "1 slices of 64x40" in capsys.readouterr().out  # said from the cache too


def made_of(study, *shapes):
    """A study with a volume of two slices of each of these shapes; the first two are held out, the
    others are one patient's.
    """
    for number, shape in enumerate(shapes):
        split = {0: "validate", 1: "test"}.get(number, "train")
        for plane in range(2):
            name = name_of(min(number, 2) + 1, plane, week=number)
            path = study / f"keras_slices_{split}" / name
            save(path, noise(10 * number + plane, shape))
    return DataConfig(data=str(study), cache=str(study.parent / "cache"))


GRIDS = {
    "of the report": ([(256, 128)] * 3, (256, 128)),
    "a few as in HipMRI": ([(256, 144)] + [(256, 128)] * 2, (256, 128)),
    "one's own": ([(96, 112)] * 3, (96, 112)),
    "no multiples of 8": ([(90, 101)] * 3, (96, 104)),
    "of several sizes": ([(40, 48), (50, 30), (41, 47)], (56, 48)),
    "of several sizes of a patient": ([(40, 48)] * 2 + [(41, 57), (40, 48)], (48, 64)),
}


@pytest.mark.parametrize("case", GRIDS)
def test_the_grid_follows_the_study(tmp_path, case, capsys):
    shapes, grid = GRIDS[case]
    config = made_of(tmp_path / "s", *shapes)
    splits = open_study(config)
    if case == "no multiples of 8":  # its pixels stay as they are
        assert "6 slices of 90x101 fill 91% of the model's grid" in capsys.readouterr().out
        own = splits["train"].placement(0).own
        assert own == (slice(3, 93), slice(1, 102))
        np.testing.assert_array_equal(splits["train"].pixels[0][own], noise(20, (90, 101)))
    info = StudyInfo.from_splits(splits)
    assert splits["train"].pixels.shape[1:] == grid == (info.height, info.width)
    assert open_study(replace(config, height=64))["test"].pixels.shape[1:] == (64, grid[1])
    assert open_study(replace(config, height=64, width=32))["test"].pixels.shape[1:] == (64, 32)
    other = replace(config, height=64, width=64, fit="pad")  # the model has its own
    again = dataset.open_trained_study(info, other, "x.pth")
    assert again["train"].pixels.shape[1:] == grid and again["train"].config.fit == "auto"


@pytest.mark.parametrize("volume", [True, False])
def test_what_is_no_slice_has_no_say_in_the_grid(tmp_path, volume):
    """A volume is refused before it is unpacked."""
    config = made_of(tmp_path / "s", *[(40, 48)] * 3)
    bad = tmp_path / "s" / "keras_slices_train" / name_of(9, 0)
    bad.write_bytes(b"no slice")
    if volume:
        save(bad, np.zeros((512, 512, 128), np.uint8))
    reason = "512x512x128" if volume else "not a NIfTI file"
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf"1 of 7 files.*\n.*case_009.*{reason}"):
            open_study(config)
        assert tracemalloc.get_traced_memory()[1] < 2**23  # unpacked, it has 2**25 bytes
    finally:
        tracemalloc.stop()


PLANES = {"RS": "coronal", "AR": "axial", "PI": "sagittal"}


@pytest.mark.parametrize("directions", PLANES)
def test_a_record_tells_the_plane_and_the_directions_of_most_slices(study, config, directions):
    ends = {"R": (0, 1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.zeros((4, 4))
    for column, letter in enumerate(directions):
        axis, sign = ends[letter]
        affine[axis, column] = 2 * sign
    affine[:3, 2], affine[3, 3] = np.cross(affine[:3, 0], affine[:3, 1]), 1
    for number in range(12):  # half of them; one says nothing; the others run elsewhere
        put(study, noise(number), number, affine if number < 6 else AFFINE if number > 6 else None)
    info = StudyInfo.from_splits(open_study(config))
    assert (info.directions, info.plane) == (directions, PLANES[directions])
    for path in study.rglob("case_*"):
        save(path, noise(1), None)
    info = StudyInfo.from_splits(open_study(config))
    assert (info.directions, info.plane) == ("", "")


def test_what_is_odd_in_slices_is_said(study, config, capsys, tmp_path):
    """Slices of one value, broken affines, two that contradict each other, other directions."""
    open_study(config)
    assert "slices" in (plain := capsys.readouterr().out) and "such as" not in plain
    assert "different directions" not in plain
    data = bytearray(nibabel.Nifti1Image(noise(1), AFFINE).to_bytes())
    data[280:328] = bytes(48)  # an sform of zeros
    (study / "keras_slices_train" / name_of(4, 0)).write_bytes(gzip.compress(bytes(data)))
    image = nibabel.Nifti1Image(noise(2), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE @ np.diag([-1, 1, -1, 1]), 1)
    image.to_filename(study / "keras_slices_train" / name_of(4, 1))
    put(study, np.full(SIZE, 7, np.float32), 2)
    put(study, noise(3), 3, AFFINE @ MIRRORED)
    put(study, noise(4), 4, None)  # it tells no directions
    train = open_study(config)["train"]
    out = capsys.readouterr().out
    for line, number in (
        ("1 slices have an unusable affine in their header", 0),
        ("1 slices have an sform and a qform that turn them", 1),
        ("1 slices have one value only", 2),
    ):
        assert name_of(4, number) in next(said for said in out.splitlines() if line in said)
    assert "different directions: 13 LS, 1 RS" in out
    assert train.std[2] == 1 and train.mean[2] == 7 and not train[2]["image"].any()
    made = dataset.restore(train, 0, np.zeros(SIZE))
    dataset.save_reconstruction(train, 0, made, tmp_path / "r.nii.gz")
    header = nibabel.load(tmp_path / "r.nii.gz").header  # it tells the voxel sizes alone
    sizes = np.linalg.norm(AFFINE[:3, :2], axis=0)
    np.testing.assert_allclose(header["pixdim"][1:3], sizes, rtol=1e-6)
    assert header["sform_code"] == header["qform_code"] == 0


def break_file(path, kind):
    """Make the slice at `path` unusable; returns what the message must say of it."""
    data = path.read_bytes()
    odd = noise(1)
    odd[3, 4] = np.nan if kind == "nan" else np.inf
    rgb = np.zeros(SIZE, dtype=[(c, "u1") for c in "RGB"])
    arrays = {
        "nan": (odd, "1 of 512 pixels are NaN or Inf"),
        "inf": (odd, "1 of 512 pixels are NaN or Inf"),
        "overflow": (noise(1).astype(np.float64) * 1e300, "NaN or Inf"),
        "complex": (noise(1).astype(np.complex64), "complex64"),
        "rgb": (rgb, "RGB"),
        "one axis": (noise(1, (64,)), r"shape \(64,\)"),
        "plane lost": (noise(1, (32, 1, 1)), r"shape \(32, 1, 1\)"),
    }
    raw = {
        "truncated": (data[: len(data) // 2], "not a whole NIfTI"),
        "corrupt": (data[:300] + bytes(64) + data[364:], "not a whole NIfTI"),
        "not nifti": (gzip.compress(b"hello" * 999), "not a NIfTI"),
        "text": (b"<html>404</html>", "not a NIfTI"),
        "empty": (b"", "not a NIfTI"),
        "short pixels": (gzip.compress(gzip.decompress(data)[:-40]), "not a whole NIfTI"),
    }
    if kind in raw:
        path.write_bytes(raw[kind][0])
        return raw[kind][1]
    save(path, arrays[kind][0])
    return arrays[kind][1]


KINDS = ["nan", "inf", "overflow", "complex", "rgb", "one axis", "plane lost"]
KINDS += ["truncated", "corrupt", "not nifti", "text", "empty", "short pixels"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_named_with_its_reason_and_leaves_no_cache(study, config, tmp_path, kind):
    reason = break_file(study / "keras_slices_train" / name_of(4, 5), kind)
    with pytest.raises(ValueError, match=f"(?s)1 of 16 files.*{name_of(4, 5)}: .*{reason}"):
        open_study(config)
    assert not list((tmp_path / "cache").iterdir())


def test_all_bad_files_of_all_splits_are_listed_in_one_go(study, config):
    for number in range(9):
        break_file(study / "keras_slices_train" / name_of(4, number), "text")
    break_file(study / "keras_slices_test" / name_of(40, 1), "nan")
    save(study / "keras_slices_validate" / "brain.nii.gz", noise(2))
    save(study / "keras_slices_validate" / name_of(36, 0)[:-3], noise(2))  # beside its .nii.gz
    with pytest.raises(ValueError) as error:
        open_study(config)
    message = str(error.value)
    assert message.count("\n  ") == 11 and "... and 2 more" in message
    twice = "read as patient 36, week 0, slice 0, as"
    assert all(words in message for words in ("12 of 18 files", "no patient in its name", twice))


# ---- masks ----


def put_mask(study, split, patient, number, labels, affine=AFFINE):
    name = name_of(patient, number).replace("case", "seg")
    return save(study / f"keras_slices_seg_{split}" / name, labels, affine)


def blocks(seed, values=(0, 3, 7), shape=SIZE):
    kind = np.int16 if max(values) < 2**15 else np.int64
    return np.random.default_rng(seed).choice(values, shape).astype(kind)


@pytest.fixture
def masked(study):
    """Every slice but two has a mask; labels 0 and 900 are in other splits than the train split."""
    for number in range(11):
        put_mask(study, "train", 4, number, blocks(number, (3, 7)))
    for number in range(2):
        put_mask(study, "validate", 36, number, blocks(50 + number))
    put_mask(study, "test", 40, 0, blocks(60, (900, 3, 0)))
    return study


def test_masks_are_class_indices_of_the_train_split_s_labels(masked, config, capsys):
    for _ in range(2):  # made, then from the cache
        splits = open_study(config)
        out = capsys.readouterr().out
        assert "2 slices have no mask" in out and "labels 0, 3, 7\n" in out
        assert "no training mask shows the labels 900: their pixels count as unknown" in out
        assert {split.labels for split in splits.values()} == {(0, 3, 7)}
        assert splits["train"].has_mask.tolist() == [True] * 11 + [False]
        assert splits["test"].has_mask.tolist() == [True, False]
        found = splits["train"].masks([11, 2, 2])
        assert found.dtype == torch.uint8 and found.shape == (3, *SIZE) and (found[0] == 255).all()
        values = np.array(splits["train"].labels)
        for index in (1, 2):
            np.testing.assert_array_equal(values[found[index]], blocks(2, (3, 7)))
        tested, truth = splits["test"].masks([0])[0].numpy(), blocks(60, (900, 3, 0))
        np.testing.assert_array_equal(tested == 255, truth == 900)
        np.testing.assert_array_equal(values[tested[truth != 900]], truth[truth != 900])
    pickled = pickle.dumps(splits["train"])
    assert len(pickled) < splits["train"].pixels.nbytes  # it carries no pixels
    again = pickle.loads(pickled)
    assert again.masks([0, 11]).equal(splits["train"].masks([0, 11]))
    assert again.images([0, 11]).equal(splits["train"].images([0, 11]))


@pytest.mark.parametrize("case", ["all zero", "of other splits alone"])
def test_a_study_whose_training_masks_show_no_organ_is_one_without_masks(
    study, config, capsys, case
):
    if case == "all zero":
        for number in range(12):
            put_mask(study, "train", 4, number, np.zeros(SIZE, np.uint8))
    put_mask(study, "test", 40, 0, blocks(1))
    splits = open_study(config)
    assert [split.labels for split in splits.values()] == [()] * 3
    assert not any(split.has_mask.any() for split in splits.values())
    out = capsys.readouterr().out
    assert "no training mask shows an organ: the study counts as one without masks" in out
    assert "slices have no mask" not in out


def test_classes_are_in_the_order_of_labels_whatever_slice_shows_them_first(study, config):
    for number, label in enumerate((7, 3, 5)):
        put_mask(study, "train", 4, number, np.full(SIZE, label, np.uint8))
    train = open_study(config)["train"]
    assert train.labels == (0, 3, 5, 7)
    assert train.masks([0, 1, 2])[:, 0, 0].tolist() == [3, 1, 2]


def test_labels_are_never_taken_through_a_float(study, config):
    atlas = (0, 997, 312782546, 312782550)  # float32 makes 312782560 of both
    for number in range(12):
        put(study, noise(number, (50, 26)), number)
        put_mask(study, "train", 4, number, blocks(number, atlas, (50, 26)).astype(np.int32))
    assert open_study(config)["train"].labels == atlas
    for dtype in (np.uint32, np.float64):
        put_mask(study, "train", 4, 0, blocks(0, atlas, (50, 26)).astype(dtype))
        assert open_study(config)["train"].labels == atlas
    put_mask(study, "train", 4, 0, blocks(0, atlas, (50, 26)).astype(np.float32))
    with pytest.raises(UserError, match=r"seg_004_week_0_slice_0.*a label of 312782560.* 16777216"):
        open_study(config)


def test_labels_that_are_almost_whole_are_whole(study, config):
    """A float mask that was resampled, and one whose header scales 255 to 1.0000001."""
    labels = blocks(0, (0, 1, 2))
    put_mask(study, "train", 4, 0, labels * np.float32(0.9999))
    put_mask(study, "train", 4, 1, (labels - 0.004).astype(np.float32))
    path = put_mask(study, "train", 4, 2, np.full(SIZE, 255, np.uint8))
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<f", data, 112, 1 / 255)  # scl_slope
    path.write_bytes(gzip.compress(data))
    assert 1 < nibabel.load(path).get_fdata().max() < 1.0001
    train = open_study(config)["train"]
    assert train.labels == (0, 1, 2)
    for number, expected in enumerate((labels, labels, np.ones(SIZE))):
        np.testing.assert_array_equal(train.masks([number])[0], expected)
    put_mask(study, "train", 4, 0, labels * np.float32(0.98))
    with pytest.raises(UserError, match=r"a label of [01]\.9[68]"):
        open_study(config)
    put_mask(study, "train", 4, 0, labels / np.float32(255))  # no empty mask
    with pytest.raises(UserError, match=r"a label of 0\.00"):
        open_study(config)


def test_one_picture_in_two_splits_is_said_whatever_it_is_called(study, config, capsys):
    open_study(config)
    assert "another split" not in capsys.readouterr().out
    for split, patient in (("train", 4), ("test", 40)):  # of one value: no sign of anything
        save(study / f"keras_slices_{split}" / name_of(patient, 5), np.zeros(SIZE, np.float32))
    save(study / "keras_slices_test" / name_of(40, 1), noise(403))
    save(study / "keras_slices_test" / name_of(40, 2), noise(403))  # twice in a split, and in train
    for _ in range(2):  # decoded, and from the cache
        open_study(config)
        out = capsys.readouterr().out
        assert "warning: 2 slices are also in another split, such as " in out
        assert f"{name_of(40, 1)}, which is " in out and f"{name_of(4, 3)}. Is it one" in out
    # Pictures of one checksum, or one mean, or one deviation, are not one picture yet.
    jobs = [dataset.Job(split, None, None) for split in SPLITS]
    table = {"constant": [False] * 3, "sums": np.zeros((3, 2)), "mean": [0, 0, 1], "std": [1, 2, 1]}
    for _ in range(3):
        assert not dataset._notes_on_copies(jobs, table)
        table["mean"], table["std"], sums = table["sums"][:, 0], table["mean"], table["std"]
        table["sums"] = np.stack([sums, sums], 1)


def test_a_mask_that_lies_elsewhere_by_its_affine_is_said(study, config, capsys):
    path = study / "keras_slices_seg_train" / name_of(4, 0).replace("case", "seg")
    for shift, said in ((0.4, False), (100, True)):
        save(path, np.eye(32, 16, dtype=np.uint8), AFFINE + shift * np.eye(4, k=3))
        open_study(config)
        out = capsys.readouterr().out
        assert ("affines of 1 masks put them" in out and f"such as {path}" in out) is said


def test_a_study_without_masks_has_no_labels(config, capsys):
    train = open_study(config)["train"]
    assert train.labels == () and not train.has_mask.any()
    assert "no mask" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="without masks"):
        train.masks([0])


@pytest.mark.parametrize("shape", [(64, 32), (64, 40), (33, 17), (31, 15), (10, 50), (2, 2)])
def test_a_mask_is_resized_to_its_nearest_pixel_as_skimage_does(study, config, shape):
    """So no label comes up that lies between two others."""
    labels = blocks(3, range(0, 400, 2), shape)
    put(study, noise(8, shape), 0)
    put_mask(study, "train", 4, 0, labels)
    train = open_study(replace(config, fit="stretch"))["train"]
    expected = resize(labels, SIZE, order=0, anti_aliasing=False, preserve_range=True)
    np.testing.assert_array_equal(np.array(train.labels)[train.masks([0])[0]], expected)


def test_masks_are_part_of_the_fingerprint_and_the_cache(masked, config, capsys):
    first = open_study(config)
    put_mask(masked, "train", 4, 3, blocks(99, (3, 7)))
    again = open_study(config)
    assert "from the cache" not in capsys.readouterr().out
    assert first["train"].fingerprint != again["train"].fingerprint
    assert first["test"].fingerprint == again["test"].fingerprint
    shutil.rmtree(masked / "keras_slices_seg_test")
    assert open_study(config)["test"].fingerprint != first["test"].fingerprint


ITS_NAME = "seg_004_week_0_slice_5"
MASK_FAULTS = {  # the mask of training slice 5, what else is changed of it, and what is said
    "size": (blocks(1, shape=(32, 17)), {}, rf"mask .*{ITS_NAME}.*shape is \(32, 17\)"),
    "fractions": (blocks(1) + np.float32(0.5), {}, rf"{ITS_NAME}.*3\.5; expected whole numbers"),
    "NaN": (blocks(1) * np.float32("nan"), {}, f"{ITS_NAME}.*a label of nan"),
    "Inf": (np.full(SIZE, np.inf), {}, f"{ITS_NAME}.*a label of inf"),
    "negative": (blocks(1, (0, 3, -1)), {}, f"{ITS_NAME}.*a label of -1; expected .* from 0"),
    "no slice": (blocks(1), {"number": 77}, r"seg_004_week_0_slice_77.*without its slice"),
    "no patient": (blocks(1), {"patient": 36}, r"seg_036_week_0_slice_5.*without its slice"),
    "mirrored": (blocks(1), {"affine": AFFINE @ MIRRORED}, f"{ITS_NAME}.*turns or mirrors"),
    "exchanged": (blocks(1), {"affine": AFFINE[:, [1, 0, 2, 3]]}, f"{ITS_NAME}.*turns or mirrors"),
    "an image": (
        np.arange(512, dtype=np.int16).reshape(SIZE),
        {},
        f"{ITS_NAME}.*255 different labels",
    ),
}


@pytest.mark.parametrize("fault", MASK_FAULTS)
def test_a_bad_mask_is_named_with_its_reason(masked, config, fault):
    labels, changes, message = MASK_FAULTS[fault]
    open_study(config)  # the cache that it leaves hides no fault
    put_mask(masked, **{"split": "train", "patient": 4, "number": 5, "labels": labels} | changes)
    with pytest.raises(ValueError, match=f"(?s)1 of 1[67] files.*{message}"):
        open_study(config)


def test_a_mask_with_an_unnamed_affine_or_an_extra_axis_is_welcome(study, config):
    path = put_mask(study, "train", 4, 0, blocks(1)[..., None], None)
    assert nibabel.load(path).header["sform_code"] == nibabel.load(path).header["qform_code"] == 0
    train = open_study(config)["train"]
    np.testing.assert_array_equal(np.array(train.labels)[train.masks([0])[0]], blocks(1))


# ---- cache ----


def the_cache(tmp_path, name="cache"):
    (folder,) = (tmp_path / name).iterdir()
    return folder


def test_a_second_start_opens_no_slice(config, monkeypatch, capsys):
    first = open_study(config)
    monkeypatch.setattr(dataset, "_decode", None)
    second = open_study(config)
    assert "from the cache" in capsys.readouterr().out
    for split in SPLITS:
        np.testing.assert_array_equal(first[split].pixels, second[split].pixels)
        assert first[split].fingerprint == second[split].fingerprint
    assert len({second[split].fingerprint for split in SPLITS}) == 3


def test_nothing_is_written_but_the_cache_and_that_once(study, tmp_path, monkeypatch):
    """Slices and a cache may lie in a colleague's folders, which this user may only read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = DataConfig(data=str(study), height=32, width=16)

    def everything():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = everything()
    splits = open_study(config)
    made = everything()
    assert before.items() <= made.items()
    cache = the_cache(tmp_path / "cache", "vqvae2-slices")
    assert all(
        path in (cache, *cache.parents) or cache in path.parents for path in made - before.keys()
    )
    for folder in (cache, cache.parent):  # slices are nobody else's to see
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    splits = open_study(config)
    splits["train"].images([0, 1])
    dataset.open_trained_study(StudyInfo.from_splits(splits), config, "x.pth")
    assert everything() == made


def test_a_copy_has_the_same_fingerprint_and_other_pixels_another(study, config, tmp_path):
    first = open_study(config)
    # With times of its own.
    copy = Path(shutil.copytree(study, tmp_path / "copy", copy_function=shutil.copyfile))
    again = open_study(replace(config, data=str(copy)))
    assert all(again[split].fingerprint == first[split].fingerprint for split in SPLITS)
    path = copy / "keras_slices_train" / name_of(4, 0)
    # Of the same mean and deviation.
    save(path, nibabel.load(path).get_fdata().astype(np.float32)[::-1])
    changed = open_study(replace(config, data=str(copy)))
    assert changed["train"].fingerprint != first["train"].fingerprint
    assert changed["test"].fingerprint == first["test"].fingerprint


def another_slice(study, folder):
    """Of the same size: it is not gzipped, whatever its name."""
    path = study / "keras_slices_train" / name_of(4, 0)
    path.write_bytes(nibabel.Nifti1Image(noise(77 + (folder is not None)), AFFINE).to_bytes())
    os.utime(path, (0, 0))  # and time, as out of some archives


def one_slice_more(study, folder):
    put(study, noise(400), 12)


def one_slice_less(study, folder):
    os.remove(study / "keras_slices_train" / name_of(4, 11))


@pytest.mark.parametrize("change", [another_slice, one_slice_more, one_slice_less])
def test_a_changed_study_is_decoded_again_and_its_old_cache_goes(
    study, config, tmp_path, capsys, change
):
    another_slice(study, None)
    open_study(config)
    cache = the_cache(tmp_path)
    open_study(replace(config, height=16))  # at another size it is another cache, which stays
    change(study, cache)
    capsys.readouterr()
    splits = open_study(config)
    for split in SPLITS:
        for path, pixels in zip(splits[split].paths, splits[split].pixels, strict=True):
            data = path.read_bytes()
            data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
            expected = nibabel.Nifti1Image.from_bytes(data)
            np.testing.assert_array_equal(pixels, np.asarray(expected.dataobj))
    assert "from the cache" not in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for height in (32, 16):
        assert open_study(replace(config, height=height))["train"].pixels.shape[1] == height
        assert ("from the cache" in capsys.readouterr().out) == (height == 32)


def test_a_cache_that_cannot_be_written_names_the_flag(config, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="Fix: --cache DIR"):
        open_study(config)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a name
    with pytest.raises(UserError, match="Fix: --cache DIR"):
        open_study(replace(config, cache=""))
    assert len(open_study(replace(config, cache=str(tmp_path / "mine")))["train"]) == 12


@pytest.mark.parametrize("size", [None, 0, 100])
@pytest.mark.parametrize("name", [dataset.PIXELS, dataset.TABLE, dataset.INDEX])
def test_a_cache_that_cannot_be_read_is_named(config, tmp_path, name, size):
    """Programs that clean up take single files away, and a power cut leaves short ones."""
    trained, cache = StudyInfo.from_splits(open_study(config)), the_cache(tmp_path)
    whole = (cache / name).read_bytes()
    (cache / name).unlink()
    if size is not None:
        (cache / name).write_bytes(whole[:size])
    with pytest.raises(UserError, match=f"{cache}: cannot read .* Fix: delete this folder"):
        open_study(config)
    if name == dataset.INDEX:
        with pytest.raises(FileNotFoundError, match="Fix: --data DIR"):
            dataset.find_trained_study(trained, "x.pth", config.cache)


def test_who_is_slower_takes_the_slices_of_the_quicker_run(study, config, tmp_path, monkeypatch):
    """Just before this run gives its folder the name, another one is done with the same slices."""
    write = dataset._write_cache

    def write_while_another_run_does(folder, *args):
        monkeypatch.setattr(dataset, "_write_cache", write)
        write(folder, *args)
        quicker.append(open_study(config))

    quicker = []
    monkeypatch.setattr(dataset, "_write_cache", write_while_another_run_does)
    slower = open_study(config)["train"]
    assert slower.images([3]).equal(quicker[0]["train"].images([3]))
    assert the_cache(tmp_path).stat().st_mode & 0o777 == 0o700  # and nothing else is left


def test_what_leads_to_no_slice(study, config):
    """A link in a circle is passed over; a named pipe and a link to nothing are named."""
    train = study / "keras_slices_train"
    (train / "round").symlink_to(train)
    assert len(open_study(config)["train"]) == 12
    os.mkfifo(train / name_of(4, 50))
    (train / name_of(4, 60)).symlink_to("not there")
    with pytest.raises(UserError) as error:
        open_study(config)
    for reason in ("slice_50.*: not a regular file", "slice_60.*: No such file"):
        assert re.search(reason, str(error.value))


def test_capitals_folders_plain_and_other_files(study, config, capsys):
    train = study / "keras_slices_train"
    (train / name_of(4, 0)).rename(train / name_of(4, 0).upper())
    (train / "more").mkdir()
    (train / name_of(4, 1)).rename(train / "more" / name_of(4, 1))
    (train / name_of(4, 2)).unlink()
    save(train / name_of(4, 2)[:-3], noise(9))  # a plain .nii
    (train / f"._{name_of(4, 3)}").write_bytes(b"what macOS leaves")
    (train / "notes.txt").write_text("")
    found = open_study(config)["train"]
    assert len(found) == 12
    np.testing.assert_array_equal(found.pixels[2], noise(9))
    assert "1 other files were passed over" in capsys.readouterr().out
    (study / ".ipynb_checkpoints").mkdir()  # nobody's business
    (study / "keras_slices_masks_train").mkdir()  # misnamed, and not a word was lost on it
    open_study(config)
    assert (
        "1 other folders were passed over, such as keras_slices_masks_train"
        in capsys.readouterr().out
    )


def test_a_slice_s_own_pixels_are_those_that_no_padding_touches(study, config):
    put(study, noise(8, (40, 16)), 0)  # padded to the left and right of its columns
    put(study, noise(9, (32, 30)), 1)  # padded above and below
    train = open_study(config)["train"]
    assert train.placement(2).own == (slice(0, 32), slice(0, 16))
    assert train.placement(0).own == (slice(0, 32), slice(1, 14))
    assert train.placement(1).own == (slice(7, 24), slice(0, 16))
    inside = np.zeros(SIZE, bool)
    inside[train.placement(1).own] = True
    assert (train.pixels[1][~inside] == train.pixels[1].min()).all()


def test_a_record_of_a_study_comes_back_and_a_damaged_one_is_named(config):
    info = StudyInfo.from_splits(open_study(config))
    assert StudyInfo.from_checkpoint({"data": asdict(info)}, "c.pth") == info
    for change in ({"height": "32"}, {"fit": "squeeze"}, {"width": -8}):
        with pytest.raises(UserError, match=r"c\.pth: damaged"):
            StudyInfo.from_checkpoint({"data": asdict(info) | change}, "c.pth")


def test_positions_run_from_the_first_slice_of_a_volume_to_its_last(study, config):
    for number in (30, 20):
        save(study / "keras_slices_train" / name_of(4, number, week=1), noise(number))
    save(study / "keras_slices_train" / name_of(5, 8), noise(1))
    train = open_study(config)["train"]
    expected = [*np.arange(12) / 11, 0, 1, np.nan]
    np.testing.assert_allclose(train.positions, expected, rtol=1e-6)


# ---- datasets ----


def test_a_loader_with_workers_equals_direct_reading(config):
    train = open_study(config)["train"]
    batches = list(torch.utils.data.DataLoader(train, 5, num_workers=2))
    assert torch.cat([batch["image"] for batch in batches]).equal(train.images(range(12)))
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(12))
    assert batches[0]["affine"].shape == (5, 4, 4) and batches[0]["path"][4] == str(train.paths[4])


def test_a_phantom_is_said_to_be_synthetic(study, config, capsys):
    assert not open_study(config)["train"].synthetic and "SYNTHETIC" not in capsys.readouterr().out
    (study / "SYNTHETIC.txt").write_text("made by a program")
    assert open_study(config)["test"].synthetic and capsys.readouterr().out.count("SYNTHETIC") == 1


def test_a_reconstruction_goes_back_to_scanner_units_and_place(study, config, tmp_path):
    x, y = np.meshgrid(np.linspace(0, 3, 32), np.linspace(0, 2, 18), indexing="ij")
    smooth = (500 + 300 * np.sin(x) * np.cos(y)).astype(np.float32)
    put(study, smooth, 1)
    train = open_study(config)["train"]
    for index, source, tolerance in ((0, noise(400), 1e-6), (1, smooth, 2e-2)):
        pixels = dataset.restore(train, index, train[index]["image"][0].numpy())
        dataset.save_reconstruction(train, index, pixels, tmp_path / "r.nii.gz")
        image = nibabel.load(tmp_path / "r.nii.gz")
        found = np.asarray(image.dataobj)
        np.testing.assert_allclose(found, source, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(image.affine, AFFINE)
        assert image.get_data_dtype() == np.float32 and image.shape == source.shape


def test_of_studies_of_one_name_that_of_the_training_is_found(study, tmp_path, monkeypatch):
    cache, made = str(tmp_path / "cache"), {}
    for place in ("a", "b", "c"):
        copy = shutil.copytree(study, tmp_path / place / "keras_slices_data")
        put(copy, noise(len(made) + 100))
        splits = open_study(DataConfig(data=str(copy), height=64, width=32, cache=cache))
        made[copy] = StudyInfo.from_splits(splits)
    (tmp_path / "keras_slices_data").mkdir()  # of that name, but not what it was trained on
    monkeypatch.chdir(tmp_path)
    for copy, info in made.items():
        info = replace(info, study="keras_slices_data")
        assert dataset.find_trained_study(info, "x.pth", cache) == str(copy)
        splits = dataset.open_trained_study(info, DataConfig(cache=cache), "x.pth")
        assert splits["test"].study == copy
    empty = str(tmp_path / "empty")
    assert dataset.find_trained_study(info, "x.pth", empty) == "keras_slices_data"
    (tmp_path / "keras_slices_data").rmdir()
    other = shutil.copytree(study, tmp_path / "keras_slices_data-old")  # another name
    open_study(DataConfig(data=str(other), height=64, width=32, cache=empty))
    with pytest.raises(FileNotFoundError, match=r"x\.pth was trained on is not there"):
        dataset.find_trained_study(info, "x.pth", empty)


def test_slices_of_another_plane_than_the_checkpoint_s_are_said(config, capsys):
    info = StudyInfo.from_splits(open_study(config))
    dataset.open_trained_study(info, config, "x.pth")
    assert "towards" not in capsys.readouterr().out
    other = replace(info, directions="RP", plane="axial")
    dataset.open_trained_study(other, config, "x.pth")
    assert "x.pth learnt axial ones (towards RP)" in capsys.readouterr().out
    other = replace(info, fingerprints=info.fingerprints | {"test": "other"})
    dataset.open_trained_study(other, config, "x.pth")
    assert "its test slices are not those that x.pth" in capsys.readouterr().out


# ---- mirroring ----


def sided_study(folder, affine, axis, radii=(6, 6)):
    """Slices with two discs beside the middle, along an axis: labels 3 and 9, and 5 between."""
    rng, grid = np.random.default_rng(0), np.mgrid[:64, :64]
    for split, patients in {"train": (1, 2, 3), "validate": (4,), "test": (5,)}.items():
        for patient in patients:
            for number in range(6):
                along, across = grid[axis], grid[1 - axis]
                off, middle = 15 + rng.integers(-2, 3), 31.5 + rng.integers(-2, 3)
                sides = zip((-off, off), radii, strict=True)
                discs = [np.hypot(along - 31.5 - side, across - middle) < r for side, r in sides]
                mask = 3 * discs[0] + 9 * discs[1] + 5 * (np.abs(along - 31.5) + across < 8)
                name = f"case_{patient:03d}_week_0_slice_{number}.nii.gz"
                image = (100 + 100 * (mask > 0) + rng.normal(size=mask.shape)).astype(np.float32)
                nifti.write(folder / f"keras_slices_{split}" / name, image, affine)
                name = name.replace("case", "seg")
                mask = mask.astype(np.uint8)
                nifti.write(folder / f"keras_slices_seg_{split}" / name, mask, affine)
    return open_study(DataConfig(str(folder), 64, 64))["train"]


def turned_affine(letters: str) -> np.ndarray:
    """The affine of a slice whose rows and columns run to these ends of the patient."""
    affine = np.eye(4)
    affine[:3, :2] = 0
    for column, letter in enumerate(letters):
        affine["RAS".index(letter), column] = 1
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
    return affine


@pytest.mark.parametrize("letters, axis", [("RA", 0), ("AR", 1), ("SR", 1), ("RS", 0)])
def test_left_and_right_labels_are_found_and_exchanged_along_the_patient_s_axis(
    letters, axis, tmp_path
):
    train = sided_study(tmp_path, turned_affine(letters), axis)
    mirror = train.mirror
    assert mirror.axis == axis - 2 and mirror.partners == ((1, 3),)  # of labels 0, 3, 5, 9
    assert "labels 3 and 9 lie on opposite sides" in mirror.note
    masks, images, some = train.masks([0, 1]), train.images([0, 1]), torch.tensor([True, False])
    mirrored = mirror.masks(masks, some)
    labels = np.array(train.labels)[mirrored[0].numpy()]
    expected = np.flip(np.array(train.labels)[masks[0].numpy()], axis)
    exchange = {0: 0, 3: 9, 5: 5, 9: 3}
    assert (labels == np.vectorize(exchange.get)(expected)).all()
    assert mirrored[1].equal(masks[1])
    moved = mirror.images(images, some)
    assert moved[0, 0].equal(images[0, 0].flip(axis)) and moved[1].equal(images[1])
    unknown = torch.full_like(masks, dataset.NO_MASK)
    assert mirror.masks(unknown, some).equal(unknown)
    two_pairs = dataset.Mirror(partners=((1, 2), (3, 4)))
    exchanged = two_pairs.masks(torch.arange(5).view(1, 1, 5), torch.tensor([True]))
    assert exchanged.flatten().tolist() == [0, 2, 1, 4, 3]
    train.oriented[:], train.labels = False, ()
    untold = dataset.Mirror.of(train)
    assert untold.axis == -2 and "no affine tells left and right" in untold.note


@pytest.mark.parametrize(
    "letters, radii, said",
    [("AS", (6, 6), "not mirrored"), ("RA", (10, 4), "unclear whether labels")],
)
def test_sagittal_slices_and_unclear_pairs_are_not_mirrored(tmp_path, letters, radii, said):
    mirror = sided_study(tmp_path, turned_affine(letters), 0, radii).mirror
    x = torch.randn(2, 1, 4, 4)
    assert mirror.axis is None and said in mirror.note
    assert mirror.images(x, torch.tensor([True, True])).equal(x)


def test_mirrored_overlap_is_the_dice_of_mean_maps(tmp_path, monkeypatch):
    train = sided_study(tmp_path, turned_affine("RA"), 0)
    masks = train.masks(range(len(train))).numpy()
    maps = np.stack([(masks == organ).mean(0) for organ in (1, 2, 3)])
    for i, one in enumerate(maps[:, ::-1]):
        for j, other in enumerate(maps):
            dice = 2 * np.minimum(one, other).sum() / (one.sum() + other.sum())
            assert dataset.mirrored_overlap(train, -2)[i, j] == pytest.approx(dice)
    # Each of a pair lies where the other one does; the first lies so by the second alone.
    overlap = np.array([[0.0, 0.6, 0.1], [0.6, 0.1, 0.7], [0.1, 0.7, 0.2]])
    monkeypatch.setattr(dataset, "mirrored_overlap", lambda *_: overlap)
    assert dataset.Mirror.of(train).partners == ((2, 3),)
