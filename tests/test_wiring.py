"""Every flag of training does what it says: one step or one epoch with it and without it."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import write_mask
from test_train import SMALL

import train
from dataset import DataConfig, Mirror
from modules import VQVAE2
from support import nifti, runtime, trainer
from support.optimiser import split_parameters

BATCH = torch.tensor([3, 0, 13, 7])


@pytest.fixture
def make(study, tmp_path):
    """A trainer of a new small autoencoder, ready for a step."""

    def make(loss=None, model=SMALL, **settings):
        settings = {"batch_size": 4, "device": "cpu", "lr": 1e-2, "out": str(tmp_path)} | settings
        config = trainer.TrainConfig(**settings)
        data = DataConfig(data=str(study), height=64, width=32)
        loss = loss or train.LossConfig()
        stage = train.Autoencoder(train.Settings(data=data, train=config, model=model, loss=loss))
        stage.start_epoch(torch.Generator().manual_seed(0))
        stage.model.train()
        return trainer.Trainer(stage, config)

    return make


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def updates(trainer):
    """What one step changes, by the weight's name."""
    before = weights(trainer)
    trainer.train_step(BATCH)
    return {name: weight - before[name] for name, weight in weights(trainer).items()}


def gradient_norm(trainer):
    trainer.train_step(BATCH)
    return torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item()


def test_clip_limits_the_gradient(make):
    free = gradient_norm(make())
    assert free > 0.1
    assert gradient_norm(make(clip=free / 10)) == pytest.approx(free / 10, rel=1e-4)
    assert gradient_norm(make(clip=2 * free)) == pytest.approx(free, rel=1e-6)


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_weight_decay_is_decoupled(make, optimiser):
    """w - lr * decay * w beside the step without decay (Loshchilov & Hutter 2019)."""
    start, plain = weights(make()), updates(make(optimiser=optimiser))
    decayed = updates(make(optimiser=optimiser, weight_decay=0.5))
    for name, update in decayed.items():
        decay = -1e-2 * 0.5 * start[name]
        torch.testing.assert_close(update - plain[name], decay, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("optimiser, orthogonal", [("muon", True), ("adam", False)])
def test_muon_takes_orthogonal_steps_and_adam_does_not(make, optimiser, orthogonal):
    """Muon's singular values are at most about 0.2 lr sqrt(longer side); Adam begins with lr."""
    shapes = {matrix.shape for matrix in split_parameters(VQVAE2(SMALL))[0]}
    for step in updates(make(optimiser=optimiser)).values():
        if step.shape in shapes:
            matrix = step.flatten(1)
            largest = torch.linalg.matrix_norm(matrix, 2).item()
            largest /= 1e-2 * 0.2 * max(matrix.shape) ** 0.5
            assert (0.6 < largest < 1.4) is orthogonal


def test_the_learning_rate_follows_the_schedule_in_every_step(make, monkeypatch):
    """And with it the weight of the losses of masks, but not in validation."""
    trainer = make(schedule="cosine", warmup=0.5, epochs=2, lr=0.3)
    rates, falls, losses = [], [], train.losses
    monkeypatch.setattr(
        train, "losses", lambda *args: falls.append(float(args[4])) or losses(*args)
    )
    for seen in (0, 7, 13):
        trainer.progress.seen = seen
        trainer.train_step(BATCH)
        rates.append(trainer.optimiser.param_groups[0]["lr"])
    done = [0, 0.25, 13 / 28]  # of two epochs of 14 slices
    expected = [0.3 * (d / 0.5) * (1 + math.cos(math.pi * d)) / 2 for d in done]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert falls == pytest.approx([rate / 0.3 for rate in rates], rel=1e-5)
    trainer.validate()
    assert falls[3:] and set(falls[3:]) == {1.0}


NETWORK = "K D stride channels top_channels residual_channels encoder_blocks top_blocks"


@pytest.mark.parametrize("field", [*NETWORK.split(), "decoder_blocks"])
def test_every_flag_of_the_network_changes_it(field):
    """From the command line to the shapes of the weights."""
    changed = train.make_settings({field: 2 * getattr(SMALL, field)}).model
    other = replace(SMALL, **{field: getattr(changed, field)})
    shapes = [
        {name: tuple(w.shape) for name, w in VQVAE2(config).state_dict().items()}
        for config in (SMALL, other)
    ]
    assert shapes[0] != shapes[1]


def images_seen(trainer, split="train"):
    """What the model gets of `BATCH`, and whether each slice is as it is or mirrored."""
    seen = []
    hook = trainer.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    trainer.stage.batch_losses(split, BATCH[: len(trainer.stage.splits[split])])
    hook.remove()
    x = trainer.stage.splits[split].images(BATCH[: len(seen[0])])
    plain, mirrored = ((seen[0] == y).flatten(1).all(1) for y in (x, x.flip(2)))
    return plain, mirrored


def test_half_of_the_training_slices_are_mirrored_anew_in_every_epoch(make):
    trainer = make(loss=train.LossConfig(flip=True))
    drawn = []
    for seed in range(40):
        trainer.stage.start_epoch(torch.Generator().manual_seed(seed))
        plain, mirrored = images_seen(trainer)
        assert (plain ^ mirrored).all()
        drawn.append(mirrored)
    share = torch.stack(drawn).float().mean(0)
    assert ((share > 0.2) & (share < 0.8)).all()
    trainer.model.eval()  # validation sees every slice as it is
    assert images_seen(trainer)[0].all()
    unflipped = make()
    assert all(images_seen(unflipped)[0].all() for _ in range(2))


def test_a_mirrored_slice_trains_on_its_own_mask(organs_study, tmp_path):
    """Mirrored with it, and its left and right labels exchanged."""
    data = DataConfig(data=str(organs_study), height=64, width=32)
    config, loss = trainer.TrainConfig(out=str(tmp_path), device="cpu"), train.LossConfig(flip=True)
    stage, given = train.Autoencoder(train.Settings(data, config, SMALL, loss)), []
    stage.splits["train"].mirror = Mirror(partners=((1, 2),))
    stage.losses_of = lambda x, masks: given.extend([x, masks])
    stage.mirrored = torch.arange(14) % 2 == 1
    stage.model.train()
    stage.batch_losses("train", BATCH)
    images, masks = stage.splits["train"].images(BATCH), stage.splits["train"].masks(BATCH)
    assert set(masks.unique().tolist()) == {0, 1, 2}
    for i, index in enumerate(BATCH.tolist()):
        image, mask = images[i], masks[i]
        if index % 2:
            image, mask = image.flip(1), torch.tensor([0, 2, 1])[mask.flip(0).long()]
        assert given[0][i].equal(image) and given[1][i].tolist() == mask.tolist()


@pytest.mark.parametrize("bit_weight, epoch", [(0.0, 2), (0.03, 1)])
def test_the_best_checkpoint_has_the_lowest_validation_reconstruction(
    make, monkeypatch, bit_weight, epoch
):
    """Not the lowest total with its commitment, unless it counts bits that have a price."""
    run = make(epochs=3, keep=0, model=replace(SMALL, bit_weight=bit_weight))
    names, validated = run.stage.loss_names, iter([(1.0, 3.0), (3.0, 1.0), (2.0, 2.0)])

    def validate(_):
        loss, reconstruction = next(validated)
        return dict.fromkeys(names, 0.0) | {"loss": loss, "reconstruction": reconstruction}

    monkeypatch.setattr(trainer.Trainer, "validate", validate)
    best = runtime.load_checkpoint(trainer.fit(run.stage, run.config), "vqvae2")
    assert (best["epoch"], best["best"], best["best_epoch"]) == (epoch, 1.0, epoch)
    last = runtime.load_checkpoint(run.checkpoints.path("epoch_final"), "vqvae2")
    assert (last["best"], last["best_epoch"]) == (1.0, epoch)


@pytest.fixture
def steps(monkeypatch):
    """(batch, learning rate, a random number after it) of every training step."""
    taken, step = [], trainer.Trainer.train_step

    def train_step(self, batch):
        loss = step(self, batch)
        taken.append((batch, self.lr, torch.rand(1).item()))
        return loss

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    return taken


def test_every_epoch_has_another_order_and_every_step_other_noise(make, steps):
    run = make(epochs=2)
    trainer.fit(run.stage, run.config)
    batches, _, noise = zip(*steps, strict=True)
    orders = torch.cat(batches).view(2, 14)
    assert (orders.sort().values == torch.arange(14)).all() and (orders[0] != orders[1]).any()
    assert len(set(noise)) == len(noise)


def test_bf16_and_the_memory_layout_reach_the_model(make):
    for setting in (True, False):
        trainer = make(bf16="on" if setting else "off")
        seen = []
        convolution = trainer.model.decoder[0]
        convolution.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        trainer.train_step(BATCH)
        assert (seen[0].dtype == torch.bfloat16) is setting
        weight = next(w for w in trainer.model.parameters() if w.ndim == 4 and min(w.shape) > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("forced", [True, False])
def test_validation_is_float32_whatever_the_machine_is_fast_at(make, monkeypatch, forced):
    """On a CPU that is fast in bfloat16, and on one that is not."""
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device, batch_size: forced)
    run, seen = make(epochs=1), []
    hook = lambda module, _, out: seen.append((module.training, out.dtype))  # noqa: E731
    run.model.decoder[0].register_forward_hook(hook)
    trainer.fit(run.stage, run.config)
    trained = torch.bfloat16 if forced else torch.float32
    assert set(seen) == {(True, trained), (False, torch.float32)}


def test_a_run_by_slices_sees_just_so_many(make, steps):
    """14 slices an epoch: 23 end within the second one, in a batch that is cut short."""
    run = make(slices=23, schedule="cosine")
    trainer.fit(run.stage, run.config)
    batches, rates, _ = zip(*steps, strict=True)
    assert [len(batch) for batch in batches] == [4, 4, 4, 2, 4, 4, 1]
    shares = [0, 4, 8, 12, 14, 18, 22]
    assert rates == pytest.approx([trainer.learning_rate(run.config, n / 23) for n in shares])


def test_a_run_says_how_long_it_is_and_its_bar_counts_all_of_it(make):
    for total, lengths in ((28, {"epochs": 2}), (23, {"slices": 23}), (None, {"minutes": 1})):
        run = make(bf16="off", **lengths)
        millions = sum(weights.numel() for weights in run.model.parameters()) / 1e6
        length = f"{total} slices" if total else "1 minutes"
        said = f"training {millions:.2f} M parameters on cpu in float32: {length}; the train split"
        assert trainer.first_line(run) == f"{said} has 14"
        run.progress.epoch, run.progress.seen = 1, 4
        with trainer.progress_bar(run) as bar:
            assert (bar.total, bar.n) == (total, 18)


def test_the_loss_of_an_epoch_that_is_cut_short_is_a_mean_of_what_it_saw(make, tmp_path):
    run = make(slices=23, lr=1e-9)  # the weights stay what they are
    trainer.fit(run.stage, run.config)
    whole, short = map(float, (tmp_path / "train_losses.txt").read_text().split())
    assert short == pytest.approx(whole, rel=0.25)


def test_the_dice_of_the_log_is_that_of_all_validation_slices_together(masked_study, tmp_path):
    """Slices without a mask, or without the organ, count for nothing; a reference by sets."""
    copy = shutil.copytree(masked_study, tmp_path / "study")
    for path in (copy / "keras_slices_validate").iterdir():  # half of the slices show the organ
        write_mask(path, 7 * (nifti.read(path).raw > 250) * (int(path.name[-8]) % 2))
    min((copy / "keras_slices_seg_validate").iterdir()).unlink()
    config = trainer.TrainConfig(out=str(tmp_path / "out"), device="cpu", epochs=1, lr=1e-2)
    data = DataConfig(data=str(copy), height=64, width=32)
    stage = train.Autoencoder(train.Settings(data=data, train=config, model=SMALL))
    trainer.fit(stage, config)
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    split = stage.splits["validate"]
    with torch.inference_mode():
        logits = stage.model(split.images(range(len(split)))).mask_logits
    masks = split.masks(range(len(split)))
    decoded, true = (logits.argmax(1) == 1) & (masks < 255), masks == 1
    expected = 2 * (decoded & true).sum().item() / (decoded.sum() + true.sum()).item()
    assert json.loads(log[-1])["dice"]["validate"]["7"] == pytest.approx(expected, abs=1e-3)
    assert json.loads(log[-1])["dice"]["train"] == {"7": None}
