"""Cut 3-D volumes into a study of 2-D slices.

    python slice_volumes.py --volumes HipMRI_study_complete_release_v1 --out keras_slices_data
    python slice_volumes.py --volumes my_bids_folder --match '*_T2w*' --plane axial --out my_slices

All .nii and .nii.gz files in the folder and below are taken: subject and session are read from
their paths. Masks are files named so (..._seg, ..._mask, ..._label, ..._SEMANTIC), beside their
volumes or in folders such as semantic_labels_anon/ and labelsTr/; or all files under --masks DIR.
A volume has one mask, of its own subject and session, with a label for each organ.

Planes are found by the affine, whatever the order of the array's axes, and all volumes are turned
the same way: rows run to the patient's right (sagittal planes: to the front), columns to the head
(axial: to the front), slice numbers to the front (axial: to the head; sagittal: to the right).
Every slice keeps its place in the world. slices.json records which planes of whom were cut.
"""

import fnmatch
import os
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

import dataset
from dataset import SPLITS, find_nifti
from support import nifti, runtime
from support.runtime import UserError, in_parallel, option

# The patients of HipMRI in each split of the report.
OF_REPORT = {"train": {*range(4, 34), 35}, "validate": {*range(36, 40)}, "test": {*range(40, 43)}}
MASK_WORDS = "seg|dseg|segmentation|masks?|labels?|labelmap|semantic|gt|roi"
MASK_NAME = re.compile(rf"(?<![a-z])(?<!sub-)(?:{MASK_WORDS})(?![a-z])", re.I)
MASK_FOLDER = re.compile(r"(?:semantic_labels.*|labels?|labels?t[rs]|masks?|segmentations?)", re.I)
# What a folder of no one subject is called: a day, a session, a sequence, a plane, a split.
NO_SUBJECT = re.compile(
    rf"""(?<!\d){dataset.DATE} | ^{dataset.YEAR}[-._]\d\d?$ | ^\d\d?[-.]{dataset.YEAR}$
    | ^(?:ses|session|week|wk|day|month|visit|timepoint|run|scan)(?:[ _-][a-z0-9]+|\d+)$
    | ^(?:baseline|pre|post|follow[ _-]?up\d*|t[12]w?|pdw?|flair|dwi|adc|swi)$
    | ^(?:{"|".join(nifti.PLANES)}|images(?:Tr|Ts|Val)|train(?:ing)?|val|validat(?:e|ion)|test)$""",
    re.I | re.VERBOSE,
)
BY_FOLDER = "^(?P<patient>[^/]+)"  # a --name-pattern: the first folder is the subject
RECORDED = ("plane", "axis", "count", "match", "seed")  # of `SliceConfig`, in slices.json


@dataclass(frozen=True)
class SliceConfig:
    """Which planes of which volumes. Which 60 planes the report took is not published."""

    volumes: str = option("", "folder of the volumes, searched with all its folders")
    out: str = option(dataset.STUDY_NAMES[0], "study folder to make")
    match: str = option("*", "only volumes with this name or path, such as '*_T2w*'")
    masks: str = option("", "folder of the masks; empty: masks are known by their names")
    name_pattern: str = option(
        "", "regular expression with groups patient and week, for paths that announce no numbers"
    )
    plane: str = option("coronal", "plane to cut, by the affine", choices=tuple(nifti.PLANES))
    axis: int = option(
        -1, "axis of the array to slice along, for volumes without an affine", choices=(-1, 0, 1, 2)
    )
    count: int = option(60, "central planes of each volume, or all where there are fewer; 0 is all")
    seed: int = option(0, "seed of the random 80/10/10 split by patient")

    def __post_init__(self) -> None:
        dataset.check_pattern(self.name_pattern)
        runtime.check_seed(self.seed)
        for name in ("volumes", "masks"):
            folder = getattr(self, name)
            if not Path(folder).is_dir() or (name == "volumes" and not folder):
                raise UserError(f"--{name} is '{folder}': no such folder. Fix: name another.")
        runtime.check_number("count", self.count, least=0)


class Volume(NamedTuple):
    """A volume to cut, and its mask if it has one. The study knows it by `patient` and `week`."""

    patient: int
    week: int
    path: str
    mask: str | None


class File(NamedTuple):
    path: str
    short: str  # from the folder that was searched


# ---- which volumes and masks ----


def _numbers(labels: set[str]) -> dict[str, int]:
    """A number for each label: its own where all are numbers, of at most 18 digits, else its place
    in order, from 1.
    """
    if all(label.isdecimal() and len(label) <= dataset.MOST_DIGITS for label in labels):
        return {label: int(label) for label in labels}
    return {label: place for place, label in enumerate(sorted(labels), 1)}


def is_mask(path: str) -> bool:
    """Whether a path, from the folder that is searched, is named as masks are."""
    *folders, name = Path(path).parts
    return bool(MASK_NAME.search(name)) or any(map(MASK_FOLDER.fullmatch, folders))


def list_files(config: SliceConfig) -> tuple[list[File], list[File]]:
    """The volumes that `--match` takes, and all masks; FileNotFoundError for no volumes."""

    others: list[str] = []

    def listed(folder: str) -> list[File]:
        entries = find_nifti(folder, others)
        return [File(entry.path, os.path.relpath(entry.path, folder)) for entry in entries]

    files = listed(config.volumes)
    masks = listed(config.masks) if config.masks else [f for f in files if is_mask(f.short)]
    apart = {os.path.realpath(mask.path) for mask in masks}
    images = [file for file in files if os.path.realpath(file.path) not in apart]
    wanted = [
        image
        for image in images
        if any(fnmatch.fnmatch(x, config.match) for x in (image.short, Path(image.path).name))
    ]
    if not wanted:
        unmatched = f" {len(images)} volumes do not match {config.match}."
        among = unmatched if images else dataset.way_in(others)
        none = f"{config.volumes}: it holds no volumes (files such as Case_004_Week0_LFOV.nii.gz)"
        raise FileNotFoundError(f"{none}.{among} Fix: check --volumes and --match.")
    dataset.say_passed_over(others, "other files", f"{config.volumes}: ")
    return wanted, masks


def group(files: list[File], pattern: str) -> tuple[dict, dict[str, str]]:
    """Paths by (subject, session), and why the others' names tell none."""
    groups, unnamed = defaultdict(list), {}
    for path, short in files:
        try:
            parts = dataset.name_parts(short, pattern)
            labels = parts["patient"], parts.get("week", "0")
            # 007 and 7 are one, and so are A01 and a01.
            key = tuple(str(int(x)) if x.isdecimal() else x.casefold() for x in labels)
            groups[key].append(path)
        except UserError as error:
            unnamed[path] = str(error)
    return groups, unnamed


def find_volumes(config: SliceConfig) -> tuple[list[Volume], bool, dict[str, int]]:
    """The volumes with their masks; whether they are HipMRI's; numbers for names, {"subject a": 1}.

    Raises before anything is written: FileNotFoundError for no volumes; UserError for names that
    tell no subject, and for two volumes or two masks of one subject and session.
    """
    files, mask_files = list_files(config)
    volumes, unnamed = group(files, config.name_pattern)
    masks, _ = group(mask_files, config.name_pattern)
    folders, _ = group(files, BY_FOLDER)
    apart = all(len(Path(file.short).parts) > 1 for file in files)
    # As scanners export them: P0001/t2_tse.nii.gz, P0002/t2_tse.nii.gz.
    if apart and len(folders) == len(files) and not volumes and not config.name_pattern:
        if odd := [folder for folder, _ in folders if NO_SUBJECT.search(folder)]:
            like = f"{odd[0]} looks like a day, a session, a sequence, a plane or a split"
            print(f"{config.volumes}: its folders are not taken for subjects, because {like}.")
            print(f"Fix: if they are subjects, --name-pattern '{BY_FOLDER}'")
        else:
            volumes, unnamed, (masks, _) = folders, {}, group(mask_files, BY_FOLDER)
            print(f"{config.volumes}: subjects are told apart by their folders")
    choose = "Fix: choose one with --match '*_T2w*', or rename sessions to ses-1 and ses-2."
    double = {
        more: f"of one subject and session with {path}. {choose}"
        for path, *others in volumes.values()
        for more in others
    }
    if bad := unnamed | double:
        dataset.raise_bad(config.volumes, bad, len(files))
    pairs = {key: masks[key][0] for key in volumes if key in masks}
    # To take one of two masks would leave organs out in silence.
    if two := next((masks[key] for key in pairs if len(masks[key]) > 1), None):
        fix = "Fix: merge them into one file with a label for each organ, in --masks DIR"
        raise UserError(f"two masks of one volume, {two[0]} and {two[1]}. {fix}.")
    left = [file.path for file in mask_files if file.path not in pairs.values()]
    if config.masks and not pairs:
        none = f"{config.masks}: no mask of the subjects in {config.volumes}"
        raise UserError(f"{none}. Fix: check --masks and its names, or give a --name-pattern.")
    if left:
        none = f"{len(left)} masks are not used, such as {left[0]}"
        print(f"warning: {none}: no volume is of the same subject and session")
    subjects, sessions = (_numbers(set(labels)) for labels in zip(*volumes, strict=True))
    found = [
        Volume(subjects[key[0]], sessions[key[1]], paths[0], pairs.get(key))
        for key, paths in volumes.items()
    ]
    hipmri = any(Path(short).parts[0].lower().startswith("semantic_mrs") for _, short in files)
    named = {f"subject {label}": number for label, number in subjects.items()}
    named |= {f"session {label}": number for label, number in sessions.items()}
    words = {key: number for key, number in named.items() if not key.endswith(f" {number}")}
    return sorted(found), hipmri, words


def split_patients(patients: set[int], seed: int, hipmri: bool) -> tuple[dict[int, str], str]:
    """The split of each patient, and a line that says which: the report's, or 80/10/10 % at random.

    No split is empty. The report's is used for HipMRI, if it has all patients and fills all splits.
    """
    theirs = {patient: name for name, members in OF_REPORT.items() for patient in members}
    chosen = {patient: theirs[patient] for patient in sorted(patients & theirs.keys())}
    if hipmri and len(chosen) == len(patients) and set(chosen.values()) == set(SPLITS):
        return chosen, "split by patient as in the report"
    if len(patients) < 3:
        raise UserError(f"{len(patients)} patients; a split by patient needs at least 3")
    order = np.random.default_rng(seed).permutation(sorted(patients)).tolist()
    held = max(1, round(0.1 * len(order)))
    splits = ["validate"] * held + ["test"] * held + ["train"] * (len(order) - 2 * held)
    return dict(zip(order, splits, strict=True)), f"random split by patient, seed {seed}"


# ---- cutting ----


class Cut(NamedTuple):
    """What was written of a volume."""

    planes: int
    moved: bool  # its mask's affine puts the mask elsewhere by a voxel or more
    disputed: bool  # the two affines of its header, or of its mask's, turn it differently


def _turning(image: nifti.Image, config: SliceConfig) -> np.ndarray:
    """How to turn a volume, see `nifti.turning`; UserError where nothing tells it."""
    if config.axis >= 0:  # this axis becomes the last one, the others keep their order
        order = [*(axis for axis in range(3) if axis != config.axis), config.axis]
        return np.array([[order.index(axis), 1] for axis in range(3)])
    if not image.oriented:
        found = "an unusable affine" if image.broken else "no orientation"
        raise UserError(f"{found} in its header. Fix: --axis (1 for HipMRI's 256x256x128)")
    return nifti.turning(image.affine, nifti.PLANES[config.plane])


def read_volume(path: str) -> nifti.Image:
    """A file whose array has three axes; UserError for another number of them."""
    image = nifti.read(path)
    shape = image.shape[:3]
    if len(shape) < 3 or image.raw.size != np.prod(shape) or min(shape) < 2:
        raise UserError(f"an array of shape {image.shape}; expected a 3-D volume")
    return replace(image, raw=image.raw.reshape(shape))


def _read_mask(path: str, volume: nifti.Image) -> tuple[nifti.Image, bool]:
    """A mask with its axes along its volume's, and whether its affine puts it a voxel off."""
    image, moved = read_volume(path), False
    if image.oriented and volume.oriented:
        along = ornt_transform(io_orientation(image.affine), io_orientation(volume.affine))
        affine = nifti.turn_affine(image.affine, image.shape, along)
        image = replace(image, raw=apply_orientation(image.raw, along), affine=affine)
        moved = nifti.moved(affine, volume.affine, volume.shape)
    if image.shape != volume.shape:
        raise UserError(f"its shape is {image.shape}; expected {volume.shape}")
    return image, moved


def _slice_volume(job: tuple[Volume, str], config: SliceConfig) -> Cut | str:
    """Write the slices of one volume and of its mask; a string says why it cannot be used."""
    volume, split = job
    stacks, moved, reading = {}, False, ""
    try:
        image = read_volume(volume.path)
        turning = _turning(image, config)
        depth = apply_orientation(image.raw, turning).shape[2]
        count = min(config.count or depth, depth)
        first = (depth - count) // 2

        def chosen(image: nifti.Image) -> nifti.Image:
            turned = apply_orientation(image.raw, turning)
            return replace(image, raw=turned[..., first : first + count])

        stacks[f"keras_slices_{split}", "case"] = nifti.finite(chosen(image).values())
        if volume.mask:
            reading = f"its mask {volume.mask}: "
            mask, moved = _read_mask(volume.mask, image)
            labels = dataset.read_labels(chosen(mask))
            labels = labels.astype(np.min_scalar_type(labels.max()))
            stacks[f"keras_slices_seg_{split}", "seg"] = labels
    except (UserError, OSError) as error:
        return f"{reading}{error}"
    affine = nifti.turn_affine(image.affine, image.shape, turning)
    for (folder, kind), stack in stacks.items():
        for number in range(count):
            name = f"{kind}_{volume.patient:03d}_week_{volume.week}_slice_{number}.nii.gz"
            here = affine.copy()
            here[:3, 3] += (first + number) * affine[:3, 2]  # the step from plane to plane
            target = Path(config.out, folder, name)
            nifti.write(target, stack[..., number], here, oriented=image.oriented)
    return Cut(count, moved, image.disputed or bool(volume.mask and mask.disputed))


def slice_volumes(config: SliceConfig) -> None:
    """Cut volumes into a study of 2-D slices and masks.

    FileNotFoundError where there are no volumes. UserError for names that clash and an output
    folder that holds slices, OSError for one that cannot be written, before anything is written;
    UserError at the end, for volumes of no use.
    """
    volumes, hipmri, named = find_volumes(config)
    # Slices of another cut, or of masks that were corrected since, must not stay among these.
    if found := next(Path(config.out).glob("keras_slices_*/*"), None):
        there = f"{config.out}: already holds slices, such as {found.name}"
        raise UserError(f"{there}. Fix: delete it to cut anew, or another --out.")
    runtime.writable_folder(config.out)
    split_of, line = split_patients({volume.patient for volume in volumes}, config.seed, hipmri)
    jobs = [(volume, split_of[volume.patient]) for volume in volumes]
    masks = sum(volume.mask is not None for volume in volumes)
    print(f"{len(jobs)} volumes of {len(split_of)} patients, {masks} of them with a mask; {line}")
    # The folders come into place together: a cut that was stopped must not pass for a study.
    with tempfile.TemporaryDirectory(prefix=runtime.TEMPORARY, dir=config.out) as made:
        cut = partial(_slice_volume, config=replace(config, out=made))
        work = in_parallel(cut, jobs, "slicing", "volume")
        results = dict(zip((volume.path for volume in volumes), work, strict=True))
        for folder in Path(made).iterdir():
            folder.replace(Path(config.out, folder.name))
    bad = {path: result for path, result in results.items() if isinstance(result, str)}
    if cuts := [result for result in results.values() if isinstance(result, Cut)]:
        patients = {f"patient {number:03d}": name for number, name in sorted(split_of.items())}
        settings = {name: getattr(config, name) for name in RECORDED}
        runtime.write_json(Path(config.out, "slices.json"), settings | patients | named)
        if moved := sum(cut.moved for cut in cuts):
            apart = f"the affines of {moved} masks put them elsewhere than their volumes"
            print(f"warning: {apart}; they were used voxel by voxel, as stored")
        if disputed := sum(cut.disputed for cut in cuts):
            odd = f"{disputed} volumes or their masks have {nifti.DISPUTED}"
            print(f"warning: {odd}; the sform was taken, so look at left and right")
        total = sum(cut.planes for cut in cuts)
        print(f"wrote {config.out}/: {total} slices of {len(cuts)} volumes")
    if bad:
        dataset.raise_bad(config.volumes, bad, len(jobs))


def main() -> None:
    given = vars(runtime.parser(__doc__, SliceConfig).parse_args())
    slice_volumes(runtime.fill(SliceConfig, given))


if __name__ == "__main__":
    runtime.run_cli(main)
