"""Tables of tokens and positions: matrices to the rules whose published code sees them so, vectors to the others."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import TaskVectors, merge
from adamerge.rules import (
    Cart,
    Doge,
    ElectSign,
    IsoC,
    IsoCts,
    KnOts,
    Matrices,
    Mean,
    Opcm,
    Svc,
    TaskArithmetic,
    Trim,
    TsvM,
    Wudi,
)

NAME = "embeddings.position_embedding.weight"
LINEAR = Matrices(tables=False)


@pytest.fixture
def tv() -> TaskVectors:
    shapes = {NAME: (7, 5), "encoder.layers.0.fc1.weight": (5, 6)}
    base = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    experts = {t: {name: value + torch.randn_like(value) for name, value in base.items()} for t in "abc"}
    return TaskVectors.from_state_dicts(base, experts)


def table(tv: TaskVectors, *rules) -> torch.Tensor:
    return merge(tv, list(rules))[NAME] - tv.base[NAME]


def test_linear_layers_alone(tv):
    deltas, ties = tv.deltas[NAME], [Trim(0.5, scope="tensor"), ElectSign("mean")]
    assert_close(table(tv, Cart()), deltas.mean(0))
    assert_close(table(tv, Opcm(rescale=False)), deltas.sum(0))
    assert_close(table(tv, Doge(steps=1)), torch.zeros_like(deltas[0]))
    assert_close(table(tv, KnOts(ties)), table(tv, *ties))
    assert not torch.allclose(table(tv, Opcm(rescale=False, matrices=Matrices())), deltas.sum(0))


@pytest.mark.parametrize("rule", [TsvM, IsoC, IsoCts, Wudi], ids=lambda rule: rule.__name__)
def test_every_matrix(tv, rule):
    assert_close(table(tv, rule(matrices=LINEAR)), table(tv, Mean()))
    assert not torch.allclose(table(tv, rule()), table(tv, Mean()))


def test_every_matrix_is_calibrated(tv):
    assert_close(table(tv, TaskArithmetic(), Svc(matrices=LINEAR)), tv.deltas[NAME].sum(0))
    assert not torch.allclose(table(tv, TaskArithmetic(), Svc()), tv.deltas[NAME].sum(0))
