"""Routers: weights of the experts that depend on the input."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from adamerge import InputError
from adamerge.deltas import AnyDeltas
from adamerge.ops import weighted
from modules import structure
from modules.coefficients import USUAL_SCALE
from modules.structure import Site


class Router(nn.Module, ABC):
    """Gives each sample its own weights of the experts, w [B, K], in some layers of the model.

    One that knows which task an image is of has a method `logits` too: [B, D] features -> [B, K].

    Args:
        scope: the layers: `mlp` (every MLP, found by structure), `linear` (every linear layer), or a regular expression
            for whole names of modules whose linear layers share their weights; `all` adds LayerNorm and Conv2d, where
            the weights do not come from a layer's own input; `conflict:0.5`: the half of these layers on which the
            task vectors disagree most (Mediator, arXiv:2502.04411). What is outside is merged statically.
    """

    #: Whether weights follow from the features of the model without routing, in a pass of their own.
    global_: bool = False
    #: What is mixed: the experts' weights, or what every expert gives, which costs a pass through each of them, or the
    #: tasks of a batch, whose images go through their own expert.
    mixes: Literal["weights", "outputs", "tasks"] = "weights"

    def __init__(self, scope: str = "mlp") -> None:
        super().__init__()
        self.scope = scope
        self.tasks: tuple[str, ...] = ()
        self.sites: tuple[str, ...] = ()
        self.scale = USUAL_SCALE

    @property
    def knows_tasks(self) -> bool:
        """Whether it says which task an image is of."""
        return self.global_ and hasattr(self, "logits")

    def find(self, model: nn.Module, deltas: Mapping[str, AnyDeltas]) -> list[Site]:
        """The sites of a model with these task vectors that this router serves. Raises InputError if there are none."""
        if self.scope.startswith("conflict:"):
            layers = structure.routable(model) if self.global_ else structure.linears(model)
            found = {name: conflict(deltas[f"{name}.weight"]) for name in layers if f"{name}.weight" in deltas}
            widths = {name: 0 if self.global_ else structure.sizes(layers[name])[0] for name in found}
            return [Site(name, (name,), widths[name]) for name in _most(self.scope, found)]
        if self.scope == "mlp":
            return structure.mlps(model)
        if self.scope == "linear":
            layers = structure.linears(model)
            return [Site(name, (name,), structure.sizes(layer)[0]) for name, layer in layers.items()]
        if self.scope == "all":
            if not self.global_:
                raise InputError(
                    f"scope 'all' is for routers of features; use 'mlp' or 'linear' with {type(self).__name__}"
                )
            return [Site(name, (name,), 0) for name in structure.routable(model)]
        return structure.matching(model, self.scope)

    def bind(
        self,
        sites: Sequence[Site],
        tasks: Sequence[str],
        features: int,
        dtype: torch.dtype,
        scale: float = USUAL_SCALE,
    ) -> "Router":
        """Create the parameters; called once, by the model that routes.

        `features` is the size of its output, `scale` where weights begin that do not say so themselves.
        """
        if self.tasks:
            raise InputError("this router belongs to another merged model already; build a new one")
        self.sites, self.tasks, self.scale = tuple(site.name for site in sites), tuple(tasks), scale
        self.build(sites, features, torch.promote_types(torch.float32, dtype))
        return self

    @abstractmethod
    def build(self, sites: Sequence[Site], features: int, dtype: torch.dtype) -> None:
        """Make the parameters; `tasks`, `sites` and `scale` are known by now."""

    def expert_axes(self) -> dict[str, tuple[int, ...]]:
        """By parameter, the axes along which the experts have equal parts, in the order of `tasks`.

        Where the pool changes in mid-run, an expert takes its parts along; a parameter without such axes stays whole.
        """
        return {}

    @abstractmethod
    def forward(self, x: Tensor, site: str) -> Tensor:
        """[B, ..., D] inputs of a site (or features, if `global_`) -> [B, K] weights."""


class BlockRouter(Router):
    """Weight-ensembling mixture of experts (WEMoE, arXiv:2402.00433; E-WEMoE, arXiv:2410.21804, with `shared`).

    Every MLP has a small gate on its own input h [B, N, D]: w = meanₙ(W₂ relu(W₁ hₙ + b₁) + b₂), [B, K], and computes
    with θ₀ + Σₖ wₖ τₖ, sample by sample. Nothing bounds w. Weights begin at N(0, 0.01²) and b₂ at `init`, near task
    arithmetic. Depth 1 has one linear layer, depth 0 a constant per MLP, which is plain coefficients.

    Args:
        depth: linear layers of a gate: 0, 1 or 2.
        shared: one gate for all sites (they must have the same width).
        init: the weights at the start; default: the usual scale of the suite (0.3).
        per: `batch` averages w over the images of a task while training, as published code does: one merge per task and
            step. Evaluation always routes sample by sample, so that no prediction depends on its batch.
        pool: average the tokens `after` the gate, as published, or `before` it.
        scope: see Router.
    """

    def __init__(
        self,
        depth: Literal[0, 1, 2] = 2,
        shared: bool = False,
        init: float | None = None,
        per: Literal["sample", "batch"] = "sample",
        pool: Literal["after", "before"] = "after",
        scope: str = "mlp",
    ) -> None:
        super().__init__(scope)
        self.depth, self.shared, self.init, self.per, self.pool = depth, shared, init, per, pool
        self.gates = nn.ModuleList()

    def build(self, sites: Sequence[Site], features: int, dtype: torch.dtype) -> None:
        widths = [site.width for site in sites]
        if self.shared and len(set(widths)) > 1:
            raise InputError(f"one shared gate needs sites of one width; these have {sorted(set(widths))}")
        for width in widths[:1] if self.shared else widths:
            gate = _gate(self.depth, width, len(self.tasks)).to(dtype)
            init = self.scale if self.init is None else self.init
            self.gates.append(_start(gate, init))  # in its own precision: 0.3 in float32 is not 0.3 in float64
        self._gate_of = {site: 0 if self.shared else number for number, site in enumerate(self.sites)}

    def expert_axes(self) -> dict[str, tuple[int, ...]]:
        last = [gate[-1] if isinstance(gate, nn.Sequential) else gate for gate in self.gates]
        return _outputs(self, last)

    def forward(self, x: Tensor, site: str) -> Tensor:
        gate = self.gates[self._gate_of[site]]
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.to(next(gate.parameters()).dtype).reshape(len(x), -1, x.shape[-1])
            w: Tensor = gate(tokens.mean(1)) if self.pool == "before" else gate(tokens).mean(1)
        return w


class FeatureRouter(Router):
    """Twin-Merging's router (arXiv:2406.15479): a classifier of the task from the features of the shared expert.

    w = softmax(MLP(z*)), with z* the features of the model without routing. Its logits say which task an image belongs
    to, so that nothing has to be known about it. The MLP is D → 2D → … → K with LayerNorm, LeakyReLU and dropout; the
    published one has BatchNorm, which would let a batch of one task betray that task.

    Args:
        layers: hidden layers, each of width 2D.
        dropout: probability while training.
        hard: evaluate with the most likely expert alone.
        scope: see Router.
    """

    global_ = True

    def __init__(self, layers: int = 2, dropout: float = 0.5, hard: bool = False, scope: str = "all") -> None:
        super().__init__(scope)
        self.layers, self.dropout, self.hard = layers, dropout, hard
        self.classifier = nn.Sequential()

    def build(self, sites: Sequence[Site], features: int, dtype: torch.dtype) -> None:
        width = features * (len(self.tasks) if self.mixes == "outputs" else 1)
        self.classifier.append(nn.LayerNorm(width))  # features of different backbones differ in size by far
        for _ in range(self.layers):
            self.classifier.append(nn.Linear(width, 2 * features)).append(nn.LayerNorm(2 * features))
            self.classifier.append(nn.LeakyReLU()).append(nn.Dropout(self.dropout))
            width = 2 * features
        self.classifier.append(nn.Linear(width, len(self.tasks)))
        self.classifier.to(dtype)

    def expert_axes(self) -> dict[str, tuple[int, ...]]:
        return _outputs(self, [self.classifier[-1]])

    def logits(self, features: Tensor) -> Tensor:
        """[B, D] features -> [B, K] logits of the task."""
        with torch.autocast(features.device.type, enabled=False):
            z: Tensor = self.classifier(features.to(next(self.classifier.parameters()).dtype))
        return z

    def forward(self, x: Tensor, site: str = "") -> Tensor:
        logits = self.logits(x)
        if self.hard and not self.training:
            return nn.functional.one_hot(logits.argmax(1), len(self.tasks)).to(logits)
        return logits.softmax(1)


def conflict(deltas: AnyDeltas) -> float:
    """1 − ‖Σₖ τₖ‖₁ / Σₖ ‖τₖ‖₁ of one tensor: 0 where all task vectors have the same signs, 1 where they cancel out."""
    total = sum(float(delta.abs().sum()) for delta in deltas)
    return 1 - float(weighted(torch.ones(len(deltas)), deltas).abs().sum()) / total if total else 0.0


def _most(scope: str, conflicts: Mapping[str, float]) -> list[str]:
    """The fraction of names that a scope asks for, those of most conflict, in their order."""
    try:
        share = float(scope.partition(":")[2])
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"scope {scope!r}: after 'conflict:' comes a fraction in (0, 1], such as 'conflict:0.5'")
    worst = sorted(conflicts, key=lambda name: -conflicts[name])[: max(1, round(share * len(conflicts)))]
    return [name for name in conflicts if name in worst]


class _Constant(nn.Module):
    """The gate of depth 0: b for every sample."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(experts))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


def _gate(depth: int, width: int, experts: int) -> nn.Module:
    if depth == 0:
        return _Constant(experts)
    last = nn.Linear(width, experts)
    return last if depth == 1 else nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)


def _outputs(router: Router, last: Sequence[nn.Module]) -> dict[str, tuple[int, ...]]:
    """The parameters of layers that give one number per expert."""
    own = {id(parameter) for layer in last for parameter in layer.parameters()}
    return {name: (0,) for name, parameter in router.named_parameters() if id(parameter) in own}


def _start(gate: nn.Module, init: float) -> nn.Module:
    for name, parameter in gate.named_parameters():
        nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.01)
    last: Tensor = list(gate.parameters())[-1]
    nn.init.constant_(last, init)
    return gate
