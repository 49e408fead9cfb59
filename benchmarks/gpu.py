"""One unattended check of a GPU in at most eight minutes: is training right there, how fast, and how soon is it good.

    python -m benchmarks.gpu --data keras_slices_data --out gpu.json
    python -m benchmarks.gpu --data study.tar.xz --only correct speed     # a study packed by --pack
    python -m benchmarks.gpu --data keras_slices_data --pack study.tar.xz
    python -m benchmarks.gpu --data keras_slices_data --device cpu --smoke

The parts run in the order of their worth, and the file is written anew after each: what was done is there when the
time is up. A part that fails says why, and the others go on. On a CPU it proves that it runs. It needs no package
beyond requirements.txt; without matplotlib the plots are left out, and `commands` fails.
"""

import argparse
import contextlib
import gzip
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

if importlib.util.find_spec("matplotlib") is None:
    sys.modules |= {name: mock.MagicMock() for name in ("matplotlib", "matplotlib.pyplot")}

import loop
import modules
import predict
import runtime
import train
from benchmarks.step import matrix_rate
from optimiser import Muon, split_parameters
from prior import Prior, PriorConfig

GFLOP = 5.5  # of a training step of `best`, a slice
SMOKE = {"height": 32, "width": 16}  # pixels


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_each(function, device: torch.device, rounds: int) -> float:
    """Wall time of one call, after three calls to warm up."""
    for _ in range(3):
        function()
    wait(device)
    began = time.perf_counter()
    for _ in range(rounds):
        function()
    wait(device)
    return (time.perf_counter() - began) / rounds


def make_trainer(args, preset: str = "best", device: torch.device | None = None, **flags) -> loop.Trainer:
    """A trainer of stage one before its first step, on `device` or that of the check."""
    flags = {"preset": preset, "data": args.data, "out": args.scratch, "minutes": 1e6, **args.size, **flags}
    settings = train.make_settings({**flags, "device": str(device or args.device)})
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = loop.Trainer(train.Autoencoder(settings), settings.train)
    trainer.stage.start_epoch(torch.Generator().manual_seed(0))
    trainer.model.train()
    return trainer


def take_steps(trainer: loop.Trainer, count: int, first: int = 0) -> list[float]:
    """The losses of steps `first` to `first + count`, read when all are done."""
    losses, B, size = [], trainer.config.batch_size, trainer.sizes["train"]
    trainer.show_loss = lambda loss, *_: losses.append(loss.detach().clone())
    for i in range(first, first + count):
        trainer.train_step(torch.arange(i * B, (i + 1) * B) % size, tqdm(disable=True))
        trainer.progress.step += 1
    return torch.stack(losses).double().cpu().tolist()


def largest_difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def machine(args) -> dict:
    row = runtime.provenance() | {"cuda": torch.version.cuda, "device": str(args.device)}
    if args.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {"card": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        row["bf16_tflop_per_s"] = round(matrix_rate(args.device) / 1e12, 1)
        source = torch.empty(2**31, dtype=torch.uint8, device=args.device)
        target = torch.empty_like(source)
        copy = seconds_each(lambda: target.copy_(source), args.device, 10)
        row["copy_tb_per_s"] = round(2 * source.numel() / copy / 1e12, 2)
        small = torch.zeros(8, device=args.device)
        row["launch_us"] = round(1e6 * seconds_each(lambda: small.add_(1), args.device, 2000), 2)
    return row


def correct(args) -> dict:
    """Losses against the CPU's and the eager loop's; waits; a resumed run; codes."""
    row, cuda, steps = {}, args.device.type == "cuda", 4 if args.smoke else 20
    positions = torch.Generator()

    def same_vectors(self, flat):  # each device has random numbers of its own; these are the same on all
        rows = (torch.rand(self.K, dtype=torch.float64, generator=positions) * len(flat)).long()
        return flat[rows.to(flat.device)]

    with mock.patch.object(modules.VectorQuantiser, "random_vectors", same_vectors):
        losses = {}
        for name, device, bf16 in (
            ("cpu", torch.device("cpu"), "off"),
            ("float32", args.device, "off"),
            ("bf16", args.device, "on"),
        ):
            positions.manual_seed(0)
            losses[name] = take_steps(make_trainer(args, device=device, bf16=bf16), steps)
    row["losses"] = {name: [round(loss, 5) for loss in values] for name, values in losses.items()}
    for name in ("float32", "bf16"):
        row[f"{name}_to_cpu"] = largest_difference(losses[name], losses["cpu"])

    trainer = make_trainer(args, batch_size=2)
    take_steps(trainer, 3)
    trainer.show_loss = lambda *_: None
    if cuda:
        torch.cuda.set_sync_debug_mode("error")  # PyTorch raises where a step waits
    try:
        for i in range(5):
            trainer.train_step(torch.arange(2) + i, tqdm(disable=True))
            trainer.should_stop([])
        row["a_step_waits"] = False
    except RuntimeError as error:
        row["a_step_waits"] = str(error)[:200]
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")

    straight = make_trainer(args, batch_size=2)
    take_steps(straight, 5)
    checkpoint = runtime.load_checkpoint(straight.checkpoints.save("half"), straight.stage.kind)
    expected = take_steps(straight, 5, 5)
    resumed = make_trainer(args, batch_size=2)
    resumed.checkpoints.restore(checkpoint)
    row["resumed_to_straight"] = largest_difference(take_steps(resumed, 5, 5), expected)
    if cuda:
        runs = [take_steps(make_trainer(args, batch_size=4, cuda_graph=graph), 20) for graph in ("off", "on")]
        row["graph_to_eager"] = largest_difference(*runs)

    model, split = straight.model.eval(), straight.stage.splits["validate"]
    x = split.images(range(min(64, len(split))))
    codes = {}
    with torch.inference_mode():
        for name, device, tf32 in (
            ("cpu", "cpu", False),
            ("tf32", args.device, True),
            ("float32", args.device, False),
        ):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                codes[name] = [level.cpu() for level in model.to(device).encode(x.to(device))]
    for name in ("tf32", "float32"):
        pairs = zip(codes[name], codes["cpu"], strict=True)
        row[f"share_of_codes_unlike_the_cpu_{name}"] = [(a != b).double().mean().item() for a, b in pairs]
    return row


def speed(args) -> dict:
    """Slices/s of training steps of `best` by batch size: eager, as a CUDA graph, compiled, both."""
    rows, cuda = {}, args.device.type == "cuda"
    modes = {
        "eager": {},
        "graph": {"cuda_graph": "on"},
        "graph, float32": {"cuda_graph": "on", "bf16": "off"},
        "graph, bf16": {"cuda_graph": "on", "bf16": "on"},
        "compiled graph": {"cuda_graph": "on", "compile": "on"},
    }
    plans = [(B, mode) for mode in modes for B in args.batches if cuda or mode == "eager"]
    for B, mode in plans:
        if time.monotonic() > args.until:
            break
        name = f"batch {B}, {mode}"
        try:
            rows[name] = time_steps(args, B, modes[mode])
        except Exception as error:  # the other rows are worth having
            rows[name] = f"{type(error).__name__}: {str(error)[:300]}"
        print(name, rows[name], flush=True)
    return rows


def time_steps(args, B: int, flags: dict) -> dict:
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer, batch = make_trainer(args, batch_size=B, **flags), None
    trainer.show_loss = lambda *_: None
    batch = torch.arange(B) % trainer.sizes["train"]

    def step() -> None:
        with torch.backends.cudnn.flags(**loop.TRAINING_STEPS):
            trainer.train_step(batch, tqdm(disable=True))

    for _ in range(5):
        step()
    wait(args.device)
    warm_up = time.perf_counter() - began
    times = [seconds_each(step, args.device, 30 if cuda else 1) for _ in range(3)]
    each = statistics.median(times)
    row = {"ms_a_step": round(1e3 * each, 3), "slices_per_s": round(B / each, 1), "bf16": trainer.bf16}
    row |= {"spread": round(max(times) / min(times) - 1, 3), "warm_up_s": round(warm_up, 1)}
    if cuda:
        row["peak_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        row["kernels"] = len(kernels)
        row["busy"] = round(sum(kernel.device_time_total for kernel in kernels) / 1e6 / each, 3)
        row["tflop_per_s"] = round(GFLOP * B / each / 1e3, 2)
    return row


def quality(args) -> dict:
    """Validation SSIM over the seconds of training, then the test split, for `best` and `best-gpu`."""
    rows = {}
    for preset, flags in (("best-gpu", {}), ("best-gpu", {"batch_size": 64, "lr": 6e-3}), ("best", {})):
        if time.monotonic() + 60 * args.minutes + 20 > args.until and not args.smoke:
            break
        name = " ".join([preset, *(f"{key} {value}" for key, value in flags.items())])
        out = Path(args.scratch) / name.replace(" ", "-")
        flags = {
            "preset": preset,
            "data": args.data,
            "out": str(out),
            "minutes": args.minutes,
            **args.size,
            **flags,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            best = train.train_autoencoder(train.make_settings({**flags, "device": str(args.device)}))
            scores = predict.predict(predict.PredictConfig(checkpoint=str(best), device=str(args.device)))
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        curve = [(e["seconds"], round(1 - e["validate"]["ssim"], 5)) for e in log if "epoch" in e]
        rows[name] = {"validation": curve[:: max(1, len(curve) // 40)], "test": scores}
        print(name, curve[-1], flush=True)
        if args.smoke:
            break
    return rows


def priors(args) -> dict:
    """Training steps of both priors, and new slices/s."""
    row, shape = (
        {"train": {}, "sample": {}},
        modules.VQVAE2Config().code_shapes(*args.size.values() or (256, 128))[0],
    )
    model = Prior(PriorConfig(), shape).to(args.device)
    muon = Muon(*split_parameters(model), 1e-3, 0.05, fused=True)
    h, w = shape
    for B in args.prior_batches:
        top, bottom = (torch.randint(512, (B, k * h, k * w), device=args.device) for k in (1, 2))
        position, variant = torch.rand(B, device=args.device), model.as_it_is(B)

        def step(batch=(top, bottom, position, variant)) -> None:
            muon.zero_grad()
            nats = model.train()(*batch)
            sum(level.mean() for level in nats.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon.step()

        each = seconds_each(step, args.device, 10 if args.device.type == "cuda" else 1)
        row["train"][B] = {"ms_a_step": round(1e3 * each, 2), "slices_per_s": round(B / each, 1)}
    model.eval()
    for n in args.samples:
        began = time.perf_counter()
        model.sample([0.5] * n, range(n))[1].cpu()
        row["sample"][n] = {"slices_per_s": round(n / (time.perf_counter() - began), 2)}
        print("sample", n, row["sample"][n], flush=True)
    return row


def commands(args) -> dict:
    """What a user types, with exit codes and seconds; SIGTERM in the middle of a run, and on from there."""
    out, row, device = Path(args.scratch) / "commands", {}, ["--device", args.device.type]
    size = [word for side, value in args.size.items() for word in (f"--{side}", str(value))]
    minutes = ["--minutes", str(args.user_minutes), *device]
    best = ["--checkpoint", str(out / "vqvae2_best.pth"), "--out", str(out)]
    fit = ["train.py", "--data", args.data, *size, "--preset", "quick"]
    lines = [
        [*fit, "--out", str(out), *minutes],
        ["predict.py", *best, *device],
        ["train.py", "--stage", "prior", "--preset", "quick", *best, *minutes],
        ["generate.py", "--n", "16", "--prior", str(out / "prior_best.pth"), *best, *device],
    ]

    def run(*line: str) -> dict:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *line], cwd=runtime.ROOT, capture_output=True, text=True, check=False
        )
        tail = (done.stdout + done.stderr).strip().splitlines()[-3:] if done.returncode else []
        return {"exit_code": done.returncode, "seconds": round(time.perf_counter() - began, 1), "tail": tail}

    for number, line in enumerate(lines, 1):
        row[f"{number}. {line[0]}"] = run(*line)
        print(line[0], row[f"{number}. {line[0]}"], flush=True)
    stopped = f"{out}-stopped"
    process = subprocess.Popen(
        [sys.executable, *fit, "--out", stopped, "--minutes", "10", *device],
        cwd=runtime.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if line.startswith("training"):
            break
    time.sleep(3)
    process.terminate()
    tail = process.communicate()[0].strip().splitlines()[-2:]
    row["SIGTERM"] = {"exit_code": process.returncode, "tail": tail}
    row["resume"] = run("train.py", "--resume", f"{stopped}/vqvae2_interrupted.pth", *minutes)
    return row


PARTS = {part.__name__: part for part in (machine, correct, speed, quality, priors, commands)}


def pack(study: Path, archive: Path) -> None:
    """A study as one .tar.xz of uncompressed NIfTI, which is smaller than its .nii.gz files together."""
    files = sorted(study.glob("keras_slices_*/*.nii*")) + sorted(study.glob("*.txt"))
    with runtime.atomic_path(archive) as part, tarfile.open(part, "w:xz") as tar:
        for path in tqdm(files, "packing", disable=None):
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            entry = tarfile.TarInfo(str(path.relative_to(study)).removesuffix(".gz"))
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    print(f"wrote {archive}, {archive.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a study's folder, or one packed by --pack")
    parser.add_argument("--pack", type=Path, help="only pack the study of --data into this .tar.xz")
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=470, help="no part begins after this")
    parser.add_argument("--minutes", type=float, default=0.75, help="of each training of `quality`")
    parser.add_argument("--smoke", action="store_true", help="tiny slices and batches: does it run?")
    args = parser.parse_args()
    if args.pack:
        pack(Path(args.data), args.pack)
        return
    args.device, args.until = runtime.pick_device(args.device), time.monotonic() + args.seconds
    args.size, args.batches, args.prior_batches, args.samples = (
        {},
        [16, 64, 1, 4, 256],
        [2, 16, 64],
        [16, 64, 512],
    )
    args.user_minutes = 0.15
    if args.smoke:
        args.size, args.batches, args.prior_batches, args.samples = SMOKE, [1, 2], [1], [1]
        args.minutes, args.user_minutes = 0.03, 0.03
    with tempfile.TemporaryDirectory() as args.scratch:
        if Path(args.data).is_file():
            with tarfile.open(args.data) as tar:
                tar.extractall(Path(args.scratch) / "study", filter="data")
            args.data = str(Path(args.scratch) / "study")
        args.data = str(Path(args.data).resolve())
        report, began = {}, time.monotonic()
        for name in args.only:
            start = time.monotonic()
            if start > args.until:
                report[name] = "not begun: out of time"
                continue
            try:
                report[name] = PARTS[name](args)
            except Exception as error:
                where = traceback.format_exc().splitlines()[-6:]
                report[name] = {"failed": f"{type(error).__name__}: {error}", "where": where}
            report.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
            print(
                f"{name}: {report['seconds'][name]} s",
                json.dumps(report[name], default=str)[:300],
                flush=True,
            )
            runtime.write_text(args.out, json.dumps(report, indent=1, default=str) + "\n")
    print(f"wrote {args.out} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    runtime.run_cli(main)
