"""A model whose weights are a merge, computed from the current coefficients whenever it is called."""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from adamerge import InputError, TaskVectors
from adamerge.deltas import AnyDeltas, dense, mapped
from adamerge.kinds import kind
from adamerge.ops import column_sum, weighted_sums
from adamerge.rules import Mean, Stack
from modules.blocks import Blocks, LoneBlocks, per_task
from modules.coefficients import USUAL_SCALE, Coefficients
from modules.elements import Elements
from modules.routers import Router
from modules.routing import Routing

Weights = dict[str, Tensor]


class MergedModel(nn.Module):
    """θ = θ₀ + Σₖ λₖ τₖ, called like the model it wraps.

    The graph is cut at the merged weights: a forward pass merges once, a backward pass first completes the gradient
    of every merged tensor and then takes one product ⟨∂L/∂θ_l, τ_lk⟩ per tensor and expert. A step costs what an
    ordinary training step costs, whatever K. Without gradients (evaluation), the merge is reused for as long as the
    coefficients keep their values; nothing has to be refreshed by hand.

    The only parameters are the coefficients and the router's. Base and deltas move with `.to()` and are in no state
    dict. The wrapped model is not changed; its copy here stays in eval mode (no dropout, running statistics of the
    experts' mean). Tensors that no expert changed are the base's and get no coefficient.

    Args:
        model: the architecture; its own weights do not matter.
        task_vectors: base and experts by the names of `model.state_dict()`.
        coefficients: unbound `Coefficients`; they are bound to the tensors that differ and are not routed.
        router: an unbound router, whose layers take weights of their own for every sample; default: none.
        features: the size of what the model gives, where the router needs it.
        scale: where coefficients and routers begin that do not say so themselves.
        elements: what changes the weighted task vectors element by element; default: nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        task_vectors: TaskVectors,
        coefficients: Coefficients,
        router: Router | None = None,
        features: int = 0,
        scale: float = USUAL_SCALE,
        elements: Elements | None = None,
    ) -> None:
        super().__init__()
        task_vectors = task_vectors.load()
        _check_names(model, task_vectors)
        #: The names of the task vectors: whichever experts are in the pool, not the tasks that are scored.
        self.tasks = task_vectors.tasks
        self.fingerprints = task_vectors.fingerprints
        # In the model's order, so that the rows do not depend on the format of the files the experts came in.
        place = {name: i for i, name in enumerate(model.state_dict())}
        rows = tuple(sorted(task_vectors.rows, key=place.__getitem__))
        dtype = task_vectors.deltas[rows[0]].dtype if rows else torch.float32
        # A plain object, so that parameters(), state_dict() and DDP's broadcasts see what is learned alone.
        self._frozen = _Frozen(model, task_vectors)
        self.routing: Routing | None = None
        if router is not None:
            sites = router.find(self._frozen.model, self._frozen.deltas)
            routed = {f"{layer}.{part}" for site in sites for layer in site.layers for part in ("weight", "bias")}
            rows = tuple(name for name in rows if name not in routed)
            router.bind(sites, self.tasks, features, dtype, scale)
            self.routing = Routing(self, self._frozen.model, sites, router)
        shapes = {name: task_vectors.base[name].shape for name in rows}
        self.coefficients = coefficients.bind(rows, self.tasks, dtype, router is not None, scale, shapes)
        self.router = router
        self.elements = elements
        if elements is not None:
            elements.bind({name: self._frozen.tensor(name) for name in rows})
        self._blocks: Blocks | None = None
        self._alone: LoneBlocks | None = None
        #: Images per task of the batch that is computed, in its order.
        self.segments: Mapping[str, int] | None = {}
        self._held: Weights | None = None
        self._cache: tuple[Tensor, tuple[int, ...], Weights] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.router is not None and self.router.mixes == "tasks":
            return self._by_task(*args, **kwargs)
        weights = self.current()
        if self.routing is None or self.router is None or not self.router.global_ or self.routing.given:
            return functional_call(self._frozen.model, weights, args, kwargs)
        with self.holding(weights):
            return self.routed(self.shared(*args, **kwargs), *args, **kwargs)

    def shared(self, *args: Any, **kwargs: Any) -> Tensor:
        """What a router of features looks at, uncorrected.

        The features [B, D] of the shared expert, which is the model with all routing weights at zero; or, for a router
        that mixes outputs, those of all experts, [B, K D].
        """
        if self.routing is None or self.router is None:
            raise InputError("a model without a router has no shared expert")
        with self.routing.off(), self.of(None):
            if self.router.mixes == "outputs":
                return torch.cat([self._expert(k, *args, **kwargs) for k in range(len(self.tasks))], 1)
            features: Tensor = functional_call(self._frozen.model, self.current(), args, kwargs)
        return features

    def routed(self, shared: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The features [B, D], where what the router of features looks at is known."""
        assert self.routing is not None
        assert self.router is not None
        weights = self.router(shared, "")
        if self.router.mixes == "outputs":
            return torch.einsum("bk,bkd->bd", weights.to(shared.dtype), shared.unflatten(1, (len(self.tasks), -1)))
        with self.routing.using(weights):
            features: Tensor = self(*args, **kwargs)
        return features

    @torch.no_grad()
    def _expert(self, k: int, *args: Any, **kwargs: Any) -> Tensor:
        """The features [B, D] of one expert, whose weights live for this pass alone."""
        frozen = self._frozen
        weights = {name: frozen.tensor(name) + frozen.deltas[name][k] for name in self.coefficients.rows}
        features: Tensor = functional_call(frozen.model, weights, args, kwargs)
        return features

    def _by_task(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The features [B, D] of every task's images by that task's expert."""

        def features(part: Tensor, task: str) -> Tensor:
            if task not in self.tasks:
                raise InputError(f"task {task!r} has no expert of its own among {', '.join(self.tasks)}")
            with self.of({task: len(part)}):
                return self._expert(self.tasks.index(task), part, *args, **kwargs)

        return per_task(images, self.segments or {}, features)

    @contextmanager
    def of(self, segments: Mapping[str, int] | None) -> Iterator[None]:
        """Within the block, a batch holds so many images of each task, one task after another.

        What is done task by task (corrections of blocks, routing per batch) needs to know; `None` leaves it out.
        """
        outer, self.segments = self.segments, segments
        try:
            yield
        finally:
            self.segments = outer

    @property
    def blocks(self) -> Blocks:
        """The residual blocks, whose outputs can be corrected and recorded."""
        if self._blocks is None:
            this = weakref.proxy(self)  # hooks must not keep gigabytes alive in a cycle
            self._blocks = Blocks(self._frozen.model, lambda: this.segments)
        return self._blocks

    @property
    def alone(self) -> LoneBlocks:
        """The residual blocks, each for itself, where unmerged tensors are the base's; after `set_apart`."""
        assert self._alone is not None
        return self._alone

    def set_apart(self, image: Tensor) -> LoneBlocks:
        """Let every residual block work alone, as it does in a pass over `image` [1, 3, H, W]."""
        self._alone = LoneBlocks(self._frozen.architecture, image)
        return self._alone

    def delta(self, name: str) -> AnyDeltas | None:
        """The deltas of a tensor, [K, *shape]; none where no expert changed it."""
        return self._frozen.deltas.get(name)

    def current(self) -> Weights:
        """The merged tensors that a call uses now: those that are held, if any are."""
        return self._held if self._held is not None else self.weights()

    def weights(self) -> Weights:
        """The merged tensors by name, differentiable in what learns where gradients are on."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.behind()):
            self._cache = None
            return self._merge()
        with torch.no_grad():
            values, elements = self.coefficients(), self.elements.state() if self.elements else ()
            if self._cache is None or self._cache[1] != elements or not torch.equal(self._cache[0], values):
                self._cache = None  # freed before the new merge is made
                self._cache = (values.clone(), elements, self._merge())
        return self._cache[2]

    def behind(self) -> list[nn.Parameter]:
        """The parameters that the merged weights depend on."""
        return [self.coefficients.raw, *(self.elements.parameters() if self.elements else ())]

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
        leaves = {name: weight.detach().requires_grad_(weight.requires_grad) for name, weight in weights.items()}
        targets = [leaf for leaf in leaves.values() if leaf.requires_grad] + others
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
        return hand_on(total, values, [weight for weight in weights.values() if weight.requires_grad] + others)

    def stored_parameters(self) -> int:
        """How many numbers the merged weights consist of; what is routed or never merged keeps all experts' deltas."""
        layers = self.routing.layers if self.routing else frozenset()
        apart = self.router is not None and self.router.mixes != "weights"
        routed = [d for name, d in self._frozen.deltas.items() if apart or name.rpartition(".")[0] in layers]
        return sum(p.numel() for p in self._frozen.model.parameters()) + sum(
            d.nbytes // d.dtype.itemsize for d in routed
        )

    @torch.no_grad()
    def merged_state_dict(self) -> Weights:
        """The whole state dict of the merged model, by the base's names, in the base's dtypes.

        Raises InputError for a model that routes: its weights differ from image to image.
        """
        if self.router is not None:
            raise InputError("a model that routes has weights of its own for every image: there is no merge to export")
        weights, frozen = self._merge(), self._frozen
        state = {}
        for name, dtype in frozen.dtypes.items():
            source = frozen.tied.get(name, name)
            state[name] = weights.get(source, frozen.tensor(source).detach()).to(dtype, copy=True)
        return state

    def materialise(self) -> nn.Module:
        """A plain copy of the wrapped model with the merged weights: free of coefficients and task vectors."""
        state = self.merged_state_dict()
        model = copy.deepcopy(self._frozen.architecture)
        model.load_state_dict(state)
        return model

    def _merge(self) -> Weights:
        frozen, rows, elements = self._frozen, self.coefficients.by_tensor(), self.elements
        if elements is None:
            return self._sums(rows, {name: frozen.tensor(name) for name in rows})
        changes = self._sums(rows, dict.fromkeys(rows))
        return {name: frozen.tensor(name) + elements(name, change) for name, change in changes.items()}

    def _sums(self, rows: Mapping[str, Tensor], bases: Mapping[str, Tensor | None]) -> Weights:
        """The weighted sums of all tensors, by their rows of coefficients; a base of `None` is zero."""
        deltas, whole = self._frozen.deltas, [name for name, row in rows.items() if row.dim() == 1]
        merged = weighted_sums([rows[n] for n in whole], [bases[n] for n in whole], [deltas[n] for n in whole])
        found = dict(zip(whole, merged, strict=True))
        return {n: found[n] if n in found else column_sum(row, bases[n], deltas[n]) for n, row in rows.items()}

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
                deltas = dense(task_vectors.deltas[name])
                stack = Stack(name, value.to(deltas.dtype), deltas, task_vectors.tasks)
                value = Mean().merged(stack, None, 1.0).to(value.dtype)
            if value.is_floating_point():  # half precision is for storage: sums of small deltas need float32
                value = value.to(torch.promote_types(value.dtype, torch.float32))
            as_parameter = isinstance(owned[name], nn.Parameter)
            memo.setdefault(id(owned[name]), nn.Parameter(value, requires_grad=False) if as_parameter else value)
        self.model = copy.deepcopy(model, memo).requires_grad_(False).eval()
        #: The same tensors in modules that no router or correction ever changes.
        self.architecture = copy.deepcopy(
            self.model, {id(t): t for t in self.model.state_dict(keep_vars=True).values()}
        )
        self._tensors = self.model.state_dict(keep_vars=True)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.model._apply(fn)
        self.architecture._apply(fn)  # shares the parameters; buffers are its own
        self._tensors = self.model.state_dict(keep_vars=True)
        self.deltas = {name: mapped(fn, delta) for name, delta in self.deltas.items()}


def hand_on(grads: Sequence[Tensor | None], losses: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """The losses again, such that the backward pass of their plain sum gives the targets these gradients."""
    return list(_HandOn.apply(grads, len(losses), *losses, *targets))


class _HandOn(torch.autograd.Function):
    """Passes the values of losses through; going back, gives the gradients that were collected for them."""

    @staticmethod
    def forward(
        ctx: Any, grads: Sequence[Tensor | None], count: int, *values_and_targets: Tensor
    ) -> tuple[Tensor, ...]:
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
