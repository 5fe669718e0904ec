"""Units joined in pairs, and layers solved for: limits in which nothing is lost, and closed forms."""

import pytest
import torch
from permuted_networks import MODELS, build, inputs, outputs, planted
from torch import nn
from torch.testing import assert_close

from adamerge import InputError
from adamerge.permutations import apply, chain, least_squares, zip_units
from adamerge.permutations.zipping import pairs


def images(kind: str, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(MODELS[kind][1], dtype=torch.float64, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", ["mlp", "basic", "torchvision", "timm"])
def test_networks_that_differ_in_order_alone_are_joined_without_loss(kind):
    model, other, found, _ = planted(kind)
    zipped = zip_units(model, other, found, images(kind))
    x = inputs(kind)
    for which in (0, 1):
        assert_close(outputs(model, zipped.state(which), x), outputs(model, model.state_dict(), x))
    assert zipped.shared.keys() == {n for n, axes in found.axes.items() if any(a and not a.reads for a in axes)}


def test_a_network_that_has_a_unit_twice_is_joined_with_itself():
    """Two different networks of three units, of which each has two the same and one is in both: no loss at all."""
    torch.manual_seed(0)
    f, g, h = torch.randn(3, 4, dtype=torch.float64)
    models = [nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double() for _ in range(2)]
    for model, rows in zip(models, ([f, f, g], [h, g, h]), strict=True):
        model[0].weight.data, model[0].bias.data = torch.stack(rows), torch.tensor([row.sum() for row in rows])
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    x = torch.randn(40, 4, dtype=torch.float64)
    zipped = zip_units(*models, chain(states[0]), [x])
    assert zipped.shared.keys() == {"0.weight", "0.bias"}
    for which in (0, 1):
        assert_close(outputs(models[0], zipped.state(which), x), outputs(models[which], states[which], x))
        assert all(torch.equal(models[which].state_dict()[n], tensor) for n, tensor in states[which].items())
    assert {tuple(row.tolist()) for row in zipped.shared["0.weight"]} == {tuple(row.tolist()) for row in (f, g, h)}


def test_pairs_are_taken_by_score():
    score = torch.tensor([[9.0, 3, 1, 5], [3, 9, 4, 0], [1, 4, 9, 2], [5, 0, 2, 9]])
    assert pairs(score).tolist() == [[0, 3], [1, 2]]


def test_a_part_is_shared_and_each_network_has_its_end():
    one, two = build("mlp"), build("mlp", seed=1)
    found = chain(one.state_dict())
    zipped = zip_units(one, two, found, images("mlp"), labels=["layer0"])
    assert zipped.shared.keys() == {f"0.{p}" for p in ("weight", "bias")} | {
        f"1.{p}" for p in ("weight", "bias", "running_mean", "running_var")
    }
    for which, model in enumerate((one, two)):
        assert torch.equal(zipped.own[which]["4.weight"], model.state_dict()["4.weight"])
        assert not torch.equal(zipped.own[which]["3.weight"], model.state_dict()["3.weight"])
    with pytest.raises(InputError, match=r"3\.weight makes 'layer1' of 'layer0'"):
        zip_units(one, two, found, images("mlp"), labels=["layer1"])
    with pytest.raises(InputError, match="'layer7' is no label of these networks; they have layer0, layer1"):
        zip_units(one, two, found, images("mlp"), labels=["layer7"])


@pytest.mark.parametrize("kind", ["mlp", "basic", "torchvision", "timm"])
def test_least_squares_leave_aligned_copies_alone(kind):
    model, other, found, expected = planted(kind)
    other.load_state_dict(apply(other.state_dict(), found, expected))
    solved = least_squares(model, other.train(), images(kind))
    for name, tensor in model.state_dict().items():
        assert_close(solved[name], tensor, rtol=0, atol=1e-9, msg=name)
    assert other.training


def test_layers_are_those_of_the_regression():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
            self.fc = nn.Linear(12, 4, bias=False)

        def forward(self, x):
            return self.fc(self.conv(x).relu().flatten(1))

    torch.manual_seed(0)
    one, two = Two().double(), Two().double()
    x = torch.randn(60, 2, 4, 4, dtype=torch.float64)
    solved = least_squares(one, two, x.split(25), ridge=1e-12)
    with torch.no_grad():
        hidden = [model.conv(x).relu().flatten(1) for model in (one, two)]
        answers = [model.fc(rows) for model, rows in zip((one, two), hidden, strict=True)]
        expected = torch.linalg.lstsq((hidden[0] + hidden[1]) / 2, (answers[0] + answers[1]) / 2).solution.T
    assert_close(solved["fc.weight"], expected, rtol=1e-8, atol=1e-8)
    # Both convolutions see the same images, so that the mean of their weights is exact.
    assert_close(solved["conv.weight"], (one.conv.weight + two.conv.weight).detach() / 2)
    assert_close(solved["conv.bias"], (one.conv.bias + two.conv.bias).detach() / 2)


def test_biases_and_convolutions_are_solved_for_too():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, (2, 1))).double() for _ in range(2)]
    x = torch.randn(50, 2, 3, 3, dtype=torch.float64)
    solved = least_squares(*models, [x], ridge=1e-12)
    with torch.no_grad():
        hidden, answers = (sum(part(m) for m in models) / 2 for part in (lambda m: m[:2](x), lambda m: m(x)))
        patches = torch.stack([hidden[:, :, i : i + 2, j].flatten(1) for i in (0, 1) for j in (0, 1, 2)], 1)
        rows = torch.cat([patches, torch.ones(50, 6, 1, dtype=torch.float64)], 2).flatten(0, 1)
        expected = torch.linalg.lstsq(rows, answers.flatten(2).mT.flatten(0, 1)).solution.T
    assert_close(solved["2.weight"], expected[:, :-1].view(2, 3, 2, 1), rtol=1e-7, atol=1e-8)
    assert_close(solved["2.bias"], expected[:, -1], rtol=1e-7, atol=1e-8)


def test_what_cannot_be_solved_is_said():
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="no batch came"):
        least_squares(model, model, [])
    with pytest.raises(InputError, match="ridge > 0"):
        least_squares(model, model, [torch.zeros(1, 2)], ridge=0.0)
    twice = nn.Sequential(model, model)
    with pytest.raises(InputError, match="0 runs several times in one pass"):
        least_squares(twice, nn.Sequential(model, model), [torch.zeros(1, 2)])
