"""What the READMEs say holds: every snippet runs; files, flags and functions are there.

Snippets run as pasted, in order, in a folder of their own. Stand-ins: the flags in `SHORTER`
shorten trainings; `pip`, the virtual environment and driver.py without data run in .ci/run,
torchrun in test_distributed.py, and the slicing of volumes in test_slice_volumes.py.
"""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import SHAPE_FLAGS

import train
import train_prior
from support import runtime

README = (ROOT / "README.md").read_text()
RESULTS = "".join((ROOT / "Results" / name).read_text() for name in ("README.md", "trials.md"))
BASH = re.findall(r"```bash\n(.*?)```", README, re.S)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
REFERENCES = re.findall(r"`([\w.]+)` in \[([\w/]+\.py)\]\(([\w/]+\.py)\)", README)
SMALL = f"--height 64 --width 32 --device cpu --epochs 1 {' '.join(SHAPE_FLAGS)}"
SMALL_PRIOR = "--prior-channels 16 --prior-heads 1"
SHORTER = {  # added to a command that holds the words
    "driver.py": f"{SMALL} --prior-slices 8 --n 2",
    "train.py --data": SMALL,
    "train.py --resume": "--epochs 2",
    "train_prior.py": f"--epochs 1 {SMALL_PRIOR}",
    "generate.py": "--n 2",
}


def commands(blocks: list[str]) -> list[str]:
    """The commands of bash blocks, one each, without comments and environment variables."""
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [re.sub(r"^(\w+=\S+ )+", "", part) for part in parts if part]


def as_python(command: str) -> tuple[str, list[str]] | None:
    """The script and the arguments of `python script.py ...` or `python -m package.script ...`."""
    found = re.fullmatch(
        r"(?:python|torchrun --nproc_per_node=\d+) (?:-m )?([\w.]+?)(?:\.py)?((?: .*)?)", command
    )
    return (found[1], shlex.split(found[2])) if found else None


STORY = commands(BASH)
INLINE = re.findall(r"`(python [^`]+)`", RESULTS)  # the commands of the findings
ALL = STORY + commands(re.findall(r"```bash\n(.*?)```", RESULTS, re.S)) + commands(INLINE)
FLAGS = [found for found in map(as_python, ALL) if found]


def check_the_results_of_a_whole_run(results, study):
    manifest = json.loads((results / "generated" / "manifest.json").read_text())
    assert (manifest["done"], manifest["data"]["study"]) == (2, study.name)
    for which, file in (("autoencoder", "vqvae2_best.pth"), ("prior", "prior_best.pth")):
        assert manifest[which]["sha256"] == runtime.sha256(results / file)
    shown = (results / "index.html").read_text()
    assert shown.count("<h2") == 4 and shown.count("<img") == 7 and str(Path.cwd()) not in shown
    scores = json.loads((results / "metrics.json").read_text())
    assert scores["n"] == 6 and set(scores["ssim_report"]["per_patient"]) == {"040", "041"}


def test_every_snippet_of_the_readme_runs_as_pasted(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("keras_slices_data", "my_slices"):
        shutil.copytree(study, name)
    for name in ("SCAN.nii.gz", "SLICE.nii.gz"):
        shutil.copy(next((study / "keras_slices_test").iterdir()), name)
    ran = []
    for command in STORY:
        found = as_python(command)
        # What other tests run, see above.
        elsewhere = command == "python driver.py" or command.startswith("torchrun")
        if not found or found[0] in ("pytest", "slice_volumes") or elsewhere:
            continue
        script, arguments = found
        more = next((flags for words, flags in SHORTER.items() if words in command), "")
        if "Results/vqvae2_interrupted.pth" in command:  # as Ctrl-C leaves it
            shutil.copy("Results/vqvae2_epoch_1.pth", "Results/vqvae2_interrupted.pth")
        monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments, *more.split()])
        importlib.import_module(script).main()
        ran.append(script)
        if script == "driver":
            check_the_results_of_a_whole_run(Path("Results"), study)
    expected = {"driver", "train", "train_prior", "predict", "reconstruct", "generate"}
    assert expected == set(ran) and len(ran) >= 9
    files = ("index.html", "reconstructions", "generated/report.json", "for-files/vqvae2_best.pth")
    for file in (f"Results/{name}" for name in files):
        assert (tmp_path / file).exists(), file

    for snippet in PYTHON:
        exec(snippet, found := {})
    top, bottom, K = found["top"], found["bottom"], found["trained"].model.config.K
    assert (top.shape, bottom.shape) == ((2, 8, 4), (2, 16, 8))  # the study's slices are 64x32
    assert top.dtype == torch.int64 and min(top.min(), bottom.min()) >= 0
    assert max(top.max(), bottom.max()) < K
    assert found["reconstruction"].shape == (2, 1, 64, 32)
    assert found["made"].planes.shape == (1, 64, 32) and found["made"].labels is None
    assert np.abs(found["made"].planes - found["planes"]).mean() < np.ptp(found["planes"])
    loader = torch.utils.data.DataLoader(found["splits"]["train"], batch_size=16)
    assert next(iter(loader))["image"].shape == (14, 1, 64, 32)


@pytest.mark.parametrize("script, arguments", FLAGS)
def test_the_flags_of_a_command_exist(script, arguments, monkeypatch, capsys):
    if script == "pytest":
        return
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    known = capsys.readouterr().out
    for word in arguments:
        assert not word.startswith("--") or f"{word.split('=')[0]} " in known, word


@pytest.mark.parametrize("name, file, target", REFERENCES)
def test_a_function_that_is_named_is_in_its_file(name, file, target):
    module = target.removesuffix(".py").replace("/", ".")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert target.endswith(file) and found.__module__ == module


def test_every_script_is_named_and_every_link_leads_somewhere():
    ours = [*ROOT.glob("*.py"), *ROOT.glob("support/[a-z]*.py"), *ROOT.glob("new_slices/[a-z]*.py")]
    named = set(re.findall(r"\[((?!tests/)(?:\w+/)?\w+\.py)\]", README))
    assert {path.rsplit("/", 1)[-1] for path in named} == {path.name for path in ours}
    for text, folder in ((README, ROOT), (RESULTS, ROOT / "Results")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / link).exists() or link == "phantom/index.html", link


RATES = {"report": 3e-4, "quick": 3e-3, "fewer-bits": 7e-4}  # of learning; all others 1.5e-3
RECIPE = (True, "muon", 1, "cosine")  # of all but `report`


@pytest.mark.parametrize("name", train.PRESETS)
def test_a_preset_is_what_the_readme_says(name):
    """The table's slices, of 1,281 in an epoch, and bits; what "the model" says of losses."""
    rows = re.findall(r"^\| \**`([\w-]+)`\**[^|]*\| ([\d,]+) \|[^|]*\| ([\d.]+)", README, re.M)
    table = {preset: (int(slices.replace(",", "")), bits) for preset, slices, bits in rows}
    assert table.keys() == train.PRESETS.keys() - {"medium-rate", "low-rate"}
    settings = train.make_settings({"preset": name})
    run, loss, rate = settings.train, settings.loss, settings.model.bits_per_pixel(256, 128)
    bits = {"medium-rate": "0.391", "low-rate": "0.195"}.get(name) or table[name][1]
    assert f"{rate:.3f}" == bits and run.lr == RATES.get(name, 1.5e-3)
    assert (run.slices or run.epochs * 1281) == table.get(name, (5 * 1281,))[0]
    weights = {"report": (1, 0, 0), "for-files": (2, 0.2, 1)}.get(name, (0, 0.2, 1))
    assert (loss.mse, loss.l1, loss.ssim) == weights
    recipe = (loss.flip, run.optimiser, run.batch_size, run.schedule)
    assert recipe == ((False, "adam", 16, "constant") if name == "report" else RECIPE)
    # What no table says, but the results were made with.
    net, wide = settings.model, name in ("best", "for-files", "low-rate")
    channels = net.channels, net.top_channels, net.residual_channels
    assert channels == ((96, 192, 48) if wide else (64, 128, 32))
    assert net.decoder_blocks == (4 if name in ("best", "for-files") else 3)
    prices = {"for-files": (0.01, 10_000), "fewer-bits": (0.03, 0)}
    assert (net.bit_weight, net.price_rise) == prices.get(name, (0, 0))


def test_the_best_priors_are_what_the_readme_says():
    """All layouts are composed as new ones are; the rest by train_prior.py's comments."""
    best = train_prior.make_settings({"preset": "best"})
    codes, run, shape = best.codes, best.train, best.prior
    assert (codes.rebuilt, codes.bottom_every, codes.variants, codes.forget) == (1.0, 4, 2, 0.1)
    assert (run.slices, run.lr, run.weight_decay, run.patience) == (55_000, 2e-3, 0.05, 5)
    assert (shape.prior_top_layers, shape.prior_refine_blocks, shape.prior_dropout) == (4, 3, 0.1)


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 200
