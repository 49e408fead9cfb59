"""Peers side by side: every model trained on the same slices for the same time, then scored on the test split.

    pip install monai
    OMP_NUM_THREADS=1 python -m benchmarks.peers --data keras_slices_data --minutes 60
    python -m benchmarks.peers --data keras_slices_data --only single ours    # these rows anew, the others stay
    python -m benchmarks.peers --table                                        # print benchmarks/results/peers.json

    ours     train.py --preset best, its learning rate falling over --minutes
    race     train.py --preset quick over --race minutes: how soon ours is there if it need not get further
    single   one level of 64x32 codes, K 512, batch 16: MSE, Adam 1e-3
    monai    MONAI's VQVAE of 64x32 codes, K 512, batch 16: L1 and its quantiser's loss, Adam 3e-4
    report   the report's model, rebuilt, with the settings of its text: MSE, Adam 3e-4, batch 16, beta 0.25

Every model has a process of its own, the same seed and loop.py's step. The clock counts training alone: it
stands still while the validation split is measured: after every 5 % more of the clock, but not more often than
every 5 s, nor for longer than a third of the training in between. The weights of the best validation SSIM are
scored. A row is in --out as soon as its model is done; rows of several sessions add up to one table, which says
where they were not made alike.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import metrics
import runtime
from benchmarks.baselines import (
    Decoded,
    ReportVQVAE2,
    SingleLevelVQVAE,
    monai_through_codes,
    monai_vqvae,
    our_stage,
    our_through_codes,
)
from benchmarks.per_set import study_sets
from dataset import SPLITS, DataConfig, SliceDataset, open_study
from loop import Stage, TrainConfig, Trainer
from predict import rounded, summarise
from runtime import option

# between two validations: seconds of training, at least; share of the clock so far; times what one takes
FLOOR, SHARE, TIMES = 5.0, 0.05, 3.0


@dataclass(frozen=True)
class PeersConfig:
    """How every row is made and shown."""

    minutes: float = option(60.0, "training time of every model, validation not counted")
    race: float = option(3.0, "training time of the row `race`")
    seed: int = option(0, "of weights, order and augmentation")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    below: int = option(100, "patients numbered below that are one set, the rest the other")
    target: float = option(0.90, "validation SSIM, report protocol, to which the table gives the time")
    out: str = option("benchmarks/results/peers.json", "file that the rows are merged into")


class Peer(NamedTuple):
    """A model that is not ours, and its recipe."""

    build: Callable[[], nn.Module]
    error: Callable[[Tensor, Tensor], Tensor]  # of the reconstruction; the quantiser's loss is added
    lr: float
    through_codes: Callable[[nn.Module, Tensor], Decoded]


PEERS = {
    "single": Peer(SingleLevelVQVAE, F.mse_loss, 1e-3, SingleLevelVQVAE.through_codes),
    "monai": Peer(monai_vqvae, F.l1_loss, 3e-4, monai_through_codes),
    "report": Peer(ReportVQVAE2, F.mse_loss, 3e-4, ReportVQVAE2.through_codes),
}
OURS = ("race", "ours")
NAMES = ("ours", "race", *PEERS)


# ---- training on the clock ----


class PeerStage(Stage):
    """A peer for the loop, which trains it as it trains ours."""

    loss_names = ("loss",)

    def __init__(self, name: str, data: DataConfig, config: TrainConfig):
        self.kind, self.peer, self.counts = name, PEERS[name], {}
        self.splits = open_study(data)
        device = runtime.pick_device(config.device)
        self.images = self.splits["train"].on(device)
        runtime.seed_everything(config.seed)
        self.model = self.peer.build().to(device)

    def settings(self) -> dict:
        return {"data": {"study": self.splits["train"].study.name}}

    def batch_losses(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        x = self.images(indices)
        reconstruction, quantiser_loss = self.model(x)
        return {"loss": self.peer.error(reconstruction, x) + quantiser_loss}


class TimedRun(Trainer):
    """A run by the clock that measures the validation split now and then, while the clock stands still.

    `validations` holds a dictionary each time: seconds on the clock, slices seen, mean SSIM (report protocol).
    """

    def __init__(self, name: str, stage, config: TrainConfig, through_codes: Callable[..., Decoded]):
        super().__init__(stage, config, None)
        self.name, self.through_codes = name, through_codes
        self.validations: list[dict] = []
        self.best, self.kept, self.due = -math.inf, {}, FLOOR

    def train(self) -> None:
        """Train until the minutes are over; leaves the model with the weights of its best validation."""
        self.began = time.monotonic()
        with tqdm(desc=self.name, unit="slice") as bar:
            while self.done() < 1:
                self.train_epoch(bar, [])
                self.next_epoch()
        self.stage.model.load_state_dict(self.kept)

    def should_stop(self, stopped: list[int]) -> bool:
        """What the loop asks after every step; the place to validate."""
        stop = super().should_stop(stopped)
        if self.clock >= min(self.due, 60 * self.config.minutes):
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # the steps that it still has to do are the clock's
            self.measure(self.elapsed())
        return stop

    def measure(self, seconds: float) -> None:
        stopped = time.monotonic()
        model, validate = self.stage.model, self.stage.splits["validate"]
        score = torch.cat([metrics.ssim(x, y) for x, y, _ in self.decoded(validate)]).double().mean().item()
        seen = self.progress.epoch * self.sizes["train"] + self.progress.seen
        self.validations.append({"seconds": round(seconds, 2), "slices": seen, "ssim": round(score, 5)})
        tqdm.write(f"{self.name}: validation SSIM {score:.4f} after {seconds:.0f} s, {seen} slices")
        if score > self.best:
            self.best, self.kept = score, {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        spent = time.monotonic() - stopped
        self.began += spent  # the clock stood still
        self.due = seconds + max(FLOOR, SHARE * seconds, TIMES * spent)

    @torch.inference_mode()
    def decoded(self, split: SliceDataset) -> Iterator[tuple]:
        """Slices (B, 1, H, W) of a split in file order, what their codes decode to in float32, and the codes.

        As many at a time as in training, so that the peak of memory is the training's.
        """
        self.stage.model.eval()
        for indices in torch.arange(len(split)).split(self.config.batch_size):
            x = split.images(indices).to(self.device)
            yield x, *self.through_codes(self.stage.model, x)


def prepare(name: str, config: PeersConfig, data: DataConfig) -> TimedRun:
    """The run of a row, not yet begun."""
    clock = {
        "minutes": config.race if name == "race" else config.minutes,
        "seed": config.seed,
        "device": config.device,
    }
    if name in PEERS:
        peer = PEERS[name]
        training = TrainConfig(batch_size=16, lr=peer.lr, bf16="off", **clock)
        return TimedRun(name, PeerStage(name, data, training), training, peer.through_codes)
    stage, training = our_stage("quick" if name == "race" else "best", data, **clock)
    return TimedRun(name, stage, training, our_through_codes)


def peak_memory(device: torch.device) -> float:
    """MiB: what PyTorch had allocated on a GPU, else the process's largest resident set: with libraries and data."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux hands a parent's peak down to its child: ours has imported what the child imports, and no more
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ---- a row ----


def score_test(run: TimedRun, below: int) -> dict:
    """The scores of the whole test split, all and of each set, its rate and the codes that it uses."""
    test = run.stage.splits["test"]
    scores, counts, nominal = [], {}, 0.0
    with tqdm(total=len(test), desc="scoring", unit="slice") as bar:
        for x, y, levels in run.decoded(test):
            pairs = zip(x[:, 0].cpu().numpy(), y[:, 0].cpu().numpy(), strict=True)
            scores += [metrics.score_slice(*pair) for pair in pairs]
            sizes = [codes[0].numel() for codes, _ in levels.values()]
            bits = [math.log2(K) for _, K in levels.values()]
            nominal = metrics.bits_per_pixel(sizes, bits, x[0].numel())
            for level, (codes, K) in levels.items():
                counts[level] = counts.get(level, 0) + torch.bincount(codes.flatten().cpu(), minlength=K)
            bar.update(len(x))
    patients = np.array([name.patient for name in test.names])
    sets = study_sets(patients, below)
    chosen = {"all": np.ones(len(patients), bool)} | (sets if len(sets) > 1 else {})
    return {
        "bits_per_pixel": nominal,
        "codes_used": {level: int(of.count_nonzero()) for level, of in counts.items()},
        "codes": {level: len(of) for level, of in counts.items()},
        "test": {name: summarise_set(scores, patients, of) for name, of in chosen.items()},
    }


def summarise_set(scores: list[dict[str, float]], patients: np.ndarray, of: np.ndarray) -> dict:
    """Slices, patients, and each score's mean and interval, over the slices `of` (N,) bool."""
    summary = summarise([score for score, is_of in zip(scores, of, strict=True) if is_of], patients[of])
    means = {name: {key: one[key] for key in ("mean", "low", "high")} for name, one in summary.items()}
    return {"slices": int(of.sum()), "patients": len(np.unique(patients[of])), **means}


def measure(name: str, config: PeersConfig, data: DataConfig) -> dict:
    """Train and score one model; returns its row."""
    run = prepare(name, config, data)
    splits = run.stage.splits
    began, cpu_began = time.monotonic(), time.process_time()
    run.train()
    peak, cores = peak_memory(run.device), (time.process_time() - cpu_began) / (time.monotonic() - began)
    settings, last = dataclasses.asdict(run.config), run.validations[-1]
    return rounded(
        {
            "minutes": run.config.minutes,
            **{key: settings[key] for key in ("batch_size", "optimiser", "lr", "schedule", "seed")},
            "parameters": sum(p.numel() for p in run.stage.model.parameters()),
            "slices_per_s": last["slices"] / last["seconds"],
            "peak_memory_mib": peak,
            **score_test(run, config.below),
            "validation": run.validations,
            "study": splits["train"].study.resolve().name,
            "synthetic": splits["train"].synthetic,
            "slices": {split: len(splits[split]) for split in SPLITS},
            "fingerprint": "-".join(splits[split].fingerprint[:8] for split in SPLITS),
            "device": str(run.device),
            "bf16": run.bf16,
            "threads": torch.get_num_threads(),
            "cores_had": cores,  # processor seconds a second: fewer than `threads` on a busy machine
            **({"monai": importlib.metadata.version("monai")} if name == "monai" else {}),
            **runtime.provenance(),
        }
    )


# ---- rows to a table ----


def read_rows(path: str) -> dict[str, dict]:
    return json.loads(Path(path).read_text())["rows"] if Path(path).is_file() else {}


def merge_row(path: str, name: str, row: dict) -> None:
    """Put a row into the file; read only now, because another session may have added one."""
    rows = read_rows(path) | {name: row}
    ordered = {name: rows[name] for name in sorted(rows, key=NAMES.index)}
    runtime.write_json(path, {"protocol": " ".join(__doc__.split("\n\n")[-1].split()), "rows": ordered})


def reached(history: list[dict], target: float) -> tuple[float, float | None]:
    """Seconds after which a validation SSIM of `target` was still not seen, and by which it was.

    The second is None for a run that never got there.
    """
    after = 0.0
    for point in history:
        if point["ssim"] >= target:
            return after, point["seconds"]
        after = point["seconds"]
    return after, None


def differences(rows: dict[str, dict]) -> list[str]:
    """A warning for everything in which rows that stand in one table were not made alike."""
    found = []
    for key in ("machine", "device", "bf16", "threads", "minutes", "seed", "study", "fingerprint", "torch"):
        of = {name: row[key] for name, row in rows.items() if (name, key) != ("race", "minutes")}
        if len(set(of.values())) > 1:
            found.append(
                f"WARNING: rows differ in {key}: {', '.join(f'{name} {value}' for name, value in of.items())}"
            )
    for name, row in rows.items():
        if row["device"] == "cpu" and row["cores_had"] < 0.85 * row["threads"]:
            found.append(
                f"WARNING: {name} had {row['cores_had']:.2f} cores for {row['threads']} threads: a busy machine?"
            )
    return found


def tables(rows: dict[str, dict], target: float) -> str:
    """Two Markdown tables, of cost and of scores, under the conditions that they were made in."""
    first = next((row for name, row in rows.items() if name != "race"), next(iter(rows.values())))
    ours = [by for name in OURS if name in rows and (by := reached(rows[name]["validation"], target)[1])]
    soonest = min(ours, default=None)
    train_n, validate_n, test_n = (first["slices"][split] for split in SPLITS)
    synthetic = " (SYNTHETIC, a phantom and not MRI)" if first["synthetic"] else ""
    lines = [
        f"{first['minutes']:g} minutes of training a model, seed {first['seed']}, {first['threads']} threads, "
        f"{first['device']}, {first['machine']}, torch {first['torch']};",
        f"{first['study']}{synthetic}: {train_n} slices to train on, {validate_n} to validate, {test_n} to test.",
        *differences(rows),
        "",
        f"| model | parameters | batch | slices/s | peak memory, MiB | bits per pixel | codes used | "
        f"seconds to validation SSIM {target:g} | ours is sooner |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        after, by = reached(row["validation"], target)
        time_to = f"{by:.0f}" if by else f"not within {row['minutes']:g} min"
        # the peer's last validation below the target, over our first at it: the least that it can be
        least = min(after, 60 * row["minutes"])
        ratio = f"more than {least / soonest:.1f} x" if soonest and name in PEERS else ""
        used = " + ".join(f"{n} of {row['codes'][level]}" for level, n in row["codes_used"].items())
        clock = f" ({row['minutes']:g} min)" if name == "race" else ""
        lines.append(
            f"| {name}{clock} | {row['parameters'] / 1e6:.2f} M | {row['batch_size']} | {row['slices_per_s']:.3g} | "
            f"{row['peak_memory_mib']:.0f} | {row['bits_per_pixel']:.4g} | {used} | {time_to} | {ratio} |"
        )
    lines += [
        "",
        "| model | test set | slices (people) | SSIM, report | SSIM, standard | PSNR dB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for of, summary in row["test"].items():
            cells = (score_cell(summary[key], digits) for key, digits in SHOWN.items())
            lines.append(
                f"| {name} | {of} | {summary['slices']} ({summary['patients']}) | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


SHOWN = {"ssim_report": 4, "ssim_standard": 4, "psnr": 2}  # columns of the second table, and their decimals


def score_cell(score: dict, digits: int) -> str:
    interval = "" if score["low"] is None else f" [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"
    return f"{score['mean']:.{digits}f}{interval}"


def main() -> None:
    parser = runtime.parser(__doc__, DataConfig, PeersConfig)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="the rows to make")
    parser.add_argument("--table", action="store_true", help="print the table of --out and make no row")
    args = parser.parse_args()
    config, data = (runtime.from_flags(c, args) for c in (PeersConfig, DataConfig))
    if min(config.minutes, config.race) <= 0:
        parser.error("--minutes and --race: expected more than 0")
    if args.table and not read_rows(config.out):
        raise FileNotFoundError(f"{config.out}: no rows yet. Mend: run without --table.")
    if "monai" in args.only and not args.table and not importlib.util.find_spec("monai"):
        parser.error("MONAI is not installed. Mend: pip install monai, or --only without monai")
    if len(args.only) > 1 and not args.table:
        runtime.writable_folder(Path(config.out).parent)
        # a process each: a peak of memory is a process's
        codes = {
            name: subprocess.run([sys.executable, *sys.argv, "--only", name]).returncode for name in args.only
        }
        if failed := [name for name, code in codes.items() if code]:
            print(f"error: no row of {', '.join(failed)}: see above", file=sys.stderr)
            sys.exit(2)
        return
    if not args.table:
        runtime.writable_folder(Path(config.out).parent)
        merge_row(config.out, args.only[0], measure(args.only[0], config, data))
        print(f"wrote the row {args.only[0]} into {config.out}")
    print(tables(read_rows(config.out), config.target))


if __name__ == "__main__":
    runtime.run_cli(main)
