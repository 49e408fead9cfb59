"""Tiny volumes cut into slices; nibabel is the reference for where a plane lies."""

import json
import re
import shutil
from collections import Counter

import nibabel
import numpy as np
import pytest
from conftest import command
from nibabel.affines import apply_affine
from test_dataset import name_of, noise, save

import slice_volumes
from dataset import SPLITS, DataConfig, open_study, parse_name
from slice_volumes import SliceConfig, split_patients
from support.runtime import UserError

# Oblique.
RAS = np.array([[1.5, 0.1, 0, -20], [-0.1, 2.0, 0.2, 30], [0, -0.2, 1.25, 5], [0, 0, 0, 1]])
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
            arrays = pixels, (pixels // 9 % 6).astype(np.float32)
            for form, array in zip(SCHEMES[scheme], arrays, strict=True):
                save(root / (form.format(patient, week) + ".nii.gz"), array, affine)
    return root


def mask_of(release, patient):
    return release / f"{SCHEMES['anonymous'][1].format(patient, 0)}.nii.gz"


def run_slice(release, out, **flags):
    slice_volumes.slice_volumes(
        SliceConfig(volumes=str(release), out=str(out), **{"count": 4, **flags})
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_central_coronal_planes_and_masks_lie_where_the_volume_has_them(tmp_path, scheme):
    out = tmp_path / "out"
    run_slice(write_release(tmp_path / "a", (4, 36, 40), scheme, weeks=(0, 2)), out)
    assert len(list(out.rglob("case_*.nii.gz"))) == len(list(out.rglob("seg_*.nii.gz"))) == 24
    volume = noise(10 * 36 + 2, SHAPE)
    for number in range(4):
        plane = 3 + number  # the central 4 of 10
        name = name_of(36, number, week=2)
        image = nibabel.load(out / "keras_slices_validate" / name)
        mask = nibabel.load(out / "keras_slices_seg_validate" / name.replace("case", "seg"))
        expected = volume[:, plane, :]
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), (expected // 9 % 6).astype("u1"))
        assert image.get_data_dtype() == np.float32 and mask.get_data_dtype() == np.uint8
        for i, k in ((0, 0), (7, 0), (0, 5), (3, 2)):
            where = apply_affine(RAS, [i, plane, k])
            np.testing.assert_allclose(apply_affine(image.affine, [i, k, 0]), where, atol=1e-4)
            np.testing.assert_allclose(apply_affine(mask.affine, [i, k, 0]), where, atol=1e-4)
        zooms = np.linalg.norm(RAS[:3, [0, 2]], axis=0)
        np.testing.assert_allclose(image.header.get_zooms(), zooms, rtol=1e-6)
    splits = open_study(DataConfig(data=str(out), height=8, width=6, cache=str(tmp_path / "cache")))
    for split, patient in zip(SPLITS, (4, 36, 40), strict=True):
        assert {name.patient for name in splits[split].names} == {patient}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axis_and_count_choose_the_planes(tmp_path, axis):
    release, out = write_release(tmp_path / "a", (4, 36, 40)), tmp_path / "out"
    run_slice(release, out, axis=axis, count=2)
    image, plane = nibabel.load(out / "keras_slices_train" / name_of(4, 1)), SHAPE[axis] // 2
    np.testing.assert_array_equal(np.asarray(image.dataobj), noise(40, SHAPE).take(plane, axis))
    there, where = apply_affine(image.affine, [2, 5, 0]), np.insert([2, 5], axis, plane)
    np.testing.assert_allclose(there, apply_affine(RAS, where), atol=1e-4)
    assert len(list(out.rglob("case_*"))) == 6


def test_masks_that_lie_elsewhere_are_said(tmp_path, capsys):
    release = write_release(tmp_path / "a", (4, 36, 40))
    moved = RAS.copy()
    moved[:3, 3] += 2 * RAS[:3, 0]
    larger = RAS @ np.diag([1.2, 1, 1, 1])  # voxels, so that the last ones lie elsewhere
    for number, affine in enumerate((RAS + 1e-3, moved, larger)):
        save(mask_of(release, 4), np.ones(SHAPE, np.uint8), affine)
        run_slice(release, tmp_path / f"out{number}")
        assert (
            "warning: the affines of 1 masks put them elsewhere" in capsys.readouterr().out
        ) == (number > 0)


def test_a_volume_without_orientation_needs_the_axis_flag(tmp_path):
    release = write_release(tmp_path / "a", (4, 36, 40), affine=None)
    with pytest.raises(ValueError, match=r"Case_004.*no orientation.*--axis"):
        run_slice(release, tmp_path / "out")
    run_slice(release, tmp_path / "other", axis=1)
    (image, *more) = (tmp_path / "other").rglob("case_*")
    assert len(more) == 11
    assert nibabel.load(image).header["sform_code"] == 0  # the slices do not pretend to know


def test_a_folder_that_holds_slices_is_refused(tmp_path):
    """Slices of masks that were corrected since must not pass for those of the new ones."""
    release, out = write_release(tmp_path / "a", (4, 36, 40)), tmp_path / "out"
    run_slice(release, out)
    before = {file: file.read_bytes() for file in sorted(out.rglob("*.*"))}
    save(mask_of(release, 4), np.ones(SHAPE, "u1"), RAS)
    with pytest.raises(UserError, match=r"out: already holds slices, such as .* Fix: delete it"):
        run_slice(release, out)
    assert before == {file: file.read_bytes() for file in sorted(out.rglob("*.*"))}
    with pytest.raises(OSError, match=r"x: cannot write there .* Fix: another --out"):
        run_slice(release, next(iter(before)) / "x")
    shutil.rmtree(out)
    run_slice(release, out)
    mask = nibabel.load(out / "keras_slices_seg_train" / "seg_004_week_0_slice_0.nii.gz")
    assert (np.asarray(mask.dataobj) == 1).all()


def test_a_cut_that_was_stopped_leaves_no_study(tmp_path, monkeypatch):
    release, cut = write_release(tmp_path / "a", (4, 5, 36, 40)), slice_volumes._slice_volume

    def stopped(volume, config):
        if cut(volume, config) and volume[0].patient == 36:
            raise KeyboardInterrupt

    monkeypatch.setattr(slice_volumes, "_slice_volume", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_slice(release, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_bad_volumes_are_listed_and_the_others_done(tmp_path):
    release, out = write_release(tmp_path / "a", (4, 5, 6, 7, 8, 36, 40)), tmp_path / "out"
    (release / f"{SCHEMES['anonymous'][0].format(5, 0)}.nii.gz").write_bytes(b"no")
    save(mask_of(release, 6), np.ones((8, 9, 6), np.uint8), RAS)
    save(mask_of(release, 7), np.full(SHAPE, 0.5, np.float32), RAS)
    mask_of(release, 8).unlink()
    bad = r"(?s)3 of 7 files.*Case_005.*Case_006.*its mask.*Case_007.*its mask"
    with pytest.raises(ValueError, match=bad) as error:
        run_slice(release, out)
    assert "Case_004" not in str(error.value)
    assert {parse_name(file).patient for file in out.rglob("case_*")} == {4, 8, 36, 40}
    assert {parse_name(file).patient for file in out.rglob("seg_*")} == {4, 36, 40}


def test_labels_of_masks_stay_what_they_are(tmp_path):
    """An atlas' labels are beyond what float32 holds; its two neighbours stay two structures."""
    release = write_release(tmp_path / "a", (4, 36, 40))
    mask = np.zeros(SHAPE, np.int32)
    mask[2:4], mask[4:6], mask[6:] = 312782546, 312782550, 997
    for patient in (4, 36, 40):
        save(mask_of(release, patient), mask, RAS)
    run_slice(release, tmp_path / "out")
    for path in (tmp_path / "out").rglob("seg_*"):
        np.testing.assert_array_equal(np.asarray(nibabel.load(path).dataobj), mask[:, 0])
    mask[:2] = -1
    save(mask_of(release, 4), mask, RAS)
    with pytest.raises(UserError, match=r"Case_004.*its mask .*-1"):
        run_slice(release, tmp_path / "other")


def test_patients_are_split_as_in_the_report_or_by_seed():
    course, line = split_patients({*range(4, 34), *range(35, 43)}, seed=0, hipmri=True)
    sizes = Counter(course.values())
    assert "as in the report" in line and [sizes[split] for split in SPLITS] == [31, 4, 3]
    assert course[33] == course[35] == "train" and course[40] == "test"
    assert course[36] == course[39] == "validate"
    others = {1, *range(4, 33)}
    chosen, line = split_patients(others, seed=0, hipmri=True)
    sizes = Counter(chosen.values())
    assert "seed 0" in line and [sizes[split] for split in SPLITS] == [24, 3, 3]
    assert chosen == split_patients(others, seed=0, hipmri=True)[0]
    assert chosen != split_patients(others, seed=1, hipmri=True)[0]
    assert sorted(split_patients({1, 2, 3}, seed=0, hipmri=False)[0].values()) == sorted(SPLITS)
    with pytest.raises(ValueError, match="at least 3"):
        split_patients({100, 101}, seed=0, hipmri=False)


def test_the_command_ends_in_code_2_and_one_line(tmp_path):
    code, _, err = command(slice_volumes, "--volumes", tmp_path)
    assert code == 2 and err.startswith("error: ") and "no volumes" in err
    assert "Traceback" not in err


# ---- anyone's volumes ----

ORIENTATIONS = ("RAS", "LPS", "RPI", "PIR", "SAL", "ILA")


def landmark(tilt=0.0, shape=(10, 12, 8)):
    """A volume in RAS, bright at the right, front and head; its affine, tilted by degrees."""
    pixels = noise(1, shape)
    pixels[-3:, -3:, -3:] += 5000
    c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([2.0, 1.5, 3.0])
    affine[:3, 3] = -10, 20, 5
    return pixels, affine


def stored(pixels, affine, codes):
    """The same voxels at the same places, stored in the order and directions of `codes`."""
    image = nibabel.Nifti1Image(pixels, affine)
    here = nibabel.io_orientation(affine)
    change = nibabel.orientations.ornt_transform(here, nibabel.orientations.axcodes2ornt(codes))
    return image.as_reoriented(change)


def write_subject(root, patient, codes="RAS", tilt=0.0, mask_codes=None):
    pixels, affine = landmark(tilt)
    path = root / f"sub-{patient:02d}" / "ses-2" / "anat" / f"sub-{patient:02d}_ses-2_T2w.nii.gz"
    path.parent.mkdir(parents=True)
    nibabel.save(stored(pixels, affine, codes), path)
    if mask_codes:
        mask = stored((pixels > 4000).astype(np.uint8), affine, mask_codes)
        nibabel.save(mask, beside(path))
    return path


def beside(path):
    """The mask that `write_subject` writes beside a volume."""
    return path.with_name(path.name.replace("T2w", "T2w_seg"))


CUTS = [("coronal", 12, 0), ("coronal", 12, -30), ("axial", 8, 12), ("sagittal", 10, 0)]


@pytest.mark.parametrize("plane, depth, tilt", CUTS)
def test_all_orientations_give_the_same_slices_in_the_same_place(tmp_path, plane, depth, tilt):
    for patient, codes in enumerate(ORIENTATIONS, 1):
        write_subject(tmp_path / "bids", patient, codes, tilt, mask_codes=ORIENTATIONS[-patient])
    run_slice(tmp_path / "bids", tmp_path / "out", plane=plane, count=0)
    pixels, affine = landmark(tilt)
    axes = {"coronal": (0, 2, 1), "axial": (0, 1, 2), "sagittal": (1, 2, 0)}[plane]
    expected = pixels.transpose(axes)
    for patient in range(1, 7):
        for number in (0, depth - 1):
            (path,) = (tmp_path / "out").rglob(f"case_{patient:03d}_week_2_slice_{number}.nii.gz")
            (mask,) = (tmp_path / "out").rglob(f"seg_{patient:03d}_week_2_slice_{number}.nii.gz")
            image, mask, plane = nibabel.load(path), nibabel.load(mask), expected[..., number]
            np.testing.assert_array_equal(np.asarray(image.dataobj), plane)
            np.testing.assert_array_equal(np.asarray(mask.dataobj), plane > 4000)
            for i, j in ((0, 0), (3, 5)):
                voxel = np.zeros(3)
                voxel[list(axes)] = i, j, number
                there = apply_affine(image.affine, [i, j, 0])
                np.testing.assert_allclose(there, apply_affine(affine, voxel), atol=1e-3)
            np.testing.assert_allclose(mask.affine, image.affine, atol=1e-3)


def test_two_affines_that_turn_a_volume_differently_are_said(tmp_path, capsys):
    paths = [write_subject(tmp_path / "in", patient, mask_codes="RAS") for patient in range(1, 5)]
    run_slice(tmp_path / "in", tmp_path / "same")
    assert "qform" not in capsys.readouterr().out
    for path in (paths[0], paths[1], beside(paths[1]), beside(paths[2])):
        image = nibabel.load(path)
        image.set_sform(image.affine, 1)
        image.set_qform(image.affine @ np.diag([-1, -1, 1, 1]), 1)
        image.to_filename(path)
    run_slice(tmp_path / "in", tmp_path / "out")
    assert "warning: 3 volumes or their masks have an sform and a qf" in capsys.readouterr().out


def test_no_split_is_empty_and_the_course_s_is_for_hipmri(tmp_path, capsys):
    for patient in range(4, 10):  # all of them in the training split of the report
        write_subject(tmp_path / "bids", patient)
    run_slice(tmp_path / "bids", tmp_path / "out")
    assert "random split" in capsys.readouterr().out
    assert all(any((tmp_path / "out" / f"keras_slices_{split}").iterdir()) for split in SPLITS)
    run_slice(write_release(tmp_path / "release", range(4, 8)), tmp_path / "other")
    assert "random split" in capsys.readouterr().out
    release = write_release(tmp_path / "course", (4, 36, 40))
    save(release / "more" / "Case_041_Week0_LFOV.nii.gz", noise(1, SHAPE), RAS)  # one more of it
    run_slice(release, tmp_path / "split")
    counted = "4 volumes of 4 patients, 3 of them with a mask; split by patient as in the report"
    assert counted in capsys.readouterr().out


def test_clashes_are_shown_before_anything_is_written(tmp_path):
    for patient in (1, 2, 3):
        path = write_subject(tmp_path / "bids", patient)
    other = path.with_name(path.name.replace("T2w", "T1w"))
    other.write_bytes(path.read_bytes())
    both = r"1 of 4 files .*\n.*sub-03_ses-2_T2w.*one subject and session with .*T1w.*--match"
    with pytest.raises(UserError, match=both):
        run_slice(tmp_path / "bids", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run_slice(tmp_path / "bids", tmp_path / "out", match="*_T2w*")
    assert len(list((tmp_path / "out").rglob("case_003_*"))) == 4


def test_a_subject_has_one_number_however_its_label_is_written(tmp_path):
    """GT01 is a label of a subject and no mask."""
    for name in ("sub-A01_ses-1", "sub-a01_ses-2", "sub-GT01", "sub-c01"):
        save(path := tmp_path / "b" / f"{name}_T2w.nii.gz", noise(1, SHAPE), RAS)
    assert not slice_volumes.is_mask(path.name) and slice_volumes.is_mask("sub-GT01_gt.nii")
    run_slice(tmp_path / "b", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "slices.json").read_text())
    assert [record.get(f"subject {name}") for name in ("a01", "c01", "gt01")] == [1, 2, 3]


def test_subjects_with_names_get_numbers_that_are_kept(tmp_path):
    for label in ("3", "ctl2", "pat1"):  # one is a number
        path = tmp_path / "b" / "labelled_scans" / f"sub-{label}_T2w.nii.gz"  # no folder of masks
        save(path, noise(1, SHAPE), RAS)
    run_slice(tmp_path / "b", tmp_path / "out", seed=7)
    assert {parse_name(path).patient for path in (tmp_path / "out").rglob("case_*")} == {1, 2, 3}
    record = json.loads((tmp_path / "out" / "slices.json").read_text())
    assert (record["count"], record["seed"]) == (4, 7)
    assert record["subject ctl2"] == 2 and record["subject pat1"] == 3


def test_a_folder_for_each_subject_tells_them_apart(tmp_path, capsys):
    for patient in (1, 2, 3):
        path = write_subject(tmp_path / "b", patient, mask_codes="RAS")
        folder = tmp_path / "export" / f"P{patient:04d}"
        folder.mkdir(parents=True)
        path.rename(folder / "t2_tse_3.nii.gz")
        beside(path).rename(folder / "t2_tse_3_seg.nii.gz")
    (tmp_path / "export" / "P0002" / "t1.mha").write_text("no NIfTI")
    run_slice(tmp_path / "export", tmp_path / "out")
    said = capsys.readouterr().out
    assert "told apart by their folders" in said and "1 other files were passed over" in said
    assert {parse_name(path).patient for path in (tmp_path / "out").rglob("seg_*")} == {1, 2, 3}
    days = "12-05-2024", "2024-05-12", "20240512", "2024-05", "12May2024"
    others = "day1", "run-2", "baseline", "follow-up", "T1", "FLAIR"
    for name in (*days, *others, "ses-1", "week3", "axial", "imagesTr", "test"):
        assert slice_volumes.NO_SUBJECT.search(name)
    for name in ("P0003", "TCGA-24-2024", "Sestak", "visitor", "0012", "T1_axial_004"):
        assert not slice_volumes.NO_SUBJECT.search(name)
    second = tmp_path / "export" / "P0001" / "t1.nii.gz"  # a folder of two volumes tells nothing
    shutil.copy(second.with_name("t2_tse_3.nii.gz"), second)
    with pytest.raises(UserError, match=r"4 of 4 files .*\n.* no patient in its name"):
        run_slice(tmp_path / "export", tmp_path / "out2")
    second.unlink()
    (tmp_path / "export" / "P0003").rename(tmp_path / "export" / "ses-3")
    with pytest.raises(UserError, match="no patient in its name"):
        run_slice(tmp_path / "export", tmp_path / "out2")
    said = capsys.readouterr().out
    assert "ses-3 looks like a day, a session" in said
    (pattern,) = re.findall("Fix: if they are subjects, --name-pattern '(.+)'", said)
    run_slice(tmp_path / "export", tmp_path / "out2", name_pattern=pattern)
    record = json.loads((tmp_path / "out2" / "slices.json").read_text())
    assert {record[f"subject {name}"] for name in ("p0001", "p0002", "ses-3")} == {1, 2, 3}


def test_a_number_that_is_too_large_for_a_name_is_counted():
    large = str(2**63 + 1)
    assert slice_volumes._numbers({large, "7"}) == {"7": 1, large: 2}
    assert slice_volumes._numbers({"7", "12"}) == {"7": 7, "12": 12}


def test_folders_that_are_one_number_are_one_subject(tmp_path):
    for patient, name in ((1, "007"), (2, "7"), (3, "8")):
        path = write_subject(tmp_path / "b", patient)
        folder = tmp_path / "export" / name
        folder.mkdir(parents=True)
        path.rename(folder / "t2.nii.gz")
    with pytest.raises(UserError, match="3 of 3 files cannot be used"):
        run_slice(tmp_path / "export", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_for_each_exam_makes_no_patients_where_files_are_named(tmp_path):
    for exam, patient in enumerate((1, 1, 2, 3)):
        write_subject(tmp_path / "v" / f"E{exam}", patient)
    with pytest.raises(UserError, match="of one subject and session"):
        run_slice(tmp_path / "v", tmp_path / "out")
    with pytest.raises(UserError, match=r"no patient in its name by the --name-pattern x"):
        run_slice(tmp_path / "v", tmp_path / "out", name_pattern=r"x(?P<patient>\d+)")


def test_masks_of_a_folder_of_their_own(tmp_path):
    for patient in (1, 2, 3):
        path = write_subject(tmp_path / "b", patient, mask_codes="LPS")
        (tmp_path / "m").mkdir(exist_ok=True)
        beside(path).rename(tmp_path / "m" / f"{patient}.nii.gz")
    flags = {"masks": str(tmp_path / "m"), "count": 0}
    with pytest.raises(UserError, match=r"no mask of the subjects.* --name-pattern"):
        run_slice(tmp_path / "b", tmp_path / "out", **flags)  # bare numbers announce nobody
    pattern = r"^(?:sub-0)?(?P<patient>\d)"
    run_slice(tmp_path / "b", tmp_path / "out", name_pattern=pattern, **flags)
    assert len(list((tmp_path / "out").rglob("seg_*"))) == 36


def test_leading_zeros_make_no_other_person(tmp_path):
    for patient in (4, 36, 40):
        save(tmp_path / "a" / f"Case_{patient:03d}_Week0_LFOV.nii.gz", noise(1, SHAPE), RAS)
        mask = np.ones(SHAPE, np.uint8)
        save(tmp_path / "a" / f"case_{patient}_week_0_seg.nii.gz", mask, RAS)
    run_slice(tmp_path / "a", tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("seg_*"))) == 12


def test_one_person_of_two_days_is_not_two_patients(tmp_path):
    """Dates are no patients: the same person could come into training and test split."""
    for day in (12, 13, 14):
        save(tmp_path / "b" / f"{day}-05-2024_prostate.nii.gz", noise(day, SHAPE), RAS)
    with pytest.raises(UserError, match=r"3 of 3 files .*\n.*12-05-2024_.* no patient in its name"):
        run_slice(tmp_path / "b", tmp_path / "out")


def test_two_masks_of_one_volume_are_refused(tmp_path, capsys):
    """A file for each organ, in a folder of the subject: to take one would leave organs out."""
    for patient in (1, 2, 3):
        path = write_subject(tmp_path / "b", patient, mask_codes="RAS")
        target = tmp_path / "export" / f"P{patient:04d}" / "t2.nii.gz"
        (target.parent / "segmentations").mkdir(parents=True)
        beside(path).rename(target.parent / "segmentations" / "liver.nii.gz")
        path.rename(target)
    shutil.copytree(tmp_path / "export", tmp_path / "several")
    organ = tmp_path / "several" / "P0002" / "segmentations" / "liver.nii.gz"
    shutil.copy(organ, organ.with_name("kidney.nii.gz"))
    with pytest.raises(UserError, match=r"two masks of one volume, .*kidney.* and .*liver"):
        run_slice(tmp_path / "several", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run_slice(tmp_path / "export", tmp_path / "out")
    assert "3 of them with a mask" in capsys.readouterr().out


def test_other_files_are_sent_their_way(tmp_path):
    way = r"such as .*IM1\.dcm. DICOM becomes NIfTI by `dcm2niix.*Fix"
    (tmp_path / "IM1.dcm").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=f"no volumes.*{way}"):
        run_slice(tmp_path, tmp_path / "out")
    (tmp_path / "keras_slices_train").mkdir()
    (tmp_path / "keras_slices_train" / "IM1.dcm").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=f"no keras_slices_train.*{way}"):
        open_study(DataConfig(data=str(tmp_path), cache=str(tmp_path / "cache")))


@pytest.mark.parametrize("other", ["sub-09_ses-2", "sub-03_ses-1"])
def test_a_mask_of_another_subject_or_session_is_not_used_and_said(tmp_path, capsys, other):
    """Of another day, it shows organs elsewhere than its subject's only volume does."""
    for patient in (1, 2, 3):
        path = write_subject(tmp_path / "b", patient, mask_codes="RAS")
    beside(path).rename(path.with_name(f"{other}_seg.nii.gz"))
    run_slice(tmp_path / "b", tmp_path / "out")
    out = capsys.readouterr().out
    assert "2 of them with a mask" in out and not list((tmp_path / "out").rglob("seg_003_*"))
    assert "warning: 1 masks are not used, such as " in out and f"{other}_seg.nii.gz: no vol" in out
