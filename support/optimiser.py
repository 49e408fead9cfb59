"""Muon: steps along the nearest orthogonal matrix of the momentum, for hidden layers' weights.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon), with the step size of Liu et al. 2025, "Muon is Scalable for
LLM Training" (arXiv 2502.16982, equation 4), so that one learning rate suits both the matrices and
AdamW's parameters. `torch.optim.Muon` does not take convolutions, and rounds to bfloat16, which is
slow on hardware without it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# Jordan's: five iterations move singular values to 0.7 .. 1.2.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95
# AdamW takes weights with a shorter side: their matrices are too small to orthogonalise.
SHORTEST_SIDE = 16


def orthogonalise(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Stacks of matrices (n, rows, columns), their singular values moved to about 1.

    Newton-Schulz: every iteration multiplies x by a polynomial of its Gram matrix x x^T. These
    polynomials commute, so the iterations run on the Gram matrix, whose side is the shorter one of
    x, and x is multiplied once at the end. Matrices with equal shorter sides iterate together,
    whatever their longer sides: fewer launches on a GPU.
    """
    wide = [x.mT if x.shape[1] > x.shape[2] else x for x in stacks]
    same_side = defaultdict(list)
    for i, x in enumerate(wide):
        same_side[x.shape[1]].append(i)
    results = list(stacks)
    for members in same_side.values():
        grams = torch.cat([wide[i] @ wide[i].mT for i in members])
        factors = newton_schulz(grams).split([len(wide[i]) for i in members])
        for i, factor in zip(members, factors, strict=True):
            x = factor @ wide[i]
            results[i] = x.mT if wide[i] is not stacks[i] else x
    return results


def newton_schulz(gram: Tensor) -> Tensor:
    """Gram matrices x x^T (n, side, side) -> the factors that move x's singular values to 1."""
    a, b, c = COEFFICIENTS

    def polynomial(gram: Tensor) -> Tensor:  # a I + b gram + c gram^2
        result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        result.diagonal(dim1=1, dim2=2).add_(a)
        return result

    squared_norm = gram.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)  # of x: the trace of x x^T
    norm = squared_norm.sqrt() + 1e-7
    gram = gram / norm.square()
    product = factor = polynomial(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        product = factor @ product
    return product / norm


class Muon(torch.optim.AdamW):
    """Muon for the weights `matrices`, AdamW for all `others`, with one `lr` and `weight_decay`.

    A convolution's weight (out, in, h, w) counts as the matrix (out, in*h*w).
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        **adam,
    ):
        groups = [{"params": list(matrices), "matrices": True}]
        groups += [{"params": list(others), "matrices": False}]
        super().__init__(groups, lr, weight_decay=weight_decay, **adam)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if group["matrices"] and group["params"]:
                self.step_matrices(group["params"], group["lr"], group["weight_decay"])
        super().step()

    def step_matrices(self, weights: list[Tensor], lr: float, decay: float) -> None:
        for weight in weights:
            if not self.state[weight]:
                # AdamW, which loads the state, expects a count of steps in it.
                self.state[weight] = {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
        gradients, means = [w.grad for w in weights], [self.state[w]["momentum"] for w in weights]
        torch._foreach_lerp_(means, gradients, 1 - MOMENTUM)
        # Nesterov's momentum takes the place of the gradients.
        torch._foreach_lerp_(gradients, means, MOMENTUM)
        same_shape = defaultdict(list)
        for weight, gradient in zip(weights, gradients, strict=True):
            pair = as_matrix(weight, weight), as_matrix(gradient, weight)
            same_shape[len(weight), weight[0].numel()].append(pair)
            weight.grad = None  # so that AdamW skips it
        stacks = [torch.stack([gradient for _, gradient in pairs]) for pairs in same_shape.values()]
        targets = [target for pairs in same_shape.values() for target, _ in pairs]
        updates = [update for stack in orthogonalise(stacks) for update in stack.unbind()]
        torch._foreach_mul_(updates, [0.2 * max(update.shape) ** 0.5 for update in updates])
        torch._foreach_mul_(updates, lr)
        torch._foreach_mul_(targets, 1 - lr * decay)
        torch._foreach_sub_(targets, updates)


def as_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """A view of x, as `weight` lies in memory: (out, columns), whose order changes no step."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of `model` that are matrices between hidden layers, and all its other parameters.

    As Jordan advises, embeddings and the layers named `head`, which make logits, belong to the
    others.
    """
    matrices, others = [], []
    for name, module in model.named_modules():
        layer = isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
        for parameter in module.parameters(recurse=False):
            wide = parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) >= SHORTEST_SIDE
            hidden = layer and wide and name.split(".")[-1] != "head"
            (matrices if hidden else others).append(parameter)
    return matrices, others
