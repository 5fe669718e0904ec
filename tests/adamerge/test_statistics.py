import pytest
import torch
from torch import nn

from adamerge import InputError
from adamerge.observing import Observation
from adamerge.statistics import Statistics, collect


class Pair(nn.Module):
    """Two layers that share their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.a(x) + self.b(x)


@pytest.fixture
def experts():
    torch.manual_seed(0)
    return {task: Pair().state_dict() for task in ("plain", "a/b: c")}


@pytest.fixture
def batches():
    return {task: lambda: [torch.ones(2, 3), torch.arange(3.0)[None]] for task in ("plain", "a/b: c")}


def same(left: Statistics, right: Statistics) -> bool:
    return left.observations.keys() == right.observations.keys() and all(
        one.shared == right.observations[task].shared
        and one.transposed == right.observations[task].transposed
        and {k: v.tolist() for k, v in one.tensors.items()}
        == {k: right.observations[task].tensors[k].tolist() for k in right.observations[task].tensors}
        for task, one in left.observations.items()
    )


def test_a_folder_holds_what_was_saved(tmp_path, experts, batches):
    statistics = collect(Pair(), experts, batches, ("gram", "fisher"))
    statistics.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert same(Statistics.open(tmp_path), statistics)
    assert Statistics.open(statistics) is statistics


def test_experts_are_measured_on_their_own_data(experts, batches):
    batches["plain"] = lambda: [torch.zeros(2, 3)]
    found = collect(Pair(), experts, batches)
    assert not found.find("gram", "plain", "b.weight").any()
    assert found.find("gram", "a/b: c", "b.weight")[2, 2] == pytest.approx((1 + 1 + 4) / 3)


def test_what_was_measured_once_is_read(tmp_path, monkeypatch, experts, batches):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    data = dict.fromkeys(experts, "ones")
    first = collect(Pair(), experts, batches, data=data)
    assert len(list((tmp_path / "statistics").iterdir())) == 2

    def fail():
        raise AssertionError("measured again")

    never = dict.fromkeys(experts, fail)
    assert same(collect(Pair(), experts, never, data=data), first)
    for other in ({"seed": 1}, {"measures": ("magnitude",)}, {"data": dict.fromkeys(experts, "twos")}):
        with pytest.raises(AssertionError, match="measured again"):
            collect(Pair(), experts, never, **{"data": data, **other})
    experts["plain"]["a.bias"] += 1
    with pytest.raises(AssertionError, match="measured again"):
        collect(Pair(), experts, never, data=data)


def test_the_model_is_left_as_it_was(experts, batches):
    model = Pair().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, experts, batches, ("fisher",))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_said(tmp_path, experts, batches):
    with pytest.raises(InputError, match="no data for expert 'a/b: c': there are batches for plain"):
        collect(Pair(), experts, {"plain": batches["plain"]})
    with pytest.raises(InputError, match="expert 'plain' does not fit the model"):
        collect(nn.Linear(3, 2), experts, batches)
    with pytest.raises(InputError, match="holds no statistics"):
        Statistics.open(tmp_path / "nowhere")
    partly = Statistics({"x": Observation({"gram/w": torch.eye(2)}), "y": Observation({"gram/v": torch.eye(2)})})
    with pytest.raises(InputError, match="w: the gram of 'y' was not measured"):
        partly.of_layer("gram", "w", ("x", "y"), 2)
