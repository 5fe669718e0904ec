"""What an inspection says of experts whose relation is known, and what it leaves in a folder."""

import json
import re
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from adamerge import TaskVectors, rules
from adamerge.__main__ import main
from adamerge.inspecting import decompose_all, findings, measure, verdict
from adamerge.inspecting.report import _kinship
from adamerge.inspecting.verdict import two


def experts_along(cosine: float, norm: float = 1.0, far: float = 0.05, size: int = 32) -> TaskVectors:
    """Two experts of rank 1 in each of two blocks; the cosine holds in the first, in the second they are orthogonal."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(size, size, generator=generator) for i in (0, 1)}
    ways = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    along = torch.outer(ways[0], cosine * ways[0] + (1 - cosine**2) ** 0.5 * ways[1])
    away = far * size
    a = {"layers.0.weight": torch.outer(ways[0], ways[0]), "layers.1.weight": torch.outer(ways[0], ways[0])}
    b = {"layers.0.weight": along, "layers.1.weight": torch.outer(ways[1], ways[1])}
    return TaskVectors.from_state_dicts(
        base,
        {
            "a": {name: base[name] + away * change for name, change in a.items()},
            "b": {name: base[name] + norm * away * change for name, change in b.items()},
        },
    )


def said(tv: TaskVectors, topic: str) -> str:
    return " ".join(f.text for f in findings(measure(tv), decompose_all(tv, 9)) if f.topic == topic)


def suggested(tv: TaskVectors) -> list[tuple[str, ...]]:
    found = [f.rules for f in findings(measure(tv), decompose_all(tv, 9)) if f.topic == "try"]
    assert all(hasattr(rules, name) for names in found for name in names)
    return found


def test_a_fight_is_found_where_it_is():
    tv = experts_along(-0.8)
    assert said(tv, "mergeable").startswith("With care")
    assert "a and b fight in layers.0: their cosine there is -0.80 at worst, -0.40 over" in said(tv, "fights")
    assert "layers.1" not in said(tv, "fights")


def test_a_cosine_of_few_entries_is_no_fight():
    """A cosine of −1 over two entries is the toss of two coins; over 200 it is clear."""
    for count, fights in ((2, False), (200, True)):
        change = torch.zeros(400).index_fill(0, torch.arange(count), 0.1)
        base = {"layers.0.weight": torch.randn(20, 20), "layers.1.weight": torch.randn(20, 20)}
        experts = {
            task: {name: value + sign * change.view(20, 20) for name, value in base.items()}
            for task, sign in (("a", 1), ("b", -1))
        }
        assert ("a and b fight" in said(TaskVectors.from_state_dicts(base, experts), "fights")) == fights


def test_peace_is_said_with_the_lowest_cosine():
    tv = experts_along(0.2)
    assert said(tv, "mergeable").startswith("Yes, as far as weights tell")
    assert "No pair fights: the lowest cosine is 0.00 in a block (a and b in layers.1)" in said(tv, "fights")
    assert suggested(tv) == [("TsvM",), ("RegMean",)]


def test_a_fight_in_a_small_block_is_a_footnote():
    tv = experts_along(-0.8)
    tv.deltas["layers.0.weight"].mul_(1e-3)
    assert said(tv, "fights").startswith("No pair fights")
    assert "Cosines below -0.1 in layers.0 hold less than 1%" in said(tv, "fights")


def test_without_spectra_and_conflict_the_plain_sum_is_left():
    tv = experts_along(0.2)
    assert [f.rules for f in findings(measure(tv), []) if f.topic == "try"] == [("TaskArithmetic",), ("RegMean",)]


def test_experts_of_one_task_are_to_be_averaged():
    assert suggested(experts_along(0.9)) == [("Mean", "ModelStock")]


def test_a_large_expert_gets_a_weight():
    tv = experts_along(0.1, norm=4.0)
    assert ("Linear",) in suggested(tv)
    assert "b drowns a without a fight: it went 4.0 × as far" in said(tv, "fights")
    assert "drowns" not in said(experts_along(0.1, norm=1.9), "fights")


def test_experts_that_went_far_are_merged_with_care():
    near, far = (said(experts_along(0.2, far=far), "mergeable") for far in (0.05, 0.2))
    assert "Yes, as far as weights tell" in near
    assert "far for fine-tuning" not in near
    assert "With care" in far
    assert "far for fine-tuning" in far


def test_other_initialisations_are_recognised():
    base, *others = ({"layers.0.weight": torch.randn(20, 20)} for _ in range(3))
    tv = TaskVectors.from_state_dicts(base, dict(zip("ab", others, strict=True)))
    assert "Not as they are: a, b" in said(tv, "mergeable")
    assert "permutations" in said(tv, "mergeable")
    assert suggested(tv) == []


def test_noise_without_low_rank_asks_for_other_rules():
    generator = torch.Generator().manual_seed(1)
    base = {"layers.0.weight": torch.randn(40, 40, generator=generator)}
    noise = [0.1 * torch.randn(40, 40, generator=generator) for _ in range(6)]
    experts = {f"t{k}": {"layers.0.weight": base["layers.0.weight"] + noise[k]} for k in range(6)}
    tv = TaskVectors.from_state_dicts(base, experts)
    assert suggested(tv) == [("IsoC",), ("RegMean",)]
    geometry = measure(tv)
    assert verdict.against(geometry)[1] == pytest.approx(geometry.opposition, abs=0.01)
    assert geometry.opposition == pytest.approx((1 - 6**-0.5) / 2)
    # Experts that take back a part of each other's way do not agree by chance alone.
    opposed = {"one": noise[0], "other": 0.8 * noise[1] - 0.6 * noise[0]}
    experts = {task: {"layers.0.weight": base["layers.0.weight"] + delta} for task, delta in opposed.items()}
    assert ("Trim", "ElectSign") in suggested(TaskVectors.from_state_dicts(base, experts))


@pytest.mark.filterwarnings("ignore:expert .* is identical to the base")
def test_one_expert_none_changed_and_one_unchanged():
    tv = experts_along(0.2)
    base, expert = dict(tv.base), tv.expert("a")
    assert "One expert, 4.9 %" in said(TaskVectors.from_state_dicts(base, {"a": expert}), "mergeable")
    assert "nothing to merge" in said(TaskVectors.from_state_dicts(base, {"a": base, "b": base}), "mergeable")
    assert "b: identical to the base." in said(
        TaskVectors.from_state_dicts(base, {"a": expert, "b": base}), "mergeable"
    )


def test_opposite_experts_lose_their_way():
    words = said(experts_along(-1.0, far=0.01).without(["layers.1.weight"]), "mergeable")
    assert re.search("only 0.00 of [ab]'s own way", words)


def test_the_command_writes_text_numbers_and_figures(tmp_path, monkeypatch, capsys):
    tv = experts_along(-0.8)
    save_file(dict(tv.base), tmp_path / "base.safetensors")
    for task in tv.tasks:
        save_file(tv.expert(task), tmp_path / f"{task}.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: base.safetensors\nexperts: {a: a.safetensors, b: b.safetensors}\n")
    report = tmp_path / "report"
    monkeypatch.setattr("sys.argv", ["adamerge", "inspect", str(recipe), "--output", str(report)])
    main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "a and b fight in layers.0" in printed
    assert sorted(path.name for path in report.iterdir()) == [
        *("cosine.png", "norms.png", "report.json", "report.txt", "signs.png", "spectra.png"),
    ]
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert found["cosine"][0][1] == pytest.approx(-0.4, abs=1e-5)
    assert found["by_block"]["layers.0"]["cosine"][0][1] == pytest.approx(-0.8, abs=1e-5)
    assert found["cost"]["passes"] == 1
    assert found["thresholds"]["FIGHT"] == verdict.FIGHT
    text = (report / "report.txt").read_text(encoding="utf-8")
    assert "fight in layers.0" in text
    same = abs(found["kinship"]["pearson"][0][1] - found["cosine"][0][1]) < 0.005
    assert ("Kinship, the correlation over all entries, is the same to two digits." in text) == same


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_kinship_is_shown_where_it_differs_from_the_cosine(shift):
    tv = experts_along(-0.8)
    moved = {task: {name: w + shift for name, w in tv.expert(task).items()} for task in tv.tasks}
    geometry = measure(TaskVectors.from_state_dicts(dict(tv.base), moved))
    console = Console(width=100, file=StringIO())
    console.print(*_kinship(geometry))
    expected = f"kinship      a      b\na         1.00  {two(geometry.kinship[0, 1])}"
    found = "\n".join(line.rstrip() for line in console.file.getvalue().strip().splitlines())
    assert found.startswith(expected if shift else "Kinship, the correlation")


def test_a_recipe_that_is_none_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["adamerge", "inspect", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit):
        main()
    assert "there is no recipe" in " ".join(capsys.readouterr().err.split())
