"""predict.py as a user runs it, on a study of a few small slices and a checkpoint made by hand."""

import csv
import dataclasses
import json
import shutil
from dataclasses import asdict

import nibabel
import numpy as np
import pytest
import torch
from conftest import command

import dataset
import predict
import train_prior
from benchmarks import rate_distortion
from dataset import DataConfig, StudyInfo, open_study
from modules import VQVAE2, VQVAE2Config, load_model
from new_slices import organs
from new_slices.prior import Prior, PriorConfig
from reconstruct import ReconstructConfig, reconstruct
from support import figures, metrics, nifti, runtime

SMALL = VQVAE2Config(K=16, D=8, channels=16, residual_channels=8, decoder_blocks=1)


def write_checkpoint(path, study, fit="auto", **changes):
    """A model whose codebooks have seen a batch, saved as train.py does."""
    torch.manual_seed(0)
    split = open_study(DataConfig(data=str(study), height=64, width=32, fit=fit))["test"]
    model = VQVAE2(SMALL)
    model(split.images(range(4)))
    for parameter in model.decoder[-1].parameters():
        parameter.data *= 20  # the values of slices, far beyond +-1
    data = data_of(study, fit=fit) | {"fingerprints": {"test": split.fingerprint}}
    kept = {"kind": "vqvae2", "model_config": asdict(SMALL), "model": model.state_dict()}
    kept |= {"data": data, "train_config": {}, "epoch": 2, "step": 8, "best": 0.5}
    runtime.save_checkpoint(path, kept | changes)
    return path


def data_of(study, **changes) -> dict:
    """What a checkpoint keeps of a study of 64x32 slices."""
    data = {"study": str(study), "height": 64, "width": 32, "fit": "auto", "labels": []}
    return data | {"fingerprints": {"test": ""}, "synthetic": False} | changes


@pytest.fixture(scope="module")
def checkpoint(study, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "vqvae2_best.pth", study)


@pytest.fixture(scope="module")
def scored(checkpoint, tmp_path_factory):
    """What the script left: its folder, its stdout."""
    out = tmp_path_factory.mktemp("scores") / "deep" / "out"
    flags = ["--checkpoint", checkpoint, "--out", out, "--nifti", "--device", "cpu"]
    code, stdout, stderr = command(predict, *flags, "--batch-size", 4)
    assert code == 0, stderr
    return out, stdout


@pytest.fixture(scope="module")
def result(scored):
    return json.loads((scored[0] / "metrics.json").read_text())


@pytest.fixture(scope="module")
def test_split(study):
    return open_study(DataConfig(data=str(study), height=64, width=32))["test"]


def reconstructions(checkpoint, split):
    """One slice at a time, by the model alone."""
    model = load_model(checkpoint).model
    with torch.inference_mode():
        return [model(split.images([i])).reconstruction[0, 0].numpy() for i in range(len(split))]


def test_it_writes_and_names_everything(scored, result, test_split):
    out, stdout = scored
    expected = {"comparison.png", "ssim_histogram.png", "index.html"}
    expected |= {"metrics.json", "test_scores.csv", "reconstructions"}
    assert {path.name for path in out.iterdir()} == expected
    assert f"wrote {out}/" in stdout and "95 % from" in stdout and "SYNTHETIC" not in stdout
    assert "note:" not in stdout  # the files are those of the checkpoint
    assert result["data"]["fingerprint"] == test_split.fingerprint
    assert not result["data"]["synthetic"] and result["provenance"]["argv"][0] == "predict.py"
    assert result["checkpoint"]["epoch"] == 2 and len(result["checkpoint"]["sha256"]) == 64


def test_every_test_slice_is_scored_once_in_file_order(scored, result, test_split, checkpoint):
    with open(scored[0] / "test_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [path.name for path in test_split.paths]
    assert [(row["patient"], row["slice"]) for row in rows[3:5]] == [("40", "3"), ("41", "0")]
    for i, made in enumerate(reconstructions(checkpoint, test_split)):
        for name, value in metrics.score_slice(test_split.images([i])[0, 0].numpy(), made).items():
            assert float(rows[i][name]) == pytest.approx(value, abs=2e-5), name
    assert result["n"] == 6 and result["patients"] == {"040": 4, "041": 2}
    bodies = ("ssim_report_body", "ssim_standard_body")
    for name in ("ssim_report", "ssim_standard", *bodies, "psnr", "mae"):
        values = np.array([float(row[name]) for row in rows])
        assert result[name]["mean"] == pytest.approx(values.mean(), abs=2e-6)
        patients = result[name]["per_patient"]
        means = {"040": values[:4].mean(), "041": values[4:].mean()}
        assert patients == pytest.approx(means, abs=2e-6)
        # Of two patients the interval reaches from one's mean to the other's.
        ends = sorted(patients.values())
        assert [result[name]["low"], result[name]["high"]] == pytest.approx(ends, abs=2e-6)


def test_rates_are_those_of_the_codes(result, test_split, checkpoint):
    with torch.inference_mode():
        codes = load_model(checkpoint).model.encode(test_split.images(range(6)))
    bits = 0.0
    for level, maps in zip(("top", "bottom"), codes, strict=True):
        _, counts = np.unique(maps.numpy(), return_counts=True)
        entropy = -(counts / counts.sum() * np.log2(counts / counts.sum())).sum()
        bits += entropy * maps[0].numel()
        assert result["codes_used"][level] == len(counts)
        assert result["perplexity"][level] == pytest.approx(2**entropy, abs=1e-5)
    rate = result["bits_per_pixel"]
    assert rate["nominal"] == pytest.approx((8 * 4 + 16 * 8) * 4 / (64 * 32), abs=1e-6)
    assert rate["code_entropy"] == pytest.approx(bits / (64 * 32), abs=1e-6)


def test_nifti_reconstructions_lie_on_their_originals(scored, test_split, checkpoint):
    made = reconstructions(checkpoint, test_split)
    for i, path in enumerate(test_split.paths):
        written = nibabel.load(scored[0] / "reconstructions" / path.name)
        original = nibabel.load(path)
        assert written.shape == original.shape
        np.testing.assert_array_equal(written.affine, original.affine)
        units = made[i] * test_split.std[i] + test_split.mean[i]
        np.testing.assert_allclose(written.get_fdata(), units, rtol=1e-4, atol=1e-2)


def test_slices_of_one_name_in_two_folders_are_both_written(study, tmp_path):
    folder = shutil.copytree(study, tmp_path / "keras_slices_data")
    test = folder / "keras_slices_test"
    for path in sorted(test.glob("*.gz")):
        name = dataset.parse_name(path)
        (test / f"patient_{name.patient}").mkdir(exist_ok=True)
        path.rename(test / f"patient_{name.patient}" / f"slice_{name.slice}.nii.gz")
    model = write_checkpoint(tmp_path / "vqvae2_best.pth", folder)
    given = {"checkpoint": str(model), "out": str(tmp_path / "out"), "device": "cpu"}
    predict.predict(predict.PredictConfig(nifti=True, **given), DataConfig(data=str(folder)))
    written = tmp_path / "out" / "reconstructions"
    ours, theirs = (
        {path.relative_to(folder) for path in folder.rglob("*.gz")} for folder in (written, test)
    )
    assert ours == theirs
    theirs = next(written.rglob("*.gz"))
    nifti.write(theirs, np.ones((4, 4), np.float32), np.eye(4), "my own")
    with pytest.raises(runtime.UserError, match=rf"{theirs.name}: not a reconstruction"):
        predict.predict(predict.PredictConfig(nifti=True, **given), DataConfig(data=str(folder)))


def study_of(study, folder, shape):
    """A copy of the study whose slices are cut down, or repeated, to `shape`."""
    for path in study.rglob("*.nii.gz"):
        pixels = np.pad(nifti.read(path).raw, ((0, 64), (0, 64)), "wrap")[: shape[0], : shape[1]]
        nifti.write(folder / path.parent.name / path.name, pixels, np.eye(4))
    return folder


@pytest.mark.parametrize(
    "shape, fit", [((48, 20), "pad"), ((60, 40), "stretch"), ((60, 40), "pad")]
)
def test_scores_and_bits_are_over_a_slice_s_own_pixels(study, tmp_path, shape, fit, capsys):
    """predict.py and reconstruct.py score a slice alike, whatever its size or padding."""
    folder = study_of(study, tmp_path / "keras_slices_data", shape)
    path = write_checkpoint(tmp_path / "vqvae2_best.pth", folder, fit)
    result = predict_with(path, batch_size=4)
    with open(tmp_path / "test_scores.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    config = ReconstructConfig(checkpoint=str(path), out=str(tmp_path / "out"), device="cpu")
    found = reconstruct([str(folder / "keras_slices_test")], config)["files"]
    assert found.keys() == rows.keys() and len(rows) == 6
    for name, row in found.items():
        for score in ("ssim_report", "ssim_standard_body", "psnr", "mae"):
            assert float(rows[name][score]) == pytest.approx(row[score], abs=2e-5), (name, score)
    bits = (8 * 4 + 16 * 8) * 4
    nominal = result["bits_per_pixel"]["nominal"]
    assert nominal == pytest.approx(bits / np.prod(shape))
    assert found[name]["bits_per_pixel"] == pytest.approx(nominal, abs=1e-6)
    shown = {"pad": min(64 / shape[0], 32 / shape[1]) ** 2 * np.prod(shape) / 2048}.get(fit, 1)
    assert result["padding"] == pytest.approx(1 - shown, abs=0.03)
    assert ("of the model's grid is padding" in capsys.readouterr().out) == (fit == "pad")


def test_best_and_worst_are_what_they_are_called(study, checkpoint, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "comparison_sheet", lambda *args: drawn.append(args))
    predict_with(checkpoint, out=str(tmp_path))
    with open(tmp_path / "test_scores.csv", newline="") as file:
        scores = sorted(float(row["ssim_report"]) for row in csv.DictReader(file))
    assert scores[0] < scores[3] < scores[-1]
    ((_, rows, *_),), expected = drawn, (scores[-1], scores[3], scores[0])
    for kind, score, row in zip(("best", "median", "worst"), expected, rows, strict=True):
        title, original, image = row
        assert title.startswith(f"{kind}: patient 04") and f"SSIM {score:.4f}" in title
        assert metrics.ssim_report(original, image)[0] == pytest.approx(score, abs=1e-5)


def test_only_old_reconstructions_are_deleted(study, checkpoint, tmp_path):
    folder, pixels = tmp_path / "reconstructions", np.ones((4, 4), np.float32)
    for number, description in ((1, dataset.RECONSTRUCTION), (2, "my own")):
        nifti.write(folder / f"case_09{number}.nii.gz", pixels, np.eye(4), description)
    (folder / "notes.txt").write_text("first")
    predict_with(checkpoint, out=str(tmp_path), nifti=True)
    found = {path.name for path in folder.iterdir()}
    assert {"case_092.nii.gz", "notes.txt"} < found and len(found) == 8
    assert "case_091.nii.gz" not in found
    theirs = next(path for path in folder.iterdir() if "week" in path.name)
    nifti.write(theirs, pixels, np.eye(4), "my own")
    with pytest.raises(runtime.UserError, match=rf"{theirs.name}: not a reconstruction"):
        predict_with(checkpoint, out=str(tmp_path), nifti=True)
    assert np.array_equal(nifti.read(theirs).raw, pixels)
    theirs.unlink()
    predict_with(checkpoint, out=str(tmp_path))  # the same model's stay
    assert len(list(folder.iterdir())) == 7
    (tmp_path / "metrics.json").unlink()
    predict_with(checkpoint, out=str(tmp_path))  # and those of which nobody knows whose they are
    assert len(list(folder.iterdir())) == 7
    scores = json.loads((tmp_path / "metrics.json").read_text())
    for other in ({"checkpoint": {"sha256": "0" * 64}}, {"data": {"fingerprint": "0" * 40}}):
        predict_with(checkpoint, out=str(tmp_path), nifti=True)
        runtime.write_json(tmp_path / "metrics.json", scores | other)
        predict_with(checkpoint, out=str(tmp_path))
        assert {path.name for path in folder.iterdir()} == {"case_092.nii.gz", "notes.txt"}


def test_another_study_one_patient_and_synthetic(study, checkpoint, tmp_path, capsys):
    """A copy without patient 041 and with a phantom's mark: scored, with three things said."""
    other = tmp_path / "other"
    for path in study.rglob("*.nii.gz"):
        if "case_041" not in path.name:
            (other / path.parent.name).mkdir(parents=True, exist_ok=True)
            (other / path.parent.name / path.name).write_bytes(path.read_bytes())
    (other / "SYNTHETIC.txt").touch()
    config = predict.PredictConfig(checkpoint=str(checkpoint), out=str(tmp_path), device="cpu")
    result, stdout = predict.predict(config, DataConfig(data=str(other))), capsys.readouterr().out
    assert result == json.loads((tmp_path / "metrics.json").read_text())
    assert result["n"] == 4 and result["psnr"]["low"] is None and result["data"]["synthetic"]
    assert "SYNTHETIC test slices" in stdout and "no interval" in stdout
    assert stdout.count("note:") == 1
    assert not (tmp_path / "reconstructions").exists()


def test_the_scoreboard_of_models_has_every_way_of_counting_bits(checkpoint, study, tmp_path):
    """benchmarks/rate_distortion.py: models with and without a prior, on sets of one patient."""
    other = write_checkpoint(tmp_path / "other.pth", study, epoch=3)
    small = {"prior_channels": 8, "prior_heads": 1, "prior_top_layers": 1}
    config = PriorConfig(K=16, prior_bottom_layers=1, **small)
    weights = Prior(config, (8, 4)).state_dict()
    prior = {"kind": "prior", "model_config": asdict(config), "model": weights, "epoch": 1}
    prior |= {"data": runtime.load_checkpoint(checkpoint, "vqvae2")["data"], "top_shape": [8, 4]}
    prior |= {
        "codes_config": {"copies": 2, "rebuilt": 0.0},
        "autoencoder_sha256": runtime.sha256(checkpoint),
    }
    runtime.save_checkpoint(tmp_path / "prior.pth", prior)
    words = [checkpoint, other, "--prior", tmp_path / "prior.pth", "--out", tmp_path / "out"]
    words += ["--below", 41, "--sets", "first", "second", "--device", "cpu", "--files"]
    code, stdout, err = command(rate_distortion, *words)
    assert code == 0, err
    sets = json.loads((tmp_path / "out" / "rate_distortion.json").read_text())["sets"]
    alone = predict_with(checkpoint, out=str(tmp_path))["ssim_report"]["per_patient"]
    for title, patient, n in (("first", "040", 4), ("second", "041", 2)):
        assert (sets[title]["n"], sets[title]["people"]) == (n, 1) and f"{title}: " in stdout
        first, second = sets[title]["models"].values()
        assert first["ssim_report"]["mean"] == pytest.approx(alone[patient], abs=2e-6)
        bits = first["bits_per_pixel"]
        # A prior that has learnt nothing is uniform: its bits are the nominal ones.
        assert bits["prior"] == pytest.approx(bits["nominal"], abs=1e-5)
        assert bits["code_entropy"] < bits["nominal"]
        saved = (bits["slice_file"] - bits["volume_file"]) * 64 * 32 / 8  # bytes a slice
        assert bits["prior"] < bits["volume_file"] and 60 < n / (n - 1) * saved < 110  # a header
        ways = {"nominal", "code_entropy", "prior", "slice_file", "volume_file"}
        assert first["codecs"]["AVIF"]["at"].keys() == ways
        assert second["bits_per_pixel"].keys() == ways - {"prior", "slice_file", "volume_file"}
        curves = sets[title]["codecs"]
        single, *whole = (curves[name]["curve"][-1] for name in ("AVIF", "AVIF tall", "AVIF film"))
        assert whole[0]["bits_per_pixel"] < single["bits_per_pixel"]  # one header for all slices
        for of in whole:
            assert of["ssim_report"] == pytest.approx(single["ssim_report"], abs=0.03)
    assert (tmp_path / "out" / "rate_distortion.png").stat().st_size > 10_000
    # Where nothing can be written is said before the hours of work.
    code, _, err = command(rate_distortion, "no such file", "--out", checkpoint / "x")
    assert code == 2 and "cannot write there" in err


def predict_with(path, **settings):
    return predict.predict(predict.PredictConfig(checkpoint=str(path), device="cpu", **settings))


def test_checkpoints_that_cannot_be_used_are_named(study, tmp_path):
    for name, changes, said in (
        ("kind", {"kind": "prior"}, "the priors of train_prior.py; expected an autoencoder"),
        ("shape", {"model_config": asdict(SMALL) | {"D": 4}}, r"shape\.pth: damaged, or not"),
        ("size", {"data": data_of(study, height=60)}, "60x32; expected multiples of 8"),
    ):
        with pytest.raises(runtime.UserError, match=said):
            predict_with(write_checkpoint(tmp_path / f"{name}.pth", study, **changes))
    gone = data_of(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"gone: the study that .* Fix: --data"):
        predict_with(write_checkpoint(tmp_path / "gone.pth", study, data=gone))


def test_a_failed_run_leaves_an_earlier_one_s_reconstructions_no_scores_and_no_empty_folder(
    study, checkpoint, tmp_path, monkeypatch
):
    state, at_exit = runtime.load_checkpoint(checkpoint, "vqvae2")["model"], []
    monkeypatch.setattr(runtime.atexit, "register", lambda *call: at_exit.append(call))
    broken = {name: x.fill_(1e38) if name.endswith("bias") else x for name, x in state.items()}
    path = write_checkpoint(tmp_path / "nan.pth", study, model=broken)
    predict_with(checkpoint, out=str(tmp_path / "scores"), nifti=True)
    written = {file: file.read_bytes() for file in tmp_path.glob("scores/reconstructions/*")}
    for out in ("scores", "new/deep"):
        code, _, err = command(predict, "--checkpoint", path, "--out", tmp_path / out, "--nifti")
        assert code == 2 and "case_040_week_0_slice_0.nii.gz: a slice holds NaN" in err
    for function, *args in reversed(at_exit):  # as at the end of the process
        function(*args)
    assert not (tmp_path / "scores" / "metrics.json").exists()
    assert len(written) == 6 and all(file.read_bytes() == was for file, was in written.items())
    assert not (tmp_path / "new").exists()


def test_dice_of_the_decoded_masks(organs_study, tmp_path, monkeypatch, capsys):
    """By patient and label, by hand, beside a U-Net."""
    torch.manual_seed(0)
    splits = open_study(DataConfig(data=str(organs_study), height=64, width=32))
    train, test = splits["train"], splits["test"]
    config = dataclasses.replace(SMALL, labels=3)
    model = VQVAE2(config)
    model(test.images(range(4)))
    changes = {"model": model.state_dict(), "data": asdict(StudyInfo.from_splits(splits))}
    path = tmp_path / "vqvae2_best.pth"
    # Masks of other organs than the model's are not scored.
    others = changes | {"data": changes["data"] | {"labels": [0, 5, 8]}}
    write_checkpoint(path, organs_study, model_config=asdict(config), **others)
    assert "dice" not in predict_with(path, unet=False)
    said = "masks are not scored: the study has the labels 0, 5, 9, the model 0, 5, 8"
    assert said in capsys.readouterr().out
    code, _, err = command(train_prior, "--checkpoint", path, "--out", tmp_path / "priors")
    assert code == 2 and f"with the labels 0, 5, 9; {path} learnt 0, 5, 8. Fix: " in err
    write_checkpoint(path, organs_study, model_config=asdict(config), **changes)
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(figures, "comparison_sheet", lambda *args: drawn.append(args[1:]))
        alone = predict_with(path, unet=False)
    assert alone["dice"].keys() == {"decoded"}
    assert not (tmp_path / organs.SEGMENTER_FILE).exists()
    assert "U-Net" not in capsys.readouterr().out

    learn = organs.train_segmenter
    monkeypatch.setattr(organs, "train_segmenter", lambda *a, **k: learn(*a[:4], 3, **k))
    result = predict_with(path)
    net = organs.segmenter_of(train, tmp_path)
    learnt_from = runtime.load_checkpoint(tmp_path / organs.SEGMENTER_FILE, "segmenter")["data"]
    assert learnt_from["fingerprint"] == train.fingerprint != test.fingerprint

    chosen = [i for i, name in enumerate(test.names) if name[::2] != (40, 1)]
    truth, images = test.masks(chosen).numpy(), test.images(chosen)
    with torch.inference_mode():
        decoded = torch.cat([model.eval()(x[None]).mask_logits.argmax(1) for x in images]).numpy()
    (rows, _, masks, _, values), whole = drawn[0], test.images(range(len(test)))[:, 0].numpy()
    assert list(values) == [0, 5, 9]  # the legend tells the study's own
    for (_, original, _), (left, right) in zip(rows, masks, strict=True):
        (index,) = np.flatnonzero((whole == original).all((1, 2)))
        with torch.inference_mode():
            own = model(test.images([index])).mask_logits[0].argmax(0)
        assert np.array_equal(left, test.masks([index])[0]) and np.array_equal(right, own)
    found = {"decoded": decoded, "unet": organs.segment(net, images[:, 0].numpy())}
    patients = np.array([test.names[i].patient for i in chosen])
    for name, masks in found.items():
        for patient in (40, 41):
            a, b = masks[patients == patient], truth[patients == patient]
            pairs = [(a == k, b == k) for k in (1, 2)]
            dice = [2 * (x & y).sum() / (x.sum() + y.sum()) for x, y in pairs]
            for organ, expected in zip(("label_5", "label_9"), dice, strict=True):
                per_patient = result["dice"][name][organ]["per_patient"]
                assert per_patient[f"{patient:03d}"] == pytest.approx(expected, abs=1e-6)
            mean = result["dice"][name]["mean"]["per_patient"][f"{patient:03d}"]
            assert mean == pytest.approx(np.mean(dice), abs=1e-6)
    verdicts = organs.judge_masks(decoded, truth, truth, test.labels)
    assert result["masks"] == verdicts
    out = capsys.readouterr().out
    assert "a U-Net of equal cost" in out
    # Masks that nothing has learnt.
    assert f"warning: {result['not_learnt']}" in out and "label_9 was not learnt" in out


def drawn_right(splits):
    """The masks of the test slices, as a model that makes no mistake would draw them."""
    test = splits["test"]
    drawn, chosen = np.zeros((len(test), 64, 32), np.uint8), np.flatnonzero(test.has_mask)
    drawn[chosen] = test.masks(chosen).numpy()
    return drawn


def test_a_patient_without_an_organ_has_no_dice_of_it(organs_study, tmp_path):
    """Neither 1 nor 0: the mean over organs is that of the others, the mean over patients too."""
    folder = shutil.copytree(organs_study, tmp_path / "keras_slices_data")
    for path in folder.glob("keras_slices_seg_test/seg_041*"):
        mask = np.array(nifti.read(path).raw)
        mask[mask == 9] = 0
        nifti.write(path, mask, np.eye(4))
    splits = open_study(DataConfig(data=str(folder), height=64, width=32))
    drawn = drawn_right(splits)
    drawn[:, 32:] = 0  # half of the organ 5
    table = predict.score_masks(drawn, splits["test"], None)["dice"]["decoded"]
    assert table["label_9"]["per_patient"] == {"040": 1.0} and table["label_9"]["mean"] == 1
    means = table["mean"]["per_patient"]
    assert means["041"] == table["label_5"]["per_patient"]["041"] < 0.8 < means["040"]
    for path in folder.glob("keras_slices_seg_test/seg_*"):  # nobody has the organ 9 now
        mask = np.array(nifti.read(path).raw)
        nifti.write(path, np.where(mask == 9, 0, mask), np.eye(4))
    test = open_study(DataConfig(data=str(folder), height=64, width=32))["test"]
    assert "label_9" not in predict.score_masks(drawn, test, None)["dice"]["decoded"]


def test_what_is_drawn_in_the_padding_counts_nowhere(organs_study, tmp_path):
    folder = study_of(organs_study, tmp_path / "keras_slices_data", (64, 20))
    splits = open_study(DataConfig(data=str(folder), height=64, width=32, fit="pad"))
    drawn = drawn_right(splits)
    drawn[:, :20, :5] = 1  # a piece of an organ, beside the slice
    found = predict.score_masks(drawn, splits["test"], None)
    assert found["dice"]["decoded"]["mean"]["mean"] == 1 and not found["not_learnt"]
    roughness = found["masks"]["label_5"]["roughness"]
    assert roughness["masks"] == roughness["real"]


def test_columns_of_masks_stand_apart(capsys):
    """Labels may have as many digits as their files allow."""
    table = {name: {"mean": x} for name, x in (("mean", 0.5), ("label_1099511627776", 0.25))}
    predict.print_masks({"decoded": table}, "")
    names, means = capsys.readouterr().out.strip("\n").splitlines()
    assert names.split() == list(table) and means.split()[-2:] == ["0.5", "0.25"]
    assert len(names) == len(means)
