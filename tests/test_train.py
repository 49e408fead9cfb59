import itertools
import json
import math
import operator
import re
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, run, start
from test_predict import data_of, write_checkpoint

import predict
import reconstruct
import train
import train_prior
from dataset import NO_MASK, SPLITS, DataConfig, open_study
from modules import VQVAE2, Output, Quantised, VQVAE2Config
from new_slices.layouts import middles
from support import metrics, nifti, runtime, trainer

SMALL = VQVAE2Config(K=16, D=8, channels=16, top_channels=24, residual_channels=8, decoder_blocks=1)
SHAPE_FLAGS = (
    "--K 16 --D 8 --channels 16 --top-channels 24 --residual-channels 8 --decoder-blocks 1"
    " --height 64 --width 32 --batch-size 4 --device cpu"
).split()


def fit(study, out, epochs=2, checkpoint=None, **settings):
    data = DataConfig(data=str(study), height=64, width=32)
    settings = {"batch_size": 4, "device": "cpu", "lr": 1e-3, **settings}
    config = trainer.TrainConfig(out=str(out), epochs=epochs, **settings)
    loss = train.LossConfig(flip=True)
    return train.train_autoencoder(train.Settings(data, config, SMALL, loss, "", checkpoint))


def tensors(value, prefix=""):
    """Every tensor and number of a checkpoint by its place, times, paths and revisions apart."""
    apart = {"history", "seconds", "epoch_seconds", "train_config", "data", "path", "revision"}
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in apart:
                yield from tensors(inner, f"{prefix}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from tensors(inner, f"{prefix}/{i}")
    else:
        yield prefix, value


def load(path):
    """A checkpoint of either kind, which its name tells."""
    return runtime.load_checkpoint(path, path.name.split("_")[0])


def assert_same(one, other):
    one, other = (dict(tensors(load(path))) for path in (one, other))
    assert one.keys() == other.keys()
    for key, value in one.items():
        equal = torch.equal if torch.is_tensor(value) else operator.eq
        assert equal(value, other[key]), key


# ---- the terms ----


def output_of(y, top=0.0, bottom=0.0, prices=((0.0,), (0.0,))):
    codes, pairs = torch.zeros(1, dtype=torch.int64), zip((top, bottom), prices, strict=True)
    levels = [Quantised(torch.zeros(1), codes, *map(torch.tensor, pair)) for pair in pairs]
    return Output(y, *levels)


def test_loss_is_the_report_s_arithmetic():
    """reconstruction + beta * commitment + price of a code, in float64 by hand."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 1, 16, 16)
    config = train.LossConfig(mse=2.0, l1=3.0, ssim=5.0, beta=0.25)
    terms = train.losses(x, output_of(y, top=0.5, bottom=1.5), config)
    d, ssim = (x - y).double().numpy(), metrics.ssim(x, y).mean().item()
    reconstruction = 2 * (d**2).mean() + 3 * np.abs(d).mean() + 5 * (1 - ssim)
    assert terms["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(reconstruction + 0.25 * (0.5 + 1.5), rel=1e-5)
    priced = output_of(y, top=0.5, bottom=1.5, prices=((1.0,), (2.0, 2.0, 3.0, 7.0)))
    assert train.losses(x, priced, config)["loss"].item() - terms["loss"].item() == pytest.approx(3)
    with pytest.raises(runtime.UserError, match="--mse, --l1 and --ssim are all 0"):
        train.LossConfig(mse=0.0)


def test_learning_rate_rises_then_falls():
    config = trainer.TrainConfig(lr=2.0, schedule="cosine", warmup=0.1)
    rates = [trainer.learning_rate(config, p) for p in (0, 0.05, 0.1, 0.5, 1.0, 1.3)]
    cosine = [1 + math.cos(math.pi * p) for p in (0, 0.05, 0.1, 0.5, 1.0, 1.0)]
    assert rates == pytest.approx([0, 0.5 * cosine[1], cosine[2], cosine[3], 0, 0])
    assert trainer.learning_rate(trainer.TrainConfig(lr=2.0), 0.9) == 2.0


# ---- a run ----


def test_a_run_leaves_what_it_promises(study, tmp_path, capsys):
    (tmp_path / "vqvae2_epoch_9.pth").touch()  # of an earlier, longer run
    best = fit(study, tmp_path, epochs=5, keep=2)
    names = {"train_losses.txt", "val_losses.txt", "loss_plot.png", "log.jsonl", "index.html"}
    names |= {f"vqvae2_{name}.pth" for name in ("epoch_4", "epoch_5", "best", "epoch_final")}
    assert {path.name for path in tmp_path.iterdir()} == names
    head, *epochs = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"argv", "revision", "torch"} <= head["run"].keys() and head["train"]["seed"] == 0
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4, 5]
    assert all({"step", "train_loss", "val_loss", "slices_per_s"} <= line.keys() for line in epochs)
    assert epochs[-1]["step"] == 5 * 4  # 14 slices are 3 batches of 4 and one of 2
    losses = [float(line) for line in (tmp_path / "val_losses.txt").read_text().split()]
    assert losses == pytest.approx([line["val_loss"] for line in epochs], abs=1e-6)
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    shown = re.findall(r"^epoch .*, SSIM (.*?), ", capsys.readouterr().out, re.MULTILINE)
    assert shown == [f"{1 - line['validate']['ssim']:.4f}" for line in epochs]
    lowest = min(line["validate"]["reconstruction"] for line in epochs)
    assert runtime.load_checkpoint(best, "vqvae2")["best"] == lowest


def test_validation_is_the_exact_mean_of_the_split(study, tmp_path):
    """5 slices in batches of 4 and 1: slice by slice, from the checkpoint alone, the same."""
    fit(study, tmp_path, epochs=1)
    checkpoint = runtime.load_checkpoint(tmp_path / "vqvae2_epoch_1.pth", "vqvae2")
    model = VQVAE2(VQVAE2Config(**checkpoint["model_config"])).eval()
    model.load_state_dict(checkpoint["model"])
    split = open_study(DataConfig(data=str(study), height=64, width=32))["validate"]
    logged = checkpoint["history"][-1]
    with torch.inference_mode():
        outputs = [(x, model(x)) for x in (split.images([i]) for i in range(len(split)))]
        terms = [train.losses(x, output, train.LossConfig()) for x, output in outputs]
    for name in terms[0]:
        mean = np.mean([term[name].item() for term in terms])
        assert logged["validate"][name] == pytest.approx(mean, rel=1e-4), name
    used = {level: len(torch.cat([getattr(o, level).codes.flatten() for _, o in outputs]).unique())
            for level in ("top", "bottom")}  # fmt: skip
    assert {level: logged["codes"]["validate"][level]["used"] for level in used} == used


def test_same_seed_same_weights_other_seed_others(study, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(study, tmp_path / name, epochs=1, seed=seed)
    final = "vqvae2_epoch_final.pth"
    assert_same(tmp_path / "a" / final, tmp_path / "b" / final)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "a" / final, tmp_path / "c" / final)
    data, loss = DataConfig(data=str(study), height=64, width=32), train.LossConfig()
    configs = [trainer.TrainConfig(device="cpu", seed=seed) for seed in (1, 2)]
    stages = [train.Autoencoder(train.Settings(data, config, SMALL, loss)) for config in configs]
    one, other = (stage.model.encoder_bottom.parameters() for stage in stages)  # before a step
    assert not next(one).equal(next(other))


def test_best_survives_a_resume(study, tmp_path):
    """In its own folder; another one gets a best checkpoint of its own."""
    fit(study, tmp_path / "one", epochs=1)
    checkpoint = runtime.load_checkpoint(tmp_path / "one" / "vqvae2_epoch_1.pth", "vqvae2")
    best = runtime.load_checkpoint(tmp_path / "one" / "vqvae2_best.pth", "vqvae2")
    checkpoint["best"] = best["best"] = 0.0  # better than anything to come
    runtime.save_checkpoint(tmp_path / "one" / "vqvae2_best.pth", best)
    before = (tmp_path / "one" / "vqvae2_best.pth").read_bytes()
    fit(study, tmp_path / "one", epochs=2, checkpoint=checkpoint)
    assert (tmp_path / "one" / "vqvae2_best.pth").read_bytes() == before
    best = fit(study, tmp_path / "two", epochs=2, checkpoint=checkpoint)
    assert runtime.load_checkpoint(best, "vqvae2")["epoch"] == 2


@pytest.mark.parametrize("seen", [0, 8, 14])
def test_a_run_by_epochs_that_was_stopped_goes_on(study, tmp_path, monkeypatch, seen):
    """Before the first step, in the middle of an epoch, and after its last step."""
    fit(study, tmp_path / "whole", epochs=2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer.Pace, "signalled", lambda self, _: self.progress.seen == seen)
        fit(study, tmp_path / "broken", epochs=2)
    assert (tmp_path / "broken" / "index.html").is_file()  # an earlier run's is gone
    checkpoint = runtime.load_checkpoint(tmp_path / "broken" / "vqvae2_interrupted.pth", "vqvae2")
    assert (checkpoint["epoch"], checkpoint["seen"]) == (0, seen)
    fit(study, tmp_path / "broken", epochs=2, checkpoint=checkpoint)
    final = "vqvae2_epoch_final.pth"
    assert_same(tmp_path / "broken" / final, tmp_path / "whole" / final)


def test_a_run_without_an_epoch_leaves_another_one_s_log_beside_its_model(
    study, tmp_path, monkeypatch
):
    fit(study, tmp_path, epochs=1)
    files = {name: (tmp_path / name).read_bytes() for name in ("log.jsonl", "vqvae2_best.pth")}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer.Pace, "signalled", lambda self, _: self.progress.seen == 8)
        fit(study, tmp_path, epochs=3)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


def test_a_run_that_has_seen_more_slices_than_are_asked_takes_no_step(study, tmp_path, monkeypatch):
    """It was stopped in its second epoch of 14, and is to end after ten slices of the first."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer.Pace, "signalled", lambda self, _: self.slices_seen() == 18)
        fit(study, tmp_path, slices=28)
    checkpoint = runtime.load_checkpoint(tmp_path / "vqvae2_interrupted.pth", "vqvae2")
    assert (checkpoint["epoch"], checkpoint["seen"]) == (1, 4)
    fit(study, tmp_path, slices=10, checkpoint=checkpoint)
    final = runtime.load_checkpoint(tmp_path / "vqvae2_epoch_final.pth", "vqvae2")
    assert (final["epoch"], final["step"]) == (2, checkpoint["step"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_goes_on_bit_for_bit(study, tmp_path, number):
    """SIGTERM stops in the middle of an epoch; after SIGKILL there is the last epoch's checkpoint.

    80 slices are five epochs of 14, and ten slices of a sixth.
    """
    name, value = ("slices", 80) if number == signal.SIGTERM else ("epochs", 6)
    flags = f"--flip --schedule cosine --keep 0 --{name} {value} --data".split()
    fit_flags = {"keep": 0, "schedule": "cosine", "lr": 3e-4, name: value}
    process = start("train.py", *SHAPE_FLAGS, *flags, study, "--out", tmp_path / "broken")
    deadline = time.monotonic() + 300
    while not (tmp_path / "broken" / "vqvae2_epoch_2.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == (130 if number == signal.SIGTERM else -number), err
    assert "Traceback" not in err
    path = tmp_path / "broken" / "vqvae2_interrupted.pth"
    if number == signal.SIGKILL:
        epochs = (tmp_path / "broken").glob("vqvae2_epoch_*.pth")
        path = max(epochs, key=lambda path: int(path.stem.split("_")[-1]))
    checkpoint = runtime.load_checkpoint(path, "vqvae2")
    assert 0 < checkpoint["step"] < 23

    if number == signal.SIGTERM:  # as the message says, in another process
        assert f"--resume {path}" in out
        code, out, err = run("train.py", "--resume", path)
        assert code == 0, err
    else:
        fit(study, tmp_path / "broken", **fit_flags, checkpoint=checkpoint)
    fit(study, tmp_path / "whole", **fit_flags)
    final = "vqvae2_epoch_final.pth"
    assert_same(tmp_path / "broken" / final, tmp_path / "whole" / final)
    losses = [(tmp_path / run_ / "val_losses.txt").read_text() for run_ in ("broken", "whole")]
    assert losses[0] == losses[1]


def test_minutes_are_kept_and_the_schedule_fits_them(study, tmp_path, monkeypatch):
    """By a clock that moves on by 50 ms whenever the loop looks at it."""
    clock = itertools.count()
    monkeypatch.setattr(trainer.time, "monotonic", lambda: 0.05 * next(clock))
    fit(study, tmp_path, minutes=0.05, schedule="cosine", epochs=1)
    *_, last = runtime.load_checkpoint(tmp_path / "vqvae2_epoch_final.pth", "vqvae2")["history"]
    assert 3 <= last["seconds"] < 3.5 and last["step"] > 10 and last["lr"] < 1e-3 / 50
    final = runtime.load_checkpoint(tmp_path / "vqvae2_epoch_final.pth", "vqvae2")
    fit(study, tmp_path, minutes=0.05, epochs=1, checkpoint=final)  # its minutes are over
    final = runtime.load_checkpoint(tmp_path / "vqvae2_epoch_final.pth", "vqvae2")
    assert final["step"] == last["step"]


def test_training_begins_with_given_weights_and_codebooks(study, tmp_path):
    start = fit(study, tmp_path / "one", epochs=1)
    config, model = trainer.TrainConfig(device="cpu"), replace(SMALL, bit_weight=0.5)
    data = DataConfig(data=str(study), height=64, width=32)
    stage = train.Autoencoder(train.Settings(data, config, model, weights=str(start)))
    assert stage.model.config.bit_weight == stage.model.quantiser_top.bit_weight == 0.5
    theirs = runtime.load_checkpoint(start, "vqvae2")["model"]
    assert all(torch.equal(value, theirs[name]) for name, value in stage.model.state_dict().items())


def test_weights_that_learnt_other_labels_are_refused(organs_study, tmp_path):
    """As many as the study's 0, 5 and 9."""
    config, model = trainer.TrainConfig(device="cpu"), replace(SMALL, labels=3)
    others = {"model": VQVAE2(model).state_dict(), "data": data_of("s", labels=[0, 9, 11])}
    path = write_checkpoint(tmp_path / "x.pth", organs_study, model_config=asdict(model), **others)
    data = DataConfig(data=str(organs_study), height=64, width=32)
    with pytest.raises(runtime.UserError, match=r"0, 5, 9.* 0, 9, 11"):
        train.Autoencoder(train.Settings(data, config, model, weights=str(path)))


# ---- bad input ----


def test_a_loss_that_is_not_finite_names_step_files_and_last_checkpoint(study, tmp_path):
    fit(study, tmp_path, epochs=1)
    checkpoint = runtime.load_checkpoint(tmp_path / "vqvae2_epoch_1.pth", "vqvae2")
    checkpoint["model"]["decoder.0.weight"].fill_(float("inf"))
    with pytest.raises(ValueError) as error:
        fit(study, tmp_path, epochs=2, checkpoint=checkpoint)
    assert "epoch 2, step 5" in str(error.value) and "none of this run" in str(error.value)
    assert str(error.value).count("case_00") == 4


def test_weights_that_broke_in_the_last_step_are_not_saved(study, tmp_path):
    """14 slices in one batch: the loss before the step is finite, the weights after it are not."""
    with pytest.raises(ValueError, match=r"step 1, in validation. Last good checkpoint: none"):
        fit(study, tmp_path, epochs=1, batch_size=14, lr=1e38)
    assert not list(tmp_path.glob("*.pth"))


def test_flags_win_over_presets_and_checkpoints(study, tmp_path, monkeypatch):
    parser = runtime.parser("", train.StartConfig, *train.CONFIGS.values())

    def settings(*argv):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, argv)])
        return train.make_settings(vars(parser.parse_args()))

    assert settings("--preset", "best").train.slices == 22_000
    config = settings("--preset", "best", "--minutes", "2").train
    assert config.minutes == 2 and config.schedule == "cosine"  # the same, over two minutes
    assert settings("--preset", "best", "--slices", "9").train.slices == 9
    config = settings("--preset", "best", "--epochs", "3").train
    assert (config.slices, config.epochs, config.batch_size) == (0, 3, 1)
    fit(study, tmp_path, epochs=1, weight_decay=0.5)
    one = settings("--resume", tmp_path / "vqvae2_epoch_1.pth", "--epochs", "7")
    assert (one.train.epochs, one.train.batch_size, one.model.K, one.data.height) == (7, 4, 16, 64)
    one = settings("--weights", tmp_path / "vqvae2_epoch_1.pth", "--preset", "fewer-bits")
    assert (one.model.K, one.model.bit_weight, one.train.slices) == (16, 0.03, 7_400)
    # What the weights were trained on, or a copy of it that another test has opened.
    assert (Path(one.data.data).name, one.data.height) == (study.name, 64)
    with pytest.raises(FileNotFoundError, match=r"the study that .* was trained on is not there"):
        settings("--resume", tmp_path / "vqvae2_epoch_1.pth", "--cache", tmp_path / "other")
    changes = "--preset best", "--lr 0.1", "--D 16", "--seed 1", "--height 128", "--weights x.pth"
    for flag in map(str.split, changes):
        with pytest.raises(ValueError, match=f"{flag[0]}: a run that goes on keeps"):
            settings("--resume", tmp_path / "vqvae2_epoch_1.pth", *flag)


def test_slices_too_small_for_ssim_are_refused_before_training(tmp_path):
    for split, patient in zip(SPLITS, (4, 36, 40), strict=True):
        path = (
            tmp_path / "s" / f"keras_slices_{split}" / f"case_{patient:03d}_week_0_slice_0.nii.gz"
        )
        nifti.write(path, np.random.default_rng(patient).random((40, 10)), np.eye(4))
    code, _, err = command(train, "--data", tmp_path / "s", "--out", tmp_path / "out")
    assert code == 2 and "slice_0.nii.gz: [40 10] pixels; expected sides of 11 at least" in err
    for path in (tmp_path / "s").glob("*/*.nii.gz"):
        nifti.write(path, np.random.default_rng(0).random((40, 20)), np.eye(4))
    flags = "--data", tmp_path / "s", "--out", tmp_path / "out", "--height", 40, "--width", 8
    code, _, err = command(train, *flags)
    assert code == 2 and "a grid of 40x8; expected 11 at least" in err


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (train, ["--prior-channels", 64], "--prior-channels"),
        (train, ["--checkpoint", "a.pth"], "--checkpoint"),
        (train_prior, ["--beta", 1], "--beta"),
        (train_prior, ["--height", 64], "--height"),
        (train_prior, ["--preset", "report"], "choose from"),
        (reconstruct, ["a.nii.gz", "--data", "x"], "--data"),
        (predict, ["a.nii.gz", "--plane", "axial"], "--plane"),
    ],
)
def test_flags_without_effect_are_refused(script, flags, words):
    code, _, err = command(script, *flags)
    assert code == 2 and words in err


@pytest.mark.parametrize(
    "script, words",
    [
        (train, ["--lr LR               the highest learning rate", "(default: 0.0003)"]),
        (train, ["settings to start from; flags win (default: report)"]),
        (train_prior, ["settings to start from; flags win (default: best)"]),
    ],
)
def test_help_shows_defaults_and_everyday_flags_first(script, words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = command(script, "--help")
    assert code == 0 and all(word in out for word in words)
    everyday = [out.index(f"  --{name} ") for name in script.EVERYDAY]
    assert everyday == sorted(everyday)


def test_users_mistakes_exit_with_2_and_no_traceback(study, organs_study, tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "file").write_text("in the way")
    fit(study, tmp_path / "run", epochs=1).rename(tmp_path / "whole.pth")
    data, masks, out = ["--data", study], ["--data", organs_study], ["--out", tmp_path]
    for flags, said in (
        (["--data", tmp_path / "nowhere"], "nowhere"),
        ([*data, "--resume", tmp_path / "none.pth"], "none.pth"),
        ([*data, "--resume", tmp_path / "cut.pth"], "cut.pth"),
        ([*data, "--out", tmp_path / "file"], "file"),
        ([*data, *out, "--height", "250"], "multiples of 8"),
        ([*data, "--epochs", "0"], "epochs"),
        ([*data, *out, "--weights", tmp_path / "whole.pth", "--D", "16"], "D=16"),
        ([*masks, *out, "--weights", tmp_path / "whole.pth"], "masks of 0 labels; expected 3"),
    ):
        code, _, err = command(train, *flags)
        assert code == 2 and said in err and "Traceback" not in err, flags


def test_mask_losses_against_a_sum_over_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, 5, generator=generator)
    masks = torch.randint(4, (3, 6, 5), generator=generator, dtype=torch.uint8)
    masks[1] = NO_MASK
    found = train.mask_losses(logits, masks)
    nll, both, either = [], np.zeros(4), np.zeros(4)
    for b in (0, 2):
        for i in range(6):
            for j in range(5):
                p = logits[b, :, i, j].double().softmax(0).numpy()
                truth = np.eye(4)[masks[b, i, j]]
                nll.append(-np.log(p @ truth))
                both, either = both + p * truth, either + p + truth
    assert found["mask_cross_entropy"].item() == pytest.approx(np.mean(nll), rel=1e-5)
    dice_loss = 1 - np.mean(((2 * both + 1) / (either + 1))[1:])
    assert found["mask_dice_loss"].item() == pytest.approx(dice_loss, rel=1e-5)


def test_the_masks_terms_are_of_the_mask_and_of_the_coarse_one():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (2, 16, 8), generator=generator, dtype=torch.uint8)
    x, mask_logits = torch.randn(2, 1, 16, 8), torch.randn(2, 3, 16, 8)
    one_hot = torch.nn.functional.one_hot(middles(masks, (4, 2)).long(), 3)
    right = 20 * one_hot.permute(0, 3, 1, 2).float()
    none, config = output_of(torch.randn(2, 1, 16, 8)), train.LossConfig(mask_weight=0.3)
    for coarse in (right, right.flip(1)):
        output = none._replace(mask_logits=mask_logits, coarse_mask_logits=coarse)
        terms = train.losses(x, output, config, masks)
        assert (terms["coarse_mask_loss"] < 0.05) == (coarse is right)
        of_coarse = train.mask_losses(coarse, middles(masks, (4, 2)))
        assert terms["coarse_mask_loss"].item() == pytest.approx(sum(of_coarse.values()).item())
        of_masks = sum(terms[name] for name in terms if "mask" in name)
        added = terms["loss"] - train.losses(x, none, config)["loss"]
        assert added.item() == pytest.approx(0.3 * of_masks.item(), rel=1e-4)
        half = terms["loss"] - train.losses(x, output, config, masks, fall=0.5)["loss"]
        assert half.item() == pytest.approx(0.15 * of_masks.item(), rel=1e-4)


def test_labels_that_were_not_learnt_are_named_by_their_dice_in_validation():
    dice = {"train": {"7": None, "8": None, "9": None}}
    dice["validate"] = {"7": 0.05, "8": None, "9": 0.8}
    stage = object.__new__(train.Autoencoder)
    assert stage.verdict({"dice": dice}).endswith("not learnt (Dice): 7 (0.05)")


def test_slices_without_masks_give_the_mask_head_no_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.full((2, 4, 4), NO_MASK, dtype=torch.uint8)
    masks[0] = 1
    sum(train.mask_losses(logits, masks).values()).backward()
    assert logits.grad[0].any() and not logits.grad[1].any()
    everything = train.mask_losses(logits, torch.full_like(masks, NO_MASK))
    assert all(value.isfinite() for value in everything.values())
