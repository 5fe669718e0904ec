import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.observing import Observation
from adamerge.rules import Aim, RegMean, TaskArithmetic
from adamerge.statistics import Statistics, collect

BASE = {"w": torch.zeros(2, 3), "n": torch.zeros(3), "b": torch.zeros(2)}
EXPERT = {"w": torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), "n": torch.ones(3), "b": torch.ones(2)}


def merged(observation: Observation, omega: float = 0.4) -> dict[str, torch.Tensor]:
    vectors = TaskVectors.from_state_dicts(BASE, {"task": EXPERT})
    return merge(vectors, [TaskArithmetic(), Aim(Statistics({"base": observation}), omega)])


def test_the_most_used_input_changes_least():
    found = merged(
        Observation({"magnitude/w": torch.tensor([4.0, 2.0, 0.0]), "magnitude/n": torch.tensor([0.0, 1.0, 5.0])})
    )
    assert_close(found["w"], torch.tensor([[0.4, 0.7, 1.0], [0.8, 1.4, 2.0]]))
    assert_close(found["n"], torch.tensor([1.0, 0.88, 0.4]))
    assert_close(found["b"], EXPERT["b"])


def test_transposed_weights_have_their_inputs_in_rows():
    found = merged(Observation({"magnitude/w": torch.tensor([4.0, 1.0])}, transposed=frozenset("w")))
    assert_close(found["w"], torch.tensor([[0.4, 0.4, 0.4], [1.7, 1.7, 1.7]]))


@pytest.mark.parametrize("magnitude", [[0.0, 0.0, 0.0], [3.0, 3.0, 3.0]])
def test_inputs_that_are_all_alike(magnitude):
    found = merged(Observation({"magnitude/w": torch.tensor(magnitude)}), omega=0.25)
    assert_close(found["w"], EXPERT["w"] * (0.25 if any(magnitude) else 1.0))


def test_it_corrects_what_another_rule_has_combined():
    model, inputs = nn.Linear(2, 1), torch.tensor([[1.0, -2.0], [3.0, 2.0]])
    base = {name: value.clone() for name, value in model.state_dict().items()}
    expert = {name: value + 1 for name, value in base.items()}
    vectors = TaskVectors.from_state_dicts(base, {"task": expert})
    grams = collect(model, {"task": expert}, {"task": lambda: [inputs]})
    magnitude = collect(model, {"base": base}, {"base": lambda: [inputs]}, ("magnitude",))
    found = merge(vectors, [RegMean(grams), Aim(magnitude, omega=0.0)])
    assert_close(found["weight"] - base["weight"], torch.tensor([[0.0, 0.0]]))
    assert_close(found["bias"], expert["bias"])


def test_what_does_not_fit_is_said():
    with pytest.raises(InputError, match=r"w: the magnitude of 'base' has shape \[2\], expected \[3\]"):
        merged(Observation({"magnitude/w": torch.ones(2)}))
    with pytest.raises(InputError, match="Aim needs the magnitude of 'base'"):
        merged(Observation({"gram/w": torch.ones(2, 2)}))
    with pytest.raises(InputError, match="0 <= omega <= 1"):
        Aim("somewhere", omega=2.0)
