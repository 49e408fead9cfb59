"""Train the VQ-VAE-2 on a study's train split, validating after every epoch; then the priors over its codes.

    python train.py --data keras_slices_data                    # the report's hyperparameters
    python train.py --data keras_slices_data --preset best      # what we would use
    python train.py --resume Results/vqvae2_epoch_3.pth         # go on where that checkpoint stopped
    python train.py --stage prior --checkpoint Results/vqvae2_best.pth
    python train.py --weights Results/vqvae2_best.pth --preset fewer-bits --out Results/fewer-bits
    torchrun --nproc_per_node=8 train.py --data keras_slices_data   # one process for each of 8 GPUs

Writes to Results/ (or --out): train_losses.txt and val_losses.txt (one value an epoch), loss_plot.png,
log.jsonl (every term, times, versions), vqvae2_epoch_N.pth, vqvae2_best.pth (lowest validation loss) and
vqvae2_epoch_final.pth; the prior's names begin with prior_. Ctrl-C and SIGTERM save a checkpoint that
--resume continues.
"""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import metrics
import page
import runtime
from codes import extract_codes
from dataset import DataConfig, SliceDataset, open_study, open_trained_study
from loop import TrainConfig, fit, switched
from modules import VQVAE2, Output, VQVAE2Config, load_model
from prior import Prior, PriorConfig
from runtime import UserError, option

SIDES = ("height", "width")
# Each preset is what differs from the report's hyperparameters, the defaults; flags given beside it win. Steps
# of one slice learn more in the same time than steps of 16: the codebooks move with every step.
STEPS = {
    "batch_size": 1,
    "optimiser": "muon",
    "lr": 1.5e-3,
    "schedule": "cosine",
    "warmup": 0.03,
    "weight_decay": 0.01,
    "clip": 1.0,
}
RECIPE = STEPS | {"mse": 0.0, "l1": 0.2, "ssim": 1.0, "flip": True}
WIDER = {"channels": 96, "top_channels": 192, "residual_channels": 48}
PRIOR_RECIPE = STEPS | {"batch_size": 2, "lr": 2e-3, "weight_decay": 0.05, "patience": 5}
# in minutes: a top prior of many slices, which place the organs, and few of the bottom's, which give texture
LIGHT = {
    "batch_size": 4,
    "lr": 4e-3,
    "bottom_every": 4,
    "prior_channels": 96,
    "prior_top_layers": 2,
    "prior_bottom_layers": 1,
    "prior_dropout": 0.0,
}
PRESETS = {
    "autoencoder": {
        "report": {},
        "quick": RECIPE | {"minutes": 1.75, "lr": 3e-3},
        "best": RECIPE | WIDER | {"minutes": 30.0, "decoder_blocks": 4},
        # for --weights of `best`: codes that cost the priors fewer bits
        "fewer-bits": RECIPE | {"minutes": 10.0, "lr": 7e-4, "bit_weight": 0.03},
        # 0.391 and 0.195 bits per pixel in place of 0.703
        "medium-rate": RECIPE | {"epochs": 5, "K": 32},
        "low-rate": RECIPE | WIDER | {"epochs": 5, "K": 1024, "stride": 8},
    },
    "prior": {"quick": PRIOR_RECIPE | LIGHT | {"minutes": 2.0}, "best": PRIOR_RECIPE | {"minutes": 30.0}},
}


@dataclass(frozen=True)
class LossConfig:
    """What stage one minimises. The defaults are the report's: mean squared error, beta 0.25."""

    beta: float = option(0.25, "weight of the commitment terms")
    mse: float = option(1.0, "weight of the mean squared error in the reconstruction term")
    l1: float = option(0.0, "weight of the mean absolute error in the reconstruction term")
    ssim: float = option(0.0, "weight of 1 - SSIM in the reconstruction term")
    flip: bool = option(False, "mirror every second slice left-right, at random")

    def __post_init__(self) -> None:
        for name in ("beta", "mse", "l1", "ssim"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} is {getattr(self, name)}; expected 0 or more")
        if self.mse + self.l1 + self.ssim == 0:
            raise UserError("--mse, --l1 and --ssim are all 0; expected at least one reconstruction term")


# ---- stage one: the autoencoder ----


def losses(x: Tensor, output: Output, config: LossConfig) -> dict[str, Tensor]:
    """Every term of the loss as a scalar; `loss` is what is minimised, in the report's words

        loss = reconstruction + codebook + beta * commitment.

    The codebook term ||sg[z_e] - e||^2 has no entry: the EMA of `VectorQuantiser.update` minimises it (van
    den Oord et al. 2017, appendix A.1). Terms of weight 0 are reported all the same.
    """
    y = output.reconstruction
    terms = {
        "mse": F.mse_loss(y, x),
        "l1": F.l1_loss(y, x),
        "ssim": 1 - metrics.ssim(x, y).mean(),
        "commitment_top": output.top.commitment,
        "commitment_bottom": output.bottom.commitment,
    }
    reconstruction = config.mse * terms["mse"] + config.l1 * terms["l1"] + config.ssim * terms["ssim"]
    commitment = terms["commitment_top"] + terms["commitment_bottom"]
    return {"loss": reconstruction + config.beta * commitment, "reconstruction": reconstruction, **terms}


def flip_left_right(x: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror along axis H, the patient's left-right, the slices of x (B, 1, H, W) where (B,) is True."""
    return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(2), x)


def study_of(splits: dict[str, SliceDataset]) -> dict:
    """What a checkpoint says of the study it was trained on."""
    return {
        "study": str(splits["train"].study.resolve()),
        "fingerprints": {name: split.fingerprint for name, split in splits.items()},
        "synthetic": splits["train"].synthetic,
    }


class Autoencoder:
    """Stage one for the loop: z-scored slices, reconstructed; counts the codes of both levels."""

    kind = "vqvae2"
    names = ("loss", "reconstruction", "mse", "l1", "ssim", "commitment_top", "commitment_bottom")

    def __init__(
        self,
        data: DataConfig,
        model: VQVAE2Config,
        loss: LossConfig,
        config: TrainConfig,
        resumed: bool = False,
    ):
        device = runtime.pick_device(config.device)
        self.layout = torch.channels_last if switched(config.channels_last, True) else torch.contiguous_format
        self.data, self.loss = data, loss
        with runtime.one_first():
            self.splits = open_study(data)
        self.images = {name: self.splits[name].on(device) for name in ("train", "validate")}
        runtime.seed_everything(config.seed)
        self.model = VQVAE2(model)
        if config.weights and not resumed:
            start = load_model(runtime.load_checkpoint(config.weights, self.kind), config.weights)
            if replace(start.config, bit_weight=model.bit_weight) != model:
                raise UserError(
                    f"--weights {config.weights}: a network of {start.config}; expected {model}. Fix: give no flags "
                    "of the network."
                )
            self.model.load_state_dict(start.state_dict())
        self.model.to(device, memory_format=self.layout)
        self.device = device
        self.counted = self.no_codes()

    def no_codes(self) -> dict[str, Tensor]:
        zeros = torch.zeros(self.model.config.K, dtype=torch.int64, device=self.device)
        return {level: zeros.clone() for level in ("top", "bottom")}

    def draw(self, generator: torch.Generator) -> None:
        self.mirrored = (torch.rand(len(self.splits["train"]), generator=generator) < 0.5).to(self.device)

    def settings(self) -> dict:
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "loss_config": dataclasses.asdict(self.loss),
            "data": {
                "height": self.data.height,
                "width": self.data.width,
                "allow_patient_overlap": self.data.allow_patient_overlap,
                **study_of(self.splits),
            },
        }

    def terms(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        x = self.images[split](indices).to(memory_format=self.layout)
        if self.loss.flip and self.model.training:
            x = flip_left_right(x, self.mirrored[indices.to(self.device, non_blocking=True)])
        output = self.model(x)
        for level, counts in self.counted.items():
            codes = getattr(output, level).codes.flatten()
            counts.scatter_add_(0, codes, torch.ones_like(codes))  # bincount would wait for the device
        return losses(x, output, self.loss)

    def idle(self) -> None:
        for quantiser in (self.model.quantiser_top, self.model.quantiser_bottom):
            quantiser(torch.zeros(0, self.model.config.D, 1, 1, device=self.device))  # updates are common

    def statistics(self) -> dict[str, dict[str, float]]:
        """Codes used and perplexity 2^H of each level since the last call."""
        counted, self.counted = self.counted, self.no_codes()
        runtime.sum_over_ranks(*counted.values())
        return {
            level: {
                "used": int(counts.count_nonzero()),
                "perplexity": round(2 ** metrics.code_entropy(counts.cpu().numpy()), 2),
            }
            for level, counts in counted.items()
        }

    def describe(self, record: dict) -> str:
        used = record["codes"]["validate"]
        return (
            f"SSIM {1 - record['validate']['ssim']:.4f}, codes used {used['top']['used']} top "
            f"{used['bottom']['used']} bottom"
        )


def resume(stage, config: TrainConfig, checkpoint: dict | None) -> Path:
    """`fit`, with a note where the study has changed since the checkpoint was written."""
    if checkpoint and checkpoint["data"]["fingerprints"]["train"] != stage.splits["train"].fingerprint:
        print("note: the train split's slices are not those that the checkpoint was trained on")
    best = fit(stage, config, checkpoint)
    if runtime.rank() == 0:
        page.write(config.out)
    return best


def train_autoencoder(
    data: DataConfig,
    model: VQVAE2Config,
    loss: LossConfig,
    config: TrainConfig,
    checkpoint: dict | None = None,
) -> Path:
    """Stage one; returns the path of the best checkpoint. Raises as `open_study` and `loop.fit` do."""
    # errors now, not after the decoding or the training
    model.code_shapes(data.height, data.width)
    if min(data.height, data.width) < 16:
        raise UserError(
            f"slices of {data.height}x{data.width}: too small to score; expected at least 16 of each"
        )
    runtime.writable_folder(config.out)
    if checkpoint and (data.height, data.width) != (was := tuple(checkpoint["data"][side] for side in SIDES)):
        raise UserError(
            f"--resume: --height and --width are not the checkpoint's, {was}. Fix: leave them out."
        )
    stage = Autoencoder(data, model, loss, config, resumed=checkpoint is not None)
    return resume(stage, config, checkpoint)


# ---- stage two: the priors ----


@dataclass(frozen=True)
class CodesConfig:
    """Of which autoencoder stage two learns the codes, and how."""

    checkpoint: str = option("Results/vqvae2_best.pth", "the autoencoder, for --stage prior")
    forget: float = option(0.1, "share of training slices whose position is hidden from the prior")
    bottom_every: int = option(
        1, "the bottom prior, of four times the codes, learns from one slice of a batch in this many"
    )

    def __post_init__(self) -> None:
        if self.bottom_every < 1:
            raise UserError(f"--bottom-every is {self.bottom_every}; expected at least 1")
        if not 0 <= self.forget <= 1:
            raise UserError(f"--forget is {self.forget}; expected 0 to 1")


class CodePriors:
    """Stage two for the loop: the code maps of every slice, and of its mirror image, under one autoencoder."""

    kind = "prior"
    names = ("loss", "nats_top", "nats_bottom", "bits_per_pixel")
    counted: dict = {}  # noqa: RUF012

    def __init__(self, data: DataConfig, codes: CodesConfig, prior: PriorConfig, config: TrainConfig):
        self.device = runtime.pick_device(config.device)
        checkpoint = runtime.load_checkpoint(codes.checkpoint, "vqvae2")
        self.data, self.codes = checkpoint["data"], codes
        self.sha256 = runtime.sha256(codes.checkpoint)
        with runtime.one_first():
            self.splits = open_trained_study(self.data, data, codes.checkpoint)
        self.data |= study_of(self.splits)
        size = self.data["height"], self.data["width"]
        self.pixels = math.prod(size)
        model = load_model(checkpoint, codes.checkpoint).to(self.device)
        with runtime.one_first():
            maps = extract_codes(model, self.splits, self.sha256, Path(config.out) / "codes.npz")
        self.maps = {
            name: torch.from_numpy(codes.astype(np.int32)).to(self.device) for name, codes in maps.items()
        }
        self.positions = {
            name: torch.from_numpy(split.positions).to(self.device) for name, split in self.splits.items()
        }
        runtime.seed_everything(config.seed)
        self.top_shape = model.config.code_shapes(*size)[0]
        self.model = Prior(replace(prior, K=model.config.K), self.top_shape).to(self.device)
        self.model.start_from(model.quantiser_top.codebook, model.quantiser_bottom.codebook)

    def settings(self) -> dict:
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "codes_config": dataclasses.asdict(self.codes),
            "top_shape": list(self.top_shape),
            "autoencoder_sha256": self.sha256,
            "data": self.data,
        }

    def draw(self, generator: torch.Generator) -> None:
        shape = len(self.splits["train"])
        self.side = torch.randint(2, (shape,), generator=generator).to(self.device)  # 0 as it is, 1 mirrored
        self.forgotten = (torch.rand(shape, generator=generator) < self.codes.forget).to(self.device)

    def terms(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        at = indices.to(self.device, non_blocking=True)
        position, side, bottoms = self.positions[split][at], torch.zeros_like(at), len(at)
        if self.model.training:
            position, side = position.masked_fill(self.forgotten[at], math.nan), self.side[at]
            bottoms = math.ceil(bottoms / self.codes.bottom_every)
        top = self.maps[f"{split}_top"][side, at].long()
        bottom = self.maps[f"{split}_bottom"][side[:bottoms], at[:bottoms]].long()
        nats = self.model(top, bottom, position, side)
        means = {f"nats_{level}": of.mean() for level, of in nats.items()}
        of_top, of_bottom = (of[0].numel() for of in nats.values())  # codes
        total = of_top * means["nats_top"] + of_bottom * means["nats_bottom"]  # of a slice
        bits_per_pixel = total / (math.log(2) * self.pixels)
        return {"loss": total / (of_top + of_bottom), **means, "bits_per_pixel": bits_per_pixel}

    def idle(self) -> None:
        pass

    def statistics(self) -> dict:
        return {}

    def describe(self, record: dict) -> str:
        bits = {name: record["validate"][f"nats_{name}"] / math.log(2) for name in ("top", "bottom")}
        return (
            f"{bits['top']:.2f} bits a top code, {bits['bottom']:.2f} a bottom code, "
            f"{record['validate']['bits_per_pixel']:.4f} a pixel"
        )


def train_prior(
    data: DataConfig,
    codes: CodesConfig,
    prior: PriorConfig,
    config: TrainConfig,
    checkpoint: dict | None = None,
) -> Path:
    """Stage two, on the codes of a trained autoencoder; returns the path of the best checkpoint."""
    if config.weights:
        raise UserError("--weights: for the autoencoder alone. Fix: leave it out.")
    if config.batch_size % codes.bottom_every:
        raise UserError(
            f"--bottom-every is {codes.bottom_every}, --batch-size {config.batch_size}: expected a multiple of it"
        )
    runtime.writable_folder(config.out)
    stage = CodePriors(data, codes, prior, config)
    if checkpoint and checkpoint["autoencoder_sha256"] != stage.sha256:
        raise UserError(
            f"--resume: the prior of another autoencoder than {codes.checkpoint}. Fix: --checkpoint, or train anew."
        )
    return resume(stage, config, checkpoint)


# ---- the command line ----


def flags(doc: str) -> argparse.ArgumentParser:
    """The flags of a script that trains, for the first stage where it adds no --stage."""
    parser = runtime.parser(doc, DataConfig, VQVAE2Config, LossConfig, CodesConfig, PriorConfig, TrainConfig)
    parser.set_defaults(stage="autoencoder")
    names = list(dict.fromkeys(name for presets in PRESETS.values() for name in presets))
    parser.add_argument("--preset", choices=names, help="settings to start from; other flags win over them")
    parser.add_argument("--resume", metavar="FILE", help="go on from this checkpoint, with its settings")
    return parser


def data_flags(checkpoint: dict) -> dict:
    """The flags that open the study of a checkpoint as its training did."""
    data = checkpoint["data"]
    return {"data": data["study"], **{name: data[name] for name in (*SIDES, "allow_patient_overlap")}}


def parse(parser: argparse.ArgumentParser, preset: str = "") -> tuple[argparse.Namespace, dict | None]:
    """The command line: flags over the settings of a preset or of the checkpoint, and that checkpoint.

    Without --preset: `preset`, or the first of the stage.
    """
    args = parser.parse_args()
    presets = PRESETS[args.stage]
    if args.resume and args.preset:
        raise UserError(
            "--resume and --preset: a resumed run has its checkpoint's settings. Fix: leave one out."
        )
    checkpoint = None
    if args.resume:
        checkpoint = runtime.load_checkpoint(args.resume, Autoencoder.kind, CodePriors.kind)
        for name in ("model_config", "loss_config", "codes_config", "train_config"):
            parser.set_defaults(**checkpoint.get(name, {}))
        parser.set_defaults(out=str(Path(args.resume).parent), **data_flags(checkpoint))
    elif args.preset and args.preset not in presets:
        raise UserError(f"--preset {args.preset}: of --stage {args.stage} there are {', '.join(presets)}")
    else:
        settings = presets.get(args.preset or preset, next(iter(presets.values())))
        if args.weights:
            start = runtime.load_checkpoint(args.weights, Autoencoder.kind)
            settings = start["model_config"] | data_flags(start) | settings
        parser.set_defaults(**settings)
    args = parser.parse_args()
    given = {word.split("=")[0] for word in sys.argv[1:]}
    if "--epochs" in given and "--minutes" not in given:
        args.minutes = 0.0  # --epochs wins over the minutes of a preset or of the checkpoint
    return args, checkpoint


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--stage", choices=PRESETS, default="autoencoder", help="what to train")
    args, checkpoint = parse(parser)
    data, model, loss, codes, prior, config = (
        runtime.from_flags(c, args)
        for c in (DataConfig, VQVAE2Config, LossConfig, CodesConfig, PriorConfig, TrainConfig)
    )
    with runtime.ranks(config.device):
        if (checkpoint["kind"] if checkpoint else args.stage) == "prior":
            train_prior(data, codes, prior, config, checkpoint)
        else:
            train_autoencoder(data, model, loss, config, checkpoint)


if __name__ == "__main__":
    runtime.run_cli(main)
