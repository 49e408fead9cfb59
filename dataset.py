"""NIfTI slices in, tensors out: reading, the cache of decoded slices, and slicing the public volumes.

A study is a folder of keras_slices_train/, keras_slices_validate/ and keras_slices_test/, and these hold 2-D
slices named case_004_week_0_slice_0.nii.gz. In your own code:

    splits = dataset.open_study(dataset.DataConfig(data="keras_slices_data"))
    loader = torch.utils.data.DataLoader(splits["train"], batch_size=16, shuffle=True)

The public HipMRI release is 3-D volumes; this makes a study of them, 60 central coronal planes of each and
their masks (which 60 the course took is not published):

    python dataset.py slice --volumes HipMRI_study_complete_release_v1 --out keras_slices_data
"""

import gzip
import hashlib
import io
import json
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from skimage.transform import resize

from runtime import atomic_path, from_flags, in_parallel, option, parser, run_cli, write_json, write_nifti

SPLITS = ("train", "validate", "test")
STUDY_NAMES = ("keras_slices_data", "HipMRI_study_keras_slices_data")  # looked for in the working directory
CACHE_VERSION = 3  # raised when what is cached changes meaning: older caches are then rebuilt
ARRAYS = ("pixels.npy", "masks.npy", "table.npz")  # of a cache, all splits one after another
NO_MASK = 255  # every pixel of a slice that has no mask; no class has this index
NAME = re.compile(r"(?:(?!week|slice)\D)*(\d+)(?:.*?week[_-]?(\d+))?(?:.*?slice[_-]?(\d+))?", re.IGNORECASE)


@dataclass(frozen=True)
class DataConfig:
    """Which study, and the size of the slices that the model sees."""

    data: str = option("", f"study folder; empty looks for {STUDY_NAMES[0]}/ here")
    height: int = option(256, "rows; slices of another size are resized")
    width: int = option(128, "columns; slices of another size are resized")
    allow_patient_overlap: bool = option(False, "let splits share a patient")
    cache: str = option("", "decoded slices; empty is ~/.cache/vqvae2-slices")

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 2:
            raise ValueError(f"--height {self.height} --width {self.width}: expected at least 2 of each.")


class SliceName(NamedTuple):
    patient: int
    week: int
    slice: int


class SourceFile(NamedTuple):
    name: SliceName
    path: str
    size: int
    mtime_ns: int


# ---- a study's files, none of them opened -----------------------------------------------------------------


def parse_name(path: Path | str) -> SliceName:
    """Patient, week and slice in a file name; a week or slice that is not named is 0.

    Reads case_004_week_0_slice_12.nii.gz and, of volumes, Case_004_Week0_LFOV.nii or B006_Week0_LFOV.nii.
    ValueError where no patient number comes first.
    """
    match = NAME.match(os.path.basename(path))
    if not match:
        raise ValueError("no patient number in the name; expected case_004_week_0_slice_0.nii.gz or the like")
    return SliceName(*(int(number or 0) for number in match.groups()))


def find_study(data: str = "") -> Path | None:
    """The study folder: `data`, else the first of `STUDY_NAMES` in the working directory, else None."""
    if data and not Path(data).is_dir():
        raise FileNotFoundError(f"{data}: no such study folder. Mend: check --data.")
    return next((path for path in map(Path, [data] if data else STUDY_NAMES) if path.is_dir()), None)


def scan(folder: Path | str, bad: dict[str, str]) -> list[SourceFile]:
    """The NIfTI files of `folder` in numerical order; the unusable go into `bad`, with the reason."""
    files: dict[SliceName, SourceFile] = {}
    with os.scandir(folder) as entries:  # one stat a file: 12,660 of them must not be felt at the start
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or not entry.name.endswith((".nii", ".nii.gz")):
                continue
            try:
                name, stat = parse_name(entry.name), entry.stat()
                if name in files:
                    raise ValueError(f"the same patient, week and slice as {files[name].path}")
            except (ValueError, OSError) as error:
                bad[entry.path] = str(error)
            else:
                files[name] = SourceFile(name, entry.path, stat.st_size, stat.st_mtime_ns)
    return [files[name] for name in sorted(files)]


def _scan_study(study: Path, bad: dict[str, str]) -> dict[str, list[SourceFile]]:
    """The files of each split; FileNotFoundError for a split that is missing or empty."""
    folders = {split: study / f"keras_slices_{split}" for split in SPLITS}
    files = {split: scan(folder, bad) if folder.is_dir() else [] for split, folder in folders.items()}
    missing = [f.name for split, f in folders.items() if not files[split] and not (f.is_dir() and bad)]
    if missing:
        raise FileNotFoundError(
            f"{study}: no {', '.join(missing)} with .nii or .nii.gz files. Mend: --data names the folder "
            "of all three splits; `python dataset.py slice` makes one of the public volumes."
        )
    return files


def _scan_masks(study: Path, files: dict[str, list[SourceFile]], bad: dict[str, str]) -> dict[str, list]:
    """The mask file of every slice of each split, or None where it has none."""
    masks = {}
    for split in SPLITS:
        folder = study / f"keras_slices_seg_{split}"
        found = {file.name: file for file in scan(folder, bad)} if folder.is_dir() else {}
        for name in found.keys() - {file.name for file in files[split]}:
            bad[found[name].path] = f"a mask without its slice in keras_slices_{split}"
        masks[split] = [found.get(file.name) for file in files[split]]
    return masks


def _check_patients(study: Path, files: dict[str, list[SourceFile]], allowed: bool) -> None:
    patients = {split: {file.name.patient for file in files[split]} for split in SPLITS}
    shared = [
        f"{', '.join(f'{number:03d}' for number in sorted(both))} in {one} and {other}"
        for one, other in combinations(SPLITS, 2)
        if (both := patients[one] & patients[other])
    ]
    if shared and not allowed:
        mend = "Mend: move them, or --allow-patient-overlap."
        raise ValueError(f"{study}: shared patients: {'; '.join(shared)}. {mend}")
    if shared:
        print(f"warning: shared patients: {'; '.join(shared)}. Scores will flatter the model.")


def raise_bad(where: Path | str, bad: dict[str, str], total: int) -> None:
    """One ValueError for all the files that cannot be used: the first ten and why, and the count."""
    listing = "".join(f"\n  {path}: {reason}" for path, reason in list(bad.items())[:10])
    listing += f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
    mend = "Mend: fetch or make these again, or move them elsewhere."
    raise ValueError(f"{where}: {len(bad)} of {total} files cannot be used:{listing}\n{mend}")


# ---- reading ----------------------------------------------------------------------------------------------


def read_nifti(path: str) -> tuple[np.ndarray, nibabel.Nifti1Header]:
    """The scaled array of a NIfTI-1 file, gzipped or not, and its header; ValueError says what is wrong."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        # One call, which releases the GIL, and no image: nibabel.load takes three times the time.
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        header = nibabel.Nifti1Header(data[: nibabel.Nifti1Header.template_dtype.itemsize])
        real = header.get_data_dtype().kind in "biuf"
        pixels = header.data_from_fileobj(io.BytesIO(data)) if real else None  # scaled by slope and intercept
    except Exception as error:  # nibabel and zlib have a dozen types for a broken file: they all mean this
        raise ValueError(f"not a whole NIfTI file ({type(error).__name__}: {error})") from error
    if pixels is None:
        kind = header.get_value_label("datatype")
        raise ValueError(f"pixels of type {kind}; expected one real number a pixel")
    return pixels, header


def finite(pixels: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, and an error here
        pixels = np.ascontiguousarray(pixels, np.float32)
    if broken := pixels.size - np.count_nonzero(np.isfinite(pixels)):
        raise ValueError(f"{broken} of {pixels.size} pixels are NaN or Inf")
    return pixels


def _resize(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`pixels` at another size: linear, smoothed first where it shrinks, as in the report."""
    return resize(pixels, shape, anti_aliasing=True, preserve_range=True).astype(np.float32)


def _read_slice(path: str) -> tuple[np.ndarray, nibabel.Nifti1Header, bool]:
    """The 2-D array of a file, its header, and whether it had more than two axes."""
    pixels, header = read_nifti(path)
    if pixels.ndim < 2 or min(pixels.shape[:2]) < 2 or pixels.size == 0:
        raise ValueError(f"an array of shape {pixels.shape}; expected a 2-D slice")
    return pixels[(..., *[0] * (pixels.ndim - 2))], header, pixels.ndim > 2


def _directions(header: nibabel.Nifti1Header) -> np.ndarray | None:
    """Unit vectors in the world, one column for each axis of the array; None where the header names none."""
    if not (header["sform_code"] > 0 or header["qform_code"] > 0):
        return None
    axes = header.get_best_affine()[:3, :3]
    return axes / np.linalg.norm(axes, axis=0)


def _read_mask(path: str, image: nibabel.Nifti1Header, shape: tuple[int, int]) -> np.ndarray:
    """The labels (rows, columns) int64 of a mask that lies on the slice with the header `image`."""
    labels, header, _ = _read_slice(path)
    if labels.shape != shape:
        raise ValueError(f"its shape is {labels.shape}; expected {shape}, as of its slice")
    labels = finite(labels)
    if (labels % 1).any():
        raise ValueError("its labels are not whole numbers")
    ours, theirs = _directions(image), _directions(header)
    if ours is not None and theirs is not None and ((ours * theirs).sum(axis=0)[:2] < 0.5).any():
        raise ValueError("its affine turns or mirrors it against its slice; expected the same directions")
    return labels.astype(np.int64)


def _decode(
    job: tuple[str, str | None], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None, dict] | str:
    """A slice at `size`, float32 in scanner units, its mask, int64 labels, and its row of the table.

    `job` is the paths of the slice and of its mask. A string says why a file cannot be used.
    """
    path, mask_path = job
    try:
        pixels, header, extra_axes = _read_slice(path)
        pixels = finite(pixels)
        mask = None
        if mask_path:
            try:
                mask = _read_mask(mask_path, header, pixels.shape)
            except ValueError as error:
                raise ValueError(f"its mask {mask_path}: {error}") from error
    except ValueError as error:
        return str(error)
    row = {"affines": header.get_best_affine(), "shapes": pixels.shape, "extra_axes": extra_axes}
    if mask is not None and pixels.shape != size:
        mask = resize(mask, size, order=0, anti_aliasing=False, preserve_range=True).astype(np.int64)
    if pixels.shape != size:
        pixels = _resize(pixels, size)
    mean, std = np.float32(pixels.mean(dtype=np.float64)), np.float32(pixels.std(dtype=np.float64))
    constant = bool(std == 0 or pixels.min() == pixels.max())
    row |= {"mean": mean, "std": np.float32(1) if constant else std, "constant": constant}
    row["crc32"] = zlib.crc32(pixels)
    row["has_mask"], row["mask_crc32"] = mask is not None, 0 if mask is None else zlib.crc32(mask)
    return pixels, mask, row


# ---- the cache: <cache>/<study>-<digest of path and size>/ holds ARRAYS and index.json --------------------


def _listing(files: list[SourceFile], masks: list[SourceFile | None], config: DataConfig) -> str:
    """A digest of what the cache of these files depends on, found without opening one."""
    listing = [file and (os.path.basename(file.path), file.size, file.mtime_ns) for file in [*files, *masks]]
    return hashlib.sha256(repr((CACHE_VERSION, config.height, config.width, listing)).encode()).hexdigest()


def _stamps(folder: Path) -> list[list[int]]:
    """Size and time of each array in a cache folder: those in its index must match for it to be trusted."""
    return [[stat.st_size, stat.st_mtime_ns] for stat in (os.stat(folder / name) for name in ARRAYS)]


def _cache_problem(folder: Path, listings: dict[str, str]) -> str:
    """Why the cache in `folder` cannot be used, or an empty string."""
    try:
        index = json.loads((folder / "index.json").read_text())
        if index["listings"] != listings:
            return "was made from other files or settings"
        np.load(folder / ARRAYS[2]).close()
        return "" if index["arrays"] == _stamps(folder) else "holds other arrays than were written"
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        return f"is not whole ({type(error).__name__})"


def _to_indices(mask: np.ndarray | None, indices: dict[int, int], size: tuple[int, int]) -> np.ndarray:
    """`mask` as uint8 indices of its labels; labels that `indices` does not have yet are appended to it."""
    if mask is None:
        return np.full(size, NO_MASK, np.uint8)
    values, positions = np.unique(mask, return_inverse=True)
    for value in values.tolist():
        indices.setdefault(value, len(indices))
    if len(indices) > NO_MASK:
        raise ValueError(f"more than {NO_MASK} different labels; is it an image?")
    return np.array([indices[value] for value in values.tolist()], np.uint8)[positions].reshape(size)


def _write_cache(folder: Path, key: dict, jobs: list[tuple], size: tuple[int, int], bad: dict) -> None:
    """Decode all slices, and their masks, into `folder`; ValueError at the end if any file is bad."""
    paths = [path for path, _ in jobs]
    rows, total, indices = (
        [],
        len(paths) + len(bad),
        {0: 0},
    )  # the index of each label, in order of appearance
    any_masks = any(mask for _, mask in jobs)
    # Arrays go into plain files: written through a memory map, a full disk is a SIGBUS and not an OSError.
    with open(folder / ARRAYS[0], "wb") as out, open(folder / ARRAYS[1], "wb") as masks_out:
        for file, dtype, count in ((out, "<f4", len(paths)), (masks_out, "|u1", len(paths) * any_masks)):
            header = {"descr": dtype, "fortran_order": False, "shape": (count, *size)}
            np.lib.format.write_array_header_2_0(file, header)
        work = in_parallel(partial(_decode, size=size), jobs, "decoding", "slice")
        for (path, mask_path), decoded in zip(jobs, work, strict=True):
            if isinstance(decoded, str):
                bad[path] = decoded
                continue
            pixels, mask, row = decoded
            out.write(pixels.astype("<f4", copy=False).data)
            rows.append(row)
            if any_masks and len(indices) <= NO_MASK:
                try:
                    masks_out.write(_to_indices(mask, indices, size).data)
                except ValueError as error:
                    bad[mask_path] = str(error)
        for file in (out, masks_out):
            file.flush()
            os.fsync(file.fileno())
    if bad:
        raise_bad(Path(next(iter(bad))).parents[1], bad, total)
    table = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    labels = list(indices) if any_masks else []
    np.savez(folder / ARRAYS[2], labels=np.array(labels, np.int64), **table)
    odd = {
        "slices have more than two axes (warning: [:, :, 0] was taken)": table["extra_axes"],
        f"slices of another size were resized to {size[0]}x{size[1]}": (table["shapes"] != size).any(axis=1),
        "slices have one value only (kept, std 1)": table["constant"],
        "slices have no mask": ~table["has_mask"] & any_masks,
    }
    notes = [f"{hit.sum()} {what}, such as {paths[hit.argmax()]}" for what, hit in odd.items() if hit.any()]
    index = {"listings": key, "arrays": _stamps(folder), "notes": notes}
    write_json(folder / "index.json", index)


def _ready_cache(study: Path, jobs: list[tuple], listings: dict, config: DataConfig, bad: dict) -> Path:
    """The folder of a cache that matches `listings`, made now where there is none; raises if any file is bad."""
    root = config.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vqvae2-slices")
    place = repr((str(study.resolve()), config.height, config.width))
    folder = Path(root, f"{study.resolve().name}-{hashlib.sha256(place.encode()).hexdigest()[:12]}")
    problem = "" if bad else _cache_problem(folder, listings)
    if not bad and not problem:
        print(f"decoded slices: from the cache {folder}")
        return folder
    if problem and folder.exists():
        print(f"cache {folder} {problem}: decoding again")
    start = time.perf_counter()
    try:
        with atomic_path(folder) as part:
            part.mkdir()
            _write_cache(part, listings, jobs, (config.height, config.width), bad)
    except OSError as error:
        if _cache_problem(folder, listings):  # else another run has just made the same one: use it
            size = len(jobs) * config.height * config.width * 5 / 1e9
            raise OSError(
                f"{folder}: cannot write the cache of decoded slices ({error.strerror or error}). "
                f"Mend: --cache DIR, a folder that you may write to with {size:.2f} GB free."
            ) from error
    print(f"decoded slices: {len(jobs)} into the cache {folder} in {time.perf_counter() - start:.1f} s")
    return folder


# ---- datasets ---------------------------------------------------------------------------------------------


def relative_positions(names: Sequence[SliceName]) -> np.ndarray:
    """(N,) float32: 0 for the first slice of its volume (patient and week), 1 for the last; NaN for an only one."""
    numbers: dict[tuple[int, int], list[int]] = {}
    for patient, week, number in names:
        numbers.setdefault((patient, week), []).append(number)
    ends = {volume: (min(of), max(of) - min(of)) for volume, of in numbers.items()}
    places = [(name.slice, *ends[name[:2]]) for name in names]
    return np.array([(n - low) / span if span else np.nan for n, low, span in places], np.float32)


class SliceDataset(torch.utils.data.Dataset):
    """One split of a study, z-scored per slice (population standard deviation), read from the cache.

    Attributes:
        paths, names: of the N source files, in order of patient, week and slice.
        pixels: (N, height, width) float32 memory map, scanner units after any resize.
        mean, std: (N,) float32, scanner units; std is 1 for a constant slice.
        positions: (N,) float32 in [0, 1], where in its volume a slice lies; NaN if it is the volume's only one.
        affines, shapes: (N, 4, 4) float64 and (N, 2) int, of the source planes.
        labels: the values in the masks of the whole study, sorted, 0 among them; () where it has no masks.
        has_mask: (N,) bool.
        fingerprint: hex digest of the slices' names, pixels and masks: a copy of a study has the same.
        synthetic: the study holds a file named SYNTHETIC.txt.
    """

    def __init__(self, study: Path, split: str, files: list[SourceFile], cache: Path, start: int) -> None:
        self._made_of = (study, split, files, cache, start)
        self.study, self.split = study, split
        self.paths, self.names = [Path(file.path) for file in files], [file.name for file in files]
        self.synthetic = (study / "SYNTHETIC.txt").is_file()
        self.positions = relative_positions(self.names)
        mine = slice(start, start + len(files))
        self.pixels = np.load(cache / ARRAYS[0], mmap_mode="r")[mine]
        with np.load(cache / ARRAYS[2]) as table:
            self.mean, self.std = table["mean"][mine], table["std"][mine]
            self.affines, self.shapes = table["affines"][mine], table["shapes"][mine]
            sums = table["crc32"][mine].tolist()
            self.has_mask, found = table["has_mask"][mine], table["labels"].tolist()
            mask_sums = [table["mask_crc32"][mine].tolist()] if self.has_mask.any() else []
        self.labels = tuple(sorted(found))
        self._mask_indices = np.load(cache / ARRAYS[1], mmap_mode="r")[mine] if found else None
        self._classes = np.full(256, NO_MASK, np.uint8)  # of an index in order of appearance
        self._classes[: len(found)] = [self.labels.index(label) for label in found]
        what = self.pixels.shape, [tuple(name) for name in self.names], sums, *mask_sums
        self.fingerprint = hashlib.sha256(repr(what).encode()).hexdigest()

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
        """(B, height, width) uint8: the place in `labels` of each pixel's label; 255 where a slice has no mask."""
        if not self.labels:
            raise ValueError(f"{self.study}: a study without masks")
        return torch.from_numpy(self._classes[np.asarray(self._mask_indices)[np.asarray(indices)]])

    def on(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """`images` for a training loop: of indices (B,) on the CPU, the batch on `device`.

        A GPU with room for it holds the whole split from now on, in half precision.
        """
        if device.type == "cpu":
            return self.images
        if 2 * self.pixels.size > torch.cuda.mem_get_info(device)[0] / 3:
            return lambda indices: self.images(indices).pin_memory().to(device, non_blocking=True)
        return self.resident(device)

    def resident(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """`on` for a device that holds the split: no batch crosses over, and none is waited for."""
        whole = torch.empty(len(self), 1, *self.pixels.shape[1:], dtype=torch.float16, device=device)
        for some in torch.arange(len(self)).split(256):
            whole[some[0] : some[-1] + 1] = self.images(some)
        return lambda indices: whole[indices.to(device, non_blocking=True)].float()

    def masks_on(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """`masks` for a training loop, as `on` is `images`: a GPU with room for them holds them all."""
        if device.type == "cpu":
            return self.masks
        if self.pixels.size > torch.cuda.mem_get_info(device)[0] / 3:
            return lambda indices: self.masks(indices).pin_memory().to(device, non_blocking=True)
        every = torch.empty(len(self), *self.pixels.shape[1:], dtype=torch.uint8, device=device)
        for indices in torch.arange(len(self)).split(256):
            every[indices[0] : indices[-1] + 1] = self.masks(indices)
        return lambda indices: every[indices.to(device, non_blocking=True)]

    def __getitem__(self, index: int) -> dict:
        """One slice, "image" (1, height, width) float32 z-scored, with what leads back to its source."""
        index = range(len(self))[index]
        mean, std = float(self.mean[index]), float(self.std[index])
        whence = {"affine": self.affines[index], "index": index, "path": str(self.paths[index])}
        return {"image": self.images([index])[0], "mean": mean, "std": std, **whence}


def open_study(config: DataConfig) -> dict[str, SliceDataset]:
    """The three splits of a study, decoded into the cache if they are not there yet; prints what it did.

    Raises:
        FileNotFoundError: no study, or a split missing or empty.
        ValueError: files that cannot be used (all listed at once), or patients shared between splits.
        OSError: the cache cannot be written.
    """
    study = find_study(config.data)
    if study is None:
        raise FileNotFoundError(
            f"{Path.cwd()}: neither {'/ nor '.join(STUDY_NAMES)}/ is here. "
            "Mend: --data DIR, or `python driver.py`, which makes a synthetic study."
        )
    bad: dict[str, str] = {}
    files = _scan_study(study, bad)
    _check_patients(study, files, config.allow_patient_overlap)
    masks = _scan_masks(study, files, bad)
    listings = {split: _listing(files[split], masks[split], config) for split in SPLITS}
    jobs = [
        (file.path, mask and mask.path)
        for split in SPLITS
        for file, mask in zip(files[split], masks[split], strict=True)
    ]
    cache = _ready_cache(study, jobs, listings, config, bad)
    splits, start = {}, 0
    for split, of in files.items():
        splits[split] = SliceDataset(study, split, of, cache, start)
        people = len({file.name.patient for file in of})
        print(f"{study}: {split:<8} {len(of):>6} slices of {people} patients")
        start += len(of)
    if labels := splits["train"].labels:
        print(f"{study}: masks with the labels {', '.join(map(str, labels))}")
    for note in json.loads((cache / "index.json").read_text())["notes"]:
        print(note)
    if splits["train"].synthetic:
        print(f"{study}: SYNTHETIC, a phantom drawn by a program and not MRI")
    return splits


def open_trained_study(trained: dict, config: DataConfig, checkpoint: str) -> dict[str, SliceDataset]:
    """The study of `config`, else the one a checkpoint was trained on, at the size it was trained at.

    `trained` is the "data" of the checkpoint at the path `checkpoint`. Raises as `open_study` does.
    """
    if not config.data and not Path(trained["study"]).is_dir():
        raise FileNotFoundError(
            f"{trained['study']}: the study that {checkpoint} was trained on is not there. Mend: --data DIR."
        )
    size = {side: trained[side] for side in ("height", "width")}
    return open_study(replace(config, data=config.data or trained["study"], **size))


def save_reconstruction(dataset: SliceDataset, index: int, image: np.ndarray, path: Path | str) -> None:
    """Write a z-scored (height, width) image as float32 NIfTI in scanner units on the plane of slice `index`.

    The z-score of that slice is undone, its size and affine restored. ValueError for another shape.
    """
    pixels = np.asarray(image, np.float64)
    if pixels.shape != dataset.pixels.shape[1:]:
        raise ValueError(f"an image of shape {pixels.shape}; expected {dataset.pixels.shape[1:]}")
    pixels = (pixels * dataset.std[index] + dataset.mean[index]).astype(np.float32)
    shape = tuple(map(int, dataset.shapes[index]))
    pixels = pixels if pixels.shape == shape else _resize(pixels, shape)
    write_nifti(path, pixels, dataset.affines[index], "VQ-VAE-2 reconstruction, not for clinical use")


def main() -> None:
    import volumes  # which imports this file: not at the top

    flags = parser(__doc__, volumes.SliceConfig)
    flags.add_argument("command", choices=["slice"], help="cut volumes into a study")
    volumes.slice_volumes(from_flags(volumes.SliceConfig, flags.parse_args()))


if __name__ == "__main__":
    run_cli(main)
