"""The priors: exact likelihoods, causality, cached sampling, and what each argument of sampling does."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prior import CodePrior, Prior, PriorConfig, Walk, draw

UNKNOWN = math.nan


def small(K: int = 7, top_shape: tuple[int, int] = (4, 3), seed: int = 0, **options) -> Prior:
    """A prior far from uniform, bottom attention in stretches of one row: 8 of them in a map of 4 x 3 tops."""
    torch.manual_seed(seed)
    sizes = {"prior_channels": 16, "prior_heads": 2, "prior_top_layers": 2, "prior_bottom_layers": 2}
    sizes |= {"prior_condition_layers": 1, "prior_rows": 1, "prior_dropout": 0.0}
    prior = Prior(PriorConfig(K=K, **(sizes | options)), top_shape)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.4)
    return prior.eval()


def maps(prior: Prior, B: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    (h, w), random = prior.top_shape, torch.Generator().manual_seed(seed)
    top = torch.randint(prior.config.K, (B, h, w), generator=random)
    return top, torch.randint(prior.config.K, (B, 2 * h, 2 * w), generator=random)


def level(prior: Prior, name: str) -> tuple[CodePrior, Tensor, Tensor | None]:
    """A level, codes for it, and its condition."""
    top, bottom = maps(prior)
    return (prior.top, top, None) if name == "top" else (prior.bottom, bottom, prior.condition(top).detach())


@pytest.mark.parametrize(("name", "rows"), [("top", 1), ("bottom", 1), ("bottom", 3), ("bottom", 8)])
def test_logits_move_with_earlier_codes_and_with_no_other(name, rows):
    prior = small(prior_rows=rows)  # 3 rows do not divide the map's 8
    model, codes, condition = level(prior, name)
    (h, w), where = model.shape, torch.tensor([0.3, UNKNOWN])
    before = model(codes, condition, where).flatten(1, 2)
    for t in range(h * w):
        changed = codes.clone()
        changed.view(2, -1)[:, t] += 1
        moved = (model(changed % model.K, condition, where).flatten(1, 2) - before).abs().amax((0, 2))
        assert moved[: t + 1].max() == 0, f"the code at {t} moved logits at or before it"
        seen = min(h * w, (t // model.span + 2) * model.span)  # to the end of the next stretch
        assert moved[t + 1 : seen].gt(0).all(), f"the code at {t} did not move the logits after it"


def test_every_bottom_logit_sees_the_whole_top_map():
    prior = small()
    top, bottom = maps(prior)
    before = prior.nats(top, bottom, torch.full((2,), 0.5))["bottom"]
    for t in range(12):
        changed = top.clone()
        changed.view(2, -1)[:, t] += 1
        assert (prior.nats(changed % 7, bottom, torch.full((2,), 0.5))["bottom"] != before).all()


def test_the_condition_is_added_where_the_code_is_predicted():
    prior = small()
    model, codes, condition = level(prior, "bottom")
    changed = condition.clone()
    changed[:, :, 3, 2] += 1
    where = torch.full((2,), 0.5)
    moved = (model(codes, changed, where) - model(codes, condition, where)).abs().amax((0, 3)).flatten()
    at = 3 * model.shape[1] + 2
    assert moved[:at].max() == 0
    assert moved[at] > 0


@pytest.mark.parametrize("name", ["top", "bottom"])
def test_cached_logits_equal_uncached_ones(name):
    model, codes, condition = level(small(prior_rows=3), name)
    where = torch.tensor([0.3, UNKNOWN])
    with torch.inference_mode():
        expected = model(codes, condition, where).flatten(1, 2)
        walk = Walk(model, condition, where)
        for t, following in enumerate(codes.flatten(1).T):
            torch.testing.assert_close(walk.logits(), expected[:, t], atol=1e-5, rtol=1e-5)
            walk.put(following)
    assert torch.equal(walk.map(), codes)


def test_an_untrained_prior_is_uniform():
    prior = Prior(PriorConfig(K=512, prior_channels=16, prior_heads=2), (4, 3)).eval()
    top, bottom = maps(prior)
    for nats in prior.nats(top, bottom, torch.tensor([0.5, UNKNOWN])).values():
        assert nats.dtype == torch.float32
        torch.testing.assert_close(nats, torch.full_like(nats, math.log(512)))


def test_likelihoods_of_all_maps_sum_to_one():
    prior = small(K=2, top_shape=(2, 1))  # 4 top maps, each with 256 bottom maps of 4 stretches
    every = [torch.tensor(list(product(range(2), repeat=n))) for n in (2, 8)]
    top = every[0].view(4, 1, 2, 1).expand(4, 256, 2, 1).flatten(0, 1)
    bottom = every[1].view(1, 256, 4, 2).expand(4, 256, 4, 2).flatten(0, 1)
    nats = {name: value.double() for name, value in prior.nats(top, bottom, torch.full((1024,), 0.7)).items()}
    p_top = (-nats["top"].sum((1, 2))).exp().view(4, 256)
    p_bottom = (-nats["bottom"].sum((1, 2))).exp().view(4, 256)
    assert p_top[:, 0].sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(p_bottom.sum(1), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)


def test_codebooks_lay_out_embeddings_and_heads():
    """Distances between codes are those of the codebook, up to one scale."""
    prior = Prior(PriorConfig(K=7, prior_channels=16, prior_heads=2), (4, 3))
    codebooks = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    prior.start_from(*codebooks)
    for level, codebook in zip((prior.top, prior.bottom), codebooks, strict=True):
        for vectors in (level.embed.weight[:7], level.head.weight):
            ratio = torch.pdist(vectors.detach()) / torch.pdist(codebook)
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    torch.testing.assert_close(prior.condition.embed.weight, prior.top.head.weight)
    nats = prior.nats(*maps(prior), torch.tensor([0.5, UNKNOWN]))
    assert all((level - math.log(7)).abs().max() < 0.5 for level in nats.values())  # still near uniform
    with pytest.raises(ValueError, match="codebook of shape"):
        prior.start_from(codebooks[0], codebooks[1][:5])


def test_the_slice_position_moves_the_likelihood_of_every_code():
    prior = small()
    top, bottom = maps(prior, B=1)
    nats = [prior.nats(top, bottom, torch.tensor([z])) for z in (0.0, 0.5, 1.0, UNKNOWN)]
    for name in ("top", "bottom"):
        for i, one in enumerate(nats):
            assert one[name].isfinite().all()
            assert all((one[name] != other[name]).all() for other in nats[:i])


def test_a_sample_depends_on_its_seed_and_not_on_its_batch():
    prior = small(K=32, prior_dropout=0.5).train()  # which sampling does without
    positions, seeds = [0.1, UNKNOWN, 0.9, 0.1, 0.5], [11, 12, 13, 14, 11]
    state = torch.get_rng_state()
    together = prior.sample(positions, seeds)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up
    for i in range(5):
        alone = prior.sample(positions[i : i + 1], seeds[i : i + 1])
        assert all(torch.equal(alone[j][0], together[j][i]) for j in range(2))
    assert not torch.equal(together[0][0], together[0][3])
    assert not torch.equal(prior.sample([0.1, 0.1], [1, 2])[1][0], prior.sample([0.1, 0.1], [1, 2])[1][1])


def test_sampling_draws_from_the_likelihood():
    """The frequencies of all 16 top maps of a 2x2 prior over two codes, against `nats`."""
    prior, n = small(K=2, top_shape=(2, 2)), 4000
    tops = torch.tensor(list(product(range(2), repeat=4))).view(-1, 2, 2)
    bottoms = torch.zeros(16, 4, 4, dtype=torch.int64)
    expected = (-prior.nats(tops, bottoms, torch.full((16,), 0.2))["top"].sum((1, 2))).exp()
    drawn, _ = prior.sample([0.2] * n, range(n))
    found = torch.bincount((drawn.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / n
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / n).sqrt() + 1e-4).all()


def reference(logits: np.ndarray, u: float, temperature: float, top_k: int, top_p: float) -> int:
    """`draw` for one code, in words: rank, keep, renormalise, walk."""
    weights = np.exp((logits - logits.max()) / temperature)
    ranking = np.argsort(-logits)[: top_k or None]
    p = weights[ranking] / weights[ranking].sum()
    count = 1
    while p[:count].sum() < top_p and count < len(p):
        count += 1
    kept = sorted(ranking[:count])
    target, mass = u * weights[kept].sum(), 0.0
    for code in kept:
        mass += weights[code]
        if mass > target:
            return code
    return kept[-1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 3, 1.0),
        (1.0, 0, 0.6),
        (0.7, 6, 0.9),
        (1.0, 1, 1.0),
        (1.0, 99, 1e-9),
    ],
)
def test_draw_equals_the_reference(temperature, top_k, top_p):
    random = np.random.default_rng(0)
    logits, u = random.normal(0, 2, (400, 11)), random.random(400)
    drawn = draw(torch.from_numpy(logits), torch.from_numpy(u), temperature, top_k, top_p)
    assert drawn.tolist() == [
        reference(row, x, temperature, top_k, top_p) for row, x in zip(logits, u, strict=True)
    ]


def test_temperature_0_is_greedy_and_random_numbers_at_the_ends_are_safe():
    logits = torch.tensor([[-math.inf, 1.0, 3.0, -math.inf]])
    assert draw(logits, torch.tensor([0.1]), temperature=0) == 2
    assert draw(logits, torch.tensor([0.0], dtype=torch.float64)) == 1
    assert draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64)) == 2
    prior = small()
    first, second = prior.sample([0.5, 0.5], [1, 2], temperature=0)[1]
    assert torch.equal(first, second)


def test_it_learns_a_handful_of_maps_and_samples_them():
    prior = small(K=16, top_shape=(3, 2), prior_channels=32)
    for module in prior.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    top, bottom = maps(prior, B=3)
    positions = torch.tensor([0.0, 0.5, 1.0])
    optimiser = torch.optim.AdamW(prior.parameters(), 1e-2)
    for _ in range(60):
        nats = prior.train().nats(top, bottom, positions)
        optimiser.zero_grad()
        (nats["top"].sum() + nats["bottom"].sum()).backward()
        optimiser.step()
    assert sum(level.sum() for level in nats.values()) < 3 * math.log(2)
    calls = []
    sampled = prior.sample(positions, [5, 6, 7], progress=calls.append)
    assert torch.equal(sampled[0], top)
    assert torch.equal(sampled[1], bottom)
    assert sum(calls) == 5 * 6
    assert prior.training  # sampling turned dropout off in a copy


def test_bad_arguments_are_named():
    prior = small()
    top, bottom = maps(prior)
    where = torch.full((2,), 0.5)
    for arguments, message in (
        ((bottom, top, where), "top codes of shape"),
        ((top, bottom[:1], where), "bottom codes of shape"),
        ((top + 7, bottom, where), "top codes from 7 to"),
        ((top, bottom - 7, where), "bottom codes from -7 to"),
        ((top, bottom, where[:1]), "positions of shape"),
        ((top, bottom, where + 0.6), "position 1.1"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.nats(*arguments)
    for options in (
        {"temperature": -1},
        {"temperature": UNKNOWN},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            prior.sample([0.5], [0], **options)
    for positions, seeds in (([-0.1], [0]), ([2.0], [0]), ([0.5, 0.5], [0])):
        with pytest.raises(ValueError, match="position"):
            prior.sample(positions, seeds)
    for fields in ({"K": 0}, {"prior_channels": 11}, {"prior_dropout": 1.0}, {"prior_condition_layers": -1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            PriorConfig(**fields)
    with pytest.raises(ValueError, match="top_shape"):
        Prior(PriorConfig(), (0, 4))
