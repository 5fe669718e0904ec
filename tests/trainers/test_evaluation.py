import json

import pytest
import torch
import yaml
from tiny_suite import TinySuite

from adamerge.backbones import TinyViT
from adamerge.files import cache_folder
from modules import Head
from trainers import evaluation
from trainers.evaluation import accuracy, reference_rows
from trainers.results import Results

SETTINGS = {
    "seed": 3, "guards": [], "fingerprints": {"base": "f" * 64},
    "method": {"router": None, "by_part": {}, "phases": [{"eps": 1e-8, "share": None}]},
    "versions": {"torch": torch.__version__},
}  # fmt: skip


def datasets(suite):
    return {task: suite.dataset(task, "test") for task in suite.tasks}


def test_accuracy_counts_what_is_right(suite):
    model = suite.backbone()
    heads = {task: Head(suite.head(task)) for task in suite.tasks}
    scores = accuracy(lambda x, task: heads[task](model(x)), datasets(suite), batch_size=7)
    for task, data in datasets(suite).items():
        images, labels = data.batch(torch.arange(len(data)))
        right = heads[task](model(images)).argmax(1) == labels
        assert scores[task] == pytest.approx(right.double().mean().item())


def test_reference_rows_are_those_of_the_models_themselves(suite):
    rows = reference_rows(suite, datasets(suite))
    vectors, model = suite.task_vectors(), suite.backbone()
    heads = {task: Head(suite.head(task)) for task in suite.tasks}

    def logits(images, task):
        return heads[task](model(images))

    model.load_state_dict(vectors.expert("two"))
    assert rows["experts"]["two"] == accuracy(logits, {"two": suite.dataset("two", "test")})["two"]
    model.load_state_dict(dict(vectors.base))
    assert rows["base"] == accuracy(logits, datasets(suite))
    oracle = next(name for name in rows if "oracle" in name)
    assert sum(rows[oracle].values()) >= sum(rows["task arithmetic 0.3"].values())


def test_reference_rows_are_computed_once_per_suite(suite, monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    first = reference_rows(suite, datasets(suite))
    monkeypatch.setattr(evaluation, "accuracy", None)  # a second computation would fail
    assert reference_rows(suite, datasets(suite)) == first
    for other in (TinySuite(seed=1), TinySuite(images=22)):
        with pytest.raises(TypeError):
            reference_rows(other, datasets(other))
    assert len(list((cache_folder() / "references").iterdir())) == 1


def test_reference_rows_of_an_earlier_version_are_not_taken(suite, monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(evaluation, "_VERSION", evaluation._VERSION - 1)
    rows = reference_rows(suite, datasets(suite))
    (kept,) = (cache_folder() / "references").iterdir()
    kept.write_text(json.dumps({"of an earlier version": rows["base"]}))
    monkeypatch.undo()
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    assert reference_rows(suite, datasets(suite)) == rows


def test_the_users_own_model_is_left_alone(suite, monkeypatch):
    model = suite.backbone().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(suite, "backbone", lambda: model)
    reference_rows(suite, {task: suite.dataset(task, "train") for task in suite.tasks})
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_cache_knows_networks_apart_that_share_their_tensors(suite):
    heads = {task: Head(suite.head(task)) for task in suite.tasks}
    networks = [TinyViT(dim=16, depth=1, heads=count) for count in (2, 4)]
    keys = {evaluation._key({}, network, heads, datasets(suite)) for network in networks}
    assert len(keys) == 2


def test_results_are_written_as_json_and_markdown(tmp_path, capsys):
    rows = {"experts": {"a": 0.8, "b": 0.5}, "this run, adapted": {"a": 0.4, "b": 0.5}}
    results = Results("toy", ("a", "b"), rows, SETTINGS)
    results.write(tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["rows"][1] == {
        "method": "this run, adapted", "accuracy": {"a": 0.4, "b": 0.5}, "average": 0.45, "normalised": 0.75,
    }  # fmt: skip
    text = (tmp_path / "results.md").read_text()
    assert "| this run, adapted | 40.0 | 50.0 | 45.0 | 75.0 |" in text
    told = yaml.safe_load(text.partition("```yaml\n")[2].removesuffix("```\n"))
    kept = {"method": {"phases": [{"eps": 1e-8}]}, "fingerprints": {"base": "f" * 12}}
    assert told == {"seed": 3, "versions": {"torch": str(torch.__version__)}, **kept}
    assert {name: saved[name] for name in SETTINGS} == SETTINGS, "nothing is left out of the JSON"
    results.show()
    assert "this run, adapted" in capsys.readouterr().out
