"""Stage two: the priors trained on the codes of a small autoencoder, by the same loop."""

import copy
import json
import math
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import command
from test_predict import study_of, write_checkpoint
from test_train import assert_same, fit

import generate
import train_prior
from dataset import DataConfig, Mirror, SliceDataset, open_trained_study
from modules import load_model
from new_slices import code_maps
from new_slices.code_maps import Variants, extract_codes
from new_slices.layouts import REBUILT, depths_of, layouts_of, smoothed, tissue_borders
from new_slices.prior import Prior, PriorConfig
from support import runtime, trainer
from support.runtime import UserError

TINY = PriorConfig(prior_channels=16, prior_heads=2, prior_top_layers=1, prior_bottom_layers=1)


@pytest.fixture(scope="module")
def autoencoder(study, tmp_path_factory):
    return fit(study, tmp_path_factory.mktemp("one"), epochs=1)


def stage_of(autoencoder, out, prior=TINY, seed=0, **codes) -> train_prior.CodePriors:
    """The stage of a small prior of this autoencoder, before its first epoch."""
    codes = train_prior.CodesConfig(checkpoint=str(autoencoder), **codes)
    config = trainer.TrainConfig(out=str(out), device="cpu", batch_size=4, seed=seed)
    settings = train_prior.Settings(codes=codes, prior=prior, train=config)
    return train_prior.CodePriors(settings)


def fit_prior(autoencoder, out, epochs=1, checkpoint=None, **settings):
    settings = {"batch_size": 4, "device": "cpu", "lr": 1e-3, **settings}
    config = trainer.TrainConfig(out=str(out), epochs=epochs, **settings)
    codes = train_prior.CodesConfig(checkpoint=str(autoencoder))
    return train_prior.train_prior(
        train_prior.Settings(codes=codes, prior=TINY, train=config, checkpoint=checkpoint)
    )


def model_and_splits(autoencoder):
    trained = load_model(autoencoder)
    return trained.model, open_trained_study(trained.study, DataConfig(), autoencoder)


def test_codes_are_the_autoencoder_s_and_kept_for_it_alone(autoencoder, tmp_path):
    fit_prior(autoencoder, tmp_path)
    model, splits = model_and_splits(autoencoder)
    with np.load(tmp_path / "codes.npz") as kept, torch.inference_mode():
        for name, split in splits.items():
            for i in range(len(split)):
                x = split.images([i])
                for variant, altered in enumerate((x, x.flip(2)) if name == "train" else (x,)):
                    for level, codes in zip(("top", "bottom"), model.encode(altered), strict=True):
                        assert np.array_equal(kept[f"{name}_{level}"][variant, i], codes[0])
                if name == "train":  # of the slice as it is, without its mirror image's
                    tissue = smoothed(x, kept["train_tissue"].shape[1:])[0]
                    assert kept["train_tissue"][i] == pytest.approx(tissue, abs=1e-6)
                    assert not kept["train_depths"][i].any()  # without masks
    digest = runtime.sha256(autoencoder)
    read = extract_codes(None, splits, 2, digest, tmp_path / "codes.npz")
    assert read["train_top"].shape == (2, 14, 8, 4)  # read, for no model was there
    assert read["validate_top"].shape == (1, 5, 8, 4)
    # Another autoencoder, other variants, other slices of any split: made anew.
    for variants, other in ((2, "other"), (3, digest)):
        with pytest.raises(AttributeError):
            extract_codes(None, splits, variants, other, tmp_path / "codes.npz")
    for name, split in splits.items():
        changed = copy.copy(split)
        changed.fingerprint = "other"
        with pytest.raises(AttributeError):
            extract_codes(None, splits | {name: changed}, 2, digest, tmp_path / "codes.npz")
    turned = copy.copy(splits["train"])  # its affines were corrected: it is mirrored otherwise
    for changed in ({"axis": -1}, {"partners": ((1, 2),)}):
        turned.mirror = replace(splits["train"].mirror, **changed)
        with pytest.raises(AttributeError):
            extract_codes(None, splits | {"train": turned}, 2, digest, tmp_path / "codes.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").replace(tmp_path / "codes.npz")  # somebody else's
    with pytest.raises(AttributeError):
        extract_codes(None, splits, 2, digest, tmp_path / "codes.npz")


def test_variants_are_altered_as_their_numbers_say(autoencoder):
    _, splits = model_and_splits(autoencoder)
    x, indices = splits["train"].images(range(6)), torch.arange(6)
    variants = Variants(4, 14, Mirror())
    assert not variants.numbers[0].any() and (variants.numbers[1, :, 0] == 1).all()
    assert variants.images(x, 0, indices).equal(x)
    assert variants.images(x, 1, indices).equal(x.flip(2))
    altered = variants.images(x, 2, indices)
    assert altered.mean((1, 2, 3)).abs().max() < 1e-4
    assert (altered.std((1, 2, 3)) - 1).abs().max() < 1e-2
    assert variants.images(x[3:5], 2, indices[3:5]).equal(altered[3:5])  # whatever the batch
    # Pure shading: a smooth factor whose logarithm is 0.15 times the field.
    variants.fields[:, :, :2], variants.numbers[2] = 0, torch.tensor([0.0, 1, 0, 0, 0, 0, 0])
    field = Variants.smooth(x, variants.fields[2, indices, 2:])
    corners = variants.fields[2, indices, 2, -1, -1]
    assert field[:, 0, -1, -1].numpy() == pytest.approx(corners.numpy(), abs=1e-5)
    shaded = (x - x.amin((2, 3), keepdim=True)) * torch.exp(0.15 * field)
    shaded = (shaded - shaded.mean((2, 3), keepdim=True)) / shaded.std((2, 3), keepdim=True)
    assert (shaded - x).abs().max() > 0.3 and 0.5 < field.std() < 1.5
    assert variants.images(x, 2, indices).numpy() == pytest.approx(shaded.numpy(), abs=2e-3)
    # One pure shift: the content moves by whole pixels.
    variants.fields.zero_()
    variants.numbers[2] = torch.tensor([0, 1, 0.5, -0.25, 0, 0, 0])
    shifted = variants.images(x, 2, indices)
    rows, columns = round(code_maps.SHIFT * 0.5), round(code_maps.SHIFT * -0.25)
    expected = x[:, :, 10 + rows : 50 + rows, 8 + columns : 24 + columns].flatten()
    found = shifted[:, :, 10:50, 8:24].flatten()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9999
    variants.numbers[2] = torch.tensor([1.0, 1, 0, 0, 0, 0, 0])
    assert variants.images(x, 2, indices).numpy() == pytest.approx(x.flip(2).numpy(), abs=1e-4)


def test_a_slice_is_shifted_turned_stretched_and_bent_as_far_as_is_said():
    """A slice of row numbers, then of column numbers: each pixel tells where its value was."""
    rows, columns = np.mgrid[:64, :48] - np.array([31.5, 23.5])[:, None, None]
    variants, one = Variants(3, 400, Mirror()), torch.tensor([0])

    def moved(numbers, indices=one):
        variants.numbers[2] = torch.tensor([0.0, 1, *numbers])
        x = torch.tensor(np.stack([rows, columns])[:, None]).float().repeat(1, len(indices), 1, 1)
        found = [variants.moved(each[:, None], 2, indices, "bilinear")[:, 0].numpy() for each in x]
        return np.stack(found)[:, :, 20:44, 16:32]  # not what comes from beyond the edges

    inner = rows[20:44, 16:32], columns[20:44, 16:32]
    bends = moved([0] * 5, torch.arange(400)) - np.stack(inner)[:, None]
    spread = variants.fields[2, :, :2, 2].std().item()  # of the random numbers in the middle
    assert bends.std((1, 2, 3)) == pytest.approx(np.full(2, 2 * spread), rel=0.25)
    assert abs(np.corrcoef(*bends[..., 12, 8])[0, 1]) < 0.2
    variants.fields.zero_()
    for numbers in ([1, -0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, -1, 0.5], [0.5, 1, -1, 1, 1]):
        down, right, turn, high, wide = np.array(numbers) * [8, 8, 0.06, 0.08, 0.08]
        turned_r = np.cos(turn) * inner[0] - np.sin(turn) * inner[1]
        turned_c = np.sin(turn) * inner[0] + np.cos(turn) * inner[1]
        expected = turned_r * (1 + high) + down, turned_c * (1 + wide) + right
        assert moved(numbers)[:, 0] == pytest.approx(np.stack(expected), abs=1e-3)


@pytest.mark.parametrize("turn", [1.0, -0.5])
def test_a_turn_is_a_rotation(monkeypatch, turn):
    """As SciPy turns a slice about its centre; large here, where a shear would look other."""
    monkeypatch.setattr(code_maps, "TURN", 0.6)
    variants = Variants(3, 1, Mirror())
    variants.fields.zero_()
    variants.numbers[2] = torch.tensor([0, 1, 0, 0, turn, 0, 0])
    x = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(64, 48)), 2)
    found = variants.moved(torch.tensor(x)[None, None].float(), 2, torch.tensor([0]), "bilinear")
    expected = scipy.ndimage.rotate(x, -np.degrees(0.6 * turn), reshape=False, order=1)
    inside = (slice(20, 44), slice(12, 36))
    assert found[0, 0].numpy()[inside] == pytest.approx(expected[inside], abs=1e-3)


def test_the_seed_decides_the_weights_of_the_priors(autoencoder, tmp_path):
    """Whatever has been drawn before."""

    def start(seed):
        torch.rand(seed + 1)
        weights = stage_of(autoencoder, tmp_path, seed=seed).model.parameters()
        return torch.cat([weight.flatten() for weight in weights])

    first = start(0)
    assert start(0).equal(first) and not start(1).equal(first)


def test_the_top_prior_is_told_the_layout_of_the_variant_it_sees(masked_study, tmp_path):
    autoencoder = fit(masked_study, tmp_path / "one", epochs=1)
    stage = stage_of(autoencoder, tmp_path, variants=4, forget=0.5)
    train_split, variants = stage.splits["train"], Variants(4, 14, Mirror())
    assert stage.model.config.labels == 2
    levels = tissue_borders(train_split, (16, 8))
    seen, indices = [], torch.arange(14)
    stage.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    hidden = []
    for seed in range(20):
        stage.start_epoch(torch.Generator().manual_seed(seed))
        stage.batch_losses("train", indices)
        position, layout = seen[-1][2], seen[-1][4]
        unknown = (layout == 8).all((1, 2))  # two labels and six regions
        assert unknown[13]  # it has no mask
        hidden.append(unknown[:13])
        assert not unknown[:13].equal(position[:13].isnan())  # each by a chance of its own
        for i in np.flatnonzero(~unknown):
            which = int(stage.variant[i]), torch.tensor([i])
            seen_masks = variants.masks(train_split.masks([i]), *which)
            seen_tissue = smoothed(variants.images(train_split.images([i]), *which), (16, 8))
            expected = layouts_of(seen_tissue, seen_masks, levels, 2)
            assert np.array_equal(layout[i], expected[0])
    assert torch.stack(hidden).float().mean().item() == pytest.approx(0.5, abs=0.1)
    stage.model.eval()
    stage.batch_losses("validate", torch.arange(5))
    assert (seen[-1][4] == 8).all()  # validation slices have no masks here


def test_new_slices_start_from_layouts_of_the_study(masked_study, tmp_path, monkeypatch, capsys):
    autoencoder = fit(masked_study, tmp_path, epochs=1)
    prior = fit_prior(autoencoder, tmp_path)
    given, whole = [], Prior.sample

    def sample(self, *args, layouts, **options):
        given.append(layouts)
        return whole(self, *args, layouts=layouts, **options)

    monkeypatch.setattr(Prior, "sample", sample)
    monkeypatch.setattr(generate, "account", lambda *_: {})
    monkeypatch.setattr(generate, "segmenter_of", lambda *_, **__: None)
    files = {"checkpoint": str(autoencoder), "prior": str(prior), "device": "cpu"}
    config = generate.GenerateConfig(n=5, batch_size=3, out=str(tmp_path / "new"), **files)
    generate.generate(config)
    found = torch.cat(given)
    assert found.shape == (5, 16, 8) and 1 in found and found.max() < 8
    assert len(list((tmp_path / "new" / "keras_slices_seg_synthetic").iterdir())) == 5
    maps = np.load(tmp_path / "codes.npz")
    known = maps["train_layout"][0]
    assert (known[13] == 8).all() and not (known[:13] == 8).any()
    train_split = open_trained_study(load_model(autoencoder).study, DataConfig(), autoencoder)
    masks = train_split["train"].masks(range(13))  # as they are, not mirrored
    assert np.array_equal(maps["train_depths"][:13], depths_of(masks, 2, (16, 8)))
    manifest = (tmp_path / "new" / "manifest.json").read_text()
    assert "case_0" not in manifest  # it names no patient
    # The study's masks are gone.
    no_masks = shutil.ignore_patterns("keras_slices_seg_*")
    bare = shutil.copytree(masked_study, tmp_path / "study", ignore=no_masks)
    config = replace(config, n=2, out=str(tmp_path / "bare"))
    with pytest.raises(UserError, match=r"layouts have 0 labels; .*prior_best\.pth learnt 2\. Fix"):
        generate.generate(config, DataConfig(data=str(bare)))
    # The priors learnt without masks, and the study has them again.
    learnt = train_prior.Settings(
        data=DataConfig(data=str(bare)),
        codes=train_prior.CodesConfig(checkpoint=str(autoencoder)),
        prior=TINY,
        train=trainer.TrainConfig(out=str(tmp_path / "p"), epochs=1, batch_size=4, device="cpu"),
    )
    config = replace(config, prior=str(train_prior.train_prior(learnt)))
    with pytest.raises(UserError, match=r"layouts have 2 labels; .*prior_best\.pth learnt 0\. Fix"):
        generate.generate(config, DataConfig(data=str(masked_study)))


def test_priors_learn_from_layouts_whose_tissue_is_of_other_patients(masked_study, tmp_path):
    autoencoder = fit(masked_study, tmp_path / "one", epochs=1)
    stage = stage_of(autoencoder, tmp_path, variants=4, forget=0.0, rebuilt=0.5)
    own, made = stage.maps["train_layout"], stage.rebuilt
    assert made.shape == (REBUILT, 14, 16, 8)
    organs = torch.where(own[0] < 2, own[0], 0)
    for each in made:  # organs are the slice's own, and so is what is unknown
        assert torch.where(each < 2, each, 0)[:13].equal(organs[:13]) and (each[13] == 8).all()
    seen, share = [], []
    stage.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[4]))
    for seed in range(20):
        stage.start_epoch(torch.Generator().manual_seed(seed))
        stage.batch_losses("train", torch.arange(14))
        for i, layout in enumerate(seen[-1][:13]):
            variant, which = stage.variant[i], stage.which[i]
            as_it_is = own[variant, i].equal(layout.int())
            if variant > 1 or which < 0:
                assert as_it_is
            else:
                expected = made[which, i].flip(0) if variant else made[which, i]
                assert expected.equal(layout.int())
        share.append((stage.which >= 0).float().mean())
    assert torch.stack(share).mean().item() == pytest.approx(0.5, abs=0.1)
    seen.clear()
    stage.model.eval()
    stage.batch_losses("validate", torch.arange(5))
    assert seen[0].equal(stage.maps["validate_layout"][0].long())


def test_tissue_has_no_sides(autoencoder, tmp_path, monkeypatch):
    """Masks that came after the autoencoder may have partners; its layouts are tissue alone."""
    monkeypatch.setattr(SliceDataset, "mirror", Mirror(partners=((1, 2),)))
    opened = train_prior.open_trained_study

    def with_masks(*args):
        splits = opened(*args)
        splits["train"].labels = (0, 3, 9)
        return splits

    monkeypatch.setattr(train_prior, "open_trained_study", with_masks)
    stage = stage_of(autoencoder, tmp_path, forget=0.0, rebuilt=1.0)
    assert stage.model.config.labels == 0
    seen = []
    stage.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[4]))
    stage.start_epoch(torch.Generator().manual_seed(0))
    stage.batch_losses("train", torch.arange(14))
    assert stage.variant.any()
    for i, layout in enumerate(seen[0]):
        made = stage.rebuilt[stage.which[i], i]
        assert layout.equal((made.flip(0) if stage.variant[i] else made).long())


def test_validation_repeats_and_agrees_with_the_likelihood(autoencoder, tmp_path):
    path = fit_prior(autoencoder, tmp_path)
    checkpoint = runtime.load_checkpoint(path, "prior")
    prior = Prior(PriorConfig(**checkpoint["model_config"]), checkpoint["top_shape"]).eval()
    prior.load_state_dict(checkpoint["model"])
    model, splits = model_and_splits(autoencoder)
    validate = splits["validate"]
    with torch.inference_mode():
        maps = *model.encode(validate.images(range(5))), torch.from_numpy(validate.positions)
        # 64 masks of each slice.
        nats = prior(*(x.repeat_interleave(64, 0) for x in maps), prior.as_it_is(5 * 64))
    nats = nats["top"].mean().item() * 32 + nats["bottom"].mean().item() * 128
    bits = nats / math.log(2) / (64 * 32)
    logged = checkpoint["history"][-1]["validate"]
    assert logged["bits_per_pixel"] == pytest.approx(bits, rel=0.03)  # other masks
    means = {"nats_top": 3 * math.log(2), "nats_bottom": math.log(2), "bits_per_pixel": 0.5}
    said = train_prior.CodePriors.describe(None, {"validate": means})
    assert said == "3.00 bits a top code, 1.00 a bottom code, 0.5000 a pixel"
    again = fit_prior(autoencoder, tmp_path / "again")
    assert runtime.load_checkpoint(again, "prior")["history"][-1]["validate"] == logged


def test_each_level_starts_from_its_own_codebook(autoencoder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(Prior, "start_from", lambda self, *books: given.extend(books))
    stage_of(autoencoder, tmp_path)
    model = load_model(autoencoder).model
    top, bottom = model.quantiser_top.codebook, model.quantiser_bottom.codebook
    assert given[0].equal(top) and given[1].equal(bottom) and not top.equal(bottom)


def test_bits_are_per_pixel_of_the_slices_own_files(study, tmp_path):
    """Slices lie in a grid of 64x32, whose padding counts nowhere; each split has its own size."""
    folder = study_of(study, tmp_path / "keras_slices_data", (48, 20))
    study_of(study / "keras_slices_validate", folder, (40, 16))
    stage = stage_of(write_checkpoint(tmp_path / "vqvae2_best.pth", folder, "pad"), tmp_path)
    ours = {name: split.fingerprint for name, split in stage.splits.items()}
    assert stage.settings()["data"]["fingerprints"] == ours  # and not the autoencoder's
    stage.model.eval()
    losses = stage.batch_losses("validate", torch.arange(5))
    nats = 32 * losses["nats_top"] + 128 * losses["nats_bottom"]
    expected = nats.item() / math.log(2) / (40 * 16)
    assert losses["bits_per_pixel"].item() == pytest.approx(expected, rel=1e-5)


def test_the_bottom_prior_can_learn_from_fewer_slices_than_the_top(autoencoder, tmp_path):
    sure = replace(TINY, prior_dropout=0.0)
    stage = stage_of(autoencoder, tmp_path, sure, forget=0.0, bottom_every=2)
    stage.start_epoch(torch.Generator())
    stage.variant = torch.arange(14) % 2
    seen, told, context = [], [], stage.model.bottom.context
    stage.model.register_forward_hook(lambda module, inputs, nats: seen.append((inputs, nats)))
    stage.model.bottom.context = lambda *known: told.append(known) or context(*known)
    losses = stage.batch_losses("train", torch.tensor([3, 0, 13, 7]))
    (top, bottom, position, altered, _), nats = seen[0]
    for known, whole in zip(told[0], (position, altered, top), strict=True):  # of its own slices
        assert known.equal(whole[:2]) and not whole[:2].equal(whole[2:])
    chosen = stage.variant[[3, 0]], torch.tensor([3, 0])
    assert len(top) == 4 and bottom.equal(stage.maps["train_bottom"][chosen].long())
    for level in ("top", "bottom"):
        assert losses[f"nats_{level}"].item() == pytest.approx(nats[level].mean().item(), rel=1e-5)
    # As if all bottoms were there.
    mean = (32 * losses["nats_top"] + 128 * losses["nats_bottom"]).item() / 160
    assert losses["loss"].item() == pytest.approx(mean, rel=1e-5)
    bits = 160 * mean / math.log(2) / (64 * 32)
    assert losses["bits_per_pixel"].item() == pytest.approx(bits, rel=1e-5)
    stage.model.eval()  # every slice is validated
    stage.batch_losses("validate", torch.arange(3))
    assert len(seen[1][0][1]) == 3


def test_it_resumes_bit_for_bit_and_only_with_its_autoencoder(study, autoencoder, tmp_path):
    path = fit_prior(autoencoder, tmp_path / "whole", epochs=2)
    names = {"prior_best.pth", "prior_log.jsonl", "prior_train_losses.txt", "prior_loss_plot.png"}
    assert names <= {file.name for file in path.parent.iterdir()}
    lines = (path.parent / "prior_log.jsonl").read_text().splitlines()
    assert len(lines) == 3 and "nats_top" in json.loads(lines[-1])["validate"]
    fit_prior(autoencoder, tmp_path / "broken", epochs=2)
    checkpoint = runtime.load_checkpoint(tmp_path / "broken" / "prior_epoch_1.pth", "prior")
    fit_prior(autoencoder, tmp_path / "broken", epochs=2, checkpoint=checkpoint)
    final = "prior_epoch_final.pth"
    assert_same(tmp_path / "broken" / final, tmp_path / "whole" / final)
    # From any folder, the autoencoder is looked for beside the priors.
    settings = train_prior.make_settings({"resume": checkpoint["path"]})
    assert settings.codes.checkpoint == str(tmp_path / "broken" / autoencoder.name)
    assert vars(settings.prior) == checkpoint["model_config"]  # and not the preset's
    other = fit(study, tmp_path / "other", epochs=1, seed=5)
    with pytest.raises(ValueError, match="another autoencoder"):
        fit_prior(other, tmp_path / "broken", epochs=2, checkpoint=checkpoint)


def test_the_command_that_goes_on_with_a_stopped_run_works(
    autoencoder, tmp_path, monkeypatch, capsys
):
    """Priors beside another folder's autoencoder, in a folder whose name has a space."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer.Pace, "signalled", lambda self, _: self.progress.seen == 4)
        fit_prior(autoencoder, tmp_path / "my priors", slices=8)
    said = capsys.readouterr().out.split("go on with: ")[1].splitlines()[0]
    python, script, *flags = shlex.split(said)
    assert (python, script) == ("python", "train_prior.py")
    code, out, err = command(train_prior, *flags)
    assert code == 0 and "prior_epoch_final.pth" in out, err


def test_patience_ends_a_run_that_no_longer_improves(autoencoder, tmp_path):
    path = fit_prior(autoencoder, tmp_path, epochs=50, patience=2, lr=1e-30)
    assert runtime.load_checkpoint(tmp_path / "prior_epoch_final.pth", "prior")["epoch"] == 3
    assert runtime.load_checkpoint(path, "prior")["epoch"] == 1


@pytest.mark.parametrize("forget", [0.0, 0.5, 1.0])
def test_the_model_gets_the_drawn_variants_and_forgets_positions(autoencoder, tmp_path, forget):
    stage = stage_of(autoencoder, tmp_path, variants=4, forget=forget)
    numbers, positions = Variants(4, 14, Mirror()).numbers, stage.splits["train"].positions
    seen, hidden, drawn = [], [], []
    stage.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    indices = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    for seed in range(20):
        stage.start_epoch(torch.Generator().manual_seed(seed))
        stage.batch_losses("train", indices)
        top, bottom, position, variant = seen[-1][:4]
        drawn.append(stage.variant.clone())
        hidden.append(position.isnan())
        chosen = stage.variant[indices], indices
        assert np.array_equal(position[~hidden[-1]], positions[indices[~hidden[-1]]])
        assert variant.equal(numbers[chosen])
        assert top.equal(stage.maps["train_top"][chosen].long())
        assert bottom.equal(stage.maps["train_bottom"][chosen].long())
    assert torch.stack(hidden).float().mean().item() == pytest.approx(forget, abs=0.1)
    # Every kind is seen, as it is and mirrored too, and another one in another epoch.
    assert len(torch.stack(drawn).unique()) == 4 and (drawn[0] != drawn[1]).any()
    stage.model.eval()  # nothing is hidden or altered in validation
    stage.batch_losses("validate", torch.arange(5))
    top, _, position, variant = seen[-1][:4]
    assert torch.equal(position, torch.from_numpy(stage.splits["validate"].positions))
    assert torch.equal(top, stage.maps["validate_top"][0].long()) and not variant.any()
