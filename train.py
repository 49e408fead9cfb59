"""Train the VQ-VAE-2 on a study's train split; validate on its validate split after every epoch.

    python train.py --data keras_slices_data                    # the report's hyperparameters
    python train.py --data keras_slices_data --preset best      # what we would use
    python train.py --resume Results/vqvae2_epoch_3.pth         # go on where that checkpoint stopped

Writes to Results/ (or --out): train_losses.txt and val_losses.txt (one value an epoch), loss_plot.png,
log.jsonl (every term, times, versions), vqvae2_epoch_N.pth, vqvae2_best.pth (lowest validation loss) and
vqvae2_epoch_final.pth. Ctrl-C and SIGTERM save vqvae2_interrupted.pth, which --resume continues.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import figures
import runtime
from dataset import DataConfig, SliceDataset, open_study
from modules import VQVAE2, Output, VQVAE2Config, ssim
from runtime import option

SWITCH = ("auto", "on", "off")
SIDES = ("height", "width")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the report's hyperparameters."""

    out: str = option("Results", "folder for checkpoints, logs and plots")
    epochs: int = option(10, "passes over the train split")
    minutes: float = option(0.0, "train for this much wall time instead of --epochs; 0 means by epochs")
    batch_size: int = option(16, "slices in a step")
    lr: float = option(3e-4, "learning rate, at its highest")
    schedule: str = option("constant", "learning rate over the run", choices=("constant", "cosine"))
    warmup: float = option(0.0, "share of the run in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay; 0 is Adam")
    clip: float = option(0.0, "largest norm of the gradient; 0 means unclipped")
    beta: float = option(0.25, "weight of the commitment terms")
    mse: float = option(1.0, "weight of the mean squared error in the reconstruction term")
    l1: float = option(0.0, "weight of the mean absolute error in the reconstruction term")
    ssim: float = option(0.0, "weight of 1 - SSIM in the reconstruction term")
    flip: bool = option(False, "mirror every second slice left-right, at random")
    seed: int = option(0, "of weights, order and augmentation")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    bf16: str = option("auto", "bfloat16 autocast; auto: where the hardware has it", choices=SWITCH)
    channels_last: str = option("auto", "memory layout NHWC; auto: on", choices=SWITCH)
    compile: str = option("auto", "torch.compile; auto: off, its warm-up costs minutes", choices=SWITCH)
    save_every: int = option(1, "epochs between checkpoints vqvae2_epoch_N.pth")
    keep: int = option(3, "how many of those to keep; 0 keeps all")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        for name in ("minutes", "warmup", "weight_decay", "clip", "beta", "mse", "l1", "ssim", "keep"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected 0 or more")
        if self.mse + self.l1 + self.ssim == 0:
            raise ValueError("--mse, --l1 and --ssim are all 0; expected at least one reconstruction term")


# Each preset is what differs from the report's hyperparameters above; flags given beside it win. Steps of one
# slice learn more in the same time than steps of 16: the codebooks move with every step.
RECIPE = {
    "batch_size": 1,
    "lr": 1.5e-3,
    "schedule": "cosine",
    "warmup": 0.03,
    "weight_decay": 0.01,
    "clip": 1.0,
    "mse": 0.0,
    "l1": 0.2,
    "ssim": 1.0,
    "flip": True,
}
PRESETS = {"report": {}, "quick": RECIPE | {"minutes": 1.75}, "best": RECIPE | {"minutes": 40.0}}


# ---- one step ------------------------------------------------------------------------------------


def losses(x: Tensor, output: Output, config: TrainConfig) -> dict[str, Tensor]:
    """Every term of the loss as a scalar; `loss` is what is minimised, in the report's words

        loss = reconstruction + codebook + beta * commitment.

    The codebook term ||sg[z_e] - e||^2 has no entry: the EMA of `VectorQuantiser.update` minimises it (van
    den Oord et al. 2017, appendix A.1). Terms of weight 0 are reported all the same.
    """
    y = output.reconstruction
    terms = {
        "mse": F.mse_loss(y, x),
        "l1": F.l1_loss(y, x),
        "ssim": 1 - ssim(x, y).mean(),
        "commitment_top": output.top.commitment,
        "commitment_bottom": output.bottom.commitment,
    }
    reconstruction = config.mse * terms["mse"] + config.l1 * terms["l1"] + config.ssim * terms["ssim"]
    commitment = terms["commitment_top"] + terms["commitment_bottom"]
    return {"loss": reconstruction + config.beta * commitment, "reconstruction": reconstruction, **terms}


def learning_rate(config: TrainConfig, progress: float) -> float:
    """The learning rate at the share `progress` in [0, 1] of the run: linear warm-up, then the schedule."""
    rise = min(1.0, progress / config.warmup) if config.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) if config.schedule == "cosine" else 1.0
    return config.lr * rise * fall


def flip_left_right(x: Tensor) -> Tensor:
    """Mirror each slice of (B, 1, H, W) along axis H, the patient's left-right, with probability 1/2."""
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(mirrored, x.flip(2), x)


def switched(flag: str, default: bool) -> bool:
    return default if flag == "auto" else flag == "on"


class Run:
    """A training run: all that a checkpoint holds, and the steps that change it.

    `epoch` and `batch` count what is done; the order of an epoch's slices depends on the seed and the epoch
    alone, so a run goes on in the middle of an epoch. `history` is log.jsonl, a dictionary a line.
    """

    def __init__(self, data: DataConfig, model: VQVAE2Config, config: TrainConfig, checkpoint: dict | None):
        model.code_shapes(data.height, data.width)  # ValueError now, not after the decoding
        self.config, self.data = config, data
        self.out = Path(config.out)
        self.device = runtime.pick_device(config.device)
        self.bf16 = switched(config.bf16, runtime.has_fast_bf16(self.device))
        self.layout = torch.channels_last if switched(config.channels_last, True) else torch.contiguous_format
        runtime.seed_everything(config.seed)
        self.splits = open_study(data)
        self.model = VQVAE2(model).to(self.device, memory_format=self.layout)
        if switched(config.compile, False):
            self.model.compile()
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.epoch = self.batch = self.step = 0
        self.best = math.inf
        self.seconds = 0.0  # spent before `began`
        self.history: list[dict] = []
        self.start_epoch()
        if checkpoint:
            self.restore(checkpoint)
        self.began = time.monotonic()
        settings = {"data": dataclasses.asdict(data), "model": dataclasses.asdict(model)}
        settings["train"] = dataclasses.asdict(config)
        self.history.append(
            {"run": runtime.provenance(), "device": str(self.device), "bf16": self.bf16} | settings
        )

    # what a checkpoint holds

    def state(self) -> dict:
        study = self.splits["train"].study
        return {
            "kind": "vqvae2",
            "model_config": dataclasses.asdict(self.model.config),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "train_config": dataclasses.asdict(self.config),
            "data": {
                "study": str(study.resolve()),
                "height": self.data.height,
                "width": self.data.width,
                "fingerprints": {name: split.fingerprint for name, split in self.splits.items()},
                "synthetic": self.splits["train"].synthetic,
            },
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "best": self.best,
            "seconds": self.elapsed(),
            "epoch_seconds": self.epoch_seconds,
            "sums": self.sums,
            "usage": self.usage,
            "history": self.history,
            "rng": runtime.rng_state(),
        }

    def restore(self, checkpoint: dict) -> None:
        if checkpoint["model_config"] != dataclasses.asdict(self.model.config):
            raise ValueError(
                "--resume: the network's shape comes from the checkpoint. Mend: leave out its flags."
            )
        size, was = (self.data.height, self.data.width), tuple(checkpoint["data"][side] for side in SIDES)
        if size != was:
            raise ValueError(f"--resume: slices of {size}; the checkpoint's are {was}. Mend: leave it out.")
        if checkpoint["data"]["fingerprints"]["train"] != self.splits["train"].fingerprint:
            print("note: the train split's files are not those that the checkpoint was trained on")
        self.model.load_state_dict(checkpoint["model"])
        self.optimiser.load_state_dict(checkpoint["optimiser"])
        for name in (
            "epoch",
            "batch",
            "step",
            "best",
            "seconds",
            "epoch_seconds",
            "sums",
            "usage",
            "history",
        ):
            setattr(self, name, checkpoint[name])
        runtime.set_rng_state(checkpoint["rng"])

    def save(self, name: str) -> Path:
        runtime.save_checkpoint(self.out / name, self.state())
        return self.out / name

    # where the run stands

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def progress(self) -> float:
        """The share of the run that is done, by wall time or by steps."""
        if self.config.minutes:
            return self.elapsed() / (60 * self.config.minutes)
        batches = math.ceil(len(self.splits["train"]) / self.config.batch_size)
        return (self.epoch * batches + self.batch) / (self.config.epochs * batches)

    def start_epoch(self) -> None:
        self.batch = 0
        self.epoch_seconds = 0.0
        self.sums: dict[str, float] = {}
        self.usage = {
            level: torch.zeros(self.model.config.K, dtype=torch.int64) for level in ("top", "bottom")
        }

    def load(self, split: SliceDataset, indices: Tensor) -> Tensor:
        x = split.images(indices)
        return x.to(self.device, memory_format=self.layout, non_blocking=True)

    def tally(self, x: Tensor, output: Output, terms: dict[str, Tensor], sums: dict, usage: dict) -> float:
        """Add a batch to an epoch's exact sums and code counts; returns its loss. One wait for the device."""
        values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
        for name, value in zip(terms, values, strict=True):
            sums[name] = sums.get(name, 0.0) + value * len(x)
        for level in usage:
            codes = getattr(output, level).codes
            usage[level] += torch.bincount(codes.flatten(), minlength=self.model.config.K).cpu()
        return values[0]

    # training and validation

    def train_step(self, indices: Tensor) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.progress())
        x = self.load(self.splits["train"], indices)
        if self.config.flip:
            x = flip_left_right(x)
        with runtime.autocast(self.device, self.bf16):
            output = self.model(x)
        terms = losses(x, output, self.config)
        loss = self.tally(x, output, terms, self.sums, self.usage)
        if not math.isfinite(loss):
            raise ValueError(self.lost(indices, loss))
        self.optimiser.zero_grad()
        terms["loss"].backward()
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimiser.step()
        return loss

    def lost(self, indices: Tensor, loss: float) -> str:
        files = ", ".join(self.splits["train"].paths[i].name for i in indices.tolist())
        saved = sorted(self.out.glob("vqvae2_*.pth"), key=lambda path: path.stat().st_mtime)
        return (
            f"the loss is {loss} at epoch {self.epoch + 1}, step {self.step + 1}, on {files}. Last good "
            f"checkpoint: {saved[-1] if saved else 'none'}. Mend: a lower --lr, or --clip 1."
        )

    def train_epoch(self, bar: tqdm, stopped: list[int]) -> None:
        """Train to the end of the epoch, of the minutes, or until `stopped` is not empty."""
        train, size = self.splits["train"], self.config.batch_size
        order = torch.randperm(
            len(train), generator=torch.Generator().manual_seed(1_000_003 * self.config.seed + self.epoch)
        )
        self.model.train()
        began = time.monotonic() - self.epoch_seconds
        for indices in order.split(size)[self.batch :]:
            loss = self.train_step(indices)
            self.batch += 1
            self.step += 1
            self.epoch_seconds = time.monotonic() - began
            bar.set_postfix(epoch=self.epoch + 1, loss=f"{loss:.4f}", refresh=False)
            if (
                self.config.minutes
            ):  # how many slices fit is not known before; the bar's ETA follows from this
                bar.total = round((bar.n + len(indices)) / min(self.progress(), 1.0))
            bar.update(len(indices))
            if stopped or (self.config.minutes and self.progress() >= 1):
                return

    @torch.inference_mode()
    def validate(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Exact means of every term over the validate split, and its code counts."""
        split, sums = self.splits["validate"], {}
        usage = {level: torch.zeros_like(counts) for level, counts in self.usage.items()}
        self.model.eval()
        for indices in torch.arange(len(split)).split(self.config.batch_size):
            x = self.load(split, indices)
            with runtime.autocast(self.device, self.bf16):
                output = self.model(x)
            self.tally(x, output, losses(x, output, self.config), sums, usage)
        return {name: total / len(split) for name, total in sums.items()}, usage

    def end_epoch(self) -> None:
        """Validate, log, and save what is due."""
        seen = min(self.batch * self.config.batch_size, len(self.splits["train"]))
        terms = {"train": {name: total / seen for name, total in self.sums.items()}}
        terms["validate"], validate_usage = self.validate()
        self.epoch += 1
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": terms["train"]["loss"],
            "val_loss": terms["validate"]["loss"],
            "slices_per_s": round(seen / self.epoch_seconds, 2),
            "seconds": round(self.elapsed(), 1),
            "lr": self.optimiser.param_groups[0]["lr"],
            **terms,
            "codes": {"train": code_statistics(self.usage), "validate": code_statistics(validate_usage)},
        }
        self.history.append(record)
        slow = self.epoch_seconds > 10
        self.start_epoch()  # before anything is saved: a resumed run begins with the next epoch
        used = record["codes"]["validate"]
        tqdm.write(
            f"epoch {self.epoch}: train {record['train_loss']:.4f}, validate {record['val_loss']:.4f} "
            f"(1 - SSIM {terms['validate']['ssim']:.4f}), codes used {used['top']['used']} top "
            f"{used['bottom']['used']} bottom, {record['slices_per_s']:.1f} slices/s"
        )
        better = record["val_loss"] < self.best
        self.best = min(self.best, record["val_loss"])
        if better:
            self.save("vqvae2_best.pth")
        if self.epoch % self.config.save_every == 0:
            self.save(f"vqvae2_epoch_{self.epoch}.pth")
            if self.config.keep:
                old = self.epoch - self.config.keep * self.config.save_every
                (self.out / f"vqvae2_epoch_{old}.pth").unlink(missing_ok=True)
        self.write_logs()
        if slow:  # of a short epoch the plot would take a good part
            self.plot()

    def write_logs(self) -> None:
        """log.jsonl and the losses, all from `history`: a resumed run's files are those of one run."""
        for name, values in self.curves().items():
            runtime.write_text(self.out / f"{name}_losses.txt", "".join(f"{value:.6f}\n" for value in values))
        runtime.write_text(self.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def curves(self) -> dict[str, list[float]]:
        epochs = [record for record in self.history if "epoch" in record]
        return {name: [record[f"{name}_loss"] for record in epochs] for name in ("train", "val")}

    def plot(self) -> None:
        figures.loss_plot(self.out / "loss_plot.png", *self.curves().values())


def code_statistics(usage: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Codes used and perplexity exp(H) of each level's code counts (K,)."""
    statistics = {}
    for level, counts in usage.items():
        p = counts[counts > 0].double() / counts.sum()
        statistics[level] = {"used": len(p), "perplexity": round(torch.exp(-(p * p.log()).sum()).item(), 2)}
    return statistics


def train(data: DataConfig, model: VQVAE2Config, config: TrainConfig, checkpoint: dict | None = None) -> Path:
    """Train, from `checkpoint` where one is given; returns the path of the best checkpoint.

    Raises:
        ValueError, OSError: bad data, settings or checkpoint; a loss that is not finite; a full disk.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with vqvae2_interrupted.pth written.
    """
    runtime.writable_folder(config.out)
    run = Run(data, model, config, checkpoint)
    slices = len(run.splits["train"])
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    length = f"{config.minutes:g} minutes" if config.minutes else f"{config.epochs} epochs"
    precision = "bfloat16" if run.bf16 else "float32"
    print(f"training {millions:.2f} M parameters on {run.device} in {precision}, {slices} slices, {length}")
    done = run.epoch * slices + min(run.batch * config.batch_size, slices)
    bar = tqdm(
        total=None if config.minutes else config.epochs * slices,
        initial=done,
        unit="slice",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with runtime.stop_signals() as stopped, bar:
        while not stopped and (run.progress() < 1 or run.batch):
            run.train_epoch(bar, stopped)
            if not stopped:
                run.end_epoch()
    run.plot()
    if stopped:
        path = run.save("vqvae2_interrupted.pth")
        print(f"stopped in epoch {run.epoch + 1}; go on with: python train.py --resume {path}")
        raise KeyboardInterrupt
    run.save("vqvae2_epoch_final.pth")
    print(
        f"wrote {run.out}/: vqvae2_best.pth, vqvae2_epoch_final.pth, log.jsonl, loss_plot.png, *_losses.txt"
    )
    return run.out / "vqvae2_best.pth"


def flags(doc: str) -> argparse.ArgumentParser:
    """The flags of a script that trains."""
    parser = runtime.parser(doc, DataConfig, VQVAE2Config, TrainConfig)
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from; other flags win over them")
    parser.add_argument("--resume", metavar="FILE", help="go on from this checkpoint, with its settings")
    return parser


def parse(parser: argparse.ArgumentParser, preset: str = "report") -> tuple[argparse.Namespace, dict | None]:
    """The command line: flags over the settings of `preset` or of the checkpoint, and that checkpoint."""
    args = parser.parse_args()
    checkpoint = None
    if args.resume:
        checkpoint = runtime.load_checkpoint(args.resume, "vqvae2")
        data = {name: checkpoint["data"][name] for name in SIDES}
        parser.set_defaults(**checkpoint["model_config"], **checkpoint["train_config"], **data)
        parser.set_defaults(data=checkpoint["data"]["study"], out=str(Path(args.resume).parent))
    else:
        parser.set_defaults(**PRESETS[args.preset or preset])
    return parser.parse_args(), checkpoint


def main() -> None:
    args, checkpoint = parse(flags(__doc__))
    configs = (runtime.from_flags(config, args) for config in (DataConfig, VQVAE2Config, TrainConfig))
    train(*configs, checkpoint)


if __name__ == "__main__":
    runtime.run_cli(main)
