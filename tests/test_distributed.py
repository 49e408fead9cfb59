"""Two processes under torchrun train as one does on the joined batch.

Each of the two runs this file itself.
"""

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import SMALL, load

import train
import train_prior
from dataset import DataConfig
from new_slices.prior import PriorConfig
from support import runtime, trainer

# Many codes die, and restart at random vectors.
MODEL = dataclasses.replace(SMALL, K=32, revive=0.5)
ONE_LAYER = {"prior_top_layers": 1, "prior_bottom_layers": 1}
TINY = PriorConfig(prior_channels=16, prior_heads=2, prior_dropout=0.0, **ONE_LAYER)
# What is compared exactly is computed in float32 on every machine.
SETTINGS = {"bf16": "off", "device": "cpu", "lr": 1e-3, "schedule": "cosine"}
SETTINGS |= {"weight_decay": 0.01, "clip": 1.0}


def fit(study, out, batch_size, checkpoint=None):
    config = trainer.TrainConfig(out=str(out), epochs=2, batch_size=batch_size, **SETTINGS)
    data = DataConfig(data=str(study), height=64, width=32)
    loss = train.LossConfig(flip=True)
    return train.train_autoencoder(train.Settings(data, config, MODEL, loss, "", checkpoint))


def fit_prior(autoencoder, out, batch_size):
    config = trainer.TrainConfig(out=str(out), epochs=2, batch_size=batch_size, **SETTINGS)
    codes = train_prior.CodesConfig(str(autoencoder))
    settings = train_prior.Settings(codes=codes, prior=TINY, train=config)
    return train_prior.train_prior(settings)


def in_the_6th_step_of_rank_1(act):
    """`train.losses`, and once `act` on its terms.

    Rank 1 has no slice of the 4th step, so this is its 5th.
    """
    losses, steps = train.losses, itertools.count(1)

    def watched(*args):
        terms = losses(*args)
        if runtime.rank() == 1 and terms["loss"].requires_grad and next(steps) == 5:
            act(terms)
        return terms

    return watched


def on_one_of_two(study: str, autoencoder: str, out: Path) -> None:
    with runtime.ranks("cpu"):
        fit_prior(autoencoder, out / "prior", batch_size=2)
        losses = train.losses
        train.losses = in_the_6th_step_of_rank_1(lambda terms: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            fit(study, out / "stopped", batch_size=2)
        train.losses = losses
        breaks = lambda terms: terms.update(loss=terms["loss"] * torch.nan)  # noqa: E731
        train.losses = in_the_6th_step_of_rank_1(breaks)
        fit(study, out / "broken", batch_size=2)


@pytest.fixture(scope="module")
def studied(study, tmp_path_factory):
    """13 slices to train on, 5 to validate: of batches of 4 one is left, no share for rank 1."""
    copy = shutil.copytree(study, tmp_path_factory.mktemp("odd") / study.name)
    next((copy / "keras_slices_train").iterdir()).unlink()
    out = tmp_path_factory.mktemp("ranks")
    fit(copy, out / "whole", batch_size=4)
    autoencoder = out / "whole" / "vqvae2_epoch_1.pth"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, __file__, copy, autoencoder, out],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return copy, out, done


def epochs(path):
    history = load(path)["history"]
    return [record for record in history if "epoch" in record]


def assert_close(one, other):
    """The curves of both runs by term, the codes that they used, their weights and codebooks."""
    for mine, theirs in zip(epochs(one), epochs(other), strict=True):
        for same in ("epoch", "step", "codes"):
            assert mine[same] == theirs[same]
        for split in ("train", "validate"):
            assert mine[split] == pytest.approx(theirs[split], rel=1e-5), split
        assert mine["lr"] == pytest.approx(theirs["lr"], rel=1e-9)
    one, other = (load(path)["model"] for path in (one, other))
    for name, value in one.items():
        said = lambda message, name=name: f"{name}: {message}"  # noqa: E731
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=said)


def test_the_prior_learns_as_one_process_does(studied):
    """Each rank hides codes of its own choice, so the runs are alike and not the same."""
    _, out, _ = studied
    fit_prior(out / "whole" / "vqvae2_epoch_1.pth", out / "prior_whole", batch_size=4)
    runs = [epochs(out / folder / "prior_epoch_final.pth") for folder in ("prior", "prior_whole")]
    for two_ranks, one_process in zip(*runs, strict=True):
        assert two_ranks["step"] == one_process["step"]
        assert two_ranks["lr"] == pytest.approx(one_process["lr"], rel=1e-9)
        for split in ("train", "validate"):
            assert two_ranks[split] == pytest.approx(one_process[split], rel=0.02), split


def test_the_autoencoder_is_that_of_one_process(studied):
    """After an epoch of two processes, with its odd last batch, validation and revivals."""
    _, out, _ = studied
    assert_close(out / "stopped" / "vqvae2_epoch_1.pth", out / "whole" / "vqvae2_epoch_1.pth")


def test_one_process_goes_on_where_two_were_stopped(studied):
    """Rank 1 alone was told to: both end at one step, and what both counted is saved."""
    study, out, _ = studied
    checkpoint = runtime.load_checkpoint(out / "stopped" / "vqvae2_interrupted.pth", "vqvae2")
    assert (checkpoint["step"], checkpoint["seen"], checkpoint["epoch"]) == (6, 8, 1)
    fit(study, out / "stopped", 4, checkpoint)
    final = "vqvae2_epoch_final.pth"
    assert_close(out / "stopped" / final, out / "whole" / final)


def test_a_rank_that_dies_ends_the_run_with_its_error(studied):
    _, out, done = studied
    assert done.returncode != 0
    assert "error of rank 1: the loss is nan at epoch 2, step 6, on case_00" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert done.stdout.count("training") == 3, done.stdout  # only rank 0 prints
    left = {path.name for path in (out / "broken").glob("*.pth")}
    assert left == {"vqvae2_epoch_1.pth", "vqvae2_best.pth"}
    assert runtime.load_checkpoint(out / "broken" / "vqvae2_epoch_1.pth", "vqvae2")["step"] == 4


def test_without_torchrun_there_is_no_process_group():
    with runtime.ranks("cpu"):
        assert not torch.distributed.is_initialized()
        assert (runtime.rank(), runtime.world()) == (0, 1)


if __name__ == "__main__":
    runtime.run_cli(lambda: on_one_of_two(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
