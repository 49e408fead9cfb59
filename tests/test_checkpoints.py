"""Checkpoints that are damaged, foreign or hostile: each is refused by name, and not used."""

import copy
import math
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from test_train import SHAPE_FLAGS, fit

import train
from modules import load_model
from support import nifti, runtime, trainer
from support.runtime import UserError


@pytest.fixture(scope="module")
def saved(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved")
    fit(study, out, epochs=1)
    return out / "vqvae2_epoch_1.pth"


@pytest.fixture(scope="module")
def stage(saved):
    return train.Autoencoder(train.make_settings({"resume": str(saved)}))


def save(checkpoint, path):
    """A file with the right sums, whatever is in it."""
    torch.save(checkpoint, path)
    return path


def resume(path, out, **flags):
    flags = {"resume": str(path), "epochs": 2, "out": str(out)} | flags
    return train.train_autoencoder(train.make_settings(flags))


def test_a_flipped_bit_is_found_wherever_it_lies(saved, tmp_path):
    whole, rng = saved.read_bytes(), random.Random(0)
    with zipfile.ZipFile(saved) as archive:
        members = [info for info in archive.infolist() if info.file_size]
    for info in members:
        # A local header is 30 bytes, the name and the extra field, which pads the data.
        start_ = info.header_offset + 30 + len(info.filename)
        start_ += int.from_bytes(whole[info.header_offset + 28 : info.header_offset + 30], "little")
        place = start_ + rng.randrange(info.file_size)
        path = flipped(whole, place, 1 << rng.randrange(8), tmp_path)
        named = r"flipped\.pth: damaged.*\(ValueError: .* is not what was written.*Fix"
        with pytest.raises(UserError, match=named):
            runtime.load_checkpoint(path, "vqvae2")


def flipped(whole, place, bits, folder):
    data = bytearray(whole)
    data[place] ^= bits
    (folder / "flipped.pth").write_bytes(data)
    return folder / "flipped.pth"


def test_no_bit_of_the_directory_changes_what_is_read(tmp_path):
    """One of its bits says that a member is a folder: PyTorch then reads none of its bytes, and
    returns memory that nobody has written.
    """
    runtime.save_checkpoint(tmp_path / "a.pth", {"kind": "vqvae2", "model": {"w": torch.ones(99)}})
    whole, refused = (tmp_path / "a.pth").read_bytes(), 0
    name = whole.rindex(b"/data/0")  # names stand twice: in front of the data, and in the directory
    for place in range(whole.rindex(b"PK\1\2", 0, name), name + 7):
        for bit in range(8):
            path = flipped(whole, place, 1 << bit, tmp_path)
            torch.zeros(99)  # what lies in memory
            try:
                found = runtime.load_checkpoint(path, "vqvae2")
                assert found["model"]["w"].tolist() == [1] * 99, (place, bit)
            except UserError as error:
                assert "flipped.pth" in str(error), (place, bit)
                refused += 1
    assert refused > 200


def set_(place, value):
    def change(checkpoint):
        *inside, name = place.split(".", 1)
        (checkpoint[inside[0]] if inside else checkpoint)[name] = value

    return change


def drop(name):
    return lambda checkpoint: checkpoint.pop(name)


def state_of_the_optimiser(change):
    return lambda checkpoint: [change(state) for state in checkpoint["optimiser"]["state"].values()]


WRONG = {
    "epoch a word": set_("epoch", "x"),
    "more seen than there are": set_("seen", 10**6),
    "best none": set_("best", None),
    "history a number": set_("history", 3),
    "no sums": drop("sums"),
    "sums of another length": set_("sums", torch.zeros(3, dtype=torch.float64)),
    "no counts": drop("counts"),
    "counts of another length": set_("counts.top", torch.zeros(3)),
    "batch size a word": set_("train_config.batch_size", "4"),
    "lr of nothing": set_("train_config.lr", 0.0),
    "no train_config": drop("train_config"),
    "no loss_config": drop("loss_config"),
    "K a word": set_("model_config.K", "16"),
    "no data": set_("data", {}),
    "height a word": set_("data.height", "64"),
    "no weights": set_("model", {}),
    "weights of another shape": set_("model.decoder.0.weight", torch.zeros(3)),
    "weights not finite": lambda c: c["model"]["decoder.0.weight"].fill_(math.nan),
    "a weight too many": set_("model.more", torch.zeros(1)),
    "optimiser a list": set_("optimiser", []),
    "optimiser without state": set_("optimiser", {"state": {}}),
    "optimiser of other shapes": state_of_the_optimiser(lambda s: s.update(exp_avg=torch.ones(3))),
    "optimiser of other names": state_of_the_optimiser(lambda s: s.pop("exp_avg_sq")),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_by_name(what, saved, stage, tmp_path):
    checkpoint = copy.deepcopy(runtime.load_checkpoint(saved, "vqvae2"))
    WRONG[what](checkpoint)
    path = save(checkpoint, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"wrong\.pth: damaged, or not written .* \(.*Fix"):
        settings = train.make_settings({"resume": str(path), "out": str(tmp_path)})
        trainer.Trainer(stage, settings.train, settings.checkpoint)


def test_what_we_never_wrote_decides_nothing(saved, tmp_path):
    checkpoint = runtime.load_checkpoint(saved, "vqvae2")
    checkpoint["cache"] = str(tmp_path / "gift")
    checkpoint["optimiser"]["param_groups"] = [{"lr": 1.0, "maximize": True, "params": [0]}] * 2
    path = save(checkpoint, tmp_path / "gift.pth")
    assert train.make_settings({"resume": str(path)}).data.cache == ""
    del checkpoint["data"]["directions"]  # before they were kept
    path = save(checkpoint, tmp_path / "gift.pth")
    gift, plain = resume(path, tmp_path / "a"), resume(saved, tmp_path / "b")
    weights = [runtime.load_checkpoint(path, "vqvae2")["model"] for path in (gift, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "gift").exists()


def test_a_run_of_another_revision_does_not_go_on_and_its_revision_is_named(saved, tmp_path):
    """A setting that we do not have would be lost in silence; the model can still be used."""
    checkpoint = runtime.load_checkpoint(saved, "vqvae2")
    checkpoint["train_config"]["momentum"] = 0.5
    checkpoint["history"][0]["run"]["revision"] = "5afe7e8"
    path = save(checkpoint, tmp_path / "older.pth")
    named = r"older\.pth: .*by 5afe7e8 \(.*momentum.*train again"
    with pytest.raises(UserError, match=named):
        resume(path, tmp_path / "a")
    assert load_model(path).epoch == 1


def test_a_broken_best_checkpoint_stops_no_resume(saved, tmp_path):
    (tmp_path / "vqvae2_best.pth").write_bytes(b"PK\x03\x04 cut off")
    best = resume(saved, tmp_path)
    assert runtime.load_checkpoint(best, "vqvae2")["epoch"] == 2


def altered(study, folder, split):
    """A copy of a study with one file of `keras_slices_<split>` altered."""
    shutil.copytree(study, folder)
    path = min((folder / f"keras_slices_{split}").iterdir())
    pixels = nifti.read(path).raw
    nifti.write(path, pixels[::-1].copy(), np.eye(4))
    return folder


@pytest.mark.parametrize("split", ["train", "seg_train"])
def test_a_run_does_not_go_on_with_other_slices_or_masks(masked_study, tmp_path, split):
    """Its best checkpoint stays, too: one that other slices made would pass for it."""
    fit(masked_study, tmp_path, epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    other = altered(masked_study, tmp_path / "other", split)
    named = r"epoch_1\.pth: trained on other slices, masks or affines than are in this study.*Fix"
    with pytest.raises(UserError, match=named):
        resume(tmp_path / "vqvae2_epoch_1.pth", tmp_path, data=str(other))
    turned = shutil.copytree(masked_study, tmp_path / "turned")
    for path in turned.rglob("*.nii*"):  # the same pixels, whose rows run where columns did
        image = nifti.read(path)
        nifti.write(path, image.raw, image.affine[[1, 0, 2, 3]])
    with pytest.raises(UserError, match=named):
        resume(tmp_path / "vqvae2_epoch_1.pth", tmp_path, data=str(turned))
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}


def test_with_another_validation_split_the_best_begins_anew(saved, study, tmp_path, capsys):
    """The loss on the old split says nothing of the new one: here it could never be reached."""
    checkpoints = tmp_path / "run"
    shutil.copytree(saved.parent, checkpoints)
    for name in ("best", "epoch_1"):
        checkpoint = runtime.load_checkpoint(checkpoints / f"vqvae2_{name}.pth", "vqvae2")
        save(checkpoint | {"best": 0.0}, checkpoints / f"vqvae2_{name}.pth")
    other = altered(study, tmp_path / "other", "validate")
    best = resume(checkpoints / "vqvae2_epoch_1.pth", checkpoints, data=str(other))
    told = capsys.readouterr().out
    assert "epoch_1.pth was validated on other slices or masks than are in this study" in told
    assert "the search for the best epoch starts again" in told and "(best so far)" in told
    assert runtime.load_checkpoint(best, "vqvae2")["epoch"] == 2


def test_a_run_into_the_folder_of_another_says_so(saved, study, tmp_path, capsys):
    best = tmp_path / "vqvae2_best.pth"
    note = f"note: this run writes over another run's {best}, on {study.name}"
    fit(study, tmp_path, epochs=1)
    assert "note:" not in capsys.readouterr().out
    resume(tmp_path / "vqvae2_epoch_1.pth", tmp_path)
    assert "note:" not in capsys.readouterr().out
    fit(study, tmp_path, epochs=1, seed=5)
    assert capsys.readouterr().out.count(note) == 1
    resume(saved, tmp_path)  # goes on from a checkpoint of another run
    assert capsys.readouterr().out.count(note) == 1
    fit(shutil.copytree(study, tmp_path / "another"), tmp_path, epochs=1, seed=6)
    assert capsys.readouterr().out.count(note) == 1  # on what was learnt there, not here


def test_an_interrupted_checkpoint_goes_when_its_run_has_finished(saved, study, tmp_path):
    stale = tmp_path / "vqvae2_interrupted.pth"
    shutil.copy(saved, stale)
    fit(study, tmp_path, epochs=1, seed=5)
    assert stale.exists()  # another run's, which may still go on
    resume(stale, tmp_path)
    assert not stale.exists()


def test_checkpoints_and_logs_name_no_folder(study, tmp_path):
    flags = [f"--data={study}", *SHAPE_FLAGS, "--epochs", 1, "--out", tmp_path / "out"]
    assert command(train, *flags)[0] == 0
    for path in (tmp_path / "out").iterdir():
        text = path.read_bytes()
        for folder in (tmp_path, study.parent, Path.home()):
            assert str(folder).encode() not in text, path.name
    checkpoint = runtime.load_checkpoint(tmp_path / "out" / "vqvae2_best.pth", "vqvae2")
    argv = checkpoint["history"][0]["run"]["argv"]
    assert argv[:2] == ["train.py", f"--data={study.name}"] and argv[-2:] == ["--out", "out"]


def test_load_model_opens_an_autoencoder_and_says_what_another_file_is(saved, study, tmp_path):
    trained = load_model(saved)
    checkpoint = runtime.load_checkpoint(saved, "vqvae2")
    assert not trained.model.training and trained.epoch == 1
    assert (trained.path, trained.sha256) == (saved, runtime.sha256(saved))
    assert trained.study.labels == () and trained.study.study == study.name
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, checkpoint["model"][name])
    prior = save(checkpoint | {"kind": "prior"}, tmp_path / "prior_best.pth")
    named = r"prior_best\.pth: the priors of train_prior\.py; .* Fix: name vqvae2_best\.pth\."
    with pytest.raises(UserError, match=named):
        load_model(prior)
    with pytest.raises(
        UserError, match=r"autoencoder of train\.py; expected the priors.*name prior_best\.pth"
    ):
        runtime.load_checkpoint(saved, "prior")
    foreign = save(checkpoint | {"kind": "cat"}, tmp_path / "cat.pth")
    with pytest.raises(UserError, match=r"cat\.pth: cat; expected an autoencoder"):
        runtime.load_checkpoint(foreign, "vqvae2")
