"""A model whose weights are a merge, computed from the current coefficients whenever it is called."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from adamerge import InputError, TaskVectors
from adamerge.kinds import kind
from adamerge.ops import weighted_sum
from adamerge.rules import Mean
from modules.coefficients import Coefficients

Weights = dict[str, Tensor]


class MergedModel(nn.Module):
    """θ = θ₀ + Σₖ λₖ τₖ, called like the model it wraps.

    The graph is cut at the merged weights: a forward pass merges once, a backward pass first completes the gradient
    of every merged tensor and then takes one product ⟨∂L/∂θ_l, τ_lk⟩ per tensor and expert. A step costs what an
    ordinary training step costs, whatever K. Without gradients (evaluation), the merge is reused for as long as the
    coefficients keep their values; nothing has to be refreshed by hand.

    The only parameters are the coefficients. Base and deltas move with `.to()` and are in no state dict. The wrapped
    model is not changed; its copy here stays in eval mode (no dropout, running statistics of the experts' mean).
    Tensors that no expert changed are the base's and get no coefficient.

    Args:
        model: the architecture; its own weights do not matter.
        task_vectors: base and experts by the names of `model.state_dict()`.
        coefficients: unbound `Coefficients`; they are bound to the tensors that differ.
    """

    def __init__(self, model: nn.Module, task_vectors: TaskVectors, coefficients: Coefficients) -> None:
        super().__init__()
        task_vectors = task_vectors.load()
        _check_names(model, task_vectors)
        self.tasks = task_vectors.tasks
        self.fingerprints = task_vectors.fingerprints
        # In the model's order, so that the rows do not depend on the format of the files the experts came in.
        place = {name: i for i, name in enumerate(model.state_dict())}
        rows = tuple(sorted(task_vectors.rows, key=place.__getitem__))
        dtype = task_vectors.deltas[rows[0]].dtype if rows else torch.float32
        self.coefficients = coefficients.bind(rows, self.tasks, dtype)
        # A plain object, so that parameters(), state_dict() and DDP's broadcasts see the coefficients alone.
        self._frozen = _Frozen(model, task_vectors)
        self._held: Weights | None = None
        self._cache: tuple[Tensor, Weights] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = self._held if self._held is not None else self.weights()
        return functional_call(self._frozen.model, weights, args, kwargs)

    def weights(self) -> Weights:
        """The merged tensors by name, differentiable in the coefficients where gradients are on."""
        if torch.is_grad_enabled():
            self._cache = None
            return self._merge()
        values = self.coefficients().detach()
        if self._cache is None or not torch.equal(self._cache[0], values):
            self._cache = None  # freed before the new merge is made
            self._cache = (values.clone(), self._merge())
        return self._cache[1]

    @contextmanager
    def holding(self, weights: Weights) -> Iterator[None]:
        """Within the block, every call uses these weights."""
        outer, self._held = self._held, weights
        try:
            yield
        finally:
            self._held = outer

    def in_parts(self, losses: Iterable[Callable[[], Tensor]], others: Iterable[Tensor] = ()) -> list[Tensor]:
        """Losses of micro-batches, each with its own backward pass at once, so that one micro-batch's activations live.

        The model merges once. Each loss is back-propagated to the merged weights and to `others` (further parameters
        that the losses depend on), where gradients add up; the losses that come back stand for them: the backward
        pass of their sum hands the accumulated gradient on to the coefficients, once. They must be summed as they
        are; a backward pass through a weighted sum would be wrong.
        """
        weights, others = self.weights(), [p for p in others if p.requires_grad]
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        targets = [*leaves.values(), *others]
        before = [p.grad for p in others]
        for parameter in others:
            parameter.grad = None
        values = []
        with self.holding(leaves):
            for loss in losses:
                value = loss()
                value.backward(inputs=targets)  # adds up in place, tensor by tensor: one set of gradients at any time
                values.append(value.detach())
        total = [target.grad for target in targets]
        for parameter, grad in zip(others, before, strict=True):
            parameter.grad = grad
        return list(_HandOn.apply(total, len(values), *values, *weights.values(), *others))

    @torch.no_grad()
    def merged_state_dict(self) -> Weights:
        """The whole state dict of the merged model, by the base's names, in the base's dtypes."""
        weights, frozen = self._merge(), self._frozen
        state = {}
        for name, dtype in frozen.dtypes.items():
            source = frozen.tied.get(name, name)
            state[name] = weights.get(source, frozen.tensor(source).detach()).to(dtype, copy=True)
        return state

    def materialise(self) -> nn.Module:
        """A plain copy of the wrapped model with the merged weights: free of coefficients and task vectors."""
        model = copy.deepcopy(self._frozen.model)
        model.load_state_dict(self.merged_state_dict())
        return model

    def _merge(self) -> Weights:
        frozen, rows = self._frozen, self.coefficients.by_tensor()
        return {name: weighted_sum(row, frozen.tensor(name), frozen.deltas[name]) for name, row in rows.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MergedModel":
        super()._apply(fn, recurse)
        self._frozen.apply(fn)
        self._cache = None
        return self


class _Frozen:
    """What never changes: the architecture holding the base's own tensors (no copy of them), and the deltas."""

    def __init__(self, model: nn.Module, task_vectors: TaskVectors) -> None:
        self.dtypes = {name: value.dtype for name, value in task_vectors.base.items()}
        self.tied = task_vectors.tied
        self.deltas = {name: task_vectors.deltas[name] for name in task_vectors.rows}
        memo: dict[int, Any] = {}
        owned = dict(model.state_dict(keep_vars=True))
        for name, value in task_vectors.base.items():
            if kind(name, value) == "statistics":
                value = Mean().apply(name, value, task_vectors.deltas[name], task_vectors.tasks, 1.0).to(value.dtype)
            if value.is_floating_point():  # half precision is for storage: sums of small deltas need float32
                value = value.to(torch.promote_types(value.dtype, torch.float32))
            as_parameter = isinstance(owned[name], nn.Parameter)
            memo.setdefault(id(owned[name]), nn.Parameter(value, requires_grad=False) if as_parameter else value)
        self.model = copy.deepcopy(model, memo).requires_grad_(False).eval()
        self._tensors = self.model.state_dict(keep_vars=True)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.model._apply(fn)
        self._tensors = self.model.state_dict(keep_vars=True)
        self.deltas = {name: fn(delta) for name, delta in self.deltas.items()}


class _HandOn(torch.autograd.Function):
    """Passes the values of losses through; going back, gives the gradients that were collected for them."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor | None], count: int, *values_and_targets: Tensor) -> tuple[Tensor, ...]:
        ctx.grads, ctx.count = grads, count
        return tuple(value.clone() for value in values_and_targets[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scale = outer[0]
        given = [None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in ctx.grads]
        ctx.grads = None
        return (None, None, *(None for _ in range(ctx.count)), *given)


def _check_names(model: nn.Module, task_vectors: TaskVectors) -> None:
    own: Mapping[str, Tensor] = model.state_dict()
    tied = {id(t) for n, t in model.state_dict(keep_vars=True).items() if n in task_vectors.base}
    missing = [
        n for n, t in model.state_dict(keep_vars=True).items() if n not in task_vectors.base and id(t) not in tied
    ]
    extra = [name for name in task_vectors.base if name not in own]
    if missing or extra:
        lacks = f"the base lacks {missing[0]} and {len(missing) - 1} more" if missing else ""
        has = f"the base has {extra[0]} and {len(extra) - 1} more that the model lacks" if extra else ""
        raise InputError(
            f"base and {type(model).__name__} do not have the same tensors: {'; '.join(filter(None, (lacks, has)))}"
        )
    for name, value in task_vectors.base.items():
        if own[name].shape != value.shape:
            raise InputError(
                f"{name} has shape {list(value.shape)} in the base, {list(own[name].shape)} in {type(model).__name__}"
            )
