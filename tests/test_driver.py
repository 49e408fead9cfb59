"""What driver.py tells each stage of the story; test_readme.py runs them all."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import command

import driver
import generate
import train
import train_prior
from new_slices.prior import BOTTOM_SAMPLING, TOP_SAMPLING
from support import phantom, runtime

PATHS = ("checkpoint", "prior", "out")


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """What each stage is called with; the stages themselves are run in test_readme.py."""
    monkeypatch.chdir(tmp_path)
    called, best, prior = {}, "best.pth", "prior.pth"
    for module, name, result in (
        (driver.train, "train_autoencoder", best),
        (driver.predict, "predict", None),
        (driver.train_prior, "train_prior", prior),
        (driver.generate, "generate", None),
    ):
        stage = lambda *args, name=name, result=result: called.update({name: args}) or result  # noqa: E731
        monkeypatch.setattr(module, name, stage)
    return called


def test_without_data_it_makes_a_phantom_and_says_so(stages, tmp_path, monkeypatch):
    split = {"train_patients": 1, "validate_patients": 1, "test_patients": 1}
    tiny = phantom.PhantomConfig(**split, weeks=1, slices=2)
    monkeypatch.setattr(phantom.write_phantom, "__defaults__", (tiny,))
    code, out, _ = command(driver, "--prior-slices", 0)
    assert code == 0 and "making a synthetic one" in out
    (first,), (_, data) = stages["train_autoencoder"], stages["predict"]
    assert first.data.data == data.data == "phantom_slices_data"
    assert first.loss.ssim == 1.0  # the quick preset, where there is no study
    assert (tmp_path / "phantom_slices_data" / "SYNTHETIC.txt").exists()
    assert stages.keys() == {"train_autoencoder", "predict"}  # --prior-slices 0


@pytest.mark.parametrize(
    "flags, preset, priors, slices",
    [
        ([], "report", "best", 55_000),
        (["--preset", "quick"], "quick", "quick", 3_400),
        (["--prior-slices", 9], "report", "best", 9),
    ],
)
def test_every_stage_is_told_what_the_flags_say(study, stages, flags, preset, priors, slices):
    told = ("--data", study, "--seed", 3, "--n", 5, "--nifti", "--device", "cpu", "--bf16", "off")
    code, out, err = command(driver, *told, *flags)
    assert code == 0, err
    assert out.splitlines()[-1] == "open Results/index.html"
    (first,), (scored, data), (second,), (sampled, _) = stages.values()
    given = {"seed": 3, "data": str(study), "device": "cpu", "bf16": "off"}
    expected = train.make_settings({"preset": preset, **given})
    assert (first.train, first.model, first.loss) == (expected.train, expected.model, expected.loss)
    assert (scored.checkpoint, scored.out, scored.nifti) == ("best.pth", "Results", True)
    assert first.data.data == second.data.data == data.data == str(study)
    expected = train_prior.make_settings({"preset": priors})
    assert second.prior == expected.prior
    assert (second.train.schedule, second.train.batch_size) == ("cosine", 4)  # the recipe
    assert second.codes.bottom_every == expected.codes.bottom_every
    assert (second.train.lr, second.train.slices) == (expected.train.lr, slices)
    assert second.train.seed == 3 and second.codes.checkpoint == "best.pth"
    assert (second.train.device, second.train.bf16) == ("cpu", "off")
    assert scored.device == sampled.device == "cpu"
    assert (sampled.n, sampled.seed, sampled.out) == (5, 3, str(Path("Results", "generated")))
    assert (sampled.checkpoint, sampled.prior) == ("best.pth", "prior.pth")
    cautious = driver.CAUTIOUS.items() <= vars(sampled).items()
    assert cautious == (slices < driver.FEW_SLICES)  # priors of a few minutes
    assert not Path("phantom_slices_data").exists()


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
        run = {"provenance": {"argv": []}}
        scores = {"ssim_report": {"mean": ssim}, "psnr": {"mean": 30.0}} | run
        runtime.write_json(folder / "metrics.json", scores)
        report = {"rows": {"samples": {"plausible": plausible}}}
        report = {"realism": report | {"errors": {"samples": {"plausible": 0.06}}}, "manifest": run}
        runtime.write_json(folder / "generated" / "report.json", report)
        return folder

    expected = driver.scores_of(write(tmp_path / "documented", 0.93, 0.5))
    driver.compare_with_documented(write(tmp_path / "same", 0.9301, 0.5), expected)
    assert capsys.readouterr().out.endswith("as documented\n")
    driver.compare_with_documented(write(tmp_path / "other", 0.94, 0.5), expected)
    assert "ssim_report.mean 0.9400 instead of 0.9300\n" in capsys.readouterr().out
    driver.compare_with_documented(write(tmp_path / "rounded", 0.931, 0.5), expected)
    assert "ssim_report.mean 0.9310 instead of 0.9300 (chance)\n" in capsys.readouterr().out
    driver.compare_with_documented(write(tmp_path / "chance", 0.93, 0.6), expected)
    assert "samples.plausible 0.6000 instead of 0.5000 (chance)\n" in capsys.readouterr().out
    driver.compare_with_documented(write(tmp_path / "worse", 0.93, 0.3), expected)
    assert "samples.plausible 0.3000 instead of 0.5000\n" in capsys.readouterr().out


def test_the_documented_run_had_the_settings_of_today():
    """What a run without flags does is what Results/phantom shows: no default has changed."""
    done = driver.DOCUMENTED
    logs = ((done / name).read_text() for name in ("log.jsonl", "prior_log.jsonl"))
    one, two = (json.loads(log.splitlines()[0]) for log in logs)
    manifest = json.loads((done / "generated" / "manifest.json").read_text())
    first, second = (script.make_settings({"preset": "quick"}) for script in (train, train_prior))
    sampled = manifest["settings"]
    drawn = asdict(generate.GenerateConfig(**driver.CAUTIOUS)) | {
        "position": None,
        "guidance": TOP_SAMPLING.guidance,
    }
    by_default = generate.GenerateConfig(guidance=TOP_SAMPLING.guidance)
    assert by_default.sampling() == (TOP_SAMPLING, BOTTOM_SAMPLING)
    kept = {"out": "phantom"}, {"labels": 6}  # where it lies, and what its study told
    for found, settings, of_the_run in (
        (one["train"], asdict(first.train), kept[0]),
        (one["model_config"], asdict(first.model), kept[1]),
        (one["loss_config"], asdict(first.loss), {}),
        (two["train"], asdict(second.train), kept[0]),
        (two["model_config"], asdict(second.prior), kept[1]),
        (two["codes_config"], second.codes.saved(), {}),
        (sampled, drawn, {name: sampled[name] for name in PATHS}),
    ):
        assert found == settings | of_the_run


def test_a_run_into_the_documented_folder_is_compared_with_what_was_there(stages, monkeypatch):
    def score(ssim):
        scores = {"ssim_report": {"mean": ssim}, "provenance": {"argv": []}}
        runtime.write_json(Path("Results", "metrics.json"), scores)

    Path("Results").mkdir()
    score(0.93)
    monkeypatch.setattr(driver, "DOCUMENTED", Path("Results"))
    monkeypatch.setattr(driver.phantom, "write_phantom", lambda where: where)
    monkeypatch.setattr(driver.predict, "predict", lambda *_: score(0.95))
    _, out, _ = command(driver)
    assert "ssim_report.mean 0.9500 instead of 0.9300\n" in out
