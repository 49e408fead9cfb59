"""A study of 2-D NIfTI slices as PyTorch datasets.

1. A study is a folder with keras_slices_train/, keras_slices_validate/ and keras_slices_test/ of
   files such as case_004_week_0_slice_12.nii.gz. No patient may be in two of them.
2. Its masks are optional, and lie beside it: keras_slices_seg_train/seg_004_week_0_slice_12.nii.gz.
3. `open_study` decodes every slice once, into a cache, and gives a `SliceDataset` for each split.
4. There each slice lies in one grid for all (`Placement`), with mean 0 and deviation 1 (`z_score`).

slice_volumes.py makes a study of 3-D volumes.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import combinations, product
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from skimage.transform import resize

from support import nifti, runtime
from support.runtime import UserError, in_parallel, option, write_json

SPLITS = ("train", "validate", "test")
# Studies that are looked for in the working directory.
STUDY_NAMES = ("keras_slices_data", "HipMRI_study_keras_slices_data")
# The files of a cache; the arrays hold the splits one after another.
PIXELS, MASKS, TABLE, INDEX = "pixels.npy", "masks.npy", "table.npz", "index.json"
CACHE_VERSION = 9  # increase it when what is cached changes its meaning
NO_MASK = 255  # in a mask: nothing is known of this pixel; no class has this index
LARGEST = 2**26  # pixels of a slice
A_SLICE = "a 2-D slice. Fix: `python slice_volumes.py` cuts volumes into slices"
FITS = ("auto", "pad", "stretch")
OF_THE_REPORT = (256, 128)  # rows and columns of HipMRI's slices
MULTIPLE = 8  # of a grid that follows its study: a top code covers 8x8 pixels, by default
MOST_DIGITS = 18  # of a number in a name: int64 holds these
# The 12 of case_12-05-2024 is no patient: the same person has another number on another day. Nor is
# the 3 of patient_3T_012, a field strength.
YEAR, MONTH = r"(?:19|20)\d\d", "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
MM, DD = "(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
DATE = rf"""(?: \d\d?[-._]\d\d?[-._]{YEAR} | {YEAR}[-._]\d\d?[-._]\d
    | \d\d?(?:-\d\d-|\.\d\d\.)\d\d(?!\d) | \d\d?h\d\d(?!\d)
    | {YEAR}{MM}{DD}(?:\d{{4}}|\d{{6}})?(?!\d) | (?:{DD}{MM}|{MM}{DD}){YEAR}(?!\d)
    | \d\d?[-._ ]?{MONTH}[a-z]*[-._ ]?{YEAR} | {YEAR}[-._ ]?{MONTH}
    | \d\d(?:-{MONTH}-|\.{MONTH}\.|{MONTH})\d\d(?![a-z0-9]) )"""
NO_DATE = rf"(?!{DATE} | \d\d?[-.]{YEAR}(?!\d) | {YEAR}-{MM}(?!\d))"
NO_TESLA = r"(?!(?:1\.5|[37])T(?![a-z] | [12](?!\d)))"
STANDARD_NAME = re.compile(
    rf"(?:case|seg)_{NO_DATE}(\d+)_week_(\d+)_slice_(\d+)\.nii(?:\.gz)?", re.I | re.VERBOSE
)
# How other names tell their numbers: by a word that announces one, or as public data sets do.
ANNOUNCED = {
    "patient": rf"""(?<![a-z]) sub-{NO_DATE}([a-z0-9]+)                        # BIDS
        | (?<![a-z]) (?:case|patient|pat|subject|subj|sub) [ _-]?{NO_DATE}{NO_TESLA}(\d+)
        | (?<![a-z]) B{NO_DATE}(\d+)_Week                                    # HipMRI: B006_Week0
        | BraTS\d*_(?:Training_|Validation_)?{NO_DATE}(\d+) | BraTS-[a-z]+-(\d+)
        | OAS[12]_(\d+)_MR | OAS(3\d{{4}})_MR                                   # OASIS
        | (?<!\d) \d{{3}}_S_(\d+)                                       # ADNI: site_S_subject""",
    "week": r"""(?<![a-z]) ses-([a-z0-9]+)                                     # BIDS
        | (?<![a-z]) (?:week|wk|session|ses|visit|timepoint|frame) [ _-]?(\d+)
        | BraTS-[a-z]+-\d+-(\d+) | OAS[12]_\d+_MR(\d+) | OAS3\d{4}_MR_d(\d+)""",
    "slice": r"(?<![a-z]) (?:slice|plane|sl|z) [ _-]?(\d+)",
}
ANNOUNCED = {key: re.compile(words, re.I | re.VERBOSE) for key, words in ANNOUNCED.items()}
# A label this near to a whole number is that number. Where all are near 0 they must be nearer, or
# labels divided by 255 would be an empty mask.
ALMOST, ALMOST_NOTHING = 0.01, 0.001
RECONSTRUCTION = "VQ-VAE-2 reconstruction, not for clinical use"  # in the header of every one
NEW_NAME = (
    "Fix: rename it like case_004_week_0_slice_0.nii.gz, or tell its parts with --name-pattern, "
    r"such as '(?P<patient>\d+)_visit(?P<week>\d+)_(?P<slice>\d+)'"
)


@dataclass(frozen=True)
class DataConfig:
    """Which study, and the grid in which the model sees its slices."""

    data: str = option("", f"study folder; empty: the checkpoint's, else {STUDY_NAMES[0]}/ here")
    height: int = option(0, "rows of the model's grid; 0 follows the study's slices")
    width: int = option(0, "columns of the model's grid; 0 follows the study's slices")
    fit: str = option(
        "auto",
        "how slices of other sizes fill the grid; auto: unchanged if the grid is less than 8 "
        "pixels larger, else resized to it if that changes their aspect ratio by at most an "
        "eighth, else scaled and padded",
        choices=FITS,
    )
    allow_patient_overlap: bool = option(False, "let splits share a patient")
    name_pattern: str = option(
        "", "names of files, a regular expression with a group patient, and perhaps week and slice"
    )
    cache: str = option("", "decoded slices; empty is ~/.cache/vqvae2-slices")

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            runtime.check_number(name, getattr(self, name), least=0)
        if self.fit not in FITS:
            raise UserError(f"--fit is {self.fit}; expected one of {', '.join(FITS)}")
        check_pattern(self.name_pattern)


def check_pattern(pattern: str) -> None:
    """UserError where a --name-pattern is no regular expression with a group `patient`."""
    try:
        if pattern and "patient" not in re.compile(pattern).groupindex:
            raise re.error(r"it has no group (?P<patient>\d+)")
    except re.error as error:
        raise UserError(f"--name-pattern {pattern}: {error}") from error


# The fields of `DataConfig` that a trained model decides, and those that its checkpoint keeps.
SIZE = ("height", "width", "fit")
CHECKPOINT_FIELDS = (*SIZE, "allow_patient_overlap", "name_pattern")


class SliceName(NamedTuple):
    patient: int
    week: int
    slice: int


class SourceFile(NamedTuple):
    name: SliceName
    path: str
    size: int
    changed_ns: int


class Job(NamedTuple):
    """A slice to decode, with its mask if it has one."""

    split: str
    file: SourceFile
    mask: SourceFile | None


# ---- a study's files, none of them opened ----


def name_parts(path: Path | str, pattern: str = "") -> dict[str, str]:
    """What the path of a file says of it: its "patient" and, where it says so, "week" and "slice".

    Reads case_004_week_0_slice_12.nii.gz, Case_004_Week0_LFOV.nii, B006_Week0_LFOV.nii,
    patient012_z034.nii, sub-01_ses-2_T2w.nii.gz, BraTS20_Training_004.nii, OAS1_0004_MR1.nii and
    ADNI_002_S_0004.nii; or what the groups of the regular expression `pattern` match in the path.
    A number that nothing announces is never taken for a patient: 12-05-2024_prostate.nii.gz is a
    date, and the same person of another day would become another patient. UserError then.
    """
    path, parts = str(path).replace("\\", "/"), {}
    if pattern:
        if match := re.search(pattern, path):
            parts = {key: text for key, text in match.groupdict().items() if text}
    else:
        # The file's own name comes first, then the folders above it, from the innermost one on.
        for name, (key, written) in product(path.split("/")[::-1], ANNOUNCED.items()):
            told = [match[match.lastindex] for match in written.finditer(name)]
            several = len({number.lstrip("0") for number in told}) > 1
            if several and key == "patient" and key not in parts:
                raise UserError(f"{name} tells two patients, {' and '.join(told)}. {NEW_NAME}")
            if told:
                parts.setdefault(key, told[0])
    if "patient" not in parts:
        by = f" by the --name-pattern {pattern}, given or kept by a checkpoint" if pattern else ""
        fix = "Fix: a --name-pattern that fits all names" if pattern else NEW_NAME
        raise UserError(f"no patient in its name{by}. {fix}")
    return parts


def parse_name(path: Path | str, pattern: str = "") -> SliceName:
    """The numbers in a slice's path, see `name_parts`; a week or slice that is not named is 0."""
    match = STANDARD_NAME.fullmatch(os.path.basename(path))
    if match and not pattern:
        numbers = match.groups()
    else:
        parts = name_parts(path, pattern)
        numbers = [parts.get(key, "0") for key in SliceName._fields]
    if not all(map(str.isdecimal, numbers)):
        found = f"{', '.join(numbers)}; expected numbers of patient, week and slice"
        raise UserError(f"{found}. {NEW_NAME}")
    if max(map(len, numbers)) > MOST_DIGITS:
        raise UserError(
            f"{max(numbers, key=len)}; expected {MOST_DIGITS} digits or fewer. {NEW_NAME}"
        )
    return SliceName(*map(int, numbers))


def find_study(data: str = "") -> Path | None:
    """The folder `data`, else the first of `STUDY_NAMES` that is here, else None."""
    if data and not Path(data).is_dir():
        raise FileNotFoundError(f"{data}: no such study folder. Fix: check --data.")
    folders = map(Path, [data] if data else STUDY_NAMES)
    return next((folder for folder in folders if folder.is_dir()), None)


def find_nifti(
    folder: Path | str, others: list[str], above: tuple[str, ...] = ()
) -> Iterator[os.DirEntry]:
    """All NIfTI entries under a folder in order of name; the paths of other files go into `others`.

    Hidden files and folders are passed over: macOS leaves some beside every file that it copies. So
    is a link to one of the folders `above`, which would lead round in a circle.
    """
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not (entry.is_symlink() and os.path.realpath(entry.path) in above):
                yield from find_nifti(entry.path, others, above)
        elif nifti.is_nifti(entry.name):
            yield entry
        else:
            others.append(entry.path)


def scan(folder: Path, pattern: str, bad: dict[str, str], others: list[str]) -> list[SourceFile]:
    """The slices in `folder` and below, named by `pattern`, in order of patient, week and slice.

    Those that cannot be used go into `bad`, with the reason; what is no NIfTI goes into `others`.
    """
    files: dict[SliceName, SourceFile] = {}
    for entry in find_nifti(folder, others) if os.path.isdir(folder) else ():
        try:
            name = parse_name(os.path.relpath(entry.path, folder), pattern)
            status = entry.stat()
        except (UserError, OSError) as error:
            bad[entry.path] = getattr(error, "strerror", None) or str(error)
            continue
        # Copying can set the time of modification to an old one; it cannot set that of the change.
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        file = SourceFile(name, entry.path, status.st_size, changed)
        # Two files of one name would be one slice, and one of the two would be lost in silence.
        if files.setdefault(name, file) is not file:
            numbers = "patient {}, week {}, slice {}".format(*name)
            bad[entry.path] = f"read as {numbers}, as {files[name].path} is. {NEW_NAME}"
    return [files[name] for name in sorted(files)]


def way_in(others: list[str]) -> str:
    """What a folder without NIfTI files holds instead, and how that becomes NIfTI."""
    there = f" It holds {len(others)} other files, such as {others[0]}." if others else ""
    return f"{there} DICOM becomes NIfTI by `dcm2niix -z y -o OUT IN`."


def say_passed_over(paths: Sequence[str], kind: str, where: str = "") -> None:
    """Print how many `kind` were passed over, and the first of them; nothing where none was."""
    if paths:
        print(f"{where}{len(paths)} {kind} were passed over, such as {paths[0]}")


def _scan_study(study: Path, pattern: str, bad: dict[str, str]) -> list[Job]:
    """Every slice of a study with its mask, split after split; prints what is passed over.

    Files that cannot be used go into `bad`. FileNotFoundError for a split that is missing or empty.
    """
    jobs, others, empty = [], [], []
    for split in SPLITS:
        folder, masks = study / f"keras_slices_{split}", study / f"keras_slices_seg_{split}"
        files = scan(folder, pattern, bad, others)
        if not files and not (folder.is_dir() and bad):
            empty.append(folder.name)
        mask_of = {mask.name: mask for mask in scan(masks, pattern, bad, [])}
        jobs += [Job(split, file, mask_of.pop(file.name, None)) for file in files]
        for mask in mask_of.values():  # those that no slice took
            bad[mask.path] = f"a mask without its slice in {folder.name}"
    if empty:
        none = f"{study}: no {', '.join(empty)} with .nii or .nii.gz files.{way_in(others)}"
        fix = (
            "Fix: --data names the folder of all three splits; `python slice_volumes.py` makes one"
        )
        raise FileNotFoundError(f"{none} {fix} of 3-D volumes.")
    say_passed_over(others, "other files", f"{study}: ")
    ours = {f"keras_slices_{kind}{split}" for kind in ("", "seg_") for split in SPLITS}
    folders = sorted(path.name for path in study.glob("[!.]*") if path.is_dir())
    odd = [name for name in folders if name not in ours]
    say_passed_over(odd, "other folders", f"{study}: ")
    return jobs


def _check_patients(study: Path, jobs: list[Job], allowed: bool) -> None:
    """UserError where splits share a patient, with a file of each as they were read."""
    examples = {split: {} for split in SPLITS}
    for job in jobs:
        examples[job.split][job.file.name.patient] = os.path.basename(job.file.path)
    shared = []
    for one, other in combinations(SPLITS, 2):
        both = sorted(examples[one].keys() & examples[other].keys())
        shared += [(number, one, other) for number in both]
    if not shared:
        return
    number, *splits = shared[0]
    names = " and ".join(examples[split][number] for split in splits)
    listing = ", ".join(f"{number:03d} in {one} and {other}" for number, one, other in shared[:10])
    listing += ", ..." if len(shared) > 10 else ""
    if not allowed:
        found = f"shared patients: {listing}; {names} were both read as patient {number:03d}"
        fix = "Fix: move them, rename them if they are not one patient, or --allow-patient-overlap"
        raise UserError(f"{study}: {found}. {fix}.")
    print(f"warning: shared patients: {listing}. Scores will flatter the model.")


def grid_of(jobs: list[Job]) -> tuple[int, int]:
    """The rows and columns of the grid in which a model sees these slices, if nothing else is said.

    They are the smallest multiples of 8 that hold every slice, so that little of the grid is
    padding. Where most slices are of HipMRI's 256x128, that is the grid, and its few of 256x144 are
    stretched. One slice of each volume is looked at, as the others have its size.
    """
    shapes = Counter()
    for path in {job.file.name[:2]: job.file.path for job in jobs}.values():
        with suppress(UserError, OSError):  # a bad file is named when all are decoded
            shapes[read_slice(path).shape] += 1
    if not shapes or shapes.most_common(1)[0][0] == OF_THE_REPORT:
        return OF_THE_REPORT
    return tuple(-(-max(lengths) // MULTIPLE) * MULTIPLE for lengths in zip(*shapes, strict=True))


def raise_bad(where: Path | str, bad: dict[str, str], total: int) -> None:
    """One UserError for all the files that cannot be used: the first ten and why, and the count."""
    listing = "".join(f"\n  {path}: {reason}" for path, reason in list(bad.items())[:10])
    listing += f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
    fix = "Fix: fetch or make these again, or move them elsewhere."
    raise UserError(f"{where}: {len(bad)} of {total} files cannot be used:{listing}\n{fix}")


# ---- from a file's slice to the model's and back ----


@dataclass(frozen=True)
class Placement:
    """How a slice of `shape` lies in a grid of `size`: resized to `scaled`, then moved by `offset`.

    All are (rows, columns).
    """

    shape: tuple[int, int]
    size: tuple[int, int]
    scaled: tuple[int, int]
    offset: tuple[int, int]

    @classmethod
    @lru_cache  # asked for every slice, and most have one size
    def make(cls, shape: tuple[int, int], size: tuple[int, int], fit: str = "auto") -> "Placement":
        """`fit` is one of `FITS`; see `DataConfig`."""
        ratios = np.divide(size, shape)
        if fit == "auto":
            # A grid that follows the study is less than 8 larger than its slices: no pixel has to
            # change. HipMRI's 60 slices of 256x144 are stretched, as in the report.
            holds = all(0 <= gap < MULTIPLE for gap in np.subtract(size, shape))
            fit = "stretch" if ratios.max() <= 1.1251 * ratios.min() else "pad"
            fit = "as it is" if holds else fit
        scale = {"as it is": 1, "pad": ratios.min()}.get(fit, ratios)
        scaled = tuple(np.round(np.multiply(scale, shape)).clip(1).astype(int).tolist())
        offset = tuple((there - here) // 2 for here, there in zip(scaled, size, strict=True))
        return cls(shape, size, scaled, offset)

    @property
    def own(self) -> tuple[slice, slice]:
        """The rows and columns of the grid that show the slice: `image[placement.own]`.

        What lies around them is padding, which no score may count.
        """
        (top, left), (rows, columns) = self.offset, self.scaled
        return slice(top, top + rows), slice(left, left + columns)

    def place(self, pixels: np.ndarray, fill: float = 0, nearest: bool = False) -> np.ndarray:
        """A slice (shape) in the grid (size), with `fill` around it; `nearest` is for masks."""
        grid = np.full(self.size, fill, pixels.dtype)
        grid[self.own] = _resize(pixels, self.scaled, nearest)
        return grid

    def restore(self, pixels: np.ndarray, nearest: bool = False) -> np.ndarray:
        """What `place` did, undone: the grid (size) as a slice (shape)."""
        return _resize(pixels[self.own], self.shape, nearest)

    def affine(self, affine: np.ndarray) -> np.ndarray:
        """The affine of the grid, from that of the slice."""
        scale = np.divide(self.shape, self.scaled)
        grid = np.diag([*scale, 1.0, 1.0])
        # The middle of the grid's first pixel, in pixels of the slice.
        grid[:2, 3] = (0.5 - np.array(self.offset)) * scale - 0.5
        return affine @ grid


def _resize(pixels: np.ndarray, shape: tuple[int, int], nearest: bool) -> np.ndarray:
    """`pixels` at another size: the nearest ones; else linear, smoothed first where they shrink."""
    if pixels.shape == shape:
        return pixels
    if nearest:  # labels are picked as they are, and never pass through a float
        pairs = zip(pixels.shape, shape, strict=True)
        places = [((np.arange(new) + 0.5) * old / new).astype(int) for old, new in pairs]
        return pixels[np.ix_(*places)]
    return resize(pixels, shape, anti_aliasing=True, preserve_range=True).astype(np.float32)


def z_score(pixels: np.ndarray) -> tuple[np.float32, np.float32, bool]:
    """Mean and population standard deviation of a slice, and whether it has one value only.

    Then the deviation is 1, as nothing can be divided by 0.
    """
    mean, std = np.float32(pixels.mean(dtype=np.float64)), np.float32(pixels.std(dtype=np.float64))
    constant = bool(std == 0 or pixels.min() == pixels.max())
    return mean, np.float32(1) if constant else std, constant


def read_slice(path: str) -> nifti.Image:
    """A file that holds one slice, as an image (rows, columns); UserError for others."""
    image = nifti.read(path, max_axes=2, max_pixels=LARGEST, expected=A_SLICE)
    if len(image.shape) == 3 and 1 in image.shape[:2]:  # (H, 1, W), as ITK cuts planes
        across = image.shape.index(1)
        order = [*(axis for axis in range(3) if axis != across), across]
        affine = image.affine[:, [*order, 3]]
        image = replace(image, raw=image.raw.transpose(order), affine=affine)
    shape = image.shape
    if len(shape) < 2 or min(shape[:2]) < 2 or max(shape[2:], default=1) > 1:
        raise UserError(f"an array of shape {shape}; expected {A_SLICE}")
    return replace(image, raw=image.raw.reshape(shape[:2]))


def read_labels(image: nifti.Image) -> np.ndarray:
    """The labels of a mask, int64: whole numbers from 0, the background, on; UserError for others.

    Integers stay integers: float32 would make 312782560 of an atlas's 312782546. Floats are taken
    as far as they count in ones, float32 up to 2^24. One that a resampling or the header's slope
    left at 0.9999 is a 1; the edge of an organ that was interpolated, 0.4, is none.
    """
    labels, stored, most = image.values(), image.raw.dtype, 2**63 - 1
    kind = stored if stored.kind == "f" else labels.dtype
    if kind.kind == "f":
        most = min(most, 2 ** (np.finfo(kind).nmant + 1))
    with np.errstate(invalid="ignore"):  # Inf has no remainder, and is no label either
        if labels.dtype.kind == "f":
            whole = np.rint(labels)
            near = ALMOST if whole.any() else ALMOST_NOTHING
            labels = np.where(np.abs(labels - whole) <= near, whole, labels)
        good = (labels >= 0) & (labels <= most) & (labels % 1 == 0)
    if not good.all():
        expected = f"expected whole numbers from 0, the background, to {most} ({kind})"
        raise UserError(f"a label of {labels[~good].flat[0]}; {expected}")
    return np.ascontiguousarray(labels, np.int64)


def _read_mask(path: str, of_slice: nifti.Image) -> tuple[np.ndarray, bool]:
    """The labels (rows, columns) int64 of a mask that lies on a slice, and whether its affine says
    that it lies elsewhere.
    """
    image, shape = read_slice(path), of_slice.shape
    if image.shape != shape:
        raise UserError(f"its shape is {image.shape}; expected {shape}, as of its slice")
    told = image.oriented and of_slice.oriented
    if told and nifti.turned(image.affine, of_slice.affine, axes=2):
        raise UserError(
            "its affine turns or mirrors it against its slice; expected the slice's own"
        )
    moved = told and nifti.moved(image.affine, of_slice.affine, (*shape, 1))
    return read_labels(image), moved


def _decode(
    job: Job, size: tuple[int, int], fit: str
) -> tuple[np.ndarray, tuple | None, dict] | str:
    """A slice in the grid, its mask and its row of the table; or why a file cannot be used.

    The slice is float32 in scanner units, the mask its labels and the place of each pixel's there.
    """
    mask, labels, moved, reading = None, b"", False, ""
    try:
        image = read_slice(job.file.path)
        pixels = nifti.finite(image.values())
        placement = Placement.make(pixels.shape, size, fit)
        if job.mask:
            reading = f"its mask {job.mask.path}: "
            labels, moved = _read_mask(job.mask.path, image)
            labels = placement.place(labels, nearest=True)
            mask = np.unique(labels, return_inverse=True)
    except (UserError, OSError) as error:
        return f"{reading}{error}"
    row = {"affines": image.affine, "oriented": image.oriented, "broken": image.broken}
    row |= {"disputed": image.disputed, "shapes": pixels.shape, "has_mask": mask is not None}
    row["moved"] = moved
    pixels = placement.place(pixels, fill=pixels.min())
    row["mean"], row["std"], row["constant"] = z_score(pixels)
    row["sums"] = zlib.crc32(pixels), zlib.crc32(labels)
    return pixels, mask, row


# ---- the cache: <cache>/<study>-<digest of its path>-<digest of its contents>/ ----


def _cache_root(cache: str) -> Path:
    """The folder of the caches of all studies: `cache`, or the user's own."""
    if cache:
        return Path(cache)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vqvae2-slices")
    except RuntimeError as error:  # as in a container whose user has no name
        raise UserError("no home folder to keep decoded slices in. Fix: --cache DIR.") from error


def _cache_folder(study: Path, jobs: list[Job], config: DataConfig) -> Path:
    """Where the decoded slices of `jobs` are kept: its name changes with all that they depend on.

    A file counts as changed when its size or time has changed; none is opened to find that out.
    """
    files = [(job.split, job.file[0], job.file[2:], job.mask and job.mask[2:]) for job in jobs]
    place = str(study.resolve()), config.height, config.width, config.fit
    contents = CACHE_VERSION, files
    digests = [hashlib.sha256(repr(key).encode()).hexdigest()[:12] for key in (place, contents)]
    return _cache_root(config.cache) / "-".join([study.resolve().name, *digests])


def _fill_cache(folder: Path, study: Path, jobs: list[Job], config: DataConfig, bad: dict) -> None:
    """Decode all slices and masks into `folder`; UserError at the end if any file is bad.

    Several runs may do so at once: each decodes into a folder of its own, and the first to be done
    gives its folder the name.
    """
    started = time.perf_counter()
    try:
        # Decoded slices are as private as the patients' files: only their owner may read them.
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".decoding-", dir=folder.parent) as work:
            part = Path(work, folder.name)
            part.mkdir(mode=0o700)
            _write_cache(part, study, jobs, config, bad)
            # Decoded before files of the study changed.
            for old in folder.parent.glob(f"{glob.escape(folder.name[:-12])}*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
            part.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another run was quicker, and its slices are the same
            size = len(jobs) * config.height * config.width * 5 / 1e9
            why = f"{folder}: cannot write the decoded slices ({error.strerror or error})"
            fix = f"Fix: --cache DIR, a folder that you may write to with {size:.2f} GB free"
            raise OSError(f"{why}. {fix}.") from error
    seconds = time.perf_counter() - started
    print(f"decoded slices: {len(jobs)} into the cache {folder} in {seconds:.1f} s")


def _write_cache(
    folder: Path, study: Path, jobs: list[Job], config: DataConfig, bad: dict[str, str]
) -> None:
    """Decode all slices and masks into `folder`; UserError at the end if any file is bad."""
    rows, total = [], len(jobs) + len(bad)
    size, any_masks = (config.height, config.width), any(job.mask for job in jobs)
    # The place of each label in their order of appearance, and how many there are after a split.
    labels, after = {0: 0}, {}
    work = in_parallel(partial(_decode, size=size, fit=config.fit), jobs, "decoding", "slice")
    # Arrays go into plain files: written through a memory map, a full disk ends the process with
    # a SIGBUS and without a message.
    with open(folder / PIXELS, "wb") as pixels_file, open(folder / MASKS, "wb") as masks_file:
        _begin_array(pixels_file, "<f4", (len(jobs), *size))
        _begin_array(masks_file, "|u1", (len(jobs) * any_masks, *size))
        for job, decoded in zip(jobs, work, strict=True):
            if isinstance(decoded, str):
                bad[job.file.path] = decoded
                continue
            pixels, mask, row = decoded
            rows.append(row)
            pixels_file.write(pixels.astype("<f4", copy=False).data)
            if any_masks and len(labels) <= NO_MASK:
                masks_file.write(_to_numbers(mask, labels, size).data)
                after[job.split] = len(labels)
                if len(labels) > NO_MASK:
                    bad[job.mask.path] = f"more than {NO_MASK} different labels; is it an image?"
    if bad:
        raise_bad(study, bad, total)
    table = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    notes, fingerprints = _notes(jobs, table, config), _fingerprints(jobs, table, size)
    # A model learns what the masks of the train split show, and that split was decoded first.
    trained = after.get("train", 1)
    known, others = list(labels)[:trained], list(labels)[trained:]
    if any_masks:
        notes = _notes_on_labels(known, others, table["has_mask"]) + notes
    classes = np.full(NO_MASK + 1, NO_MASK, np.uint8)  # of each number, see `_to_numbers`
    classes[: len(known)] = np.searchsorted(sorted(known), known)
    organs = len(known) > 1
    table["has_mask"] &= organs
    np.savez(folder / TABLE, labels=sorted(known) if organs else [], classes=classes, **table)
    where = {"study": str(study.resolve()), "fingerprints": fingerprints, "notes": notes}
    write_json(folder / INDEX, where)


def _begin_array(file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> None:
    """Write how a .npy file begins; its data follow."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)


def _to_numbers(
    mask: tuple[np.ndarray, np.ndarray] | None, labels: dict[int, int], size: tuple[int, int]
) -> np.ndarray:
    """A mask as uint8: of each label its number in `labels`, to which new ones are appended."""
    if mask is None:
        return np.full(size, NO_MASK, np.uint8)
    values, inverse = mask
    numbers = [labels.setdefault(value, len(labels)) for value in values.tolist()]
    return np.array(numbers).astype(np.uint8)[inverse].reshape(size)


def _fingerprints(jobs: list[Job], table: dict, size: tuple[int, int]) -> dict[str, str]:
    """Of each split a digest of its slices' names, pixels and masks, wherever they lie."""
    digests = {}
    for split in SPLITS:
        chosen = np.array([job.split == split for job in jobs])
        names = [tuple(job.file.name) for job in jobs if job.split == split]
        pixel_sums, mask_sums = table["sums"][chosen].T.tolist()
        content = ((len(names), *size), names, pixel_sums)
        if table["has_mask"][chosen].any():
            content += (mask_sums,)
        digests[split] = hashlib.sha256(repr(content).encode()).hexdigest()
    return digests


def _notes_on_labels(known: list[int], others: list[int], has_mask: np.ndarray) -> list[str]:
    """What is odd in a study's masks: `known` labels are the train split's, `others` are not."""
    if len(known) == 1:
        return ["no training mask shows an organ: the study counts as one without masks"]
    names = ", ".join(map(str, sorted(others)))
    unknown = f"no training mask shows the labels {names}: their pixels count as unknown"
    none = f"{(~has_mask).sum()} slices have no mask"
    return [unknown] * bool(others) + [none] * (not has_mask.all())


def _notes_on_copies(jobs: list[Job], table: dict[str, np.ndarray]) -> list[str]:
    """A warning where two splits hold the same picture: then one patient has two names."""
    first, copies = {}, []
    # The checksum alone agrees by chance in one of fifty studies of HipMRI's size.
    pictures = zip(table["sums"][:, 0], table["mean"], table["std"], strict=True)
    for job, picture, constant in zip(jobs, pictures, table["constant"], strict=True):
        original = first.setdefault(picture, job)
        if original.split != job.split and not constant:
            copies.append((job.file.path, original.file.path))
    if not copies:
        return []
    pair = ", which is ".join(copies[0])
    also = f"{len(copies)} slices are also in another split, such as {pair}"
    question = "Is it one patient under two names? Scores will flatter the model."
    return [f"warning: {also}. {question}"]


def _notes(jobs: list[Job], table: dict[str, np.ndarray], config: DataConfig) -> list[str]:
    """What is odd in a study's slices, in a line for each kind."""
    notes, size = _notes_on_copies(jobs, table), (config.height, config.width)
    runs = Counter(nifti.directions(table["affines"][table["oriented"]]))
    if len(runs) > 1:
        listing = ", ".join(f"{count} {letters}" for letters, count in runs.most_common())
        notes.append(f"warning: rows and columns of slices run in different directions: {listing}")
    none = "slices have an unusable affine in their header (only the voxel sizes were used)"
    two = f"slices have {nifti.DISPUTED} (the sform was taken)"
    odd = {none: table["broken"], two: table["disputed"]}
    odd["slices have one value only (kept, std 1)"] = table["constant"]
    if table["moved"].any():
        far = f"the affines of {table['moved'].sum()} masks put them elsewhere than their slices"
        first = jobs[table["moved"].argmax()].mask.path
        notes.append(f"warning: {far} (taken as they are stored), such as {first}")
    for shape in sorted(set(map(tuple, table["shapes"].tolist())) - {size}):
        share = np.prod(Placement.make(shape, size, config.fit).scaled) / np.prod(size)
        what = f"slices of {shape[0]}x{shape[1]} fill {share:.0%} of the model's grid"
        odd[f"{what} (--fit {config.fit})"] = (table["shapes"] == shape).all(axis=1)
    for what, hit in odd.items():
        if hit.any():
            notes.append(f"{hit.sum()} {what}, such as {jobs[hit.argmax()].file.path}")
    return notes


# ---- datasets ----


@dataclass(frozen=True)
class Mirror:
    """How slices of a study are mirrored left to right, and their masks with them.

    A mirrored left kidney looks like a right one. So two labels that lie on opposite sides are
    exchanged in the mask of a mirrored slice: else nobody could tell which of the two is meant.
    """

    axis: int | None = -2  # of (..., H, W), the left-right one; None: nothing is mirrored
    partners: tuple[tuple[int, int], ...] = ()  # pairs of classes on opposite sides
    note: str = ""  # what came of it, for the user; "" where there is nothing to say

    @classmethod
    def of(cls, train: "SliceDataset") -> "Mirror":
        """Find out from the affines and masks of a training split.

        A slice whose affine tells no directions counts as HipMRI's do: rows run left-right. Two
        classes are partners if each lies, mirrored, where the other one does, more than where any
        other class or itself does. Where the places of such a pair overlap by less than a half
        (Dice of their maps), they may be a pair or not, and nothing is mirrored.
        """
        runs, untold = set(nifti.directions(train.affines[train.oriented])), ""
        if not runs:
            runs, untold = {"RS"}, "no affine tells left and right: rows count as left-right"
        axes = {next((i - 2 for i in (0, 1) if letters[i] in "RL"), None) for letters in runs}
        axis = axes.pop() if len(axes) == 1 else None
        if axis is None:
            return cls(None, (), "slices are not mirrored: they do not all show left and right")
        if len(train.labels) < 3:  # one organ has no partner
            return cls(axis, (), untold)
        overlap = mirrored_overlap(train, axis)
        nearest = overlap.argmax(1)
        pairs = [(a, int(b)) for a, b in enumerate(nearest) if a < b and nearest[b] == a]
        names = ", ".join(f"{train.labels[a + 1]} and {train.labels[b + 1]}" for a, b in pairs)
        if any(overlap[pair] < 0.5 for pair in pairs):
            note = f"slices are not mirrored: it is unclear whether labels {names} are a left and"
            return cls(None, (), f"{note} a right organ")
        note = f"labels {names} lie on opposite sides: mirrored slices exchange them"
        partners = tuple((a + 1, b + 1) for a, b in pairs)
        return cls(axis, partners, note if pairs else untold)

    def images(self, x: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """Slices x (B, ..., H, W), those mirrored where `mirrored` (B,) is True."""
        if self.axis is None:
            return x
        return torch.where(mirrored.view(-1, *[1] * (x.ndim - 1)), x.flip(self.axis), x)

    def masks(self, masks: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """Their masks (B, ..., H, W) of classes: mirrored too, with partners exchanged."""
        exchanged = masks
        for a, b in self.partners:
            exchanged = torch.where(masks == a, b, torch.where(masks == b, a, exchanged))
        where = mirrored.view(-1, *[1] * (masks.ndim - 1))
        return self.images(torch.where(where, exchanged, masks), mirrored)


def mirrored_overlap(train: "SliceDataset", axis: int) -> np.ndarray:
    """How much each organ, mirrored, lies in the place of each: (O, O), Dice of their mean maps.

    Over a thousand or so training slices, evenly spread; O is the number of classes but background.
    """
    masked = np.flatnonzero(train.has_mask)
    chosen = masked[:: max(1, len(masked) // 1000)]
    places = np.zeros((len(train.labels) - 1, *train.pixels.shape[1:]))
    for indices in runtime.batches(chosen):
        masks = train.masks(indices).numpy()
        for organ, place in enumerate(places, start=1):
            place += (masks == organ).sum(0)
    turned = np.flip(places, axis)
    shared = np.array([[np.minimum(a, b).sum() for b in places] for a in turned])
    sizes = places.sum((1, 2))
    return 2 * shared / np.maximum(sizes[:, None] + sizes, 1)


def relative_positions(names: Sequence[SliceName]) -> np.ndarray:
    """(N,) float32: 0 for the first slice of its volume, 1 for the last; NaN for an only one."""
    numbers: dict[tuple[int, int], list[int]] = {}
    for name in names:
        numbers.setdefault(name[:2], []).append(name.slice)  # a volume is a patient and a week
    ends = {volume: (min(slices), max(slices)) for volume, slices in numbers.items()}
    first, last = np.array([ends[name[:2]] for name in names], np.float64).T
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return (([name.slice for name in names] - first) / (last - first)).astype(np.float32)


class SliceDataset(torch.utils.data.Dataset):
    """One split of a study, read from the cache; every slice has mean 0 and standard deviation 1.

    Attributes:
        paths, names: of the N source files, in order of patient, week and slice.
        pixels: (N, height, width) float32 memory map, scanner units, in the grid of `config`.
        mean, std: (N,) float32, scanner units; std (of the population) is 1 for a constant slice.
        patients: (N,) int, the numbers in their names.
        positions: (N,) float32, in its volume, 0 (first) to 1 (last); NaN for an only slice.
        affines, shapes: (N, 4, 4) float64 and (N, 2) int, of the source files.
        oriented: (N,) bool, whether the affine gives directions; else it holds voxel sizes alone.
        labels: the values in the train split's masks, sorted, with 0; () if these show no organ.
        has_mask: (N,) bool.
        fingerprint: hex digest of names, pixels and masks: a copy of a study has the same.
        synthetic: the study holds a file named SYNTHETIC.txt.
    """

    def __init__(
        self, study: Path, split: str, jobs: list[Job], cache: Path, config: DataConfig
    ) -> None:
        self._made_of = (study, split, jobs, cache, config)
        self.study, self.split, self.config = study, split, config
        own = np.flatnonzero([job.split == split for job in jobs])
        rows = slice(own[0], own[-1] + 1)
        files = [job.file for job in jobs[rows]]
        self.paths, self.names = [Path(file.path) for file in files], [file.name for file in files]
        self.synthetic = (study / "SYNTHETIC.txt").is_file()
        self.patients = np.array([name.patient for name in self.names])
        self.positions = relative_positions(self.names)
        self.pixels = np.load(cache / PIXELS, mmap_mode="r")[rows]
        with np.load(cache / TABLE) as table:
            self.mean, self.std = table["mean"][rows], table["std"][rows]
            self.affines, self.shapes = table["affines"][rows], table["shapes"][rows]
            self.oriented = table["oriented"][rows]
            self.has_mask = table["has_mask"][rows]
            self.labels, self._classes = tuple(table["labels"].tolist()), table["classes"]
        self._mask_indices = np.load(cache / MASKS, mmap_mode="r")[rows] if self.labels else None
        self.fingerprint = json.loads((cache / INDEX).read_text())["fingerprints"][split]

    def __reduce__(self):
        """A pickled memory map would carry its pixels; a worker process opens the file instead."""
        return type(self), self._made_of

    def __len__(self) -> int:
        return len(self.paths)

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """A whole batch at once: (B, 1, height, width) float32, z-scored."""
        indices = np.asarray(indices)
        batch = np.asarray(self.pixels)[indices]  # (B, height, width), a copy
        batch -= self.mean[indices, None, None]
        batch /= self.std[indices, None, None]
        return torch.from_numpy(batch).unsqueeze(1)

    def masks(self, indices: Sequence[int]) -> torch.Tensor:
        """(B, height, width) uint8, the class of each pixel: the place of its label in `labels`.

        255 where a slice has no mask, and where the train split's masks never show the label.
        """
        if not self.labels:
            raise UserError(f"{self.study}: a study without masks")
        return torch.from_numpy(self._classes[np.asarray(self._mask_indices)[np.asarray(indices)]])

    @cached_property
    def mirror(self) -> Mirror:
        """How these slices are mirrored; ask the train split."""
        return Mirror.of(self)

    def placement(self, index: int) -> Placement:
        """How the source slice `index` lies in the grid."""
        rows, columns = self.shapes[index].tolist()
        return Placement.make((rows, columns), self.pixels.shape[1:], self.config.fit)

    def letters(self, indices: Sequence[int]) -> list[str]:
        """Where rows and columns run, see `nifti.directions`; "" for a file that does not tell."""
        told = zip(nifti.directions(self.affines[indices]), self.oriented[indices], strict=True)
        return [letters * bool(oriented) for letters, oriented in told]

    def __getitem__(self, index: int) -> dict:
        """One slice: "image" (1, height, width) float32 z-scored, and what leads to its file."""
        index = range(len(self))[index]
        mean, std = float(self.mean[index]), float(self.std[index])
        source = {"affine": self.affines[index], "index": index, "path": str(self.paths[index])}
        return {"image": self.images([index])[0], "mean": mean, "std": std, **source}


def open_study(config: DataConfig) -> dict[str, SliceDataset]:
    """The three splits of a study, decoded into the cache if they are not there yet.

    Prints what is odd in the study. FileNotFoundError for no study or split; UserError for files
    that cannot be used (all listed at once), or patients shared between splits.
    """
    study = find_study(config.data)
    if study is None:
        none = f"{Path.cwd()}: neither {'/ nor '.join(STUDY_NAMES)}/ is here"
        fix = "Fix: --data DIR, or `python driver.py`, which makes a synthetic study"
        raise FileNotFoundError(f"{none}. {fix}.")
    bad: dict[str, str] = {}
    jobs = _scan_study(study, config.name_pattern, bad)
    _check_patients(study, jobs, config.allow_patient_overlap)
    if not (config.height and config.width):  # a file of every volume is read to tell
        height, width = grid_of(jobs)
        config = replace(config, height=config.height or height, width=config.width or width)
    cache = _cache_folder(study, jobs, config)
    if bad or not cache.is_dir():
        _fill_cache(cache, study, jobs, config, bad)
    else:
        print(f"decoded slices: from the cache {cache}")
    try:
        splits = {split: SliceDataset(study, split, jobs, cache, config) for split in SPLITS}
    except runtime.NOT_WHOLE as error:
        why = f"{cache}: cannot read the decoded slices ({getattr(error, 'strerror', '') or error})"
        raise UserError(f"{why}. Fix: delete this folder, or another --cache.") from error
    for split, slices in splits.items():
        patients = len(np.unique(slices.patients))
        print(f"{study}: {split:<8} {len(slices):>6} slices of {patients} patients")
    print(f"{study}: the model's grid is {config.height}x{config.width}")
    if labels := splits["train"].labels:
        print(f"{study}: masks with the labels {', '.join(map(str, labels))}")
    for note in json.loads((cache / INDEX).read_text())["notes"]:
        print(note)
    if splits["train"].synthetic:
        print(f"{study}: SYNTHETIC, a phantom drawn by a program and not MRI")
    return splits


# ---- what a checkpoint says of its study ----


@dataclass(frozen=True)
class StudyInfo:
    """What a checkpoint keeps of the study that it was trained on, as a dictionary under "data"."""

    study: str  # the name of its folder, not where it lies: checkpoints are shared
    height: int
    width: int
    fingerprints: dict[str, str]  # of each split, see `SliceDataset`
    synthetic: bool = False
    allow_patient_overlap: bool = False
    labels: tuple[int, ...] = ()  # in the masks; () for a study without masks
    fit: str = "auto"
    name_pattern: str = ""
    # Where rows and columns of most slices run, by their affines: "RS" is to the patient's right
    # and head, in coronal slices. Both are "" where no affine tells it.
    directions: str = ""
    plane: str = ""

    def __post_init__(self) -> None:
        # Raises for what these may not be.
        DataConfig(height=self.height, width=self.width, fit=self.fit)

    @classmethod
    def from_splits(cls, splits: dict[str, SliceDataset]) -> "StudyInfo":
        train = splits["train"]
        runs = Counter(nifti.directions(train.affines[train.oriented]))
        directions = max(runs, key=runs.get, default="")
        return cls(
            study=train.study.resolve().name,
            fingerprints={name: split.fingerprint for name, split in splits.items()},
            synthetic=train.synthetic,
            labels=train.labels,
            directions=directions,
            plane=nifti.plane_of(directions),
            **{name: getattr(train.config, name) for name in CHECKPOINT_FIELDS},
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, path: Path | str) -> "StudyInfo":
        """The record in a checkpoint; UserError, which names `path`, where it is not one."""
        with runtime.reading(path):
            data = dict(checkpoint["data"])
            return runtime.fill(cls, data | {"labels": tuple(data.get("labels", ()))})


def find_trained_study(trained: StudyInfo, checkpoint: str, cache: str = "") -> str:
    """The study that `checkpoint` was trained on: one in the cache, or a folder of its name here.

    A checkpoint keeps no path, as it is shared: the cache remembers where its studies lie. One with
    the slices of the training is taken first, whatever lies here. FileNotFoundError where there is
    none.
    """
    name = trained.study
    digest = "?" * 12  # two of them, or the cache of a study whose name goes on would be taken too
    caches = _cache_root(cache).glob(f"{glob.escape(Path(name).name)}-{digest}-{digest}/{INDEX}")
    studies = []
    for path in caches:
        with suppress(*runtime.NOT_WHOLE):  # or another user's
            studies.append(json.loads(path.read_text()))
    ours = [study for study in studies if study.get("fingerprints") == trained.fingerprints]
    for found in (*ours, {"study": name}, *studies):
        if Path(found["study"]).is_dir():
            return found["study"]
    gone = f"{name}: the study that {checkpoint} was trained on is not there"
    raise FileNotFoundError(f"{gone}. Fix: --data DIR.")


def open_trained_study(
    trained: StudyInfo, config: DataConfig, checkpoint: str
) -> dict[str, SliceDataset]:
    """The study of `config`, else the one a checkpoint was trained on; fitted as for the training.

    `trained` is the record of the checkpoint at the path `checkpoint`. A line says where some of
    the slices are not those of its study, another where they run in other directions.
    """
    settings = {name: getattr(config, name) or getattr(trained, name) for name in CHECKPOINT_FIELDS}
    settings |= {name: getattr(trained, name) for name in SIZE}
    settings["data"] = config.data or find_trained_study(trained, checkpoint, config.cache)
    splits = open_study(replace(config, **settings))
    here = StudyInfo.from_splits(splits)
    ours, learnt = here.fingerprints, trained.fingerprints
    if other := [name for name in learnt if ours[name] != learnt[name]]:
        what = f"its {' and '.join(other)} slices are not those that {checkpoint} was trained with"
        print(f"note: {splits['train'].study}: {what}")
    if here.directions and trained.directions and here.directions != trained.directions:
        what = f"its slices are {here.plane} (towards {here.directions})"
        theirs = f"{checkpoint} learnt {trained.plane} ones (towards {trained.directions})"
        print(f"warning: {splits['train'].study}: {what}; {theirs}")
    return splits


def check_labels(train: SliceDataset, trained: StudyInfo, checkpoint: str) -> None:
    """UserError where a study's masks have other labels than those that `checkpoint` learnt."""
    if trained.labels and train.labels and train.labels != trained.labels:
        ours, theirs = (", ".join(map(str, labels)) for labels in (train.labels, trained.labels))
        raise UserError(
            f"{train.study}: masks with the labels {ours}; {checkpoint} learnt {theirs}. Fix: "
            "--data with the same labels, or without masks."
        )


def restore(dataset: SliceDataset, index: int, image: np.ndarray) -> np.ndarray:
    """A z-scored (height, width) image as slice `index` is in its file: (rows, columns) float32."""
    pixels = np.asarray(image, np.float64) * dataset.std[index] + dataset.mean[index]
    return dataset.placement(index).restore(pixels.astype(np.float32))


def is_reconstruction(path: Path) -> bool:
    """Whether a file is a reconstruction of ours, or a mask that was decoded with one."""
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image:
                return image.info.get("Description") == RECONSTRUCTION
        return nifti.read_header(path)["descrip"].item() == RECONSTRUCTION.encode()
    except Exception:  # what cannot be read, for any of a dozen reasons, is none of ours
        return False


def save_reconstruction(dataset: SliceDataset, index: int, pixels: np.ndarray, path: Path) -> None:
    """Write what `restore` gives as NIfTI, with the affine of slice `index`."""
    oriented = bool(dataset.oriented[index])
    nifti.write(path, pixels, dataset.affines[index], RECONSTRUCTION, oriented=oriented)
