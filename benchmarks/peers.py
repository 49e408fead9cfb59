"""Peers side by side: how fast they train, in how much memory, and at what rate they code.

    pip install monai
    python -m benchmarks.peers                      # on a GPU where there is one, else on the CPU
    python -m benchmarks.peers --only ours single   # without MONAI

    ours      the default network of train.py
    single    one level of 64x32 codes, K 512, with our quantiser
    monai     MONAI's VQVAE of 64x32 codes, K 512
    report    the report's model, rebuilt

Every model takes the same step: a batch of slices forward, the mean squared error and the
quantiser's loss, backward, Adam. Each round times every model in turn, so that a machine that slows
down slows them all; the table has medians over rounds. Every timing has a process of its own, whose
peak memory includes the libraries. How well the models reconstruct is not compared: the peers would
need hours to converge.
"""

import importlib.util
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import ReportVQVAE2, SingleLevelVQVAE, monai_vqvae
from modules import VQVAE2
from support import runtime

SIZE = 256, 128


class Peer(NamedTuple):
    """How to build a model, its reconstruction and loss of a batch, and its nominal rate."""

    build: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    bits: int  # codes of a slice times log2 K


def our_forward(model: VQVAE2, x: Tensor) -> tuple[Tensor, Tensor]:
    output = model(x)
    return output.reconstruction, 0.25 * (output.top.commitment + output.bottom.commitment)


def their_forward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return model(x)


PEERS = {
    # In the memory format in which train.py trains it.
    "ours": Peer(
        lambda: VQVAE2().to(memory_format=torch.channels_last), our_forward, (2048 + 512) * 9
    ),
    "single": Peer(SingleLevelVQVAE, their_forward, 2048 * 9),
    "monai": Peer(monai_vqvae, their_forward, 2048 * 9),
    # A code for each 64 pixels of a channel, of which both levels have 64 of 128x64.
    "report": Peer(ReportVQVAE2, their_forward, 2 * 128 * 64 * 8),
}


def peak_memory(device: torch.device) -> float:
    """MiB that PyTorch had allocated on a GPU, or the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(name: str, batch_size: int, seconds: float, device: torch.device) -> dict:
    """Time the training steps of one model for at least `seconds` and one step."""
    peer = PEERS[name]
    torch.manual_seed(0)
    model = peer.build().to(device).train()
    adam = torch.optim.Adam(model.parameters(), 3e-4)
    x = torch.randn(batch_size, 1, *SIZE, device=device)
    bf16 = name == "ours" and runtime.has_fast_bf16(device, batch_size)

    def step(batch: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            reconstruction, quantiser_loss = peer.forward(model, batch)
            loss = F.mse_loss(reconstruction, batch) + quantiser_loss
        adam.zero_grad()
        loss.backward()
        adam.step()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    step(x[:1])  # libraries that load late, and the start of the codebook
    wait()
    steps, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or not steps:
        step(x)
        wait()
        steps += 1
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "slices_per_s": batch_size * steps / spent,
        "peak_memory_mib": peak_memory(device),
        "bf16": bf16,
        "bits_per_pixel": peer.bits / math.prod(SIZE),
    }


def merge(rounds: list[dict]) -> dict:
    """The row of a model: medians over its rounds, and the speed of each round."""
    speeds = [row["slices_per_s"] for row in rounds]
    return rounds[0] | {
        "slices_per_s": round(statistics.median(speeds), 3),
        "peak_memory_mib": round(statistics.median(row["peak_memory_mib"] for row in rounds)),
        "rounds": [round(speed, 3) for speed in speeds],
    }


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown."""
    heads = (
        "model",
        "parameters",
        "bits per pixel",
        "slices/s",
        "peak memory, MiB",
        "ours is faster by",
    )
    lines = [heads, ["---"] * len(heads)]
    for name, row in rows.items():
        speed, ratio = row["slices_per_s"], ""
        if "ours" in rows and name != "ours":
            ratio = f"{rows['ours']['slices_per_s'] / speed:.1f} x"
        size, bits = f"{row['parameters'] / 1e6:.2f} M", f"{row['bits_per_pixel']:.4g}"
        lines.append([name, size, bits, f"{speed:.3g}", str(row["peak_memory_mib"]), ratio])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=PEERS, default=list(PEERS), help="models to measure"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timings of each model")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a timing, at least")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", default="benchmarks/results/peers.json")
    args = parser.parse_args()
    if "monai" in args.only and not importlib.util.find_spec("monai"):
        raise runtime.UserError(
            "MONAI is not installed. Fix: pip install monai, or --only ours single report"
        )
    device = runtime.pick_device(args.device)
    rounds = {name: [] for name in args.only}
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as pool:
        for number in range(args.rounds):
            for name, rows in rounds.items():
                rows.append(
                    pool.submit(measure, name, args.batch_size, args.seconds, device).result()
                )
                print(
                    f"round {number + 1}: {name:7} {rows[-1]['slices_per_s']:8.2f} slices/s",
                    flush=True,
                )
    rows = {name: merge(each) for name, each in rounds.items()}
    conditions = {
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    runtime.write_json(args.out, {"rows": rows, **conditions, **runtime.provenance()})
    print(f"{table(rows)}\nwrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
