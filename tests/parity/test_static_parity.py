"""Static rules against a reference implementation, in float64: elementwise ones without any difference at all."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import TaskVectors, merge
from adamerge.rules import ElectSign, IsoC, MagMax, Mean, TaskArithmetic, Transform, Trim, TsvM
from adamerge.rules.dare import dare


@pytest.fixture
def task_vectors(shared) -> TaskVectors:
    inputs = torch.load(shared / "parity/inputs.pt", weights_only=True)
    double = [{name: value.double() for name, value in state.items()} for state in (inputs["base"], *inputs["experts"])]
    return TaskVectors.from_state_dicts(double[0], dict(zip(inputs["tasks"], double[1:], strict=True)))


@pytest.mark.parametrize(
    ("file", "rules", "scale"),
    [
        ("simple_average", [Mean()], 1.0),
        ("task_arithmetic", [TaskArithmetic()], 0.3),
        ("magmax", [MagMax()], 0.5),
        ("ties_sum_20", [Trim(0.2), ElectSign("sum")], 0.3),
        ("ties_mean_20", [Trim(0.2), ElectSign("mean")], 0.3),
    ],
)
def test_elementwise_merges(shared, task_vectors, file, rules, scale):
    expected = torch.load(shared / f"parity/{file}.pt", weights_only=True)["fp64"]["merged"]
    merged = merge(task_vectors, rules=rules, scale=scale)
    assert set(merged) == set(expected)
    for name, value in merged.items():
        assert value.dtype == torch.float64
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("file", "rule"), [("tsvm_alpha_None", TsvM()), ("iso_c", IsoC())])
def test_spectral_merges(shared, task_vectors, file, rule):
    expected = torch.load(shared / f"parity/{file}.pt", weights_only=True)["fp64"]["merged"]
    merged = merge(task_vectors, rules=[rule])
    assert set(merged) == set(expected)
    for name, value in merged.items():
        assert_close(value, expected[name], rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_dare_given_its_masks(shared, task_vectors):
    reference = torch.load(shared / "parity/dare_ta_0.5.pt", weights_only=True)
    drop, scale = reference["hparams"]["sparsity_ratio"], reference["hparams"]["scaling_factor"]
    names, kept = list(reference["keep_masks_fp32"][0]), reference["keep_masks_fp32"]

    def drawn(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(reference["hparams"]["seed"])
        shapes = {name: task_vectors.base[name].shape for name in names}
        return [{n: torch.bernoulli(torch.full(s, drop, dtype=dtype)) == 0 for n, s in shapes.items()} for _ in kept]

    # The masks on file are those of the run in float32; the same seed draws others in float64.
    singles, masks = drawn(torch.float32), drawn(torch.float64)
    assert all(
        torch.equal(ours[name], theirs[name]) for ours, theirs in zip(singles, kept, strict=True) for name in names
    )

    class Given(Transform):
        """DARE with masks that somebody else has drawn."""

        def __call__(self, task_vectors):
            def change(name, deltas):
                pairs = zip(deltas, masks, strict=True)
                return torch.stack([dare(delta, mask[name], drop) for delta, mask in pairs])

            return task_vectors.changed(change)

    for name, value in merge(task_vectors, rules=[Given()], scale=scale).items():
        assert torch.equal(value, reference["fp64"]["merged"][name]), name
