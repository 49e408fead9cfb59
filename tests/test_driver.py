"""The whole story as a user runs it, on a study and on a phantom of a few slices."""

import json
from pathlib import Path

import pytest
from conftest import command
from test_train import SHAPE_FLAGS

import driver
import train_prior
from new_slices import organs
from support import phantom, runtime

PRIOR_FLAGS = "--prior-slices 12 --n 3".split()


def test_data_training_scores_and_new_slices_in_one_command(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*SHAPE_FLAGS, *PRIOR_FLAGS, "--epochs", 2, "--nifti", "--seed", 1]
    code, out, err = command(driver, "--data", study, *flags)
    assert code == 0, err
    results = tmp_path / "Results"
    manifest = json.loads((results / "generated" / "manifest.json").read_text())
    assert (manifest["done"], manifest["seed"], manifest["data"]["study"]) == (3, 1, study.name)
    assert driver.CAUTIOUS.items() <= manifest["settings"].items()  # priors of a few minutes
    for which, file in (("autoencoder", "vqvae2_best.pth"), ("prior", "prior_best.pth")):
        assert manifest[which]["sha256"] == runtime.sha256(results / file)
    assert json.loads((results / "generated" / "report.json").read_text())["n"] == 3
    assert out.splitlines()[-1] == "open Results/index.html"
    shown = (results / "index.html").read_text()
    assert shown.count("<h2") == 4 and shown.count("<img") == 8 and str(tmp_path) not in shown
    scores = json.loads((results / "metrics.json").read_text())
    assert scores["n"] == 6 and set(scores["ssim_report"]["per_patient"]) == {"040", "041"}
    assert f"{scores['ssim_report']['mean']:.4g}" in out
    written = sorted(path.name for path in (results / "reconstructions").iterdir())
    assert written == sorted(path.name for path in (study / "keras_slices_test").iterdir())
    # The report's.
    assert json.loads((results / "log.jsonl").read_text().splitlines()[0])["train"]["lr"] == 3e-4


def test_without_data_it_makes_a_phantom_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = phantom.PhantomConfig(
        train_patients=1, validate_patients=1, test_patients=1, weeks=1, slices=2
    )
    monkeypatch.setattr(phantom.write_phantom, "__defaults__", (tiny,))
    learn = organs.train_segmenter
    monkeypatch.setattr(organs, "train_segmenter", lambda *a, **k: learn(*a[:4], 2, **k))
    flags = "--K 16 --D 8 --channels 8 --top-channels 8 --epochs 1 --device cpu --prior-slices 0"
    _, out, _ = command(driver, *flags.split())
    assert (tmp_path / "phantom_slices_data" / "SYNTHETIC.txt").exists() and "SYNTHETIC" in out
    metrics = json.loads((tmp_path / "Results" / "metrics.json").read_text())
    assert metrics["n"] == 2 and metrics["data"]["synthetic"]
    checkpoint = runtime.load_checkpoint(tmp_path / "Results" / "vqvae2_best.pth", "vqvae2")
    assert checkpoint["loss_config"]["ssim"] == 1.0  # the quick preset, where there is no study
    assert not (tmp_path / "Results" / "generated").exists()  # --prior-slices 0


@pytest.mark.parametrize(
    "flags, preset, slices",
    [
        ([], "best", 15_000),
        (["--preset", "quick"], "quick", 2_800),
        (["--prior-slices", 9], "best", 9),
    ],
)
def test_the_priors_suit_the_preset(study, tmp_path, monkeypatch, flags, preset, slices):
    monkeypatch.chdir(tmp_path)
    found = []
    for module, name in ((driver.train, "train_autoencoder"), (driver.predict, "predict")):
        monkeypatch.setattr(module, name, lambda *args: "best.pth")
    monkeypatch.setattr(
        driver.train_prior, "train_prior", lambda settings: found.append(settings) or "prior.pth"
    )
    monkeypatch.setattr(driver.generate, "generate", lambda *args: None)
    command(driver, "--data", study, "--seed", 3, *flags)
    (used,) = found
    expected = train_prior.make_settings({"preset": preset})
    assert used.prior == expected.prior and used.codes.bottom_every == expected.codes.bottom_every
    assert (used.train.lr, used.train.slices) == (expected.train.lr, slices)
    assert used.train.seed == 3 and used.codes.checkpoint == "best.pth"
    assert used.data.data == str(study) and not Path("phantom_slices_data").exists()


@pytest.mark.parametrize(
    "flag, value", [("--data", "nowhere"), ("--n", -2), ("--prior-slices", -2)]
)
def test_a_mistake_is_found_before_anything_is_trained(study, tmp_path, monkeypatch, flag, value):
    """Also in what only the second half needs; and a missing study becomes no phantom."""
    monkeypatch.chdir(tmp_path)
    code, _, err = command(driver, "--data", study, flag, value)
    assert code == 2 and str(value) in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_run_is_compared_with_the_documented_one(tmp_path, capsys):
    def write(folder, ssim, plausible):
        (folder / "generated").mkdir(parents=True)
        scores = {"ssim_report": {"mean": ssim}, "psnr": {"mean": 30.0}}
        runtime.write_json(folder / "metrics.json", scores)
        report = {"realism": {"rows": {"samples": {"plausible": plausible}}}}
        runtime.write_json(folder / "generated" / "report.json", report)
        return folder

    documented = write(tmp_path / "documented", 0.93, 0.5)
    driver.compare_with_documented(write(tmp_path / "same", 0.9301, 0.5), documented)
    assert capsys.readouterr().out.endswith("as documented\n")
    driver.compare_with_documented(write(tmp_path / "other", 0.94, 0.5), documented)
    assert "ssim_report.mean 0.9400 instead of 0.9300\n" in capsys.readouterr().out
