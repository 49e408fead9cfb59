"""p(top) side by side with MONAI's DecoderOnlyTransformer, of the same size, on the same codes, for the same time.

    pip install monai einops
    python -m benchmarks.monai_prior --checkpoint Results/vqvae2_best.pth [--minutes 4] [--n 16]

Ours is `prior.CodePrior` with the settings of `train.py --stage prior`; MONAI's has as many channels, layers and
heads, and is trained as its tutorial does, Adam at 5e-4. Neither is told the slice's position. Both are then
measured in bits a code (exact, validation and test split) and in seconds for --n top maps: ours from its cache of
keys and values, in float64 as always; MONAI's by its VQVAETransformerInferer, which runs the whole prefix for
every code.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import runtime
import train
from codes import extract_codes
from dataset import DataConfig, StudyInfo, open_trained_study
from loop import TrainConfig, learning_rate
from modules import load_model
from optimiser import Muon, split_parameters
from prior import Prior, PriorConfig, Walk, draw
from runtime import option


@dataclass(frozen=True)
class Config:
    """What is learnt, and for how long."""

    checkpoint: str = option("Results/vqvae2_best.pth", "the autoencoder whose top codes are learnt")
    minutes: float = option(4.0, "training time of each")
    n: int = option(16, "top maps to sample, in one batch")
    batch_size: int = option(8, "slices a step of MONAI's; ours keeps its preset's")
    seed: int = option(0, "of weights and order")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    out: str = option("benchmarks/results/monai_prior.json", "file to write")


class MonaiPrior(nn.Module):
    """MONAI's transformer over raster sequences that begin with the token K, as its inferer builds them."""

    def __init__(self, config: PriorConfig, codes: int):
        super().__init__()
        from monai.networks.nets import DecoderOnlyTransformer

        self.K = self.num_embeddings = config.K  # the inferer asks its VQVAE for the second
        size = config.prior_channels, config.prior_top_layers, config.prior_heads
        self.transformer = DecoderOnlyTransformer(config.K + 1, codes, *size)

    def nats(self, top: Tensor) -> Tensor:
        """(B, h, w) int64 -> -log p of every code, (B, h*w)."""
        codes = top.flatten(1)
        logits = self.transformer(F.pad(codes, (1, -1), value=self.K))
        return F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")

    def decode_samples(self, codes: Tensor) -> Tensor:
        """In place of the VQVAE's decoder: the maps are what is asked for."""
        return codes

    @torch.inference_mode()
    def sample(self, n: int, shape: tuple[int, int]) -> Tensor:
        from monai.inferers import VQVAETransformerInferer
        from monai.utils import Ordering

        start = torch.full((n, 1), self.K, device=next(self.parameters()).device)
        order = Ordering("raster_scan", 2, (1, *shape))
        return VQVAETransformerInferer().sample(shape, start, self, self.transformer, order)


def our_nats(prior: Prior, top: Tensor) -> Tensor:
    logits = prior.top(top, None, torch.full((len(top),), math.nan, device=top.device))
    return F.cross_entropy(logits.flatten(0, 2), top.flatten(), reduction="none").view(len(top), -1)


@torch.inference_mode()
def our_sample(prior: Prior, n: int) -> Tensor:
    """The top half of `Prior.sample`."""
    level = copy.deepcopy(prior.top).double()
    uniforms = torch.rand(math.prod(prior.top_shape), n, dtype=torch.float64, device=prior.head_device())
    walk = Walk(level, None, uniforms.new_full((n,), math.nan))
    for u in uniforms:
        walk.put(draw(walk.logits(), u))
    return walk.map()


def train_for(
    config: TrainConfig, model: nn.Module, nats: Callable, optimiser: torch.optim.Optimizer, codes: Tensor
) -> int:
    """Train for config.minutes on codes (2, N, h, w), as they are or mirrored; returns how many slices were seen."""
    generator, order, seen, began = torch.Generator().manual_seed(config.seed), [], 0, time.monotonic()
    bar = tqdm(total=round(60 * config.minutes), unit="s", desc=type(model).__name__, mininterval=5)
    while (spent := time.monotonic() - began) < 60 * config.minutes:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, spent / 60 / config.minutes)
        if len(order) < config.batch_size:
            order = torch.randperm(codes.shape[1], generator=generator)
        batch, order = order[: config.batch_size], order[config.batch_size :]
        side = torch.randint(2, (len(batch),), generator=generator)
        loss = nats(codes[side, batch].long()).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        seen += len(batch)
        bar.update(round(spent) - bar.n)
        bar.set_postfix(bits=f"{loss.item() / math.log(2):.2f}", refresh=False)
    bar.close()
    return seen


@torch.inference_mode()
def bits(nats: Callable, top: Tensor) -> float:
    """Bits a code over maps (N, h, w)."""
    total = sum(nats(part.long()).double().sum().item() for part in top.split(16))
    return total / math.log(2) / top.numel()


def main() -> None:
    config = runtime.from_flags(Config, runtime.parser(__doc__, Config).parse_args())
    device = runtime.pick_device(config.device)
    checkpoint = runtime.load_checkpoint(config.checkpoint, "vqvae2")
    model = load_model(checkpoint, config.checkpoint).to(device)
    trained = StudyInfo.from_checkpoint(checkpoint, config.checkpoint)
    splits = open_trained_study(trained, DataConfig(), config.checkpoint)
    kept = Path(config.checkpoint).parent / "codes.npz"
    maps = extract_codes(model, splits, runtime.sha256(config.checkpoint), kept)
    top = {name: torch.from_numpy(maps[f"{name}_top"].astype("int32")).to(device) for name in splits}
    shape, size = tuple(top["train"].shape[2:]), PriorConfig(K=model.config.K)

    settings = train.PRESETS["prior"]["best"] | {"minutes": config.minutes, "seed": config.seed}
    ours_config = TrainConfig(**settings)
    theirs_config = TrainConfig(
        minutes=config.minutes, batch_size=config.batch_size, lr=5e-4, seed=config.seed
    )
    runtime.seed_everything(config.seed)
    ours = Prior(size, shape).to(device)
    ours.start_from(model.quantiser_top.codebook, model.quantiser_bottom.codebook)
    muon = Muon(*split_parameters(ours.top), ours_config.lr, ours_config.weight_decay, fused=True)
    theirs = MonaiPrior(size, math.prod(shape)).to(device)
    adam = torch.optim.Adam(theirs.parameters(), theirs_config.lr)

    contenders = {
        "ours": (ours_config, ours.top, lambda codes: our_nats(ours, codes), muon),
        "monai": (theirs_config, theirs, theirs.nats, adam),
    }
    rows: dict[str, dict] = {}
    for name, (setting, module, nats, optimiser) in contenders.items():
        seen = train_for(setting, module.train(), nats, optimiser, top["train"])
        module.eval()
        rows[name] = {
            "parameters": sum(p.numel() for p in module.parameters()),
            "slices_seen": seen,
            "bits_per_code": {part: round(bits(nats, top[part][0]), 4) for part in ("validate", "test")},
            "sampling_seconds": [],
        }
    sample = {
        "ours": lambda: our_sample(ours, config.n),
        "monai": lambda: theirs.sample(config.n, shape),
    }
    for name in ("ours", "monai", "ours"):  # ours on both sides: a machine that slows down shows
        began = time.monotonic()
        sample[name]()
        rows[name]["sampling_seconds"].append(round(time.monotonic() - began, 2))
    ratio = min(rows["monai"]["sampling_seconds"]) / max(rows["ours"]["sampling_seconds"])
    n = {name: top[name].shape[1] for name in splits}
    result = {"minutes": config.minutes, "n": config.n, "slices": n, "top_shape": shape, "rows": rows}
    result |= {"sampling_ratio": round(ratio, 1), "threads": torch.get_num_threads(), "device": str(device)}
    runtime.write_json(config.out, result | {"data": Path(trained.study).name} | runtime.provenance())
    for name, row in rows.items():
        print(f"{name:6} {row['slices_seen']} slices seen, bits a top code: {row['bits_per_code']}, ", end="")
        print(f"{config.n} top maps in {max(row['sampling_seconds'])} s")
    print(f"ours samples {ratio:.1f} x as fast\nwrote {config.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
