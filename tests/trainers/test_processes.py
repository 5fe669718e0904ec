"""Two processes learn what one learns, whatever learns."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy
from tiny_suite import TinySuite

from adamerge import InputError
from modules import BlockRouter, Entropy, PseudoLabels
from trainers import Adaptation, Stream
from trainers.phases import Phase

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Momentum would go on moving what has a gradient of zero instead of none.
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}
TINY = {"class_path": "tiny_suite.TinySuite", "init_args": {"vit": True}}


def objective(name: str, **kwargs) -> dict:
    return {"class_path": f"modules.{name}", "init_args": kwargs}


ROUTER = {"router": {"class_path": "modules.BlockRouter"}, "objective": objective("Entropy")}
SURGERY = {
    "objective": None,
    "correction": {"class_path": "modules.Surgery", "init_args": {"rank": 3, "blocks": True}},
    "phases": [
        {"objective": objective("Entropy"), "learn": ["coefficients"], "share": 0.5},
        {"objective": objective("RepresentationL1", blocks=True), "learn": ["correction"]},
    ],
}
TINT = {"learn": ["coefficients", "heads"], "objective": objective("PseudoLabels")}
APART = [{"class_path": "adamerge.rules.Store", "init_args": {"dtype": "same", "place": "processes"}}]
UNUSED = "ddp_find_unused_parameters_true"


def fit(folder: Path, name: str, method: dict, data: dict, **trainer) -> subprocess.CompletedProcess:
    config = {
        "model": {"init_args": {"suite": TINY, "optimizer": SGD, **method}},
        "data": {"init_args": {"batch_size": 4, **data}},
        "trainer": {"max_steps": 6, "val_check_interval": 6, "accelerator": "cpu", **trainer},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, ROOT / "train.py", "fit", f"--config={name}.yaml", f"--name={name}"]
    command += ["--report.figures=false", "--report.references=false"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "data", "strategy"),
    [
        pytest.param({**ROUTER, "micro_batches": True}, {}, "ddp", id="router, micro-batches"),
        pytest.param(SURGERY, {}, UNUSED, id="surgery"),
        pytest.param({**TINT, "micro_batches": True}, {"tasks_per_step": 1}, UNUSED, id="a task a step, micro"),
    ],
)
def test_two_processes_learn_what_one_learns(tmp_path, method, data, strategy):
    compare(tmp_path, method, method, data, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [False, True], ids=["together", "micro-batches"])
def test_two_processes_that_share_out_the_deltas_learn_what_one_learns(tmp_path, micro_batches):
    method = {"objective": objective("Entropy"), "micro_batches": micro_batches}
    compare(tmp_path, method, {**method, "transforms": APART}, {}, "ddp")


def compare(tmp_path: Path, alone: dict, method: dict, data: dict, strategy: str) -> None:
    results = {}
    runs = {"one": (alone, {"devices": 1}), "two": (method, {"devices": 2, "strategy": strategy})}
    for name, (settings, trainer) in runs.items():
        done = fit(tmp_path, name, settings, data, **trainer)
        assert done.returncode == 0, done.stderr[-2000:]
        run = tmp_path / "runs" / name
        learned = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        results[name] = learned, json.loads((run / "results.json").read_text())["rows"][-1]["accuracy"]
    (one, scores), (two, same) = results["one"], results["two"]
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert scores == pytest.approx(same, abs=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "turns"),
    [
        ({"phases": [Phase(Entropy(), share=0.5), Phase(PseudoLabels(), ["heads"])]}, None),
        ({"objective": PseudoLabels(), "learn": ["heads"]}, 1),
    ],
    ids=["phases", "a task a step"],
)
def test_a_strategy_that_waits_for_every_part_is_refused(kwargs, turns):
    module = Adaptation(TinySuite(), **kwargs)
    trainer = SimpleNamespace(
        strategy=DDPStrategy(), precision="32-true", world_size=1, datamodule=Stream(tasks_per_step=turns)
    )
    module.trainer = trainer
    with pytest.raises(InputError, match=f"not every step moves every part: set trainer.strategy to {UNUSED}"):
        module.prepare_data()
    trainer.strategy = DDPStrategy(find_unused_parameters=True)
    module.prepare_data()


def test_parts_that_every_step_moves_need_no_other_strategy():
    module = Adaptation(TinySuite(), router=BlockRouter(scope="linear"))
    trainer = SimpleNamespace(
        strategy=DDPStrategy(), precision="32-true", world_size=1, datamodule=Stream(tasks_per_step=1)
    )
    module.trainer = trainer
    module.prepare_data()


@pytest.mark.slow
def test_two_processes_see_each_image_of_an_online_stream_once_and_learn_what_one_learns(tmp_path):
    """69 images in batches of 6, the last of which has 3: two for one process, one for the other."""
    data = {"batch_size": 6, "order": {"class_path": "trainers.Drifting"}}
    router = {**ROUTER, "micro_batches": False}
    runs = {
        "one": {"devices": 1},
        "two": {"devices": 2, "strategy": UNUSED},
        "again": {"devices": 2, "strategy": UNUSED},
    }
    learned, counts = {}, {}
    for name, trainer in runs.items():
        done = fit(tmp_path, name, router, data, **{**trainer, "max_steps": 100})
        assert done.returncode == 0, done.stderr[-2000:]
        saved = torch.load(tmp_path / "runs" / name / "checkpoints/last.ckpt", weights_only=True)
        learned[name] = saved["state_dict"]
        online = next(state["online"] for key, state in saved["callbacks"].items() if key.startswith("Report"))
        rows = [*online["counts"], *([] if online["open"] is None else [online["open"]])]
        counts[name] = torch.stack(rows).sum(0)
    assert counts["two"][0].tolist() == [23, 23, 23]
    assert torch.equal(counts["two"], counts["again"])
    for name, value in learned["two"].items():
        assert torch.equal(value, learned["again"][name]), name
        torch.testing.assert_close(
            value, learned["one"][name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
