"""The masked priors against enumeration, brute force and an arithmetic coder."""

import itertools
import math

import constriction
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from new_slices import prior
from new_slices.prior import Prior, PriorConfig, Sampling, bound, random_masks, sample_codes

TINY = PriorConfig(K=5, prior_channels=16, prior_heads=2, prior_top_layers=1, prior_bottom_layers=1)


def make_prior(config: PriorConfig = TINY, shape: tuple[int, int] = (4, 2), seed: int = 0) -> Prior:
    """A prior with random weights everywhere, also in the heads, which start at zero."""
    torch.manual_seed(seed)
    model = Prior(config, shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def random_maps(model: Prior, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = {"generator": torch.Generator().manual_seed(0)}
    shapes = (count, *model.top.shape), (count, *model.bottom.shape)
    maps = [torch.randint(model.config.K, shape, **draw) for shape in shapes]
    return *maps, torch.rand(count, **draw)


def nats_in_order(model: Prior, codes: torch.Tensor, known, order) -> float:
    """-log p of one map (h, w), its codes shown one at a time in the order given."""
    level, total = model.top, 0.0
    context = torch.full((1, codes.numel()), model.config.K)
    for place in order:
        logits = level(context.view(1, *level.shape), level.context(*known)).flatten(1, 2)[0, place]
        total -= logits.log_softmax(0)[codes.flatten()[place]].item()
        context[0, place] = codes.flatten()[place]
    return total


@torch.inference_mode()
def test_the_bound_is_the_mean_over_all_orders():
    model = make_prior(shape=(2, 2))
    top, _, position = random_maps(model, 1)
    known = position, model.as_it_is(1)
    every_order = itertools.permutations(range(4))
    orders = [nats_in_order(model, top[0], known, order) for order in every_order]
    # Every set of hidden codes, weighed as `random_masks` makes them: first their number, then
    # their places.
    expected = 0.0
    for number in range(1, 5):
        sets = list(itertools.combinations(range(4), number))
        for hidden in sets:
            mask = torch.zeros(1, 4, dtype=torch.bool)
            mask[0, list(hidden)] = True
            mask = mask.view(1, 2, 2)
            logits = model.top(top.masked_fill(mask, TINY.K), model.top.context(*known))
            nats = F.cross_entropy(logits[mask], top[mask])
            expected += nats.item() / len(sets) / 4
    assert 4 * expected == pytest.approx(np.mean(orders), rel=1e-5)
    assert np.std(orders) > 0.01  # the orders do differ
    generator = torch.Generator().manual_seed(1)
    repeated = top.expand(4000, 2, 2), (position.expand(4000), model.as_it_is(4000))
    estimate = 4 * bound(model.top, *repeated, generator)
    error = estimate.std().item() / math.sqrt(4000)
    assert estimate.mean().item() == pytest.approx(np.mean(orders), abs=4 * error)


def test_an_untrained_prior_is_uniform():
    model = Prior(TINY, (4, 2))
    nats = model(*random_maps(model, 2), model.as_it_is(2))
    assert nats["top"].tolist() == pytest.approx([math.log(5)] * 2)
    assert nats["bottom"].tolist() == pytest.approx([math.log(5)] * 2)


@torch.inference_mode()
def test_an_arithmetic_coder_reaches_the_rate():
    model = make_prior(shape=(8, 4))
    top, _, position = random_maps(model, 1)
    known = position, model.as_it_is(1)
    order = np.random.default_rng(0).permutation(32)  # the decoder has the same seed
    family = constriction.stream.model.Categorical

    def code(place: int, context: torch.Tensor) -> constriction.stream.model.Categorical:
        logits = model.top(context.view(1, 8, 4), model.top.context(*known)).flatten(1, 2)[0, place]
        return family(logits.double().softmax(0).numpy(), perfect=False)

    codes, encoder = top.flatten(), constriction.stream.queue.RangeEncoder()
    context = torch.full((32,), TINY.K)
    for place in order:
        encoder.encode(int(codes[place]), code(place, context))
        context[place] = codes[place]
    file = encoder.get_compressed()

    decoder = constriction.stream.queue.RangeDecoder(file)
    decoded = torch.full((32,), TINY.K)
    for place in order:
        decoded[place] = int(decoder.decode(code(place, decoded)))
    assert decoded.equal(codes)
    bits = nats_in_order(model, top[0], known, order) / math.log(2)
    assert bits <= 32 * len(file) <= bits + 64  # whole words of 32 bits


@torch.inference_mode()
def test_sampled_maps_have_the_probability_of_the_model():
    # Two codes, each pass shows one of them in a random order.
    model = make_prior(PriorConfig(K=3, prior_channels=16, prior_heads=2, prior_patch=1), (1, 2))
    count, how = 6000, Sampling(passes=2, spread=1e9)
    known = torch.full((count,), 0.5), model.as_it_is(count)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    found = prior.unmask(model.top, known, generators, how, None)
    share = np.bincount((found[:, 0, 0] * 3 + found[:, 0, 1]).numpy(), minlength=9) / count
    known = torch.full((1,), 0.5), model.as_it_is(1)
    for codes in itertools.product(range(3), repeat=2):
        # The certainty's noise does not fade in the last pass but one: half of the maps start at
        # each place.
        orders = (0, 1), (1, 0)
        nats = [nats_in_order(model, torch.tensor([codes]), known, order) for order in orders]
        p = np.exp(np.negative(nats)).mean()
        error = 4 * math.sqrt(p / count)
        assert share[3 * codes[0] + codes[1]] == pytest.approx(p, abs=error)


def test_a_sample_depends_on_its_seed_and_position_and_not_on_its_batch():
    model = make_prior()
    how = Sampling(passes=3), Sampling(passes=3)
    top, bottom = model.sample([0.1, 0.5, math.nan], [1, 2, 3], *how)
    assert top.shape == (3, 4, 2) and bottom.shape == (3, 8, 4)
    assert bottom.min() >= 0 and bottom.max() < 5
    for i, (position, seed) in enumerate(((0.1, 1), (0.5, 2), (math.nan, 3))):
        alone = model.sample([position], [seed], *how)
        assert alone[0][0].equal(top[i]) and alone[1][0].equal(bottom[i])
    assert not model.sample([0.1], [4], *how)[1].equal(bottom[:1])
    assert not model.sample([0.9], [1], *how)[1].equal(bottom[:1])


def contexts_of(model: Prior, **how) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the top level saw in each pass (1, h, w), and the codes that came of it."""
    contexts = []
    model.top.register_forward_pre_hook(lambda module, inputs: contexts.append(inputs[0].clone()))
    return contexts, model.sample([0.5], [0], Sampling(**how), Sampling(passes=1))[0]


def test_each_pass_shows_more_codes_and_changes_none():
    contexts, top = contexts_of(make_prior(shape=(8, 4)), passes=6)
    hidden = [(context == TINY.K).sum().item() for context in contexts]
    assert hidden == [32, *(int(32 * math.cos(math.pi / 2 * i / 6)) for i in range(1, 6))]
    for context in contexts:
        shown = context != TINY.K
        assert context[shown].equal(top[shown])


@torch.inference_mode()
def test_without_spread_the_most_certain_codes_are_shown_first():
    model = make_prior(shape=(8, 4))
    contexts, _ = contexts_of(model, passes=4, temperature=0, spread=0)
    known = model.top.context(torch.tensor([0.5]), model.as_it_is(1))
    p = model.top(contexts[0], known).softmax(3).amax(3)
    shown = contexts[1] != TINY.K
    assert p[shown].min() >= p[~shown].max()


def test_the_bottom_sees_the_top_the_variant_and_the_position():
    model = make_prior()
    top, bottom, position = random_maps(model, 1)
    hidden, variant = torch.full_like(bottom, TINY.K), model.as_it_is(1)
    waves = []
    model.bottom.position.register_forward_pre_hook(lambda module, x: waves.extend(x[0]))
    model.bottom.context(torch.tensor([0.25]), variant, top)  # sines, then cosines, by octaves
    expected = [0.5**0.5, 1, 0, 0, 0, 0.5**0.5, 0, -1, 1, 1]
    assert waves[0].tolist() == pytest.approx(expected, abs=1e-5)
    logits = model.bottom(hidden, model.bottom.context(position, variant, top))
    for other in (
        (position, variant, (top + 1) % 5),
        (position, variant + 1, top),
        (1 - position, variant, top),
        (torch.tensor([math.nan]), variant, top),
    ):
        assert not logits.allclose(model.bottom(hidden, model.bottom.context(*other)))


def test_every_code_sees_every_other():
    model = make_prior(shape=(4, 4)).double()
    codes = torch.randint(5, (1, 4, 4))
    known = torch.tensor([0.5]), model.as_it_is(1)
    logits = model.top(codes, model.top.context(*known))
    for place in range(16):
        other = codes.clone().flatten()
        other[place] = (other[place] + 1) % 5
        changed = (model.top(other.view(1, 4, 4), model.top.context(*known)) != logits).any(3)
        assert changed.all()


@torch.inference_mode()
def test_a_block_attends_as_pytorch_does():
    """A convolution, PyTorch's own attention with several heads, an MLP; each adds to its input.

    So does the MLP that refines single codes.
    """
    model, C = make_prior(), 16
    block = model.top.blocks[0]
    x = torch.randn(2, C, 4, 3)
    attention = torch.nn.MultiheadAttention(C, 2, batch_first=True)
    names = zip(("in_proj_", "out_proj."), (block.qkv, block.out), strict=True)
    weights = {f"{name}{key}": of for name, part in names for key, of in part.state_dict().items()}
    attention.load_state_dict(weights)
    tokens = (x + block.conv(x)).flatten(2).mT
    seen = block.norm(tokens)
    tokens = tokens + attention(seen, seen, seen)[0]
    expected = (tokens + block.mlp(tokens)).mT.view(2, C, 4, 3)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    refine, hidden = model.top.refine[0], block.mlp
    channels_last = x.permute(0, 2, 3, 1)
    around = refine.conv(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(refine(channels_last), channels_last + refine.mlp(around))
    between = F.gelu(hidden.up(hidden.norm(tokens)))
    torch.testing.assert_close(hidden(tokens), hidden.down(between))


def test_maps_whose_sides_are_no_multiple_of_the_patch():
    model = make_prior(shape=(3, 5))
    top, bottom, position = random_maps(model, 2)
    known = position, model.as_it_is(2)
    assert model.top(top, model.top.context(*known)).shape == (2, 3, 5, 5)
    assert model.bottom(bottom, model.bottom.context(*known, top)).shape == (2, 6, 10, 5)


@torch.inference_mode()
def test_tokens_are_a_convolution_of_embedded_codes():
    level = make_prior(shape=(3, 5)).double().top
    codes = torch.randint(level.K + 1, (2, 3, 5))
    whole = F.pad(level.embed(codes).permute(0, 3, 1, 2), (0, 1, 0, 1))
    found = level.merge_codes(codes, level.table())
    assert torch.allclose(found, level.merge(whole), rtol=0, atol=1e-12)


@torch.inference_mode()
def test_the_logits_of_some_codes_are_those_of_the_whole_map():
    model = make_prior(shape=(3, 5)).double()
    level = model.top
    codes, at = torch.randint(level.K + 1, (2, 3, 5)), torch.rand(2, 3, 5) < 0.5
    context = level.context(torch.tensor([0.2, 0.7]), model.as_it_is(2))
    whole, asked = level(codes, context), at.flatten().nonzero()[:, 0]
    for table in (None, level.table()):  # as in training, and as in sampling
        some = level(codes, context, asked, table)
        assert torch.allclose(some, whole[at], rtol=0, atol=1e-12)


def test_random_masks_hide_a_uniform_number_of_codes_at_uniform_places():
    generator = torch.Generator().manual_seed(0)
    drawn = [random_masks(torch.zeros(8, 2, 2), generator) for _ in range(500)]
    assert all(mask.sum() == count for mask, count in drawn)
    masks = torch.cat([mask for mask, _ in drawn])
    share = masks.sum((1, 2)).bincount(minlength=5) / 4000
    assert share[0] == 0 and share[1:].numpy() == pytest.approx([0.25] * 4, abs=0.03)
    assert masks.double().mean(0).numpy() == pytest.approx(np.full((2, 2), 0.625), abs=0.03)


def test_sampling_a_code_inverts_the_cumulative_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator)
    u = torch.rand(40_000, generator=generator)
    for temperature in (1.0, 0.5):
        expected = (logits / temperature).softmax(0)
        codes = sample_codes(logits.expand(40_000, 6), u, temperature)
        found = codes.bincount(minlength=6) / 40_000
        assert found.numpy() == pytest.approx(expected.numpy(), abs=0.01)
    assert (sample_codes(logits.expand(3, 6), u[:3], temperature=0) == logits.argmax()).all()


def test_training_learns_what_follows_from_the_rest():
    # The right half is the mirror image of the left, and the bottom repeats the top.
    torch.manual_seed(0)
    model = Prior(TINY, (4, 4))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        left = torch.randint(5, (32, 4, 2))
        top = torch.cat([left, left.flip(2)], 2)
        bottom = top.repeat_interleave(2, 1).repeat_interleave(2, 2)
        losses = model(top, bottom, torch.full((32,), math.nan), model.as_it_is(32))
        optimiser.zero_grad()
        sum(loss.mean() for loss in losses.values()).backward()
        optimiser.step()
    model.eval()
    top, bottom = model.sample([math.nan] * 8, range(8), Sampling(16, temperature=0.2, spread=4))
    assert (top == top.flip(2)).double().mean() > 0.8  # 0.2 by chance
    assert (bottom == top.repeat_interleave(2, 1).repeat_interleave(2, 2)).double().mean() > 0.95
    # And they are not all one map.
    assert len({tuple(codes.flatten().tolist()) for codes in top}) > 4


def test_branches_start_small_and_a_codebook_starts_the_embeddings():
    torch.manual_seed(0)
    model = Prior(PriorConfig(K=64, prior_channels=64, prior_top_layers=4), (4, 2))
    for block in model.top.blocks:
        for weight in (block.out.weight, block.mlp.down.weight):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
        assert block.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    codebook = torch.randn(64, 32)
    model.start_from(codebook, codebook + 1)
    embedded = model.top.embed.weight[:64]
    apart = [torch.cdist(x, x).flatten() for x in (embedded, codebook)]
    assert torch.corrcoef(torch.stack(apart))[0, 1] > 0.99
    assert embedded.std().item() == pytest.approx(0.02, rel=1e-4)
    assert model.bottom.condition.weight[:-1].equal(embedded)
    for level in (model.top, model.bottom):  # at the output too; about the mean of a codebook
        assert level.head.weight.equal(level.embed.weight[:64])
        assert level.head.weight.mean(0).abs().max() < 1e-6


def test_bad_arguments_say_what_was_expected():
    model = make_prior()
    for positions, seeds, said in (
        ([0.5, 1.5], [0, 1], r"position 1\.5"),
        ([], [], "no seeds"),
        ([0.5], [1, 2], r"expected \(2,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            model.sample(positions, seeds)
    with pytest.raises(ValueError, match="multiple of --prior-heads"):
        PriorConfig(prior_channels=30)
