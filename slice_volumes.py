"""Cut 3-D volumes into a study of 2-D slices.

    python volumes.py --volumes HipMRI_study_complete_release_v1 --out keras_slices_data
    python volumes.py --volumes my_bids_folder --match '*_T2w*' --plane axial --out my_slices

All .nii and .nii.gz files in the folder and below are taken: subject and session are read from
their paths. Masks are files named so (..._seg, ..._mask, ..._label, ..._SEMANTIC), beside their
volumes or in folders such as semantic_labels_anon/ and labelsTr/; or all files under --masks DIR.

Planes are found by the affine, whatever the order of the array's axes, and all volumes are turned
the same way: rows run to the patient's right (sagittal planes: to the front), columns to the head
(axial: to the front), slice numbers to the front (axial: to the head; sagittal: to the right).
Every slice keeps its place in the world.
"""

import fnmatch
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset import SPLITS, STUDY_NAMES, find_nifti, parse_name, raise_bad, read_labels, way_in
from support import nifti
from support.runtime import (
    UserError,
    from_flags,
    in_parallel,
    option,
    parser,
    run_cli,
    writable_folder,
    write_json,
)

# The patients of HipMRI in each split of the course's.
COURSE = {"train": {*range(4, 34), 35}, "validate": {*range(36, 40)}, "test": {*range(40, 43)}}
MASK_NAME = re.compile(
    r"(?<![a-z])(?:seg|dseg|segmentation|masks?|labels?|labelmap|semantic|gt|roi)(?![a-z])",
    re.IGNORECASE,
)
MASK_FOLDER = re.compile(
    r"(?:semantic_labels.*|labels?|labels?t[rs]|masks?|segmentations?)", re.IGNORECASE
)
SUBJECT = re.compile(r"sub-([a-z0-9]+)", re.IGNORECASE)
SESSION = re.compile(r"ses-([a-z0-9]+)", re.IGNORECASE)
OBLIQUE = 5  # degrees from which it is said


@dataclass(frozen=True)
class SliceConfig:
    """Which planes of which volumes. Which 60 planes the course took is not published."""

    volumes: str = option("", "folder of the volumes, searched with all its folders")
    out: str = option(STUDY_NAMES[0], "study folder to make, or to complete")
    match: str = option("*", "only volumes with this name or path, such as '*_T2w*'")
    masks: str = option("", "folder of the masks; empty: masks are known by their names")
    plane: str = option("coronal", "plane to cut, by the affine", choices=tuple(nifti.PLANES))
    axis: int = option(
        -1, "axis of the array to slice along, for volumes without an affine", choices=(-1, 0, 1, 2)
    )
    first: int = option(-1, "first plane; -1 centres the range")
    count: int = option(60, "planes of each volume, or all where there are fewer; 0 is all")
    split: str = option(
        "auto",
        "hipmri is the course's; auto takes it for HipMRI alone",
        choices=("auto", "random", "hipmri"),
    )
    seed: int = option(0, "of the random split by patient, 80/10/10 percent")

    def __post_init__(self) -> None:
        if not self.volumes:
            raise UserError("--volumes: name the folder of the volumes")
        if self.count < 0 or self.first < -1:
            raise UserError(
                f"--first {self.first} --count {self.count}: expected first >= 0, count >= 0"
            )


class Volume(NamedTuple):
    """A volume to cut, and its mask if it has one. The study knows it by `patient` and `week`."""

    patient: int
    week: int
    path: str
    mask: str | None


# ---- which volumes, masks and splits
# ----------------------------------------------------------------------


def identify(path: str) -> tuple[str, str]:
    """The subject and session of a volume from its path in its folder; UserError where no subject
    is named.

    BIDS says both as sub-01 and ses-2, in words or numbers; other names are read as those of slices
    are.
    """
    subject, session = SUBJECT.findall(path), SESSION.findall(path)
    if subject:
        return _plain(subject[-1]), _plain(session[-1]) if session else "0"
    name = parse_name(path)
    return str(name.patient), str(name.week)


def _plain(label: str) -> str:
    return str(int(label)) if label.isdecimal() else label


def _numbers(labels: set[str]) -> dict[str, int]:
    """A number for each label: its own where all are numbers, else its place in their order, from
    1.
    """
    if all(label.isdecimal() for label in labels):
        return {label: int(label) for label in labels}
    return {label: place for place, label in enumerate(sorted(labels), 1)}


def is_mask(path: str) -> bool:
    """Whether a path, from the folder that is searched, is named as masks are."""
    *folders, name = Path(path).parts
    return bool(MASK_NAME.search(name)) or any(map(MASK_FOLDER.fullmatch, folders))


def _list(folder: Path, others: list[str]) -> list[tuple[str, str]]:
    """The path of every NIfTI file under `folder`, whole and from there."""
    return [
        (entry.path, os.path.relpath(entry.path, folder)) for entry in find_nifti(folder, others)
    ]


def find_volumes(config: SliceConfig) -> tuple[list[Volume], bool, dict[str, dict[str, int]]]:
    """The volumes with their masks, whether they are HipMRI's release, and the numbers of named
    subjects.

    Raises before anything is written: FileNotFoundError for no volumes; UserError for names that
        tell no subject,
    or two volumes of one subject and session.
    """
    folder, others = Path(config.volumes), []
    for flag, place in (("--volumes", config.volumes), ("--masks", config.masks)):
        if place and not Path(place).is_dir():
            raise FileNotFoundError(f"{place}: no such folder. Fix: check {flag}.")
    found = _list(folder, others)
    if config.masks:
        masks = _list(Path(config.masks), [])
        apart = {os.path.realpath(path) for path, _ in masks}
        images = [pair for pair in found if os.path.realpath(pair[0]) not in apart]
    else:
        masks = [pair for pair in found if is_mask(pair[1])]
        images = [pair for pair in found if not is_mask(pair[1])]
    wanted = [
        (path, short)
        for path, short in images
        if fnmatch.fnmatch(short, config.match)
        or fnmatch.fnmatch(os.path.basename(path), config.match)
    ]
    if not wanted:
        among = f" {len(images)} volumes do not match {config.match}." if images else way_in(others)
        raise FileNotFoundError(
            f"{folder}: no volumes, .nii or .nii.gz files such as Case_004_Week0_LFOV.nii.gz, in it.{among} "
            "Fix: check --volumes and --match."
        )
    by_key, unnamed = _group(wanted)
    masks_by_key, _ = _group(masks)
    folders = {short.split(os.sep)[0]: [path] for path, short in wanted if os.sep in short}
    if (
        len(folders) == len(wanted) > len(by_key)
    ):  # a folder for each, as scanners export them: P0001/t2_tse.nii.gz
        by_key, unnamed = {(name, "0"): paths for name, paths in folders.items()}, {}
        masks_by_key = {(short.split(os.sep)[0], "0"): [path] for path, short in masks}
        print(f"{folder}: subjects are told apart by their folders")
    if unnamed:
        raise_bad(config.volumes, unnamed, len(wanted))
    if double := [paths for paths in by_key.values() if len(paths) > 1]:
        listing = "".join(f"\n  {' and '.join(paths)}" for paths in double[:10])
        raise UserError(
            f"{folder}: {len(double)} subjects have two volumes in one session:{listing}\n"
            "Fix: choose one of each with --match, such as --match '*_T2w*', or rename sessions to ses-1 and ses-2."
        )
    if double := [paths for key, paths in masks_by_key.items() if key in by_key and len(paths) > 1]:
        raise UserError(
            f"{folder}: two masks of one volume, {' and '.join(double[0])}. "
            "Fix: --masks DIR, a folder of one mask for each volume."
        )
    named = {
        "subjects": _numbers({subject for subject, _ in by_key}),
        "sessions": _numbers({session for _, session in by_key}),
    }
    pairs = _pair(by_key, masks_by_key)
    if config.masks and not pairs:
        raise UserError(
            f"{config.masks}: no mask of the subjects in {folder}. Fix: check --masks, and the subjects in its names."
        )
    volumes = [
        Volume(named["subjects"][key[0]], named["sessions"][key[1]], paths[0], pairs.get(key))
        for key, paths in by_key.items()
    ]
    hipmri = any(Path(short).parts[0].lower().startswith("semantic_mrs") for _, short in wanted)
    return sorted(volumes), hipmri, named


def _pair(by_key: dict, masks_by_key: dict) -> dict[tuple[str, str], str]:
    """The mask of each volume: of its subject and session, or the only one of a subject with one
    volume.
    """
    pairs = {key: masks_by_key[key][0] for key in by_key if key in masks_by_key}
    volumes_of, masks_of = defaultdict(list), defaultdict(list)
    for keys, by_subject in ((by_key, volumes_of), (masks_by_key, masks_of)):
        for subject, session in keys:
            by_subject[subject].append((subject, session))
    for subject, keys in volumes_of.items():
        if len(keys) == len(masks_of[subject]) == 1:
            pairs[keys[0]] = masks_by_key[masks_of[subject][0]][0]
    return pairs


def _group(files: list[tuple[str, str]]) -> tuple[dict[tuple[str, str], list[str]], dict[str, str]]:
    """Paths by subject and session, and those whose names tell none."""
    groups, unnamed = defaultdict(list), {}
    for path, short in files:
        try:
            groups[identify(short)].append(path)
        except UserError:
            unnamed[path] = (
                "no subject in its path; expected sub-01/ or a number, such as Case_004_Week0.nii.gz"
            )
    return groups, unnamed


def split_patients(
    patients: set[int], seed: int, split: str = "random"
) -> tuple[dict[int, str], str]:
    """The split of each patient, and a line on it: the course's, or a seeded 80/10/10 %. None is
    empty.

    `split` is "hipmri" or "random", or "auto" for the course's where it knows all patients and
    fills all splits.
    """
    course = {patient: name for name, members in COURSE.items() for patient in members}
    chosen = {patient: course[patient] for patient in sorted(patients & course.keys())}
    fits = patients <= course.keys() and set(chosen.values()) == set(SPLITS)
    if split == "hipmri" and not fits:
        raise UserError(
            f"--split hipmri: {len(patients - course.keys())} of {len(patients)} patients are not HipMRI's, and it "
            f"would give {', '.join(f'{list(chosen.values()).count(name)} {name}' for name in SPLITS)}. "
            "Fix: --split random."
        )
    if split != "random" and fits:
        return chosen, "split by patient as in the course"
    if len(patients) < 3:
        raise UserError(f"{len(patients)} patients; a split by patient needs at least 3")
    order = np.random.default_rng(seed).permutation(sorted(patients)).tolist()
    held = max(1, round(0.1 * len(order)))
    splits = ["validate"] * held + ["test"] * held + ["train"] * (len(order) - 2 * held)
    return dict(zip(order, splits, strict=True)), f"random split by patient, seed {seed}"


def _check_settings(config: SliceConfig, split_of: dict[int, str], named: dict) -> None:
    """Refuse to complete a folder made of other planes, or with one of these patients in another
    split.
    """
    record = Path(config.out, "slices.json")
    now = {name: getattr(config, name) for name in ("plane", "axis", "first", "count", "match")}
    now |= {f"patient {patient:03d}": split for patient, split in sorted(split_of.items())}
    cut = any(Path(config.out).glob("keras_slices_*/*"))  # else nothing is there to agree with
    try:
        before = json.loads(record.read_text()) if cut and record.is_file() else {}
    except ValueError as error:
        raise UserError(
            f"{record}: damaged. Fix: another --out, or delete {config.out}."
        ) from error
    for kind, numbers in named.items():
        for label, number in numbers.items():
            if label != str(number):
                now[f"{kind[:-1]} {label}"] = number
    if changed := [
        f"{key}: {before[key]}, now {now[key]}"
        for key in now
        if before.get(key, now[key]) != now[key]
    ]:
        raise UserError(
            f"{config.out}: {', '.join(changed[:5])}. Fix: the same flags, or another --out."
        )
    write_json(record, before | now)


# ---- cutting
# ----------------------------------------------------------------------------------------------


def _turning(image: nifti.Image, config: SliceConfig) -> tuple[tuple, tuple]:
    """The axes for row, column and slice, and which are reversed; UserError where nothing tells
    them.
    """
    if config.axis >= 0:
        return (*(other for other in range(3) if other != config.axis), config.axis), (False,) * 3
    if not image.oriented:
        found = "an affine that is none" if image.broken else "no orientation"
        raise UserError(
            f"{found} in its header. Fix: --axis (1 for a 256x256x128 volume of HipMRI)"
        )
    return nifti.plane_axes(image.affine, config.plane)


def read_volume(path: str) -> tuple[nifti.Image, np.ndarray]:
    """A file and its raw array with three axes; UserError for another number of them."""
    image = nifti.read(path)
    if (
        len(image.shape) < 3
        or image.raw.size != np.prod(image.shape[:3])
        or min(image.shape[:3]) < 2
    ):
        raise UserError(f"an array of shape {image.shape}; expected a 3-D volume")
    return image, image.raw.reshape(image.shape[:3])


def _read_mask(
    path: str, volume: nifti.Image, shape: tuple
) -> tuple[nifti.Image, np.ndarray, bool]:
    """A mask with its axes along its volume's, and whether its affine puts it elsewhere by a voxel
    or more.
    """
    image, raw = read_volume(path)
    moved = False
    if image.oriented and volume.oriented:
        raw, affine = nifti.turn_to(image, raw, volume.affine)
        corners = np.array([[0, 0, 0, 1], [*(length - 1 for length in shape), 1]])
        apart = np.linalg.solve(volume.affine, (affine - volume.affine) @ corners.T)[:3]
        moved = bool(np.abs(apart).max() >= 1)
    if raw.shape != shape:
        raise UserError(f"its shape is {raw.shape}; expected {shape}")
    return image, raw, moved


def _slice_volume(job: tuple[Volume, str], config: SliceConfig) -> dict | str:
    """Write the slices of one volume that are not there yet; returns what to count, or why it
    cannot be used.
    """
    volume, split = job
    done = {"written": 0, "planes": 0, "oblique": 0.0, "moved": False}
    stem = f"{volume.patient:03d}_week_{volume.week}_slice"
    kinds = [f"keras_slices_{split}/case", f"keras_slices_seg_{split}/seg"][
        : 2 if volume.mask else 1
    ]
    targets = [
        [f"{config.out}/{kind}_{stem}_{n}.nii.gz" for n in range(config.count)] for kind in kinds
    ]
    if config.count and all(os.path.exists(target) for paths in targets for target in paths):
        return done | {"planes": config.count}
    try:
        image, raw = read_volume(volume.path)
        axes, reverse = _turning(image, config)
        depth = raw.shape[axes[2]]
        count = min(config.count or depth, depth)
        first = config.first if config.first >= 0 else (depth - count) // 2
        if first + count > depth:
            raise UserError(
                f"{depth} planes along the slices. Fix: --first and --count within them"
            )
        planes = [
            nifti.finite(image.values(nifti.turn(raw, axes, reverse)[..., first : first + count]))
        ]
        if volume.mask:
            try:
                mask, mask_raw, done["moved"] = _read_mask(volume.mask, image, raw.shape)
                labels = read_labels(
                    mask, nifti.turn(mask_raw, axes, reverse)[..., first : first + count]
                )
                planes.append(_narrow(labels))
            except UserError as error:
                raise UserError(f"its mask {volume.mask}: {error}") from error
    except (UserError, OSError) as error:
        return str(error)
    affine = nifti.turn_affine(image.affine, raw.shape, axes, reverse)
    done["planes"], done["oblique"] = (
        count,
        nifti.obliquity(image.affine) if image.oriented else 0.0,
    )
    for pixels, kind in zip(planes, kinds, strict=True):
        for number in range(count):
            target = f"{config.out}/{kind}_{stem}_{number}.nii.gz"
            if not os.path.exists(target):
                here = affine.copy()
                here[:3, 3] += (first + number) * affine[
                    :3, 2
                ]  # column 2 is the step between planes
                nifti.write(target, pixels[..., number], here, oriented=image.oriented)
                done["written"] += 1
    return done


def _narrow(labels: np.ndarray) -> np.ndarray:
    """`labels` in the smallest integers that hold them."""
    kinds = (np.uint8, np.int16, np.int32)
    fits = (
        kind
        for kind in kinds
        if np.iinfo(kind).min <= labels.min() and labels.max() <= np.iinfo(kind).max
    )
    return labels.astype(next(fits, np.int64))


def slice_volumes(config: SliceConfig) -> None:
    """Cut volumes into a study of 2-D slices and masks; files that are there already are kept.

    FileNotFoundError where there are no volumes. UserError for names that clash or an output folder
    of other settings, before anything is written; and, when all the rest is done, for volumes that
    cannot be used.
    """
    volumes, hipmri, named = find_volumes(config)
    split = "random" if config.split == "auto" and not hipmri else config.split
    split_of, line = split_patients({volume.patient for volume in volumes}, config.seed, split)
    writable_folder(config.out)
    _check_settings(config, split_of, named)
    jobs = [(volume, split_of[volume.patient]) for volume in volumes]
    masks = sum(volume.mask is not None for volume in volumes)
    print(f"{len(jobs)} volumes of {len(split_of)} patients, {masks} of them with a mask; {line}")
    bad, done = {}, []
    work = in_parallel(partial(_slice_volume, config=config), jobs, "slicing", "volume")
    for (volume, _), result in zip(jobs, work, strict=True):
        if isinstance(result, str):
            bad[volume.path] = result
        else:
            done.append(result)
    for note in _notes(config, done):
        print(note)
    counts = ", ".join(f"{sum(split == name for _, split in jobs)} {name}" for name in SPLITS)
    print(f"{config.out}: {sum(one['written'] for one in done)} files written; volumes: {counts}")
    if bad:
        raise_bad(config.volumes, bad, len(jobs))


def _notes(config: SliceConfig, done: list[dict]) -> list[str]:
    """What is said once of all volumes."""
    if not done:
        return []
    planes = sorted({one["planes"] for one in done})
    notes = [
        f"{planes[0]} planes a volume"
        if len(planes) == 1
        else f"{planes[0]} to {planes[-1]} planes a volume"
    ]
    if config.axis < 0:
        ends = {"R": "right", "A": "front", "S": "head"}
        row, column, number = (ends[end] for end in nifti.PLANES[config.plane])
        notes[0] += (
            f", {config.plane}: rows run to the patient's {row}, columns to the {column}, slices to the {number}"
        )
    oblique = [one["oblique"] for one in done if one["oblique"] >= OBLIQUE]
    if oblique and config.axis < 0:
        notes.append(
            f"{len(oblique)} volumes are oblique, by up to {max(oblique):.0f} degrees: cut along the nearest axis"
        )
    if moved := sum(one["moved"] for one in done):
        notes.append(
            f"warning: {moved} masks lie elsewhere than their volumes by their affines; taken voxel by voxel"
        )
    return notes


def main() -> None:
    slice_volumes(from_flags(SliceConfig, parser(__doc__, SliceConfig).parse_args()))


if __name__ == "__main__":
    run_cli(main)
