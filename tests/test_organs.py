"""Drawn shapes measured by hand, plausible and broken ones, and a segmenter that learns."""

import copy

import numpy as np
import pytest
import torch

from dataset import Mirror
from new_slices import organs
from support import runtime

AREA, ROW, COLUMN, PIECES, HOLES, SOLIDITY, ASYMMETRY, ROUGHNESS = range(8)


def disc(row, column, radius, shape=(64, 48)):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(rows - row, columns - column) < radius


def test_measurements_by_hand():
    mask = np.zeros((64, 48), np.uint8)
    mask[10:20, 5:25] = 1  # a rectangle with a hole, and a hole that is too small to count
    mask[12:16, 8:12], mask[12:14, 20:22] = 0, 0
    mask[40:50, 5:15], mask[40:45, 15:25] = 2, 2  # an L, a second piece, and a speck
    mask[55:60, 30:40], mask[30, 40] = 2, 2
    mask[0, 0] = organs.NO_MASK
    ((one, two, three),) = organs.measure(mask[None], 4)
    assert one[[AREA, PIECES, HOLES]].tolist() == [180, 1, 1]
    assert one[SOLIDITY] == pytest.approx(180 / 200)
    rows, columns = np.nonzero(mask == 1)
    assert one[[ROW, COLUMN]].tolist() == pytest.approx([rows.mean(), columns.mean()])
    assert two[[AREA, PIECES, HOLES]].tolist() == [200, 2, 0]
    rows, columns = np.nonzero((mask == 2) & (np.arange(64) > 35)[:, None])
    assert two[[ROW, COLUMN]].tolist() == pytest.approx([rows.mean(), columns.mean()])
    assert np.isnan(three).all()


def test_asymmetry():
    """An organ that is its own mirror image along axis 0 has none; an L's foot is not covered."""
    mask = np.zeros((2, 64, 48), np.uint8)
    mask[0][disc(30, 20, 12)] = 1
    mask[1, 10:30, 5:10], mask[1, 25:30, 10:15] = 1, 1
    symmetric, skew = organs.measure(mask, 2)[:, 0, ASYMMETRY]
    assert symmetric == 0 and skew == pytest.approx(25 / 125)


def test_roughness_of_the_outline():
    """4 pi for a disc, 16 for a square; a ring has two outlines, a ragged shape a long one."""
    mask = np.zeros((4, 64, 48), np.uint8)
    mask[0][disc(30, 20, 15)], mask[1, 10:30, 5:25] = 1, 1
    mask[2][disc(30, 20, 15) & ~disc(30, 20, 10)] = 1
    mask[3, 10:30:2, 5:25], mask[3, 10:30, 5] = 1, 1  # a comb
    found = organs.measure(mask, 2)[:, 0, ROUGHNESS]
    assert found[0] == pytest.approx(4 * np.pi, rel=0.1) and found[1] == pytest.approx(76**2 / 400)
    outlines, area = 2 * np.pi * (15 + 10), np.pi * (15**2 - 10**2)
    assert found[2] == pytest.approx(outlines**2 / area, rel=0.1)
    assert found[3] > 5 * found[1]


def bodies(n, seed=0):
    """Slices of a body with two heads, which the position moves and grows."""
    rng = np.random.default_rng(seed)
    positions, masks = rng.random(n).astype(np.float32), np.zeros((n, 64, 48), np.uint8)
    for mask, position in zip(masks, positions, strict=True):
        jitter = rng.normal(0, 0.5, 4)
        mask[disc(32 + jitter[0], 24, 20 + jitter[1])] = 1
        if position > 0.3:
            for side in (-1, 1):
                mask[disc(32 + side * 10, 16 + 12 * position + jitter[2], 3 + 3 * position)] = 2
    return positions, masks


def test_plausible_slices_are_told_from_broken_ones():
    positions, masks = bodies(500)
    real = organs.measure(masks, 3)
    asked, fresh = bodies(60, seed=1)

    def share(masks, positions=asked):
        together, fine = organs.plausible(
            organs.measure(masks, 3), positions, real, positions_of_real
        )
        return (together & fine.all(1)).mean()

    positions_of_real = positions
    assert share(fresh) > 0.75
    assert share(masks, positions) > 0.8
    shown = asked > 0.4
    halves = fresh.copy()
    halves[:, :32][halves[:, :32] == 2] = 1  # one head only
    assert share(halves[shown], asked[shown]) == 0
    moved = np.roll(fresh, 8, axis=2)
    assert share(moved) < 0.05
    elsewhere = 1 - asked
    assert share(fresh, elsewhere) < 0.35  # the right slice in the wrong place
    # Unknown positions: all are near.
    assert share(fresh, np.full(len(fresh), np.nan)) > share(fresh) - 0.05
    holed = fresh.copy()
    holed[:, 30:34, 35:39] = 0
    assert share(holed) < 0.05
    rare = fresh.copy()
    # Heads where there are none.
    rare[asked < 0.2] = np.where(disc(32, 24, 5), 2, rare[asked < 0.2])
    together, _ = organs.plausible(organs.measure(rare, 3), asked, real, positions)
    assert not together[asked < 0.04].any() and together[asked > 0.4].all()


def test_a_rare_organ_is_compared_with_the_nearest_that_show_it():
    """Of 1,000 slices one in 20 shows it: 128 of these are all, however far away."""
    real, positions = np.full((1000, 1, 8), np.nan), np.linspace(0, 1, 1000)
    real[::20] = 1.0
    real[20] = 3.0
    _, fine = organs.plausible(np.full((1, 1, 8), 3.0), np.array([0.9]), real, positions)
    assert fine.all()
    _, fine = organs.plausible(np.full((1, 1, 8), 4.0), np.array([0.9]), real, positions)
    assert not fine.any()
    # Of 500 others the highest and the lowest one in 100 say nothing.
    real, positions = np.tile(np.arange(500.0)[:, None, None], (1, 1, 8)), np.full(500, np.nan)
    measured = np.tile(np.array([3.0, 4, 494, 495])[:, None, None], (1, 1, 8))
    _, fine = organs.plausible(measured, np.full(4, np.nan), real, positions)
    assert fine[:, 0].tolist() == [False, True, True, False]
    # Of many scans of few people a tenth counts, or the nearest 128 would be of the first people.
    real = np.tile(np.repeat(np.arange(40.0), 50)[:, None, None], (1, 1, 8))
    positions = np.full(2000, 0.5)
    positions[200:] += 0.01
    _, fine = organs.plausible(np.full((1, 1, 8), 3.5), np.array([0.5]), real, positions)
    assert not fine.any()
    positions[200:] -= 0.01
    _, fine = organs.plausible(np.full((1, 1, 8), 3.0), np.array([0.5]), real, positions)
    assert fine.all()


def test_kinds_of_slices_that_never_mix():
    """Two kinds of study in one: both are plausible, one with an organ of the other is not."""
    _, masks = bodies(600)
    kinds = np.arange(600) % 2 == 0
    masks[kinds] = np.where(masks[kinds] > 0, masks[kinds] + 2, 0)  # 3 and 4 instead of 1 and 2
    unknown = np.full(600, np.nan, np.float32)
    measured = organs.measure(masks, 5)
    together, fine = organs.plausible(measured, unknown, measured, unknown)
    assert (together & fine.all(1)).mean() > 0.85
    chimera = masks[~kinds][:50].copy()
    chimera[:, 28:36, 20:28] = 3
    together, _ = organs.plausible(organs.measure(chimera, 5), unknown[:50], measured, unknown)
    assert not together.any()


def test_dice_by_hand():
    truth, found = np.zeros((2, 3, 4, 4), np.uint8)
    truth[0, :2], found[0, :1] = 1, 1  # 8 and 4 pixels, 4 shared
    truth[1, :2], found[1, 2:] = 1, 1  # the same patient: 8 and 8, none shared
    truth[2], found[2] = 2, 2
    truth[2, 0], found[2, 0] = organs.NO_MASK, 1
    names, scores = organs.dice_by_patient(found, truth, ["b", "b", "a"], 3)
    assert names.tolist() == ["a", "b"]
    np.testing.assert_allclose(scores, [[np.nan, 1], [8 / 28, np.nan]])


def shuffled(masks, organ, seed=0):
    """The 4x4 blocks of one organ's bounding box in another order: wrong on purpose."""
    rng, masks = np.random.default_rng(seed), masks.copy()
    for mask in masks:
        ends = (
            (axis.min() // 4 * 4, axis.max() // 4 * 4 + 4) for axis in np.nonzero(mask == organ)
        )
        rows, columns = (slice(*each) for each in ends)
        box = mask[rows, columns] == organ
        h, w = np.array(box.shape) // 4
        blocks = box.reshape(h, 4, w, 4).swapaxes(1, 2).reshape(-1, 4, 4)
        blocks = rng.permutation(blocks).reshape(h, w, 4, 4).swapaxes(1, 2)
        mask[mask == organ] = 0
        mask[rows, columns][blocks.reshape(box.shape)] = organ
    return masks


def ovals(n, seed):
    """Masks of a large and a small oval whose size and place vary."""
    rng, masks = np.random.default_rng(seed), np.zeros((n, 64, 48), np.uint8)
    rows, columns = np.mgrid[:64, :48]
    for mask in masks:
        for organ, row, size in ((1, 20, 13), (2, 48, 8)):
            a, b = size + rng.uniform(-2, 2, 2)
            row, column = row + rng.uniform(-2, 2), 24 + rng.uniform(-4, 4)
            mask[((rows - row) / a) ** 2 + ((columns - column) / b) ** 2 < 1] = organ
    return masks


@pytest.mark.parametrize("wrong", [1, 2])
def test_an_organ_that_was_not_learnt_is_named_and_no_other(wrong):
    """A mean over organs stays high beside one that is a heap of blocks; its roughness does not."""
    truth, train = ovals(30, 0), ovals(100, 1)
    drawn = np.roll(truth, 1, axis=1)  # as a network that is a pixel off
    fine = organs.judge_masks(drawn, truth, train, (0, 5, 9))
    assert not organs.not_learnt(fine) and min(v["dice"] for v in fine.values()) > 0.9
    found = organs.judge_masks(shuffled(drawn, wrong), truth, train, (0, 5, 9))
    bad, good = ("label_5", "label_9") if wrong == 1 else ("label_9", "label_5")
    assert found[bad]["dice"] > 0.4 and not found[good]["faults"]
    assert found[bad]["roughness"]["masks"] > 2 * found[bad]["roughness"]["real"]
    line = organs.not_learnt(found)
    assert line.startswith(f"{bad} was not learnt (") and good not in line and "roughness" in line


def test_an_organ_with_half_of_its_pieces_is_named():
    """Two heads in all real masks, one in those that are judged."""
    _, real = bodies(40)
    real = real[[(mask == 2).any() for mask in real]]
    one = real.copy()
    one[:, :32][one[:, :32] == 2] = 1
    found = organs.judge_masks(one, real, real, (0, 1, 2))
    assert "label_2 was not learnt (pieces 1, in real masks 2 to 2" in organs.not_learnt(found)


def test_masks_without_an_organ():
    """No Dice of 1 where nobody shows the organ; one of 0 where only the real masks do."""
    both = ovals(10, 0)
    one = np.where(both == 2, 0, both)
    never, invented, missed = (
        organs.judge_masks(masks, truth, both, (0, 5, 9))
        for masks, truth in ((one, one), (both, one), (one, both))
    )
    assert never["label_9"]["dice"] is invented["label_9"]["dice"] is None
    assert not never["label_9"]["faults"] and never["label_9"]["roughness"]["masks"] is None
    assert (
        missed["label_9"] | {"dice": 0.0, "faults": ["Dice over all slices 0.000"]}
        == missed["label_9"]
    )
    assert missed["label_5"]["dice"] == 1 and not missed["label_5"]["faults"]


class Split:
    """What `segmenter_of` reads: bright discs of two kinds, some slices without a mask."""

    synthetic = True

    labels, fingerprint, mirror = (0, 3, 7), "abc", Mirror()

    def __init__(self, n=64, seed=0):
        rng = np.random.default_rng(seed)
        self.has_mask = np.arange(n) % 4 > 0
        self.truth, self.pixels = np.zeros((n, 64, 48), np.uint8), np.zeros((n, 64, 48), np.float32)
        for i in range(n):
            for kind in (1, 2):
                where = disc(28 * kind - 12 + rng.uniform(-4, 4), rng.uniform(12, 36), 5 + kind)
                self.truth[i][where], self.pixels[i][where] = kind, 3 - kind
        self.pixels += 0.2 * rng.normal(size=self.pixels.shape).astype(np.float32)

    def images(self, indices):
        return torch.from_numpy(self.pixels[indices])[:, None]

    def masks(self, indices):
        assert self.has_mask[indices].all()
        return torch.from_numpy(self.truth[indices])


def test_a_segmenter_learns_and_is_kept(tmp_path, monkeypatch, capsys):
    split, test = Split(), Split(seed=1)
    train = organs.train_segmenter
    monkeypatch.setattr(organs, "train_segmenter", lambda *a, **k: train(*a[:4], 120, **k))
    drawn = torch.random.get_rng_state()
    net = organs.segmenter_of(split, tmp_path / "a", tmp_path / "b")
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert "training a U-Net on 48 slices with masks" in capsys.readouterr().out
    found = organs.segment(net, test.pixels)
    assert found.dtype == np.uint8 and found.shape == test.truth.shape
    _, scores = organs.dice_by_patient(found, test.truth, np.zeros(64), 3)
    assert scores.min() > 0.8
    monkeypatch.setattr(organs, "train_segmenter", lambda *a, **k: pytest.fail("trained again"))
    assert not (tmp_path / "b").exists()
    again = organs.segmenter_of(split, tmp_path / "b", tmp_path / "a")  # wherever it is found
    np.testing.assert_array_equal(organs.segment(again, test.pixels), found)
    mirrored, other, broken = (copy.copy(split) for _ in range(3))
    mirrored.mirror, other.fingerprint = Mirror(-2, ((1, 2),)), "other slices"
    for changed in (mirrored, other, broken):  # other slices than these were learnt
        if changed is broken:
            runtime.write_text(tmp_path / "a" / organs.SEGMENTER_FILE, "rubbish")
        with pytest.raises(pytest.fail.Exception):
            organs.segmenter_of(changed, tmp_path / "a")


def test_a_segmenter_learns_from_mirrored_slices_with_their_masks(monkeypatch):
    """An organ lies under its mask in every slice, and the one in the upper half is always 1."""
    truth = np.zeros((16, 64, 48), np.uint8)
    for i, mask in enumerate(truth):
        mask[disc(16, 12 + i, 6)], mask[disc(50, 30 - i, 6)] = 1, 2
    images, masks = [], []
    forward, losses = organs.Segmenter.forward, organs.mask_losses
    look = lambda net, x: images.append(x) or forward(net, x)  # noqa: E731
    monkeypatch.setattr(organs.Segmenter, "forward", look)
    monkeypatch.setattr(organs, "mask_losses", lambda x, of: masks.append(of) or losses(x, of))

    def pairs(indices):
        masks = torch.from_numpy(truth[indices])
        return 100 * (masks > 0).float()[:, None], masks

    organs.train_segmenter(pairs, 16, 3, Mirror(-2, ((1, 2),)), steps=6)
    assert [len(batch) for batch in images] == [8] * 6
    images, masks = torch.cat(images), torch.cat(masks)
    middle = (images.amax((2, 3), keepdim=True) + images.amin((2, 3), keepdim=True)) / 2
    assert torch.equal(images[:, 0] > middle[:, 0], masks > 0)
    assert (masks[:, :32] < 2).all() and (masks[:, 32:] != 1).all()
    rows = (masks == 1).sum(2).argmax(1)
    assert len(set(rows.tolist())) == 2  # some are mirrored and some are not
    # Every slice has a gain, an offset and a noise of its own.
    shown, dark = (masks > 0).numpy(), images[:, 0].numpy()
    dark, bright = ([x[at == kind] for x, at in zip(dark, shown, strict=True)] for kind in (0, 1))
    offsets, noises = (np.array([of(x) for x in dark]) for of in (np.mean, np.std))
    gains = np.array([x.mean() for x in bright]) / 100
    for found, mean, deviation in ((gains, 1, 0.2), (offsets, 0, 0.2), (noises, 0.05, 0.029)):
        assert found.mean() == pytest.approx(mean, abs=0.6 * deviation)
        assert found.std() == pytest.approx(deviation, rel=0.35)
    assert abs(np.corrcoef(gains, offsets)[0, 1]) < 0.5 and noises.max() < 0.105


def test_every_step_follows_the_gradient_of_its_own_batch(monkeypatch):
    """Here it is always one a pixel; the rate rises for a fifth of the steps, and falls to 0."""
    seen, step = [], torch.optim.AdamW.step

    def look(self):
        group = self.param_groups[0]  # of which the last weight is the bias of the logits
        seen.append((group["params"][-1].grad.unique().item(), group["lr"]))
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    monkeypatch.setattr(organs, "mask_losses", lambda logits, _: {"loss": logits.sum()})
    pairs = lambda i: (torch.randn(8, 1, 32, 16), torch.zeros(8, 32, 16))  # noqa: E731
    organs.train_segmenter(pairs, 8, 2, Mirror(), steps=20)
    gradients, rates = zip(*seen, strict=True)
    assert gradients == (8 * 32 * 16 / 4**2,) * 20  # of each pixel of a block
    assert np.argmax(rates) in (3, 4) and max(rates) == pytest.approx(1e-2, rel=0.02)
    assert rates[0] == pytest.approx(1e-2 / 25) and rates[-1] < 1e-4


def test_a_folder_that_may_only_be_read_costs_nothing(tmp_path, monkeypatch, capsys):
    """The U-Net is kept in the next folder, or not at all; what was computed is not lost."""
    split, train, save = Split(), organs.train_segmenter, runtime.save_checkpoint
    monkeypatch.setattr(organs, "train_segmenter", lambda *a, **k: train(*a[:4], 1, **k))

    def denied(path, checkpoint):
        if "shared" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        save(path, checkpoint)

    monkeypatch.setattr(runtime, "save_checkpoint", denied)
    organs.segmenter_of(split, tmp_path / "shared", tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*.pth")] == [organs.SEGMENTER_FILE]
    assert "is not kept" not in capsys.readouterr().out
    assert isinstance(organs.segmenter_of(split, tmp_path / "shared"), organs.Segmenter)
    assert "is not kept" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(64, 32), (40, 24), (256, 128)])
def test_any_size(shape):
    assert organs.Segmenter(5, 8).eval()(torch.zeros(1, 1, *shape)).shape == (1, 5, *shape)


@pytest.mark.filterwarnings("error")
def test_means_are_of_what_is_known():
    rows = np.array([[1, np.nan, 3], [np.nan] * 3])
    np.testing.assert_array_equal(organs.mean_of_known(rows), [2, np.nan])
    assert organs.mean_of_known(rows[0]) == 2 and np.isnan(organs.mean_of_known(rows[1]))
