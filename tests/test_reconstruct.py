"""reconstruct.py on files of one's own: what comes back is each file's shape, place and type."""

import json
import os
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from skimage.io import imread, imsave
from test_predict import data_of, write_checkpoint
from test_slice_volumes import landmark, stored

import reconstruct
from dataset import Placement, StudyInfo, z_score
from modules import VQVAE2, load_model
from reconstruct import ReconstructConfig
from support import nifti
from support.runtime import UserError


@pytest.fixture(scope="module")
def checkpoint(study, tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("run") / "vqvae2_best.pth", study))


@pytest.fixture
def identity(monkeypatch):
    """A model that gives back what it is given: what is left is the way there and back."""
    pass_through(monkeypatch, lambda x: None)


def pass_through(monkeypatch, mask_logits) -> None:
    """Models that decode codes into the slices x that they are of, with `mask_logits(x)`."""
    seen, encode = [], VQVAE2.encode
    monkeypatch.setattr(VQVAE2, "encode", lambda self, x: seen.append(x) or encode(self, x))

    def decode(self, top, bottom):
        x = seen.pop(0)
        return x, mask_logits(x)

    monkeypatch.setattr(VQVAE2, "decode_with_masks", decode)


def use(checkpoint, inputs, out, **config):
    config = ReconstructConfig(checkpoint=checkpoint, out=str(out), device="cpu", **config)
    return reconstruct.reconstruct(list(map(str, inputs)), config)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("plane", ["coronal", "axial", "sagittal"])
@pytest.mark.usefixtures("identity")
def test_a_volume_comes_back_where_it_was(checkpoint, tmp_path, codes, plane):
    pixels, affine = landmark(tilt=12, shape=(64, 32, 16))
    image = stored((pixels * 2).astype(np.int16), affine, codes)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 3)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    use(checkpoint, [tmp_path / "scan.nii.gz"], tmp_path / "out", plane=plane)
    found = nibabel.load(tmp_path / "out" / "scan.nii.gz")
    assert found.shape == image.shape and found.get_data_dtype() == np.int16
    places = "sform_code qform_code xyzt_units srow_x srow_y srow_z quatern_b pixdim"
    for field in places.split():
        np.testing.assert_array_equal(found.header[field], image.header[field])
    if plane == "coronal" and codes == "RAS":  # planes of 64x16 into 64x32: padded and nothing else
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(image.dataobj))
    here, there = (np.asarray(each.dataobj).astype(float) for each in (found, image))
    assert np.corrcoef(here.ravel(), there.ravel())[0, 1] > 0.6


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("directions, plane", [("RA", "axial"), ("LP", "axial"), ("SR", "coronal")])
def test_a_scan_is_cut_as_the_training_slices_were(study, tmp_path, codes, directions, plane):
    """The same planes, the same way up, whatever the order in which the file stores its voxels."""
    pixels, affine = landmark(shape=(16, 14, 12))
    nibabel.save(stored(pixels, affine, codes), tmp_path / "scan.nii.gz")
    known = StudyInfo("s", 64, 32, {}, directions=directions, plane=plane)
    scan = reconstruct.Scan(nifti.read(tmp_path / "scan.nii.gz"), known)
    expected = {
        "RA": pixels.transpose(2, 0, 1),
        "LP": pixels[::-1, ::-1].transpose(2, 0, 1),
        "SR": pixels.transpose(1, 2, 0),
    }[directions]
    np.testing.assert_array_equal(scan.planes, expected)
    assert scan.plane == plane
    other = reconstruct.Scan(nifti.read(tmp_path / "scan.nii.gz"), known, "sagittal")
    np.testing.assert_array_equal(other.planes, pixels.transpose(0, 1, 2))
    one = stored(pixels[:, :, :1], affine, "ALS")  # a slice is turned as volumes are
    nibabel.save(one, tmp_path / "slice.nii.gz")
    turned = reconstruct.Scan(nifti.read(tmp_path / "slice.nii.gz"), known)
    expected = pixels[:, :, :1] if directions != "LP" else pixels[::-1, ::-1, :1]
    np.testing.assert_array_equal(turned.planes, expected.transpose(2, 0, 1))


def test_a_slice_for_a_model_that_knows_no_plane_is_taken_as_it_is_stored(tmp_path):
    pixels = np.random.default_rng(0).random((16, 12), np.float32)
    nibabel.save(nibabel.Nifti1Image(pixels, np.diag([-1, -1, 1, 1])), tmp_path / "slice.nii.gz")
    scan = reconstruct.Scan(nifti.read(tmp_path / "slice.nii.gz"), StudyInfo("s", 64, 32, {}))
    np.testing.assert_array_equal(scan.planes, pixels[None])


def test_the_plane_of_the_model_is_told_and_another_is_said(study, tmp_path, capsys):
    data = data_of("s", directions="RA", plane="axial")
    model = str(write_checkpoint(tmp_path / "axial.pth", study, data=data))
    pixels, affine = landmark(shape=(64, 32, 12))
    nibabel.save(nibabel.Nifti1Image(pixels, affine), tmp_path / "scan.nii.gz")
    result = use(model, [tmp_path / "scan.nii.gz"], tmp_path / "out")
    assert result["plane"] == "axial" and result["files"]["scan.nii.gz"]["planes"] == 12
    out = capsys.readouterr().out
    assert "1 volumes were cut in axial planes" in out and "learnt" not in out
    result = use(model, [tmp_path / "scan.nii.gz"], tmp_path / "out", plane="coronal")
    assert result["plane"] == "coronal" and result["files"]["scan.nii.gz"]["planes"] == 32
    assert "1 files are coronal, and the model has learnt axial slices" in capsys.readouterr().out


@pytest.mark.parametrize("turn, said", [((-1, -1, 1), True), ((1, 1, 1), False)])
def test_two_affines_that_turn_a_scan_differently_are_said(checkpoint, tmp_path, turn, said):
    pixels, affine = landmark(shape=(64, 32, 12))
    image = nibabel.Nifti1Image(pixels, None)
    image.set_sform(affine, 1)
    image.set_qform(affine @ np.diag([*turn, 1]), 1)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    row = use(checkpoint, [tmp_path / "scan.nii.gz"], tmp_path / "out")["files"]["scan.nii.gz"]
    assert bool(row["notes"]) is said


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("shape", [(60, 32, 1, 8), (60, 1, 32, 8), (1, 60, 32), (60, 32, 5)])
@pytest.mark.parametrize("oriented", [True, False])
def test_a_film_of_one_slice_is_cut_in_the_plane_that_it_has(checkpoint, tmp_path, shape, oriented):
    pixels = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)
    image = nibabel.Nifti1Image(pixels, np.diag([1.5, 1.5, 8, 1]) if oriented else None)
    nibabel.save(image, tmp_path / "cine.nii.gz")
    row = use(checkpoint, [tmp_path / "cine.nii.gz"], tmp_path / "out")["files"]["cine.nii.gz"]
    assert row["planes"] == np.prod(shape) / (60 * 32) and row["ssim_report"] > 0.999
    found = nibabel.load(tmp_path / "out" / "cine.nii.gz")
    np.testing.assert_allclose(np.asarray(found.dataobj), pixels, rtol=1e-4)


@pytest.mark.parametrize("codes", ["RAS", "PIR"])
def test_the_decoded_mask_lies_on_the_scan_with_its_own_labels(study, tmp_path, codes, monkeypatch):
    """Bright voxels are the first organ and dark ones the second, whose label is 300."""

    pass_through(monkeypatch, lambda x: torch.cat([0 * x + 0.5, x, -x], 1))
    data = data_of("s", labels=[0, 7, 300])
    model = str(write_checkpoint(tmp_path / "vqvae2_best.pth", study, data=data))
    pixels, affine = landmark(shape=(60, 12, 30))  # padded in the grid
    image = stored(pixels, affine, codes)
    image.set_qform(image.affine, 1)  # a viewer that reads the qform shows both alike
    image.header["cal_max"] = 999
    nibabel.save(image, tmp_path / "case_scan.nii.gz")
    use(model, [tmp_path / "case_scan.nii.gz"], tmp_path / "out")
    mask = nibabel.load(tmp_path / "out" / "seg_scan.nii.gz")
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert mask.header["qform_code"] == 1 and mask.get_data_dtype() == np.uint16
    assert mask.header["cal_max"] == 0  # a window for the scan shows masks black
    grid = np.stack(
        [np.pad(p, ((2, 2), (1, 1)), constant_values=p.min()) for p in pixels.swapaxes(0, 1)]
    )
    x = ((grid - grid.mean((1, 2), keepdims=True)) / grid.std((1, 2), keepdims=True))[:, 2:-2, 1:-1]
    expected = np.select([x > 0.5, x < -0.5], [7, 300], 0).swapaxes(0, 1).astype(np.uint16)
    found = np.asarray(mask.dataobj)
    assert set(np.unique(expected)) == {0, 7, 300}
    np.testing.assert_array_equal(found, np.asarray(stored(expected, affine, codes).dataobj))
    resized = np.random.default_rng(0).normal(size=(90, 50)).astype(np.float32).cumsum(0)
    nibabel.save(nibabel.Nifti1Image(resized, np.eye(4)), tmp_path / "large.nii.gz")
    use(model, [tmp_path / "large.nii.gz"], tmp_path / "out")
    mask = nibabel.load(tmp_path / "out" / "seg_large.nii.gz")  # no label between two labels
    assert mask.get_data_dtype() == np.uint16 and mask.shape == resized.shape
    assert set(np.unique(np.asarray(mask.dataobj))) == {0, 7, 300}


@pytest.mark.usefixtures("identity")
def test_types_axes_and_constant_planes(checkpoint, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pixels = rng.gamma(2, 100, (64, 32, 3, 2))
    pixels[..., 1, 0] = 7  # a plane of one value is a plane like any other
    volumes = {"f8": pixels, "u1": np.clip(pixels, 0, 255).astype(np.uint8)}
    volumes["i2"] = (pixels - 1000).astype(np.int16)  # as in CT
    volumes["f4"] = pixels.astype(np.float32)
    affine = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    for name, volume in volumes.items():
        nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / f"{name}.nii")
    nibabel.save(nibabel.Nifti2Image(volumes["f4"][..., 0, :1], None), tmp_path / "slice.nii.gz")
    result = use(checkpoint, [tmp_path], tmp_path / "out")
    kinds = {"f8": np.float32, "u1": np.uint8, "i2": np.int16, "f4": np.float32}
    for name, kind in kinds.items():
        found = nibabel.load(tmp_path / "out" / f"{name}.nii")
        assert found.get_data_dtype() == kind
        np.testing.assert_allclose(np.asarray(found.dataobj), volumes[name], rtol=1e-4, atol=1e-3)
    found = nibabel.load(tmp_path / "out" / "slice.nii.gz")
    assert isinstance(found, nibabel.Nifti2Image) and found.shape == (64, 32, 1)
    rows = result["files"]
    assert rows["u1.nii"]["planes"] == 6 and rows["slice.nii.gz"]["planes"] == 1
    assert rows["u1.nii"]["ssim_report"] == pytest.approx(1)
    assert rows["u1.nii"]["bits"] == 6 * rows["slice.nii.gz"]["bits"]


@pytest.mark.usefixtures("identity")
def test_integers_with_a_scale_come_back_in_the_file_s_units(checkpoint, tmp_path):
    values = np.random.default_rng(0).random((64, 32)).astype(np.float32) / 100
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_data_dtype(np.int16)  # nibabel finds a scale for them
    nibabel.save(image, tmp_path / "a.nii.gz")
    use(checkpoint, [tmp_path / "a.nii.gz"], tmp_path / "out")
    found = nibabel.load(tmp_path / "out" / "a.nii.gz")
    assert found.get_data_dtype() == np.float32
    np.testing.assert_allclose(found.get_fdata(), values, atol=1e-5)


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_come_back_as_pictures(checkpoint, tmp_path, dtype):
    pixels = np.random.default_rng(2).integers(0, np.iinfo(dtype).max, (64, 32), dtype=dtype)
    imsave(tmp_path / "p.PNG", pixels)
    use(checkpoint, [tmp_path / "p.PNG"], tmp_path / "out")
    found = imread(tmp_path / "out" / "p.PNG")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, pixels)


def test_a_picture_and_a_scan_of_one_name_have_a_mask_each(study, tmp_path, monkeypatch):
    pass_through(monkeypatch, lambda x: torch.cat([0 * x, x], 1))
    data = data_of("s", labels=[0, 7])
    model = str(write_checkpoint(tmp_path / "vqvae2_best.pth", study, data=data))
    imsave(tmp_path / "p.PNG", np.eye(64, 32, dtype=np.uint8), check_contrast=False)
    nibabel.save(nibabel.Nifti1Image(np.eye(60, 30), np.eye(4)), tmp_path / "p.nii.gz")
    use(model, [tmp_path / "p.PNG", tmp_path / "p.nii.gz"], tmp_path / "out")
    for name, shape in (("p.PNG", (64, 32)), ("p", (60, 30))):
        mask = nibabel.load(tmp_path / "out" / f"seg_{name}.nii.gz")
        np.testing.assert_array_equal(mask.get_fdata(), 7 * np.eye(*shape))


@pytest.mark.parametrize("fit", ["pad", "stretch", "auto"])
@pytest.mark.parametrize("shape", [(320, 320), (40, 90), (256, 144), (64, 32)])
def test_a_fit_is_undone(fit, shape):
    placement = Placement.make(shape, (64, 32), fit)
    rows, columns = np.mgrid[: shape[0], : shape[1]] / np.reshape(shape, (2, 1, 1))
    smooth = (100 + 50 * np.sin(3 * rows) * np.cos(2 * columns)).astype(np.float32)
    grid = placement.place(smooth, fill=smooth.min())
    assert grid.shape == (64, 32)
    back = placement.restore(grid)
    assert back.shape == shape
    assert np.abs(back - smooth).mean() < 2
    scale = np.divide(placement.scaled, shape)
    if fit == "pad":
        assert abs(scale[0] - scale[1]) < 0.03  # the aspect ratio stays
    if shape == (256, 144) and fit == "auto":
        assert placement.scaled == (64, 32)  # HipMRI's odd 60 slices
    affine = placement.affine(np.diag([2.0, 3.0, 1.0, 1.0]))
    # The slice's first edge.
    corner = affine @ [placement.offset[0] - 0.5, placement.offset[1] - 0.5, 0, 1]
    np.testing.assert_allclose(corner[:2], [-1, -1.5], atol=1e-9)
    far = affine @ [*(np.add(placement.offset, placement.scaled) - 0.5), 0, 1]
    np.testing.assert_allclose(far[:2], [2 * shape[0] - 1, 3 * shape[1] - 1.5], atol=1e-9)


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_planes_are_fitted_as_the_training_slices_were(checkpoint, fit, monkeypatch):
    """By the --fit that the study was opened with."""
    seen, encode = [], VQVAE2.encode
    monkeypatch.setattr(VQVAE2, "encode", lambda self, x: seen.append(x) or encode(self, x))
    trained = load_model(checkpoint)
    trained = trained._replace(study=replace(trained.study, fit=fit))
    plane = np.random.default_rng(0).normal(size=(60, 60)).astype(np.float32)
    reconstruct.reconstruct_planes(trained, plane[None], 1)
    grid = Placement.make((60, 60), (64, 32), fit).place(plane, fill=plane.min())
    mean, std, _ = z_score(grid)
    np.testing.assert_allclose(seen[0][0, 0], (grid - mean) / std, atol=1e-5)


def test_decoded_masks_replace_neither_each_other_nor_a_true_mask(tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    with pytest.raises(FileNotFoundError, match="no NIfTI files or PNG pictures"):
        reconstruct.find_files([str(scans)], out)
    for name in ("001.nii.gz", "case_001.nii.gz"):
        nifti.write(scans / name, np.zeros((64, 32)), np.eye(4))
    assert len(reconstruct.find_files([str(scans)], out)) == 2  # of a model without masks
    with pytest.raises(UserError, match=r"would both be written as seg_001\.nii\.gz"):
        reconstruct.find_files([str(scans)], out, masks=True)
    (scans / "001.nii.gz").unlink()
    true, ours = np.zeros((64, 32), np.uint8), reconstruct.RECONSTRUCTION
    nifti.write(out / "seg_001.nii.gz", true, np.eye(4), "drawn by hand")
    with pytest.raises(
        UserError, match=r"would replace .*seg_001\.nii\.gz, which this program did not write"
    ):
        reconstruct.find_files([str(scans)], out, masks=True)
    nifti.write(out / "seg_001.nii.gz", true, np.eye(4), ours)  # an earlier run's may be replaced
    assert len(reconstruct.find_files([str(scans)], out, masks=True)) == 1


def test_a_mask_of_an_earlier_model_goes_and_one_s_own_stays(checkpoint, tmp_path):
    out, mask = tmp_path / "out", np.zeros((64, 32), np.uint8)
    for name, about in (("t1", reconstruct.RECONSTRUCTION), ("t2", "drawn by hand")):
        save_scan(tmp_path / f"{name}.nii.gz", np.random.default_rng(0).normal(size=(64, 32)))
        nifti.write(out / f"seg_{name}.nii.gz", mask, np.eye(4), about)
    use(checkpoint, [tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz"], out)
    assert [path.name for path in out.glob("seg_*")] == ["seg_t2.nii.gz"]


def test_whole_numbers_are_not_rounded_on_their_way_into_the_grid(checkpoint):
    """Planes of the README's snippet may have any type, and sides that the grid has to stretch."""
    planes = np.random.default_rng(0).integers(0, 3, (2, 70, 30)).astype(np.uint8)
    trained = load_model(checkpoint)
    made = [reconstruct.reconstruct_planes(trained, planes.astype(k), 2) for k in ("u1", "f4")]
    for name in ("planes", "top", "bottom"):
        np.testing.assert_array_equal(*(getattr(each, name) for each in made))
    broken = planes.astype(np.float64)
    broken[:, 0] = np.nan
    with pytest.raises(UserError, match="60 of 4200 pixels are NaN"):
        reconstruct.reconstruct_planes(trained, broken, 2)


@pytest.mark.parametrize("kind", ["int64", "uint64", "int16"])
def test_what_is_too_bright_becomes_the_brightest_that_there_is(checkpoint, tmp_path, kind):
    nifti.write(tmp_path / "scan.nii", np.ones((64, 32), kind), np.eye(4))
    scan = reconstruct.Scan(nifti.read(tmp_path / "scan.nii"), load_model(checkpoint).study)
    scan.write(tmp_path / "made.nii", np.full(scan.planes.shape, 1e30, np.float32))
    found, limit = nifti.read(tmp_path / "made.nii").raw, float(np.iinfo(kind).max)
    assert found.dtype == kind and (found.astype(float) >= (1 - 1e-15) * limit).all()


@pytest.mark.usefixtures("identity")
def test_scans_of_another_patient_are_never_replaced(checkpoint, tmp_path):
    """Scanners give every scan the same name."""
    pixels = np.random.default_rng(0).integers(1, 99, (64, 32), dtype=np.uint8)
    for name, write in (("t2.nii.gz", save_scan), ("t2.png", imsave)):
        for patient in ("one", "two"):
            (tmp_path / patient).mkdir(exist_ok=True)
            write(tmp_path / patient / name, pixels)
        scan = tmp_path / "one" / name
        with pytest.raises(
            UserError, match=rf"replace .*two/{name}, which this program did not write"
        ):
            use(checkpoint, [scan], tmp_path / "two")
        for _ in range(2):  # our own may be replaced
            use(checkpoint, [scan], tmp_path / "out")
    files = reconstruct.find_files([str(tmp_path / "one")], tmp_path, masks=False)
    assert len(files) == 2  # a folder above the scans hides none of them


@pytest.mark.usefixtures("identity")
def test_earlier_reconstructions_are_no_scans(checkpoint, tmp_path, capsys):
    for name, write in (("t2.nii.gz", save_scan), ("p.png", imsave)):
        write(tmp_path / name, np.random.default_rng(0).integers(1, 99, (64, 32), dtype=np.uint8))
    use(checkpoint, [tmp_path], tmp_path / "a")
    scores = use(checkpoint, [tmp_path], tmp_path / "b")
    assert scores["files"].keys() == {"t2.nii.gz", "p.png"}
    assert "2 earlier reconstructions were passed over" in capsys.readouterr().out
    os.mkfifo(tmp_path / "pipe.nii")  # which nobody opens, or this would never end
    assert "pipe.nii" in reconstruct.find_files([str(tmp_path)], tmp_path / "d")
    (tmp_path / "pipe.nii").unlink()
    ours = tmp_path / "a" / "t2.nii.gz"
    assert use(checkpoint, [ours], tmp_path / "c")  # named, so meant
    ours.write_bytes(ours.read_bytes()[:-9])  # one that is cut short is ours all the same
    assert reconstruct.find_files([str(tmp_path)], tmp_path / "d").keys() == scores["files"].keys()


def save_scan(path, pixels):
    nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), path)


@pytest.mark.usefixtures("identity")
def test_a_scan_whose_name_does_not_say_what_it_is(checkpoint, tmp_path):
    pixels = np.random.default_rng(0).integers(1, 99, (64, 32), dtype=np.uint8)
    save_scan(tmp_path / "scan.nii.gz", pixels)
    for name in ("IM0001", "scan.nii.gz.1", "x.img"):
        (tmp_path / name).write_bytes((tmp_path / "scan.nii.gz").read_bytes())
        assert list(use(checkpoint, [tmp_path / name], tmp_path / "out")["files"]) == [
            f"{name}.nii.gz"
        ]
        found = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        np.testing.assert_array_equal(found.dataobj, pixels)


@pytest.mark.usefixtures("identity")
def test_a_slice_keeps_its_thickness_and_one_without_directions_is_said(checkpoint, tmp_path):
    image = nibabel.Nifti1Image(np.eye(64, 32, dtype=np.float32), None)
    image.header.set_qform(np.diag([1.2, 1.4, 3.3, 1]), 1)
    nibabel.save(image, tmp_path / "thick.nii.gz")
    row = use(checkpoint, [tmp_path / "thick.nii.gz"], tmp_path / "out")["files"]["thick.nii.gz"]
    made = nibabel.load(tmp_path / "out" / "thick.nii.gz").header
    np.testing.assert_allclose(made["pixdim"][1:4], (1.2, 1.4, 3.3), rtol=1e-6)
    assert not row["notes"]
    imsave(tmp_path / "p.png", np.eye(64, 32, dtype=np.uint8), check_contrast=False)
    row = use(checkpoint, [tmp_path / "p.png"], tmp_path / "out")["files"]["p.png"]
    assert row["notes"] == ["have no orientation: taken as they are stored"]


def test_what_cannot_be_used_is_named_and_the_rest_done(checkpoint, tmp_path, capsys):
    good = nibabel.Nifti1Image(np.random.default_rng(0).random((64, 32), np.float32), np.eye(4))
    nibabel.save(good, tmp_path / "good.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes(b"no")
    (tmp_path / "bad.png").write_bytes(b"no")
    imsave(tmp_path / "red.png", np.zeros((64, 32, 3), np.uint8), check_contrast=False)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "good_seg.nii.gz").write_bytes(b"a mask is not looked at")
    bad = r"(?s)3 of 4 files.*bad\.nii\.gz: .*bad\.png: not a whole.*red\.png: .*a grey one"
    with pytest.raises(UserError, match=bad):
        use(checkpoint, [tmp_path], tmp_path / "out")
    expected = ["good.nii.gz", "scans.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected
    for name in ("bad.nii.gz", "bad.png", "red.png"):
        (tmp_path / name).unlink()
    # And not what the first run wrote.
    result = use(checkpoint, [tmp_path], tmp_path / "out")
    assert list(result["files"]) == ["good.nii.gz"]
    assert json.loads((tmp_path / "out" / "scans.json").read_text()) == result
    out = capsys.readouterr().out
    assert "good.nii.gz" in out and "volumes were cut" not in out  # a slice is none
    with pytest.raises(UserError, match="its result would replace"):
        use(checkpoint, [tmp_path / "good.nii.gz"], tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt: "):
        use(checkpoint, [tmp_path / "notes.txt"], tmp_path / "out")
    assert "wrote" not in capsys.readouterr().out
    # A failed run leaves no table of an earlier one.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.nii.gz"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        use(checkpoint, [tmp_path / "none.nii"], tmp_path / "out")
