"""A training step of train.py: slices/s by batch size, and where its time goes. On a GPU also the
share of the bfloat16 matrix rate that its convolutions reach, and the time of an epoch.

    python -m benchmarks.step --data keras_slices_data                                   # --preset report
    python -m benchmarks.step --data keras_slices_data --preset best --batch-size 1
    python -m benchmarks.step --data keras_slices_data --batch-size 64 256 --compile on  # on a GPU
    python -m benchmarks.step --data keras_slices_data --preset best --batch-size 1 --against ../before

Takes the very steps of loop.py, data included, and writes --out, benchmarks/results/step.json: one
entry a preset.
"""

import collections
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from benchmarks.baselines import our_stage
from dataset import DataConfig
from modules import VectorQuantiser
from support import runtime, trainer

EPOCH = 11_460  # training slices of HipMRI's sliced set
# what the profiler calls a part of a step; an operation belongs to the first that it or a parent is
# named
PARTS = {
    "optimiser": ("Optimizer.step", "clip_grad_norm_"),
    "quantiser": ("quantiser",),
    "data": ("data",),
    "convolutions": (
        "convolution",
        "ConvolutionBackward",
        "aten::linear",
        "AddmmBackward",
    ),  # 1x1: products
    "loss": ("loss",),
}


def named(function, name: str):
    """`function`, seen by the profiler under `name`."""

    def wrapped(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return wrapped


def prepare(args, batch_size: int) -> tuple[trainer.Trainer, torch.Tensor]:
    """A trainer for steps of `batch_size`, and the indices of its first batch."""
    settings = {
        "minutes": 1e6,
        "batch_size": batch_size,
        "compile": args.compile,
        "device": args.device,
    }
    stage, config = our_stage(args.preset, runtime.from_flags(DataConfig, args), **settings)
    run = trainer.Trainer(stage, config, None)
    stage.start_epoch(torch.Generator().manual_seed(0))
    stage.model.train()
    return run, torch.arange(batch_size) % run.sizes["train"]


def seconds(run: trainer.Trainer, batch: torch.Tensor, steps: int) -> float:
    """The wall time of that many steps."""

    def wait() -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    with torch.backends.cudnn.flags(**trainer.TRAINING_STEPS):
        for _ in range(steps):
            run.train_step(batch, tqdm(disable=True))
    wait()
    return time.perf_counter() - began


def shares(run: trainer.Trainer, batch: torch.Tensor, steps: int) -> dict[str, float]:
    """The share of each of `PARTS` in the CPU's time for a step. "pointwise" is all other
    operations, "Python" what is outside operations, which is in part the profiler itself."""
    quantise, losses, images = VectorQuantiser.forward, train.losses, run.stage.images["train"]
    VectorQuantiser.forward, train.losses = named(quantise, "quantiser"), named(losses, "loss")
    run.stage.images["train"] = named(images, "data")
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            whole = 1e6 * seconds(run, batch, steps)
    finally:
        VectorQuantiser.forward, train.losses, run.stage.images["train"] = quantise, losses, images
    spent = collections.Counter()
    for event in profiler.events():
        above, names = event, []
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        part = next(
            (part for part, keys in PARTS.items() if any(key in n for n in names for key in keys)),
            "pointwise",
        )
        spent[part] += event.self_cpu_time_total
    spent["Python"] = whole - spent.total()
    return {part: round(spent[part] / whole, 4) for part in (*PARTS, "pointwise", "Python")}


def matrix_rate(device: torch.device, n: int = 8192, rounds: int = 20) -> float:
    """FLOP/s of bfloat16 products of n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for count in (3, rounds):  # the first to warm up
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        torch.cuda.synchronize()
    return 2 * n**3 * rounds / (time.perf_counter() - began)


def measure(args, batch_size: int) -> dict:
    run, batch = prepare(args, batch_size)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds(run, batch, 5)  # allocations, autotuning, compilation
    with FlopCounterMode(display=False) as flops:
        seconds(run, batch, 1)
    steps = max(3, min(args.slices // batch_size, 200))
    rate = batch_size * steps / seconds(run, batch, steps)
    row = {
        "slices_per_s": round(rate, 2),
        "steps": steps,
        "gflop_per_slice": round(flops.get_total_flops() / batch_size / 1e9, 3),
        "gflop_per_s": round(flops.get_total_flops() / batch_size * rate / 1e9, 1),
        "bf16": run.bf16,
    }
    if run.device.type == "cuda":
        row["seconds_per_epoch"] = round(EPOCH / rate, 3)
        row["peak_memory_mib"] = round(
            torch.cuda.max_memory_allocated() / 2**20
        )  # before `matrix_rate`'s matrices
        row["share_of_bf16_matrix_rate"] = round(
            1e9 * row["gflop_per_s"] / matrix_rate(run.device), 4
        )
    else:
        # of the whole process so far, without the profiler
        row["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        row["shares"] = shares(run, batch, steps)
    return row


CHILD = """
import argparse, dataclasses, sys
sys.path[:0] = ["", "benchmarks"]
preset, batch_size, data = sys.argv[1:]
sys.argv = ["step.py"]
from benchmarks import step
fields = {field.name: field.default for field in dataclasses.fields(step.DataConfig)} | {"data":
data} run, batch = step.prepare(argparse.Namespace(**fields, preset=preset, compile="off",
device="cpu"), int(batch_size)) step.seconds(run, batch, 6)
print("ready", flush=True)
for steps in sys.stdin:
    print(step.seconds(run, batch, int(steps)), flush=True)
"""


def compare(args, batch_size: int, rounds: int = 24, steps: int = 4) -> dict:
    """CPU steps of this checkout and of the one at `args.against`, in turns, so that both meet the
    same load.
    """
    words = [args.preset, str(batch_size), str(Path(args.data).resolve())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, *words], cwd=folder, **pipes)
        for folder in (args.against, runtime.ROOT)
    ]
    for child in children:
        while child.stdout.readline() not in ("ready\n", ""):
            pass
    times = [[], []]
    for _ in range(rounds):
        for child, of_child in zip(children, times, strict=True):
            print(steps, file=child.stdin, flush=True)
            of_child.append(float(child.stdout.readline()) / steps)
    for child in children:
        child.communicate()
    ratios = sorted(after / before for before, after in zip(*times, strict=True))
    return {
        "ms_before": round(1e3 * statistics.median(times[0]), 1),
        "ms_after": round(1e3 * statistics.median(times[1]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[rounds // 4], 3), round(ratios[-rounds // 4], 3)],
        "rounds": rounds,
        "steps": steps,
    }


def main() -> None:
    parser = runtime.parser(__doc__, DataConfig)
    parser.add_argument("--preset", default="report", choices=train.PRESETS["autoencoder"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16])
    parser.add_argument(
        "--slices", type=int, default=320, help="to time, in steps of --batch-size; 3 to 200"
    )
    parser.add_argument("--compile", default="auto", choices=trainer.SWITCH)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--against", type=Path, help="another checkout: only the ratio of its CPU steps to these"
    )
    parser.add_argument("--out", default="benchmarks/results/step.json")
    args = parser.parse_args()
    rows = {}
    for batch_size in args.batch_size:
        row = compare(args, batch_size) if args.against else measure(args, batch_size)
        rows[f"batch {batch_size}"] = row
        print(f"{args.preset}, batch {batch_size}:", ", ".join(f"{k} {v}" for k, v in row.items()))
    out = Path(args.out)
    known = json.loads(out.read_text()) if out.is_file() else {}
    entry = {
        "threads": torch.get_num_threads(),
        "compile": args.compile,
        **rows,
        **runtime.provenance(),
    }
    name = f"{args.preset}, against {args.against.name}" if args.against else args.preset
    runtime.write_json(out, known | {name: entry})
    print(f"wrote {out}")


if __name__ == "__main__":
    runtime.run_cli(main)
