"""Every path of a GPU on a stand-in (stand_in.py): devices do not mix, no step waits."""

import dataclasses
import re

import pytest
import stand_in
import torch

import generate
import modules
import predict
import train
import train_prior
from dataset import Mirror
from support import trainer

SMALL = {"K": 32, "D": 16, "channels": 16, "top_channels": 16, "residual_channels": 16}
SMALL |= {"height": 32, "width": 16}
TRAIN = {"optimiser": "muon", "epochs": 1, "batch_size": 7, "lr": 1e-3}
TRAIN |= {"warmup": 0.1, "clip": 1.0, "bf16": "off"}
LOSS = {"mse": 0.0, "l1": 0.2, "ssim": 1.0, "flip": True}
PRIOR = {"prior_channels": 16, "bottom_every": 7, **TRAIN}
# A wait once a run (have the codebooks started, AdamW's check of lr), once an epoch (sums, counts),
# or of code maps.
MEANT = (
    r"if self.updates == 0|sums / count|count_nonzero|histogram.cpu"
    r"|cells = F.adaptive_avg_pool2d|codes.cpu"
)


def autoencoder(study, out, **changes):
    places = {"data": str(study), "out": str(out)}
    return train.make_settings({**places, **SMALL, **TRAIN, **LOSS, **changes})


def priors(study, out):
    places = {"checkpoint": str(out / "vqvae2_best.pth"), "data": str(study), "out": str(out)}
    return train_prior.make_settings({**places, **PRIOR})


@pytest.fixture(scope="module")
def trained(study, tmp_path_factory):
    """A folder with both stages trained, the study, and the waits of all that."""
    out = tmp_path_factory.mktemp("gpu")
    with stand_in.device() as activity, pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "show_loss", lambda *args: None)  # waits twice a second
        train.train_autoencoder(autoencoder(study, out))
        train_prior.train_prior(priors(study, out))
        return out, study, list(activity.waits)


def trainer_of(stage: str, trained, **changes) -> trainer.Trainer:
    out, study, _ = trained
    if stage == "autoencoder":
        settings = autoencoder(study, out / "steps", **changes)
        return trainer.Trainer(train.Autoencoder(settings), settings.train)
    settings = priors(study, out)
    return trainer.Trainer(train_prior.CodePriors(settings), settings.train)


def take_steps(trainer: trainer.Trainer, count: int = 3) -> list[str]:
    """The waits of some training steps after the first, of which each may end a run."""
    trainer.stage.start_epoch(torch.Generator().manual_seed(0))
    trainer.model.train()
    for step in range(count):
        if step == 1:
            stand_in.activity.clear()
        trainer.train_step(torch.arange(trainer.config.batch_size))
        trainer.pace.signalled([])
        if trainer.config.compile and step == 0:
            trainer.stage.compile()
    return list(stand_in.activity.waits)


def test_training_mixes_no_devices_and_waits_only_where_meant(trained):
    assert not [wait for wait in trained[2] if not re.search(MEANT, wait)]


@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
@pytest.mark.parametrize("optimiser", ["muon", "adam"])
def test_a_step_waits_for_nothing(trained, stage, optimiser):
    with stand_in.device():
        assert take_steps(trainer_of(stage, trained, optimiser=optimiser)) == []


def test_a_resumed_run_ends_with_the_same_weights(trained, tmp_path):
    study, halves = trained[1], tmp_path / "halves"
    with stand_in.device():
        train.train_autoencoder(autoencoder(study, tmp_path / "straight", epochs=2))
        train.train_autoencoder(autoencoder(study, halves, epochs=2))
        flags = {"resume": str(halves / "vqvae2_epoch_1.pth"), "data": str(study)}
        train.train_autoencoder(train.make_settings(flags))
    files = (tmp_path / run / "vqvae2_epoch_final.pth" for run in ("straight", "halves"))
    one, other = (torch.load(file)["model"] for file in files)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_scoring_and_sampling_mix_no_devices(trained):
    out = trained[0]
    files = {"checkpoint": str(out / "vqvae2_best.pth"), "out": str(out / "scores")}
    with stand_in.device():
        predict.predict(predict.PredictConfig(**files))
        files |= {"prior": str(out / "prior_best.pth"), "out": str(out / "generated")}
        generate.generate(generate.GenerateConfig(n=2, **files))


def test_a_compiled_step_is_one_graph(study, tmp_path, monkeypatch):
    """On a CPU and without a compiler: Dynamo alone decides what becomes a graph."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = autoencoder(study, tmp_path, compile=True, device="cpu")
    take_steps(trainer.Trainer(train.Autoencoder(settings), settings.train), count=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_a_compiled_step_of_the_priors_is_compiled_once(trained, tmp_path, monkeypatch):
    """In a few graphs, as masks are drawn between them; however many codes these hide."""
    compile, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    settings = priors(trained[1], trained[0])
    settings = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, compile=True, device="cpu")
    )
    run = trainer.Trainer(train_prior.CodePriors(settings), settings.train)
    take_steps(run, count=4)
    graphs = counters["stats"]["unique_graphs"]
    take_steps(run, count=4)
    assert 0 < graphs == counters["stats"]["unique_graphs"] < 20
    torch._dynamo.reset()


# The faults that these tests are to find.


def test_a_mixture_of_devices_is_found(trained, monkeypatch):
    mixing = lambda _, x, m: torch.where(m.cpu().view(-1, 1, 1, 1), x.flip(2), x)  # noqa: E731
    monkeypatch.setattr(Mirror, "images", mixing)
    with stand_in.device(), pytest.raises(RuntimeError, match="same device"):
        take_steps(trainer_of("autoencoder", trained))


def test_a_wait_in_a_step_is_found(trained, monkeypatch):
    start = modules.VectorQuantiser.random_vectors

    def waiting(self, flat):
        assert flat.sum().item() == flat.sum().item()
        return start(self, flat)

    monkeypatch.setattr(modules.VectorQuantiser, "random_vectors", waiting)
    with stand_in.device():
        waits = take_steps(trainer_of("autoencoder", trained))
    assert any("_local_scalar_dense" in wait for wait in waits)


def test_a_gpu_tensor_gives_no_numpy_array_and_takes_no_cpu_generator():
    with stand_in.device():
        x = torch.zeros(3, device=stand_in.DEVICE)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            x.uniform_(generator=torch.Generator())


# Kernel launches.


def test_launches_of_a_step_of_the_best_preset(study, tmp_path):
    flags = {"preset": "best", "data": str(study), "out": str(tmp_path), "height": 32, "width": 16}
    settings = train.make_settings(flags)
    with stand_in.device() as activity:
        take_steps(trainer.Trainer(train.Autoencoder(settings), settings.train), count=2)
        launches = activity.launches.total()
    assert launches <= 550, activity.launches.most_common(20)
