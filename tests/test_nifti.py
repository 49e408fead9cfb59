"""NIfTI in and out, and where voxels lie; nibabel is the reference."""

import nibabel
import numpy as np

import nifti


def test_nifti_keeps_pixels_affine_and_bytes(tmp_path):
    pixels = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    affine = np.diag([1.5, 2.0, 3.0, 1.0])
    for name in ("a.nii.gz", "b.nii.gz", "c.nii"):
        nifti.write(tmp_path / name, pixels, affine, "synthetic")
        image = nibabel.load(tmp_path / name)
        assert np.array_equal(image.get_fdata(dtype=np.float32), pixels)
        np.testing.assert_allclose(image.affine, affine)
        assert bytes(image.header["descrip"]).startswith(b"synthetic")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
