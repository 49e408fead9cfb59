"""The VQ-VAE-2 and nothing else: two-level encoder, vector quantiser, decoder, loss. No files, no printing.

Razavi, van den Oord & Vinyals 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2" (arXiv
1906.00446); the quantiser is van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete Representation
Learning" (arXiv 1711.00937), with the EMA codebook of its appendix A.1.

    x (B, 1, H, W) --> bottom encoder --> h_bottom (B, C, H/4, W/4)
    h_bottom       --> top encoder    --> h_top    (B, C, H/8, W/8) --> quantise --> top codes
    h_bottom, decoded top             --> quantise --> bottom codes
    decoded top, bottom codes         --> decoder  --> reconstruction (B, 1, H, W)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime import option, rank, sum_over_ranks, world


@dataclass(frozen=True)
class VQVAE2Config:
    """The shape of the network. Defaults: 2048 + 512 codes of 9 bits for 256x128, 0.703 bits per pixel."""

    K: int = option(512, "codes in each codebook")
    stride: int = option(4, "pixels of a bottom code along each axis; a top code covers twice that")
    D: int = option(64, "dimensions of a code vector")
    channels: int = option(64, "channels at the bottom level's resolution")
    top_channels: int = option(
        128, "channels at the top level's resolution, where a convolution costs a quarter"
    )
    residual_channels: int = option(32, "channels inside a residual block")
    encoder_blocks: int = option(1, "residual blocks of the bottom encoder")
    top_blocks: int = option(1, "residual blocks of the top encoder, and of the top decoder")
    decoder_blocks: int = option(3, "residual blocks of the decoder")
    ema_decay: float = option(0.99, "gamma of the codebook's moving averages")
    revive: float = option(
        0.03, "a code used less than this share of the mean is dead and restarts from the batch"
    )
    rate: float = option(
        0.0,
        "lambda: what a bit is worth, as a share of the codebook's variance; above 0 codes cost fewer bits",
    )

    def __post_init__(self) -> None:
        for name in ("K", "stride", "D", "channels", "top_channels", "residual_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.K > 2**16:
            raise ValueError(f"K is {self.K}; expected at most {2**16}, for codes are kept in 16 bits")
        for name in ("encoder_blocks", "top_blocks", "decoder_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.stride % 2:
            raise ValueError(f"stride is {self.stride}; expected an even number")
        for name in ("rate", "revive"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected 0 <= ema_decay < 1")

    def code_shapes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heights and widths of the top and of the bottom code map of a slice of height x width pixels."""
        span = 2 * self.stride
        if height % span or width % span or height < 1 or width < 1:
            raise ValueError(f"a slice of {height}x{width}; expected both to be multiples of {span}")
        bottom = (height // self.stride, width // self.stride)
        return (bottom[0] // 2, bottom[1] // 2), bottom

    def bits_per_pixel(self, height: int, width: int) -> float:
        """The nominal rate: log2(K) bits for every code of both levels, over the pixels."""
        codes = sum(h * w for h, w in self.code_shapes(height, width))
        return codes * math.log2(self.K) / (height * width)


class Quantised(NamedTuple):
    """What the quantiser returns for one level."""

    vectors: Tensor  # (B, D, h, w): the nearest codes, straight-through to the encoder's output
    codes: Tensor  # (B, h, w) int64 in [0, K)
    commitment: (
        Tensor  # (): mean squared distance of the encoder's output to its code, no gradient to the code
    )


class Output(NamedTuple):
    """What the model returns for a batch."""

    reconstruction: Tensor  # (B, 1, H, W), z-scored as the input was
    top: Quantised
    bottom: Quantised


class VectorQuantiser(nn.Module):
    """Nearest-code quantiser with an EMA codebook (van den Oord et al. 2017, section 3.1 and appendix A.1).

    The codebook starts from the first training batch. A code whose moving count falls under `revive` times
    the mean restarts at a vector of the current batch, and its moving averages with it: left as they were,
    they would pull it straight back. With a `rate` above 0 it is entropy-constrained (Chou, Lookabaugh & Gray
    1989): a farther code is taken where it is so much more usual that it saves the bits. In `eval()` no
    buffer ever changes. Several ranks keep one codebook, that of a lone process on their joined batch.
    """

    chunk = 4096  # rows of the distance matrix held at once: (chunk, K) floats instead of (B*h*w, K)

    def __init__(
        self,
        K: int,
        D: int,
        decay: float = 0.99,
        revive: float = 0.03,
        rate: float = 0.0,
        epsilon: float = 1e-5,
    ):
        super().__init__()
        self.K, self.decay, self.revive, self.rate, self.epsilon = K, decay, revive, rate, epsilon
        self.register_buffer("codebook", torch.randn(K, D))  # e
        self.register_buffer("ema_count", torch.ones(K))  # N
        self.register_buffer("ema_sum", self.codebook.clone())  # m
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.started = False  # known to be: to look at `updates` is to wait for the device

    def forward(self, z: Tensor) -> Quantised:
        """z (B, D, h, w), the encoder's output z_e(x) -> the nearest code of every position."""
        B, D, h, w = z.shape
        # fp32 also under autocast: bf16 distances tie, and bf16 moving averages stop moving
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            flat = z.permute(0, 2, 3, 1).reshape(-1, D)  # (B, D, h, w) -> (B*h*w, D)
            if self.training and not self.started:
                if self.updates == 0:
                    self.start(flat.detach())
                self.started = True
            codes = self.nearest(flat.detach())  # (B*h*w,)
            vectors = F.embedding(
                codes, self.codebook
            )  # before the update: what the distances were measured to
            if self.training:
                self.update(flat.detach(), codes)
            vectors = vectors.view(B, h, w, D).permute(0, 3, 1, 2)  # (B*h*w, D) -> (B, D, h, w)
            commitment = F.mse_loss(z, vectors)  # ||z_e(x) - sg[e]||^2
            vectors = z + (vectors - z).detach()  # straight-through: dL/dz_e = dL/dz_q
        return Quantised(vectors, codes.view(B, h, w), commitment)

    @torch.no_grad()
    def nearest(self, flat: Tensor) -> Tensor:
        """flat (N, D) -> (N,) int64: argmin_k ||z - e_k||^2 + lambda s^2 b_k.

        ||z||^2 is the same for every k. b_k is what code k costs in bits, -log2 of its moving share, and s^2 the
        codebook's variance: it makes lambda mean the same at whatever scale the encoder works.
        """
        costs = self.codebook.square().sum(1)
        if self.rate:
            p = self.ema_count / self.ema_count.sum()
            variance = p @ (self.codebook - p @ self.codebook).square().sum(1)
            costs = costs - self.rate * variance * p.clamp_min(1e-9).log2()
        # min: of a CPU's time argmin takes twice as much
        return torch.cat(
            [torch.addmm(costs, part, self.codebook.T, alpha=-2).min(1)[1] for part in flat.split(self.chunk)]
        )

    def vectors(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) int64 in [0, K) -> their vectors (B, D, h, w)."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    @torch.no_grad()
    def start(self, flat: Tensor) -> None:
        """Take K vectors of the batch as the codebook, each as if it had been used once."""
        drawn = self.draw(flat)
        sum_over_ranks(drawn)
        self.codebook.copy_(drawn)
        self.ema_sum.copy_(self.codebook)
        self.ema_count.fill_(1)

    @torch.no_grad()
    def update(self, flat: Tensor, codes: Tensor) -> None:
        """Equations of appendix A.1, then revival of the dead codes."""
        # not bincount, which waits for the device
        count = flat.new_zeros(self.K).scatter_add_(0, codes, torch.ones_like(codes, dtype=flat.dtype))
        total = torch.zeros_like(self.codebook).index_add_(0, codes, flat)
        drawn = self.draw(flat)
        sum_over_ranks(count, total, drawn)
        # gamma rises to its value: the codebook must keep up with an encoder that is finding its scale
        weight = (9 / (10 + self.updates)).clamp_min(1 - self.decay)  # 1 - gamma
        self.updates += 1
        self.ema_count.lerp_(count, weight)  # N <- gamma N + (1 - gamma) n
        self.ema_sum.lerp_(total, weight)  # m <- gamma m + (1 - gamma) sum z
        used = self.ema_count.sum()
        mean = used / self.K
        dead = self.ema_count < self.revive * mean
        self.ema_count.copy_(torch.where(dead, mean, self.ema_count))
        self.ema_sum.copy_(torch.where(dead[:, None], drawn * mean, self.ema_sum))
        # Laplace smoothing: no count is ever 0, and they still add up to N
        smoothed = (self.ema_count + self.epsilon) / (used + self.K * self.epsilon) * used
        self.codebook.copy_(self.ema_sum / smoothed[:, None])

    def draw(self, flat: Tensor) -> Tensor:
        """K random vectors of flat (N, D). Of the rows of several ranks as one batch: zeros for another's."""
        place = torch.rand(self.K, dtype=torch.float64, device=flat.device)  # in [0, 1), in the batch
        if world() == 1:
            return flat[(place * len(flat)).long()]
        sizes = place.new_zeros(world())
        sizes[rank()] = len(flat)
        place *= rank() == 0  # the others take the places that rank 0 drew
        sum_over_ranks(sizes, place)
        row = (place * sizes.sum()).long() - sizes[: rank()].sum().long()
        if not len(flat):
            return flat.new_zeros(self.K, flat.shape[1])
        mine = (row >= 0) & (row < len(flat))
        return torch.where(mine[:, None], flat[row.clamp(0, len(flat) - 1)], 0)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution as the matrix product that it is: `Conv2d` of a few slices on one CPU thread unfolds."""

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)  # (B, C, h, w) -> (B, h, w, C)
        return x.permute(0, 3, 1, 2)  # channels last in memory


class ResidualBlock(nn.Module):
    """x + W2 silu(W1 silu(x)): a 3x3 convolution into fewer channels, a 1x1 back.

    SiLU and not the paper's ReLU, under which most units of the top encoder's block died within 5,000 steps.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = Pointwise(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class VQVAE2(nn.Module):
    """Two-level VQ-VAE-2 for one-channel slices whose sides are multiples of twice the stride."""

    def __init__(self, config: VQVAE2Config = VQVAE2Config()):
        super().__init__()
        self.config = config
        C, T, D, S = config.channels, config.top_channels, config.D, config.stride

        def blocks(n: int, channels: int) -> list[nn.Module]:
            return [ResidualBlock(channels, config.residual_channels) for _ in range(n)]

        # space to depth, then a 3x3 convolution: a 12x12 one of stride 4 at a fraction of its cost
        self.encoder_bottom = nn.Sequential(
            nn.PixelUnshuffle(S),
            nn.Conv2d(S**2, C, 3, padding=1),
            *blocks(config.encoder_blocks, C),
            nn.SiLU(),
        )
        self.encoder_top = nn.Sequential(
            nn.Conv2d(C, T, 2, stride=2), *blocks(config.top_blocks, T), nn.SiLU(), Pointwise(T, D)
        )
        self.quantiser_top = VectorQuantiser(config.K, D, config.ema_decay, config.revive, config.rate)
        # transposed convolutions build back up: the top codes to the bottom's resolution, ...
        self.decoder_top = nn.Sequential(
            Pointwise(D, T),
            *blocks(config.top_blocks, T),
            nn.SiLU(),
            nn.ConvTranspose2d(T, C, 2, stride=2),
        )
        self.to_bottom = Pointwise(2 * C, D)
        self.quantiser_bottom = VectorQuantiser(config.K, D, config.ema_decay, config.revive, config.rate)
        # ... and both levels to pixels; windows of twice the stride overlap, so that no seams show
        self.decoder = nn.Sequential(
            Pointwise(C + D, C),
            *blocks(config.decoder_blocks, C),
            nn.SiLU(),
            nn.ConvTranspose2d(C, 1, 2 * S, stride=S, padding=S // 2),
        )

    def forward(self, x: Tensor) -> Output:
        """x (B, 1, H, W), z-scored -> its reconstruction and both levels' codes.

        Raises:
            ValueError: H or W is not a multiple of twice the stride.
        """
        top, bottom, decoded_top = self.quantise(x)
        return Output(self.decode(decoded_top, bottom.vectors), top, bottom)

    def quantise(self, x: Tensor) -> tuple[Quantised, Quantised, Tensor]:
        """x (B, 1, H, W) -> the top level, the bottom level given it, the decoded top (B, C, H/4, W/4).

        Razavi et al. 2019, algorithm 1: the bottom holds what the top left unsaid.
        """
        self.config.code_shapes(*x.shape[2:])
        h_bottom = self.encoder_bottom(x)  # (B, 1, H, W) -> (B, C, H/4, W/4)
        top = self.quantiser_top(self.encoder_top(h_bottom))  # -> (B, D, H/8, W/8)
        decoded_top = self.decoder_top(top.vectors)  # -> (B, C, H/4, W/4)
        bottom = self.quantiser_bottom(self.to_bottom(torch.cat([h_bottom, decoded_top], 1)))
        return top, bottom, decoded_top

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 1, H, W), z-scored -> codes int64 in [0, K): top (B, H/8, W/8), bottom (B, H/4, W/4)."""
        top, bottom, _ = self.quantise(x)
        return top.codes, bottom.codes

    def decode(self, decoded_top: Tensor, bottom: Tensor) -> Tensor:
        """Decoded top (B, C, H/4, W/4) and bottom vectors (B, D, H/4, W/4) -> slices (B, 1, H, W) float32."""
        return self.decoder(torch.cat([decoded_top, bottom], 1)).float()

    def decode_codes(self, top: Tensor, bottom: Tensor) -> Tensor:
        """Codes int64 in [0, K), top (B, h, w) and bottom (B, 2h, 2w) -> slices (B, 1, 8h, 8w).

        Raises:
            ValueError: the maps are not of these sizes.
        """
        if top.ndim != 3 or bottom.shape != (len(top), 2 * top.shape[1], 2 * top.shape[2]):
            raise ValueError(
                f"codes of {tuple(top.shape)} and {tuple(bottom.shape)}; expected (B, h, w) and (B, 2h, 2w)"
            )
        return self.decode(
            self.decoder_top(self.quantiser_top.vectors(top)), self.quantiser_bottom.vectors(bottom)
        )


def load_model(checkpoint: dict, path: str) -> VQVAE2:
    """The model of a checkpoint, in `eval()`; ValueError where its weights are of another network."""
    try:
        model = VQVAE2(VQVAE2Config(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: weights of another network than modules.py has ({str(error).splitlines()[0]}). "
            "Mend: use the version of these scripts that wrote it, or train again."
        ) from error
    return model.eval()


def box_mean(x: Tensor, window: int = 7) -> Tensor:
    """(..., H, W) -> (..., H - 6, W - 6): 7x7 means by shifted sums, twice as fast as avg_pool2d."""
    h, w = x.shape[-2] - window + 1, x.shape[-1] - window + 1
    x = sum(x[..., i : i + h, :] for i in range(window))
    return sum(x[..., i : i + w] for i in range(window)) / window**2


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """(B,) mean SSIM of (B, 1, H, W) slices, as scikit-image's defaults: 7x7 uniform, sample covariance.

    The data range of each slice is max - min of `x`, the original: the report's protocol.
    """
    bessel = 49 / 48
    span = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).clamp_min(1e-6).view(-1, 1, 1, 1)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mx, xx = box_mean(torch.stack([x, x * x]))
    my, yy, xy = box_mean(torch.stack([y, y * y, x * y]))
    vx, vy, vxy = bessel * (xx - mx * mx), bessel * (yy - my * my), bessel * (xy - mx * my)
    similarity = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean((1, 2, 3))
