"""Queries, keys and values in one tensor, merged as three: the same as from a checkpoint that keeps them apart."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge import TaskVectors, merge
from adamerge.recipes import job, parse
from adamerge.rules import Mean, TaskArithmetic, Trim, TruncatedSVD
from adamerge.running import run

OPEN_CLIP, GPT2, BIAS = "blocks.0.attn.in_proj_weight", "h.0.attn.c_attn.weight", "blocks.0.attn.in_proj_bias"


def states() -> list[dict[str, torch.Tensor]]:
    shapes = {OPEN_CLIP: (12, 4), BIAS: (12,), GPT2: (4, 12), "blocks.0.mlp.w": (4, 6), "steps": ()}
    return [{n: torch.randn(s) if s else torch.tensor(3) for n, s in shapes.items()} for _ in range(3)]


def apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same model as it would be with three tensors each, written out by hand."""
    split = {f"q{n}": state[OPEN_CLIP][4 * n : 4 * n + 4] for n in range(3)}
    split |= {f"g{n}": state[GPT2][:, 4 * n : 4 * n + 4] for n in range(3)}
    split |= {f"b{n}": state[BIAS][4 * n : 4 * n + 4] for n in range(3)}
    return {**{n: v.clone() for n, v in split.items()}, "w": state["blocks.0.mlp.w"]}


@pytest.mark.parametrize("rules", [[TruncatedSVD(rank=1)], [Trim(0.3), TaskArithmetic()], [Mean()]])
def test_a_split_merge_is_that_of_three_tensors(rules):
    base, a, b = states()
    merged = merge(TaskVectors.from_state_dicts(base, {"a": a, "b": b}), rules, 0.7, split_fused_qkv=True)
    parts = merge(TaskVectors.from_state_dicts(apart(base), {"a": apart(a), "b": apart(b)}), rules, 0.7)
    assert list(merged) == list(base)
    assert torch.equal(merged[OPEN_CLIP], torch.cat([parts[f"q{n}"] for n in range(3)]))
    assert torch.equal(merged[GPT2], torch.cat([parts[f"g{n}"] for n in range(3)], 1))
    assert torch.equal(merged[BIAS], torch.cat([parts[f"b{n}"] for n in range(3)]))
    assert torch.equal(merged["blocks.0.mlp.w"], parts["w"])
    assert merged["steps"] == 3


def test_splitting_matters_to_a_rule_that_sees_whole_tensors():
    base, a, b = states()
    tv = TaskVectors.from_state_dicts(base, {"a": a, "b": b})
    whole, split = (merge(tv, [TruncatedSVD(rank=1)], split_fused_qkv=choice) for choice in (False, True))
    assert not torch.allclose(whole[OPEN_CLIP], split[OPEN_CLIP])
    assert torch.equal(whole["blocks.0.mlp.w"], split["blocks.0.mlp.w"])


@pytest.mark.parametrize("piece", [5, 2**18])
@pytest.mark.parametrize("rules", [["TaskArithmetic"], [{"TruncatedSVD": {"rank": 1}}]], ids=["elementwise", "whole"])
def test_files_are_split_and_joined(tmp_path, monkeypatch, rules, piece):
    monkeypatch.setattr("adamerge.differences.PIECE", piece)
    for name, state in zip(("base", "a", "b"), states(), strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    values = {"base": "base.safetensors", "experts": {"a": "a.safetensors", "b": "b.safetensors"}, "rules": rules}
    asked = job(parse(values | {"split_fused_qkv": True, "exclude": ["mlp"]}), tmp_path)
    written = load_file(run(asked, tmp_path / "out") / "model.safetensors")
    expected = merge(asked.task_vectors.load(), asked.rules, exclude=["mlp"], split_fused_qkv=True)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
