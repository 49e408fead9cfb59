import copy

import pytest
import torch
from torch import nn

from new_slices.prior import Prior, PriorConfig
from support.optimiser import Muon, orthogonalise, split_parameters


@pytest.mark.parametrize("shape", [(32, 100), (100, 32), (48, 48)])
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    # The result in x's singular basis.
    inner = u.transpose(1, 2) @ orthogonalise([x])[0] @ vh.transpose(1, 2)
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-9
    middle = values[:, : min(shape) // 2]  # the larger ones; the least may not have arrived
    assert middle.min() > 0.6 and values.max() < 1.25


def newton_schulz_as_published(x):
    """X <- a X + b (X X^T) X + c (X X^T)^2 X, five times (Jordan et al. 2024), of one matrix."""
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def test_stacks_of_many_shapes_are_each_orthogonalised_as_published():
    generator = torch.Generator().manual_seed(1)
    # Three of them have the shorter side 32.
    shapes = [(3, 32, 100), (2, 70, 32), (1, 48, 48), (2, 32, 33)]
    stacks = [torch.randn(*shape, generator=generator).double() for shape in shapes]
    for stack, found in zip(stacks, orthogonalise(stacks), strict=True):
        for x, y in zip(stack, found, strict=True):
            torch.testing.assert_close(y, newton_schulz_as_published(x), rtol=1e-6, atol=1e-8)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 3),
    )


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    x = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


def test_split_takes_wide_weights_of_layers():
    model = small()
    matrices, others = split_parameters(model)
    assert [tuple(weight.shape) for weight in matrices] == [(32, 16, 3, 3), (16, 32, 1, 1)]
    assert len(matrices) + len(others) == len(list(model.parameters()))


def test_split_leaves_embeddings_and_heads():
    prior = Prior(PriorConfig(K=32, prior_channels=32), (4, 2))
    matrices = {id(weight) for weight in split_parameters(prior)[0]}
    names = {name for name, parameter in prior.named_parameters() if id(parameter) in matrices}
    assert "bottom.blocks.0.qkv.weight" in names and "bottom.merge.weight" in names
    assert not any("embed" in name or "head" in name or "place" in name for name in names)


def test_a_step_is_muon_for_matrices_and_adamw_for_the_rest():
    model, reference = small(), small()
    muon = Muon(*split_parameters(model), lr=0.01, weight_decay=0.1)
    adam = torch.optim.AdamW(split_parameters(reference)[1], 0.01, weight_decay=0.1)
    means = [torch.zeros_like(weight) for weight in split_parameters(reference)[0]]
    for seed in range(3):
        backward(model, seed)
        muon.step()
        backward(reference, seed)
        for weight, mean in zip(split_parameters(reference)[0], means, strict=True):
            with torch.no_grad():
                mean.copy_(0.95 * mean + 0.05 * weight.grad)
                ahead = (0.05 * weight.grad + 0.95 * mean).flatten(1)
                update = 0.2 * max(ahead.shape) ** 0.5 * orthogonalise([ahead[None]])[0][0]
                weight.copy_(weight * (1 - 0.01 * 0.1) - 0.01 * update.view_as(weight))
        adam.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_saved_state_goes_on_alike():
    model = small()
    muon = Muon(*split_parameters(model), lr=0.01)
    backward(model, 0)
    muon.step()
    again = copy.deepcopy(model)
    loaded = Muon(*split_parameters(again), lr=1.0)
    loaded.load_state_dict(copy.deepcopy(muon.state_dict()))
    for each, optimiser in ((model, muon), (again, loaded)):
        backward(each, 1)
        optimiser.step()
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_memory_layout_does_not_matter():
    one, other = small(), small().to(memory_format=torch.channels_last)
    for model in (one, other):
        backward(model, 0)
        Muon(*split_parameters(model), lr=0.01).step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
