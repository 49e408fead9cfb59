"""Muon: steps along the nearest orthogonal matrix of the momentum, for a network's hidden weights.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon),
with the step size of Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982, equation 4), so that
one learning rate serves the matrices and AdamW's parameters alike. `torch.optim.Muon` takes no convolutions,
and rounds to bfloat16, which is slow where the hardware has none.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: singular values go to 0.7 .. 1.2 in five iterations
LEAST = 16  # a weight with a shorter side is no matrix to speak of


def orthogonalise(x: Tensor, iterations: int = 5) -> Tensor:
    """Matrices (n, rows, columns) with their singular values all moved close to 1, by Newton and Schulz.

    Every iteration multiplies x by a polynomial of its Gram matrix x x^T. These commute, so the iterations are done
    on the Gram matrix, whose side is x's shorter one, and x is multiplied once.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.transpose(1, 2)
    identity = torch.eye(len(gram[0]), device=x.device, dtype=x.dtype)
    product = factor = identity.expand_as(gram)
    for i in range(iterations):
        if i:
            gram = factor @ gram @ factor
        factor = torch.baddbmm(a * identity + b * gram, gram, gram, alpha=c)
        product = factor @ product
    x = product @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.AdamW):
    """Muon for the weights `matrices`, AdamW for all `others`; `lr` and `weight_decay` are of both.

    A convolution's weight (out, in, h, w) counts as the matrix (out, in*h*w).
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        **adam,
    ):
        groups = [
            {"params": list(matrices), "matrices": True},
            {"params": list(others), "matrices": False},
        ]
        super().__init__(groups, lr, weight_decay=weight_decay, **adam)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group["matrices"]:
                self.step_matrices(group["params"], group["lr"], group["weight_decay"])
        super().step()

    def step_matrices(self, weights: list[Tensor], lr: float, decay: float) -> None:
        alike = defaultdict(list)  # matrices of one shape take their step together
        for weight in weights:
            if weight.grad is not None:
                alike[len(weight), weight[0].numel()].append(weight)
        for shape, weights in alike.items():
            ahead = []
            for weight in weights:
                if not self.state[weight]:  # AdamW, which reads its state back, expects a count of steps
                    self.state[weight] = {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
                mean = self.state[weight]["momentum"].lerp_(weight.grad, 1 - self.momentum)
                ahead.append(weight.grad.lerp(mean, self.momentum).reshape(shape))  # Nesterov's
                weight.grad = None  # so that AdamW passes it by
            updates = orthogonalise(torch.stack(ahead)) * (0.2 * max(shape) ** 0.5)
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - lr * decay).sub_(update.view_as(weight), alpha=lr)


def split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of `model` that are matrices between hidden layers, and all its other parameters.

    As Jordan advises, embeddings and the layers named `head`, which make logits, are none of the first.
    """
    matrices, others = [], []
    for name, module in model.named_modules():
        layer = isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
        for parameter in module.parameters(recurse=False):
            wide = parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) >= LEAST
            hidden = layer and wide and name.split(".")[-1] != "head"
            (matrices if hidden else others).append(parameter)
    return matrices, others
