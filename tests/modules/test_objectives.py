"""Objectives on what a step knows: values in closed form, what each needs, sums and filters."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError
from modules import (
    Divergence,
    Diversity,
    Entropy,
    Objective,
    PseudoLabels,
    RepresentationL1,
    Sum,
    Supervised,
    TaskIdentity,
)

ID = "task id"


def log_of(*rows: list[float]) -> Tensor:
    """Logits of given distributions, not normalised."""
    return torch.tensor(rows, dtype=torch.float64).log() + 1.5


@pytest.fixture
def view() -> SimpleNamespace:
    """Four images of the second of three tasks: (agree), (disagree, expert surer), (less sure), (as sure)."""
    own = [[0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.1, 0.6, 0.3]]
    expert = [[0.4, 0.3, 0.3], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2], [0.3, 0.1, 0.6]]
    teacher = SimpleNamespace(
        logits=log_of(*expert),
        features=torch.randn(4, 6, dtype=torch.float64),
        blocks=[torch.randn(4, size, dtype=torch.float64) for size in (6, 8)],
    )
    return SimpleNamespace(
        number=1,
        logits=log_of(*own).requires_grad_(),
        features=torch.randn(4, 6, dtype=torch.float64),
        blocks=[torch.randn(4, size, dtype=torch.float64) for size in (6, 8)],
        labels=torch.tensor([0, 1, 2, 1]),
        task_logits=torch.randn(4, 3, dtype=torch.float64),
        teacher=teacher,
    )


class Only:
    """A view that fails for whatever an objective has no business with."""

    def __init__(self, view: SimpleNamespace, **names: str) -> None:
        self.__dict__.update({name: getattr(view, name) for name in names})


NEEDS = [
    (Entropy(), {ID}, ["logits"]),
    (Diversity(), {ID}, ["logits"]),
    (PseudoLabels(), {ID, "teacher"}, ["logits", "teacher"]),
    (PseudoLabels(filter=True), {ID, "teacher"}, ["logits", "teacher"]),
    (Divergence("js"), {ID, "teacher"}, ["logits", "teacher"]),
    (Divergence("kl"), {ID, "teacher"}, ["logits", "teacher"]),
    (RepresentationL1(), {ID, "teacher"}, ["features", "teacher"]),
    (RepresentationL1(blocks=True), {ID, "teacher"}, ["features", "blocks", "teacher"]),
    (TaskIdentity(), {ID}, ["number", "task_logits"]),
    (Supervised(), {ID, "labels"}, ["logits", "labels"]),
]


@pytest.mark.parametrize(("objective", "needs", "looks_at"), NEEDS, ids=lambda value: type(value).__name__)
def test_what_an_objective_needs_and_looks_at(view, objective, needs, looks_at):
    assert objective.needs == needs
    assert objective.blocks == ("blocks" in looks_at)
    assert objective.router_only == (looks_at == ["number", "task_logits"])
    assert list(objective.parameters()) == []
    losses = objective(Only(view, **dict.fromkeys(looks_at, "")))
    assert losses.shape == (4,)
    assert losses.dtype == torch.float64


def test_entropy(view):
    p = view.logits.softmax(-1)
    assert_close(Entropy()(view), -(p * p.log()).sum(-1))
    assert_close(Entropy(eps=1e-3)(view), -(p * (p + 1e-3).log()).sum(-1))


def test_entropy_of_confident_images_alone(view):
    losses = Entropy()(view)
    threshold = losses.sort().values[1:3].mean().item() / math.log(3)
    kept = Entropy(below=threshold)(view)
    low = losses < threshold * math.log(3)
    assert low.sum() == 2
    assert_close(kept.mean(), losses[low].mean())
    assert_close(Entropy(below=1.0)(view), losses)


@pytest.mark.parametrize("below", [None, 0.9])
def test_normalised_terms_are_fractions_of_log_c(view, below):
    assert_close(Entropy(below=below, normalise=True)(view) * math.log(3), Entropy(below=below)(view))
    assert_close(Diversity(normalise=True)(view) * math.log(3), Diversity()(view))
    for classes in (2, 7):
        alike = SimpleNamespace(logits=torch.zeros(4, classes))
        assert_close(Entropy(normalise=True)(alike), torch.ones(4))


@pytest.mark.parametrize("objective", [Entropy(below=0.0), PseudoLabels(filter=True)], ids=["Entropy", "PseudoLabels"])
def test_a_filter_that_keeps_nothing_is_zero_with_a_gradient_of_zero(view, objective):
    view.logits = log_of([0.1, 0.9], [0.2, 0.8]).requires_grad_()
    view.teacher.logits = log_of([0.6, 0.4], [0.7, 0.3])
    loss = objective(view).mean()
    loss.backward()
    assert loss == 0
    assert torch.equal(view.logits.grad, torch.zeros_like(view.logits))


def test_diversity_is_minus_the_entropy_of_the_mean_prediction(view):
    p = view.logits.softmax(-1).mean(0)
    expected = (p * p.log()).sum()
    assert_close(Diversity()(view), expected.expand(4))
    assert_close(Diversity()(view).mean(), expected)


def test_diversity_and_entropy_together_ask_for_sure_and_different_predictions(view):
    objective = Sum([Entropy(), Diversity()])

    def value(logits: Tensor) -> float:
        return objective(SimpleNamespace(logits=logits)).mean().item()

    sure = 50 * torch.eye(3, dtype=torch.float64)
    assert math.isclose(value(sure), -math.log(3), abs_tol=1e-12)
    assert math.isclose(value(sure[:1].expand(3, -1)), 0.0, abs_tol=1e-12)
    assert math.isclose(value(torch.zeros(3, 3).double()), 0.0, abs_tol=1e-12)


def test_pseudo_labels_are_the_experts_classes(view):
    expected = -torch.tensor([0.8, 0.2, 0.1, 0.3], dtype=torch.float64).log()
    assert_close(PseudoLabels()(view), expected)


def test_the_filter_drops_images_of_which_the_merge_is_surer_and_another_opinion(view):
    losses = PseudoLabels()(view)
    kept = PseudoLabels(filter=True)(view)
    assert kept[2] == 0
    assert_close(kept.mean(), losses[[0, 1, 3]].mean())
    kept.mean().backward()
    assert torch.equal(view.logits.grad[2], torch.zeros(3).double())
    assert view.logits.grad[[0, 1, 3]].abs().sum(1).gt(0).all()


def test_divergences(view):
    p, q = view.logits.softmax(-1), view.teacher.logits.softmax(-1)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert_close(Divergence()(view), expected)
    assert_close(Divergence("kl")(view), (q * (q / p).log()).sum(-1))
    p, q = (view.logits / 2).softmax(-1), (view.teacher.logits / 2).softmax(-1)
    assert_close(Divergence("kl", temperature=2.0)(view), 4 * (q * (q / p).log()).sum(-1))


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_an_expert_that_is_matched_costs_nothing(view, kind):
    view.teacher.logits = view.logits.detach() - 3
    assert_close(Divergence(kind)(view), torch.zeros(4).double(), rtol=0, atol=1e-12)


def test_a_temperature_for_js_is_refused():
    with pytest.raises(InputError, match="temperature is for kind 'kl'"):
        Divergence("js", temperature=2.0)


def test_distance_of_features(view):
    distance = (view.features - view.teacher.features).abs().mean(1)
    assert_close(RepresentationL1()(view), distance)
    assert_close(RepresentationL1()(view).mean(), F.l1_loss(view.features, view.teacher.features))
    for own, target in zip(view.blocks, view.teacher.blocks, strict=True):
        distance = distance + (own - target).abs().mean(1)
    assert_close(RepresentationL1(blocks=True)(view), distance)


def test_an_expert_of_other_blocks_is_refused(view):
    view.teacher.blocks.pop()
    with pytest.raises(ValueError, match="shorter"):
        RepresentationL1(blocks=True)(view)


def test_the_task_is_the_class_of_the_router(view):
    assert_close(TaskIdentity()(view), -view.task_logits.log_softmax(-1)[:, 1])


def test_supervised_is_the_cross_entropy_in_the_logits_precision(view):
    assert_close(Supervised()(view), F.cross_entropy(view.logits, view.labels, reduction="none"), rtol=0, atol=1e-15)
    view.logits = view.logits.detach().bfloat16()
    assert Supervised()(view).dtype == torch.float32


class TestSum:
    def test_weights(self, view):
        terms = [Entropy(), Diversity(), Supervised()]
        one, two, three = (term(view) for term in terms)
        assert_close(Sum(terms)(view), one + two + three)
        assert_close(Sum(terms, [2.0, -0.5, 0.0])(view), 2 * one - 0.5 * two)

    def test_needs_what_its_terms_need(self):
        assert Sum([Entropy(), Diversity()]).needs == {ID}
        assert Sum([Entropy(), Supervised(), Divergence()]).needs == {ID, "labels", "teacher"}

    def test_looks_where_its_terms_look(self):
        assert Sum([Entropy(), RepresentationL1(blocks=True)]).blocks
        assert not Sum([Entropy(), RepresentationL1()]).blocks
        assert Sum([TaskIdentity()]).router_only
        assert not Sum([TaskIdentity(), Entropy()]).router_only

    def test_sums_of_sums(self, view):
        inner = Sum([Entropy(), Supervised()], [1.0, 3.0])
        assert_close(Sum([inner, Entropy()], [2.0, 1.0])(view), 3 * Entropy()(view) + 6 * Supervised()(view))

    @pytest.mark.parametrize(("terms", "weights"), [([], None), ([Entropy()], [1.0, 2.0]), ([Entropy()], [])])
    def test_one_weight_per_term(self, terms: list[Objective], weights: list[float] | None):
        expected = f"Sum has {len(terms)} terms and {len(weights or [])} weights: give one weight per term"
        with pytest.raises(InputError, match=expected):
            Sum(terms, weights)
