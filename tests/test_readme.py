"""Every command and every line of code in the README runs, on a suite that builds in seconds."""

import glob
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adamerge.__main__ import main as adamerge_command
from trainers.cli import main
from trainers.compare import main as compare
from trainers.recommend import main as recommend

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SMALL = {"train_per_task": 40, "test_per_task": 40, "base_images_per_task": 40, "base_steps": 2, "expert_steps": 2}
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like a fresh clone, with two small data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for task in ("mnist", "fashion_mnist"):
        images, labels = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8), np.arange(30) % 3
        arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
        np.savez(tmp_path / f"data/{task}.npz", classes=np.array(["a", "b", "c"]), **arrays)
    (tmp_path / "inbox").mkdir()
    for n in range(3):
        Image.fromarray(images[n]).save(tmp_path / f"inbox/{n}.png")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    for model in ("llama", "llama-math", "llama-code"):
        LlamaForCausalLM(config).save_pretrained(tmp_path / "models" / model)
    return tmp_path


def small(command: list[str]) -> list[str]:
    """The command with few steps and, on Mini, a suite that is built in seconds."""
    text = " ".join(command)
    if {"export", "test", "predict"} & set(command):
        few = []
    else:
        few = ["--trainer.max_steps=4" if "--ckpt_path" in command else "--trainer.max_steps=2"]
    if "finetune.yaml" in text or "local.yaml" in text:
        return [*command, *few]
    return [*command, *few, *(f"--model.init_args.suite.init_args.recipe.{k}={v}" for k, v in SMALL.items())]


def several(main: Callable[[list[str]], None], command: list[str], *few: str) -> None:
    """The command with two of its methods."""
    first, last = command.index("--methods") + 1, command.index("--output")
    methods = sorted(glob.glob(command[first]))[:2]
    with pytest.raises(SystemExit) as end:
        main([*command[:first], *methods, *few, *command[last:], "--", *small([])])
    assert end.value.code == 0


def shell(block: str) -> None:
    for line in block.strip().splitlines():
        if line.startswith("python train.py "):
            main(small(shlex.split(line)[2:]))
        elif line.startswith("python -m trainers.compare "):
            several(compare, shlex.split(line)[3:], "--seeds", "0")
        elif line.startswith("python -m trainers.recommend "):
            several(recommend, shlex.split(line)[3:], "--steps", "2")
        elif line.startswith("python -m adamerge "):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", shlex.split(line)[2:])
                adamerge_command()
        elif line.startswith("make "):
            subprocess.run(["make", "-n", line.split()[1]], cwd=ROOT, check=True, capture_output=True)
        else:
            subprocess.run(["bash", "-ec", line], check=True)


def python(block: str, names: dict) -> None:
    settings = ", ".join(f"{k}={v}" for k, v in SMALL.items())
    block = block.replace("Mini()", f"Mini(recipe=Recipe({settings}))").replace("max_steps=100", "max_steps=2")
    exec(compile("from adamerge.suites.mini import Recipe\n" + block, "README.md", "exec"), names)


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_every_block_runs_in_order(folder):
    names: dict = {}
    kinds = []
    for kind, block in BLOCKS:
        kinds.append(kind)
        if kind == "bash":
            shell(block)
        elif kind == "python":
            python(block, names)
        elif kind == "yaml":
            named = re.match(r"# ([\w.]+\.yaml)\n", block)
            Path(named[1] if named else "tasks.yaml").write_text(block)
    assert {"bash", "python", "yaml"} <= set(kinds)
    assert Path("runs/local/results.json").exists()
    assert Path("merged.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained("merged").generate(max_new_tokens=2, min_new_tokens=2).shape == (1, 3)
    assert names["top" if "top" in names else "weights"]


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"`((?:configs|benchmarks)/[\w./]+\.(?:yaml|md))`", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
