"""Sampling and its report, with models that have learnt for seconds or not at all."""

import copy
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import command
from PIL import Image

import generate
from dataset import DataConfig, Mirror, StudyInfo, open_study, parse_name
from modules import VQVAE2, VQVAE2Config
from new_slices import code_maps, organs, sample_report
from new_slices.layouts import likely
from new_slices.prior import Prior, PriorConfig, Sampling
from support import figures, metrics, nifti, runtime

MODEL = VQVAE2Config(K=16, D=8, channels=16, top_channels=16, residual_channels=8, decoder_blocks=1)
PRIOR = PriorConfig(
    K=16, prior_channels=8, prior_heads=2, prior_top_layers=1, prior_bottom_layers=1
)


def save_models(folder, splits, model, prior):
    data = dataclasses.asdict(StudyInfo.from_splits(splits))
    one = {"model_config": dataclasses.asdict(model.config), "model": model.state_dict()}
    one |= {"kind": "vqvae2", "data": data, "epoch": 1}
    runtime.save_checkpoint(folder / "vqvae2_best.pth", one)
    two = {"model_config": dataclasses.asdict(prior.config), "model": prior.state_dict()}
    two |= {"kind": "prior", "data": data, "epoch": 1, "top_shape": [8, 4]}
    two["autoencoder_sha256"] = runtime.sha256(folder / "vqvae2_best.pth")
    runtime.save_checkpoint(
        folder / "prior_best.pth", two | {"codes_config": {"copies": 2, "rebuilt": 0.0}}
    )


@pytest.fixture(scope="module")
def trained(study, tmp_path_factory):
    """The folder of both checkpoints, the models and the study's splits."""
    torch.manual_seed(0)
    splits = open_study(DataConfig(data=str(study), height=64, width=32))
    model, prior = VQVAE2(MODEL), Prior(PRIOR, (8, 4))
    optimiser, x = torch.optim.Adam(model.parameters(), 3e-3), splits["train"].images(range(14))
    for _ in range(60):
        output = model(x)
        commitment = output.top.commitment + output.bottom.commitment
        loss = (output.reconstruction - x).square().mean() + commitment
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # An untrained prior is uniform: any likelihood would look right.
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("Results")
    save_models(folder, splits, model.eval(), prior.eval())
    return folder, model, prior, splits


def config(trained, out, **settings):
    files = {"checkpoint": "vqvae2_best.pth", "prior": "prior_best.pth"}
    files = {flag: str(trained[0] / name) for flag, name in files.items()}
    settings = files | {"out": str(out), "device": "cpu", "n": 5} | settings
    return generate.GenerateConfig(**settings)


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("generated")
    return out, generate.generate(config(trained, out, batch_size=2))


@pytest.fixture
def no_report(monkeypatch):
    """Sampling alone: most tests need no more."""
    monkeypatch.setattr(generate, "account", lambda *_: {})


@pytest.mark.parametrize("rebuilt", (0.0, 1.0))
def test_priors_of_rebuilt_layouts_are_guided_more(trained, tmp_path, no_report, rebuilt):
    saved = runtime.load_checkpoint(trained[0] / "prior_best.pth", "prior")
    prior = tmp_path / "prior.pth"
    runtime.save_checkpoint(prior, saved | {"codes_config": {"copies": 2, "rebuilt": rebuilt}})
    for asked, expected in ((math.nan, 3.0 if rebuilt else 1.0), (0.5, 0.5)):
        generate.generate(config(trained, tmp_path, n=1, prior=str(prior), guidance=asked))
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest["settings"]["guidance"] == expected


def test_files_are_named_and_say_what_they_are(made, trained, tmp_path):
    out, report = made
    train = trained[3]["train"]
    names = {"grid", "overview", "layouts", "nearest", *(f"{i:04d}" for i in range(5))}
    assert {path.stem for path in out.glob("*.png")} == names
    assert Image.open(out / "0003.png").size == (32, 64)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["asked"], manifest["done"], manifest["seed"]) == (5, 5, 0)
    for kind, name in (("autoencoder", "vqvae2_best.pth"), ("prior", "prior_best.pth")):
        assert manifest[kind]["sha256"] == runtime.sha256(trained[0] / name)
    files = sorted((out / "keras_slices_synthetic").iterdir())
    assert [parse_name(file).patient for file in files] == [900, 901, 902, 903, 904]
    # Samples lie where test slices do: 0, 1/3, 2/3, 1 of patient 40, and 0, 1 of 41.
    positions = manifest["positions"]
    assert {round(3 * position, 3) for position in positions} <= {0, 1, 2, 3}
    assert [parse_name(file).slice for file in files] == [round(59 * p) for p in positions]
    image = nibabel.load(files[0])
    assert b"synthetic" in image.header["descrip"].item()
    assert np.array_equal(image.affine, train.affines[0])
    mean, std = np.median(train.mean), np.median(train.std)
    assert f"mean {mean:.6g} and standard deviation {std:.6g}" in manifest["nifti"]
    z = (image.get_fdata() - mean) / std
    assert np.abs(z).max() < 20 and image.get_data_dtype() == np.float32
    # Black and white are what they are in the middle one of the test slices.
    every = trained[3]["test"].images(range(6)).flatten(1)
    black, white = (np.median(ends) for ends in (every.amin(1), every.amax(1)))
    grey = 255 * np.clip((z - black) / (white - black), 0, 1)
    assert np.abs(np.asarray(Image.open(out / "0000.png")) - grey).max() < 0.51
    kept = json.loads((out / "report.json").read_text())
    assert report == {key: kept[key] for key in report}
    other = copy.copy(train)  # its first slice is of another size, with other voxels
    other.shapes, other.affines = train.shapes.copy(), train.affines.copy()
    other.shapes[0], other.affines[0] = (90, 50), 2 * np.eye(4)
    splits, study = trained[3] | {"train": other}, StudyInfo.from_splits(trained[3])

    def album_of(**changes):
        model = SimpleNamespace(sha256="", study=dataclasses.replace(study, **changes))
        return generate.Album(config(trained, tmp_path), splits, np.zeros(5), (), model)

    album = album_of()
    assert np.array_equal(album.affine, train.affines[1]) and album.look["letters"] == "RA"
    assert json.loads((tmp_path / "manifest.json").read_text())["done"] == 0  # nothing yet
    assert "synthetic" not in album.look["note"]
    assert "synthetic phantom" in album_of(synthetic=True).look["note"]
    # New slices lie as those that the model learnt from: one of these tells how, if any does.
    other.affines, other.synthetic = train.affines[:, :, [1, 0, 2, 3]], True
    other.affines[3] = train.affines[3]
    album = album_of()
    assert np.array_equal(album.affine, train.affines[3]) and album.oriented
    assert album.look["letters"] == "RA" and "synthetic phantom" in album.look["note"]
    assert album.manifest["data"]["synthetic"] and album_of(directions="LA").look["letters"] == ""
    other.affines[[0, 3]] = other.affines[[3, 0]]  # one that was resized is better than another way
    assert album_of().oriented
    assert not album_of(directions="LA").oriented
    other.oriented = np.zeros(len(train), bool)
    album = album_of()
    album.write("case", 0, np.zeros((64, 32), np.float32))
    (written,) = tmp_path.glob("case_*")
    assert nibabel.load(written).header["sform_code"] == 0


def test_a_sample_depends_on_its_seed_and_not_on_batch_count_or_threads(
    made, trained, tmp_path, monkeypatch, no_report
):
    threads, whole, threads_of = [], Prior.sample, torch.get_num_threads

    def sample(*args, **options):
        threads.append(threads_of())
        return whole(*args, **options)

    monkeypatch.setattr(Prior, "sample", sample)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def slices(out):
        files = [*out.glob("[0-9]*.png"), *out.rglob("*.gz")]
        return {path.relative_to(out): path.read_bytes() for path in files}

    generate.generate(config(trained, tmp_path / "three", n=3, batch_size=1))
    assert threads == [1, 1, 1]
    three, five = slices(tmp_path / "three"), slices(made[0])
    assert len(three) == 6 and three.items() <= five.items()
    generate.generate(config(trained, tmp_path / "other", n=3, seed=1))
    other = slices(tmp_path / "other")
    assert not set(other.values()) & set(five.values())
    ours, theirs = (
        {parse_name(x).patient for x in run if x.suffix == ".gz"} for run in (five, other)
    )
    assert len(theirs) == 3 and not ours & theirs  # the files of two seeds may lie in one folder


@pytest.fixture
def one_by_one(monkeypatch):
    """Batches of samples one after the other, however many threads there are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def test_interrupted_sampling_keeps_what_is_finished(
    made, trained, tmp_path, monkeypatch, capsys, one_by_one
):
    # An earlier run's files must not pass for ours.
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    whole, calls = Prior.sample, []

    def interrupted(self, *args, progress, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, *args, progress=progress, **options)

    monkeypatch.setattr(Prior, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate.generate(config(trained, tmp_path, batch_size=2))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["asked"], manifest["done"]) == (5, 2)
    assert "2 of 5 slices" in capsys.readouterr().out
    left = {"keras_slices_synthetic", "codes.npz", "index.html", "manifest.json"}
    left |= {"0000.png", "0001.png", "layouts.png"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert len(list((tmp_path / "keras_slices_synthetic").iterdir())) == 2
    assert (tmp_path / "0001.png").read_bytes() == (made[0] / "0001.png").read_bytes()


def test_pictures_name_what_they_show_and_begin_with_the_nearest(trained, tmp_path, monkeypatch):
    drawn, test = {}, trained[3]["test"]
    keep = lambda path, groups, *_, **__: drawn.update({path.name: groups})  # noqa: E731
    monkeypatch.setattr(generate.figures, "slice_grid", keep)
    generate.generate(config(trained, tmp_path))
    every = test.images(range(len(test)))[:, 0].numpy()
    for name, image, _ in drawn["grid.png"]["held-out slices"]:
        (index,) = np.flatnonzero((every == image).all((1, 2)))
        assert name == generate.label(test, index)
    for group in drawn["nearest.png"].values():
        similar = [float(title.split()[0]) for title, *_ in group[1::2]]
        assert similar == sorted(similar, reverse=True) and len(set(similar)) > 1


def test_a_folder_of_something_else_loses_nothing(trained, tmp_path):
    for name in ("manifest.json", "0000.png", "report.json"):
        (tmp_path / name).write_text('{"name": "years of work"}')
    with pytest.raises(ValueError, match=f"{tmp_path.name}.manifest.json: not written by"):
        generate.generate(config(trained, tmp_path))
    (tmp_path / "manifest.json").unlink()  # without one, nothing is ours
    with pytest.raises(ValueError, match=r"0000\.png: not written by generate"):
        generate.clear(tmp_path, "", "")
    (tmp_path / "raw" / "Dataset501_Real").mkdir(parents=True)
    (tmp_path / "raw" / "Dataset501_Real" / "dataset.json").write_text("{}")
    generate.clear(tmp_path / "raw", "Dataset502_New", "")
    with pytest.raises(ValueError, match=r"dataset\.json: not written by generate"):
        generate.clear(tmp_path / "raw", "Dataset501_Real", "")
    (tmp_path / "raw" / "manifest.json").write_text(generate.DESCRIPTION)  # of an earlier run
    with pytest.raises(ValueError, match=r"dataset\.json: not written by generate"):
        generate.clear(tmp_path / "raw", "Dataset501_Real", "")
    generate.clear(tmp_path / "raw", "Dataset502_New", "")
    assert not (tmp_path / "raw" / "manifest.json").exists()  # nothing that it counts is there
    (tmp_path / "manifest.json").write_text("")
    assert len(list(tmp_path.glob("*.*"))) >= 3 and "years" in (tmp_path / "0000.png").read_text()


@pytest.mark.parametrize("split, mirrored", [("train", 0), ("train", 1), ("validate", 0)])
def test_a_prior_that_repeats_its_training_slices_is_caught(
    trained, tmp_path, monkeypatch, split, mirrored
):
    splits, copied, pictures = trained[3], split == "train", {}

    def repeat(config, model, prior, positions, drawn, keep):
        x = splits[split].images(range(config.n))
        x = x.flip(2) if mirrored else x
        with torch.inference_mode():
            top, bottom = model.encode(x)
        samples = code_maps.Samples(x[:, 0].numpy(), top.numpy(), bottom.numpy(), None)
        keep(0, samples)
        return samples

    monkeypatch.setattr(generate, "sample", repeat)
    monkeypatch.setattr(
        generate.figures,
        "slice_grid",
        lambda path, groups, *_, **__: pictures.update({path: groups}),
    )
    copying = generate.generate(config(trained, tmp_path))["copying"]
    for measure in ("picture", "codes"):
        found = copying[measure]
        assert found["verdict"].startswith("COPIES") == copied
        share = found["samples"]["share"]
        assert share == 1 if copied else share <= found["margin"]
    # In the picture of the nearest, a copy stands beside itself, mirrored if it is.
    new, _ = pictures[tmp_path / "nearest.png"].values()
    apart = max(np.abs(new[i][1] - new[i + 1][1]).max() for i in range(0, len(new), 2))
    assert (apart < 1e-4) == copied


def test_altered_training_slices_are_found(trained):
    """A slice that was shifted, turned and bent as a variant is, is a copy of that variant."""
    _, model, prior, splits = trained
    train, indices, rng = splits["train"], torch.tensor([3, 8]), np.random.default_rng(0)
    maps = code_maps.extract_codes(model, splits, 4, "model", trained[0] / "four.npz")
    variants = code_maps.Variants(4, 14, Mirror())
    copied = variants.images(train.images(indices), 3, indices)[:, 0].numpy()
    levels = (maps[f"train_{level}"][3, indices].astype(np.int64) for level in code_maps.LEVELS)
    samples = code_maps.Samples(copied, *levels, None)
    inputs = sample_report.Inputs(model, prior, splits, maps, samples, np.zeros(2), np.arange(2))
    row = sample_report.Row(splits["validate"].images(range(5))[:, 0].numpy(), None)
    rows = {sample_report.RECONSTRUCTIONS: row}
    _, audits = sample_report.score_copying(inputs, rows, np.arange(6), rng)
    for found in audits.values():
        samples = found["samples"]
        assert samples.index.tolist() == [3, 8] and samples.variant.tolist() == [3, 3]
        assert samples.similarity.min() > 0.999
    # By codes: each counts for its bits times the contrast, beside the other patients' nearest.
    parts = [maps[f"train_{level}"].reshape(4, 14, -1) for level in code_maps.LEVELS]
    everything = np.concatenate(parts, 2)
    for i, slice_ in enumerate((3, 8)):
        same = everything == everything[3, slice_]
        bits = np.log2(57 / (same.sum((0, 1)) + 0.5))
        cells = (metrics.contrast(copied[i : i + 1], level) for level in ((8, 4), (16, 8)))
        weights = bits * np.concatenate([each.ravel() for each in cells])
        shares = (same * weights).sum(2).max(0) / weights.sum()
        patients = train.patients
        others = [shares[patients == each].max() for each in {*patients} - {patients[slice_]}]
        others = sorted(others)[-8:]
        found = audits["codes"]["samples"].similarity[i]
        assert found == pytest.approx(1 / np.mean(others), rel=1e-4)
    by_codes = audits["codes"]  # a part of a slice is less than the whole
    assert by_codes["copies"].similarity.max() < by_codes["samples"].similarity.min() / 2


def test_copied_parts_are_the_most_contrasted_ones_of_training_slices(trained, monkeypatch):
    """Half of both sides here; all else is the test slice's own."""
    monkeypatch.setattr(sample_report, "PART", (2, 2))
    _, model, prior, splits = trained
    train, test = splits["train"], splits["test"]
    maps = code_maps.extract_codes(model, splits, 4, "model", trained[0] / "four.npz")
    inputs = sample_report.Inputs(model, prior, splits, maps, None, None, None)
    honest = np.array([1, 4, 5])
    (top, bottom), images = sample_report.copy_parts(inputs, honest, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    hosts, givers = rng.permutation(honest), rng.integers(14, size=3)
    assert np.array_equal(images, inputs.decode(top, bottom)[0])
    assert not np.array_equal(images, test.images(hosts)[:, 0].numpy())
    for i, (host, giver) in enumerate(zip(hosts, givers, strict=True)):
        contrast = metrics.contrast(train.images([giver])[:, 0].numpy(), (8, 4))[0]
        corners = list(itertools.product(range(5), range(3)))
        r, c = max(corners, key=lambda at: contrast[at[0] : at[0] + 4, at[1] : at[1] + 2].sum())
        for scale, found, level in zip((1, 2), (top, bottom), code_maps.LEVELS, strict=True):
            expected = maps[f"test_{level}"][0, host].copy()
            part = slice(scale * r, scale * (r + 4)), slice(scale * c, scale * (c + 2))
            expected[part] = maps[f"train_{level}"][0, giver][part]
            assert np.array_equal(found[i], expected)


def test_which_controls_a_measure_sees():
    """What lies beyond two standard errors of its floor; a higher share or Dice is better."""
    values = {
        "plausible": [0.7, 0, 0.5, 0.69, 0.1, 0.8],
        "kernel_distance": [0.9, 0.04, 0.2, 0.06, 0.08, 0.9],
        "agreement": [None, 0.9, None, None, 0.8, None],
    }
    rows = (sample_report.FLOOR, sample_report.RECONSTRUCTIONS, *sample_report.CONTROLS)
    table = {row: {} for row in rows}
    for measure, of in values.items():
        for row, value in zip(rows, of, strict=True):
            table[row] |= {} if value is None else {measure: value}
    by_place, _, mixed, outside = sample_report.CONTROLS
    errors = {row: {"kernel_distance": 0.01, "plausible": 0.01} for row in rows}  # 2 * 0.0141
    assert sample_report.seen_controls(table, errors) == {
        "kernel_distance": [by_place, mixed, outside],
        "plausible": [by_place, mixed],
        "agreement": [mixed],
    }


def test_controls_are_what_they_are_called(trained, monkeypatch):
    _, model, prior, splits = trained
    maps = code_maps.extract_codes(model, splits, 2, "model", trained[0] / "two.npz")
    samples = code_maps.Samples(np.zeros((5, 64, 32), np.float32), None, None, None)
    inputs = sample_report.Inputs(model, prior, splits, maps, samples, np.zeros(5), np.arange(5))
    rows = sample_report.make_rows(inputs, np.random.default_rng(0))
    real, halves = (rows[name].images for name in (sample_report.FLOOR, sample_report.HALVES))
    validate, train = (
        splits[n].images(range(k))[:, 0].numpy() for n, k in (("validate", 5), ("train", 14))
    )
    assert sorted(np.abs(validate - x).max((1, 2)).argmin() for x in real) == list(range(5))
    np.testing.assert_array_equal(halves[:, 32:], real[:, 32:])
    assert all((train[:, :32] == half).all((1, 2)).any() for half in halves[:, :32])
    # Of slices at one position any may be the partner, not only those that come first.
    monkeypatch.setattr(splits["train"], "positions", np.full(14, 0.5, np.float32))
    again = sample_report.make_rows(inputs, np.random.default_rng(0))[sample_report.HALVES].images
    whose = [np.abs(train[:, :32] - half).max((1, 2)).argmin() for half in again[:, :32]]
    assert max(whose) >= sample_report.FEWEST
    with torch.inference_mode():
        top, bottom = model.encode(torch.from_numpy(real)[:, None])
        own = model.decode_codes(top, bottom)[:, 0].numpy()
        mixed = [[model.decode_codes(t[None], b[None])[0, 0].numpy() for b in bottom] for t in top]
    np.testing.assert_allclose(rows[sample_report.RECONSTRUCTIONS].images, own, atol=1e-4)
    # Of each bottom.
    distance = np.abs(np.array(mixed) - rows[sample_report.MIXED].images[:, None]).max((2, 3))
    assert (distance.min(1) < 1e-4).all() and (distance.argmin(1) != np.arange(5)).all()
    scrambled = rows[sample_report.OUTSIDE].images  # all of it, as no mask shows an organ
    assert (np.abs(scrambled - real).mean((1, 2)) > 0.1).all()
    np.testing.assert_allclose(*(np.abs(np.fft.fft2(x)) for x in (scrambled, real)), atol=0.1)


def test_a_position_is_asked_of_the_prior_and_of_the_real_slices(trained, tmp_path, monkeypatch):
    asked, whole = [], Prior.sample
    monkeypatch.setattr(
        Prior, "sample", lambda self, p, *a, **k: asked.extend(p) or whole(self, p, *a, **k)
    )
    monkeypatch.setattr(sample_report, "FEWEST", 2)
    report = generate.generate(config(trained, tmp_path, position=1.0, n=3))
    assert asked == [1, 1, 1] and report["realism"]["rows"][sample_report.FLOOR]["n"] == 2
    assert report["realism"]["training_slices"] == 2  # the nearest, not all 14
    asked.clear()
    for split in trained[3].values():  # as long as one of them tells positions, they may be asked
        generate.check_study(config(trained, tmp_path, position=0.5), 0, *trained[2:])
        monkeypatch.setattr(split, "positions", np.full(len(split), np.nan, np.float32))
    monkeypatch.setattr("dataset.open_trained_study", lambda *_: trained[3])
    monkeypatch.setattr(generate, "account", lambda *_: {})
    generate.generate(config(trained, tmp_path, n=2))
    assert np.isnan(asked).all()
    assert json.loads((tmp_path / "manifest.json").read_text())["positions"] == [None, None]
    with pytest.raises(ValueError, match="tell no positions"):
        generate.generate(config(trained, tmp_path, n=2, position=0.5))


def test_samples_of_a_position_stand_beside_test_slices_near_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_report, "FEWEST", 2)
    test = trained[3]["test"]
    for position in (0.0, 1.0):
        twins, asked = generate.choose_twins(config(trained, tmp_path, position=position), test)
        assert set(twins) == set(np.abs(test.positions - position).argsort(kind="stable")[:2])
        assert (asked == position).all()


def test_own_masks_stand_beside_slices_near_them_or_any(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_report, "FEWEST", 2)
    test, own = trained[3]["test"], np.zeros((16, 32, 16), np.uint8)
    positions = np.array([np.nan, 0.0])
    order = iter([0, 1] * 8)
    composer = SimpleNamespace(organs=np.zeros((1, 8, 4)), positions=positions)
    composer.most_alike = lambda _: [next(order)]
    composer.draw = lambda *_: (None, None)
    twins, asked, *_ = generate.plan(config(trained, tmp_path, n=16), composer, own, test)
    assert np.isnan(asked).tolist() == [True, False] * 8
    assert set(twins[1::2]) == set(np.abs(test.positions).argsort(kind="stable")[:2])
    assert len(set(twins[::2])) > 2  # without positions, any slice


def test_models_that_are_not_a_pair(trained, tmp_path):
    _, model, prior, splits = trained
    save_models(tmp_path, splits, model, prior)
    saved = runtime.load_checkpoint(tmp_path / "prior_best.pth", "prior")
    runtime.save_checkpoint(tmp_path / "prior_best.pth", {**saved, "autoencoder_sha256": "0" * 64})
    files = ("--checkpoint", tmp_path / "vqvae2_best.pth", "--prior", tmp_path / "prior_best.pth")
    code, _, err = command(generate, *files, "--out", tmp_path / "out")
    assert code == 2
    assert all(words in err for words in ("prior_best.pth", "vqvae2_best.pth", "000000000000"))
    for keys in ({"top_shape": [4, 4]}, {"codes_config": {}}, {"model_config": {"K": 8}}):
        runtime.save_checkpoint(tmp_path / "keys.pth", saved | keys)
        with pytest.raises(runtime.UserError, match=r"keys\.pth: damaged"):
            generate.generate(config(trained, tmp_path / "out", prior=str(tmp_path / "keys.pth")))
    with pytest.raises(FileNotFoundError, match="no such file; expected an autoencoder"):
        generate.generate(config((tmp_path / "none",), tmp_path / "out"))


LEVELS_APART = {
    **{"top_temperature": 0.5, "top_passes": 3, "top_spread": 2.0},
    **{"bottom_temperature": 0.6, "bottom_passes": 2, "bottom_spread": 3.0, "guidance": 0.7},
}


@pytest.fixture(scope="module")
def two_organs(organs_study, tmp_path_factory):
    """As `trained`, untrained, of a study with the labels 5 and 9."""
    torch.manual_seed(0)
    splits = open_study(DataConfig(data=str(organs_study), height=64, width=32))
    model = VQVAE2(dataclasses.replace(MODEL, labels=3))
    prior = Prior(dataclasses.replace(PRIOR, labels=3), (8, 4))
    model(splits["train"].images(range(8)))  # starts the codebooks
    with torch.no_grad():  # one that is sure of some labels, and not the ones of the layouts
        model.mask_head.last[2].weight.mul_(30)
    folder = tmp_path_factory.mktemp("Results")
    save_models(folder, splits, model.eval(), prior.eval())
    return folder, model, prior, splits


def test_written_masks_are_the_study_s_labels_given_codes_and_layout(
    two_organs, organs_study, tmp_path, monkeypatch, no_report, one_by_one
):
    """From the settings of the sampler to the files, in a study with two organs."""
    sampled, whole, learnt_from, shown = [], Prior.sample, [], {}

    def sample(self, positions, seeds, top, bottom, *, layouts, **options):
        codes = whole(self, positions, seeds, top, bottom, layouts=layouts, **options)
        sampled.append((top, bottom, layouts, *codes))
        return codes

    monkeypatch.setattr(Prior, "sample", sample)
    monkeypatch.setattr(
        generate, "segmenter_of", lambda split, *_, **__: learnt_from.append(split.split)
    )
    monkeypatch.setattr(
        figures, "slice_grid", lambda _, groups, *__, **how: shown.update(groups | how)
    )
    settings = config(two_organs, tmp_path, batch_size=2, n=5, **LEVELS_APART)
    generate.generate(settings, DataConfig(data=str(organs_study)))
    assert learnt_from == ["train"]
    levels = Sampling(3, 0.5, 2.0, 0.7), Sampling(2, 0.6, 3.0)
    assert [batch[:2] for batch in sampled] == [levels] * 3
    layouts, top, bottom = (torch.cat(parts) for parts in list(zip(*sampled, strict=True))[2:])
    with torch.inference_mode():
        logits = two_organs[1].decode_with_masks(top, bottom)[1]
    told = logits + likely(layouts, 3, 64, 32)
    assert (told.argmax(1) != logits.argmax(1)).any()  # the layout says something
    files = sorted((tmp_path / generate.MASK_FOLDER).iterdir())
    written = np.stack([np.asarray(nibabel.load(path).dataobj) for path in files])
    assert set(np.unique(written)) == {0, 5, 9}
    assert np.array_equal(written, np.array([0, 5, 9])[told.argmax(1)])
    # In the grid too, and held-out slices have there what was drawn in them.
    in_grid = [mask for *_, mask in shown["generated, random and unselected"]]
    assert np.array_equal(in_grid, told.argmax(1)) and list(shown["label_values"]) == [0, 5, 9]
    test = two_organs[3]["test"]
    every, masks = test.images(range(6))[:, 0].numpy(), test.masks(range(6)).numpy()
    for _, image, mask in shown["held-out slices"]:
        assert np.array_equal(mask, masks[(every == image).all((1, 2))][0])


def test_agreement_is_of_each_slice_s_own_mask(two_organs, monkeypatch):
    """A segmenter that finds just the masks that the samples bring agrees with all of them."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(5, 64, 32)).astype(np.float32)
    masks = rng.integers(3, size=images.shape).astype(np.uint8)
    found = {image.tobytes(): mask for image, mask in zip(images, masks, strict=True)}
    nothing = np.zeros((64, 32), np.uint8)
    monkeypatch.setattr(
        organs, "segment", lambda _, x: np.stack([found.get(i.tobytes(), nothing) for i in x])
    )
    _, model, prior, splits = two_organs
    codes = {"train_top": np.zeros((1, 14, 8, 4)), "train_bottom": np.zeros((1, 14, 16, 8))}
    codes |= {"validate_top": np.zeros((1, 5, 8, 4)), "validate_bottom": np.zeros((1, 5, 16, 8))}
    samples = code_maps.Samples(images, np.zeros((5, 8, 4)), np.zeros((5, 16, 8)), masks)
    positions, twins = np.linspace(0, 1, 5), np.arange(5)
    inputs = sample_report.Inputs(model, prior, splits, codes, samples, positions, twins, object())
    rows = sample_report.make_rows(inputs, rng)
    of = [np.abs(images - x).sum((1, 2)).argmin() for x in rows[sample_report.SAMPLES].images]
    assert of != [0, 1, 2, 3, 4]  # in another order, each with its position and its mask
    assert np.array_equal(rows[sample_report.SAMPLES].positions, positions[of])
    table, _ = sample_report.score_anatomy(inputs, rows, np.arange(14))
    assert table[sample_report.SAMPLES]["agreement"] == 1


@pytest.mark.parametrize("value", [0, 9], ids=["nothing but air", "unknown"])
def test_without_organs_in_test_layouts_no_mask_is_called_a_copy(two_organs, value):
    _, model, prior, splits = two_organs
    codes = code_maps.extract_codes(model, splits, 2, "", two_organs[0] / "audit.npz")
    codes["test_layout"][:] = value
    top, bottom = (codes[f"train_{level}"][0][:4] for level in code_maps.LEVELS)
    masks = splits["train"].masks(range(4)).numpy()  # copies
    samples = code_maps.Samples(splits["train"].images(range(4))[:, 0].numpy(), top, bottom, masks)
    inputs = sample_report.Inputs(
        model, prior, splits, codes, samples, np.zeros(4), np.arange(4), layouts=masks
    )
    rng = np.random.default_rng(0)
    rows = {sample_report.RECONSTRUCTIONS: SimpleNamespace(images=samples.images)}
    reports, found = sample_report.score_copying(inputs, rows, np.arange(6), rng)
    assert reports.keys() == found.keys() == {"picture", "codes"}


def test_a_measure_that_sees_no_control_is_left_out(two_organs, monkeypatch):
    """Agreement, as controls whose masks fit as well as those of reconstructions are not seen."""
    names = (sample_report.SAMPLES, *sample_report.CONTROLS)
    floors = (sample_report.FLOOR, sample_report.RECONSTRUCTIONS)
    table = {name: {"plausible": 0.0, "agreement": 0.9} for name in (*names, *floors)}
    table[sample_report.FLOOR] = {"plausible": 0.9}
    none = [{name: {} for name in table} for _ in range(2)]
    monkeypatch.setattr(sample_report, "score_likeness", lambda *_: none)
    monkeypatch.setattr(sample_report, "score_anatomy", lambda *_: (table, {}))
    _, model, prior, splits = two_organs
    inputs = sample_report.Inputs(model, prior, splits, {}, None, None, None, segmenter=model)
    rows = {name: sample_report.Row(np.zeros((5, 64, 32)), None) for name in table}
    report = sample_report.score_realism(inputs, rows, np.random.default_rng(0))
    assert report["rows"][sample_report.SAMPLES] == {"n": 5, "plausible": 0.0}
    assert report["left_out"] == ["agreement"] and not report["unseen"]
    # Two standard errors of five such slices are 0.44: what is 0.4 away is not seen.
    table[sample_report.FLOOR]["plausible"] = 0.4
    report = sample_report.score_realism(inputs, rows, np.random.default_rng(0))
    assert report["unseen"] == list(sample_report.CONTROLS)
    table[sample_report.MIXED]["agreement"] = 0.1
    table[sample_report.SAMPLES]["agreement"] = np.float64(np.nan)  # no mask shows an organ
    report = sample_report.score_realism(inputs, rows, np.random.default_rng(0))
    assert report["rows"][sample_report.SAMPLES]["agreement"] is None  # JSON knows no NaN
    kinds = (sample_report.FLOOR, sample_report.RECONSTRUCTIONS, sample_report.SAMPLES)
    table = {name: {"kernel_distance": x} for name, x in zip(kinds, (1, 3, 7), strict=True)}
    costs = sample_report.score_costs(dataclasses.replace(inputs, segmenter=None), {}, table, None)
    assert costs == {"whole": {"decoder": 2, "priors": 4}}


def own_masks(folder):
    """A user's masks: one as the study's lie, and the same one stored mirrored."""
    rows, columns = np.mgrid[:64, :32]
    mask = np.where(np.hypot(rows - 32, columns - 16) < 8 + 3, 5, 0).astype(np.uint8)
    mask[:8, :8] = 9
    nifti.write(folder / "a.nii.gz", mask, np.eye(4))
    mirrored = np.diag([-1.0, 1, 1, 1])
    mirrored[0, 3] = 63
    nifti.write(folder / "b.nii.gz", mask[::-1].astype(np.float32), mirrored)
    return mask


def test_layouts_of_the_user_s_own_masks(
    two_organs, organs_study, tmp_path, monkeypatch, no_report, capsys, one_by_one
):
    mask, given = own_masks(tmp_path), []
    whole = Prior.sample

    def sample(self, positions, *args, layouts, **options):
        given.append((positions, layouts))
        return whole(self, positions, *args, layouts=layouts, **options)

    monkeypatch.setattr(Prior, "sample", sample)
    with monkeypatch.context() as patch:  # each mask by the letter of its file: in turn
        patch.setattr(generate, "read_mask", lambda path, *_: path[-len("a.nii.gz")])
        assert "".join(generate.read_masks(str(tmp_path), None, None, 5)) == "ababa"
    monkeypatch.setattr(generate, "segmenter_of", lambda *_, **__: None)
    settings = config(two_organs, tmp_path / "out", n=3, layout=str(tmp_path))
    generate.generate(settings, DataConfig(data=str(organs_study)))
    classes = np.searchsorted([0, 5, 9], mask)[2::4, 2::4]
    layouts = np.concatenate([layouts.numpy() for _, layouts in given])
    for layout in layouts:  # a, b, and a again: the organs as they are, other tissue elsewhere
        assert np.array_equal(np.where(layout < 3, layout, 0), classes)
        assert (layout[classes == 0] >= 3).any()
    # The training slices with such a mask are the fourth of seven.
    assert np.concatenate([at for at, _ in given]).tolist() == [0.5] * 3
    assert "2 masks for 3 slices" in capsys.readouterr().out
    given.clear()
    one = {"n": 1, "layout": str(tmp_path / "a.nii.gz"), "position": 0.25}
    generate.generate(dataclasses.replace(settings, **one), DataConfig(data=str(organs_study)))
    assert given[0][0] == 0.25 and len(list(tmp_path.rglob("seg_*"))) == 1  # the three are gone
    # Beside them lie test slices near that position, each another one.
    near = one | {"n": 3, "batch_size": 1}
    monkeypatch.setattr(generate, "write_grid", lambda *them: given.append(them[-1]))
    generate.generate(dataclasses.replace(settings, **near), DataConfig(data=str(organs_study)))
    assert len(set(given[-1])) == 3


def test_a_user_s_own_mask_is_placed_as_the_study_s_slices_are(tmp_path):
    half = np.zeros((60, 60), np.uint8)
    half[:, :30] = 5
    nifti.write(tmp_path / "half.nii.gz", half, np.eye(4))
    where = {"fit": "stretch", "directions": "RA", "plane": "axial"}
    study = StudyInfo("s", 64, 32, {}, labels=(0, 5), **where)
    found = generate.read_mask(str(tmp_path / "half.nii.gz"), study, (16, 8))
    assert (found[:, :16] == 1).all() and not found[:, 16:].any()
    nifti.write(tmp_path / "small.nii.gz", half * (np.mgrid[:60, :60].max(0) < 2), np.eye(4))
    with pytest.raises(runtime.UserError, match=r"labels 5. smaller than a cell .* 4x4 pixels"):
        generate.read_mask(str(tmp_path / "small.nii.gz"), study, (16, 8))


def test_a_study_with_other_labels_is_refused(two_organs, organs_study, tmp_path):
    folder = shutil.copytree(organs_study, tmp_path / "keras_slices_data")
    for path in folder.glob("keras_slices_seg_*/seg_*"):
        mask = np.array(nifti.read(path).raw)
        nifti.write(path, np.where(mask == 9, 7, mask), np.eye(4))
    with pytest.raises(runtime.UserError, match=r"the labels 0, 5, 7; .* learnt 0, 5, 9. Fix: "):
        generate.generate(config(two_organs, tmp_path / "out"), DataConfig(data=str(folder)))


def test_a_mask_that_cannot_be_used_is_named_with_its_reason(two_organs, organs_study, tmp_path):
    mask = own_masks(tmp_path)
    nifti.write(tmp_path / "c.nii.gz", np.where(mask == 9, 7, mask), np.eye(4))
    nifti.write(tmp_path / "d.nii.gz", np.stack([mask] * 3, 2), np.eye(4))
    coronal = np.eye(4)[[0, 2, 1, 3]]
    nifti.write(tmp_path / "e.nii.gz", mask, coronal)
    data = DataConfig(data=str(organs_study))
    with pytest.raises(runtime.UserError, match="3 of 5 files cannot be used") as error:
        settings = config(two_organs, tmp_path / "out", n=1, layout=str(tmp_path))
        generate.generate(settings, data)
    for reason in (
        "c.nii.gz: labels 7; the model knows 0, 5, 9",
        "d.nii.gz: an array of 64x32x3 pixels; expected a 2-D slice",
        "e.nii.gz: it lies in another plane than the training slices, which are axial",
    ):
        assert reason in str(error.value)
    (tmp_path / "empty").mkdir()
    for wrong, reason in (("nowhere", "not there"), ("empty", "it holds no NIfTI files")):
        with pytest.raises(runtime.UserError, match=f"{wrong}: .*{reason}"):
            settings = config(two_organs, tmp_path / "out", layout=str(tmp_path / wrong))
            generate.generate(settings, data)


def test_layouts_alone_are_masks_and_a_picture(two_organs, organs_study, tmp_path, monkeypatch):
    monkeypatch.setattr(Prior, "sample", None)  # nothing is sampled
    data = DataConfig(data=str(organs_study))
    generate.generate(config(two_organs, tmp_path, n=33, layouts_only=True), data)
    assert not (tmp_path / generate.NIFTI).exists() and (tmp_path / "layouts.png").is_file()
    files = sorted((tmp_path / generate.MASK_FOLDER).iterdir())
    images = [nibabel.load(file) for file in files]
    masks = np.stack([np.asarray(image.dataobj) for image in images])
    assert masks.shape == (33, 64, 32) and set(np.unique(masks)) == {0, 5, 9}
    assert np.array_equal(images[0].affine, two_organs[3]["train"].affines[0])
    assert (masks[:, 28:36, 12:20] == 5).mean() > 0.9  # the middle of every disc
    assert json.loads((tmp_path / "manifest.json").read_text())["done"] == 33
    for given in (tmp_path / generate.MASK_FOLDER, files[3]):  # perhaps corrected by hand
        with pytest.raises(runtime.UserError, match="new slices would replace these masks"):
            generate.generate(config(two_organs, tmp_path, n=1, layout=str(given)), data)
    monkeypatch.chdir(tmp_path)  # by whatever path
    with pytest.raises(runtime.UserError, match="new slices would replace these masks"):
        generate.clear(Path(), "", str(tmp_path / generate.MASK_FOLDER))
    assert all(file.is_file() for file in files)


def test_masks_of_layouts_are_as_round_as_their_shapes():
    """The signed distances of a disc whose edge lies between the cells give back the disc."""
    rows, columns = np.mgrid[:64, :64]
    disc = np.hypot(rows - 31.5, columns - 33.1) < 13.3
    inside = 13.3 / 4 - np.hypot(*(np.mgrid[:16, :16] - np.array([30, 31.6])[:, None, None] / 4))
    (mask,) = generate.masks_of(np.stack([-inside, inside])[None], (64, 64))
    assert np.count_nonzero(mask != disc) < 0.02 * disc.sum()


def test_a_picture_of_layouts_tells_air_from_the_darkest_tissue(tmp_path, monkeypatch):
    """Of three labels: air is black, organs are grey, and regions rise from 1 to white."""
    shown = []
    monkeypatch.setattr(figures, "slice_grid", lambda _, groups, *__, **look: shown.append(groups))
    layouts = np.array([[[0, 1, 2], [3, 4, 8]]])
    album = SimpleNamespace(out=tmp_path, look={})
    generate.write_layouts(album, layouts, np.zeros((1, 4, 6), np.uint8), 3)
    ((_, picture, _),) = shown[0]["new layouts"]
    assert picture[::2, ::2].tolist() == [[0, 3, 3], [1, 2, 6]]


def test_slices_for_nnunet(two_organs, organs_study, tmp_path, monkeypatch, no_report):
    """One plane a volume, which is the thickest axis; consecutive labels; the same slices."""
    monkeypatch.setattr(generate, "segmenter_of", lambda *_, **__: None)
    settings = config(two_organs, tmp_path, n=3, batch_size=2, nnunet="Dataset501_Two", seed=2)
    generate.generate(settings, DataConfig(data=str(organs_study)))
    folder = tmp_path / "Dataset501_Two"
    about = json.loads((folder / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "label_5": 1, "label_9": 2}
    assert about["channel_names"] == {"0": "MR"} and about["file_ending"] == ".nii.gz"
    images, labels = (sorted((folder / kind).iterdir()) for kind in ("imagesTr", "labelsTr"))
    assert about["numTraining"] == len(images) == len(labels) == 3
    names = [path.name.replace("_0000.nii", ".nii") for path in images]
    assert names == [path.name for path in labels]
    assert names[0] == "synthetic_2000006.nii.gz"  # slices of other seeds may lie beside it
    ours = [nibabel.load(path) for path in images + labels]
    written = (sorted((tmp_path / of).iterdir()) for of in (generate.NIFTI, generate.MASK_FOLDER))
    theirs = [nibabel.load(path) for paths in written for path in paths]
    for i, (volume, plane) in enumerate(zip(ours, theirs, strict=True)):
        assert volume.shape == (64, 32, 1) and np.argmax(volume.header.get_zooms()) == 2
        assert np.array_equal(volume.affine[:, :2], plane.affine[:, :2])
        assert np.array_equal(plane.affine, np.eye(4))  # the study's, whatever nnU-Net is given
        values = volume.get_fdata() if i < 3 else np.array([0, 5, 9])[volume.dataobj]
        assert np.allclose(values[..., 0], plane.get_fdata())
    again = dataclasses.replace(settings, n=1)
    generate.generate(again, DataConfig(data=str(organs_study)))  # nothing of three is left
    assert [len(list((folder / kind).iterdir())) for kind in ("imagesTr", "labelsTr")] == [1, 1]
    with pytest.raises(runtime.UserError, match="nnU-Net needs slices"):
        dataclasses.replace(settings, layouts_only=True)
    other = dataclasses.replace(settings, n=2, nnunet="Dataset502_More")  # the first one stays
    generate.generate(other, DataConfig(data=str(organs_study)))
    assert len(list((folder / "imagesTr").iterdir())) == 1


WANTS_MASKS = [{"layout": "."}, {"layouts_only": True}, {"nnunet": "Dataset501_A"}]


@pytest.mark.parametrize("flag", WANTS_MASKS)
def test_what_needs_masks_is_refused_without(trained, tmp_path, flag):
    with pytest.raises(runtime.UserError, match="learnt no organs"):
        generate.generate(config(trained, tmp_path, **flag))
