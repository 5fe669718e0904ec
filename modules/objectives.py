"""What adaptation minimises."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamerge import InputError, objectives
from adamerge.anchors import similarity
from modules.views import View


class Objective(nn.Module, ABC):
    """A loss per image, [B], from what a step knows of one task's images.

    `needs` declares the information it takes beyond the images: any of "labels", "teacher", "anchors", "task id". A run
    says so when it starts, and refuses labels unless its configuration allows them.
    """

    needs: frozenset[str] = frozenset({"task id"})
    #: Whether it looks at the outputs of the residual blocks.
    blocks: bool = False
    #: Whether it takes images.
    images: bool = True
    #: Whether it looks at nothing but the router's opinion of which task an image is of.
    router_only: bool = False

    @abstractmethod
    def forward(self, view: View) -> Tensor:
        """The losses of one task's images, [B]; a step minimises the sum over tasks of their means."""


class Entropy(Objective):
    """Entropy of the predictions, H(p) = −Σ_c p_c log p_c (AdaMerging, arXiv:2310.02575, eq. 5).

    Args:
        eps: added inside the logarithm; 1e-8 reproduces published runs, 0 is exact.
        below: keep images alone whose entropy is below this fraction of log C; default: all.
        normalise: divide by log C, so that a task of many classes weighs no more than one of few.
    """

    def __init__(self, eps: float = 0.0, below: float | None = None, normalise: bool = False) -> None:
        super().__init__()
        self.eps, self.below, self.normalise = eps, below, normalise

    def forward(self, view: View) -> Tensor:
        losses, most = objectives.entropy(view.logits, self.eps), math.log(view.logits.shape[-1])
        if self.below is not None:
            losses = objectives.kept_mean(losses, losses.detach() < self.below * most)
        return losses / most if self.normalise else losses


class Diversity(Objective):
    """−H(mean_b p_b): minus the entropy of a batch's mean prediction, the same for each of its images.

    Added to `Entropy` (by `Sum`), it stops a batch from being put into one class.

    Args:
        normalise: divide by log C.
    """

    def __init__(self, normalise: bool = False) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, view: View) -> Tensor:
        loss = -objectives.marginal_entropy(view.logits).expand(len(view.logits))
        return loss / math.log(view.logits.shape[-1]) if self.normalise else loss


class PseudoLabels(Objective):
    """Cross-entropy against the expert's most likely class (Model Tinting, arXiv:2412.19098).

    Args:
        filter: Tint++: keep an image only if expert and merge agree, or if the expert is as sure or surer; a batch of
            which nothing is kept counts as 0.
    """

    needs = frozenset({"task id", "teacher"})

    def __init__(self, filter: bool = False) -> None:
        super().__init__()
        self.filter = filter

    def forward(self, view: View) -> Tensor:
        losses = objectives.pseudo_label(view.logits, view.teacher.logits)
        if not self.filter:
            return losses
        return objectives.kept_mean(losses, objectives.worth_learning(view.logits.detach(), view.teacher.logits))


class Divergence(Objective):
    """Distance of the predictions to the expert's, KL(expert ‖ merge) or Jensen-Shannon (DivMerge, arXiv:2509.02108).

    Args:
        kind: `kl` or `js`.
        temperature: of both, for `kl`; the loss is scaled by its square.
    """

    needs = frozenset({"task id", "teacher"})

    def __init__(self, kind: Literal["kl", "js"] = "js", temperature: float = 1.0) -> None:
        super().__init__()
        if kind == "js" and temperature != 1:
            raise InputError("temperature is for kind 'kl'")
        self.kind, self.temperature = kind, temperature

    def forward(self, view: View) -> Tensor:
        if self.kind == "js":
            return objectives.js(view.logits, view.teacher.logits)
        return objectives.kl(view.logits, view.teacher.logits, self.temperature)


class RepresentationL1(Objective):
    """Mean absolute distance of the features to the expert's, (1/D) ‖ẑ − z_expert‖₁ (arXiv:2402.02705, eq. 4).

    Args:
        blocks: add the same distance between the token means after every residual block (version 2,
            arXiv:2410.14389).
    """

    needs = frozenset({"task id", "teacher"})

    def __init__(self, blocks: bool = False) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, view: View) -> Tensor:
        distance = (view.features - view.teacher.features).abs().mean(-1)
        if self.blocks:
            for own, target in zip(view.blocks, view.teacher.blocks, strict=True):
                distance = distance + (own - target).abs().mean(-1)
        return distance


class TaskIdentity(Objective):
    """Cross-entropy of the router's task logits against the task that the images are known to be of.

    It trains the router of Twin-Merging (arXiv:2406.15479), on training data as published (`train_split: train`) or on
    the unlabelled stream.
    """

    router_only = True

    def forward(self, view: View) -> Tensor:
        logits = view.task_logits
        return F.cross_entropy(logits, torch.full((len(logits),), view.number, device=logits.device), reduction="none")


class DualAnchors(Objective):
    """Distance to the expert's outputs on functional dual anchors, made without data (FDA, arXiv:2510.21223).

    Anchors are inputs of a residual block on which a step towards the expert's outputs is a step along its task vector
    (see `adamerge.anchors`). The loss is Σ_l meanⱼ 1 − cos(f_l(x_lj; θ), f_l(x_lj; θₖ)) over all blocks l and their
    anchors j, the same for each image of a batch. They are made once per expert, before the first step, and kept in the
    user's cache folder.

    Args:
        count: anchors per expert and block, all of them in every step.
        steps: of AdamW that make them; published: 1200.
        lr: of these steps.
        scale: they begin at N(0, scale²).
        seed: of that start.
    """

    needs = frozenset({"anchors"})
    images = False

    def __init__(
        self, count: int = 64, steps: int = 1200, lr: float = 1e-2, scale: float = 0.01, seed: int = 0
    ) -> None:
        super().__init__()
        if min(count, steps, lr, scale) <= 0:
            raise InputError(f"count, steps, lr and scale must be positive, got {count}, {steps}, {lr} and {scale}")
        self.count, self.steps, self.lr, self.scale, self.seed = count, steps, lr, scale, seed

    def forward(self, view: View) -> Tensor:
        distances = [(1 - similarity(output, target)).mean() for output, target in view.anchors]
        return torch.stack(distances).sum().expand(view.size)


class Supervised(Objective):
    """Cross-entropy against the labels: an upper bound to compare with."""

    needs = frozenset({"task id", "labels"})

    def forward(self, view: View) -> Tensor:
        return objectives.cross_entropy(view.logits, view.labels)


class Mistakes(Objective):
    """1 where the most likely class is not the label, else 0: for searches, since it has no gradient."""

    needs = frozenset({"task id", "labels"})

    def forward(self, view: View) -> Tensor:
        return (view.logits.argmax(1) != view.labels).to(view.logits.dtype)


class Sum(Objective):
    """A weighted sum of objectives, such as entropy and diversity.

    Args:
        terms: the objectives.
        weights: their weights; default: 1 each.
    """

    def __init__(self, terms: list[Objective], weights: list[float] | None = None) -> None:
        super().__init__()
        if not terms or (weights is not None and len(weights) != len(terms)):
            raise InputError(f"Sum has {len(terms)} terms and {len(weights or [])} weights: give one weight per term")
        self.terms, self.weights = nn.ModuleList(terms), list(weights or [1.0] * len(terms))
        self.needs = frozenset[str]().union(*(term.needs for term in terms))
        self.blocks = any(term.blocks for term in terms)
        self.images = any(term.images for term in terms)
        self.router_only = all(term.router_only for term in terms)

    def forward(self, view: View) -> Tensor:
        parts = [weight * term(view) for weight, term in zip(self.weights, self.terms, strict=True)]
        return torch.stack(parts).sum(0)
