"""NIfTI files: reading, writing, and where their voxels lie in the world.

    image = nifti.read("case_004_week_0_slice_0.nii.gz")
    image.values()    # the array, scaled by the header's slope and intercept
    image.affine      # (4, 4), voxel indices to millimetres
    image.oriented    # whether the header gave that affine, or voxel sizes alone
    nifti.write("out.nii.gz", pixels, image.affine)

Errors are `UserError`s that do not name the file: callers add it.
"""

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import ornt_transform

from support.runtime import UserError, atomic_path

SUFFIXES = (".nii", ".nii.gz")
# The file's first number is the size of its header.
HEADERS = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
GZIP = b"\x1f\x8b"  # how a gzip member begins
SPARE = 4096  # bytes that may follow the array, as some programs pad their files
# Where rows, columns and slices of a plane run: to the patient's right, front (A) or head (S).
PLANES = {"coronal": "RSA", "axial": "RAS", "sagittal": "ASR"}
AXES = {"R": "RL", "A": "AP", "S": "SI"}  # the two ends of each axis of the world
MM = {1: 1000.0, 3: 0.001}  # in a unit of space, by its code in headers: metres and micrometres
DISPUTED = "an sform and a qform that turn them differently"  # said of files, see Image.disputed


@dataclass(frozen=True)
class Image:
    """A file's array as it is stored, and what its header says of it."""

    raw: np.ndarray  # as it is stored, at least one axis, without the header's scale
    header: nibabel.Nifti1Header  # or NIfTI-2's, of the file's byte order
    scale: tuple[float | None, float | None]  # slope and intercept; None, None where it has none
    affine: np.ndarray  # (4, 4) float64, voxel indices to mm; always finite and invertible
    oriented: bool  # whether the header gave that affine; else it holds voxel sizes alone
    broken: bool  # the header names an affine that is none (all zero, NaN, flat): not used

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    @property
    def scaled(self) -> bool:
        """Whether the header's slope and intercept change the stored values."""
        return self.scale not in ((None, None), (1, 0))

    @property
    def disputed(self) -> bool:
        """Whether the header's two affines run the axes in different directions: one is wrong."""
        if min(self.header["sform_code"], self.header["qform_code"]) <= 0:
            return False
        with np.errstate(all="ignore"):
            both = [_full(make(self.header)) for make in (nibabel.Nifti1Header.get_sform, _qform)]
        return all(map(usable, both)) and turned(*both, min(3, int(self.header["dim"][0])))

    def values(self) -> np.ndarray:
        """The array in the file's units: raw * slope + intercept."""
        if not self.scaled:
            return self.raw
        slope, intercept = self.scale
        # What becomes too large for float64 is Inf, and an error where pixels are checked.
        with np.errstate(over="ignore"):
            return self.raw.astype(np.float64) * slope + intercept


# ---- reading ----


def is_nifti(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def read(
    path: Path | str, max_axes: int = 7, max_pixels: int = 2**48, expected: str = "lengths above 0"
) -> Image:
    """Read a NIfTI-1 or NIfTI-2 file, gzipped or not; UserError for what is no such file.

    An array with more than `max_axes` axes that are longer than 1, or with more than `max_pixels`,
    is refused before it is unpacked, with `expected` in the message.
    """
    try:
        return _parse(_read_bytes(path), max_axes, max_pixels, expected)
    except (UserError, OSError):
        raise
    except Exception as error:  # nibabel, NumPy and zlib have a dozen for a damaged file
        raise UserError(f"not a whole NIfTI file ({type(error).__name__}: {error})") from error


def _read_bytes(path: Path | str, count: int = -1) -> bytes:
    """The first `count` bytes of a file, or all of them."""
    if not os.path.isfile(path):  # whoever opens a named pipe waits for somebody to write to it
        raise UserError("not a regular file, or not there")
    with open(path, "rb") as file:
        return file.read(count)


def _parse(data: bytes, max_axes: int, max_pixels: int, expected: str) -> Image:
    header = _read_header(data)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    pixels, start = math.prod(shape), int(header["vox_offset"])
    if dtype.kind not in "biuf":
        label = header.get_value_label("datatype")
        raise UserError(f"pixels of type {label}; expected one real number a pixel")
    times = "x".join(map(str, shape))
    if sum(length > 1 for length in shape) > max_axes or not 0 < pixels <= max_pixels:
        raise UserError(f"an array of {times} pixels; expected {expected}")
    if start < header["sizeof_hdr"]:
        raise UserError(f"a damaged header: its array begins at byte {start}, within the header")
    end = start + pixels * dtype.itemsize
    data = _unzip(data, end + SPARE + 1) if data[:2] == GZIP else data
    if len(data) > end + SPARE:
        raise UserError(f"more data than its header describes, an array of {times} pixels")
    raw = np.frombuffer(data, dtype, count=pixels, offset=start)  # ValueError for too few bytes
    raw = raw.reshape(shape, order="F")
    return Image(raw, header, header.get_slope_inter(), *best_affine(header))


def _unzip(data: bytes, limit: int) -> bytes:
    """The first `limit` bytes of gzip members, or all there are; EOFError where they break off.

    One call of zlib for a member, which leaves the other threads free: a GzipFile takes half as
    long again. A member that is read to its end has its checksum compared.
    """
    parts, length = [], 0
    while data and length < limit:
        member = zlib.decompressobj(wbits=31)
        parts.append(member.decompress(data, limit - length))
        length += len(parts[-1])
        if not member.eof and length < limit:
            raise EOFError("it ends early")
        data = member.unused_data.lstrip(b"\0")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_header(data: bytes) -> nibabel.Nifti1Header:
    """nibabel's header at the start of `data`, gzipped or not; its own checks would print a line
    for each file.
    """
    data = _unzip(data, max(HEADERS)) if data[:2] == GZIP else data
    little, big = (int.from_bytes(data[:4], order) for order in ("little", "big"))
    kind = HEADERS.get(little) or HEADERS.get(big)
    if kind is None:
        raise UserError("not a NIfTI file")
    block, order = data[: kind.template_dtype.itemsize], "<" if little in HEADERS else ">"
    header = kind(block, endianness=order, check=False)
    if header["magic"].item()[:2] != b"n+":
        pair = "a file of ANALYZE, or half of a pair .hdr and .img"
        raise UserError(f"{pair}. Fix: convert it to .nii.gz")
    return header


def read_header(path: Path | str) -> nibabel.Nifti1Header:
    """A NIfTI file's header alone, whatever follows it. A file that has none raises anything."""
    return _read_header(_read_bytes(path, 2**16))


def without_pixels(block: bytes) -> Image:
    """The image of a header that has lost its array: all its pixels are 0."""
    header = _read_header(block)
    raw = np.broadcast_to(np.zeros((), header.get_data_dtype()), header.get_data_shape())
    return Image(raw, header, header.get_slope_inter(), *best_affine(header))


def finite(pixels: np.ndarray) -> np.ndarray:
    """`pixels` as contiguous float32; UserError where some of them are NaN or infinite, or where
    float32 tells too few of them apart, as those of 2^30 to 2^30 + 99.
    """
    exact = np.asarray(pixels)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, and an error here
        pixels = np.ascontiguousarray(exact, np.float32)
    if broken := pixels.size - np.count_nonzero(np.isfinite(pixels)):
        raise UserError(f"{broken} of {pixels.size} pixels are NaN or Inf")
    low, high = float(exact.min()), float(exact.max())
    largest = np.float32(max(-low, high))
    # A range below the first bound is the rounding of a constant in float64.
    if 1e-12 * largest < high - low < 256 * np.spacing(largest) and (pixels != exact).any():
        found = f"values of {low:.17g} to {high:.17g}, which float32 hardly tells apart"
        raise UserError(f"{found}. Fix: subtract {low:.17g} from all")
    return pixels


# ---- affines ----


def usable(affine: np.ndarray) -> bool:
    """Whether `affine` (4, 4) is finite, and its axes have lengths and span the space."""
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e6:
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(lengths.min() > 1e-6 and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-3)


def _qform(header: nibabel.Nifti1Header) -> np.ndarray:
    """The header's quaternion as an affine; NaN for one that is much longer than 1.

    `quat2mat` shortens one that is a little longer, as FSL and ITK do.
    """
    x, y, z = (float(header[f"quatern_{letter}"]) for letter in "bcd")
    left = 1 - (x * x + y * y + z * z)
    if not left > -0.01:
        return np.full((4, 4), np.nan)
    affine = np.eye(4)
    affine[:3, :3] = nibabel.quaternions.quat2mat((max(0.0, left) ** 0.5, x, y, z))
    sizes = np.abs(header["pixdim"][1:4].astype(float))
    affine[:3, :3] *= sizes * (1, 1, -1 if header["pixdim"][0] < 0 else 1)
    affine[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
    return affine


def _full(affine: np.ndarray) -> np.ndarray:
    """`affine` with a third axis of 1 mm across the other two, if it has none: slices need none."""
    affine = np.array(affine, np.float64)
    if not affine[:3, 2].any():
        across = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = across / (np.linalg.norm(across) or 1)
    return affine


def best_affine(header: nibabel.Nifti1Header) -> tuple[np.ndarray, bool, bool]:
    """The affine, whether the header gives its directions, and whether it names a broken one.

    The sform where there is one, else the qform, else the voxel sizes alone; in mm, whatever the
    unit of the header.
    """
    broken, unit = False, MM.get(int(header["xyzt_units"]) & 7, 1)
    to_mm = np.diag([unit, unit, unit, 1])
    for code, make in (("sform_code", nibabel.Nifti1Header.get_sform), ("qform_code", _qform)):
        if header[code] > 0:
            with np.errstate(all="ignore"):
                affine = _full(to_mm @ make(header))
            if usable(affine):
                return affine, True, broken
            broken = True
    sizes = unit * np.abs(np.nan_to_num(header["pixdim"][1:4].astype(float), posinf=0))
    return np.diag([*np.where((sizes > 1e-6) & (sizes < 1e6), sizes, 1), 1.0]), False, broken


def turning(affine: np.ndarray, ends: str) -> np.ndarray:
    """How to turn a volume so that its rows, columns and slices run to the three `ends`, as "RSA".

    That is an orientation (3, 2) for `nibabel.apply_orientation`. An oblique volume is turned to
    the axes of the world that are nearest to its own.
    """
    return ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(ends))


def turn_affine(affine: np.ndarray, shape: Sequence[int], turning: np.ndarray) -> np.ndarray:
    """The affine of an array of `shape` once it is turned: every voxel stays in its place."""
    return affine @ nibabel.orientations.inv_ornt_aff(turning, shape[:3])


def turned(one: np.ndarray, other: np.ndarray, axes: int) -> bool:
    """Whether any of the first `axes` of two affines runs more than 60 degrees from the other's."""
    units = [a[:3, :axes] / np.linalg.norm(a[:3, :axes], axis=0) for a in (one, other)]
    return bool((np.prod(units, axis=0).sum(axis=0) < 0.5).any())  # the cosines


def moved(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether an affine puts an array of `shape` a voxel or more from where the other does."""
    corners = np.array([*product(*((0, length - 1) for length in shape), (1,))])
    apart = np.linalg.solve(other, (one - other) @ corners.T)[:3]
    return bool(np.abs(apart).max() >= 1)


def directions(affines: np.ndarray) -> list[str]:
    """Where rows and columns run, of affines (N, 4, 4): "RS" is to the patient's right and head.

    Oblique ones run to the axes of the world to which `turning` turns them.
    """
    return [_ends(affine[:3, :3].tobytes()) for affine in affines.astype(np.float64)]


@cache  # all slices of a volume have the same axes
def _ends(axes: bytes) -> str:
    affine = nibabel.affines.from_matvec(np.frombuffer(axes).reshape(3, 3))
    return "".join(nibabel.aff2axcodes(affine)[:2])


def plane_of(ends: str) -> str:
    """The plane of slices whose rows and columns run to `ends`, as "RS" or "IL"; else ""."""
    axes = {axis for axis, letters in AXES.items() if set(letters) & set(ends)}
    return next((plane for plane, names in PLANES.items() if axes == set(names[:2])), "")


# ---- writing ----


def write(
    path: Path | str,
    pixels: np.ndarray,
    affine: np.ndarray | None,
    description: str = "",
    like: nibabel.Nifti1Header | None = None,
    oriented: bool = True,
) -> None:
    """Write a NIfTI file of `pixels` with their dtype; gzipped if `path` ends in .gz.

    If the affine is not `oriented` (see `Image`), the file keeps only its voxel sizes. With a
    header `like`, that header's affines, their codes and units are kept as they are, and `affine`
    is ignored. The same pixels give the same bytes: the gzip header carries no time.
    `description` (at most 79 ASCII characters) goes into the header, where viewers show it.
    """
    if like is None:
        header = nibabel.Nifti1Header()
        header.set_xyzt_units("mm")
    else:
        header = like.as_byteswapped("<") if like.endianness == ">" else like.copy()
    header.set_data_dtype(pixels.dtype)
    sizes = header["pixdim"].copy()
    header.set_data_shape(pixels.shape)
    header["pixdim"] = sizes  # of axes that the array lacks, too: of a slice, its thickness
    if like is None:
        header.set_qform(affine, 0, strip_shears=True)  # sets the voxel sizes too
        if oriented:
            header.set_sform(affine, 2)
    header.set_slope_inter(1, 0)
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4  # four bytes say that no extension follows
    header["descrip"] = description.encode("ascii")
    little = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
    data = header.binaryblock + bytes(4) + little.tobytes(order="F")
    with atomic_path(path) as part:
        zipped = str(path).lower().endswith(".gz")
        part.write_bytes(gzip.compress(data, compresslevel=3, mtime=0) if zipped else data)
