"""The priors over code maps: p(top) and p(bottom | top). Integers in, likelihoods or new maps out; no pixels.

Razavi, van den Oord & Vinyals 2019 (arXiv 1906.00446), section 3.2: each level is autoregressive in raster
order, and the bottom is conditioned on the whole top map,

    p(top, bottom | z) = prod_t p(top_t | top_<t, z)  prod_t p(bottom_t | bottom_<t, top, z),

where z is the slice's relative position in its volume, or unknown. Their PixelSNAIL is here a small causal
transformer (Vaswani et al. 2017, pre-norm) that starts from a masked convolution over the nearest codes.

    codes before t --> masked convolution ---------+--> causal blocks --> logits of the code at t
    row, column and slice position ----------------+
    the same --> MLP ------------------------------+    (top level: what tends to be there)
    top map --> unmasked blocks --> x2 ------------+    (bottom level: the top around t)
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime import option

# (row, column) offsets of the codes that the masked convolution reads: all earlier in raster order
NEIGHBOURS = ((0, -1), (0, -2), (-1, -1), (-1, 0), (-1, 1), (-2, 0))
REACH = 2  # the farthest of them, hence the border around a map
EXPAND = 2  # the MLP's hidden channels over its own


@dataclass(frozen=True)
class PriorConfig:
    """The shape of both priors. The defaults suit some ten thousand slices: larger ones learn them by heart."""

    K: int = option(512, "codes in each codebook")
    prior_channels: int = option(128, "channels of the priors")
    prior_heads: int = option(2, "attention heads of the priors")
    prior_top_layers: int = option(3, "causal blocks of p(top)")
    prior_bottom_layers: int = option(2, "causal blocks of p(bottom | top)")
    prior_condition_layers: int = option(1, "unmasked blocks that read the top map for the bottom")
    prior_rows: int = option(2, "rows a bottom code looks back at the least; at the most twice as many")
    prior_dropout: float = option(0.1, "dropout after every sublayer of the priors")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("prior_dropout", "prior_condition_layers") else 1
            if not value >= least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if self.prior_channels % self.prior_heads:
            raise ValueError(f"prior_channels is {self.prior_channels}; expected a multiple of prior_heads")
        if self.prior_dropout >= 1:
            raise ValueError(f"prior_dropout is {self.prior_dropout}; expected less than 1")


class MLP(nn.Sequential):
    """(..., C) -> (..., C): normalised, then one hidden layer with GELU; `down` begins small, see `reset`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, EXPAND * channels)
        self.gelu = nn.GELU()
        self.down = nn.Linear(EXPAND * channels, channels)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP with GELU.

    With `span` 0 every position attends to all. With a span of W the sequence is cut into stretches of W, and
    a position attends to itself, to those before it in its own stretch and to all of the stretch before: up to
    2W keys, at a cost linear in the length. A W of the whole length is plain causal attention.
    """

    def __init__(self, config: PriorConfig, span: int = 0):
        super().__init__()
        C = config.prior_channels
        self.heads, self.span = config.prior_heads, span
        self.norm1, self.mlp = nn.LayerNorm(C), MLP(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.dropout = nn.Dropout(config.prior_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        return self.finish(x, self.attend(self.qkv(self.norm1(x))))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.mlp(x))

    def attend(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values of all positions, (B, N, 3C) -> (B, N, C)."""
        B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        W = self.span or N
        n = math.ceil(N / W)
        qkv = F.pad(qkv, (0, 0, 0, n * W - N))  # behind the end, where none of the N queries looks
        q, k, v = qkv.view(B, n, W, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)  # each (B, n, heads, W, d)
        y = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], is_causal=self.span > 0).unsqueeze(1)
        if n > 1:
            k, v = (torch.cat([x[:, :-1], x[:, 1:]], 3).flatten(0, 1) for x in (k, v))
            seen = torch.ones(W, 2 * W, dtype=torch.bool, device=k.device).tril(W)
            rest = F.scaled_dot_product_attention(q[:, 1:].flatten(0, 1), k, v, attn_mask=seen)
            y = torch.cat([y, rest.unflatten(0, (B, n - 1))], 1)
        return y.transpose(2, 3).reshape(B, n * W, C)[:, :N]  # (B, n, heads, W, d) -> (B, N, C)

    def step(self, x: Tensor, cache: Tensor, first: int, last: int) -> Tensor:
        """One position, x (B, C) -> (B, C), which attends to the slots `first` to `last` of its cache.

        cache (2, B, heads, slots, d): keys and values; those of this position go to the slot `last`.
        """
        q, *kv = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).unbind(1)
        cache[:, :, :, last] = torch.stack(kv)
        k, v = cache[:, :, :, first : last + 1]
        return self.finish(x, F.scaled_dot_product_attention(q.unsqueeze(2), k, v).view_as(x))


class SlicePosition(nn.Module):
    """The slice's relative position in its volume, (B,) in [0, 1] or NaN for unknown -> (B, C).

    `mirrored` (B,) is True for slices that training turned left to right: told so, it samples none.
    """

    def __init__(self, channels: int, octaves: int = 5):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(octaves), persistent=False)
        self.known = nn.Linear(2 * octaves, channels)
        self.unknown = nn.Parameter(torch.zeros(channels))
        self.mirror = nn.Parameter(torch.zeros(channels))

    def forward(self, position: Tensor, mirrored: Tensor | None = None) -> Tensor:
        angles = position.to(self.frequencies).nan_to_num()[:, None] * self.frequencies
        known = self.known(torch.cat([angles.sin(), angles.cos()], 1))
        x = torch.where(position.isnan()[:, None], self.unknown, known)
        return x if mirrored is None else x + mirrored[:, None] * self.mirror


class CodePrior(nn.Module):
    """One level: the distribution of every code of a map given those before it in raster order.

    `shape` is the map's height and width, `layers` the number of causal blocks, `rows` how many rows make a
    stretch of their attention (see `Block`); 0 means the whole map. `conditioned`: something is known about each
    place beforehand, as the top map is for the bottom.
    """

    def __init__(
        self,
        config: PriorConfig,
        shape: tuple[int, int],
        layers: int,
        rows: int = 0,
        conditioned: bool = False,
    ):
        super().__init__()
        (h, w), C = shape, config.prior_channels
        self.K, self.shape = config.K, shape
        self.span = min(rows or h, h) * w
        self.embed = nn.Embedding(config.K + 1, C)  # the last stands for what lies outside the map
        self.mix = nn.Linear(C, len(NEIGHBOURS) * C, bias=False)  # the masked convolution
        self.place = nn.Parameter(torch.zeros(h + w, C))  # of rows, then of columns
        self.position = SlicePosition(C)
        self.anatomy = None if conditioned else MLP(C)  # what tends to be at this place of this slice
        self.dropout = nn.Dropout(config.prior_dropout)
        self.blocks = nn.ModuleList(Block(config, self.span) for _ in range(layers))
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, config.K)
        reset(self)
        nn.init.normal_(self.mix.weight, std=C**-0.5)
        nn.init.zeros_(self.head.weight)  # an untrained prior is uniform
        inside = F.pad(torch.ones(h, w), [REACH] * 4).flatten().nonzero().flatten()
        inside = F.pad(inside, (REACH, 0))  # slot 0 is border; before the first code lie two more of it
        # A row's first codes read the end of the row above as what is left of them, so that attention, which
        # sees a code only through those that have read it, has every code from the very next position on.
        left = {j: inside[REACH + j : len(inside) + j] for j in (-1, -2)}
        reads = [left[j] if i == 0 else inside[REACH:] + i * (w + 2 * REACH) + j for i, j in NEIGHBOURS]
        # where in a bordered, flattened map each position is, (h*w,), and its neighbours, (h*w, neighbours)
        self.register_buffer("slots", inside[REACH:], persistent=False)
        self.register_buffer("reads", torch.stack(reads, 1), persistent=False)

    def forward(
        self, codes: Tensor, condition: Tensor | None, position: Tensor, mirrored: Tensor | None = None
    ) -> Tensor:
        """Logits (B, h, w, K) of each of the codes (B, h, w), int64 in [0, K), given those before it.

        condition (B, C, h, w) is what a conditioned level knows of each place, None for another; position (B,)
        is the slice's in its volume, in [0, 1], NaN for unknown; mirrored (B,) as in `SlicePosition`.
        """
        x = self.read(self.bordered(codes)[:, self.reads], self.table())
        x = x + self.given(condition, position, mirrored)
        x = self.dropout(x)  # (B, h*w, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).unflatten(1, self.shape)

    def bordered(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, (h + 4)(w + 4)), with the code K for outside."""
        return F.pad(codes, [REACH] * 4, value=self.K).flatten(1)

    def table(self) -> Tensor:
        """What every code contributes from every neighbour's place, ((K + 1) * neighbours, C)."""
        return self.mix(self.embed.weight).view(-1, self.embed.embedding_dim)

    def read(self, neighbours: Tensor, table: Tensor) -> Tensor:
        """The masked convolution at the codes (..., neighbours) -> (..., C): a look-up, no product."""
        n = len(NEIGHBOURS)
        rows = neighbours * n + torch.arange(n, device=neighbours.device)
        return F.embedding_bag(rows.view(-1, n), table, mode="sum").view(*neighbours.shape[:-1], -1)

    def given(self, condition: Tensor | None, position: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """All that does not depend on this level's codes, (B, h*w, C)."""
        x = places(self.place, self.shape) + self.position(position, mirrored)[:, None]
        return x + (condition.flatten(2).transpose(1, 2) if self.anatomy is None else self.anatomy(x))


class Walk:
    """The logits of a `CodePrior` one position at a time: `logits()`, then `put(codes)`, h*w times.

    Each block keeps the keys and values of two stretches; when the second is full it becomes the first, so
    memory does not grow with the map.
    """

    def __init__(self, level: CodePrior, condition: Tensor | None, position: Tensor):
        self.level, self.given, self.t = level, level.given(condition, position), 0
        B, N, C = self.given.shape
        self.front = level.span if level.span < N else 0  # slots for the stretch before
        self.caches = [
            self.given.new_empty(2, B, block.heads, self.front + level.span, C // block.heads)
            for block in level.blocks
        ]
        self.table = level.table()
        self.codes = level.bordered(torch.full((B, *level.shape), level.K, device=self.given.device))

    def logits(self) -> Tensor:
        """(B, K), of the code at position t given those put so far."""
        level, inside = self.level, self.t % self.level.span
        if self.t and inside == 0:
            for cache in self.caches:
                cache[:, :, :, : level.span] = cache[:, :, :, level.span :]
        first = 0 if self.t >= level.span else self.front
        x = level.read(self.codes[:, level.reads[self.t]], self.table) + self.given[:, self.t]
        for block, cache in zip(level.blocks, self.caches, strict=True):
            x = block.step(x, cache, first, self.front + inside)
        return level.head(level.norm(x))

    def put(self, codes: Tensor) -> None:
        """codes (B,) int64 in [0, K), at position t; go on to the next."""
        self.codes.index_copy_(1, self.level.slots[self.t, None], codes[:, None])
        self.t += 1

    def map(self) -> Tensor:
        """The codes put so far, (B, h, w); K where there is none yet."""
        return self.codes[:, self.level.slots].unflatten(1, self.level.shape)


class TopReader(nn.Module):
    """The whole top map as the bottom prior sees it, (B, h, w) int64 -> (B, C, 2h, 2w)."""

    def __init__(self, config: PriorConfig, shape: tuple[int, int]):
        super().__init__()
        C = config.prior_channels
        self.embed = nn.Embedding(config.K, C)
        self.near = nn.Conv2d(C, C, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(sum(shape), C))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.prior_condition_layers))
        self.up = nn.ConvTranspose2d(C, C, 2, stride=2)
        reset(self)

    def forward(self, top: Tensor) -> Tensor:
        x = self.embed(top).permute(0, 3, 1, 2)  # (B, C, h, w)
        x = (x + self.near(x)).flatten(2).transpose(1, 2) + places(self.place, top.shape[1:])  # (B, h*w, C)
        for block in self.blocks:
            x = block(x)
        return self.up(x.transpose(1, 2).unflatten(2, top.shape[1:]))


def places(place: Tensor, shape: tuple[int, int]) -> Tensor:
    """Embeddings of h rows and w columns, (h + w, C) -> their sum at every position, (h*w, C)."""
    rows, columns = place.split(list(shape))
    return (rows[:, None] + columns).flatten(0, 1)


def reset(module: nn.Module) -> None:
    """GPT-2's initialisation: normal with standard deviation 0.02, less in what adds to the residual stream."""
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            branch = name.endswith(("out.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * len(module.blocks)) if branch else 0.02
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)


class Prior(nn.Module):
    """Both levels, for top maps of `top_shape` and bottom maps of twice its height and width."""

    def __init__(self, config: PriorConfig, top_shape: tuple[int, int]):
        super().__init__()
        if len(top_shape) != 2 or min(top_shape) < 1:
            raise ValueError(f"top_shape is {top_shape}; expected a height and a width of at least 1")
        h, w = top_shape
        self.config, self.top_shape = config, (h, w)
        self.top = CodePrior(config, (h, w), config.prior_top_layers)
        self.bottom = CodePrior(
            config, (2 * h, 2 * w), config.prior_bottom_layers, config.prior_rows, conditioned=True
        )
        self.condition = TopReader(config, (h, w))

    @torch.no_grad()
    def start_from(self, codebook_top: Tensor, codebook_bottom: Tensor) -> None:
        """Start the embeddings and heads from the autoencoder's codebooks, each (K, D): call before training.

        Codes that mean almost the same then start almost the same, at the input and at the output, and a rare
        one learns from its neighbours.
        """
        for level, codebook in ((self.top, codebook_top), (self.bottom, codebook_bottom)):
            if codebook.ndim != 2 or len(codebook) != self.config.K:
                raise ValueError(
                    f"a codebook of shape {tuple(codebook.shape)}; expected ({self.config.K}, D)"
                )
            turn = nn.init.orthogonal_(torch.empty(codebook.shape[1], self.config.prior_channels))
            vectors = (codebook - codebook.mean(0)) @ turn.to(codebook)
            vectors *= 0.02 / vectors.std().clamp_min(1e-12)  # as large as `reset` makes them
            level.embed.weight[: self.config.K] = vectors
            level.head.weight.copy_(vectors)
        self.condition.embed.weight.copy_(self.top.embed.weight[: self.config.K])

    def nats(self, top: Tensor, bottom: Tensor, position: Tensor) -> dict[str, Tensor]:
        """-log p of every code in nats, exact, float32: "top" (B, h, w), "bottom" (B, 2h, 2w).

        top and bottom are int64 in [0, K), position (B,) in [0, 1] or NaN for unknown; ValueError if not.
        """
        maps = {"top": top, "bottom": bottom}
        for name, codes in maps.items():
            expected = (len(top), *getattr(self, name).shape)
            if codes.shape != expected:
                raise ValueError(f"{name} codes of shape {tuple(codes.shape)}; expected {expected}")
            if codes.min() < 0 or codes.max() >= self.config.K:
                ends = f"{codes.min()} to {codes.max()}"
                raise ValueError(f"{name} codes from {ends}; expected 0 to {self.config.K - 1}")
        check_positions(position, len(top))
        return self(top, bottom, position)

    def forward(
        self, top: Tensor, bottom: Tensor, position: Tensor, mirrored: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`nats` without its checks, for which a GPU would have to be waited for: a training step's.

        bottom may be that of the first n slices alone.
        """
        maps, n = {"top": top, "bottom": bottom}, len(bottom)
        first = position[:n], mirrored if mirrored is None else mirrored[:n]
        logits = self.top(top, None, position, mirrored), self.bottom(bottom, self.condition(top[:n]), *first)
        return {
            name: F.cross_entropy(values.float().flatten(0, 2), codes.flatten(), reduction="none").view_as(
                codes
            )
            for (name, codes), values in zip(maps.items(), logits, strict=True)
        }

    def head_device(self) -> torch.device:
        return self.top.head.weight.device

    @torch.inference_mode()
    def sample(
        self,
        positions: Sequence[float] | Tensor,
        seeds: Sequence[int],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """New code maps, top (B, h, w) and bottom (B, 2h, 2w), int64 in [0, K).

        A sample depends on its position, its seed and the settings, not on its batch: its random numbers are
        its own, and float64 keeps the rounding that differs between batches too small to change a draw.

        Args:
            positions, seeds: B values in [0, 1], NaN for unknown; B integers.
            temperature: divides the logits; 0 takes the likeliest code every time.
            top_k: draw among this many likeliest codes; 0 means all.
            top_p: draw among the fewest codes that hold this much probability, in (0, 1].
            progress: called with 1 after each of the 5*h*w positions.

        Raises:
            ValueError: an argument out of its range, no seed, or not as many positions as seeds.
        """
        check_sampling(temperature, top_k, top_p)
        if not len(seeds):
            raise ValueError("no seeds; expected one for each slice")
        device, (h, w) = self.head_device(), self.top_shape
        positions = torch.as_tensor(positions, dtype=torch.float64, device=device)
        check_positions(positions, len(seeds))
        model = copy.deepcopy(self).double().eval()
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        uniforms = torch.stack([torch.rand(5 * h * w, generator=g, dtype=torch.float64) for g in generators])

        def walked(walk: Walk, uniforms: Tensor) -> Tensor:
            for u in uniforms.unbind(1):  # (B,)
                walk.put(draw(walk.logits(), u, temperature, top_k, top_p))
                if progress:
                    progress(1)
            return walk.map()

        uniforms_top, uniforms_bottom = uniforms.to(device).split([h * w, 4 * h * w], 1)
        top = walked(Walk(model.top, None, positions), uniforms_top)
        return top, walked(Walk(model.bottom, model.condition(top), positions), uniforms_bottom)


def draw(logits: Tensor, u: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Codes (B,) from logits (B, K) by inversion of their cumulative distribution at u (B,) in [0, 1).

    temperature, top_k and top_p, applied in this order, are those of `Prior.sample`.
    """
    if temperature == 0:
        return logits.argmax(1)
    logits = logits.double() / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -math.inf)
    p = logits.softmax(1)
    if top_p < 1:
        ranked = p.sort(1, descending=True)[0]
        out = ranked.cumsum(1) - ranked >= top_p  # what is likelier holds enough
        p = p.masked_fill(p < ranked.masked_fill(out, math.inf).amin(1, keepdim=True), 0)
    total = p.cumsum(1)
    # the first code whose cumulative probability exceeds u: never one of probability 0
    return torch.searchsorted(total, u[:, None] * total[:, -1:], right=True).squeeze(1)


def check_positions(position: Tensor, count: int) -> None:
    if position.shape != (count,):
        raise ValueError(f"positions of shape {tuple(position.shape)}; expected ({count},), one a slice")
    outside = (position < 0) | (position > 1)  # NaN is neither
    if outside.any():
        raise ValueError(f"position {position[outside][0].item():g}; expected 0 to 1, or NaN for unknown")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected 0 (the likeliest code) or more")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; expected 0 (all codes) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected 0 < top_p <= 1")
