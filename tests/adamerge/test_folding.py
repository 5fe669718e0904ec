"""Experts that join a merge one by one, from the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge import InputError
from adamerge.__main__ import main
from adamerge.folding import fold_job


@pytest.fixture
def adamerge(tmp_path, monkeypatch):
    """The command, in a folder with a base and four experts."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in ("base", "a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.randn(3, 2), "kept": torch.randn(2)}, tmp_path / name / "model.safetensors")

    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["adamerge", *arguments])
        main()

    def merged(output: str, experts: str, rule: str, scale: float) -> None:
        values = {"base": "base", "experts": {e: e for e in experts}, "rules": [rule], "scale": scale}
        (tmp_path / "recipe.yaml").write_text(json.dumps(values | {"exclude": ["kept"]}))
        call("merge", "recipe.yaml", "--output", output)

    call.merged = merged
    return call


@pytest.mark.parametrize(("rule", "scale"), [("Mean", 1.0), ("TaskArithmetic", 0.3), ("MagMax", 0.5)])
def test_experts_that_join_one_by_one_are_as_merged_at_once(adamerge, tmp_path, rule, scale):
    adamerge.merged("two", "ab", rule, scale)
    adamerge("fold", "two", "c", "--base", "base", "--output", "three")
    adamerge("fold", "three", "d", "--base", "base", "--output", "four")
    adamerge.merged("at once", "abcd", rule, scale)
    four, at_once = (load_file(tmp_path / name / "model.safetensors") for name in ("four", "at once"))
    torch.testing.assert_close(four, at_once)


def test_what_no_record_says_is_given_or_asked_for(adamerge, tmp_path):
    adamerge.merged("two", "ab", "TaskArithmetic", 0.5)
    (tmp_path / "two" / "adamerge.json").unlink()
    with pytest.raises(InputError, match=r"two has no adamerge\.json .*: give --rule, --count$"):
        fold_job("two", "c", "base", scale=0.5)
    (step,) = fold_job("two", "c", "base", "TaskArithmetic", 2, 0.5).rules
    assert (step.count, step.scale) == (2, 0.5)


def test_a_rule_that_needs_all_experts_is_refused(adamerge, capsys):
    adamerge.merged("two", "ab", "Sce", 1.0)
    with pytest.raises(SystemExit):
        adamerge("fold", "two", "c", "--base", "base", "--output", "three")
    assert "Sce needs all experts at once; rules that can be folded are MagMax" in " ".join(
        capsys.readouterr().err.split()
    )
