"""Files of codes: exact, as short as their probabilities allow, and never a picture of noise."""

import math
import subprocess
import sys
from dataclasses import asdict, replace

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT
from skimage.io import imread, imsave
from test_predict import SMALL, data_of, write_checkpoint
from test_slice_volumes import landmark
from torch import nn

from modules import VQVAE2, load_model
from new_slices import code_files
from new_slices.code_files import Coded, Coder
from new_slices.code_maps import LEVELS
from new_slices.prior import Prior, PriorConfig
from reconstruct import ReconstructConfig, reconstruct
from support import nifti, runtime
from support.runtime import UserError


def write_models(folder, study, seed: int) -> tuple[str, str]:
    """An autoencoder with two organs and its priors, which are far from uniform."""
    torch.manual_seed(seed)
    config = replace(SMALL, labels=3)
    model = VQVAE2(config)
    model(torch.randn(4, 1, 64, 32))
    data = data_of("s", labels=[0, 7, 300], directions="RA", plane="axial")
    changes = {"model_config": asdict(config), "model": model.state_dict(), "data": data}
    path = write_checkpoint(folder / "vqvae2_best.pth", study, **changes)
    shape = PriorConfig(K=SMALL.K, labels=3, prior_channels=16, prior_heads=2, prior_top_layers=1)
    prior = Prior(shape, (8, 4))
    for parameter in prior.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    saved = {"kind": "prior", "model_config": asdict(shape), "model": prior.state_dict()}
    saved |= {"data": data, "top_shape": [8, 4], "codes_config": {"copies": 2, "rebuilt": 0.0}}
    saved |= {"autoencoder_sha256": runtime.sha256(path)}
    runtime.save_checkpoint(folder / "prior_best.pth", saved)
    return str(path), str(folder / "prior_best.pth")


@pytest.fixture(scope="module")
def models(study, tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("run"), study, seed=0)


@pytest.fixture(scope="module")
def coder(models):
    return Coder(load_model(models[0]), models[1])


SCALE = np.ones((3, 2), np.float32)


def random_planes(count: int, seed: int = 0) -> Coded:
    rng = np.random.default_rng(seed)
    maps = (rng.integers(SMALL.K, size=(count, *s)) for s in ((8, 4), (16, 8)))
    return Coded(*(x.astype(np.uint16) for x in maps), rng.random((count, 2), np.float32))


def header_of(shape: tuple[int, ...] = (64, 32)) -> nibabel.Nifti1Header:
    return nibabel.Nifti1Image(np.zeros(shape, np.int16), np.diag([1.5, 1.5, 8, 1])).header


def bits_by_hand(prior: Prior, coded: Coded) -> float:
    """-log2 p of the maps under the priors in float32, group by group."""
    bits, maps = 0.0, [torch.from_numpy(x.astype(np.int64)) for x in coded[:2]]
    known = torch.full((len(maps[0]),), math.nan), prior.as_it_is(len(maps[0]))
    for name, codes, condition in zip(LEVELS, maps, (None, maps[0]), strict=True):
        level, hidden = getattr(prior, name), torch.ones(codes.shape[1:], dtype=torch.bool)
        for at in code_files.groups(level.shape, code_files.GROUPS[name]):
            seen = codes.masked_fill(hidden, SMALL.K)
            log_p = level(seen, level.context(*known, condition)).log_softmax(3)
            of_codes = log_p.gather(3, codes[..., None])[..., 0]
            bits -= of_codes[:, at].sum().item() / math.log(2)
            hidden[at] = False
    return bits


@torch.inference_mode()
def test_codes_come_back_and_the_file_is_as_short_as_the_probabilities(models, coder):
    prior = Prior(coder.prior.config, (8, 4)).eval()
    prior.load_state_dict(torch.load(models[1])["model"])
    for count in (1, 40):
        coded, header = random_planes(count, seed=count), header_of()
        data, packed = coder.pack(header, "axial", coded)
        assert all(map(np.array_equal, packed, coded))  # nothing to choose by
        image, plane, found = coder.unpack(data)
        assert plane == "axial" and image.shape == (64, 32) and image.raw.dtype == np.int16
        np.testing.assert_array_equal(image.affine, nifti.best_affine(header)[0])
        for here, there in zip(found, coded, strict=True):
            np.testing.assert_array_equal(here, there)
            assert here.dtype == there.dtype
        ideal = bits_by_hand(prior, coded) / 8
        assert ideal < len(data) < 1.02 * ideal + 90 + 8 * count
        assert ideal > 1.2 * count * 160 * math.log2(SMALL.K) / 8  # the priors are no uniform ones


@torch.inference_mode()
def test_bottom_codes_are_the_best_by_distance_and_bits(models, coder, monkeypatch):
    monkeypatch.setattr(code_files, "BIT_WEIGHT", 0.05)
    model, x = load_model(models[0]).model, torch.randn(3, 1, 64, 32)
    plain = Coded(*(codes.numpy().astype(np.uint16) for codes in coder.model.encode(x)), SCALE)
    data, packed = coder.pack(header_of(), "", plain, slice_of=lambda plane: x[plane : plane + 1])
    np.testing.assert_array_equal(packed.top, plain.top)
    assert len(data) < 0.98 * len(coder.pack(header_of(), "", plain)[0])
    assert all(map(np.array_equal, coder.unpack(data)[2], packed))
    top, bottom = (torch.from_numpy(maps.astype(np.int64)) for maps in packed[:2])
    z, book = model.unquantised_bottom(x, top), model.quantiser_bottom.codebook
    torch.testing.assert_close(z, bottom_before_quantiser(model, x))
    distances = (z.permute(0, 2, 3, 1)[..., None, :] - book).square().sum(4)  # (3, 16, 8, K)
    p = model.quantiser_bottom.ema_count / model.quantiser_bottom.ema_count.sum()
    variance = (p[:, None] * (book - (p[:, None] * book).sum(0)).square()).sum()
    level, hidden = coder.prior.bottom, torch.ones(16, 8, dtype=torch.bool)
    context = level.context(torch.full((3,), math.nan), coder.prior.as_it_is(3), top)
    for at in code_files.groups(level.shape, code_files.GROUPS["bottom"]):
        bits = -level(bottom.masked_fill(hidden, SMALL.K), context).log_softmax(3) / math.log(2)
        costs = distances + 0.05 * variance * bits
        chosen = costs.gather(3, bottom[..., None])[..., 0]
        # The coder rounds the priors' logits to a sixteenth.
        assert (chosen - costs.amin(3))[:, at].max() < 0.05 * variance / 8
        hidden[at] = False


def bottom_before_quantiser(model, x):
    kept = []
    hook = model.quantiser_bottom.register_forward_hook(lambda _, z, __: kept.append(z[0]))
    model.encode(x)
    hook.remove()
    return kept[0]


def test_the_coder_s_weights_leave_no_room_for_rounding(coder):
    # In float32, logits differ by 1e-6 from one CPU to the next, and every file would be refused.
    assert {parameter.dtype for parameter in coder.prior.parameters()} == {torch.float64}
    exact = 2.0**20 * np.exp(-np.arange(len(code_files.WEIGHTS)) / code_files.GRID)
    assert np.abs(exact % 1 - 0.5).min() > 1e-6 and code_files.WEIGHTS[-1] == 0
    logits = torch.randn(50, 40, dtype=torch.float64) * 3
    weights = code_files.weigh(logits)
    p = (weights / weights.sum(1, keepdims=True) * (2**24 - 40) + 1) / 2**24  # as the coder has it
    excess = (logits.softmax(1) * (logits.log_softmax(1) - torch.from_numpy(p).log())).sum(1)
    assert excess.mean() < 5e-4  # nats a code
    assert (weights == code_files.weigh(logits + 1e-12)).all()


@pytest.mark.parametrize("shape, count", [((64, 32), 5), ((3, 5), 4), ((1, 1), 1), ((2, 1), 5)])
def test_groups_are_all_places_once_and_lie_evenly(shape, count):
    groups = code_files.groups(shape, count)
    assert len(groups) == count
    assert (np.sum(groups, 0) == 1).all() and groups[0].shape == shape
    if shape == (64, 32):
        quarters = groups[0].reshape(2, 32, 2, 16).sum((1, 3))  # each has its share
        shares = quarters / quarters.sum()
        np.testing.assert_allclose(shares, 0.25, atol=0.01)


def test_the_depthwise_convolution_is_pytorch_s():
    for side in (3, 5):
        conv = nn.Conv2d(6, 6, side, padding=side // 2, groups=6).double()
        x = torch.randn(2, 6, 7, 4, dtype=torch.float64)
        torch.testing.assert_close(code_files.depthwise(conv, x), conv(x))


def test_no_damage_goes_unseen(coder, monkeypatch):
    rng = np.random.default_rng(0)
    data, _ = coder.pack(header_of(), "", random_planes(1))
    visit = coder.visit
    monkeypatch.setattr(coder, "visit", None)  # nothing is decoded
    for _ in range(400):
        place, bad = rng.integers(len(data)), bytearray(data)
        bad[place] ^= 1 << rng.integers(8)
        for damaged in (bytes(bad), data[:place], data + bad[:place], bytes(bad[place:])):
            if damaged not in (data, b""):
                with pytest.raises(UserError, match=r"damaged or cut short|not a file of codes"):
                    coder.unpack(damaged)
    with pytest.raises(UserError, match="not a file of codes"):
        coder.unpack(b"")
    monkeypatch.setattr(coder, "visit", visit)
    # What the first sum cannot see: words that somebody else computed.
    start = code_files.HEAD.size
    for _ in range(60):
        body = bytearray(data[start:])
        body[-rng.integers(5, 60)] ^= 1 << rng.integers(8)
        forged = data[:4] + code_files.blake(bytes(body)) + bytes(body)
        with pytest.raises(UserError, match="probabilities differ"):
            coder.unpack(forged)


def test_other_probabilities_are_found_out_and_other_models_named(models, study, tmp_path):
    coder = Coder(load_model(models[0]), models[1])
    data, _ = coder.pack(header_of(), "", random_planes(1))
    coder.prior.bottom.head.bias.data[3] += 0.2
    with pytest.raises(UserError, match="here the priors' probabilities differ"):
        coder.unpack(data)
    other = write_models(tmp_path, study, seed=1)
    with pytest.raises(UserError, match=rf"SHA-256 begins with \w{{12}}; {other[0]} has"):
        Coder(load_model(other[0]), other[1]).unpack(data)
    with pytest.raises(UserError, match="priors of the autoencoder with SHA-256"):
        Coder(load_model(models[0]), other[1])
    saved = runtime.load_checkpoint(models[1], "prior")
    runtime.save_checkpoint(tmp_path / "more.pth", saved | {"epoch": 3})
    with pytest.raises(UserError, match=r"more\.pth has"):
        Coder(load_model(models[0]), tmp_path / "more.pth").unpack(data)


def use(models, inputs, out, **config):
    config = {"device": "cpu", "checkpoint": models[0]} | config
    return reconstruct(list(map(str, inputs)), ReconstructConfig(out=str(out), **config))


def test_a_scan_comes_back_from_its_codes_as_the_model_gives_it(models, tmp_path, capsys):
    pixels, affine = landmark(tilt=12, shape=(60, 30, 13))
    volume = nibabel.Nifti1Image((pixels * 9).astype(np.int16), affine)
    nibabel.save(volume, tmp_path / "case_scan.nii.gz")
    scaled = nibabel.Nifti1Image(pixels, affine)
    scaled.header.set_data_dtype(np.int16)  # nibabel finds a scale for them
    nibabel.save(scaled, tmp_path / "scaled.nii")
    imsave(tmp_path / "p.png", (pixels[..., 2] * 9).astype(np.uint8), check_contrast=False)
    saved = tmp_path / "saved"
    first = use(models, [tmp_path], tmp_path / "one", save=str(saved))["files"]
    names = {f"{name}.vq2" for name in ("case_scan.nii.gz", "p.png", "scaled.nii")}
    assert {path.name for path in saved.iterdir()} == names
    with pytest.raises(UserError, match=r"\.vq2: a file of codes, and --save is for"):
        use(models, [saved], tmp_path / "two", save=str(tmp_path / "again"))
    capsys.readouterr()
    second = use(models, [saved], tmp_path / "two")["files"]
    *rows, mean = [line.split() for line in capsys.readouterr().out.splitlines() if "–" in line]
    # In the table: codes alone have no scores, but bits.
    assert len(rows) == 3 and all(row[2:5] == ["–"] * 3 and float(row[5]) > 0 for row in rows)
    assert mean[:5] == ["mean", "of", "the", "files", str(sum(int(row[1]) for row in rows))]
    assert float(mean[-1]) == pytest.approx(np.mean([float(row[5]) for row in rows]), rel=1e-3)
    assert first["case_scan.nii.gz"]["planes"] == 13
    for name, again in (("case_scan.nii.gz",) * 2, ("scaled.nii", "scaled.nii.gz"), ("p.png",) * 2):
        size = 8 * (saved / f"{name}.vq2").stat().st_size
        assert first[name]["bits"] == second[again]["bits"] == size
        assert "psnr" in first[name] and "psnr" not in second[again]
        assert first[name]["shape"] == second[again]["shape"]
        for here, there in ((name, again), (f"seg_{name}", f"seg_{again}")):
            here, there = (n.replace("seg_case_", "seg_") for n in (here, there))
            if "seg_p" in here:
                here = there = "seg_p.png.nii.gz"
            if here == "p.png":
                np.testing.assert_array_equal(
                    *(imread(tmp_path / folder / here) for folder in ("one", "two"))
                )
                continue
            a, b = nibabel.load(tmp_path / "one" / here), nibabel.load(tmp_path / "two" / there)
            assert a.header == b.header
            np.testing.assert_array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj))


def test_another_process_finds_the_same_codes(models, coder, tmp_path, monkeypatch):
    """With other threads, and the arithmetic of PyTorch and MKL for the oldest CPUs."""
    coded = random_planes(2)
    (tmp_path / "a.vq2").write_bytes(coder.pack(header_of(), "axial", coded)[0])
    code = """
import sys, pathlib, numpy
from modules import load_model
from new_slices.code_files import Coder

*models, file, out = sys.argv[1:]
coder = Coder(load_model(models[0]), models[1])
numpy.savez(out, *coder.unpack(pathlib.Path(file).read_bytes())[2])
"""
    old = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"}
    for name, value in old.items():
        monkeypatch.setenv(name, value)
    words = [*models, tmp_path / "a.vq2", tmp_path / "codes.npz"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    for here, there in zip(coded, np.load(tmp_path / "codes.npz").values(), strict=True):
        np.testing.assert_array_equal(here, there)


def test_a_bad_file_of_codes_is_named_and_nothing_is_overwritten(models, tmp_path, monkeypatch):
    for name in ("a.nii.gz", "b.nii.gz"):
        pixels = np.random.default_rng(0).random((64, 32), np.float32)
        nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), tmp_path / name)
    code, out = tmp_path / "a.VQ2", tmp_path / "out"
    with pytest.raises(UserError, match="one file for 2"):
        use(models, [tmp_path], out, save=str(code))
    assert not out.exists() and not code.exists()
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "a.vq2"):
        with pytest.raises(OSError, match=f"{tmp_path / 'file'}: cannot write .* another --save"):
            use(models, [tmp_path / "a.nii.gz"], out, save=str(place))
    assert not list(out.iterdir())
    use(models, [tmp_path / "a.nii.gz"], out, save=str(code))
    with pytest.raises(UserError, match=r"a\.VQ2: its result would replace .*a\.nii\.gz"):
        use(models, [code], tmp_path)
    code.write_bytes(code.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"a\.VQ2.*damaged or cut short"):
        use(models, [code], tmp_path / "new")
    assert not (tmp_path / "new" / "a.nii.gz").exists()
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        use(models, [code], out, prior=str(tmp_path / "none.pth"))
