"""Permuted networks compute the same function, and planted permutations are found again."""

import pytest
import torch
from permuted_networks import MODELS, build, drawn, inputs, outputs, planted, symmetry
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from adamerge import InputError
from adamerge.permutations import apply, chain, match_activations, match_weights, recalibrate, symmetry_of, transport
from adamerge.permutations.activations import correlations
from adamerge.permutations.weights import assign


@pytest.mark.parametrize("kind", MODELS)
def test_a_permuted_network_is_the_same_function(kind):
    model = build(kind)
    state, x = model.state_dict(), inputs(kind)
    before = {name: tensor.clone() for name, tensor in state.items()}
    found = symmetry(kind, state)
    for label in found.sizes:  # one at a time: no two mistakes cancel
        other = apply(state, found, {label: torch.arange(found.sizes[label]).roll(1)})
        assert any(not torch.equal(other[name], state[name]) for name in state), label
        torch.testing.assert_close(outputs(model, other, x), outputs(model, state, x), msg=label)
    together = apply(state, found, drawn(found))
    torch.testing.assert_close(outputs(model, together, x), outputs(model, state, x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


@pytest.mark.parametrize("kind", MODELS)
def test_planted_permutations_are_found_by_weights(kind):
    model, other, found, expected = planted(kind)
    order = match_weights(model.state_dict(), other.state_dict(), found)
    assert {label: p.tolist() for label, p in order.items()} == {label: p.tolist() for label, p in expected.items()}
    aligned = apply(other.state_dict(), found, order)
    assert all(torch.equal(aligned[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["mlp", "basic", "torchvision", "timm", "transformers"])
def test_planted_permutations_are_found_by_activations(kind):
    model, other, found, expected = planted(kind)
    other.train()
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(MODELS[kind][1], dtype=torch.float64, generator=generator) for _ in range(3)]
    order = match_activations(model, other, found, batches)
    assert {label: p.tolist() for label, p in order.items()} == {label: p.tolist() for label, p in expected.items()}
    assert other.training, "the model is left in its mode"
    assert not any(module._forward_hooks for module in other.modules())


def test_correlations_are_those_of_all_outputs_whatever_their_means():
    one, two = build("mlp"), build("mlp", seed=1)
    for model in (one, two):
        model[0].bias.data += 5
    x = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = correlations(one, two, chain(one.state_dict()), x.split(16))
    with torch.no_grad():
        expected = torch.corrcoef(torch.cat([one[0](x), two[0](x)], 1).T)[:12, 12:]
        normed = torch.corrcoef(torch.cat([one[:2](x), two[:2](x)], 1).T)[:12, 12:]
    torch.testing.assert_close(found["layer0"], (expected + normed) / 2)


def test_resnets_of_torchvision_share_their_residual_streams():
    with torch.device("meta"):
        basic, bottleneck = ResNet(BasicBlock, [2, 2, 2, 2]), ResNet(Bottleneck, [1, 1, 1, 1])
    found = symmetry_of(basic.state_dict())
    assert {"bn1.weight", "layer1.0.conv2.weight", "layer1.1.bn2.running_var"} <= {n for n, _ in found.places("stage0")}
    assert ("layer2.0.downsample.0.weight", 1) in found.places("stage0")
    assert found.sizes["stage4"] == 512
    found = symmetry_of(bottleneck.state_dict())
    assert (found.sizes["stage0"], found.sizes["stage1"], found.sizes["1.0.b"]) == (64, 256, 64)


def test_matching_does_not_lose():
    """Two independent networks: the inner product with the reference never falls below the start's."""
    one, two = build("mlp", 3).state_dict(), build("mlp", 4).state_dict()
    found = chain(one)
    aligned = apply(two, found, match_weights(one, two, found))
    product = lambda state: sum(float((one[n] * state[n]).sum()) for n in found.axes)  # noqa: E731
    assert product(aligned) > product(two)


def test_soft_assignments():
    score = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.1, 0.8], [0.0, 0.7, 0.2]], dtype=torch.float64)
    soft = transport(score, 0.3)
    torch.testing.assert_close(soft.sum(0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(soft.sum(1), torch.ones(3, dtype=torch.float64))
    # The Sinkhorn form: log p less score / temperature is a sum of a number for each row and one for each column.
    rest = soft.log() - score / 0.3
    torch.testing.assert_close(rest - rest[:1] - rest[:, :1] + rest[0, 0], torch.zeros_like(rest))
    hard = transport(score, 0.01)
    torch.testing.assert_close(hard, torch.eye(3, dtype=torch.float64)[assign(score)], atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="temperature must be above 0"):
        transport(score, 0.0)


def test_soft_permutations_mix_units_and_hard_ones_are_their_limit():
    model, other, found, _ = planted("mlp")
    batches = [torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))]
    soft = match_activations(model, other, found, batches, temperature=1e-3)
    aligned = apply(other.state_dict(), found, soft)
    for name in found.axes:
        torch.testing.assert_close(aligned[name], model.state_dict()[name], atol=1e-4, rtol=0)
    halves = {"layer0": torch.full((12, 12), 1 / 12, dtype=torch.float64)}
    mixed = apply(other.state_dict(), found, halves)["0.bias"]
    torch.testing.assert_close(mixed, other.state_dict()["0.bias"].mean().expand(12))


def test_statistics_are_taken_anew():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.9))
    model.eval()
    norm = model[1]
    norm.running_mean.fill_(9), norm.running_var.fill_(9)
    batches = [torch.randn(20, 4), torch.randn(20, 4)]
    with torch.no_grad():
        means = torch.stack([model[0](batch).mean(0) for batch in batches]).mean(0)
        variances = torch.stack([model[0](batch).var(0) for batch in batches]).mean(0)
    recalibrate(model, batches)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1
    assert not norm.training


def test_errors_name_what_does_not_fit():
    state = build("torchvision").state_dict()
    with pytest.raises(InputError, match="say how many, heads=12"):
        symmetry_of(state)
    with pytest.raises(InputError, match=r"in_proj_weight has 72 entries along axis 0, expected a multiple of 21"):
        symmetry_of(state, heads=7)
    with pytest.raises(InputError, match="ViT: odd"):
        symmetry_of({"odd": torch.zeros(3)})
    with pytest.raises(InputError, match=r"1\.weight has 5 entries along axis 1, expected a multiple of 4"):
        chain({"0.weight": torch.zeros(4, 2), "1.weight": torch.zeros(2, 5)})
    one = build("mlp").state_dict()
    with pytest.raises(InputError, match=r"0\.weight is missing"):
        match_weights(one, {}, chain(one))
    with pytest.raises(InputError, match=r"0\.weight has shapes \[12, 6\] and \[2, 2\]"):
        match_weights(one, one | {"0.weight": torch.zeros(2, 2)}, chain(one))
    with pytest.raises(InputError, match="no batch came"):
        match_activations(build("mlp"), build("mlp"), chain(one), [])
