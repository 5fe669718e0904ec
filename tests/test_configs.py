"""Every YAML in configs/ works: run for two steps, one a phase, where it needs nothing, else parsed and built."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy

from adamerge.suites import Suite
from trainers import Stream
from trainers.cli import main

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "data")
SMALL = {"train_per_task": 20, "test_per_task": 20, "base_images_per_task": 20, "base_steps": 1, "expert_steps": 1}
BRIEF = {"fda.yaml": ["--model.init_args.objective.init_args.steps=1"]}
NEED_FILES = {"finetune.yaml", "local.yaml"}  # run by the README's test


class Model:
    def __init__(self, suite: Suite) -> None:
        self.suite = suite


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.fixture
def _elsewhere(monkeypatch):
    """Lightning builds a model where the accelerator is: tensors that are made there cannot be read from files."""
    monkeypatch.setattr(Strategy, "tensor_init_context", lambda *_, **__: torch.device("meta"))


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    "config", [c for c in CONFIGS if "clip" not in c.name and c.name not in NEED_FILES], ids=relative
)
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_runs_for_two_steps(config, tmp_path_factory, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path_factory.getbasetemp() / "configs-cache"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    recipe = [f"--model.init_args.suite.init_args.recipe.{name}={value}" for name, value in SMALL.items()]
    recipe += BRIEF.get(config.name, [])
    main(["fit", f"--config={config}", *recipe, "--trainer.max_steps=2", "--trainer.accelerator=cpu"])
    results = json.loads((tmp_path / "runs/run/results.json").read_text())
    if "trainers.Static" in config.read_text():
        rows = {row["method"]: row["accuracy"] for row in results["rows"]}
        assert rows["this run, start"] == rows["this run, adapted"]
        assert results["learned_parameters"] == 0


@pytest.mark.parametrize("config", [c for c in CONFIGS if "clip" in c.name], ids=relative)
def test_names_a_suite_that_can_be_built(config):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Model, "model.init_args", sub_configs=True)  # as Lightning's command line does
    suite = parser.instantiate(parser.parse_path(config)).model.init_args.suite
    assert len(suite.tasks) == 8 or "torchvision" in config.name
    assert set(suite.tasks) == set(suite.experts)


@pytest.mark.parametrize("stream", [c for c in CONFIGS if c.parent.name == "streams"], ids=relative)
def test_a_stream_goes_with_every_method(stream):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Stream, "data")
    for method in (c for c in CONFIGS if c.parent.name == "methods"):
        overlays = (yaml.safe_load(path.read_text()).get("data", {}).get("init_args", {}) for path in (method, stream))
        asked = {name: value for overlay in overlays for name, value in overlay.items()}
        made = parser.instantiate(parser.parse_object({"data": asked})).data
        assert made.order is None or made.tasks_per_step is None, method


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.parent != ROOT / "configs"], ids=relative)
def test_an_overlay_is_short(config):
    assert len(config.read_text().splitlines()) <= 15
