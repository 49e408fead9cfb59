"""New slices per second: how fast the default priors sample both code maps, by batch size.

    python -m benchmarks.sampling                              # 16 slices, on this machine's CPU
    python -m benchmarks.sampling --batch-size 256 1024 2048   # on a GPU

The weights are random, because a step's cost does not depend on them. Decoding, about 1 %, is left
out.
"""

import math
import time

import torch

from modules import VQVAE2Config
from new_slices.prior import Prior, PriorConfig
from support import runtime


def main() -> None:
    parser = runtime.parser(__doc__, PriorConfig)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16], help="slices at a time")
    parser.add_argument(
        "--rounds", type=int, default=2, help="timings of each batch size; the best counts"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", default="benchmarks/results/sampling.json", help="file to write")
    args = parser.parse_args()
    device, shape = runtime.pick_device(args.device), VQVAE2Config().code_shapes(256, 128)[0]
    prior = Prior(runtime.fill(PriorConfig, vars(args)), shape).to(device).eval()
    rows = {}
    for n in args.batch_size:
        seconds = []
        for _ in range(args.rounds):
            began = time.perf_counter()
            _, bottom = prior.sample([math.nan] * n, range(n))
            bottom.cpu()  # waits for a GPU
            seconds.append(time.perf_counter() - began)
        rows[n] = {"seconds": round(min(seconds), 2), "slices_per_s": round(n / min(seconds), 2)}
        print(f"{n} slices in {min(seconds):.1f} s, {n / min(seconds):.2f} slices/s", flush=True)
    threads = torch.get_num_threads()
    runtime.write_json(
        args.out,
        {"batches": rows, "device": str(device), "threads": threads} | runtime.provenance(),
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
