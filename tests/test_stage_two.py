"""Stage two: the priors trained on the codes of a small autoencoder, by the same loop."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import assert_same, fit
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import loop
import runtime
import train
from codes import extract_codes
from dataset import DataConfig, open_study
from modules import load_model
from prior import Prior, PriorConfig

TINY = PriorConfig(
    prior_channels=16, prior_heads=2, prior_top_layers=1, prior_bottom_layers=1, prior_condition_layers=1
)


@pytest.fixture(scope="module")
def autoencoder(study, tmp_path_factory):
    return fit(study, tmp_path_factory.mktemp("one"), epochs=1)


def fit_prior(autoencoder, out, epochs=1, checkpoint=None, **settings):
    settings = {"batch_size": 4, "device": "cpu", "lr": 1e-3, **settings}
    config = loop.TrainConfig(out=str(out), epochs=epochs, **settings)
    codes = train.CodesConfig(checkpoint=str(autoencoder))
    return train.train_prior(
        train.Settings("prior", codes=codes, prior=TINY, train=config, checkpoint=checkpoint)
    )


def maps_of(autoencoder, out):
    """The code maps by hand: slice by slice, as they are and mirrored."""
    checkpoint = runtime.load_checkpoint(autoencoder, "vqvae2")
    model = load_model(checkpoint, "").eval()
    splits = open_study(DataConfig(data=checkpoint["data"]["study"], height=64, width=32))
    with torch.inference_mode():
        return splits, {
            name: [
                [model.encode(x) for x in (split.images([i]), split.images([i]).flip(2))]
                for i in range(len(split))
            ]
            for name, split in splits.items()
        }


def test_codes_are_the_autoencoder_s_and_kept_for_it_alone(autoencoder, tmp_path, monkeypatch):
    fit_prior(autoencoder, tmp_path)
    splits, by_hand = maps_of(autoencoder, tmp_path)
    with np.load(tmp_path / "codes.npz") as kept:
        for name, slices in by_hand.items():
            for i, sides in enumerate(slices):
                for side, levels in enumerate(sides):
                    for level, codes in zip(("top", "bottom"), levels, strict=True):
                        assert np.array_equal(kept[f"{name}_{level}"][side, i], codes[0])
    read = extract_codes(None, splits, runtime.sha256(autoencoder), tmp_path / "codes.npz")
    assert read["train_top"].shape == (2, 14, 8, 4)  # read, for no model was there
    with pytest.raises(AttributeError):  # another autoencoder: they would be made anew
        extract_codes(None, splits, "other", tmp_path / "codes.npz")


def test_validation_is_the_exact_likelihood(autoencoder, tmp_path):
    path = fit_prior(autoencoder, tmp_path)
    checkpoint = runtime.load_checkpoint(path, "prior")
    model = Prior(PriorConfig(**checkpoint["model_config"]), checkpoint["top_shape"]).eval()
    model.load_state_dict(checkpoint["model"])
    splits, by_hand = maps_of(autoencoder, tmp_path)
    with torch.inference_mode():
        nats = [
            model.nats(*sides[0], torch.tensor([position]))
            for sides, position in zip(by_hand["validate"], splits["validate"].positions, strict=True)
        ]
    total = sum(level.double().sum().item() for slice_ in nats for level in slice_.values())
    logged = checkpoint["history"][-1]["validate"]
    assert logged["bits_per_pixel"] == pytest.approx(total / math.log(2) / (5 * 64 * 32), rel=1e-5)
    assert logged["loss"] == pytest.approx(total / (5 * (32 + 128)), rel=1e-5)


def test_the_bottom_prior_can_learn_from_fewer_slices_than_the_top(autoencoder, tmp_path):
    codes = train.CodesConfig(checkpoint=str(autoencoder), forget=0.0, bottom_every=2)
    config = loop.TrainConfig(out=str(tmp_path), device="cpu")
    settings = train.Settings("prior", codes=codes, prior=replace(TINY, prior_dropout=0.0), train=config)
    stage = train.CodePriors(settings)
    stage.start_epoch(torch.Generator())
    indices = torch.tensor([3, 0, 13, 7])  # of which the first two
    maps = [
        stage.maps[f"train_{level}"][stage.mirrored[indices], indices].long() for level in ("top", "bottom")
    ]
    nats = stage.model(*maps, stage.positions["train"][indices], stage.mirrored[indices])
    terms = stage.batch_losses("train", indices)
    assert terms["nats_top"].item() == pytest.approx(nats["top"].mean().item(), rel=1e-5)
    assert terms["nats_bottom"].item() == pytest.approx(nats["bottom"][:2].mean().item(), rel=1e-5)
    mean = (32 * terms["nats_top"] + 128 * terms["nats_bottom"]).item() / 160  # as if all bottoms were there
    assert terms["loss"].item() == pytest.approx(mean, rel=1e-5)
    assert terms["bits_per_pixel"].item() == pytest.approx(160 * mean / math.log(2) / (64 * 32), rel=1e-5)
    stage.model.eval()  # every slice is validated
    where = stage.positions["validate"][:3]
    nats = stage.model.nats(*(stage.maps[f"validate_{level}"][0, :3].long() for level in nats), where)
    assert stage.batch_losses("validate", torch.arange(3))["nats_bottom"].item() == pytest.approx(
        nats["bottom"].mean().item(), rel=1e-5
    )
    with pytest.raises(ValueError, match="--bottom-every is 0"):
        train.CodesConfig(bottom_every=0)
    with pytest.raises(ValueError, match="--bottom-every is 3, --batch-size 4"):
        train.train_prior(
            replace(settings, codes=replace(codes, bottom_every=3), train=replace(config, batch_size=4))
        )


def test_files_bear_its_name_and_the_autoencoder_s_hash(autoencoder, tmp_path):
    path = fit_prior(autoencoder, tmp_path, epochs=2)
    assert path.name == "prior_best.pth"
    assert {"prior_log.jsonl", "prior_train_losses.txt", "prior_loss_plot.png", "prior_epoch_2.pth"} <= {
        file.name for file in tmp_path.iterdir()
    }
    checkpoint = runtime.load_checkpoint(path, "prior")
    assert checkpoint["autoencoder_sha256"] == runtime.sha256(autoencoder)
    lines = (tmp_path / "prior_log.jsonl").read_text().splitlines()
    assert len(lines) == 3 and "nats_top" in json.loads(lines[-1])["validate"]
    with pytest.raises(ValueError, match="vqvae2"):
        runtime.load_checkpoint(path, "vqvae2")


def test_it_resumes_bit_for_bit_and_only_with_its_autoencoder(study, autoencoder, tmp_path):
    fit_prior(autoencoder, tmp_path / "whole", epochs=2)
    fit_prior(autoencoder, tmp_path / "broken", epochs=2)
    checkpoint = runtime.load_checkpoint(tmp_path / "broken" / "prior_epoch_1.pth", "prior")
    fit_prior(autoencoder, tmp_path / "broken", epochs=2, checkpoint=checkpoint)
    final = "prior_epoch_final.pth"
    assert_same(tmp_path / "broken" / final, tmp_path / "whole" / final)
    other = fit(study, tmp_path / "other", epochs=1, seed=5)
    with pytest.raises(ValueError, match="another autoencoder"):
        fit_prior(other, tmp_path / "broken", epochs=2, checkpoint=checkpoint)


def test_patience_ends_a_run_that_no_longer_improves(autoencoder, tmp_path):
    path = fit_prior(autoencoder, tmp_path, epochs=50, patience=2, lr=1e-30)
    assert runtime.load_checkpoint(tmp_path / "prior_epoch_final.pth", "prior")["epoch"] == 3
    assert runtime.load_checkpoint(path, "prior")["epoch"] == 1


def test_a_step_never_waits_for_the_device(autoencoder, tmp_path, monkeypatch):
    """Fake tensors stand in for a GPU's: whatever needs a value of theirs raises."""
    config = loop.TrainConfig(out=str(tmp_path), device="cpu", clip=1.0, optimiser="muon")
    codes = train.CodesConfig(checkpoint=str(autoencoder))
    stage = train.CodePriors(train.Settings("prior", codes=codes, prior=TINY, train=config))
    stage.start_epoch(torch.Generator())
    run = loop.Trainer(stage, config)
    stage.model.train()
    monkeypatch.setattr(run, "show_loss", lambda *args: None)  # at the loss: on a GPU now and then
    with FakeTensorMode(allow_non_fake_inputs=True):
        run.train_step(torch.tensor([3, 0, 13, 7]), None)
        with pytest.raises(DataDependentOutputException):
            torch.ones(1).item()
