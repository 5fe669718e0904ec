"""Merging in a tree, with its child processes run in this one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_suite import TinySuite
from torch.testing import assert_close

from trainers import cli, tree
from trainers.compare_runs import Record

FIT = ["--model.init_args.suite=tiny_suite.TinySuite", "--data.init_args.batch_size=4", "--trainer.max_steps=2"]
FIT += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--report.figures=false", "--report.references=false"]


@pytest.fixture
def commands(monkeypatch):
    """Every command line that a child would have had."""
    seen = []

    def wait(command, log):
        seen.append(command[2:])
        cli.main(command[2:])
        return 0, 0.5

    def execute(node):
        node.start()
        wait(node.command(), None)
        return node.write(Record(node.key(), None, 1.0, 0.5))

    monkeypatch.setattr(tree, "wait", wait)
    monkeypatch.setattr(tree, "execute", execute)
    return seen


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_merges_become_experts_until_one_is_left_and_nothing_is_done_twice(commands, tmp_path, capsys):
    output = tmp_path / "tree"
    tree.main(["--output", str(output), "--", *FIT])
    assert [command[0] for command in commands] == ["fit", "export"] * 2
    base = TinySuite().task_vectors().base
    root = json.loads((output / "one+two+three" / "coefficients.json").read_text())
    assert all(list(row) == ["one+two", "three"] for row in root["coefficients"].values())
    first, three = load_file(output / "one+two" / "merged.safetensors"), TinySuite().task_vectors().expert("three")
    merged = load_file(output / "one+two+three" / "merged.safetensors")
    for name, row in root["coefficients"].items():
        expected = base[name] + row["one+two"] * (first[name] - base[name]) + row["three"] * (three[name] - base[name])
        assert_close(merged[name], expected, msg=name)
    scored = json.loads((output / "one+two" / "results.json").read_text())["rows"][-1]
    assert list(scored["accuracy"]) == ["one", "two"]
    assert "| one+two+three | 2 |" in (output / "tree.md").read_text()

    (output / "one+two+three" / "merged.safetensors").unlink()
    tree.main(["--output", str(output), "--", *FIT])
    assert [command[0] for command in commands[4:]] == ["export"]
    again = load_file(output / "one+two+three" / "merged.safetensors")
    assert all(torch.equal(again[name], merged[name]) for name in merged)


def test_a_group_as_large_as_the_pool_is_the_flat_run(commands, tmp_path):
    tree.main(["--group", "3", "--output", str(tmp_path / "tree"), "--", *FIT])
    cli.main(["fit", *FIT, "--model.init_args.coefficients.init_args.init=0.333333333333333333", f"--root={tmp_path}"])
    of_tree, flat = (tmp_path / name / "coefficients.json" for name in ("tree/one+two+three", "run"))
    assert json.loads(of_tree.read_text())["coefficients"] == json.loads(flat.read_text())["coefficients"]


def test_clear_errors(tmp_path, capsys):
    for arguments, message in (
        (["--group", "1", "--", *FIT], "a group has at least 2 experts"),
        (["--", *FIT, "--trainer.max_stepz=1"], "max_stepz"),
        (
            ["--", "--model.init_args.suite={class_path: adamerge.suites.Mini, init_args: {distractors: 1}}"],
            "'pattern0'",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            tree.main(["--output", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
