"""Layouts by brute force, and what the priors make of them."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage.registration import optical_flow_ilk
from test_prior import TINY, make_prior, random_maps

from dataset import NO_MASK, Mirror
from modules import VQVAE2, VQVAE2Config
from new_slices import layouts, organs, sample_report
from new_slices.code_maps import Samples, Variants, decode
from new_slices.prior import PriorConfig, Sampling
from support import metrics

ROWS, COLUMNS = np.mgrid[:24, :16]


def disc(radius: float, row: float = 12, column: float = 8) -> np.ndarray:
    return (np.hypot(ROWS - row, COLUMNS - column) < radius).astype(np.int64)


LEVELS = np.array([-0.8, -0.3, 0.2, 0.7, 1.2])  # of 6 regions


def test_tissue_is_the_mean_of_cells_and_their_neighbours():
    x = torch.zeros(1, 1, 96, 64)
    x[:, :, 48:52, 32:36] = 1  # one cell
    tissue = layouts.smoothed(x, (24, 16))[0]
    assert tissue.sum() == pytest.approx(1, abs=1e-5)
    bell = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    bell /= bell.sum()
    assert tissue[9:16, 5:12] == pytest.approx(np.outer(bell, bell), abs=1e-6)
    flat = layouts.smoothed(torch.full((1, 1, 32, 16), 0.3), (8, 4))
    assert flat == pytest.approx(np.full((1, 8, 4), 0.3))  # also at the edges


def test_levels_part_clusters_of_intensity():
    bands = torch.tensor([-1.0, -0.55, 0.0, 0.5, 1.05, 1.5]).repeat_interleave(16 * 8)
    split = MagicMock(images=lambda indices: bands.view(1, 1, 96, 8).repeat(len(indices), 1, 1, 1))
    split.__len__.return_value = 12
    expected = [-0.775, -0.275, 0.25, 0.775, 1.275]
    assert layouts.tissue_borders(split, (96, 8)) == pytest.approx(expected, abs=0.06)


def test_a_border_of_regions_lies_midway_between_their_means():
    """As of a k-means that has come to its end, also where most of a slice is dark."""
    skewed = torch.from_numpy(np.random.default_rng(0).exponential(size=(4, 1, 256, 128))).float()
    split = MagicMock(images=lambda indices: skewed[indices])
    split.__len__.return_value = 4
    borders = layouts.tissue_borders(split, (64, 32))
    values = layouts.smoothed(skewed, (64, 32)).ravel()
    parts = np.split(np.sort(values), np.searchsorted(np.sort(values), borders))
    means = np.array([part.mean() for part in parts])
    assert borders == pytest.approx((means[1:] + means[:-1]) / 2, abs=2e-3)


def test_a_layout_is_air_organs_and_regions():
    tissue = np.full((6, 5), -1.0)  # dark everywhere,
    tissue[1:5, 1:4] = 0.0  # but for a body
    tissue[2, 2] = -1.0  # with a lung in it, which does not reach the edge,
    tissue[3, 3] = 1.5  # and something bright
    organs = np.zeros((6, 5), int)
    organs[3, 1] = 1
    found = layouts.compose(tissue, organs, LEVELS, 2)
    expected = np.zeros((6, 5), int)
    expected[1:5, 1:4] = 2 + 2
    expected[2, 2], expected[3, 3], expected[3, 1] = 2, 2 + 5, 1
    assert np.array_equal(found, expected)
    bare = layouts.compose(tissue, 0 * organs, LEVELS, 0)  # a study without masks
    assert bare[1, 1] == 1 + 2 and bare[0, 0] == 0 and bare.max() == 1 + 5 < PriorConfig().classes


def test_an_organ_is_the_class_in_the_middle_of_each_cell():
    masks = torch.randint(0, 3, (2, 16, 8), dtype=torch.uint8)
    masks[1] = NO_MASK
    tissue = np.zeros((2, 4, 2))
    found = layouts.layouts_of(tissue, masks, LEVELS, 3)
    assert found.shape == (2, 4, 2) and (found[1] == PriorConfig(labels=3).classes).all()
    for row in range(4):
        for column in range(2):
            organ = masks[0, 4 * row + 2, 4 * column + 2]
            assert found[0, row, column] == (organ or 3 + 2)
    assert (layouts.layouts_of(tissue, None, LEVELS, 0) == 1 + 2).all()


def test_signed_distances_by_brute_force():
    organs = np.random.default_rng(0).integers(0, 3, (6, 5))
    found = layouts.signed_distances(organs, 4, (6, 5))
    places = np.argwhere(np.ones_like(organs))
    for organ in range(3):
        own = [place for place in places if organs[tuple(place)] == organ]
        others = [place for place in places if organs[tuple(place)] != organ]
        edge = [a for a in own if any(np.abs(a - b).sum() == 1 for b in others)]
        for place in places:
            apart = np.linalg.norm(edge - place, axis=1).min()
            deep = 0.5 + apart if organs[tuple(place)] == organ else 0.5 - apart
            assert found[organ][tuple(place)] == pytest.approx(deep)
    assert (found[3] == -layouts.DEEPEST).all()  # it is nowhere
    assert layouts.signed_distances(organs, 0, (6, 5)).shape == (1, 6, 5)


def test_signed_distances_know_where_in_a_cell_an_organ_ends():
    """A disc in pixels, four to a cell: to an eighth of a cell what its radius says."""
    rows, columns = np.mgrid[:96, :64]
    for radius in (21, 22, 23, 24):
        mask = (np.hypot(rows - 47.5, columns - 31.5) < radius).astype(np.uint8)
        inside = layouts.signed_distances(mask, 2, (24, 16))[1]
        expected = radius / 4 - np.hypot(ROWS - 11.5, COLUMNS - 7.5)
        near = np.abs(expected) < 3
        np.testing.assert_allclose(inside[near], expected[near], atol=1 / 8)
        kept = layouts.depths_of(torch.from_numpy(mask)[None], 2, (24, 16))[0, 1]
        assert kept.dtype == np.int8 and np.abs(kept / layouts.DEPTHS - inside).max() < 1 / 29


def test_a_mask_is_drawn_from_its_codes_and_its_layout(monkeypatch):
    """A class that both show wins; where one of the two tells nothing, the other does."""
    torch.manual_seed(0)
    small = {"channels": 8, "top_channels": 8, "residual_channels": 4}
    model = VQVAE2(VQVAE2Config(K=8, D=4, labels=3, **small)).eval()
    layout = torch.from_numpy(disc(6))[None]
    codes = torch.zeros(1, 12, 8, dtype=torch.int64), torch.zeros(1, 24, 16, dtype=torch.int64)
    logits = torch.zeros(1, 3, 96, 64)
    image = torch.zeros(1, 1, 96, 64)
    monkeypatch.setattr(model, "decode_with_masks", lambda top, bottom: (image, logits))
    _, mask = decode(model, *codes, layout)
    assert np.array_equal(mask[0, 2::4, 2::4], layout[0])  # the codes tell nothing
    logits[:, 2] = 20
    assert (decode(model, *codes, layout)[1] == 2).all()  # the codes are sure
    logits[:, 2] = 1
    # A guess of theirs does not outweigh it.
    assert np.array_equal(decode(model, *codes, layout)[1], mask)
    with torch.inference_mode():
        p = layouts.likely(layout, 3, 96, 64).exp() - 0.03  # where it is nowhere near
    torch.testing.assert_close(p.sum(1), torch.ones(1, 96, 64))


def composer_of(known, tissue, positions, patients, labels=3, codes=()) -> layouts.Composer:
    organs = torch.from_numpy(np.where(known < labels, known, 0))
    depths = layouts.depths_of(organs, labels, organs.shape[1:])
    where = positions, patients, LEVELS, labels, codes
    return layouts.Composer(known, tissue, depths, *where)


def patients_of_discs(count: int = 9):
    """The layouts of a study of `count` patients with a disc each, ten slices of one size a
    patient, in a grey body; of a last one with another organ; and of a slice without a mask.
    """
    discs = [disc(3 + patient / 3, 11 + patient % 3) for patient in range(count)]
    organs = np.stack([*np.repeat(discs, 10, 0), *[2 * disc(4)] * 10, disc(4)])
    tissue = np.full(organs.shape, 0.5) + np.linspace(-0.2, 0.2, len(organs))[:, None, None]
    tissue[:, :2], tissue[:, -2:] = -1, -1  # air
    pairs = zip(tissue, organs, strict=True)
    known = np.stack([layouts.compose(*each, LEVELS, 3) for each in pairs])
    known[-1] = PriorConfig(labels=3).classes
    positions = np.append(np.tile(np.linspace(0, 1, 10), count + 1), 0.5)
    return known, tissue, positions, np.append(np.repeat(np.arange(count + 1), 10), 0)


def test_a_new_layout_is_composed_of_patients_with_the_same_organs(monkeypatch):
    monkeypatch.setattr(layouts, "DRAWS", (0, 1))
    monkeypatch.setattr(layouts, "OF_ALL", 1)
    known, tissue, positions, patients = patients_of_discs()
    composer = composer_of(known, tissue, positions, patients)
    rng = np.random.default_rng(0)
    for position in (0.0, 0.5, math.nan):
        family = composer.family(rng.permutation(composer.near(position)), rng)
        assert len(family) == layouts.PATIENTS == len(set(patients[family]))
        # Nine patients show the first organ, one the second, and the last slice is not used.
        assert not np.isin(9, patients[family]) and family.max() < 90
        if not math.isnan(position):
            assert abs(positions[family[0]] - position) < 0.15
    apart = np.abs(positions[composer.near(0.2)] - 0.2)  # the nearest tenth of a hundred slices
    np.testing.assert_allclose(np.sort(apart), np.sort(np.abs(positions[:100] - 0.2))[:10])
    new, shapes = composer.draw([0.2] * 40, range(100, 140))
    assert new.shape == (40, 24, 16) and new.dtype == np.int64
    assert np.array_equal(np.stack(shapes).argmax(1), np.where(new < 3, new, 0))
    assert new[7:8].tolist() == composer.draw([0.2], [107])[0].tolist()  # whatever the others are
    assert not np.array_equal(new[0], new[1])
    assert not (new == 2).any() and new.max() < 3 + layouts.REGIONS
    assert (new == 0).any((1, 2)).mean() > 0.8  # air
    areas = (new == 1).sum((1, 2))
    smallest, largest = (np.count_nonzero(disc(radius)) for radius in (3, 3 + 8 / 3))
    assert smallest * 0.7 < areas.min() and areas.max() < largest * 1.4
    assert areas.std() > 10
    for layout in new:  # and a disc it is, a little bent
        rows, columns = np.nonzero(layout == 1)
        centred = disc((len(rows) / math.pi) ** 0.5, rows.mean(), columns.mean())
        assert np.count_nonzero((layout == 1) != centred) < 0.5 * len(rows)


def test_a_family_is_of_slices_that_use_the_same_codes(monkeypatch):
    """Patients who look alike but for their codes come last; found again by brute force."""
    monkeypatch.setattr(layouts, "OF_ALL", 1)
    known, tissue, positions, patients = patients_of_discs()
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 3, (len(known), 6, 4)) + 3 * (patients % 2)[:, None, None]
    composer = composer_of(known, tissue, positions, patients, codes=[maps])
    use = np.stack([[(each == code).mean() ** 0.5 for code in range(6)] for each in maps[:100]])
    np.testing.assert_allclose(layouts.code_use(maps[:100]), use)
    seen, frame = composer.seen, 7
    assert seen.var(0).sum() == pytest.approx(2)  # places and codes count alike
    alike = [i for i in range(90) if patients[i] != patients[frame]]  # with the first organ

    def nearest(to):
        best = {}
        for i in sorted(alike, key=lambda i: ((seen[i] - to) ** 2).sum()):
            best.setdefault(patients[i], i)
        return [frame, *best.values()][:8]

    expected = nearest(seen[nearest(seen[frame])[:4]].mean(0))
    family = composer.family(np.array([frame]), rng)
    assert family[0] == frame and sorted(family) == sorted(expected)
    assert (patients[expected[:5]] % 2 == patients[frame] % 2).all()  # five of nine are


@pytest.mark.parametrize(("reach", "count"), ((1.0, 7), (layouts.REACH, 9), (100.0, 10)))
def test_a_family_is_chosen_by_chance_from_patients_about_as_near(monkeypatch, reach, count):
    """By brute force: those within reach of the seventh, but at most a third of all patients."""
    monkeypatch.setattr(layouts, "REACH", reach)
    composer = composer_of(*patients_of_discs(31))
    seen, patients, frame, rng = composer.seen, composer.patients, 7, np.random.default_rng(0)
    others = [p for p in range(31) if p != patients[frame]]  # with the first organ
    of = {p: np.flatnonzero(patients == p) for p in others}

    def by_distance(to):
        squared = {p: ((seen[i] - to) ** 2).sum(1) for p, i in of.items()}
        return sorted((each.min(), of[p][each.argmin()]) for p, each in squared.items())

    first = [i for _, i in by_distance(seen[frame])[:3]]
    near = by_distance(seen[[frame, *first]].mean(0))
    circle = {i for apart, i in near[:10] if apart <= reach * near[6][0] + 1e-9}
    families = [composer.family(np.array([frame]), rng) for _ in range(100)]
    assert all(family[0] == frame and len(set(family)) == 8 for family in families)
    assert set(np.concatenate(families)) == circle | {frame}
    assert len(circle) == count


def test_the_frame_of_a_layout_gives_it_neither_tissue_nor_shape(monkeypatch):
    monkeypatch.setattr(layouts, "OF_ALL", 1)
    # The slice without a mask comes first: those that are used have other numbers.
    composer = composer_of(*(each[::-1] for each in patients_of_discs()))
    families, laid, given, shape = [], [], [], layouts.mean_shape
    monkeypatch.setattr(layouts, "mean_shape", lambda *of: given.append(of[0]) or shape(*of))
    family, displacements = layouts.Composer.family, layouts.Composer.displacements
    monkeypatch.setattr(
        composer, "family", lambda *of: families.append(family(composer, *of)) or families[-1]
    )
    monkeypatch.setattr(
        composer, "displacements", lambda *of: laid.append(of) or displacements(composer, *of)
    )
    composer.draw_one(0.2, 0)
    ((frame, *members),), ((below, above),) = families, laid
    assert below == frame and above.tolist() == members and len(members) == 7
    assert np.array_equal(given[0].argmax(1), composer.organs[members])


def test_a_mean_shape_has_the_detail_of_one_of_its_slices():
    """Slices that lie two cells aside and one above, seen from there: worked out where they lie."""
    organs = np.stack([disc(3), disc(4), disc(3.5, 13), disc(5)])
    organs = np.pad(organs, ((0, 0), (4, 4), (4, 4)))

    def distances(slices):
        return np.stack([layouts.signed_distances(each, 2, each.shape) for each in slices])

    fields = distances(organs)
    aside = np.stack([np.full(organs[0].shape, 2.0), np.full(organs[0].shape, -1.0)])
    moved = distances([np.roll(each, (-2, 1), (0, 1)) for each in organs])
    for whose in (0, 2):
        expected = fields.mean(0) + fields[whose] - gaussian_filter(fields[whose], (0, 2, 2))
        made = layouts.mean_shape(moved, [-aside] * 4, 0 * aside, whose)
        inner = (slice(None), slice(8, -8), slice(8, -8))  # from outside the slice nothing is seen
        np.testing.assert_allclose(made[inner], expected[inner], atol=0.05)
        here = layouts.mean_shape(fields, [0 * aside] * 4, 0 * aside, whose)
        np.testing.assert_allclose(here, expected)


def test_a_layout_too_close_to_a_training_slice_is_drawn_again(monkeypatch):
    """Closer than 95 in 100 training slices are to another patient's, found by brute force."""
    known, tissue, positions, patients = patients_of_discs()
    rng = np.random.default_rng(0)
    known = np.where(rng.random(known.shape) < 0.1 + 0.02 * patients[:, None, None], 5, known)
    known[70:90][known[70:90] == 1] = 5  # without an organ
    known[-1] = PriorConfig(labels=3).classes
    monkeypatch.setattr(layouts, "REFERENCES", 40)  # every other slice
    composer = composer_of(known, tissue, positions, patients)
    slices, whose = known[:-1], patients[:-1]
    equal = [[(a == b).mean() for b in slices] for a in slices]
    np.testing.assert_allclose(layouts.equal_cells(slices, slices), equal)
    # Of every second row and column, also of those that are a cell aside.
    shifts = itertools.product((-1, 0, 1), repeat=2)
    moved = [np.roll(slices, shift, (1, 2))[:, ::2, ::2] for shift in shifts]
    few = slices[:, ::2, ::2]
    equal = [[max((m[i] == b).mean() for m in moved) for b in few] for i in range(len(slices))]
    pairs = np.stack([equal, layouts.organ_dice(slices, slices, 3)])
    nearest = np.where(whose[:, None] == whose, 0, pairs).max(2)
    expected = np.quantile(nearest[0, ::2], 0.95), np.quantile(nearest[1, :70:2], 0.95)
    np.testing.assert_allclose(composer.closest, expected)
    assert expected[0] < 0.9 and expected[1] < 1
    monkeypatch.setattr(composer, "implausible", lambda made, at: np.zeros(len(made), bool))
    found = composer.faults(slices, positions[:-1], [[0]] * len(slices))
    assert (found >= 2).all()  # whosever they are

    asked, far = [], np.zeros_like(slices[0])
    another = np.where(slices[12] == 1, 1, far)  # its disc alone: alike by organs, not by cells

    def draw_one(self, position, seed, own, first, again):
        asked.append((seed, again))
        return ([slices[12], another, far, far][again] if seed == 1 else far), far, [seed]

    monkeypatch.setattr(layouts.Composer, "draw_one", draw_one)
    assert not composer.draw([0.2] * 3, [0, 1, 2])[0].any()
    assert sorted(asked) == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    draws = []
    monkeypatch.setattr(
        layouts.Composer, "draw_one", lambda *of: draws.append(of[-1]) or (slices[12], far, [0])
    )
    assert np.array_equal(composer.draw([0.2], [0])[0][0], slices[12])  # in the end, as it is
    assert sorted(draws) == list(range(48))
    asked.clear()
    monkeypatch.setattr(layouts.Composer, "draw_one", draw_one)
    own = np.zeros_like(slices[:1])
    assert np.array_equal(composer.draw([0.2], [1], own)[0][0], slices[12]) and len(asked) == 1


def test_classes_are_measured_as_by_brute_force():
    organs = np.random.default_rng(0).integers(0, 3, (3, 24, 16))
    organs[1][organs[1] == 2] = 0
    found = layouts.measure_classes(organs, 3)
    assert found.shape == (3, 2, 5) and np.isnan(found).sum() == 5 and np.isnan(found[1, 1]).all()
    for slice_, organ in ((0, 1), (0, 2), (1, 1), (2, 1), (2, 2)):
        inside = {tuple(place) for place in np.argwhere(organs[slice_] == organ)}
        centre = np.mean(list(inside), 0)
        spread = np.mean([((place - centre) ** 2).sum() for place in np.array(list(inside))])
        steps = (0, 1), (1, 0), (0, -1), (-1, 0)
        beside = [(row + down, column + right) for row, column in inside for down, right in steps]
        outline, area = sum(place not in inside for place in beside), len(inside)
        expected = area, *centre, spread / area, outline**2 / area
        np.testing.assert_allclose(found[slice_, organ - 1], expected)


def test_a_layout_of_organs_unlike_any_near_it_is_drawn_again(monkeypatch):
    monkeypatch.setattr(organs, "NEAREST", 20)
    positions = np.linspace(0, 1, 200)
    radii = np.random.default_rng(0).uniform(3, 4, 200)
    rows = 7 + 10 * positions  # an organ that lies farther down from slice to slice
    known = np.stack([disc(*each) for each in zip(radii, rows, strict=True)])
    composer = composer_of(known, 0.5 + known, positions, np.arange(200))
    good, lower = known[100], known[180]
    ragged = good * ((ROWS + COLUMNS) % 2 | (np.hypot(ROWS - 12, COLUMNS - 8) < 3))
    parts = disc(2.4, 8) + disc(2.4, 16)
    bad = [lower, disc(3.5, 12, 11), disc(5, 12), disc(2, 12), ragged, parts, 0 * good]
    made = np.stack([good, *bad, np.maximum(good, 2 * disc(3, 3, 3))])
    assert not composer.implausible(made[:2], positions[[100, 180]]).any()
    assert composer.implausible(made, np.full(9, 0.5)).tolist() == [False] + [True] * 8
    monkeypatch.setattr(composer, "closest", np.full(2, 2))  # nothing is too close
    monkeypatch.setattr(composer, "draw_one", lambda *of: (made[8 - of[-1]], good, [0]))
    assert np.array_equal(composer.draw([0.5], [0])[0][0], good)
    bare = composer_of(4 * known, 0.5 + known, positions, np.arange(200), 0)  # regions, no organs
    assert bare.implausible(4 * made[:8], np.full(8, 0.5)).tolist() == [False] + [True] * 7


def test_a_layout_most_like_a_patient_of_whom_it_is_made_is_drawn_again(monkeypatch):
    """The nearest patient by brute force; the best of all draws is kept, and the first of these."""
    known, tissue, positions, patients = patients_of_discs()
    composer, rng = composer_of(known, tissue, positions, patients), np.random.default_rng(0)
    monkeypatch.setattr(composer, "closest", np.full(2, 2))  # nothing is too close
    monkeypatch.setattr(composer, "implausible", lambda made, at: (made == 2).any((1, 2)))
    made = np.stack([disc(radius, 11.5) for radius in rng.uniform(3, 6, 20)] + [0 * disc(1)])
    families = [rng.permutation(90)[:30:5] for _ in made]
    dice = layouts.organ_dice(made, known[:-1], 3)
    nearest = [patients[each.argmax()] for each in dice[:-1]]
    expected = [whose in patients[of] for whose, of in zip(nearest, families, strict=False)]
    assert 4 < sum(expected) < 16
    assert composer.faults(made, [0.5] * 21, families).tolist() == [*expected, False]
    other = np.where(disc(2), 2, made)  # two organs that do not occur together
    assert composer.faults(other, [0.5] * 21, families).min() >= 2
    # Of all patients with the first organ: it cannot but be most like one of them.
    everyone = [np.arange(0, 90, 10)] * 21
    assert not composer.faults(made, [0.5] * 21, everyone).any()
    some = composer.faults(made, [0.5] * 21, [np.arange(0, 80, 10)] * 21)
    assert some.tolist() == [*(patient < 8 for patient in nearest), False]
    drawn = [(np.array([draw]), made[0], [0]) for draw in range(32)]
    monkeypatch.setattr(composer, "draw_one", lambda *of: drawn[of[-1]])
    faults = np.array([3, 2, 1, 3, 1, 0, 0, 0])
    monkeypatch.setattr(composer, "faults", lambda made, *_: faults[made[:, 0]])
    for draws, best in (((0, 1, 2), 1), ((0, 1, 3), 2), ((0, 1, 2, 5), 2), ((0, 1, 2, 4, 8), 5)):
        monkeypatch.setattr(layouts, "DRAWS", draws)
        assert composer.draw([0.5], [0])[0].tolist() == [[best]]
    monkeypatch.setattr(layouts, "OF_ITS_KIND", 4)  # so many may lead back in vain
    assert composer.draw([0.5], [0])[0].tolist() == [[2]]
    faults[2] = 2
    assert composer.draw([0.5], [0])[0].tolist() == [[5]]


def test_layouts_drawn_again_keep_the_organs_that_few_patients_show():
    """In half of the slices near a position, a second organ that a quarter of the patients show."""
    known, tissue, positions, patients = patients_of_discs(16)
    known = known[:160].copy()
    known[:40] = np.where(disc(1.5, 4, 4), 2, known[:40])
    composer = composer_of(known, tissue[:160], positions[:160], patients[:160])
    first = [composer.draw_one(0.5, seed)[0] for seed in range(24)]
    expected = [(each == 2).any() for each in first]
    new, _ = composer.draw([0.5] * 24, range(24))
    assert 2 < sum(expected) < 20 and (new == 2).any((1, 2)).tolist() == expected


def test_codes_that_are_the_same_in_all_slices_say_nothing_of_likeness():
    known, tissue, positions, patients = patients_of_discs()
    maps = np.zeros((len(known), 6, 4), int)
    composer = composer_of(known, tissue, positions, patients, codes=[maps])
    plain = composer_of(known, tissue, positions, patients)
    np.testing.assert_allclose(composer.seen[:, : plain.seen.shape[1]], plain.seen)
    assert not composer.seen[:, plain.seen.shape[1] :].any()


def test_a_layout_drawn_again_starts_from_a_slice_that_is_like_the_first_one(monkeypatch):
    """Near the same position, in another order each time, and with another slice's fine detail."""
    composer = composer_of(*patients_of_discs())
    orders, family, details, shape = [], composer.family, set(), layouts.mean_shape
    monkeypatch.setattr(composer, "family", lambda *of: orders.append(of[0]) or family(*of))
    monkeypatch.setattr(layouts, "mean_shape", lambda *of: details.add(int(of[-1])) or shape(*of))
    for position in (math.nan, 0.2):
        orders.clear()
        monkeypatch.setattr(composer, "faults", lambda made, *_: np.full(len(made), 1))
        monkeypatch.setattr(layouts, "DRAWS", (0, 1, 2, 3))
        composer.draw([position], [0])
        first, *rest = orders
        frame, near = family(first, np.random.default_rng(0))[0], composer.near(position)
        near = near[near < 90]  # with its organ
        apart = ((composer.seen[near] - composer.seen[frame]) ** 2).sum(1)
        alike = near[np.argsort(apart, kind="stable")][: max(8, len(near) // 4)]
        assert sorted(rest[0]) == sorted(rest[1]) == sorted(alike)
        assert list(rest[0]) != list(rest[1])
        orders.clear()  # in the end, slices that are less alike and may show other organs
        composer.draw_one(position, 0, None, frame, layouts.OF_ITS_KIND)
        near = composer.near(position)
        apart = ((composer.seen[near] - composer.seen[frame]) ** 2).sum(1)
        second = np.argsort(apart, kind="stable")[len(near) // 4 : len(near) // 2]
        assert sorted(orders[0]) == sorted(near[second]) and list(orders[0]) != list(near[second])
        made = [composer.draw_one(position, 0, None, frame, more)[0] for more in (0, 1, 2)]
        assert len({each.tobytes() for each in made}) == 3
    assert len(details) > 1


def test_a_rebuilt_layout_has_the_organs_of_its_slice_and_tissue_of_others():
    known, tissue, positions, patients = patients_of_discs()
    tissue = tissue + np.random.default_rng(0).normal(0, 0.1, tissue.shape)
    tissue[patients == patients[3]] = 50.0  # a patient as bright as no other
    composer = composer_of(known, tissue, positions, patients)
    made = composer.rebuild(3)
    assert made.shape == (layouts.REBUILT, *known.shape[1:])
    for each in made:
        assert np.array_equal(np.where(each < 3, each, 0), np.where(known[3] < 3, known[3], 0))
    assert not (made == layouts.classes(3) - 1).any()  # as all of its own tissue would be
    assert len(np.unique(made.reshape(len(made), -1), axis=0)) > 1
    assert np.array_equal(made, composer.rebuild(3))


def test_organs_alike_by_brute_force():
    rng = np.random.default_rng(0)
    few, many = rng.integers(0, 5, (3, 6, 5)), rng.integers(0, 5, (4, 6, 5))
    few[0], many[0] = np.where(few[0] < 3, 0, few[0]), 0  # an organ that one of two lacks counts
    found = layouts.organ_dice(few, many, 4)
    for i, a in enumerate(few):
        for j, b in enumerate(many):
            pairs = [(a == organ, b == organ) for organ in (1, 2, 3)]
            scores = [2 * (x & y).sum() / (x.sum() + y.sum()) for x, y in pairs if (x | y).any()]
            assert found[i, j] == pytest.approx(np.mean(scores or [0]))
    assert not layouts.organ_dice(many[:1], many[:1], 4).any()  # no organs, nothing in common


def test_tissue_is_composed_around_organs_of_one_s_own():
    """Slices with the same organs, moved to where these lie; nothing of their own organs stays."""
    known, tissue, positions, patients = patients_of_discs()
    tissue = tissue + 1.0 * (known == 1)  # the first organ is bright
    composer = composer_of(known, tissue, positions, patients)
    drawn = disc(4, 6, 5)
    order = composer.most_alike(drawn)
    assert (known[order[:90]] == 1).any((1, 2)).all() and order[-10:].min() >= 90
    new, _ = composer.draw([0.5] * 20, range(20), [drawn] * 20)
    assert np.array_equal(np.where(new < 3, new, 0) == 1, drawn[None].repeat(20, 0) == 1)
    assert not (new == 2).any()
    bright, theirs = new > 3 + 3, disc(3, 15, 9) == 1  # where discs of the training slices lie
    around = (disc(6, 6, 5) == 1) & (drawn == 0)
    assert bright[:, theirs].mean() < 0.1 < 0.4 < bright[:, around].mean()
    assert len(np.unique(new.reshape(20, -1), axis=0)) > 1  # other tissue by other seeds
    orders, family = [], composer.family
    composer.family = lambda *of: orders.append(of[0]) or family(*of)
    composer.draw([0.0, 1.0], [0, 0], [drawn] * 2)
    assert sorted(positions[order[0]] for order in orders) == [0, 1]  # of slices that are alike
    bare, _ = composer.draw([0.5], [0], [0 * drawn])
    assert not ((bare == 1) | (bare == 2)).any()


def test_with_one_patient_or_without_masks_there_are_layouts_too():
    known, tissue, positions, patients = patients_of_discs(1)
    one = known[:10], tissue[:10], positions[:10], patients[:10]
    new, _ = composer_of(*one).draw([0.5, math.nan], [0, 1])
    assert set(np.unique(new)) <= set(range(9)) and (new == 1).any((1, 2)).all()
    bare = np.stack([layouts.compose(each, 0 * disc(1), LEVELS, 0) for each in tissue])
    composer = composer_of(bare, tissue, positions, patients, 0)
    new, _ = composer.draw([0.1] * 3, range(3))
    assert set(np.unique(new)) <= set(range(7)) and (new[:, 8:16] > 0).all()


def test_a_slice_is_laid_over_another():
    """A bright disc elsewhere and of another size, with organs or without: then they are alike."""
    rows, columns = np.mgrid[:64, :32]
    discs = ((30, 16, 9), (35, 14, 7))
    organs = np.stack([np.hypot(rows - y, columns - x) < r for y, x, r in discs]).astype(int)
    tissue = np.stack([gaussian_filter(1.0 * each, 1.5) for each in organs])
    apart = np.abs(tissue[1] - tissue[0]).mean()
    for known, labels in ((np.ones_like(organs), 0), (organs, 2)):
        composer = composer_of(known, tissue, np.zeros(2), np.arange(2), labels)
        over, same = composer.displacements(0, np.array([1, 0]))
        assert np.abs(layouts.warped(tissue[1], over) - tissue[0]).mean() < 0.4 * apart
        assert np.abs(same).max() < 1e-3


def test_the_flow_is_smoothed_as_it_is_noise_in_air(monkeypatch):
    composer = composer_of(*patients_of_discs())
    flow = np.zeros((1, 2, *composer.tissue.shape[1:]))
    flow[0, 0, 12, 8] = 50  # much farther than it can see
    monkeypatch.setattr(layouts, "optical_flow", lambda frame, others: flow)
    ahead = layouts.centre(composer.organs[1]) - layouts.centre(composer.organs[0])
    found = composer.displacements(0, np.array([1]))[0] - ahead[:, None, None]
    expected = 6 * gaussian_filter(1.0 * (flow[0, 0] > 0), 2, mode="nearest")
    assert np.abs(found - [expected, 0 * expected]).max() < 1e-9 and found.max() < 0.3


def test_the_optical_flow_is_that_of_scikit_image():
    """Also where there is nothing to see: a third of each picture is black."""
    rng = np.random.default_rng(0)
    pictures = gaussian_filter(rng.normal(size=(4, 48, 32)), (0, 3, 3)).astype(np.float32)
    pictures[:, :16] = 0
    found = layouts.optical_flow(pictures[0], pictures[1:])
    for other, flow in zip(pictures[1:], found, strict=True):
        how = {"radius": 8, "num_warp": 3, "gaussian": True}
        expected = optical_flow_ilk(pictures[0], other, **how)
        assert np.abs(expected).max() > 1 and flow == pytest.approx(expected, abs=2e-3)
    assert not layouts.optical_flow(0 * pictures[0], 0 * pictures).any()


def test_random_fields_run_straight_between_three_by_two_numbers():
    found = layouts.random_fields(np.random.default_rng(0), 5, (24, 16))
    numbers = np.random.default_rng(0).normal(size=(5, 3, 2)).clip(-2, 2)
    for field, knots in zip(found, numbers, strict=True):  # which lie in the middles of 8x8 cells
        along = [np.interp(np.arange(24), (3.5, 11.5, 19.5), each) for each in knots.T]
        expected = [np.interp(np.arange(16), (3.5, 11.5), each) for each in np.transpose(along)]
        np.testing.assert_allclose(field, expected, atol=1e-9)


def test_a_layout_of_slices_that_lie_alike_is_bent_by_a_third_of_a_cell(monkeypatch):
    """The bends are fields and a move, of unit deviation each but for what the fields smooth."""
    known, tissue, positions, _ = patients_of_discs(1)
    alike = (np.repeat(each[:1], 8, 0) for each in (known, tissue, positions))
    composer, bends, inverse = composer_of(*alike, np.arange(8)), [], layouts.inverse
    monkeypatch.setattr(layouts, "inverse", lambda x: bends.append(x) or inverse(x))
    for seed in range(40):
        composer.draw_one(0.0, seed)
    fields = layouts.random_fields(np.random.default_rng(0), 400, (24, 16))
    assert np.std(bends) == pytest.approx(0.35 * (1 + fields.var()) ** 0.5, rel=0.15)


def test_fields_are_read_between_cells_as_scipy_does():
    """Each at its own offsets, also beyond the edge."""
    rng = np.random.default_rng(0)
    fields, there = rng.normal(size=(3, 2, 24, 16)), rng.normal(0, 5, (3, 2, 24, 16))
    found = layouts.each_warped(fields, there)
    for made, pair, offsets in zip(found, fields, there, strict=True):
        at = np.stack([ROWS, COLUMNS]) + offsets
        expected = [map_coordinates(each, at, order=1, mode="nearest") for each in pair]
        np.testing.assert_allclose(made, expected, atol=1e-12)
        np.testing.assert_allclose(layouts.warped(pair[0], offsets), expected[0], atol=1e-12)


def test_the_way_back_leads_back():
    rows, columns = np.mgrid[:24, :16]
    there = np.stack([1.5 * np.sin(columns / 5), 2 * np.cos(rows / 7)])
    back = layouts.inverse(there)
    again = back + np.stack([layouts.warped(axis, back) for axis in there])
    assert np.abs(again)[:, 4:-4, 4:-4].max() < 0.02


def test_mixtures_vary_as_their_parts_do():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(20_000, 8))
    weights = np.stack([layouts.shares(rng.normal(size=8), 1.0) for _ in parts])
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (weights * parts).sum(1).std() == pytest.approx(1, abs=0.08)


def test_a_mosaic_is_as_sharp_as_its_parts_and_of_several_of_them():
    rng = np.random.default_rng(0)
    parts = np.sign(gaussian_filter(rng.normal(size=(7, 48, 32)), (0, 2, 2)))
    random = layouts.random_fields(rng, 7, (48, 32))
    new = layouts.mosaic(parts, random)
    assert (parts.min(0) - 1e-9 <= new).all() and (new <= parts.max(0) + 1e-9).all()
    assert np.abs(new).mean() > 0.75  # of 1; the mean of the seven has 0.3
    nearest = gaussian_filter((parts - new) ** 2, (0, 2, 2)).argmin(0)
    assert np.bincount(nearest.ravel(), minlength=7).max() < 0.5 * nearest.size
    one = np.repeat(parts[:1], 7, 0)
    assert layouts.mosaic(one, random) == pytest.approx(one[0])  # of equal slices, what they are
    # Where nothing is random, the one most like their mean, 3.7.
    flat = np.array([0.0, 1.0, 10.0])[:, None, None] * np.ones((3, 6, 5))
    assert np.abs(layouts.mosaic(flat, 0 * flat) - 1).max() < 0.5


@pytest.mark.parametrize("labels", [3, 0])
def test_training_layouts_are_found_a_cell_aside_and_others_are_not(labels):
    """By all cells, and where there are masks by their organs too."""
    rng = np.random.default_rng(0)

    def slices(count):
        fields, others = 5 * gaussian_filter(rng.normal(size=(2, count, 24, 16)), (0, 0, 2, 2))
        drawn = np.select([others > 0.7, others < -0.7], [1, 2]) * bool(labels)
        pairs = zip(fields, drawn, strict=True)
        return fields, np.stack([layouts.compose(*pair, LEVELS, labels) for pair in pairs])

    (tissue, known), (_, honest), (_, fresh) = slices(60), slices(200), slices(60)
    codes = {"train_layout": known[None], "train_tissue": tissue, "test_layout": honest[None]}
    prior = SimpleNamespace(config=SimpleNamespace(labels=labels))
    train = SimpleNamespace(patients=np.arange(60) % 20)
    for new, copied in ((np.roll(known, 1, 1), True), (known, True), (fresh, False)):
        masks = np.kron(np.where(new < labels, new, 0), np.ones((1, 4, 4))).astype(np.uint8)
        inputs = sample_report.Inputs(
            *(None, prior, {"train": train}, codes | {"borders": LEVELS}),
            *(Samples(None, None, None, masks), None, None),
            layouts=new,
        )
        source, queries = sample_report.layout_audit(inputs, np.arange(200), rng)
        equal = layouts.equal_cells(queries["samples"], known)
        dice = layouts.organ_dice(queries["samples"], known, labels)
        expected = (equal + dice) / 2 if labels else equal
        assert source.similarity(queries["samples"], known) == pytest.approx(expected)
        assert np.array_equal(queries["samples"], new)
        found = sample_report.search(source, queries, "layout")
        report = metrics.audit(**{name: of.similarity for name, of in found.items()})
        assert report["copies"]["share"] > 0.9 and report["honest"]["flagged"] == 2
        if copied:
            assert report["samples"]["share"] > 0.95
            assert (found["samples"].index == np.arange(60)).mean() > 0.95
        else:
            assert report["samples"]["share"] <= report["margin"]
    if labels:  # a mask without organs, on a layout with some: nothing is known of these cells
        inputs.samples.masks[:] = 0
        _, queries = sample_report.layout_audit(inputs, np.arange(200), rng)
        organ = (new > 0) & (new < labels)
        assert np.array_equal(queries["samples"][~organ], new[~organ])
        assert not np.isin(queries["samples"][organ], [*range(layouts.classes(labels) + 1)]).any()
    if labels:  # all organs are smaller than a cell
        codes["train_layout"] = np.maximum(known, labels)[None]
        inputs.codes["train_layout"] = codes["train_layout"]
        _, queries = sample_report.layout_audit(inputs, np.arange(200), rng)
        assert len(queries["copies"]) == 60


def test_masks_are_altered_as_their_slices_are():
    mask = torch.from_numpy(np.kron(disc(6, 10, 7), np.ones((4, 4)))).to(torch.uint8)[None]
    x = 2 * mask[:, None].float() - 1
    variants, indices = Variants(6, 3, Mirror()), torch.tensor([1])
    for variant in range(6):
        image = variants.images(x, variant, indices)[0, 0]
        moved = variants.masks(mask, variant, indices)[0]
        bright = image > (image.min() + image.max()) / 2
        assert (bright == (moved == 1)).float().mean() > 0.985
        assert set(moved.unique().tolist()) <= {0, 1}
    assert not variants.masks(mask, 3, indices).equal(mask)


def layout_prior():
    model = make_prior(replace(TINY, labels=3))
    top, bottom, position = random_maps(model, 2)
    generator = torch.Generator().manual_seed(5)
    layout = torch.randint(0, 3, (2, *model.bottom.shape), generator=generator)
    return model, top, bottom, position, layout


@torch.inference_mode()
def test_the_top_prior_sees_the_layout_and_the_bottom_prior_does_not():
    model, top, bottom, position, layout = layout_prior()
    variant = model.as_it_is(2)

    def nats(layout):
        return model(top, bottom, position, variant, layout, torch.Generator().manual_seed(0))

    known, other, unknown = nats(layout), nats(layout.flip(0)), nats(None)
    assert not known["top"].isclose(other["top"]).any()
    assert not known["top"].isclose(unknown["top"]).any()
    assert known["bottom"].equal(other["bottom"]) and known["bottom"].equal(unknown["bottom"])
    assert nats(torch.full_like(layout, model.config.classes))["top"].equal(unknown["top"])
    hidden = torch.rand(top.shape) < 0.5
    everything = model.top(top, model.top.context(position, variant, layout))
    at = hidden.flatten().nonzero()[:, 0]
    some = model.top(top, model.top.context(position, variant, layout), at)
    assert some.allclose(everything[hidden], atol=1e-5)


def test_samples_follow_their_layouts():
    model, _, _, position, layout = layout_prior()
    how = Sampling(passes=3), Sampling(passes=1)
    top, _ = model.sample(position, [1, 2], *how, layouts=layout)
    assert not top.equal(model.sample(position, [1, 2], *how)[0])
    assert top[1:].equal(model.sample(position[1:], [2], *how, layouts=layout[1:])[0])
    for wrong in (layout[:, 1:], layout[:1], layout + 8):
        with pytest.raises(ValueError, match="layouts of shape"):
            model.sample(position, [1, 2], *how, layouts=wrong)


@torch.inference_mode()
def test_guidance_adds_to_the_logits_what_the_layout_changes_in_them():
    model, _, _, position, layout = layout_prior()
    hidden = torch.full((2, *model.top.shape), model.config.K)
    contexts = (model.top.context(position, model.as_it_is(2), given) for given in (layout, None))
    known, unknown = (model.top(hidden, context) for context in contexts)
    # It can make a difference.
    assert not known.argmax(-1).equal((known + 3 * (known - unknown)).argmax(-1))
    for guidance in (0.0, 0.5, 3.0):
        how = Sampling(passes=1, temperature=0, guidance=guidance), Sampling(passes=1)
        top, _ = model.sample(position, [1, 2], *how, layouts=layout)
        assert top.equal((known + guidance * (known - unknown)).argmax(-1))
        assert model.sample(position, [1, 2], *how)[0].equal(unknown.argmax(-1))
