"""What new slices are worth, beside held-out slices and worthless ones: likeness, anatomy, variety
and copying.

Models, splits and samples in; a report and the arrays for its pictures out. Each score stands
beside that of real held-out slices (the floor: validation slices, their reconstructions or test
slices, as each line says) and beside those of controls, which are wrong on purpose:

    codes by place           codes drawn from the training histogram of their place
    two patients' halves     one half from a training patient at that position
    top and bottom of two    the top codes of one slice, the bottom codes of another
    outside scrambled        all but the organs, with the phases of its Fourier transform redrawn:
                             the texture stays, the anatomy goes

A measure *sees* a control if it scores it worse than its floor by two standard errors. A measure
that sees none is left out. A control that none sees is named, as new slices may have that fault.

    likeness           KID to training slices in the features of picture_features.py
    coherence          how well one half of a slice tells which other half is its own, to a linear
                       model of training slices
    constraint         share of plausible slices: with organs as training slices nearby have them.
                       The organs of a slice must occur together in at least 1 % of these. Area,
                       centre, pieces, holes, solidity, asymmetry and roughness of each must lie
                       within the central 98 % of theirs. A small U-Net finds the organs in all
                       slices. It learns from the training patients, as the generator does, because
                       the other patients are too few both to teach it and to be the floor: neither
                       of the two has seen the patients of the floor
    masks              Dice of the mask that comes with a slice and the U-Net's, mean over organs;
                       `organs.judge_masks` names each organ that was not learnt
    coverage           mean pairwise MS-SSIM, beside that of the slices of one patient
    privacy            similarity to the nearest of all training slices and of the altered ones that
                       the priors saw. Three audits measure it, each beside planted copies.
                       By picture: the correlation. Copies are training slices decoded from their
                       own codes, half of the bottom ones redrawn.
                       By codes: the share of equal codes, each weighted by its bits in the training
                       histogram of its place and by the contrast there. It is divided by the mean
                       share of the next eight patients (as Carlini et al. 2023, arXiv 2301.13188,
                       divide distances), because a slice of common codes has many in common with
                       everybody. Copies are test slices with 1/32 of a training slice in them.
                       By layout: the share of cells that are equal in the nearest training layout,
                       also if that is moved by a cell; with masks, the mean of this share and of
                       the organs' mean Dice. Copies are training layouts, moved by up to one and a
                       half cells
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset import NO_MASK, SliceDataset
from modules import VQVAE2
from new_slices import layouts, organs
from new_slices.code_maps import LEVELS, Samples, Variants, decode
from new_slices.organs import Segmenter
from new_slices.picture_features import picture_features
from new_slices.prior import Prior
from support import metrics, results_page, runtime

# With --position, slices as near as this, or this many, stand beside the samples.
NEAR, FEWEST = 0.1, 8
MOST_PER_ROW = 96  # slices of a row of the table
OF_A_PATIENT = 32  # pairs of slices
OTHERS = 8  # patients after the nearest one
PART = (8, 4)  # a copied part is the height and the width of a slice over these
MOST_REAL = 768  # training slices that anatomy is compared with
BACKGROUND = 0.1  # share of all pixels: a class that fills more is none of the organs
FLOOR, SAMPLES, RECONSTRUCTIONS = "held-out slices", "samples", "reconstructions"
BY_PLACE, HALVES, MIXED = "codes by place", "two patients' halves", "top and bottom of two"
OUTSIDE = "outside scrambled"
CONTROLS = (BY_PLACE, HALVES, MIXED, OUTSIDE)
# Question of the scorecard -> the measure that answers it, the better of two values, the floor.
MEASURES = {
    "likeness": ("kernel_distance", min, RECONSTRUCTIONS),
    "coherence": ("coherence", max, FLOOR),
    "constraint": ("plausible", max, FLOOR),
    "masks": ("agreement", max, RECONSTRUCTIONS),
}
# In place of what `score_realism` finds, where there are too few slices.
NO_REALISM = {
    "rows": {},
    "seen": {},
    "unseen": CONTROLS,
    "kernel_distance_costs": {},
    "not_learnt": "",
}
BOUNDS = (
    "This limits how much these samples copy, as these measures see it. It does not guarantee "
    "privacy. Not for diagnosis."
)
WORDS = {  # of the scorecard
    "likeness": "How far the pictures lie from training slices, to a network that learnt from "
    "photographs (KID). The floor is what the decoder allows: reconstructions.",
    "coherence": "How often one half of a slice tells which other half is its own; by chance 0.5. "
    "Two patients' halves do not belong together.",
    "coverage": "How alike two of them are on average (MS-SSIM). The control is two slices of one "
    "patient, as if the generator knew no other.",
    "constraint": "The share without impossible anatomy: a U-Net finds each organ in a place, a "
    "size and a shape that training slices have. It learnt from the training patients, as the "
    "generator did, and never saw those of the floor.",
    "masks": "How well the mask that comes with a slice fits its picture (Dice with the mask that "
    "a U-Net draws). The floor is that of reconstructions, and the control that of mixed codes.",
    "utility": "Whether a U-Net learns from them is measured apart: benchmarks/utility.py.",
    "privacy": "How many lie closer to a training slice than 99 in 100 held-out slices do; up to "
    "{:.1%} can be chance. The control is planted copies, which must be found.",
    "unknown": "Cannot tell: not measured, or the measure sees none of the controls.",
}


@dataclass(frozen=True)
class Inputs:
    """What is appraised, and what it is compared with."""

    model: VQVAE2
    prior: Prior
    splits: dict[str, SliceDataset]
    codes: dict[str, np.ndarray]  # of all slices, as `extract_codes` gives them
    samples: Samples
    positions: np.ndarray  # (n,) of the samples, in [0, 1] or NaN
    twins: np.ndarray  # (n,) test slices beside them: at their positions, or near `position`
    segmenter: Segmenter | None = None  # of the study's organs; None for a study without masks
    position: float = math.nan  # the one that was asked for, NaN for the test slices' own
    seed: int = 0
    layouts: np.ndarray | None = None  # (n, h, w) that the samples started from, if they did

    def codes_of(self, split: str, indices: np.ndarray, variant: int = 0) -> list[np.ndarray]:
        """Top (n, h, w) and bottom (n, 2h, 2w) int64."""
        return [
            self.codes[f"{split}_{level}"][variant, indices].astype(np.int64) for level in LEVELS
        ]

    @cached_property
    def variants(self) -> Variants:
        """How the training slices were altered that the priors saw."""
        train = self.splits["train"]
        return Variants(len(self.codes["train_top"]), len(train), train.mirror)

    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """(n, H, W) float32, z-scored."""
        return self.splits[split].images(indices)[:, 0].numpy()

    def decode(self, top: np.ndarray, bottom: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return decode(self.model, torch.from_numpy(top), torch.from_numpy(bottom))


class Row(NamedTuple):
    """Slices (n, H, W) that are measured together, and their masks (n, H, W) if they bring any."""

    images: np.ndarray
    positions: np.ndarray
    masks: np.ndarray | None = None


def near(split: SliceDataset, position: float) -> np.ndarray:
    """The indices of the slices at about that position; of all slices for NaN."""
    if math.isnan(position):
        return np.arange(len(split))
    count = max(FEWEST, np.count_nonzero(np.abs(split.positions - position) <= NEAR))
    return organs.nearest_positions(position, split.positions)[:count]


# ---- anatomy and realism ----


def make_rows(inputs: Inputs, rng: np.random.Generator) -> dict[str, Row]:
    """The rows of the table, all of one number of slices, at most 96.

    Test slices bring their own masks: their agreement is the Dice of the U-Net that judges.
    """
    splits, samples, position = inputs.splits, inputs.samples, inputs.position
    train, validate, test = (splits[name] for name in ("train", "validate", "test"))
    real = {name: rng.permutation(near(splits[name], position)) for name in ("validate", "test")}
    # Of one size, so that all rows have the same standard errors.
    n = min(MOST_PER_ROW, len(samples.images), *map(len, real.values()))
    chosen, tested = real["validate"][:n], real["test"][:n]
    truth = test.masks(tested).numpy() if test.labels else None
    positions = validate.positions[chosen]
    images, (top, bottom) = inputs.images("validate", chosen), inputs.codes_of("validate", chosen)
    decoded, masks = inputs.decode(top, bottom)
    shown = rng.permutation(len(samples.images))[:n]

    order = rng.permutation(len(train))  # of slices at one position, any may be the nearest
    beside = [organs.nearest_positions(p, train.positions[order])[:FEWEST] for p in positions]
    partners = order[[rng.choice(each) for each in beside]]
    halves, middle = images.copy(), images.shape[1] // 2
    halves[:, :middle] = inputs.images("train", partners)[:, :middle]
    mixed, mixed_masks = inputs.decode(top, np.roll(bottom, min(1 + n // 2, n - 1), axis=0))
    by_place = [redrawn(inputs.codes[f"train_{level}"][0], n, rng) for level in LEVELS]
    known = validate.masks(chosen).numpy() if validate.labels else np.zeros(images.shape, np.uint8)
    outside = np.isin(known, not_organs(known))
    noise = np.fft.fft2(rng.normal(size=images.shape))
    scrambled = np.fft.ifft2(np.abs(np.fft.fft2(images)) * np.exp(1j * np.angle(noise))).real
    sampled = samples.images[shown], inputs.positions[shown]
    return {
        FLOOR: Row(images, positions),
        "test slices": Row(inputs.images("test", tested), test.positions[tested], truth),
        RECONSTRUCTIONS: Row(decoded, positions, masks),
        SAMPLES: Row(*sampled, None if samples.masks is None else samples.masks[shown]),
        BY_PLACE: Row(inputs.decode(*by_place)[0], positions),
        HALVES: Row(halves, positions),
        MIXED: Row(mixed, positions, mixed_masks),
        OUTSIDE: Row(np.where(outside, scrambled, images).astype(np.float32), positions),
    }


def redrawn(codes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, h, w) int64 maps, whose codes are those of random maps (N, h, w) in their places."""
    whose = rng.integers(len(codes), size=(count, *codes.shape[1:]))
    return np.take_along_axis(codes, whose, 0).astype(np.int64)


def not_organs(masks: np.ndarray) -> np.ndarray:
    """The classes of masks (N, H, W) that are background: unknown, or large, such as the body."""
    shares = np.bincount(masks.ravel(), minlength=256) / masks.size
    return np.append(np.flatnonzero(shares > BACKGROUND), NO_MASK)


def score_anatomy(inputs: Inputs, rows: dict[str, Row], real: np.ndarray) -> tuple[dict, dict]:
    """{row: {measure: value}} by the organs that the segmenter sees, and what `organs.judge_masks`
    says of the masks that new slices bring, beside the segmenter's and training slices'.

    `real` are the training slices (indices) that all are compared with.
    """
    train, net = inputs.splits["train"], inputs.segmenter
    labels, verdicts, table = len(train.labels), {}, {}
    bar = tqdm(runtime.batches(real), desc="organs of training slices", disable=None)
    found = (organs.segment(net, inputs.images("train", part)) for part in bar)
    beside = np.concatenate([organs.measure(masks, labels) for masks in found])
    drawn = train.masks(real[: 2 * MOST_PER_ROW]).numpy()
    for name, row in tqdm(rows.items(), desc="organs of new slices", disable=None):
        masks = organs.segment(net, row.images)
        measured = organs.measure(masks, labels), row.positions
        together, fine = organs.plausible(*measured, beside, train.positions[real])
        table[name] = {"plausible": (together & fine.all(1)).mean()}
        if row.masks is not None:
            _, dice = organs.dice_by_patient(masks, row.masks, np.zeros(len(masks)), labels)
            table[name]["agreement"] = organs.mean_of_known(dice[0])
            if name == SAMPLES:
                verdicts = organs.judge_masks(row.masks, masks, drawn, train.labels)
    return table, verdicts


def score_likeness(inputs: Inputs, rows: dict[str, Row], real: np.ndarray) -> tuple[dict, dict]:
    """{row: {measure: value}} by the whole picture, and the same of the standard errors.

    `real` are the training slices (indices) that all are compared with.
    """
    few = real[: 2 * MOST_PER_ROW]
    if min(len(few), *(len(row.images) for row in rows.values())) < 4:
        return {name: {} for name in rows}, {name: {} for name in rows}
    features, table, errors = picture_features(inputs.images("train", few)), {}, {}
    # A part at a time, as all of them may not fit into memory.
    parts = (inputs.images("train", part) for part in runtime.batches(real))
    sides = zip(*map(metrics.halves, parts), strict=True)
    halves = tuple(np.concatenate(side) for side in sides)
    for name, row in tqdm(rows.items(), desc="likeness", disable=None):
        found = {
            "kernel_distance": metrics.kernel_distance(features, picture_features(row.images)),
            "coherence": metrics.coherence(halves, metrics.halves(row.images)),
        }
        table[name] = {measure: value for measure, (value, _) in found.items()}
        errors[name] = {measure: error for measure, (_, error) in found.items()}
    return table, errors


def score_costs(inputs: Inputs, rows: dict[str, Row], table: dict, real: np.ndarray) -> dict:
    """What the decoder adds to the kernel distance of held-out slices, and the priors to that: of
    whole pictures; and of organs and of all around them, where a U-Net finds them, with the slice's
    mean in place of the rest.
    """
    kinds, net = (FLOOR, RECONSTRUCTIONS, SAMPLES), inputs.segmenter
    found = {"whole": [table[name]["kernel_distance"] for name in kinds]}
    if net is not None:
        sets = [inputs.images("train", real[:MOST_PER_ROW]), *(rows[name].images for name in kinds)]
        masks = [organs.segment(net, images) for images in sets]
        outside = [np.isin(of, not_organs(masks[0])) for of in masks]
        sides = ("organs", True), ("around organs", False)
        for part, hidden in tqdm(sides, desc="likeness by part", disable=None):
            left = [np.where(at == hidden, 0, x) for x, at in zip(sets, outside, strict=True)]
            train, *others = map(picture_features, left)
            found[part] = [metrics.kernel_distance(train, each)[0] for each in others]
    return {
        part: {"decoder": decoded - floor, "priors": sampled - decoded}
        for part, (floor, decoded, sampled) in found.items()
    }


def seen_controls(table: dict[str, dict], errors: dict[str, dict]) -> dict[str, list[str]]:
    """The controls that each measure scores worse than its floor, by two standard errors.

    table and errors are {row: {measure: value}}; without an error, it is 0.
    """
    seen = {}
    for measure, better, floor in MEASURES.values():
        if measure not in table[floor]:
            continue
        sign = 1 if better is max else -1
        seen[measure] = [
            control
            for control in CONTROLS
            if measure in table[control]
            and sign * (table[floor][measure] - table[control][measure])
            > 2 * math.hypot(*(errors[name].get(measure, 0) for name in (floor, control)))
        ]
    return seen


def score_realism(inputs: Inputs, rows: dict[str, Row], rng: np.random.Generator) -> dict:
    """The table of rows and measures, without those that see no control; which controls each sees,
    which nobody sees; what decoder and priors cost; and the masks by organ.
    """
    real = rng.permutation(near(inputs.splits["train"], inputs.position))[:MOST_REAL]
    (table, errors), verdicts = score_likeness(inputs, rows, real), {}
    costs = score_costs(inputs, rows, table, real) if table[FLOOR] else {}
    if inputs.segmenter is not None:
        by_anatomy, verdicts = score_anatomy(inputs, rows, real)
        table = {name: by_anatomy[name] | table[name] for name in rows}
        for name, row in rows.items():
            share = table[name]["plausible"]
            errors[name]["plausible"] = math.sqrt(share * (1 - share) / len(row.images))
    seen = seen_controls(table, errors)
    kept = {measure: controls for measure, controls in seen.items() if controls}
    left_out = [measure for measure in seen if measure not in kept]
    for name, row in table.items():
        shown = {measure: value for measure, value in row.items() if measure not in left_out}
        table[name] = {"n": len(rows[name].images), **shown}
    report = {
        "rows": table,
        "masks": verdicts,
        "not_learnt": organs.not_learnt(verdicts),
        "errors": errors,
        "kernel_distance_costs": costs,
        "seen": kept,
        "unseen": [c for c in CONTROLS if not any(c in sees for sees in kept.values())],
        "left_out": left_out,
        "training_slices": len(real),
    }
    return plain(report)


def plain(value):
    """`value` with Python's numbers, and None for those that are not finite, as JSON wants them."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def score_variety(inputs: Inputs, honest: np.ndarray) -> dict | None:
    """Mean pairwise MS-SSIM of new slices, of test slices, and of those of one test patient.

    The patients are those of the test slices `honest` (indices).
    """
    # Each test slice once, and the sample beside it.
    twins = inputs.twins[: len(inputs.samples.images)]
    chosen = np.sort(np.unique(twins, return_index=True)[1])
    if len(chosen) < 2:
        return None
    real = inputs.images("test", inputs.twins[chosen])
    span, report = float(np.median([metrics.value_range(each) for each in real])), {"n": len(real)}
    for name, images in (("samples", inputs.samples.images[chosen]), ("real", real)):
        mean, error = metrics.mean_pairwise_ms_ssim(images, span, seed=inputs.seed)
        report[name] = {"ms_ssim": mean, "standard_error": error}
    patients = inputs.splits["test"].patients[honest]
    own = [honest[patients == patient] for patient in np.unique(patients)]
    alike = [
        metrics.mean_pairwise_ms_ssim(inputs.images("test", each), span, OF_A_PATIENT)[0]
        for each in own
        if len(each) > 1
    ]
    report["one patient"] = {"ms_ssim": float(np.mean(alike)) if alike else None}
    return report


# ---- copying ----


class Source(NamedTuple):
    """Training slices as an audit compares them with others."""

    patients: np.ndarray  # (N,), whose they are
    # Of a variant and indices (B,), what is compared of those slices: thumbnails, codes (B, ...).
    take: Callable[[int, np.ndarray], np.ndarray]
    similarity: Callable[..., np.ndarray]  # (N, B), of each query to each of these slices
    variants: int  # how many of each slice there are
    over_others: bool = False  # what counts is how much nearer they are than the next patients


class Weighed(NamedTuple):
    """Codes of all levels of N slices and what each counts, (N, places) both."""

    codes: np.ndarray
    weights: np.ndarray


class Found(NamedTuple):
    """Each query's most similar training slice, (N,) each."""

    similarity: np.ndarray
    index: np.ndarray
    variant: np.ndarray


def search(
    source: Source, queries: dict[str, np.ndarray | Weighed], label: str
) -> dict[str, Found]:
    """The nearest training slice of every query, among all variants of all of them.

    With `over_others` its similarity is divided by the mean of those of the next 8 patients, the
    nearest slice of each; where there is one patient alone, by nothing.
    """
    people, whose = np.unique(source.patients, return_inverse=True)
    found, by_patient = {}, {}
    parts = runtime.batches(np.arange(len(whose)), 512)
    pairs = list(itertools.product(range(source.variants), parts))
    for variant, part in tqdm(pairs, desc=f"copying, {label}", disable=None):
        block = source.take(variant, part)
        for name, items in queries.items():
            alike = source.similarity(items, block)
            best = alike.argmax(1)
            here = Found(alike.max(1).astype(np.float64), part[best], np.full(len(best), variant))
            there = found.setdefault(name, here)
            nearer, both = here.similarity > there.similarity, zip(here, there, strict=True)
            found[name] = Found(*(np.where(nearer, *each) for each in both))
            if source.over_others:
                most = np.full((len(people), len(alike)), -np.inf)  # of this block
                np.maximum.at(most, whose[part], alike.T)
                by_patient[name] = np.maximum(by_patient.get(name, most), most)
    if source.over_others and len(people) > 1:
        for name, nearest in found.items():
            others = np.sort(by_patient[name], 0)[-1 - OTHERS : -1].mean(0)
            relative = nearest.similarity / np.maximum(others, 1e-9)
            found[name] = nearest._replace(similarity=relative)
    return found


def verdict(audit: dict) -> str:
    """What `metrics.audit` found, in words."""
    samples, copies = audit["samples"], audit["copies"]
    flagged = f"{samples['flagged']} of {samples['n']} new slices flagged"
    flagged += f"; {audit['margin']:.1%} could be chance"
    if samples["share"] > audit["margin"]:
        nearest = f"One sample in 100 is nearer than {samples['percentiles']['99']:.3f}"
        half = f"half of the known copies than {copies['percentiles']['50']:.3f}"
        return f"COPIES: {flagged}. {nearest}, {half}"
    if copies["share"] < 0.5:
        return f"cannot tell: flags only {copies['share']:.1%} of the known copies; {flagged}"
    return f"no more than test slices do: {flagged}"


def make_copies(inputs: Inputs, rng: np.random.Generator) -> np.ndarray:
    """What the audit by picture must find, (n, H, W): training slices decoded from their codes,
    half of the bottom ones redrawn.

    So they are copies with another texture.
    """
    chosen = rng.permutation(len(inputs.splits["train"]))[:MOST_PER_ROW]
    top, bottom = inputs.codes_of("train", chosen)
    others = redrawn(inputs.codes["train_bottom"][0], len(chosen), rng)
    bottom = np.where(rng.random(bottom.shape) < 0.5, others, bottom)
    return inputs.decode(top, bottom)[0]


def copy_parts(
    inputs: Inputs, honest: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """What the audit by codes must find: test slices `honest` (indices) with an eighth of the
    height and a quarter of the width of a training slice, where its contrast is the greatest. Their
    codes of both levels, and their pictures (n, H, W).
    """
    chosen = rng.permutation(honest)[:MOST_PER_ROW]
    givers = rng.integers(len(inputs.splits["train"]), size=len(chosen))
    codes, given = inputs.codes_of("test", chosen), inputs.codes_of("train", givers)
    cells = codes[0].shape[1:]
    size = [max(1, side // part) for side, part in zip(cells, PART, strict=True)]
    contrast = torch.from_numpy(metrics.contrast(inputs.images("train", givers), cells))
    for i, each in enumerate(F.avg_pool2d(contrast, size, stride=1)):
        corner = np.unravel_index(int(each.argmax()), each.shape)
        for scale, maps, of in zip((1, 2), codes, given, strict=True):
            rows, columns = (
                slice(scale * start, scale * (start + side))
                for start, side in zip(corner, size, strict=True)
            )
            maps[i, rows, columns] = of[i, rows, columns]
    return codes, inputs.decode(*codes)[0]


def layout_audit(
    inputs: Inputs, honest: np.ndarray, rng: np.random.Generator
) -> tuple[Source, dict[str, np.ndarray]]:
    """What the audit by layout compares: the mean of the share of equal cells and, where there are
    masks, of the Dice of organs.

    In place of variants, each training layout is moved by up to a cell to all sides.
    """
    labels, codes, samples = inputs.prior.config.labels, inputs.codes, inputs.samples
    known, tissue = codes["train_layout"][0].astype(np.int64), codes["train_tissue"]
    drawn, cells = np.where(known < labels, known, 0), known.shape[1:]
    new = inputs.layouts
    if labels:  # organs are where the masks have them, as these are given away
        masks = layouts.middles(torch.tensor(samples.masks), cells).numpy()
        nothing = layouts.classes(labels) + 1
        regions = np.where((new > 0) & (new < labels), nothing, new)
        new = np.where(masks > 0, masks, regions)

    def take(variant: int, indices: np.ndarray) -> np.ndarray:
        return np.roll(known[indices], layouts.ASIDE[variant], (1, 2))

    def alike(queries: np.ndarray, slices: np.ndarray) -> np.ndarray:
        equal = layouts.equal_cells(queries, slices)
        return (equal + layouts.organ_dice(queries, slices, labels)) / 2 if labels else equal

    def copy(i: int) -> np.ndarray:
        aside = rng.uniform(-1.5, 1.5, (2, 1, 1))
        distances = layouts.signed_distances(drawn[i], labels, cells)
        moved, organ = layouts.warped(tissue[i], aside), layouts.warped(distances, aside).argmax(0)
        return layouts.compose(moved, organ, codes["borders"], labels)

    shows = drawn.any((1, 2))  # an organ, if any layout does
    shown = rng.permutation(np.flatnonzero(shows | ~shows.any()))
    honest = codes["test_layout"][0][honest].astype(np.int64)
    copies = np.stack([copy(i) for i in shown[:MOST_PER_ROW]])
    source = Source(inputs.splits["train"].patients, take, alike, len(layouts.ASIDE))
    return source, {"samples": new, "honest": honest, "copies": copies}


def picture_audit(
    inputs: Inputs, rows: dict[str, Row], honest: np.ndarray, rng: np.random.Generator
) -> tuple[Source, dict[str, np.ndarray]]:
    """What the audit by picture compares: thumbnails, by their correlation."""
    train = inputs.splits["train"]

    def take(variant: int, indices: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(indices).split(16)
        altered = (inputs.variants.images(train.images(part), variant, part) for part in parts)
        return np.concatenate([metrics.thumbnails(part[:, 0].numpy()) for part in altered])

    sets = {
        "samples": inputs.samples.images,
        "copies": make_copies(inputs, rng),
        "honest": inputs.images("test", honest),
        "reconstructions": rows[RECONSTRUCTIONS].images,
    }
    source = Source(train.patients, take, metrics.correlations, len(inputs.variants.numbers))
    return source, {name: metrics.thumbnails(images) for name, images in sets.items()}


def code_audit(
    inputs: Inputs, honest: np.ndarray, rng: np.random.Generator
) -> tuple[Source, dict[str, Weighed]]:
    """What the audit by codes compares: the codes of both levels, each by its bits and contrast."""
    train, samples, count = inputs.splits["train"], inputs.samples, len(inputs.variants.numbers)

    def flat(maps: list[np.ndarray], kind: type = np.uint16) -> np.ndarray:
        return np.concatenate([x.reshape(len(x), -1) for x in maps], 1).astype(kind)

    everything = [flat(inputs.codes_of("train", np.arange(len(train)), v)) for v in range(count)]
    bits = metrics.code_bits(np.concatenate(everything), inputs.model.config.K)

    def coded(maps: list[np.ndarray], images: np.ndarray) -> Weighed:
        codes = flat(maps)
        contrast = [metrics.contrast(images, level.shape[1:]) for level in maps]
        weights = bits[np.arange(codes.shape[1]), codes] * flat(contrast, np.float32)
        return Weighed(codes, weights)

    def take(variant: int, indices: np.ndarray) -> np.ndarray:
        return everything[variant][indices]

    def in_common(queries: Weighed, slices: np.ndarray) -> np.ndarray:
        return metrics.code_agreement(queries.codes, slices, queries.weights)

    queries = {
        "samples": coded([samples.top, samples.bottom], samples.images),
        "copies": coded(*copy_parts(inputs, honest, rng)),
        "honest": coded(inputs.codes_of("test", honest), inputs.images("test", honest)),
    }
    return Source(train.patients, take, in_common, count, over_others=True), queries


def score_copying(
    inputs: Inputs, rows: dict[str, Row], honest: np.ndarray, rng: np.random.Generator
) -> tuple[dict, dict]:
    """The audits by picture, by codes in common and by layout: reports, and what each found."""
    audits = {
        "picture": picture_audit(inputs, rows, honest, rng),
        "codes": code_audit(inputs, honest, rng),
    }
    # Beside test slices whose organs nobody knows, or that show none, every mask would be a copy.
    shown, labels = inputs.codes["test_layout"][0][honest], inputs.prior.config.labels
    known = (shown < layouts.classes(labels)).all((1, 2))
    some = known.any() and (not labels or ((shown > 0) & (shown < labels)).any())
    if inputs.layouts is not None and some:
        audits["layout"] = layout_audit(inputs, honest[known], rng)
    reports, found = {}, {}
    for name, (source, queries) in audits.items():
        found[name] = search(source, queries, name)
        report = metrics.audit(**{which: of.similarity for which, of in found[name].items()})
        reports[name] = report | {"verdict": verdict(report)}
    return reports, found


# ---- the whole, and what is printed ----


def appraise(inputs: Inputs) -> tuple[dict, dict]:
    """What samples are worth, beside what real slices score: the report, and the arrays for its
    pictures.

    Those are "honest", the test slices (indices) that the audits compare with, and "nearest", what
    the audits found. Fewer than two validation slices leave out realism.
    """
    rng = np.random.default_rng(inputs.seed)
    report, rows = {"n": len(inputs.samples.images)}, make_rows(inputs, rng)
    enough = min(len(row.images) for row in rows.values()) >= 2
    report["realism"] = score_realism(inputs, rows, rng) if enough else None
    honest = near(inputs.splits["test"], inputs.position)
    report["variety"] = score_variety(inputs, honest)
    report["copying"], nearest = score_copying(inputs, rows, honest, rng)
    report["scorecard"] = scorecard(report)
    report["conclusion"] = conclusion(report)
    return report, {"honest": honest, "nearest": nearest}


def passes(new, floor, control, better: Callable) -> bool | None:
    """Better than the floor, or nearer to it than to the control.

    None if one of them is not known, or the control is as good as the floor.
    """
    if None in (new, floor, control) or better(control, floor) == control:
        return None
    return better(new, floor) == new or abs(new - floor) < abs(new - control)


def scorecard(report: dict) -> dict[str, dict]:
    """What new slices are asked, and what the rest of the report answers.

    Returns question -> what the new slices score, the floor (what held-out slices score), the
    control (what slices score that are wrong on purpose: of those that the measure sees the best),
    whether the new slices pass, None where that cannot be told, and a line in words. They pass a
    measure by scoring nearer to the floor than to that control, or better than the floor, and an
    audit of copies by what it flags within chance.
    """
    realism = report["realism"] or NO_REALISM
    rows, seen = realism["rows"], realism["seen"]
    variety = report["variety"] or {}

    def line(question: str, new, floor, control, passed: bool | None) -> dict:
        words = WORDS["unknown" if new is None else question]
        numbers = {"new slices": new, "floor": floor, "control": control}
        return {**numbers, "passed": passed, "in words": words}

    def beside(question: str) -> dict:
        measure, best, floor = MEASURES[question]
        new, floor = (rows.get(name, {}).get(measure) for name in (SAMPLES, floor))
        control = best((rows[name][measure] for name in seen.get(measure, ())), default=None)
        return line(question, new, floor, control, passes(new, floor, control, best))

    kinds = ("samples", "real", "one patient")
    alike, floor, one = (variety.get(name, {}).get("ms_ssim") for name in kinds)
    unlearnt = realism.get("not_learnt")
    card = {
        "likeness": beside("likeness"),
        "coherence": beside("coherence"),
        "coverage": line("coverage", alike, floor, one, passes(alike, floor, one, min)),
        "constraint": beside("constraint"),
        "masks": beside("masks"),
        "utility": line("utility", None, None, None, None) | {"in words": WORDS["utility"]},
    }
    if unlearnt:
        card["masks"] |= {"passed": False, "in words": f"{WORDS['masks']} {unlearnt}."}
    for name, found in report["copying"].items():
        sets = (found[kind] for kind in ("samples", "honest", "copies"))
        counts = (f"{of['flagged']} of {of['n']}" for of in sets)
        clean = found["samples"]["share"] <= found["margin"]
        passed = None if clean and found["copies"]["share"] < 0.5 else clean  # None: cannot tell
        words = {"in words": WORDS["privacy"].format(found["margin"])}
        card[f"privacy, by {name}"] = line("privacy", *counts, passed) | words
    return card


def conclusion(report: dict) -> str:
    """One sentence: bad, or that it cannot be told and why, or that no fault was found."""
    card = report["scorecard"]
    if failed := [question for question, line in card.items() if line["passed"] is False]:
        return f"Bad: the new slices do not pass {', '.join(failed)}."
    unseen = [*(report["realism"] or NO_REALISM)["unseen"]]
    unseen += [
        question.replace("privacy,", "copies")
        for question, line in card.items()
        if question.startswith("privacy") and line["passed"] is None
    ]
    if unseen or card["likeness"]["passed"] is None:
        what = " and ".join(unseen) or "whether the whole picture is like one of the study"
        return f"Cannot tell how good they are: no measure here sees {what}."
    return "No fault found: each control is seen by a measure, and the new slices pass them all."


def print_report(report: dict) -> None:
    """The scorecard, what adds to the kernel distance, what the audits of copies say; the end."""
    columns = ("new slices", "floor", "control", "passed")
    print(f"\n{'':<26}" + "".join(f"{name:>14}" for name in columns))
    for question, line in report["scorecard"].items():
        cells = (results_page.text(line[name]) for name in columns)
        print(f"{question:<26}" + "".join(f"{cell:>14}" for cell in cells))
    realism = report["realism"] or NO_REALISM
    for part, costs in realism["kernel_distance_costs"].items():
        added = ", ".join(f"{name} {cost:.4f}" for name, cost in costs.items())
        print(f"kernel distance ({part}), added by: {added}")
    for name, copying in report["copying"].items():
        print(f"copying, by {name}: {copying['verdict']}")
    for line in filter(len, (realism["not_learnt"], BOUNDS, report["conclusion"])):
        print(line)
