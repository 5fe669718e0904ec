"""What is learned for every single element of the merged weights, shared by all tasks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adamerge import InputError


class Elements(nn.Module, ABC):
    """Changes the sum of weighted task vectors element by element: θ_l = θ₀_l + f_l(Σₖ λₖ τ_lk).

    As large as the model while it learns, and nothing afterwards: the outcome is one set of merged weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList()
        self._place: dict[str, int] = {}

    def bind(self, tensors: Mapping[str, Tensor]) -> "Elements":
        """Create a parameter of zeros for each of these tensors; called once, by the merged model."""
        if self._place:
            raise InputError(f"this {type(self).__name__} belongs to another merged model already; build a new one")
        self._place = {name: place for place, name in enumerate(tensors)}
        for tensor in tensors.values():
            dtype = torch.promote_types(torch.float32, tensor.dtype)
            self.values.append(nn.Parameter(torch.zeros_like(tensor, dtype=dtype, requires_grad=True)))
        return self

    def of(self, name: str) -> nn.Parameter:
        """What is learned for one tensor."""
        value: nn.Parameter = self.values[self._place[name]]
        return value

    def state(self) -> tuple[int, ...]:
        """Differs after every change of the values."""
        return tuple(value._version for value in self.values)

    @abstractmethod
    def forward(self, name: str, change: Tensor) -> Tensor:
        """Σₖ λₖ τ_lk of tensor `name`, any shape -> what is added to the base, of the same shape."""


class ConcreteMask(Elements):
    """A learned soft mask on the task vectors, the same for all of them (Concrete subspace, arXiv:2312.06173).

    m = σ((logit u + x) / T) with u uniform in (0, 1), divided by its mean over the tensor; x begins at 0. While it
    learns, u is drawn anew at every step; else u = 1/2, so that what is evaluated and exported is one fixed mask.
    Published code evaluates a single random draw instead.

    Args:
        temperature: T; towards 0 the mask becomes binary.
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        if temperature <= 0:
            raise InputError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def forward(self, name: str, change: Tensor) -> Tensor:
        x: Tensor = self.of(name)
        if self.training and torch.is_grad_enabled():
            x = x + torch.rand_like(x).clamp_(1e-6, 1 - 1e-6).logit_()
        mask = (x / self.temperature).sigmoid()
        return change * (mask / mask.mean()).to(change.dtype)


class Residual(Elements):
    """δ, free for every element: θ_l = θ₀_l + Σₖ λₖ τ_lk + δ_l, which is plain training that starts at a merge."""

    def forward(self, name: str, change: Tensor) -> Tensor:
        return change + self.of(name).to(change.dtype)
