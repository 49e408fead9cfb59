"""The VQ-VAE-2: encoder, vector quantiser, decoder; `load_model` opens a trained one.

Razavi, van den Oord & Vinyals 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2" (arXiv
1906.00446); the quantiser is van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete
Representation Learning" (arXiv 1711.00937), with the EMA codebook of its appendix A.1.

    x (B, 1, H, W) --> bottom encoder --> h_bottom (B, C, 2h, 2w)
    h_bottom       --> top encoder    --> h_top    (B, D, h, w) --> quantise --> top codes
    h_bottom, decoded top             --> quantise --> bottom codes
    decoded top, bottom codes         --> decoder  --> reconstruction (B, 1, H, W)

Here h = H / 2S and w = W / 2S for a stride of S pixels: 4, or 8 at the preset `low-rate`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import StudyInfo
from support import runtime
from support.runtime import UserError, check_number, option, rank, sum_over_ranks, world


@dataclass(frozen=True)
class VQVAE2Config:
    """The shape of the network.

    By default a 256x128 slice has 2048 + 512 codes of 9 bits, 0.703 bits per pixel.
    """

    K: int = option(512, "codes in each codebook")
    stride: int = option(4, "pixels of a bottom code along each axis; a top code has twice as many")
    D: int = option(64, "dimensions of a code vector")
    channels: int = option(64, "channels at the bottom level's resolution")
    top_channels: int = option(128, "channels at the top level's resolution, a quarter as costly")
    residual_channels: int = option(32, "channels inside a residual block")
    encoder_blocks: int = option(1, "residual blocks of the bottom encoder")
    top_blocks: int = option(1, "residual blocks of the top encoder, and of the top decoder")
    decoder_blocks: int = option(3, "residual blocks of the decoder")
    ema_decay: float = option(0.99, "gamma of the codebook's moving averages")
    revive: float = option(0.03, "a code used less than this share of the mean use is dead")
    bit_weight: float = option(
        0.0, "lambda, the price of a bit as a share of the codebook's variance; 0: bits are free"
    )
    price_rise: int = option(0, "updates of the codebook over which this price rises from 0")
    # Classes of the masks that the decoder predicts too, 0 for none. The study sets it.
    labels: int = 0

    def __post_init__(self) -> None:
        check_number("K", self.K, least=2, most=2**16)  # code maps are stored in 16 bits
        for name in ("stride", "D", "channels", "top_channels", "residual_channels"):
            check_number(name, getattr(self, name), least=1)
        blocks = "encoder_blocks", "top_blocks", "decoder_blocks"
        for name in (*blocks, "bit_weight", "price_rise", "revive"):
            check_number(name, getattr(self, name), least=0)
        check_number("ema_decay", self.ema_decay, least=0, most=0.9999999)
        if self.stride % 2:
            raise UserError(f"--stride is {self.stride}; expected an even number")

    def code_shapes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(h, w) of the top and of the bottom code map of a slice of height x width pixels."""
        multiple = 2 * self.stride
        if height % multiple or width % multiple or height < 1 or width < 1:
            rows, columns = (-(-length // multiple) * multiple for length in (height, width))
            found = f"a grid of {height}x{width}; expected multiples of {multiple}, 2 x stride"
            raise UserError(f"{found}. Fix: --height {rows} --width {columns}")
        bottom = (height // self.stride, width // self.stride)
        return (bottom[0] // 2, bottom[1] // 2), bottom

    def bits_per_pixel(self, height: int, width: int) -> float:
        """The nominal rate: log2(K) bits for every code of both levels, over the pixels."""
        codes = sum(h * w for h, w in self.code_shapes(height, width))
        return codes * math.log2(self.K) / (height * width)


class Quantised(NamedTuple):
    """What the quantiser returns for one level."""

    # (B, D, h, w): the nearest codes. Their gradient goes straight to the encoder's output.
    vectors: Tensor
    codes: Tensor  # (B, h, w) int64 in [0, K)
    commitment: Tensor  # (): mean squared distance between the encoder's output and its codes
    price: Tensor  # (B, h, w): `bit_weight` times the bits of each code


class Output(NamedTuple):
    """What the model returns for a batch."""

    reconstruction: Tensor  # (B, 1, H, W), z-scored as the input was
    top: Quantised
    bottom: Quantised
    mask_logits: Tensor | None = None  # (B, labels, H, W); None for a model without masks
    # (B, labels, 2h, 2w): a mask as coarse as the bottom codes, by the top codes; None likewise.
    coarse_mask_logits: Tensor | None = None


class VectorQuantiser(nn.Module):
    """Nearest-code quantiser with an EMA codebook (van den Oord et al. 2017, 3.1 and A.1).

    The codebook starts from the first training batch. A code whose moving count falls below
    `revive` times the mean restarts at a vector of the current batch, and so do its moving
    averages: the old ones would pull it straight back. With a `bit_weight` above 0 the quantiser is
    entropy-constrained (Chou, Lookabaugh & Gray 1989): it takes a more distant code if that code is
    common enough to save the bits. The price rises over the first `price_rise` updates: where bits
    cost from the start, a few codes take all and the others learn little. In `eval()` no buffer
    changes. All ranks hold the same codebook, the one a single process would learn from their
    joined batch.
    """

    # Rows of the distance matrix (rows, K) that a CPU holds at once. A GPU holds 32 times more.
    chunk = 4096

    epsilon = 1e-5  # of the Laplace smoothing of counts

    def __init__(self, K: int, D: int, decay=0.99, revive=0.03, bit_weight=0.0, price_rise=0):
        super().__init__()
        self.K, self.decay, self.revive = K, decay, revive
        self.bit_weight, self.price_rise = bit_weight, price_rise
        self.register_buffer("codebook", torch.randn(K, D))  # e
        self.register_buffer("ema_count", torch.ones(K))  # N
        self.register_buffer("ema_sum", self.codebook.clone())  # m
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.started = False  # cached: reading `updates` at every step would sync the GPU

    def forward(self, z: Tensor) -> Quantised:
        """z (B, D, h, w), the encoder's output z_e(x) -> the nearest code at every position."""
        B, D, h, w = z.shape
        # In float32 even under autocast: bfloat16 distances tie, and its moving averages stop.
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            flat = z.detach().permute(0, 2, 3, 1).reshape(-1, D)  # (B, D, h, w) -> (B*h*w, D)
            if self.training and not self.started:
                if self.updates == 0:
                    self.start(flat)
                self.started = True
            codes = self.nearest(flat).view(B, h, w)
            # Before `update` moves the codebook and its counts.
            vectors, price = self.vectors(codes), self.prices()[codes]
            if self.training:
                self.update(flat, codes.flatten())
            commitment = F.mse_loss(z, vectors)  # ||z_e(x) - sg[e]||^2
            vectors = z + (vectors - z).detach()  # straight-through: dL/dz_e = dL/dz_q
        return Quantised(vectors, codes, commitment, price)

    def prices(self) -> Tensor:
        """(K,): lambda b_k, `bit_weight` times the bits of code k, -log2 of its moving share.

        The full price, even while `nearest` uses a lower one: so losses of all epochs compare.
        """
        return -self.bit_weight * (self.ema_count / self.ema_count.sum()).clamp_min(1e-9).log2()

    @torch.no_grad()
    def nearest(self, flat: Tensor, price: Tensor | None = None) -> Tensor:
        """flat (N, D) -> (N,) int64: argmin_k ||z - e_k||^2 + s^2 lambda b_k.

        ||z||^2 is left out because it is the same for every k. s^2 is the codebook's variance: it
        makes lambda independent of the scale of the encoder's output. `price` (N, K) is lambda b_k
        of each code in its place. Without it `prices` tells lambda b_k, and lambda is less while it
        rises.
        """
        costs = self.codebook.square().sum(1)
        if price is None and self.bit_weight:
            price = self.prices() * ((self.updates + 1) / (self.price_rise + 1)).clamp_max(1)
        if price is not None:
            p = self.ema_count / self.ema_count.sum()
            variance = p @ (self.codebook - p @ self.codebook).square().sum(1)
            costs = costs + variance * price
        rows = self.chunk if flat.device.type == "cpu" else 32 * self.chunk
        parts = zip(costs.expand(len(flat), -1).split(rows), flat.split(rows), strict=True)
        sums = (torch.addmm(cost, x, self.codebook.T, alpha=-2) for cost, x in parts)
        return torch.cat([part.min(1)[1] for part in sums])  # argmin takes twice as long on a CPU

    def vectors(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) int64 in [0, K) -> their codebook vectors (B, D, h, w)."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    @torch.no_grad()
    def start(self, flat: Tensor) -> None:
        """Start the codebook from K random vectors of the batch, each counted as used once."""
        vectors = self.random_vectors(flat)
        sum_over_ranks(vectors)
        self.codebook.copy_(vectors)
        self.ema_sum.copy_(self.codebook)
        self.ema_count.fill_(1)

    @torch.no_grad()
    def update(self, flat: Tensor, codes: Tensor) -> None:
        """The moving averages of appendix A.1, then the revival of dead codes."""
        # Not bincount, for which a GPU would have to be waited for.
        ones = torch.ones_like(codes, dtype=flat.dtype)
        count = flat.new_zeros(self.K).scatter_add_(0, codes, ones)
        total = torch.zeros_like(self.codebook).index_add_(0, codes, flat)
        replacements = self.random_vectors(flat)
        sum_over_ranks(count, total, replacements)
        # Gamma rises from a low start: at first the scale of the encoder's output still changes,
        # and the codebook must follow it.
        weight = (9 / (10 + self.updates)).clamp_min(1 - self.decay)  # 1 - gamma
        self.updates += 1
        self.ema_count.lerp_(count, weight)  # N <- gamma N + (1 - gamma) n
        self.ema_sum.lerp_(total, weight)  # m <- gamma m + (1 - gamma) sum z
        used = self.ema_count.sum()
        mean = used / self.K
        dead = self.ema_count < self.revive * mean
        self.ema_count.copy_(torch.where(dead, mean, self.ema_count))
        self.ema_sum.copy_(torch.where(dead[:, None], replacements * mean, self.ema_sum))
        # Laplace smoothing: no count is 0, and the counts still add up to N.
        smoothed = (self.ema_count + self.epsilon) / (used + self.K * self.epsilon) * used
        self.codebook.copy_(self.ema_sum / smoothed[:, None])

    def random_vectors(self, flat: Tensor) -> Tensor:
        """K random rows of flat (N, D) -> (K, D).

        With several ranks the rows come from their joined batch; those that another rank holds are
        zeros here, so that the sum over ranks is the same for all.
        """
        # Each row as its place in [0, 1) of the joined batch.
        position = torch.rand(self.K, dtype=torch.float64, device=flat.device)
        if world() == 1:
            return flat[(position * len(flat)).long()]
        sizes = position.new_zeros(world())
        sizes[rank()] = len(flat)
        position *= rank() == 0  # all ranks use the positions that rank 0 drew
        sum_over_ranks(sizes, position)
        row = (position * sizes.sum()).long() - sizes[: rank()].sum().long()
        if not len(flat):
            return flat.new_zeros(self.K, flat.shape[1])
        here = (row >= 0) & (row < len(flat))
        return torch.where(here[:, None], flat[row.clamp(0, len(flat) - 1)], 0)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution as a matrix product: faster than `Conv2d` for a few slices on a CPU."""

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        x = F.linear(x, self.weight.flatten(1), self.bias)  # -> (B, h, w, out)
        return x.permute(0, 3, 1, 2)  # channels last in memory


class ToPixels(nn.ConvTranspose2d):
    """A last transposed convolution: a matrix product, then overlapping windows summed (`fold`).

    `ConvTranspose2d` takes twice as long for it on a CPU.
    """

    def __init__(self, channels: int, stride: int):
        super().__init__(channels, 1, 2 * stride, stride=stride, padding=stride // 2)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        x = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        windows = F.linear(x, self.weight.flatten(1).T)  # -> (B, h*w, window)
        size, window = (h * self.stride[0], w * self.stride[0]), self.kernel_size
        x = F.fold(windows.float().mT, size, window, padding=self.padding, stride=self.stride)
        return x + self.bias  # (B, 1, stride * h, stride * w)


class ResidualBlock(nn.Module):
    """x + W2 silu(W1 silu(x)): a 3x3 convolution to fewer channels, then a 1x1 convolution back.

    SiLU instead of the paper's ReLU, with which most of the top encoder died within 5,000 steps.
    """

    def __init__(self, channels: int, hidden: int, dilation: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=dilation, dilation=dilation)
        self.conv2 = Pointwise(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class MaskHead(nn.Module):
    """Vectors of both levels -> how likely each label is at each pixel.

    A left and a right kidney look alike, so this head must see the slice in its whole width.
    Convolutions of rising dilation do (Yu & Koltun 2016, arXiv 1511.07122).
    """

    def __init__(self, inputs: int, labels: int, stride: int):
        super().__init__()
        C = 32  # channels
        self.near = nn.Sequential(Pointwise(inputs, C), ResidualBlock(C, C))
        self.wide = nn.Sequential(
            nn.Conv2d(C, 2 * C, 2, stride=2),
            *[ResidualBlock(2 * C, C, dilation) for dilation in (1, 2, 4, 8, 1)],
            nn.SiLU(),
            nn.ConvTranspose2d(2 * C, C, 2, stride=2),
        )
        self.last = nn.Sequential(
            ResidualBlock(C, C),
            nn.SiLU(),
            Pointwise(C, labels * stride**2),
            nn.PixelShuffle(stride),
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors (B, inputs, 2h, 2w) -> logits (B, labels, H, W) float32."""
        near = self.near(vectors)
        return self.last(near + self.wide(near)).float()


class VQVAE2(nn.Module):
    """Two-level VQ-VAE-2 for one-channel slices whose sides are multiples of twice the stride."""

    def __init__(self, config: VQVAE2Config = VQVAE2Config()):
        super().__init__()
        self.config = config
        C, T, D, S = config.channels, config.top_channels, config.D, config.stride

        def blocks(n: int, channels: int) -> list[nn.Module]:
            return [ResidualBlock(channels, config.residual_channels) for _ in range(n)]

        # Space to depth, then 3x3: at a stride of 4 this sees what a 12x12 convolution would, at a
        # fraction of its cost.
        self.encoder_bottom = nn.Sequential(
            nn.PixelUnshuffle(S),
            nn.Conv2d(S**2, C, 3, padding=1),
            *blocks(config.encoder_blocks, C),
            nn.SiLU(),
        )
        self.encoder_top = nn.Sequential(
            nn.Conv2d(C, T, 2, stride=2), *blocks(config.top_blocks, T), nn.SiLU(), Pointwise(T, D)
        )
        price = config.bit_weight, config.price_rise
        quantiser = config.K, D, config.ema_decay, config.revive, *price
        self.quantiser_top = VectorQuantiser(*quantiser)
        # Brings the top codes to the bottom level's resolution.
        self.decoder_top = nn.Sequential(
            Pointwise(D, T),
            *blocks(config.top_blocks, T),
            nn.SiLU(),
            nn.ConvTranspose2d(T, C, 2, stride=2),
        )
        self.to_bottom = Pointwise(2 * C, D)
        self.quantiser_bottom = VectorQuantiser(*quantiser)
        # Brings both levels to pixels. Windows twice as wide as the stride leave no seams.
        self.decoder = nn.Sequential(
            Pointwise(C + D, C), *blocks(config.decoder_blocks, C), nn.SiLU(), ToPixels(C, S)
        )
        # The encoder sees no mask, so whatever this draws is in the codes.
        self.mask_head = MaskHead(C + D, config.labels, S) if config.labels else None
        # For the loss alone: each top code has to tell which organs lie in its place, so that a
        # prior can follow the layouts that it is told. Checkpoints know it by this older name.
        self.layout_head = Pointwise(D, 4 * config.labels) if config.labels else None

    def forward(self, x: Tensor) -> Output:
        """x (B, 1, H, W), z-scored -> its reconstruction, its codes and the mask that they hold."""
        top, bottom, decoded_top = self.quantise(x)
        image, mask_logits = self.decode(decoded_top, bottom.vectors)
        if self.layout_head is None:
            return Output(image, top, bottom)
        coarse = F.pixel_shuffle(self.layout_head(top.vectors), 2).float()  # (B, labels, 2h, 2w)
        return Output(image, top, bottom, mask_logits, coarse)

    def quantise(self, x: Tensor) -> tuple[Quantised, Quantised, Tensor]:
        """x (B, 1, H, W) -> top level, bottom level, decoded top (B, C, 2h, 2w).

        Razavi et al. 2019, algorithm 1: the bottom level sees the decoded top, adds what it lacks.
        """
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"slices of shape {tuple(x.shape)}; expected (B, 1, height, width)")
        self.config.code_shapes(*x.shape[2:])
        h_bottom = self.encoder_bottom(x)  # (B, 1, H, W) -> (B, C, 2h, 2w)
        top = self.quantiser_top(self.encoder_top(h_bottom))  # -> (B, D, h, w)
        decoded_top = self.decoder_top(top.vectors)  # -> (B, C, 2h, 2w)
        bottom = self.quantiser_bottom(self.to_bottom(torch.cat([h_bottom, decoded_top], 1)))
        return top, bottom, decoded_top

    def unquantised_bottom(self, x: Tensor, top: Tensor) -> Tensor:
        """x (B, 1, H, W), its top codes (B, h, w) -> z_e(x) of the bottom level, (B, D, 2h, 2w)."""
        decoded_top = self.decoder_top(self.quantiser_top.vectors(top))
        return self.to_bottom(torch.cat([self.encoder_bottom(x), decoded_top], 1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 1, H, W), z-scored -> codes int64 in [0, K): top (B, h, w), bottom (B, 2h, 2w)."""
        top, bottom, _ = self.quantise(x)
        return top.codes, bottom.codes

    def decode(self, decoded_top: Tensor, bottom: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decoded top (B, C, 2h, 2w), bottom vectors (B, D, 2h, 2w) -> slices, logits of masks.

        Slices are (B, 1, H, W) float32, logits (B, labels, H, W) float32 or None.
        """
        vectors = torch.cat([decoded_top, bottom], 1)
        mask_logits = self.mask_head(vectors) if self.mask_head is not None else None
        return self.decoder(vectors).float(), mask_logits

    def decode_with_masks(self, top: Tensor, bottom: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes int64 in [0, K), top (B, h, w) and bottom (B, 2h, 2w) -> what `decode` gives.

        ValueError for maps of other shapes.
        """
        if top.ndim != 3 or bottom.shape != (len(top), 2 * top.shape[1], 2 * top.shape[2]):
            shapes = f"codes of {tuple(top.shape)} and {tuple(bottom.shape)}"
            raise ValueError(f"{shapes}; expected (B, h, w) and (B, 2h, 2w)")
        decoded_top = self.decoder_top(self.quantiser_top.vectors(top))
        return self.decode(decoded_top, self.quantiser_bottom.vectors(bottom))

    def decode_codes(self, top: Tensor, bottom: Tensor) -> Tensor:
        """`decode_with_masks` without the masks: slices (B, 1, H, W)."""
        return self.decode_with_masks(top, bottom)[0]


class Trained(NamedTuple):
    """A trained autoencoder, and what its checkpoint says of it."""

    model: VQVAE2  # on the CPU, in eval()
    study: StudyInfo  # that it was trained on
    path: Path | str  # of the checkpoint
    sha256: str  # of the checkpoint, by which priors know their autoencoder
    epoch: int  # after which it was saved


def load_model(path: Path | str) -> Trained:
    """Open the checkpoint of an autoencoder that train.py wrote; raises as `load_checkpoint`."""
    saved = runtime.load_checkpoint(path, "vqvae2")
    study = StudyInfo.from_checkpoint(saved, path)
    with runtime.reading(path, saved["revision"]):
        model = VQVAE2(runtime.fill(VQVAE2Config, saved["model_config"]))
        model.load_state_dict(saved["model"])
        return Trained(model.eval(), study, path, runtime.sha256(path), int(saved["epoch"]))
