"""The public HipMRI release, 3-D volumes, cut into a study of 2-D slices: `python dataset.py slice`."""

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel
import numpy as np

from dataset import (
    SPLITS,
    STUDY_NAMES,
    SliceName,
    SourceFile,
    finite,
    raise_bad,
    read_nifti,
    scan,
)
from runtime import in_parallel, option, writable_folder, write_json, write_nifti

# The patients of HipMRI in each split of the course's.
COURSE = {"train": {*range(4, 34), 35}, "validate": {*range(36, 40)}, "test": {*range(40, 43)}}


@dataclass(frozen=True)
class SliceConfig:
    """Which planes of which volumes. Which 60 planes the course took is not published."""

    volumes: str = option("", "the release: has semantic_MRs*/, semantic_labels*/")
    out: str = option(STUDY_NAMES[0], "study folder to make, or to complete")
    axis: int = option(-1, "to slice along; -1: the affine's coronal", choices=(-1, 0, 1, 2))
    first: int = option(-1, "first plane; -1 centres the range")
    count: int = option(60, "planes of each volume")
    seed: int = option(0, "of the split, where the course's is not known")

    def __post_init__(self) -> None:
        if not self.volumes:
            raise ValueError("--volumes: name the folder of the public release.")
        if self.count < 1 or self.first < -1:
            raise ValueError(f"--first {self.first} --count {self.count}: expected first >= 0, count >= 1.")


def _find_volumes(folder: Path, bad: dict[str, str]) -> tuple[list[SourceFile], dict[SliceName, str]]:
    """The MR volumes of the release, and the paths of their masks by patient and week."""
    found: dict[str, list[SourceFile]] = {"semantic_mrs": [], "semantic_labels": []}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        for kind in found:
            found[kind] += scan(entry, bad) if entry.is_dir() and entry.name.lower().startswith(kind) else []
    if not found["semantic_mrs"]:
        raise FileNotFoundError(
            f"{folder}: no MR volumes, such as semantic_MRs_anon/Case_004_Week0_LFOV.nii.gz, in it. "
            "Mend: --volumes names the folder that holds semantic_MRs_anon/ or semantic_MRs/."
        )
    return found["semantic_mrs"], {mask.name: mask.path for mask in found["semantic_labels"]}


def split_patients(patients: set[int], seed: int) -> tuple[dict[int, str], str]:
    """The split of each patient, and a line on it: the course's if it knows all, else a seeded 80/10/10 %."""
    course = {patient: split for split, members in COURSE.items() for patient in members}
    if patients <= course.keys():
        return {patient: course[patient] for patient in patients}, "split by patient as in the course"
    if len(patients) < 3:
        raise ValueError(f"{len(patients)} patients; a split by patient needs at least 3.")
    order = np.random.default_rng(seed).permutation(sorted(patients)).tolist()
    held = max(1, round(0.1 * len(order)))
    splits = ["validate"] * held + ["test"] * held + ["train"] * (len(order) - 2 * held)
    strangers = len(patients - course.keys())
    line = f"random split by patient, seed {seed}, as {strangers} patients are not among HipMRI's"
    return dict(zip(order, splits, strict=True)), line


def _check_settings(config: SliceConfig, split_of: dict[int, str]) -> None:
    """Refuse to complete a folder made of other planes, or with one of these patients in another split."""
    record = Path(config.out, "slices.json")
    now = {name: getattr(config, name) for name in ("axis", "first", "count")}
    now |= {f"patient {patient:03d}": split for patient, split in sorted(split_of.items())}
    cut = any(Path(config.out).glob("keras_slices_*/*"))  # else nothing is there to agree with
    try:
        before = json.loads(record.read_text()) if cut and record.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{record}: damaged. Mend: another --out, or delete {config.out}.") from error
    if changed := [
        f"{key}: {before[key]}, now {now[key]}" for key in now if before.get(key, now[key]) != now[key]
    ]:
        raise ValueError(f"{config.out}: {', '.join(changed[:5])}. Mend: the same flags, or another --out.")
    write_json(record, before | now)


def _planes(header: nibabel.Nifti1Header, axis: int) -> tuple[int, ...]:
    """The volume's axes for row, column and slicing: by the affine left-right, head-foot, front-back."""
    if axis >= 0:
        return (*(other for other in range(3) if other != axis), axis)
    named = header["sform_code"] > 0 or header["qform_code"] > 0
    affine = header.get_best_affine()
    codes = nibabel.aff2axcodes(affine, ("RR", "AA", "SS")) if named else ()  # either direction
    if set(codes) != set("RAS"):
        raise ValueError("no orientation in its header. Mend: --axis (1 for a 256x256x128 volume of HipMRI)")
    return tuple(map(codes.index, "RSA"))


def _read_volume(path: str, mask: str | None, config: SliceConfig) -> tuple[list[np.ndarray], np.ndarray]:
    """The chosen planes (row, column, count), float32 and of the mask uint8, and the affine of the first."""
    pixels, header = read_nifti(path)
    if pixels.ndim < 3 or pixels.size != np.prod(pixels.shape[:3]):
        raise ValueError(f"an array of shape {pixels.shape}; expected a 3-D volume")
    pixels = pixels.reshape(pixels.shape[:3])
    axes = _planes(header, config.axis)
    depth = pixels.shape[axes[2]]
    first = config.first if config.first >= 0 else (depth - config.count) // 2
    if first < 0 or first + config.count > depth:
        raise ValueError(f"{depth} planes along axis {axes[2]}. Mend: --first and --count within them")
    chosen = slice(first, first + config.count)
    planes = [finite(pixels.transpose(axes)[..., chosen])]
    if mask:
        labels, _ = read_nifti(mask)
        if labels.size != pixels.size or labels.shape[:3] != pixels.shape:
            raise ValueError(f"its mask {mask} has shape {labels.shape}; expected {pixels.shape}")
        labels = finite(labels.reshape(pixels.shape).transpose(axes)[..., chosen])
        if labels.min() < 0 or labels.max() > 255 or (labels % 1).any():
            raise ValueError(f"its mask {mask} holds other values than whole numbers from 0 to 255")
        planes.append(labels.astype(np.uint8))
    affine = header.get_best_affine()
    affine[:3, 3] += first * affine[:3, axes[2]]
    affine[:3, :3] = affine[:3, axes]
    return planes, affine


def _slice_volume(job: tuple[SourceFile, str | None, str], config: SliceConfig) -> int | str:
    """Write the slices of one volume that are not there yet; returns how many, or why it cannot be used."""
    volume, mask, split = job
    stem = f"{volume.name.patient:03d}_week_{volume.name.week}_slice"
    kinds = [f"keras_slices_{split}/case", f"keras_slices_seg_{split}/seg"][: 2 if mask else 1]
    todo = [
        (kind, number, target)
        for kind, prefix in enumerate(kinds)
        for number in range(config.count)
        if not os.path.exists(target := f"{config.out}/{prefix}_{stem}_{number}.nii.gz")
    ]
    try:
        planes, affine = _read_volume(volume.path, mask, config) if todo else ([], None)
    except ValueError as error:
        return str(error)
    for kind, number, target in todo:
        here = affine.copy()
        here[:3, 3] += number * affine[:3, 2]  # column 2 is the step from one plane to the next
        write_nifti(target, planes[kind][..., number], here)
    return len(todo)


def slice_volumes(config: SliceConfig) -> None:
    """Cut the release's volumes into a study of 2-D slices and masks; files that are there already are kept.

    FileNotFoundError where there are no volumes. ValueError for an output folder of other settings; and, when
    all the rest is done, for volumes that cannot be used.
    """
    bad: dict[str, str] = {}
    volumes, masks = _find_volumes(Path(config.volumes), bad)
    split_of, line = split_patients({volume.name.patient for volume in volumes}, config.seed)
    writable_folder(config.out)
    _check_settings(config, split_of)
    jobs = [(volume, masks.get(volume.name), split_of[volume.name.patient]) for volume in volumes]
    print(f"{len(jobs)} volumes, {sum(mask is not None for _, mask, _ in jobs)} of them with a mask; {line}")
    written, total = 0, len(jobs) + len(bad)
    work = in_parallel(partial(_slice_volume, config=config), jobs, "slicing", "volume")
    for (volume, _, _), result in zip(jobs, work, strict=True):
        if isinstance(result, str):
            bad[volume.path] = result
        else:
            written += result
    counts = ", ".join(f"{sum(split == of for *_, of in jobs)} {split}" for split in SPLITS)
    print(f"{config.out}: {written} files written; {config.count} planes a volume; volumes: {counts}")
    if bad:
        raise_bad(config.volumes, bad, total)
