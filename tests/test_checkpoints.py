"""Checkpoints that are damaged, foreign or hostile: each is refused by name, and nothing of them is
used.
"""

import copy
import math
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
from test_train import SHAPE_FLAGS, fit

import train
from modules import load_model
from support import runtime, trainer
from support.runtime import UserError


@pytest.fixture(scope="module")
def saved(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved")
    fit(study, out, epochs=1)
    return out / "vqvae2_epoch_1.pth"


@pytest.fixture(scope="module")
def stage(saved):
    return train.Autoencoder(train.make_settings({"resume": str(saved)}))


def resume(path, out):
    return train.train_autoencoder(
        train.make_settings({"resume": str(path), "epochs": 2, "out": str(out)})
    )


def write(checkpoint, path):
    """A file with the right sums, whatever is in it."""
    torch.save({key: value for key, value in checkpoint.items() if key != "path"}, path)
    return path


def test_a_flipped_bit_is_found_wherever_it_lies(saved, tmp_path):
    whole, rng = saved.read_bytes(), random.Random(0)
    with zipfile.ZipFile(saved) as archive:
        members = [info for info in archive.infolist() if info.file_size]
    for info in members:
        data = bytearray(whole)
        # a local header is 30 bytes, the name and the extra field, which pads the data
        start_ = info.header_offset + 30 + len(info.filename)
        start_ += int.from_bytes(whole[info.header_offset + 28 : info.header_offset + 30], "little")
        data[start_ + rng.randrange(info.file_size)] ^= 1 << rng.randrange(8)
        path = tmp_path / "flipped.pth"
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=r"flipped\.pth: not a whole checkpoint \(damaged in .*Fix"
        ):
            runtime.load_checkpoint(path, "vqvae2")


def set_(name, value):
    def change(checkpoint):
        place, *inner = name.split(".")
        if inner:
            checkpoint[place][inner[0]] = value
        else:
            checkpoint[place] = value

    return change


def drop(name):
    return lambda checkpoint: checkpoint.pop(name)


def optimiser(change):
    return lambda checkpoint: [change(state) for state in checkpoint["optimiser"]["state"].values()]


WRONG = {
    "epoch a word": set_("epoch", "x"),
    "epoch negative": set_("epoch", -1),
    "epoch a truth": set_("epoch", True),
    "more seen than there are": set_("seen", 10**6),
    "best none": set_("best", None),
    "best nan": set_("best", math.nan),
    "best epoch to come": set_("best_epoch", 7),
    "seconds infinite": set_("seconds", math.inf),
    "step huge": set_("step", 2**70),
    "history a number": set_("history", 3),
    "history of tensors": set_("history", [{"a": torch.zeros(1)}]),
    "history without losses": set_("history", [{"epoch": 1}]),
    "no sums": drop("sums"),
    "sums of another length": set_("sums", torch.zeros(3, dtype=torch.float64)),
    "counts of another type": set_("counts.top", torch.zeros(16)),
    "no counts": drop("counts"),
    "batch size a word": set_("train_config.batch_size", "4"),
    "lr of nothing": set_("train_config.lr", 0.0),
    "no train_config": drop("train_config"),
    "no loss_config": drop("loss_config"),
    "K a word": set_("model_config.K", "16"),
    "more blocks than weights": set_("model_config.decoder_blocks", 10**9),
    "channels that fill the memory": set_("model_config.channels", 10**12),
    "no data": set_("data", {}),
    "height a word": set_("data.height", "64"),
    "no weights": set_("model", {}),
    "weights of another shape": set_("model.decoder.0.weight", torch.zeros(3)),
    "weights of another type": lambda c: c["model"].update(
        {"decoder.0.weight": c["model"]["decoder.0.weight"].double()}
    ),
    "weights not finite": lambda c: c["model"]["decoder.0.weight"].fill_(math.nan),
    "a weight too many": set_("model.more", torch.zeros(1)),
    "sparse weights": lambda c: c["model"].update(
        {"decoder.0.bias": c["model"]["decoder.0.bias"].to_sparse()}
    ),
    "optimiser a list": set_("optimiser", []),
    "optimiser without state": set_("optimiser", {"state": {}}),
    "optimiser of other shapes": optimiser(lambda s: s.update(exp_avg=torch.zeros(3))),
    "optimiser of other names": optimiser(lambda s: s.pop("exp_avg_sq")),
    "optimiser not finite": optimiser(lambda s: s["exp_avg"].fill_(math.inf)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_by_name(what, saved, stage, tmp_path):
    checkpoint = copy.deepcopy(runtime.load_checkpoint(saved, "vqvae2"))
    WRONG[what](checkpoint)
    path = write(checkpoint, tmp_path / "wrong.pth")
    weights = copy.deepcopy(stage.model.state_dict())
    with pytest.raises(UserError, match=r"wrong\.pth.*Fix"):
        settings = train.make_settings({"resume": str(path), "out": str(tmp_path)})
        trainer.Trainer(stage, settings.train, settings.checkpoint)
    assert all(
        torch.equal(value, weights[name]) for name, value in stage.model.state_dict().items()
    )


def test_what_we_never_wrote_decides_nothing(saved, tmp_path):
    checkpoint = runtime.load_checkpoint(saved, "vqvae2")
    checkpoint["train_config"]["cache"] = checkpoint["cache"] = str(tmp_path / "gift")
    checkpoint["optimiser"]["param_groups"] = [{"lr": 1.0, "maximize": True, "params": [0]}] * 2
    path = write(checkpoint, tmp_path / "gift.pth")
    assert train.make_settings({"resume": str(path)}).data.cache == ""
    gift, plain = resume(path, tmp_path / "a"), resume(saved, tmp_path / "b")
    weights = [runtime.load_checkpoint(path, "vqvae2")["model"] for path in (gift, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "gift").exists()


def test_other_archives_are_refused(saved, tmp_path):
    with zipfile.ZipFile(saved) as whole, zipfile.ZipFile(tmp_path / "z.pth", "w") as packed:
        for info in whole.infolist():
            packed.writestr(info.filename, whole.read(info), zipfile.ZIP_DEFLATED)
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match=r"z\.pth: not a whole checkpoint \(compressed"):
        runtime.load_checkpoint(tmp_path / "z.pth", "vqvae2")
    for name in ("pipe", "folder"):
        with pytest.raises(FileNotFoundError, match=f"{name}.pth: no such checkpoint"):
            runtime.load_checkpoint(tmp_path / f"{name}.pth", "vqvae2")


def test_a_broken_best_checkpoint_stops_no_resume(saved, tmp_path):
    (tmp_path / "vqvae2_best.pth").write_bytes(b"PK\x03\x04 cut off")
    best = resume(saved, tmp_path)
    assert runtime.load_checkpoint(best, "vqvae2")["epoch"] == 2


def test_two_runs_into_one_folder_are_refused(study, tmp_path):
    with (
        runtime.only_run_in(tmp_path / "out"),
        pytest.raises(UserError, match="another run is writing there"),
    ):
        fit(study, tmp_path / "out", epochs=1)
    assert not list((tmp_path / "out").iterdir())


def test_progress_is_all_of_a_run_that_is_kept():
    """A field that no checkpoint restored would begin at its default after a resume."""
    assert set(vars(trainer.Progress())) == {
        "epoch", "seen", "step", "best", "best_epoch", "seconds", "epoch_seconds", "history"
    }  # fmt: skip


def test_checkpoints_and_logs_name_no_folder(study, tmp_path, monkeypatch):
    flags = [f"--data={study}", *SHAPE_FLAGS, "--epochs", 1, "--out", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", [str(Path(train.__file__)), *map(str, flags)])
    train.main()
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
    prior = write(checkpoint | {"kind": "prior"}, tmp_path / "prior_best.pth")
    with pytest.raises(
        UserError,
        match=r"prior_best\.pth: the priors of an autoencoder; expected an autoencoder\. "
        r"Fix: name vqvae2_best\.pth\.",
    ):
        load_model(prior)
    with pytest.raises(UserError, match=r"autoencoder; expected the priors.*name prior_best\.pth"):
        runtime.load_checkpoint(saved, "prior")
    foreign = write(checkpoint | {"kind": "cat"}, tmp_path / "cat.pth")
    with pytest.raises(UserError, match=r"cat\.pth: cat; expected an autoencoder or the priors"):
        runtime.load_checkpoint(foreign, "vqvae2", "prior")
