"""Layouts by brute force, and what the priors make of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_prior import TINY, make_prior, random_maps

from dataset import NO_MASK, Mirror
from modules import VQVAE2, VQVAE2Config
from new_slices import layouts
from new_slices.code_maps import Variants, decode
from new_slices.prior import Sampling

ROWS, COLUMNS = np.mgrid[:24, :16]


def disc(radius: float, row: float = 12, column: float = 8) -> np.ndarray:
    return (np.hypot(ROWS - row, COLUMNS - column) < radius).astype(np.int64)


def test_a_layout_is_the_class_in_the_middle_of_each_cell():
    masks = torch.randint(0, 3, (2, 16, 8), dtype=torch.uint8)
    masks[1] = NO_MASK
    found = layouts.layouts_of(masks, (4, 2), 3)
    assert found.shape == (2, 4, 2) and (found[1] == 3).all()
    for row in range(4):
        for column in range(2):
            assert found[0, row, column] == masks[0, 4 * row + 2, 4 * column + 2]


def test_signed_distances_by_brute_force():
    layout = np.random.default_rng(0).integers(0, 3, (6, 5))
    found = layouts.signed_distances(layout, 4)
    places = np.argwhere(np.ones_like(layout))
    for label in range(3):
        for place in places:
            inside = layout[tuple(place)] == label
            others = places[(layout[tuple(places.T)] == label) != inside]
            nearest = np.linalg.norm(others - place, axis=1).min()
            assert found[label][tuple(place)] == pytest.approx(nearest if inside else -nearest)
    assert (found[3] == -11).all()  # it is nowhere


def test_between_two_discs_lies_a_disc_of_the_radius_between():
    small, large = disc(3), disc(7)
    assert np.array_equal(layouts.blend(small, large, 1, 2).argmax(0), small)
    assert np.array_equal(layouts.blend(small, large, 0, 2).argmax(0), large)
    between = layouts.blend(small, large, 0.5, 2).argmax(0)
    assert np.count_nonzero(between != disc(5)) <= 4
    nothing = np.zeros_like(small)
    assert not layouts.blend(nothing, nothing, 0.3, 2).argmax(0).any()


def test_a_moved_layout_is_the_same_shape_elsewhere_and_larger():
    distances = layouts.signed_distances(disc(5, 11.5, 7.5), 2)
    still = layouts.moved(distances, np.zeros(2), np.ones(2))
    assert np.allclose(still, distances)
    aside = layouts.moved(distances, np.array([2, -1]), np.ones(2)).argmax(0)
    assert np.array_equal(aside, disc(5, 13.5, 6.5))
    rows, columns = np.nonzero(layouts.moved(distances, np.zeros(2), np.array([1.4, 1])).argmax(0))
    # 14 by 10 cells, where it was 10 by 10
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 18, 3, 12)


def test_a_mask_is_drawn_from_its_codes_and_its_layout(monkeypatch):
    """A class that codes and layout agree on wins; where the codes tell nothing the layout does,
    and the reverse.
    """
    torch.manual_seed(0)
    model = VQVAE2(
        VQVAE2Config(K=8, D=4, channels=8, top_channels=8, residual_channels=4, labels=3)
    ).eval()
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
    assert np.array_equal(
        decode(model, *codes, layout)[1], mask
    )  # a guess of theirs does not outweigh it
    with torch.inference_mode():
        p = layouts.likely(layout, 3, 96, 64).exp() - layouts.DOUBT
    torch.testing.assert_close(p.sum(1), torch.ones(1, 96, 64))


def training_layouts():
    """Three patients: discs of class 1 in two of them, of class 2 in the third; and one slice
    without a mask.
    """
    maps = [disc(3 + number / 4, 12 + patient) for patient in range(2) for number in range(10)]
    maps += [2 * disc(4) for _ in range(10)]
    maps += [np.full_like(maps[0], 3)]
    positions = np.append(np.tile(np.linspace(0, 1, 10), 3), 0.5)
    return np.stack(maps), positions, np.append(np.repeat([4, 5, 6], 10), 4)


def test_a_new_layout_lies_between_two_patients_with_the_same_organs(monkeypatch):
    maps, positions, patients = training_layouts()
    astray = layouts.draw(maps, positions, patients, 3, [0.0] * 200, range(200))
    rows = np.array([np.nonzero(new)[0].mean() for new in astray.layouts])
    between = [layouts.blend(maps[a], maps[b], s, 3) for (a, b), s in zip(*astray[1:], strict=True)]
    shifts = rows - [np.nonzero(distances.argmax(0))[0].mean() for distances in between]
    assert abs(shifts.mean()) < 0.15 and 0.3 < shifts.std() < 0.7
    monkeypatch.setattr(layouts, "SHIFT", 0.0)
    monkeypatch.setattr(layouts, "STRETCH", 0.0)
    at = [0.0] * 20 + [1.0] * 20
    drawn = layouts.draw(maps, positions, patients, 3, at, range(40))
    assert drawn.layouts.shape == (40, 24, 16) and drawn.layouts.dtype == np.int64
    for new, (first, second), share, position in zip(*drawn, at, strict=True):
        assert abs(positions[first] - position) < 0.3 and 30 not in (first, second)
        assert set(np.unique(maps[first])) == set(np.unique(maps[second])) == set(np.unique(new))
        assert patients[first] != patients[second] or (patients[first] == 6 and first == second)
        assert np.array_equal(new, layouts.blend(maps[first], maps[second], share, 3).argmax(0))
    assert len(np.unique(drawn.parents[:, 0])) > 5
    alone = layouts.draw(maps, positions, patients, 3, [1.0], [33])
    assert np.array_equal(alone.layouts[0], drawn.layouts[33])  # whatever the others are
    anywhere = layouts.draw(maps, positions, patients, 3, [math.nan] * 60, range(60))
    assert len(np.unique(positions[anywhere.parents[:, 0]])) == 10


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
    layout = torch.randint(
        0, 3, (2, *model.bottom.shape), generator=torch.Generator().manual_seed(5)
    )
    return model, top, bottom, position, layout


@torch.inference_mode()
def test_the_top_prior_sees_the_layout_and_the_bottom_prior_does_not():
    model, top, bottom, position, layout = layout_prior()
    variant = model.as_it_is(2)

    def nats(layout):
        return model(top, bottom, position, variant, layout, torch.Generator().manual_seed(0))

    known, other, unknown = nats(layout), nats(layout.flip(0)), nats(None)
    assert (
        not known["top"].isclose(other["top"]).any()
        and not known["top"].isclose(unknown["top"]).any()
    )
    assert known["bottom"].equal(other["bottom"]) and known["bottom"].equal(unknown["bottom"])
    assert nats(torch.full_like(layout, 3))["top"].equal(unknown["top"])
    hidden = torch.rand(top.shape) < 0.5
    everything = model.top(top, model.top.known(position, variant, layout))
    some = model.top(top, model.top.known(position, variant, layout), at=hidden)
    assert some.allclose(everything[hidden], atol=1e-5)


def test_samples_follow_their_layouts():
    model, _, _, position, layout = layout_prior()
    how = Sampling(passes=3), Sampling(passes=1)
    top, _ = model.sample(position, [1, 2], *how, layouts=layout)
    assert not top.equal(model.sample(position, [1, 2], *how)[0])
    assert top[1:].equal(model.sample(position[1:], [2], *how, layouts=layout[1:])[0])
    for wrong in (layout[:, 1:], layout[:1], layout + 2):
        with pytest.raises(ValueError, match="layouts of shape"):
            model.sample(position, [1, 2], *how, layouts=wrong)


@torch.inference_mode()
def test_guidance_adds_to_the_logits_what_the_layout_changes_in_them():
    model, _, _, position, layout = layout_prior()
    hidden = torch.full((2, *model.top.shape), model.config.K)
    known, unknown = (
        model.top(hidden, model.top.known(position, model.as_it_is(2), given))
        for given in (layout, None)
    )
    assert not known.argmax(-1).equal(
        (known + 3 * (known - unknown)).argmax(-1)
    )  # it can make a difference
    for guidance in (0.0, 0.5, 3.0):
        how = Sampling(passes=1, temperature=0, guidance=guidance), Sampling(passes=1)
        top, _ = model.sample(position, [1, 2], *how, layouts=layout)
        assert top.equal((known + guidance * (known - unknown)).argmax(-1))
        assert model.sample(position, [1, 2], *how)[0].equal(unknown.argmax(-1))
