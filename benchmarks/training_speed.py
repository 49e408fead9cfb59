"""Training steps side by side: ours, the report's model and MONAI's VQVAE, on this machine's CPU or GPU.

    pip install monai
    python benchmarks/training_speed.py [--rounds 3] [--out Results/training_speed.json]

Each round times every model in turn on the same batch (forward, loss, backward, Adam; every model with the
mean squared error), so that a machine that slows down slows them all; ratios are of medians over rounds.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from baselines import ReportVQVAE2, monai_vqvae

import runtime
from modules import VQVAE2


def our_loss(model, x):
    output = model(x)
    commitment = output.top.commitment + output.bottom.commitment
    return F.mse_loss(output.reconstruction, x) + 0.25 * commitment


def their_loss(model, x):
    reconstruction, codebook_loss = model(x)
    return F.mse_loss(reconstruction, x) + codebook_loss


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", default="Results/training_speed.json")
    args = parser.parse_args()
    device = runtime.pick_device(args.device)
    bf16 = runtime.has_fast_bf16(device)
    x = torch.randn(args.batch_size, 1, 256, 128, device=device)

    # steps per timing: enough that a timing is not all noise, few enough that the slow models finish
    contenders = {
        "ours": (VQVAE2().to(memory_format=torch.channels_last), our_loss, bf16, 10),
        "report": (ReportVQVAE2(), their_loss, False, 1),
        "monai": (monai_vqvae(), their_loss, False, 1),
    }
    steps = {}
    for name, (model, loss, autocast, n) in contenders.items():
        model.to(device).train()
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-4)

        def step(model=model, loss=loss, autocast=autocast, optimiser=optimiser):
            with runtime.autocast(device, autocast):
                value = loss(model, x)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()

        step()  # warm-up: allocations, and the codebook's start
        steps[name] = (step, n)

    rates = {name: [] for name in contenders}
    for round_ in range(args.rounds):
        for name, (step, n) in steps.items():
            began = time.perf_counter()
            for _ in range(n):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rates[name].append(args.batch_size * n / (time.perf_counter() - began))
            print(f"round {round_ + 1}: {name:7} {rates[name][-1]:8.2f} slices/s", flush=True)

    median = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "slices_per_s": {name: [round(value, 3) for value in values] for name, values in rates.items()},
        "parameters": {
            name: sum(p.numel() for p in model.parameters()) for name, (model, *_) in contenders.items()
        },
        "ours_over_report": round(median["ours"] / median["report"], 1),
        "ours_over_monai": round(median["ours"] / median["monai"], 1),
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "ours_in_bf16": bf16,
        **runtime.provenance(),
    }
    runtime.write_json(args.out, result)
    print(f"ours / report {result['ours_over_report']}, ours / MONAI {result['ours_over_monai']}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
