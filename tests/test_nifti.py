"""NIfTI in and out, and where voxels lie; nibabel is the reference."""

import gzip
import struct
import tracemalloc
import warnings
import zlib

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from support import nifti
from support.runtime import UserError

PIXELS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
AFFINE = np.array([[-1.5, 0.2, 0, 40], [0.2, 0, 2, -30], [0, 1.25, 0.1, 7], [0, 0, 0, 1]])
# Where fields lie in a header.
AT = {"dim": 40, "datatype": 70, "pixdim": 76, "offset": 108, "slope": 112, "qcode": 252}
AT |= {"scode": 254, "quaternion": 256, "sform": 280, "magic": 344}


def patched(image=None, **fields):
    """The bytes of a file with fields of its header changed: name=(struct format, values...)."""
    data = bytearray((image or nibabel.Nifti1Image(PIXELS, AFFINE)).to_bytes())
    for name, (form, *values) in fields.items():
        struct.pack_into("<" + form, data, AT[name], *values)
    return bytes(data)


def read(tmp_path, data, **limits):
    path = tmp_path / "file.nii"
    path.write_bytes(data)
    return nifti.read(path, **limits)


# ---- reading ----


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<i2", ">u2", "u1", "<f8"])
@pytest.mark.parametrize("zipped", [False, True])
def test_what_nibabel_writes_is_read(tmp_path, kind, dtype, zipped):
    pixels = (100 * np.abs(PIXELS)).astype(dtype)
    header = kind.header_class(endianness=dtype[0] if dtype[0] == ">" else "<")
    image = kind(pixels, AFFINE, header)
    data = image.to_bytes() + bytes(100)  # some programs pad
    found = read(tmp_path, gzip.compress(data) if zipped else data)
    np.testing.assert_array_equal(found.values(), pixels)
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-6)
    assert found.oriented and not found.broken and not found.scaled


def test_gzip_members_and_their_sums(tmp_path):
    data = patched()
    parts = gzip.compress(data[:400]) + gzip.compress(data[400:])
    for padded in (parts, parts + bytes(512)):  # as gzip itself allows, for tapes
        np.testing.assert_array_equal(read(tmp_path, padded).values(), PIXELS)
    wrong = bytearray(gzip.compress(data))
    wrong[-6] ^= 1  # of the checksum
    with pytest.raises(UserError, match="not a whole NIfTI file"):
        read(tmp_path, bytes(wrong))


CLAIMS = {
    "header": patched(dim=("8h", 3, 256, 128, 8000, 1, 1, 1, 1)),
    "zipped header": gzip.compress(patched(dim=("8h", 3, 256, 128, 8000, 1, 1, 1, 1))),
    "largest header": gzip.compress(patched(dim=("8h", 7, *[32767] * 7))),
    "stream": zlib.compress(patched(), wbits=31)[:-8],
    "offset": patched(offset=("f", 1e11)),
}


def endless() -> bytes:
    """A small file that unpacks to 64 MiB more than its array."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = packer.compress(patched())
    return start + b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()


@pytest.mark.parametrize("claim", [*CLAIMS, "endless"])
def test_memory_follows_the_file(tmp_path, claim):
    """Neither what a header claims nor what a stream unpacks to is asked for."""
    data = CLAIMS[claim] if claim in CLAIMS else endless()
    tracemalloc.start()
    with pytest.raises(UserError, match="more data than its header" if claim == "endless" else "."):
        read(tmp_path, data)
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


def test_a_volume_is_refused_where_a_slice_is_expected_before_it_is_unpacked(tmp_path):
    volume = patched(nibabel.Nifti1Image(np.zeros((6, 4, 3)), None))[:352]
    with pytest.raises(UserError, match="an array of 6x4x3 pixels; expected a slice"):
        read(tmp_path, volume, max_axes=2, expected="a slice")
    with pytest.raises(UserError, match="an array of 6x4 pixels; expected 20 or fewer"):
        read(tmp_path, patched(), max_pixels=20, expected="20 or fewer")


DAMAGES = {
    "no magic": ({"magic": ("4s", b"\0\0\0\0")}, "ANALYZE"),
    "pair": ({"magic": ("4s", b"ni1\0")}, "half of a pair"),
    "length": ({"dim": ("8h", 2, 6, -4, 1, 1, 1, 1, 1)}, "an array of 6x-4"),
    "lengths": ({"dim": ("8h", 2, -6, -4, 1, 1, 1, 1, 1)}, "not a whole NIfTI file"),
    "empty": ({"dim": ("8h", 2, 6, 0, 1, 1, 1, 1, 1)}, "an array of 6x0"),
    "type": ({"datatype": ("h", 77)}, "not a whole NIfTI file.*77"),
    "complex": ({"datatype": ("h", 32)}, "complex64"),
    "intercept": ({"slope": ("2f", 1.0, float("nan"))}, "not a whole NIfTI file.*intercept"),
    "early": ({"offset": ("f", 100.0)}, "begins at byte 100"),
    "NaN offset": ({"offset": ("f", float("nan"))}, "not a whole NIfTI file.*NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_header_is_named(tmp_path, damage):
    fields, message = DAMAGES[damage]
    with pytest.raises(UserError, match=message):
        read(tmp_path, patched(**fields))


def test_random_damage_is_read_or_named_and_nothing_else(tmp_path):
    rng, named = np.random.default_rng(1), 0
    kinds = nibabel.Nifti1Image, nibabel.Nifti2Image
    images = [kind(PIXELS, AFFINE).to_bytes() for kind in kinds]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(300):
            data = bytearray(images[turn % 2])
            for at in rng.integers(0, len(data) - 100, rng.integers(1, 8)):
                data[at] = rng.integers(256)
            if turn % 5 == 0:
                data = data[: rng.integers(len(data))]
            try:
                image = read(tmp_path, gzip.compress(data) if turn % 3 == 0 else bytes(data))
                nifti.finite(image.values())
            except UserError:
                named += 1
            else:
                assert nifti.usable(image.affine)
                if image.oriented:
                    nifti.turning(image.affine, "RAS")
                nifti.write(tmp_path / "back.nii", PIXELS, image.affine)
    assert 40 < named < 260


# ---- affines ----


def test_an_sform_and_a_qform_that_turn_a_file_differently_are_seen(tmp_path):
    """Where a header names one affine alone, the other is not looked at."""
    turned = (-1, -1, 1)
    for codes, turn in (((1, 1), (1, 1, 1)), ((1, 1), turned), ((0, 1), turned), ((1, 0), turned)):
        image = nibabel.Nifti1Image(np.zeros((6, 4, 5), np.float32), None)
        image.set_sform(AFFINE, codes[0])
        image.set_qform(AFFINE @ np.diag([*turn, 1]), codes[1], strip_shears=True)
        disputed = codes == (1, 1) and turn == turned
        assert read(tmp_path, image.to_bytes()).disputed is disputed, (codes, turn)


def test_a_quaternion_a_little_longer_than_one_is_shortened(tmp_path):
    half = 0.5**0.5
    image = nibabel.Nifti1Image(PIXELS, None)
    image.set_qform(np.diag([2.0, 3, 4, 1]), 1)
    found = read(tmp_path, patched(image, scode=("h", 0), quaternion=("3f", 0, half, half + 1e-4)))
    expected = nibabel.quaternions.quat2mat((0, 0, half, half)) * (2, 3, 4)
    np.testing.assert_allclose(found.affine[:3, :3], expected, atol=2e-3)
    assert found.oriented and not found.broken
    found = read(tmp_path, patched(image, scode=("h", 0), quaternion=("3f", 0, 2, 2)))
    assert found.broken and not found.oriented


@pytest.mark.parametrize("handed", [1, -1])
def test_a_qform_of_either_handedness(tmp_path, handed):
    image = nibabel.Nifti1Image(PIXELS, None)
    affine = np.array([[0, -2.0, 0, 5], [3, 0, 0, 6], [0, 0, 4.0 * handed, 7], [0, 0, 0, 1]])
    image.set_qform(affine, 1)
    found = read(tmp_path, patched(image, scode=("h", 0)))
    np.testing.assert_allclose(found.affine, affine, atol=1e-6)


def test_voxel_sizes_below_zero_turn_nothing(tmp_path):
    image = nibabel.Nifti1Image(PIXELS, None)
    image.set_qform(np.diag([2.0, 3, 4, 1]), 1)
    data = patched(image, scode=("h", 0), pixdim=("4f", 1, -2, 3, -4))
    np.testing.assert_allclose(read(tmp_path, data).affine, np.diag([2, 3, 4, 1]))


@pytest.mark.parametrize("row", [[0.0] * 12, [float("nan")] * 12, [1e30] * 12, [1.0, 0, 0, 0] * 3])
def test_a_broken_sform_gives_way_to_the_qform_then_to_voxel_sizes(tmp_path, row):
    image = nibabel.Nifti1Image(PIXELS, None)
    image.set_qform(np.diag([2.0, 3, 4, 1]), 1)
    for code, oriented in ((1, True), (0, False)):
        fields = {"scode": ("h", 2), "qcode": ("h", code), "sform": ("12f", *row)}
        found = read(tmp_path, patched(image, **fields))
        assert found.broken and found.oriented == oriented
        np.testing.assert_allclose(found.affine, np.diag([2, 3, 4, 1]))


def test_a_plane_s_affine_needs_no_third_axis(tmp_path):
    row = [2.0, 0, 0, 5, 0, 0, 0, 6, 0, 3, 0, 7]
    found = read(tmp_path, patched(scode=("h", 2), sform=("12f", *row)))
    assert found.oriented and nifti.usable(found.affine)
    np.testing.assert_allclose(found.affine[:3, :2], [[2, 0], [0, 0], [0, 3]])


def test_odd_voxel_sizes_are_said_by_nobody(tmp_path, caplog, capfd):
    assert read(tmp_path, patched(pixdim=("4f", 1, -1.5, 0, float("nan")))).oriented
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_contrast_that_float32_cannot_hold_is_refused():
    """It would be a constant slice, whose SSIM is 1."""
    few = np.arange(100.0).reshape(10, 10)
    signed = (few + 2**30).astype(np.int32), few.astype(np.uint64) + 2**40
    for wrong in (*signed, 1e9 - few, -1e9 - few, 2**25 + 1 + 2 * few):
        with pytest.raises(UserError, match=r"which float32 hardly tells apart. Fix: subtract"):
            nifti.finite(wrong)
    near, exact = 1 + few * 1e-16, np.where(few > 50, np.float32(1 + 2**-23), np.float32(1))
    for fine in (few, (few + 2**20).astype(np.int32), np.full(9, 2**30 + 1), near, exact):
        np.testing.assert_array_equal(nifti.finite(fine), fine.astype(np.float32))


@pytest.mark.parametrize("plane", nifti.PLANES)
@pytest.mark.parametrize("codes", ["RAS", "LPI", "PIR", "SLA", "ILP", "ARS"])
def test_turning_keeps_every_voxel_in_its_place(plane, codes):
    shape = (3, 4, 5)
    affine = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(codes), shape)
    volume = np.arange(60).reshape(shape)
    turning = nifti.turning(affine, nifti.PLANES[plane])
    turned = nibabel.apply_orientation(volume, turning)
    there = nifti.turn_affine(affine, shape, turning)
    assert "".join(nibabel.aff2axcodes(there)) == nifti.PLANES[plane]
    assert nifti.plane_of(nifti.directions(there[None])[0]) == plane
    for index in ((0, 0, 0), (2, 1, 3), tuple(np.subtract(turned.shape, 1))):
        index = tuple(np.minimum(index, np.subtract(turned.shape, 1)))
        (old,) = np.argwhere(volume == turned[index])
        np.testing.assert_allclose(apply_affine(affine, old), apply_affine(there, index))


def test_oblique_slices_run_where_they_were_turned():
    """The axis of the world that is nearest to one of theirs may be the nearest to another too."""
    for axes in Rotation.random(200, random_state=0).as_matrix():
        affine = nibabel.affines.from_matvec(axes * (1.4, 1.4, 8))
        for plane, ends in nifti.PLANES.items():
            there = nifti.turn_affine(affine, (4, 5, 6), nifti.turning(affine, ends))
            assert nifti.directions(there[None]) == [ends[:2]]
            assert nifti.plane_of(ends[:2]) == plane


def test_a_turn_about_a_diagonal_moves_the_other_corners():
    turn = Rotation.from_rotvec(np.radians(30) * np.ones(3) / 3**0.5).as_matrix()
    turned = nibabel.affines.from_matvec(turn)
    assert nifti.moved(turned, np.eye(4), (9, 9, 9))
    assert not nifti.moved(turned, turned, (9, 9, 9))


def test_the_plane_of_slices():
    planes = {"RS": "coronal", "SL": "coronal", "PL": "axial", "AI": "sagittal", "RL": "", "": ""}
    assert {ends: nifti.plane_of(ends) for ends in planes} == planes


# ---- writing ----


def test_nifti_keeps_pixels_affine_and_bytes(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz", "c.nii"):
        nifti.write(tmp_path / name, PIXELS, AFFINE, "synthetic")
        image = nibabel.load(tmp_path / name)
        assert np.array_equal(image.get_fdata(dtype=np.float32), PIXELS)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
        sizes = np.linalg.norm(AFFINE[:3, :2], axis=0)
        np.testing.assert_allclose(image.header.get_zooms(), sizes, rtol=1e-6)
        assert bytes(image.header["descrip"]).startswith(b"synthetic")
        assert image.header.get_xyzt_units()[0] == "mm" and image.header["sform_code"] == 2
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    nifti.write(tmp_path / "d.nii", PIXELS, np.diag([2.0, 3, 4, 1]), oriented=False)
    header = nibabel.load(tmp_path / "d.nii").header
    assert header["sform_code"] == header["qform_code"] == 0 and header.get_zooms() == (2, 3)
    nifti.write(tmp_path / "e.nii", PIXELS, None, like=header.as_byteswapped(">"))
    image = nibabel.load(tmp_path / "e.nii")
    assert np.array_equal(image.get_fdata(dtype=np.float32), PIXELS)
    assert image.header.get_zooms() == (2, 3)


@pytest.mark.parametrize(("unit", "mm"), [("micron", 0.001), ("meter", 1000.0), ("mm", 1.0)])
def test_affines_are_in_millimetres_whatever_the_unit(tmp_path, unit, mm):
    for codes in ((2, 0), (0, 1), (0, 0)):
        image = nibabel.Nifti1Image(PIXELS, None)
        image.header.set_sform(np.diag([50, 60, 80, 1]), codes[0])
        image.header.set_qform(np.diag([50, 60, 80, 1]), codes[1])
        image.header.set_xyzt_units(unit)
        found = read(tmp_path, image.to_bytes()).affine
        np.testing.assert_allclose(found, np.diag([50 * mm, 60 * mm, 80 * mm, 1]), rtol=1e-6)
