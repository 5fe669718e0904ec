"""Checkpoints, results and overlays that are broken or meant ill: errors of ours, and nothing is called or written."""

import contextlib
import io
import json
import sys
from pathlib import Path

import malformed
import pytest
import torch
import yaml
from malformed import COUNTS, LAUGHS, MERGED, PICKLED, as_json, as_yaml, files, refuses
from tiny_suite import TinySuite

from adamerge import InputError
from trainers import Adaptation
from trainers.cli import main
from trainers.results import whole_results

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(str(HERE))


def saved(adapt) -> dict:
    """The checkpoint of a short run."""
    _, trainer = adapt(steps=2)
    trainer.save_checkpoint("valid.ckpt")
    found: dict = torch.load("valid.ckpt", weights_only=True)
    Path("valid.ckpt").unlink()
    return found


@pytest.mark.parametrize("count", COUNTS)
def test_checkpoints(adapt, count):
    valid = saved(adapt)
    module = Adaptation(TinySuite())
    module.configure_model()

    def written(value: object) -> bytes:
        path = Path("made.pt")
        try:
            torch.save(value, path)
            return path.read_bytes()
        except RecursionError:
            return b"("
        finally:
            path.unlink(missing_ok=True)

    kept = {key: valid[key] for key in ("state_dict", "adamerge", "hyper_parameters") if key in valid}
    refuses(module.restore, files(kept, written), Path("run.ckpt"), count)


@pytest.mark.parametrize("count", COUNTS)
def test_results(count):
    row = {"method": "this run, adapted", "accuracy": {"a": 0.5, "b": 0.7}, "average": 0.6, "normalised": None}
    valid = {"suite": "tiny", "rows": [row, {**row, "method": "base"}], "steps": 3}

    def read(path: Path) -> None:
        if (found := whole_results(path)) is None:
            raise InputError("no results")
        [f"{100 * value:.1f}" for row in found["rows"] for value in row["accuracy"].values()]
        [f"{100 * row['average']:.1f}" for row in found["rows"]]

    refuses(read, files(valid, as_json), Path("results.json"), count)


def command_line(path: Path) -> None:
    """Raise InputError for an overlay that is refused in a sentence."""
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            main(["fit", f"--config={path}"])
        except SystemExit as stopped:
            code = stopped.code
    assert (code, said.getvalue().count("\n"), said.getvalue()[:7]) in ((0, 0, ""), (2, 1, "error: "))
    assert len(said.getvalue()) < 1000
    if code == 2:
        raise InputError(said.getvalue())


@pytest.mark.usefixtures("up_to_the_run")
@pytest.mark.parametrize(
    "count",
    [pytest.param(40, id="40"), pytest.param(2100, id="2100", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_overlays(count):
    valid = {
        "seed_everything": 1,
        "name": "fuzzed",
        "model": {
            "class_path": "trainers.Adaptation",
            "init_args": {
                "suite": {"class_path": "tiny_suite.TinySuite", "init_args": {"seed": 1}},
                "coefficients": {"class_path": "modules.Coefficients", "init_args": {"grain": "tensor", "init": 0.3}},
                "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
            },
        },
        "data": {"class_path": "trainers.Stream", "init_args": {"batch_size": 4}},
        "trainer": {"max_steps": 3, "callbacks": [{"class_path": "trainers.Guard", "init_args": {"every": 3}}]},
        "checkpoint": {"every_n_train_steps": 5},
    }
    more = (LAUGHS.encode(), MERGED.encode(), PICKLED.encode(), b"model: &a [*a]")
    refuses(command_line, files(valid, as_yaml, more), Path("overlay.yaml"), count)


@pytest.mark.parametrize("spec", [malformed.CALL, malformed.SHELL, malformed.POPEN, malformed.EVAL])
@pytest.mark.parametrize(
    "place",
    ["model.init_args.suite", "model.init_args.optimizer", "data", "trainer.callbacks", "trainer.logger", "model"],
)
def test_an_overlay_calls_nothing(place, spec, capsys):
    *outer, last = place.split(".")
    overlay: dict = {}
    inner = overlay
    for key in outer:
        inner = inner.setdefault(key, {})
    inner[last] = [spec] if last == "callbacks" else spec
    Path("overlay.yaml").write_text(yaml.safe_dump(overlay))
    given = ["--model.init_args.suite=tiny_suite.TinySuite"] if place != "model.init_args.suite" else []
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *(given if place != "model" else []), "--trainer.max_steps=1", "--config=overlay.yaml"])
    assert stopped.value.code == 2
    assert spec["class_path"].split(".")[-1] in capsys.readouterr().err
    assert not Path("caught").exists()


@pytest.mark.parametrize("spec", [malformed.CALL, malformed.SHELL])
def test_a_data_set_is_built_and_no_function_is_called(spec, capsys):
    """What an argument takes that may be any callable."""
    source = {"class_path": "adamerge.data.TorchData", "init_args": {"test": spec}}
    overlay = {"model": {"class_path": "trainers.FineTune", "init_args": {"backbone": "adamerge.backbones.TinyViT"}}}
    overlay["data"] = {"class_path": "trainers.LabelledData", "init_args": {"data": {"a": source}}}
    Path("overlay.yaml").write_text(yaml.safe_dump(overlay))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={HERE.parents[1]}/configs/finetune.yaml", "--config=overlay.yaml"])
    assert stopped.value.code == 2
    assert f"class_path '{spec['class_path']}' is no class" in capsys.readouterr().err
    assert not Path("caught").exists()


@pytest.mark.parametrize(
    "change", [{"_instantiator": "os.system"}, {"suite": malformed.SHELL}, {"optimizer": malformed.CALL}]
)
def test_a_checkpoint_calls_nothing(adapt, change):
    torch.save({**saved(adapt), "hyper_parameters": {"_class_path": "trainers.Adaptation", **change}}, "run.ckpt")
    with pytest.raises(InputError, match=r"was not written by a run of this project|is no class"):
        Adaptation.load_from_checkpoint("run.ckpt")
    assert not Path("caught").exists()


@pytest.mark.parametrize(
    "text", [LAUGHS, MERGED, PICKLED, "model: &a [*a]"], ids=["aliases", "merged", "objects", "itself"]
)
def test_an_overlay_that_is_no_end(text, capsys):
    Path("overlay.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config=overlay.yaml"])
    assert stopped.value.code == 2
    assert len(error := capsys.readouterr().err) < 2000
    assert error.startswith("error: ")


def test_an_overlay_that_is_no_text(capsys):
    Path("overlay.yaml").write_bytes(b"model: \xf8")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config=overlay.yaml"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: overlay.yaml: it is no text in UTF-8: 'utf-8' codec")


def test_a_number_that_no_float_holds_is_no_result():
    row = {"method": "base", "accuracy": {"a": 0.5}, "average": 10**400}
    Path("results.json").write_text(json.dumps({"suite": "tiny", "rows": [row]}))
    assert whole_results(Path("results.json")) is None


def test_what_is_whole_is_read(adapt):
    torch.save(saved(adapt), "run.ckpt")
    assert Adaptation(TinySuite()).restore("run.ckpt").finite.skipped == 0
    Path("results.json").write_text(json.dumps({"suite": "tiny", "rows": []}))
    assert whole_results(Path("results.json")) == {"suite": "tiny", "rows": []}
