"""A training step of train.py: slices/s by batch size, memory, and on a CPU where its time goes.

    python -m benchmarks.step --data keras_slices_data                        # --preset report
    python -m benchmarks.step --data keras_slices_data --preset best --batch-size 1
    python -m benchmarks.step --data keras_slices_data --batch-size 64 256    # on a GPU

Takes the very steps of train.py, data included, and writes --out, benchmarks/results/step.json: one
entry a preset. To compare two revisions, run it in a worktree of each, by turns.
"""

import collections
import json
import resource
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks.baselines import our_stage
from dataset import DataConfig
from modules import VectorQuantiser
from support import runtime, trainer

# What the profiler calls the parts of a step. An operation belongs to the first part that names it,
# or names an operation around it.
PARTS = {
    "optimiser": ("Optimizer.step", "clip_grad_norm_"),
    "quantiser": ("quantiser",),
    "data": ("data",),
    # Those of 1x1 are matrix products.
    "convolutions": ("convolution", "ConvolutionBackward", "aten::linear", "AddmmBackward"),
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
        "slices": 10**9,
        "batch_size": batch_size,
        "compile": args.compile,
        "device": args.device,
    }
    stage, config = our_stage(args.preset, runtime.fill(DataConfig, vars(args)), **settings)
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
            run.train_step(batch)
    wait()
    return time.perf_counter() - began


def shares(run: trainer.Trainer, batch: torch.Tensor, steps: int) -> dict[str, float]:
    """The share of each of `PARTS` in the CPU's time for a step. "pointwise" is all other
    operations, "Python" what is outside operations, which is in part the profiler itself."""
    quantise, losses, split = VectorQuantiser.forward, train.losses, run.stage.splits["train"]
    VectorQuantiser.forward, train.losses = named(quantise, "quantiser"), named(losses, "loss")
    split.images = named(split.images, "data")
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            whole = 1e6 * seconds(run, batch, steps)
    finally:
        VectorQuantiser.forward, train.losses = quantise, losses
        del split.images
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
        row["peak_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
    else:
        # Of the whole process so far, which is why it comes before the profiler.
        row["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        row["shares"] = shares(run, batch, steps)
    return row


def main() -> None:
    parser = runtime.parser(__doc__, DataConfig)
    parser.add_argument("--preset", default="report", choices=train.PRESETS)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16])
    parser.add_argument(
        "--slices", type=int, default=320, help="to time, in steps of --batch-size; 3 to 200"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", default="benchmarks/results/step.json")
    args = parser.parse_args()
    rows = {}
    for batch_size in args.batch_size:
        row = rows[f"batch {batch_size}"] = measure(args, batch_size)
        print(f"{args.preset}, batch {batch_size}:", ", ".join(f"{k} {v}" for k, v in row.items()))
    out = Path(args.out)
    known = json.loads(out.read_text()) if out.is_file() else {}
    entry = {
        "threads": torch.get_num_threads(),
        "compile": args.compile,
        **rows,
        **runtime.provenance(),
    }
    runtime.write_json(out, known | {args.preset: entry})
    print(f"wrote {out}")


if __name__ == "__main__":
    runtime.run_cli(main)
