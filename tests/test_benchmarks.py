import copy
import importlib.util
import json
import sys
import time

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

import train
from benchmarks import baselines, peers, startup, variants
from dataset import DataConfig, open_study
from modules import VQVAE2, Output, VectorQuantiser, VQVAE2Config

needs_monai = pytest.mark.skipif(not importlib.util.find_spec("monai"), reason="MONAI is not installed")
MODELS = {
    "ours": (
        lambda: VQVAE2(VQVAE2Config(K=512, channels=8, top_channels=8)),
        baselines.our_through_codes,
        0.703125,
    ),
    "single": (lambda: baselines.SingleLevelVQVAE(8), baselines.SingleLevelVQVAE.through_codes, 0.5625),
    "report": (lambda: baselines.ReportVQVAE2(8), baselines.ReportVQVAE2.through_codes, 4.0),
    "monai": (baselines.monai_vqvae, baselines.monai_through_codes, 0.5625),
}
ROW = {
    "minutes": 60.0,
    "batch_size": 16,
    "seed": 0,
    "parameters": 1_000_000,
    "slices_per_s": 0.5,
    "peak_memory_mib": 900.0,
    "bits_per_pixel": 4.0,
    "codes_used": {"top": 200, "bottom": 256},
    "codes": {"top": 256, "bottom": 256},
    "test": {
        "all": {"slices": 3, "patients": 1}
        | {key: {"mean": 0.5, "low": None, "high": None} for key in peers.SHOWN}
    },
    "validation": [{"seconds": 400.0, "slices": 32, "ssim": 0.7}, {"seconds": 3700.0, "slices": 300, "ssim": 0.89}],
    "study": "keras_slices_data",
    "synthetic": False,
    "slices": {"train": 5, "validate": 4, "test": 3},
    "fingerprint": "0a-1b-2c",
    "device": "cpu",
    "threads": 1,
    "bf16": False,
    "cores_had": 0.99,
    "machine": "x86_64, 2 CPUs",
    "torch": "2.13.0",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_monai] * (name == "monai")) for name in MODELS]
)
def test_codes_alone_give_the_reconstruction_at_the_rate_that_is_stated(name):
    build, through_codes, bits_per_pixel = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(1, 1, 64, 32)
    with torch.inference_mode():
        decoded, levels = through_codes(model, x)
        output = model(x)
    torch.testing.assert_close(decoded, output[0], atol=1e-4, rtol=1e-4)
    bits = sum(codes.numel() * np.log2(K) for codes, K in levels.values())
    assert bits / x.numel() == bits_per_pixel
    assert all(codes.min() >= 0 and codes.max() < K for codes, K in levels.values())
    if name == "single":
        assert levels["single"][0].shape == (1, 16, 8)  # 64x32 codes of 256x128 pixels


def test_report_s_vectors_are_runs_of_pixels_of_one_channel():
    """Four pixels in a row of a channel that equal a code find it; a pixel's four channels do not."""
    quantiser = baselines.GradientQuantiser(3, 4)
    quantiser.codebook.weight.data = torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]])
    z = torch.zeros(1, 4, 2, 4)
    z[0, 2, 1] = torch.tensor([5.0, 6, 7, 8])
    assert quantiser.nearest(z).tolist() == [[0, 0, 0, 0, 0, 2, 0, 0]]


@pytest.mark.parametrize(
    "target, expected", [(0.5, (0.0, 10.0)), (0.8, (10.0, 20.0)), (0.85, (20.0, 30.0)), (0.95, (40.0, None))]
)
def test_time_to_a_target_is_the_first_time_at_it_after_the_last_before(target, expected):
    """An SSIM that falls again stays reached; a run that never gets there is known up to its last validation."""
    points = [(10.0, 0.7), (20.0, 0.8), (30.0, 0.9), (40.0, 0.75)]
    history = [{"seconds": seconds, "ssim": ssim} for seconds, ssim in points]
    assert peers.reached(history, target) == expected


def test_table_counts_a_peer_s_time_from_below_and_ours_from_above():
    ours = {"validation": [{"seconds": 90.0, "ssim": 0.88}, {"seconds": 100.0, "ssim": 0.91}]}
    rows = {"ours": ROW | ours, "single": copy.deepcopy(ROW), "report": ROW}
    rows["single"]["validation"][1]["ssim"] = 0.9  # between 400 s and 3700 s
    lines = [line for line in peers.tables(rows, 0.9).splitlines() if "200 of 256 + 256 of 256" in line]
    assert lines[0].endswith("| 100 |  |")
    assert lines[1].endswith("| 3700 | more than 4.0 x |")
    assert lines[2].endswith("| not within 60 min | more than 36.0 x |")
    assert not peers.differences(rows)


@pytest.mark.parametrize(
    "key, other",
    [("machine", "x"), ("threads", 2), ("minutes", 30.0), ("fingerprint", "x"), ("device", "cuda")],
)
def test_rows_that_were_not_made_alike_are_warned_of(key, other):
    rows = {"ours": ROW, "report": ROW | {key: other}}
    assert f"WARNING: rows differ in {key}: ours {ROW[key]}, report {other}" in peers.tables(rows, 0.9)


def test_a_race_has_its_own_clock_and_a_busy_machine_is_warned_of():
    rows = {"ours": ROW, "race": ROW | {"minutes": 3.0}, "report": ROW | {"cores_had": 0.5}}
    assert len(peers.differences(rows)) == 1 and "report had 0.50 cores" in peers.differences(rows)[0]


def flags(study, out, *more) -> list[str]:
    size = ["--data", str(study), "--height", "32", "--width", "16", "--device", "cpu", "--below", "41"]
    return [
        "peers.py",
        *size,
        "--minutes",
        "0.01",
        "--race",
        "0.01",
        "--target",
        "-1",
        "--out",
        str(out),
        *more,
    ]


@pytest.fixture
def script(monkeypatch):
    def run(argv):
        monkeypatch.setattr("sys.argv", argv)
        peers.main()

    return run


def test_rows_are_made_one_by_one_and_merged(study, tmp_path, script, capsys):
    """Every model from a study to a table; a row made again replaces its own alone."""
    out = tmp_path / "peers.json"
    names = ["report", "single", "race", *(["monai"] if importlib.util.find_spec("monai") else []), "ours"]
    for name in names:
        script(flags(study, out, "--only", name))
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == [name for name in peers.NAMES if name in names]
    for name, row in rows.items():
        assert row["slices"] == {"train": 14, "validate": 5, "test": 6}
        sets = [(name, one["slices"], one["patients"]) for name, one in row["test"].items()]
        assert sets == [("all", 6, 2), ("patients < 41", 4, 1), ("patients >= 41", 2, 1)]
        whole, *parts = (one["psnr"]["mean"] for one in row["test"].values())
        assert whole == pytest.approx(np.average(parts, weights=[4, 2]), abs=1e-5)
        last = row["validation"][-1]
        assert last["seconds"] >= 0.06 and row["slices_per_s"] == pytest.approx(
            last["slices"] / last["seconds"]
        )
        assert row["bits_per_pixel"] == MODELS["ours" if name == "race" else name][2]
        assert 0 < row["codes_used"][next(iter(row["codes"]))] <= 512 and row["peak_memory_mib"] > 100
    script(flags(study, out, "--only", "single", "--seed", "1"))
    again = json.loads(out.read_text())["rows"]
    assert again["single"]["seed"] == 1 and again["report"] == rows["report"]
    capsys.readouterr()
    script(["peers.py", "--table", "--out", str(out), "--target", "-1"])
    printed = capsys.readouterr().out
    assert "rows differ in seed" in printed and all(f"| {name}" in printed for name in names)


def test_several_rows_have_a_process_each(study, tmp_path, script, monkeypatch):
    commands = []
    result = type("Result", (), {"returncode": 0})
    monkeypatch.setattr(peers.subprocess, "run", lambda command: commands.append(command) or result)
    argv = flags(study, tmp_path / "peers.json", "--only", "single", "ours")
    script(argv)
    assert commands == [[sys.executable, *argv, "--only", name] for name in ("single", "ours")]
    result.returncode = 2
    with pytest.raises(SystemExit):
        script(argv)


def test_the_clock_stands_still_while_the_validation_split_is_measured(study, monkeypatch):
    """Steps of 4 s and validations of 3 s, by a clock of our own: half a minute is 8 steps, and between two
    validations lies three times as much training as one took. What is measured is scikit-image's SSIM; the best
    weights stay.
    """
    now, steps = [0.0], []

    def takes(seconds, function):
        def timed(*args):
            now[0] += seconds
            steps.append(seconds)
            return function(*args)

        return timed

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    data = DataConfig(data=str(study), height=32, width=16)
    run = peers.prepare("single", peers.PeersConfig(minutes=0.5, device="cpu"), data)
    run.batch_size = 5  # an epoch is three steps, so that a validation falls inside one
    train_step = run.train_step

    def step(*batch):
        if now[0] > 28:  # late, the run goes wrong
            torch.nn.init.zeros_(run.stage.model.decoder[-1].weight)
        return train_step(*batch)

    run.train_step, run.decoded = takes(4, step), takes(3, run.decoded)
    run.train()
    history = run.validations
    assert [point["seconds"] for point in history] == [8, 20, 32]
    assert steps.count(4) == 8 and history[-1]["slices"] == 2 * 14 + 10
    assert run.stage.model.quantiser.updates == 5  # of 20 s; after the first validation it still trained

    x = open_study(data)["validate"].images(range(5))
    with torch.inference_mode():
        y = run.stage.model.eval()(x)[0]
    pairs = zip(x[:, 0].numpy(), y[:, 0].numpy(), strict=True)
    scores = [structural_similarity(a, b, data_range=float(np.ptp(a))) for a, b in pairs]
    best = max(point["ssim"] for point in history)
    assert np.mean(scores) == pytest.approx(best, abs=1e-4) and history[-1]["ssim"] < best - 0.001


def quantised(z: torch.Tensor):
    torch.manual_seed(0)
    return VectorQuantiser(6, 4).eval()(z)


def test_rotation_trick_keeps_the_code_and_turns_the_gradient(monkeypatch):
    """The gradient at the encoder makes the angle with z that the gradient at the code makes with the code."""
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    plain = quantised(z)
    monkeypatch.setattr(VectorQuantiser, "forward", VectorQuantiser.forward)  # restored afterwards
    variants.rotation_trick()
    turned = quantised(z)
    torch.testing.assert_close(turned.vectors, plain.vectors)
    g = torch.randn_like(z)
    turned.vectors.backward(g)
    scale = turned.vectors.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(z.grad.norm(dim=1), scale * g.norm(dim=1))
    at_code = torch.cosine_similarity(g, turned.vectors, dim=1)
    torch.testing.assert_close(torch.cosine_similarity(z.grad, z, dim=1), at_code)


def test_patch_gan_learns_to_tell_and_moves_the_loss(monkeypatch):
    """Its term rises as the critic learns that reconstructions, here grey, are none of the slices."""
    monkeypatch.setattr(train, "losses", train.losses)
    plain, quantity = train.losses, quantised(torch.zeros(1, 4, 2, 2))
    torch.manual_seed(0)
    variants.patch_gan("1")
    x, terms = torch.randn(2, 1, 32, 32), []
    for _ in range(30):
        y = torch.zeros_like(x, requires_grad=True)
        output = Output(y, quantity, quantity)
        with_critic = train.losses(x, output, train.LossConfig())["loss"]
        terms.append((with_critic - plain(x, output, train.LossConfig())["loss"]).item())
    assert terms[-1] > terms[0] + 0.5
    with_critic.backward()
    assert not torch.allclose(y.grad, 2 * (y - x) / x.numel())
    output = Output(y.detach(), quantity, quantity)
    assert train.losses(x, output, train.LossConfig())["loss"] == plain(x, output, train.LossConfig())["loss"]


def test_cosine_codes_have_length_1(monkeypatch):
    for name in ("forward", "update"):
        monkeypatch.setattr(VectorQuantiser, name, getattr(VectorQuantiser, name))
    variants.cosine_codes()
    quantiser = VectorQuantiser(6, 4)
    vectors = quantiser(5 * torch.randn(2, 4, 8, 8)).vectors
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2, 8, 8))
    torch.testing.assert_close(quantiser.codebook.norm(dim=1), torch.ones(6))


def test_startup_makes_a_study_of_as_many_slices(study, tmp_path):
    files = sorted(study.glob("keras_slices_*/*.nii.gz"))
    made = startup.link(files, tmp_path / "study", 1300)
    assert len(made) == 1300
    config = DataConfig(str(tmp_path / "study"), 64, 32, cache=str(tmp_path / "cache"))
    sizes = [len(split) for split in open_study(config).values()]
    assert sum(sizes) == 1300 and sizes[0] > 0.8 * 1300 and min(sizes) > 0
