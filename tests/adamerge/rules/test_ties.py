"""TIES: thresholds as sorting finds them, elections as counted by hand."""

import pytest
import torch
from by_hand import vectors
from safetensors.torch import save_file
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.merge import plan
from adamerge.rules import ElectSign, Mean, TaskArithmetic, Trim, transform
from adamerge.rules.ties import kth_magnitudes

# -- thresholds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 500, 999, 1000])
def test_the_kth_magnitude_is_that_of_a_sort(dtype, rank):
    values = torch.randn(3, 1000, dtype=dtype) * torch.logspace(-3, 3, 1000, dtype=dtype)
    values[1, :400] = 0
    values[2, 100:700] = -1.5
    stacks = [values[:, :600].reshape(3, 20, 30), values[:, 600:]]
    found = kth_magnitudes(lambda work: map(work, stacks), rank, dtype, 3)
    assert found.dtype == dtype
    assert torch.equal(found, values.abs().sort(1).values[:, rank - 1])


def test_the_kth_magnitude_over_tensors_of_two_dtypes():
    stacks = [torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0 + 1e-12, 0.1]], dtype=torch.float64)]
    assert kth_magnitudes(lambda work: map(work, stacks), 3, torch.float64, 1).tolist() == [2.0 + 1e-12]


# -- trim --------------------------------------------------------------------------------------------------------------


def test_trim_keeps_the_largest_of_all_tensors_together():
    tv = vectors(u=[[1.0, -9.0, 2.0, 3.0], [0.0, 1.0, 2.0, 8.0]], v=[[-4.0, 5.0], [7.0, -6.0]])
    after = Trim(0.34).__call__(tv)
    # ⌊0.34 · 6⌋ = 2: the fourth smallest magnitude and what is above it.
    assert after.deltas["u"].tolist() == [[0, -9, 0, 0], [0, 0, 0, 8]]
    assert after.deltas["v"].tolist() == [[-4, 5], [7, -6]]


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.5, 0.9])
def test_trim_keeps_one_entry_more_than_its_share(tv, keep):
    tv = TaskVectors(tv.base, {n: d + torch.rand(d.shape) for n, d in tv.deltas.items()}, tv.tasks)
    after, total = Trim(keep)(tv), sum(value.numel() for value in tv.base.values())
    for k in range(3):
        assert sum(int(delta[k].count_nonzero()) for delta in after.deltas.values()) == int(keep * total) + 1
        kept, lost = [], []
        for name, delta in after.deltas.items():
            kept.append(tv.deltas[name][k][delta[k] != 0].abs())
            lost.append(tv.deltas[name][k][delta[k] == 0].abs())
            assert torch.equal(delta[k][delta[k] != 0], tv.deltas[name][k][delta[k] != 0])
        assert torch.cat(kept).min() > torch.cat(lost).max()


def test_unchanged_tensors_count_only_when_asked():
    tv = vectors(moved=[[1.0, 2.0, 3.0, 4.0, 5.0]], frozen=[[0.0] * 5])
    assert Trim(0.4)(tv).deltas["moved"].tolist() == [[0, 0, 3, 4, 5]]
    assert Trim(0.4, count_unchanged=True)(tv).deltas["moved"].tolist() == [[1, 2, 3, 4, 5]]
    assert Trim(0.2, count_unchanged=True)(tv).deltas["moved"].tolist() == [[0, 0, 3, 4, 5]]


def test_a_tensor_that_loses_all_its_entries_has_no_row():
    after = Trim(0.2)(vectors(large=[[5.0, 6.0, 7.0, 8.0]], small=[[0.1, 0.1, 0.1, 0.1]]))
    assert after.rows == ("large",)
    assert after.deltas["small"].untyped_storage().nbytes() == 8


def test_experts_that_are_the_base_have_nothing_to_trim():
    with pytest.warns(UserWarning, match="identical to the base"):
        tv = vectors(w=[[0.0, 0.0]])
    assert not Trim(0.2)(tv).deltas["w"].any()


def test_each_tensor_may_be_counted_by_itself():
    tv = vectors(u=[[1.0, -9.0, 2.0, 3.0], [0.0, 1.0, 2.0, 8.0]], v=[[-4.0, 5.0], [7.0, -6.0]], s=[[1.0], [-2.0]])
    after = Trim(0.3, scope="tensor")(tv)
    # ⌊0.3 · 4⌋ = 1 and 0 of the others: the third, the second and the only smallest, and what is above.
    assert after.deltas["u"].tolist() == [[0, -9, 0, 3], [0, 0, 2, 8]]
    assert after.deltas["v"].tolist() == [[0, 5], [7, 0]]
    assert after.deltas["s"].tolist() == [[1], [-2]]
    everything = Trim(1.0, scope="tensor")(tv)
    assert all(torch.equal(everything.deltas[name], delta) for name, delta in tv.deltas.items())


def test_a_scope_is_wanted():
    with pytest.raises(InputError, match="expected scope to be 'model' or 'tensor' in Trim, got 'layer'"):
        Trim(scope="layer")
    with pytest.raises(InputError, match="with scope='tensor', leave count_unchanged out"):
        Trim(scope="tensor", count_unchanged=True)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, 20])
def test_a_share_is_wanted(keep):
    with pytest.raises(InputError, match=f"expected 0 < keep <= 1 in Trim, got {keep}"):
        Trim(keep)


# -- election ----------------------------------------------------------------------------------------------------------


def test_the_sign_of_the_sum_wins():
    after = ElectSign()(vectors(w=[[1.0, -2.0, 3.0, 0.0], [1.0, 1.0, -4.0, 0.0], [-1.0, 0.5, 0.5, -1.0]]))
    assert after.deltas["w"].tolist() == [[1, -2, 0, 0], [1, 0, -4, 0], [0, 0, 0, -1]]


@pytest.mark.parametrize(("others", "kept"), [([1.0, 1.0, -9.0], [[2, 0]]), ([-1.0, -1.0, 9.0], [[0, -2]])])
def test_a_tie_goes_to_the_sign_of_most_sums(others, kept):
    tv = vectors(w=[[2.0], [-2.0]], others=[others, others])
    assert ElectSign()(tv).deltas["w"].T.tolist() == kept


def test_a_tie_in_a_balanced_model_goes_up():
    assert ElectSign()(vectors(w=[[2.0, 1.0], [-2.0, -1.0]])).deltas["w"].tolist() == [[2, 1], [0, 0]]


def test_experts_that_agree_keep_everything(base, experts):
    tv = TaskVectors.from_state_dicts(base, dict.fromkeys("abcd", experts["digits"]))
    after = ElectSign()(tv)
    assert all(torch.equal(after.deltas[name], delta) for name, delta in tv.deltas.items())
    merged = merge(tv, rules=[ElectSign("mean")])
    assert all(torch.equal(merged[name], value) for name, value in experts["digits"].items())


def test_an_election_has_one_outcome(tv):
    once = ElectSign()(tv)
    twice = ElectSign()(once)
    for name, delta in once.deltas.items():
        assert torch.equal(twice.deltas[name], delta)
        signs = delta.sign()
        assert (signs.max(0).values - signs.min(0).values).max() <= 1


def test_the_sum_and_the_disjoint_mean():
    tv = vectors(w=[[1.0, -2.0, 3.0, 0.0], [3.0, 1.0, 3.0, 0.0]])
    assert merge(tv, rules=[ElectSign("sum")], scale=0.5)["w"].tolist() == [2, -1, 3, 0]
    assert merge(tv, rules=[ElectSign("mean")], scale=0.5)["w"].tolist() == [1, -1, 1.5, 0]


def test_the_split_sums_to_the_merge(tv, base):
    steps = [Trim(0.4), ElectSign("sum")]
    merged, split = merge(tv, rules=steps, scale=0.3), transform(tv, steps)
    for name, value in base.items():
        assert_close(merged[name], value + sum(0.3 * part for part in split.deltas[name]), rtol=0, atol=1e-14)
    assert all(torch.equal(value, merged[n]) for n, value in merge(split, [TaskArithmetic()], 0.3).items())


def test_an_election_without_a_mean_may_be_averaged(tv):
    merged = merge(tv, rules=[ElectSign("sum"), Mean()])
    expected = merge(tv, rules=[ElectSign("sum")], scale=1 / 3)
    assert all(torch.allclose(merged[name], value, rtol=0, atol=1e-14) for name, value in expected.items())


def test_another_way_to_combine_is_refused():
    with pytest.raises(InputError, match="expected combine to be 'sum' or 'mean' in ElectSign, got 'max'"):
        ElectSign("max")


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_ties_in_pieces_of_files_are_settled_as_by_hand(tmp_path, monkeypatch, combine):
    monkeypatch.setattr("adamerge.differences.PIECE", 64)
    grid = torch.Generator().manual_seed(3)
    base = {name: torch.randn(40, 8, generator=grid).bfloat16() for name in ("u", "v")}
    steps = [torch.randint(-3, 3, (40, 8), generator=grid) for _ in range(8)]  # most of them negative, many ties
    experts = {task: {name: base[name] + 0.25 * steps.pop() for name in base} for task in "abcd"}
    for task, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{task}.safetensors")
    files = TaskVectors.open(tmp_path / "base.safetensors", {t: tmp_path / f"{t}.safetensors" for t in experts})
    found = plan(files, [Trim(0.5), ElectSign(combine)])
    whole = {task: torch.cat([state[name].float() for name in base]) for task, state in experts.items()}
    deltas = torch.stack(list(whole.values())) - torch.cat([base[name].float() for name in base])
    least = deltas.abs().flatten(1).sort(1).values[:, 320 - 1].view(4, 1, 1)
    trimmed = torch.where(deltas.abs() >= least, deltas, 0)
    sign = trimmed.sum(0).sign()
    assert sign.sum() < 0
    assert bool(((sign == 0) & trimmed.any(0)).any())
    agreed = torch.where(trimmed.sign() == torch.where(sign == 0, -1, sign), trimmed, 0)
    change = agreed.sum(0) / ((agreed != 0).sum(0).clamp(min=1) if combine == "mean" else 1)
    for name, part in zip(base, change.split(40), strict=True):
        assert torch.equal(torch.cat(list(found.parts(name))), (base[name].float() + part).bfloat16())
