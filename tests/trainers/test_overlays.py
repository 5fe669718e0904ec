"""Overlays that are refused: one sentence that names the file, the key, what was expected and what was found."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from malformed import LAUGHS

from adamerge import InputError
from trainers.cli import main
from trainers.finetune import FineTune

COEFFICIENTS = "model: {{init_args: {{coefficients: {{class_path: modules.Coefficients, init_args: {{{}}}}}}}}}"
SUITE = "model: {{init_args: {{suite: {}}}}}"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch, up_to_the_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]{,600}\n", error), error
    return error.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        # keys
        ("modle: {}", "'modle' is no key: did you mean 'model'?"),
        ("trainer: {max_step: 3}", "'trainer.max_step' is no key: did you mean 'max_steps'?"),
        ("trainer.max_step: 3", "'trainer.max_step' is no key: did you mean 'trainer.max_steps'?"),
        ("model: {init_args: {suit: 3}}", "Option 'suit' is not accepted: did you mean 'suite'?"),
        (COEFFICIENTS.format("grian: tensor"), "model.coefficients (modules.Coefficients): Option 'grian' is not"),
        ("'': 3", "'' is no key; there are checkpoint"),
        ("3: 4", "'3' is no key; there are checkpoint"),
        ("config: overlay.yaml", "'config' is no key"),
        ("trainer: {max_steps: 3}\ntrainer: {}", "the key 'trainer' is given twice, in lines 1 and 2"),
        # values
        ("trainer: {max_steps: many}", "trainer.max_steps: Expected int, got many"),
        ("seed_everything: x", "seed_everything: Expected bool or int, got x"),
        ("name: [1]", "name: Expected str, got [1]"),
        (COEFFICIENTS.format("grain: tensr"), "Expected one of 'model', 'block', 'tensor', 'column', got tensr"),
        (
            "model: {init_args: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: fast}}}}",
            "model.optimizer.lr (trainers.Adaptation): Expected float, got fast",
        ),
        # what is no mapping
        ("trainer: null", "trainer must be a mapping of keys such as trainer.accelerator"),
        ("trainer: [1]", "trainer.callbacks, trainer.check_val_every_n_epoch, got the list [1]"),
        ("report: 3", "report must be a mapping of keys such as report.every"),
        ("trainer: nowhere.yaml", "'nowhere.yaml' is neither a mapping of its keys nor a file of one"),
        ("[model]", "it must be a mapping of keys such as checkpoint, ckpt_path, data, model, name, report, got"),
        ("hello", "got the text 'hello'"),
        ("", "it is empty: give a mapping of keys such as checkpoint"),
        # classes
        (SUITE.format("{class_path: os.system, init_args: {command: mkdir caught}}"), "os.system is no Suite"),
        (SUITE.format("{class_path: modules.Entropy}"), "modules.Entropy is no Suite: give the dotted path of one"),
        (SUITE.format("{class_path: nowhere.Suite}"), "No module named 'nowhere': it is neither installed nor"),
        (SUITE.format("{class_path: adamerge.suites.Minni}"), "has no attribute 'Minni': did you mean 'Mini'?"),
        (SUITE.format("{class_path: null}"), "model.init_args.suite.class_path must be a dotted path such as"),
        (SUITE.format("{class_path: 'a b'}"), "such as modules.Entropy, got the text 'a b'"),
        (SUITE.format("{class_path: adamerge.suites.Mini, seed: 3}"), "move 'seed' into init_args"),
        (SUITE.format("3"), "Expected the class_path of a Suite, and init_args, got 3"),
        ("model: {init_args: null}", "model.init_args must be a mapping of arguments by name, got null"),
        ("trainer: {callbacks: [{class_path: 3}]}", "trainer.callbacks[0].class_path must be a dotted path"),
        (
            "model: {init_args: {optimizer: {class_path: subprocess.Popen, init_args: {args: [mkdir, caught]}}}}",
            "model.optimizer (trainers.Adaptation): subprocess.Popen is no Optimizer",
        ),
        # text
        ("model:\n\tinit_args: {}", "in line 2, column 1; indent with spaces, not tabs"),
        ("model: {init_args: {", "this is no YAML: expected"),
        ("a: 1\n---\nb: 2", "found another document in line 2"),
        (LAUGHS, "with its aliases written out, it has more than 50000 values"),
        ("- 1\n" * 300_000, "characters, more than 1,000,000"),
    ],
)  # fmt: skip
def test_what_an_overlay_cannot_say(overlay, message, capsys):
    Path("overlay.yaml").write_text(overlay + "\n" if overlay else "")
    error = refused(capsys, "--config=overlay.yaml")
    assert error.startswith("overlay.yaml: ")
    assert message in error
    assert not Path("caught").exists()


def test_an_overlay_that_is_no_file(capsys):
    Path("folder").mkdir()
    Path("large.yaml").write_bytes(b"#" * 4_000_001)
    assert refused(capsys, "--config=folder") == "folder: this is a folder: give a YAML file in it"
    assert refused(capsys, "--config=/dev/null") == "/dev/null: this is no file: give one of YAML"
    assert refused(capsys, "--config=large.yaml").startswith("large.yaml: this file has more than 4000000 bytes")
    assert refused(capsys, "--config=nowhere.yaml") == "--config: there is no file nowhere.yaml"


def test_the_overlay_that_is_wrong_is_named(capsys):
    Path("one.yaml").write_text("trainer: {max_steps: 3}")
    Path("two.yaml").write_text("trainer: {max_step: 3}")
    assert refused(capsys, "--config=one.yaml", "--config=two.yaml").startswith("two.yaml: ")
    assert refused(capsys, "--config=one.yaml", "--config={trainer: 3}").startswith("--config: trainer must be")


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("trainer: {max_steps: null}", "trainer.max_steps is null; a stream has no end: give a positive number"),
        ("seed_everything: -5", "seed_everything is -5; a seed is a number from 0 to 4294967295"),
        ("root: null", "root must name a folder and name one within it: got None and 'run'"),
        ("name: ''", "root must name a folder and name one within it: got 'runs' and ''"),
        ("name: ../../up", "got 'runs' and '../../up'"),
        ("name: /up", "got 'runs' and '/up'"),
        ("trainer: {accelerator: gpuu}", "trainer: You selected an invalid accelerator name"),
        ("trainer: {accelerator: cpu, devices: -2}", "trainer: `devices` selected with `CPUAccelerator`"),
        ("trainer: {max_time: {weekdays: 1}}", "trainer: 'weekdays' is an invalid keyword argument"),
    ],
)
def test_what_no_run_can_have(overlay, message, capsys):
    """Of any overlay, or of what is given beside it."""
    assert message in refused(capsys, f"--config={{{overlay}}}")


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ("my/quickstrat.yaml", ": did you mean 'quickstart.yaml'?"),
        ("my/quickstart", ": did you mean 'quickstart.yaml'?"),
        ("my/other.yaml", ""),
        ("your/quickstart.yaml", ""),
        (f"{'x' * 300}/quickstart.yaml", ""),
    ],
)
def test_an_overlay_that_is_not_there(given, end, capsys):
    Path("my").mkdir()
    for name in ("quickstart.yaml", "static_ties.yaml", "README.md"):
        Path("my", name).touch()
    assert refused(capsys, f"--config={given}") == f"--config: there is no file {given}{end}"


def test_an_overlay_says_what_its_author_means():
    """Classes by their name alone, lists of one, dotted keys, and mappings whose keys are the user's own."""
    Path("overlay.yaml").write_text(
        "trainer: {callbacks: [trainers.Guard]}\n"
        "trainer.max_steps: 3\n"
        "model: {init_args: {suite: adamerge.suites.Mini, optimizer: {init_args: {betas: [0.9, 0.99]}}}}\n"
    )
    main(["fit", "--config=overlay.yaml"])
    main(["fit", "--config={trainer: {max_steps: 3}}"])


@pytest.mark.parametrize(("lr", "message"), [(-1.0, "Invalid learning rate: -1.0"), (None, "'NoneType'")])
def test_an_optimizer_that_cannot_be_built(adapt, lr, message):
    with pytest.raises(InputError, match=rf"optimizer cannot be built: .*{message}"):
        adapt(steps=1, optimizer=partial(torch.optim.Adam, lr=lr))


def test_an_optimizer_of_fine_tuning_that_cannot_be_built():
    module = FineTune(torch.nn.Linear(2, 2), optimizer=partial(torch.optim.Adam, lr=-1.0))
    with pytest.raises(InputError, match=r"optimizer cannot be built: .*Invalid learning rate: -1.0"):
        module.configure_optimizers()
