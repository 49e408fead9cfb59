"""Tiny volumes cut into slices; nibabel is the reference for where a plane lies."""

import os

import nibabel
import numpy as np
import pytest
from conftest import run
from nibabel.affines import apply_affine
from test_dataset import name_of, noise, save

from dataset import SPLITS, DataConfig, open_study, parse_name
from volumes import SliceConfig, slice_volumes, split_patients

RAS = np.array([[1.5, 0.1, 0, -20], [-0.1, 2.0, 0.2, 30], [0, -0.2, 1.25, 5], [0, 0, 0, 1]])  # oblique
SHAPE = (8, 10, 6)
SCHEMES = {
    "anonymous": (
        "semantic_MRs_anon/Case_{:03d}_Week{}_LFOV",
        "semantic_labels_anon/Case_{:03d}_Week{}_SEMANTIC_LFOV",
    ),
    "B": ("semantic_MRs/B{:03d}_Week{}_LFOV", "semantic_labels_only/B{:03d}_Week{}_SEMANTIC"),
}


def write_release(root, patients, scheme="anonymous", weeks=(0,), affine=RAS, axes=(0, 1, 2)):
    for patient in patients:
        for week in weeks:
            pixels = noise(10 * patient + week, SHAPE).transpose(axes)
            image, mask = (root / (form.format(patient, week) + ".nii.gz") for form in SCHEMES[scheme])
            save(image, pixels, affine)
            save(mask, (pixels // 9 % 6).astype(np.float32), affine)
    return root


def run_slice(release, out, **flags):
    slice_volumes(SliceConfig(volumes=str(release), out=str(out), **{"count": 4, **flags}))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_central_coronal_planes_and_masks_lie_where_the_volume_has_them(tmp_path, scheme):
    out = tmp_path / "out"
    run_slice(write_release(tmp_path / "a", (4, 36, 40), scheme, weeks=(0, 2)), out)
    assert len(list(out.rglob("case_*.nii.gz"))) == len(list(out.rglob("seg_*.nii.gz"))) == 24
    volume = noise(10 * 36 + 2, SHAPE)
    for number in range(4):
        plane = 3 + number  # the central 4 of 10
        image = nibabel.load(out / "keras_slices_validate" / name_of(36, number, week=2))
        mask = nibabel.load(out / "keras_slices_seg_validate" / f"seg_036_week_2_slice_{number}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), volume[:, plane, :])
        np.testing.assert_array_equal(
            np.asarray(mask.dataobj), (volume[:, plane, :] // 9 % 6).astype(np.uint8)
        )
        assert image.get_data_dtype() == np.float32 and mask.get_data_dtype() == np.uint8
        for i, k in ((0, 0), (7, 0), (0, 5), (3, 2)):
            where = apply_affine(RAS, [i, plane, k])
            np.testing.assert_allclose(apply_affine(image.affine, [i, k, 0]), where, atol=1e-4)
            np.testing.assert_allclose(apply_affine(mask.affine, [i, k, 0]), where, atol=1e-4)
        np.testing.assert_allclose(image.header.get_zooms(), [RAS_ZOOMS[0], RAS_ZOOMS[2]], rtol=1e-6)
    splits = open_study(DataConfig(data=str(out), height=8, width=6, cache=str(tmp_path / "cache")))
    assert [sorted({name.patient for name in splits[split].names}) for split in SPLITS] == [[4], [36], [40]]


RAS_ZOOMS = np.linalg.norm(RAS[:3, :3], axis=0)


def test_another_storage_order_gives_the_same_planes(tmp_path):
    axes = (2, 0, 1)  # stored head-foot, left-right, front-back
    affine = RAS.copy()
    affine[:3, :3] = RAS[:3, axes]
    run_slice(write_release(tmp_path / "a", (4,), affine=affine, axes=axes), tmp_path / "out")
    image = nibabel.load(tmp_path / "out" / "keras_slices_train" / name_of(4, 1))
    np.testing.assert_array_equal(np.asarray(image.dataobj), noise(40, SHAPE)[:, 4, :])
    np.testing.assert_allclose(apply_affine(image.affine, [2, 5, 0]), apply_affine(RAS, [2, 4, 5]), atol=1e-4)


def test_axis_first_and_count_choose_the_planes(tmp_path):
    run_slice(write_release(tmp_path / "a", (4,)), tmp_path / "out", axis=2, first=1, count=2)
    image = nibabel.load(tmp_path / "out" / "keras_slices_train" / name_of(4, 1))
    np.testing.assert_array_equal(np.asarray(image.dataobj), noise(40, SHAPE)[:, :, 2])
    np.testing.assert_allclose(apply_affine(image.affine, [2, 5, 0]), apply_affine(RAS, [2, 5, 2]), atol=1e-4)
    assert len(list((tmp_path / "out").rglob("case_*"))) == 2


def test_a_volume_without_orientation_needs_the_axis_flag(tmp_path):
    release = write_release(tmp_path / "a", (4,), affine=None)
    with pytest.raises(ValueError, match=r"Case_004.*no orientation.*--axis"):
        run_slice(release, tmp_path / "out")
    run_slice(release, tmp_path / "other", axis=1)
    assert len(list((tmp_path / "other").rglob("case_*"))) == 4


def test_slicing_resumes_without_touching_whole_files(tmp_path):
    release, out = write_release(tmp_path / "a", (4, 5)), tmp_path / "out"
    run_slice(release, out)
    files = sorted(out.rglob("*.nii.gz"))
    lost = files[3]
    expected = lost.read_bytes()
    lost.unlink()
    for file in files:
        if file != lost:
            os.utime(file, ns=(10**18, 10**18))
    run_slice(release, out)
    assert lost.read_bytes() == expected and sorted(out.rglob("*.nii.gz")) == files
    assert all(file.stat().st_mtime_ns == 10**18 for file in files if file != lost)


def test_a_folder_of_other_planes_or_another_split_is_not_completed(tmp_path):
    release, out = write_release(tmp_path / "a", (4, 5)), tmp_path / "out"
    run_slice(release, out)
    with pytest.raises(ValueError, match="first: -1, now 2"):
        run_slice(release, out, first=2)
    write_release(release, range(101, 110))  # now the split is a random one
    with pytest.raises(ValueError, match=r"patient \d\d\d: \w+, now"):
        for seed in range(20):
            run_slice(release, out, seed=seed)


def test_settings_that_cut_nothing_bind_nobody(tmp_path):
    release = write_release(tmp_path / "a", (4,))
    with pytest.raises(ValueError, match="--count within"):
        run_slice(release, tmp_path / "out", count=600)
    run_slice(release, tmp_path / "out")
    assert list((tmp_path / "out").rglob("case_*"))


def test_bad_volumes_are_listed_and_the_others_done(tmp_path):
    release, out = write_release(tmp_path / "a", (4, 5, 6, 7, 8)), tmp_path / "out"
    images, masks = SCHEMES["anonymous"]
    (release / f"{images.format(5, 0)}.nii.gz").write_bytes(b"no")
    save(release / f"{masks.format(6, 0)}.nii.gz", np.ones((8, 9, 6), np.uint8), RAS)
    save(release / f"{masks.format(7, 0)}.nii.gz", np.full(SHAPE, 0.5, np.float32), RAS)
    (release / f"{masks.format(8, 0)}.nii.gz").unlink()
    with pytest.raises(
        ValueError, match=r"(?s)3 of 5 files.*Case_005.*Case_006.*its mask.*Case_007.*its mask"
    ) as error:
        run_slice(release, out)
    assert "Case_004" not in str(error.value)
    assert {parse_name(file).patient for file in out.rglob("case_*")} == {4, 8}
    assert {parse_name(file).patient for file in out.rglob("seg_*")} == {4}


def test_patients_are_split_as_in_the_course_or_by_seed():
    course, line = split_patients({*range(4, 34), *range(35, 43)}, seed=0)
    assert "course" in line and len(course) == 38
    assert [sum(split == of for of in course.values()) for split in SPLITS] == [31, 4, 3]
    assert (
        course[33] == course[35] == "train"
        and course[36] == course[39] == "validate"
        and course[40] == "test"
    )
    some, line = split_patients({1, *range(4, 33)}, seed=0)
    assert "seed 0" in line and [sum(split == of for of in some.values()) for split in SPLITS] == [24, 3, 3]
    assert some == split_patients({1, *range(4, 33)}, seed=0)[0]
    assert some != split_patients({1, *range(4, 33)}, seed=1)[0]
    with pytest.raises(ValueError, match="at least 3"):
        split_patients({100, 101}, seed=0)


def test_the_command_ends_in_code_2_and_one_line(tmp_path):
    code, _, err = run("dataset.py", "slice", "--volumes", tmp_path)
    assert code == 2 and err.startswith("error: ") and "semantic_MRs" in err
    assert "Traceback" not in err
