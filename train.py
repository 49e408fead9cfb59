"""Train the VQ-VAE-2 on a study's train split, validating after every epoch.

    python train.py --data keras_slices_data                   # the report's hyperparameters
    python train.py --data keras_slices_data --preset best     # what we would use
    python train.py --resume Results/vqvae2_interrupted.pth    # go on where Ctrl-C stopped it
    python train.py --weights Results/vqvae2_best.pth --preset fewer-bits --out Results/fewer-bits
    torchrun --nproc_per_node=8 train.py --data keras_slices_data  # a process for each of 8 GPUs

Writes to Results/ (or --out): train_losses.txt and val_losses.txt (one value an epoch),
loss_plot.png, log.jsonl (every loss, times, versions), vqvae2_epoch_N.pth, vqvae2_best.pth (the
lowest reconstruction loss in validation; with a --bit-weight the lowest loss, which counts bits)
and vqvae2_epoch_final.pth. Ctrl-C and SIGTERM save a checkpoint that --resume continues.
train_prior.py then trains the priors, from which generate.py samples new slices.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import dataset
from dataset import NO_MASK, DataConfig, StudyInfo
from modules import VQVAE2, Output, VQVAE2Config, load_model
from new_slices.layouts import middles
from new_slices.organs import LOWEST_DICE, likeliest, mask_losses
from support import metrics, runtime
from support.runtime import UserError, check_number, option
from support.trainer import Stage, TrainConfig, fit, other_lengths, settings_to_resume

# How both stages are trained in every preset but `report`. Of equally many slices, steps of one
# slice learn more than steps of 16: the codebooks move with every step.
SHARED_RECIPE = {
    "batch_size": 1,
    "optimiser": "muon",
    "lr": 1.5e-3,
    "schedule": "cosine",
    "warmup": 0.03,
    "weight_decay": 0.01,
    "clip": 1.0,
}
RECIPE = SHARED_RECIPE | {"mse": 0.0, "l1": 0.2, "ssim": 1.0, "flip": True}
WIDER = {"channels": 96, "top_channels": 192, "residual_channels": 48}
BEST = RECIPE | WIDER | {"slices": 22_000, "decoder_blocks": 4}
# A preset is what differs from the defaults, which are the report's hyperparameters. Flags given
# beside it win.
PRESETS = {
    "report": {},
    "quick": RECIPE | {"slices": 2_000, "lr": 3e-3},
    "best": BEST,
    # For files: more codes, whose bits have a price, give a better picture in as many bytes. New
    # slices of such codes have less texture (Results/trials.md).
    "for-files": BEST | {"K": 2048, "mse": 2.0, "bit_weight": 0.01, "price_rise": 10_000},
    # With --weights of `best`: codes that the priors store in fewer bits.
    "fewer-bits": RECIPE | {"slices": 7_400, "lr": 7e-4, "bit_weight": 0.03},
    # 0.391 and 0.195 bits per pixel instead of 0.703.
    "medium-rate": RECIPE | {"epochs": 5, "K": 32},
    "low-rate": RECIPE | WIDER | {"epochs": 5, "K": 1024, "stride": 8},
}


@dataclass(frozen=True)
class LossConfig:
    """What is minimised. The defaults are the report's: mean squared error, beta 0.25."""

    beta: float = option(0.25, "weight of the commitment terms")
    mse: float = option(1.0, "weight of the mean squared error in the reconstruction term")
    l1: float = option(0.0, "weight of the mean absolute error in the reconstruction term")
    ssim: float = option(0.0, "weight of 1 - SSIM in the reconstruction term")
    mask_weight: float = option(0.02, "weight of masks' losses; it follows the learning rate")
    flip: bool = option(False, "mirror half of all slices at random, with left and right labels")

    def __post_init__(self) -> None:
        for name in ("beta", "mse", "l1", "ssim", "mask_weight"):
            check_number(name, getattr(self, name), least=0)
        if self.mse + self.l1 + self.ssim == 0:
            raise UserError("--mse, --l1 and --ssim are all 0; expected at least one above 0")


@dataclass(frozen=True)
class StartConfig:
    """Where to start."""

    preset: str = option("report", "settings to start from; flags win", choices=tuple(PRESETS))
    resume: str = option("", "go on from this checkpoint, with its settings")
    weights: str = option("", "begin with the weights of this autoencoder, and its study")


CONFIGS = {"data": DataConfig, "train": TrainConfig, "model": VQVAE2Config, "loss": LossConfig}
EVERYDAY = ("data", "preset", "slices", "out", "resume")


@dataclass(frozen=True)
class Settings:
    """Everything that a run is told; `make_settings` makes it from the flags of a command line."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: VQVAE2Config = field(default_factory=VQVAE2Config)
    loss: LossConfig = field(default_factory=LossConfig)
    weights: str = ""
    checkpoint: dict | None = None  # to go on from


def make_settings(given: dict) -> Settings:
    """The settings for the flags `given`, fields of `StartConfig` and of `CONFIGS`.

    Flags win over the settings of the checkpoint to resume; or else over those of the preset, which
    win over the network and the study of --weights. UserError for a flag that --resume forbids.
    """
    preset, resume, weights = (given.get(name, "") for name in ("preset", "resume", "weights"))
    start, checkpoint = PRESETS[preset or "report"], None
    if resume:
        saved = {name: CONFIGS[name] for name in ("train", "model", "loss")}
        checkpoint, start = settings_to_resume(given, Autoencoder.kind, saved)
        start |= study_flags(StudyInfo.from_checkpoint(checkpoint, resume), resume, given)
    elif weights:
        trained = load_model(weights)
        start = vars(trained.model.config) | study_flags(trained.study, weights, given) | start
    values = start | other_lengths(given) | given
    configs = {name: runtime.fill(config, values) for name, config in CONFIGS.items()}
    return Settings(**configs, weights=weights, checkpoint=checkpoint)


def study_flags(study: StudyInfo, path: str, given: dict) -> dict:
    """The flags that open a checkpoint's study as its training did, or the one that is `given`."""
    data = given.get("data") or dataset.find_trained_study(study, path, given.get("cache", ""))
    return {"data": data, **{name: getattr(study, name) for name in dataset.CHECKPOINT_FIELDS}}


def losses(
    x: Tensor,
    output: Output,
    config: LossConfig,
    masks: Tensor | None = None,
    fall: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """Every loss of a batch as a scalar; "loss" is minimised, in the report's words

        loss = reconstruction + codebook + beta * commitment
               [+ fall * mask_weight * (cross-entropy + Dice loss + both of the coarse mask)]
               [+ bit_weight * bits of a code, their mean, which has no gradient].

    The codebook term ||sg[z_e] - e||^2 has no entry: the moving averages of
    `VectorQuantiser.update` minimise it (van den Oord et al. 2017, appendix A.1). A loss has
    the name of its weight, so "ssim" is 1 - SSIM; those of weight 0 are reported as well. In
    training the weight of masks follows the learning rate, whose share of --lr is `fall`: masks
    shape the codes while these move far, and cost little detail in the end. In validation it does
    not, so that epochs compare; there "loss" ends higher than in training.
    """
    y = output.reconstruction
    terms = {
        "mse": F.mse_loss(y, x),
        "l1": F.l1_loss(y, x),
        "ssim": 1 - metrics.ssim(x, y).mean(),
        "commitment_top": output.top.commitment,
        "commitment_bottom": output.bottom.commitment,
    }
    reconstruction = config.mse * terms["mse"] + config.l1 * terms["l1"]
    reconstruction = reconstruction + config.ssim * terms["ssim"]
    loss = reconstruction + config.beta * (terms["commitment_top"] + terms["commitment_bottom"])
    loss = loss + torch.cat([level.price.flatten() for level in (output.top, output.bottom)]).mean()
    if masks is not None:
        of_masks, coarse = mask_losses(output.mask_logits, masks), output.coarse_mask_logits
        of_coarse = mask_losses(coarse, middles(masks, coarse.shape[2:]))
        of_masks["coarse_mask_loss"] = sum(of_coarse.values())
        loss = loss + fall * config.mask_weight * sum(of_masks.values())
        terms |= of_masks
    return {"loss": loss, "reconstruction": reconstruction, **terms}


class Autoencoder(Stage):
    """Stage one: reconstructs z-scored slices, and counts the codes of both levels."""

    kind = "vqvae2"
    loss_names = ("loss", "reconstruction", "mse", "l1", "ssim")
    loss_names += ("commitment_top", "commitment_bottom")

    def __init__(self, settings: Settings) -> None:
        self.data, self.loss, config = settings.data, settings.loss, settings.train
        self.command = {"script": "train.py", "cache": self.data.cache}
        self.device = runtime.pick_device(config.device)
        with runtime.first_of_node():
            self.splits = dataset.open_study(self.data)
        size = self.splits["train"].pixels.shape[1:]
        settings.model.code_shapes(*size)  # a UserError for a grid that the network cannot halve
        for split in self.splits.values():
            small = split.shapes.min(1) < metrics.SMALLEST
            if small.any():
                found = f"{split.paths[small.argmax()]}: {split.shapes[small.argmax()]} pixels"
                least = f"sides of {metrics.SMALLEST} at least, the window of SSIM"
                raise UserError(f"{found}; expected {least}. Fix: leave such slices out.")
        if min(size) < metrics.SMALLEST:
            grid = f"--height and --width: a grid of {size[0]}x{size[1]}"
            raise UserError(f"{grid}; expected {metrics.SMALLEST} at least, the window of SSIM")
        train = self.splits["train"]
        if labels := train.labels:
            self.loss_names += ("mask_cross_entropy", "mask_dice_loss", "coarse_mask_loss")
        # To find out which labels have a side takes a look at a thousand masks: only if it matters.
        if self.loss.flip and train.mirror.note:
            print(f"{train.study}: {train.mirror.note}")
        # What is reported; the commitment rises while the codebook learns to be used. Where bits
        # have a price, the loss counts them: reconstructions become worse as bits are saved.
        self.best_by = "loss" if settings.model.bit_weight else "reconstruction"
        torch.manual_seed(config.seed)
        self.model = VQVAE2(replace(settings.model, labels=len(labels)))
        if settings.weights:
            self.start_from(settings.weights)
        # Channels last in memory: convolutions are faster so, on CPUs and GPUs.
        self.model.to(self.device, memory_format=torch.channels_last)
        zeros = torch.zeros(self.model.config.K, dtype=torch.int64, device=self.device)
        # How often each code was used, and of each class the pixels of decoded masks, of true ones
        # and of both.
        self.counts = {level: zeros.clone() for level in ("top", "bottom")}
        if labels:
            self.counts["masks"] = zeros.new_zeros(3, len(labels))

    def start_from(self, path: str) -> None:
        """Take the weights and codebooks of another autoencoder, of any --bit-weight."""
        trained, model = load_model(path), self.model.config
        start = trained.model
        dataset.check_labels(self.splits["train"], trained.study, path)
        if start.config.labels != model.labels:
            found = f"--weights {path}: it learnt masks of {start.config.labels} labels"
            expected = f"expected {model.labels}, as in {self.splits['train'].study}"
            raise UserError(f"{found}; {expected}. Fix: start without --weights.")
        if replace(start.config, bit_weight=model.bit_weight) != model:
            found = f"--weights {path}: a network of {start.config}; expected {model}"
            raise UserError(f"{found}. Fix: use that model's preset, without flags of the network.")
        self.model.load_state_dict(start.state_dict())

    def settings(self) -> dict:
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "loss_config": dataclasses.asdict(self.loss),
            "data": dataclasses.asdict(StudyInfo.from_splits(self.splits)),
        }

    def start_epoch(self, generator: torch.Generator) -> None:
        self.mirrored = torch.rand(len(self.splits["train"]), generator=generator) < 0.5

    def batch_losses(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        x = runtime.to_device(self.splits[split].images(indices), self.device)
        x = x.to(memory_format=torch.channels_last)
        masks = None
        if self.model.config.labels:
            masks = runtime.to_device(self.splits[split].masks(indices), self.device)
        if self.loss.flip and self.model.training:
            mirror = self.splits["train"].mirror
            mirrored = runtime.to_device(self.mirrored[indices], self.device)
            x = mirror.images(x, mirrored)
            masks = masks if masks is None else mirror.masks(masks, mirrored)
        return self.losses_of(x, masks)

    def losses_of(self, x: Tensor, masks: Tensor | None) -> dict[str, Tensor]:
        """The losses of a batch; `compile` compiles this."""
        output = self.model(x)
        for level in ("top", "bottom"):
            codes = getattr(output, level).codes.flatten()
            # Not bincount, which would wait for the device.
            self.counts[level].scatter_add_(0, codes, torch.ones_like(codes))
        if masks is not None and not self.model.training:
            self.count_masks(likeliest(output.mask_logits), masks)
        return losses(x, output, self.loss, masks, self.fall if self.model.training else 1.0)

    def count_masks(self, decoded: Tensor, masks: Tensor) -> None:
        """Count the pixels of each class in masks (B, H, W), where the true one is known."""
        known = masks != NO_MASK
        for k in range(self.model.config.labels):
            one, other = (decoded == k) & known, masks == k
            self.counts["masks"][:, k] += torch.stack([x.sum() for x in (one, other, one & other)])

    def compile(self) -> None:
        self.losses_of = torch.compile(self.losses_of)

    def empty_batch(self) -> None:
        nothing = torch.zeros(0, self.model.config.D, 1, 1, device=self.device)
        for quantiser in (self.model.quantiser_top, self.model.quantiser_bottom):
            quantiser(nothing)  # all ranks take part in every update of the codebooks

    def statistics(self) -> dict[str, dict]:
        """Since the last call: of each level codes used and perplexity 2^H; Dice of each organ.

        Dice is that of all slices taken together; None for an organ that no mask shows.
        """
        counts = {level: histogram.clone() for level, histogram in self.counts.items()}
        for histogram in self.counts.values():
            histogram.zero_()
        runtime.sum_over_ranks(*counts.values())
        decoded, true, both = counts.pop("masks", torch.zeros(3, 1)).tolist()
        organs = zip(self.splits["train"].labels[1:], decoded[1:], true[1:], both[1:], strict=True)
        dice = {str(label): round(2 * c / (a + b), 4) if b else None for label, a, b, c in organs}
        codes = {}
        for level, histogram in counts.items():
            perplexity = round(2 ** metrics.code_entropy(histogram.cpu().numpy()), 2)
            codes[level] = {"used": int(histogram.count_nonzero()), "perplexity": perplexity}
        return {"codes": codes, "dice": dice}

    def describe(self, record: dict) -> str:
        used = {level: codes["used"] for level, codes in record["codes"]["validate"].items()}
        known = [dice for dice in record["dice"]["validate"].values() if dice is not None]
        dice = f"mask Dice {sum(known) / len(known):.3f}, " if known else ""
        codes = f"codes used {used['top']} top {used['bottom']} bottom"
        return f"SSIM {1 - record['validate']['ssim']:.4f}, {dice}{codes}"

    def verdict(self, record: dict) -> str:
        dice = record["dice"]["validate"].items()
        if bad := [f"{label} ({x:.2f})" for label, x in dice if x is not None and x < LOWEST_DICE]:
            return f"note: the masks of these labels were not learnt (Dice): {', '.join(bad)}"
        return ""


def train_autoencoder(settings: Settings) -> Path:
    """Train; returns the path of the best checkpoint. Raises as `open_study` and `fit` do."""
    runtime.writable_folder(settings.train.out)  # an error now, not after the training
    return fit(Autoencoder(settings), settings.train, settings.checkpoint)


def main() -> None:
    parser = runtime.parser(__doc__, StartConfig, *CONFIGS.values(), everyday=EVERYDAY)
    settings = make_settings(vars(parser.parse_args()))
    with runtime.ranks(settings.train.device):
        train_autoencoder(settings)


if __name__ == "__main__":
    runtime.run_cli(main)
