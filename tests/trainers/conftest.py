"""Runs on the tiny suite: in this process and from the command line."""

from pathlib import Path

import lightning as L
import pytest
from tiny_suite import TinySuite

from modules import Coefficients
from trainers import Adaptation, Stream
from trainers.cli import CLI

_BUILT: dict[str, object] = {}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own cache."""
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def suite() -> TinySuite:
    return TinySuite()


@pytest.fixture
def adapt(tmp_path: Path):
    """Run some steps of adaptation on the tiny suite; returns the module and its trainer."""

    def run(steps: int = 6, ckpt_path=None, callbacks=(), trainer=None, stream=None, module=None, **kwargs):
        if module is None:
            kwargs.setdefault("coefficients", Coefficients("tensor"))
            module = Adaptation(kwargs.pop("suite", TinySuite()), **kwargs)
        settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": bool(callbacks)}
        settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        settings |= {"check_val_every_n_epoch": None, "val_check_interval": 1000, "limit_val_batches": 0}
        fitted = L.Trainer(max_steps=steps, callbacks=list(callbacks), **(settings | (trainer or {})))
        fitted.fit(module, datamodule=stream or Stream(batch_size=4), ckpt_path=ckpt_path)
        return module, fitted

    return run


@pytest.fixture
def up_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line from text to instances; parsers, most of its time, are _BUILT for the first call alone."""
    build = CLI.setup_parser

    def setup(self, *arguments):
        if not _BUILT:
            before = set(vars(self))
            build(self, *arguments)
            _BUILT.update({name: value for name, value in vars(self).items() if name not in before})
        vars(self).update(_BUILT)

    monkeypatch.setattr(CLI, "setup_parser", setup)
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, subcommand: None)
