"""The priors over code maps, p(top | layout) and p(bottom | top): their loss, and new maps.

Razavi, van den Oord & Vinyals 2019 (arXiv 1906.00446), section 3.2, model both levels by
autoregression in raster order. A slice sampled so is finished on the left before anything is known
of the right. Here both priors are masked and bidirectional (MaskGIT, Chang et al. 2022, arXiv
2202.04200): some codes are hidden, and a transformer that sees all the others at once, and
convolutions after it, predict them. A new map starts with every code hidden and shows more of them
in each pass. A layout (layouts.py) has a class for each bottom code: it tells the top level which
tissue lies where, and which organ, where a study has masks. It may be unknown.

    codes, some hidden --> one token a patch of codes --+--> transformer --> convolutions --> logits
    row, column, position of the slice --> MLP ---------+    over tokens     over codes     of codes
    condition: layout (top), top codes (bottom) --------+

The number of hidden codes is uniform in training, which makes the loss the bound of Hoogeboom et
al. 2022 (arXiv 2110.02037, equation 8) on -log p: the mean number of nats, over all orders, of
coding the map one code at a time. An arithmetic coder that shares the order reaches it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import StudyInfo
from modules import Trained
from new_slices.code_maps import NUMBERS
from new_slices.layouts import classes
from support import runtime
from support.runtime import UserError, check_number, option

EXPAND = 2  # hidden channels of an MLP over its own
LAYOUT_CHANNELS = 16  # of the embedding of a layout's class, of which there are few
OCTAVES = 5  # sines and cosines of the slice position


@dataclass(frozen=True)
class PriorConfig:
    """The shape of both priors. The defaults suit some ten thousand slices."""

    K: int = option(512, "codes in each codebook")
    labels: int = 0  # of the masks on the layouts, 0 without masks; the study sets it
    prior_channels: int = option(128, "channels of the priors")
    prior_heads: int = option(4, "attention heads of the priors")
    prior_top_layers: int = option(3, "transformer blocks of p(top | layout)")
    prior_bottom_layers: int = option(1, "transformer blocks of p(bottom | top)")
    prior_refine_blocks: int = option(2, "convolutional blocks of both, at the resolution of codes")
    prior_patch: int = option(2, "codes of a token along each axis")
    prior_dropout: float = option(0.1, "dropout of tokens, and after attention and MLP in blocks")

    @property
    def classes(self) -> int:
        """How many classes layouts have; this number itself stands for an unknown one."""
        return classes(self.labels)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("labels", "prior_dropout") else 1
            check_number(name, value, least, 0.99 if name == "prior_dropout" else 2**31)
        if self.prior_channels % self.prior_heads:
            found = f"--prior-channels is {self.prior_channels}"
            raise UserError(f"{found}; expected a multiple of --prior-heads")


@dataclass(frozen=True)
class Sampling:
    """How the codes of one level are sampled."""

    passes: int = 16  # how many times the network is asked; each pass shows more codes
    temperature: float = 1.0  # divides the logits; 0 takes the likeliest code every time
    spread: float = 0.0  # how much chance decides which codes a pass shows: 0, the most certain
    # The change that the other map makes to the logits counts this many times more; 0 leaves it.
    guidance: float = 0.0


# What gave the best slices of real MRI, with masks and without (Results/trials.md). The top codes
# place organs; the bottom codes add detail and texture.
TOP_SAMPLING = Sampling(passes=10, temperature=0.8, spread=100.0, guidance=1.0)
BOTTOM_SAMPLING = Sampling(passes=4, temperature=0.8, spread=1.0)
# Of priors that learnt rebuilt layouts, which are as vague as new ones. Others take every detail of
# a layout for true, and this much guidance makes their slices worse.
REBUILT_GUIDANCE = 3.0


class MLP(nn.Sequential):
    """(..., C) -> (..., C): normalised, then one hidden layer with GELU."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, EXPAND * channels)
        self.gelu = nn.GELU()
        self.down = nn.Linear(EXPAND * channels, channels)


class Block(nn.Module):
    """A depthwise convolution, then a pre-norm transformer block (Vaswani et al. 2017).

    Every token attends to every other: there is no causal mask.
    """

    def __init__(self, config: PriorConfig):
        super().__init__()
        C = config.prior_channels
        self.heads = config.prior_heads
        self.conv = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = MLP(C)
        self.dropout = nn.Dropout(config.prior_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        B, C, h, w = x.shape
        x = (x + self.conv(x)).flatten(2).mT  # (B, C, h, w) -> (B, h*w, C)
        q, k, v = self.qkv(self.norm(x)).view(B, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, h*w, C/heads)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(B, h * w, C)))
        x = x + self.dropout(self.mlp(x))
        return x.mT.unflatten(2, (h, w))  # (B, h*w, C) -> (B, C, h, w)


class Refine(nn.Module):
    """A ConvNeXt block (Liu et al. 2022, arXiv 2201.03545): every code sees the 5x5 around it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.mlp = MLP(channels)

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """x (B, h, w, C) -> (B, h, w, C), or (M, C) of the codes at the flat indices `at` (M,)."""
        around = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if at is not None:
            x, around = (each.flatten(0, 2).index_select(0, at) for each in (x, around))
        return x + self.mlp(around)


class MaskedPrior(nn.Module):
    """One level: the distribution of every code of a map given those that are not hidden.

    A token stands for patch x patch codes, so that attention, whose cost grows with the square of
    the tokens, stays cheap: the transformer decides what lies where. The `Refine` blocks then
    convolve over single codes, so that walls go on from one token to the next. A level also sees
    another map, its condition: the top level a layout, the bottom level the top map.
    """

    def __init__(
        self,
        config: PriorConfig,
        shape: tuple[int, int],  # height and width of the map
        layers: int,
        condition_values: int,  # how many values the condition has
        condition_scale: float,  # its side over this map's
        condition_channels: int,  # of the embedding of a value
    ):
        super().__init__()
        C, P = config.prior_channels, config.prior_patch
        self.K, self.shape, self.patch = config.K, shape, P
        self.grid = (math.ceil(shape[0] / P), math.ceil(shape[1] / P))
        self.embed = nn.Embedding(config.K + 1, C)  # the last one stands for a hidden code
        self.merge = nn.Conv2d(C, C, P + 2, stride=P, padding=1)  # a patch and the codes around it
        self.rows = nn.Parameter(torch.zeros(C, self.grid[0], 1))
        self.columns = nn.Parameter(torch.zeros(C, 1, self.grid[1]))
        self.position = nn.Linear(2 * OCTAVES, C)
        self.unknown_position = nn.Parameter(torch.zeros(C))
        self.variant = nn.Linear(NUMBERS, C, bias=False)
        self.anatomy = MLP(C)  # what tends to lie at this place of this slice
        # The last value stands for an unknown one.
        self.condition = nn.Embedding(condition_values + 1, condition_channels)
        self.condition_shape = tuple(int(condition_scale * side) for side in shape)
        # A token sees the values of the condition that lie in it, and the ones around them.
        side = max(int(condition_scale * P), 1)
        self.gather = nn.Conv2d(condition_channels, C, side + 2, stride=side, padding=1)
        self.dropout = nn.Dropout(config.prior_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(layers))
        self.norm = nn.LayerNorm(C)
        self.split = nn.Linear(C, P * P * C)  # a token -> its codes
        self.local = nn.Conv2d(C, C, 5, padding=2, groups=C)  # what neighbours say of a code
        self.refine = nn.ModuleList(Refine(C) for _ in range(config.prior_refine_blocks))
        self.head_norm, self.head = nn.LayerNorm(C), nn.Linear(C, config.K)
        self.start()

    def start(self) -> None:
        """GPT-2's initialisation: normal, deviation 0.02, less in what adds to the residual stream.

        An untrained prior is uniform.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                branch = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * len(self.blocks)) if branch else 0.02
                nn.init.normal_(parameter, std=std)
        nn.init.zeros_(self.head.weight)

    def forward(
        self, codes: Tensor, context: Tensor, at: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        """Logits (B, h, w, K) of every code of the map, hidden or not.

        Args:
            codes: (B, h, w) int64 in [0, K); K where a code is hidden.
            context: (B, C, grid), what `self.context` makes of all else.
            at: (M,) int64 in [0, B*h*w), to be told the logits of these codes alone, (M, K).
            table: what `self.table` returns, for whoever asks more than once: less time then. In
                training it would have to be made at each step, which takes longer than to convolve.
        """
        (h, w), P = self.shape, self.patch
        embedded = self.embed(codes).permute(0, 3, 1, 2)  # (B, C, h, w)
        if table is None:
            merged = self.merge(F.pad(embedded, (0, -w % P, 0, -h % P)))
        else:
            merged = self.merge_codes(codes, table)
        x = self.dropout(merged + context)
        for block in self.blocks:
            x = block(x)
        x = self.split(self.norm(x.permute(0, 2, 3, 1)))  # (B, grid, C) -> (B, grid, P*P*C)
        # Channels stay last in memory: depthwise convolutions take three fifths of the time so.
        x = x.unflatten(3, (P, P, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = x[:, :h, :w] + self.local(embedded).permute(0, 2, 3, 1)  # (B, h, w, C)
        for refine in self.refine[:-1]:
            x = refine(x)
        return self.head(self.head_norm(self.refine[-1](x, at)))

    def table(self) -> Tensor:
        """What each code adds to a token at each place of its patch, (places * (K + 2), C).

        A convolution of embedded codes is a sum of rows of this table. For each place it has a row
        for every embedding, and a last one of zeros for what lies outside the map.
        """
        values = F.pad(self.embed.weight, (0, 0, 0, 1))
        return (values @ self.merge.weight.flatten(2).permute(2, 1, 0)).flatten(0, 1)

    def merge_codes(self, codes: Tensor, table: Tensor) -> Tensor:
        """`self.merge` of the embedded codes (B, h, w), (B, C, grid), by a table."""
        P, (h, w) = self.patch, self.shape
        padded = F.pad(codes, (1, 1 + -w % P, 1, 1 + -h % P), value=self.K + 1)
        rows = padded.unfold(1, P + 2, P).unfold(2, P + 2, P).flatten(3)  # (B, grid, places)
        rows = rows + (self.K + 2) * torch.arange(rows.shape[3], device=rows.device)
        merged = F.embedding_bag(rows.flatten(0, 2), table, mode="sum") + self.merge.bias
        return merged.view(*rows.shape[:3], -1).permute(0, 3, 1, 2)

    def context(self, position: Tensor, variant: Tensor, condition: Tensor | None = None) -> Tensor:
        """What is known before any code is, (B, C, grid): places in the map, and the arguments.

        Args:
            position: (B,) the slice's relative position in its volume, in [0, 1]; NaN for unknown.
            variant: (B, NUMBERS) float, how the slice was altered; zeros for a slice as it is.
            condition: int64, of the top level a layout (B, 2h, 2w) in [0, classes], where classes
                stands for unknown; of the bottom level top codes (B, h/2, w/2). None: unknown.
        """
        octaves = 2.0 ** torch.arange(OCTAVES, device=position.device)
        angles = position.nan_to_num()[:, None] * math.pi * octaves
        about = self.position(torch.cat([angles.sin(), angles.cos()], 1).to(self.rows))
        about = torch.where(position.isnan()[:, None], self.unknown_position, about)
        about = about + self.variant(variant.to(self.rows))
        x = self.rows + self.columns + about[:, :, None, None]
        x = self.anatomy(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if condition is None:
            shape = (len(position), *self.condition_shape)
            unknown = self.condition.num_embeddings - 1
            condition = torch.full(shape, unknown, device=position.device)
        values = self.condition(condition).permute(0, 3, 1, 2)
        side = self.gather.stride[0]
        values = F.pad(values, (0, -values.shape[3] % side, 0, -values.shape[2] % side))
        around = self.gather(values)
        return x + F.interpolate(around, self.grid)


class Prior(nn.Module):
    """Both levels, for top maps of `top_shape` and bottom maps of twice its height and width."""

    def __init__(self, config: PriorConfig, top_shape: tuple[int, int]):
        super().__init__()
        h, w = top_shape
        self.config, self.top_shape = config, (h, w)
        C = config.prior_channels
        self.top = MaskedPrior(
            config,
            (h, w),
            config.prior_top_layers,
            condition_values=config.classes,
            condition_scale=2,
            condition_channels=min(LAYOUT_CHANNELS, C),
        )
        self.bottom = MaskedPrior(
            config,
            (2 * h, 2 * w),
            config.prior_bottom_layers,
            condition_values=config.K,
            condition_scale=0.5,
            condition_channels=C,
        )

    @torch.no_grad()
    def start_from(self, codebook_top: Tensor, codebook_bottom: Tensor) -> None:
        """Start the embeddings and heads from the autoencoder's codebooks, each (K, D).

        Codes that mean almost the same then start almost the same, at the input and at the output,
        and a rare one learns from its neighbours.
        """
        for level, codebook in ((self.top, codebook_top), (self.bottom, codebook_bottom)):
            turn = nn.init.orthogonal_(torch.empty(codebook.shape[1], self.config.prior_channels))
            vectors = (codebook - codebook.mean(0)) @ turn.to(codebook)
            vectors *= 0.02 / vectors.std().clamp_min(1e-12)  # the size that `start` gave them
            level.embed.weight[: self.config.K] = vectors
            level.head.weight.copy_(vectors)
        self.bottom.condition.weight.copy_(self.top.embed.weight)

    def forward(
        self,
        top: Tensor,
        bottom: Tensor,
        position: Tensor,
        variant: Tensor,
        layout: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """An unbiased estimate of the bound on -log p in nats a code: "top" (B,), "bottom" (n,).

        top (B, h, w) and bottom (n, 2h, 2w) are int64 in [0, K), and bottom may be that of the
        first n slices alone; layout (B, 2h, 2w) is int64 in [0, classes], None for unknown.
        """
        n = len(bottom)
        of_top, of_bottom = (position, variant, layout), (position[:n], variant[:n], top[:n])
        nats = {"top": bound(self.top, top, of_top, generator)}
        return nats | {"bottom": bound(self.bottom, bottom, of_bottom, generator)}

    def as_it_is(self, count: int) -> Tensor:
        """The `variant` of slices that were not altered."""
        return self.top.rows.new_zeros(count, NUMBERS)

    @torch.inference_mode()
    def sample(
        self,
        positions: Sequence[float] | Tensor,
        seeds: Sequence[int],
        top: Sampling = TOP_SAMPLING,
        bottom: Sampling = BOTTOM_SAMPLING,
        progress: Callable[[], object] | None = None,
        layouts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """New code maps, top (B, h, w) and bottom (B, 2h, 2w), int64 in [0, K).

        Every slice has random numbers of its own, from its seed. Its codes do not depend on the
        other slices of the batch, but for rounding: once in some thousand slices a code may differ
        where two are equally likely.

        Args:
            positions, seeds: B values in [0, 1], NaN for unknown; B integers.
            top, bottom: how each level is sampled.
            progress: called after each of the top.passes + bottom.passes passes.
            layouts: (B, 2h, 2w) int64 in [0, classes]; None for unknown.
        """
        if not len(seeds):
            raise ValueError("no seeds; expected one for each slice")
        device = self.top.rows.device
        positions = torch.as_tensor(positions, dtype=torch.float32, device=device)
        if positions.shape != (len(seeds),):
            found = f"positions of shape {tuple(positions.shape)}"
            raise ValueError(f"{found}; expected ({len(seeds)},)")
        if (wrong := positions[(positions < 0) | (positions > 1)]).numel():  # NaN is neither
            raise ValueError(f"position {wrong[0]:g}; expected 0 to 1, or NaN for unknown")
        if layouts is not None:
            expected, most = (len(seeds), *self.bottom.shape), self.config.classes
            if layouts.shape != expected or not 0 <= layouts.min() <= layouts.max() <= most:
                found = f"layouts of shape {tuple(layouts.shape)}, up to {layouts.max()}"
                raise ValueError(f"{found}; expected {expected} of 0 to {most}")
            layouts = layouts.to(device)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        known = (positions, self.as_it_is(len(seeds)))
        top_codes = unmask(self.top, (*known, layouts), generators, top, progress)
        return top_codes, unmask(self.bottom, (*known, top_codes), generators, bottom, progress)


def load_prior(path: Path | str, trained: Trained) -> tuple[StudyInfo, dict, Prior]:
    """The study that priors learnt, in how many "copies" of each slice and with which share of
    layouts "rebuilt" (CodesConfig), and the priors; UserError for those of another autoencoder.
    """
    saved = runtime.load_checkpoint(path, "prior")
    study = StudyInfo.from_checkpoint(saved, path)
    digest, expected = trained.sha256, saved["autoencoder_sha256"]
    if digest != expected:
        raise UserError(
            f"{path}: priors of the autoencoder with SHA-256 {expected[:12]}...; "
            f"{trained.path} has {digest[:12]}... "
            "Fix: the pair that was trained together, or train_prior.py --checkpoint FILE."
        )
    with runtime.reading(path, saved["revision"]):
        codes = {name: saved["codes_config"][name] for name in ("copies", "rebuilt")}
        config = runtime.fill(PriorConfig, saved["model_config"])
        prior = Prior(config, tuple(saved["top_shape"]))
        prior.load_state_dict(saved["model"])
    return study, codes, prior.eval()


def bound(
    level: MaskedPrior,
    codes: Tensor,
    known: Sequence[Tensor | None],
    generator: torch.Generator | None,
) -> Tensor:
    """(B,): mean -log p over the hidden codes of each map, their number uniform in 1 .. h*w."""
    hidden, count = random_masks(codes, generator)
    # The network tells of the hidden codes alone. A GPU is not waited for, as `count` is known.
    at = hidden.flatten().nonzero_static(size=count)[:, 0]
    logits = level(codes.masked_fill(hidden, level.K), level.context(*known), at).float()
    nats = F.cross_entropy(logits, codes.flatten()[at], reduction="none")
    nats = nats.new_zeros(hidden.numel()).scatter(0, at, nats).view_as(codes)
    return nats.sum((1, 2)) / hidden.sum((1, 2))


@torch.compiler.disable  # it reads a number, which would break the compiled graph in pieces
def random_masks(codes: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, int]:
    """Which codes (B, h, w) are hidden, bool: of each map 1 .. h*w, uniform, at random places.

    And how many in all. The numbers of a batch are spread over that range (stratified), so that the
    loss is less noisy.
    """
    B, codes_of_a_map = len(codes), codes[0].numel()
    share = (torch.arange(B) + torch.rand(B, generator=generator)) / B
    number = (share * codes_of_a_map).long() + 1  # 1 .. h*w
    # The same numbers on all devices for a generator of the CPU.
    source = generator.device if generator else codes.device
    order = torch.rand(B, codes_of_a_map, generator=generator, device=source)
    rank = order.to(codes.device, non_blocking=True).argsort(1).argsort(1)
    hidden = rank < number.to(codes.device, non_blocking=True)[:, None]
    return hidden.view_as(codes), int(number.sum())


def unmask(
    level: MaskedPrior,
    known: Sequence[Tensor | None],
    generators: Sequence[torch.Generator],
    sampling: Sampling,
    progress: Callable[[], object] | None,
) -> Tensor:
    """New maps (B, h, w) of one level, from maps all hidden (Chang et al. 2022, section 3.2).

    In every pass each hidden code is sampled. Those sampled with the highest probability, with some
    chance in it that fades from pass to pass, are kept. How many stay hidden falls along a cosine.
    Guidance (Ho & Salimans 2022, arXiv 2207.12598) is by the other map, the last of what is
    `known`.
    """
    B, N, K, T = len(generators), math.prod(level.shape), level.K, sampling.passes
    guided = sampling.guidance and known[-1] is not None
    context, table = level.context(*known), level.table()
    if guided:  # both in one batch: it takes less time than two
        context = torch.cat([context, level.context(*known[:-1])])
    times = len(context) // B, 1, 1
    device = level.rows.device
    codes = torch.full((B, N), K, device=device)

    def own_uniform() -> Tensor:  # (B, N) in (0, 1), from each slice's own generator
        rows = [torch.rand(N, generator=generator) for generator in generators]
        return torch.stack(rows).to(device).clamp_(1e-7, 1 - 1e-7)

    # The map is empty at first. A pass samples all that is hidden, keeps what the network is surest
    # of, and hides the rest again: the next pass sees what was kept.
    for i in range(1, T + 1):
        hidden = codes == K
        at = hidden.repeat(times[:2]).flatten().nonzero()[:, 0]
        seen = codes.view(B, *level.shape).repeat(times)
        # Of the codes of all slices that are still hidden: (M, K), or (2M, K) with guidance, the
        # second half without the other map.
        logits = level(seen, context, at, table).float()
        if guided:
            logits, without = logits.chunk(2)
            logits = logits + sampling.guidance * (logits - without)
        sampled = sample_codes(logits, own_uniform()[hidden], sampling.temperature)
        log_p = logits.gather(1, sampled[:, None])[:, 0] - logits.logsumexp(1)
        gumbel = -(-own_uniform()[hidden].log()).log()
        certainty = torch.full((B, N), math.inf, device=device)  # of codes that are shown already
        certainty[hidden] = log_p + sampling.spread * (1 - i / T) * gumbel
        stay_hidden = int(N * math.cos(math.pi / 2 * i / T)) if i < T else 0
        rank = certainty.argsort(1).argsort(1)  # 0 is the least certain code
        codes[hidden] = sampled
        codes[rank < stay_hidden] = K
        if progress:
            progress()
    return codes.view(B, *level.shape)


def sample_codes(logits: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
    """Codes (...) from logits (..., K): the cumulative distribution inverted at u (...) in (0, 1).

    At temperature 0 the likeliest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    total = (logits / temperature).softmax(-1).cumsum(-1)
    # The first code whose cumulative probability exceeds u: never one of probability 0.
    return torch.searchsorted(total, (u[..., None] * total[..., -1:]), right=True).squeeze(-1)
