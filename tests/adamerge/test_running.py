"""Merges into folders: what `from_pretrained` opens, the same bits as in memory, and whole whatever interrupts it."""

import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adamerge import InputError, TaskVectors, differences, merge, running, writing
from adamerge.__main__ import main
from adamerge.files import locked
from adamerge.observing import Observation
from adamerge.preflight import report
from adamerge.recipes import job, parse, read
from adamerge.running import LOCK, RECORD, run
from adamerge.statistics import Statistics
from adamerge.tensor_files import SafetensorsState

RECIPE = {
    "base": "base",
    "experts": {"math": "math", "code": "code"},
    "rules": [{"Trim": {"keep": 0.3}}, {"ElectSign": {"combine": "mean"}}],
    "scale": {"mlp": [0.2, 0.6], ".*": 0.5},
    "exclude": ["input_layernorm"],
    "shard_size": "20KB",
}
QUERY = "model.layers.0.self_attn.q_proj.weight"


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny language model and two experts, in bfloat16 and shards, as the Hub keeps them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False)).bfloat16()
    for name in ("base", "math", "code"):
        model.save_pretrained(folder / name, max_shard_size="20KB")
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "base" / "tokenizer.model").write_bytes(b"pieces")
    (folder / "base" / "README.md").write_text("no part of a merge")
    return folder


def recipe(models: Path, **changes):
    return job(parse(RECIPE | changes), models)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


def in_memory(models: Path) -> dict[str, torch.Tensor]:
    asked = recipe(models)
    return merge(asked.task_vectors.load(), asked.rules, asked.scale, asked.exclude)


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [50, 2**18])
def test_a_streamed_merge_has_the_bits_of_one_in_memory(models, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(differences, "PIECE", piece)
    out = run(recipe(models), tmp_path / "out", quiet())
    assert same(weights(out), in_memory(models))
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
def test_from_pretrained_opens_the_merge(models, tmp_path, shard_size):
    out = run(recipe(models, shard_size=shard_size), tmp_path / "out", quiet())
    assert (out / "model.safetensors").is_file() == (shard_size == "5GB")
    assert (out / "model.safetensors.index.json").is_file() == (shard_size == "20KB")
    model, loading = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert same(model.state_dict(), in_memory(models))
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    assert {f.name for f in out.iterdir() if "safetensors" not in f.name} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", RECORD,
    }  # fmt: skip


def test_the_record_repeats_the_merge(models, tmp_path):
    out = run(recipe(models), tmp_path / "out", quiet())
    record = json.loads((out / RECORD).read_text())
    again = run(job(parse(record["recipe"]), models), tmp_path / "again", quiet())
    assert same(weights(again), weights(out))
    base = weights(models / "base")
    counted = sum(value.numel() for name, value in base.items() if "input_layernorm" not in name)
    assert record["elements"] == {"all": sum(v.numel() for v in base.values()), "counted": counted, "changed": counted}
    assert record["files"]["math"].keys() == {file.name for file in (models / "math").glob("*.safetensors")}


def test_another_dtype_is_written_and_said(models, tmp_path):
    out = run(recipe(models, dtype="float32"), tmp_path / "out", quiet())
    assert {value.dtype for value in weights(out).values()} == {torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32


def test_all_kinds_of_tensors_go_through_a_file(tmp_path):
    base = {
        "w": torch.randn(7, 3), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), "half": torch.randn(5).half(),
        "double": torch.randn(2, 2, dtype=torch.float64), "steps": torch.tensor(7), "mask": torch.tensor([True, False]),
        "running_var": torch.ones(3),
    }  # fmt: skip
    expert = {name: value + 1 if value.is_floating_point() else value for name, value in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(expert, tmp_path / "a.safetensors")
    values = {"base": "base.safetensors", "experts": {"a": "a.safetensors"}, "scale": 0.5}
    out = run(job(parse(values), tmp_path), tmp_path / "out", quiet())
    tv = TaskVectors.from_state_dicts(base, {"a": expert})
    assert same(weights(out), merge(tv, scale=0.5))
    assert {file.name for file in out.iterdir()} == {"model.safetensors", RECORD}


# -- interruptions -----------------------------------------------------------------------------------------------------


def killed(models: Path, out: Path, after: int) -> None:
    """In a process of its own: merge, and die by SIGKILL once so many parts are written."""
    written = 0

    def write(file, parts, size, advance):
        def dying(count):
            nonlocal written
            written += 1
            if written > after:
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        original(file, parts, size, dying)

    original, writing._write = writing._write, write
    differences.PIECE = 500
    run(recipe(models), out, quiet())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("after", [0, 1, 25, 45])
def test_a_killed_merge_goes_on_where_it_stopped(models, tmp_path, monkeypatch, after):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    process = multiprocessing.get_context("fork").Process(target=killed, args=(models, out, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    before = {file.name: file.stat().st_size for file in partial.glob("*.safetensors")}
    assert before
    computed, original = [], writing.in_order

    def counting(work, parts, workers):
        return original(work, (computed.append(part) or part for part in parts), workers)

    monkeypatch.setattr(writing, "in_order", counting)
    said = Console(record=True, file=io.StringIO(), width=200)
    assert run(recipe(models), out, said) == out
    assert "going on with an unfinished merge" in said.export_text()
    assert same(weights(out), in_memory(models))
    everything = len(in_memory(models))
    assert len(computed) < everything if after >= 25 else len(computed) <= everything


def merged(models: Path, out: Path, seconds: float) -> None:
    """In a process of its own, which the system ends as `kill -9` does when it has computed for so long."""
    differences.PIECE = 500
    signal.setitimer(signal.ITIMER_PROF, seconds)
    run(recipe(models), out, quiet())
    out.with_suffix(".seconds").write_text(str(time.process_time()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts a process's time")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("points", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_merge_killed_at_any_moment_goes_on(models, tmp_path, points):
    def ended(out: Path, seconds: float = 0.0) -> int:
        process = multiprocessing.get_context("fork").Process(target=merged, args=(models, out, seconds))
        process.start()
        process.join()
        return process.exitcode

    assert ended(tmp_path / "whole") == 0
    seconds, drawn = float((tmp_path / "whole.seconds").read_text()), random.Random(points)
    for point in range(points):
        out = tmp_path / f"killed{point}"
        code = ended(out, drawn.uniform(0, 1) * seconds)
        assert code in (0, -signal.SIGPROF)
        assert out.exists() == (code == 0) or same(weights(out), in_memory(models)), (
            "whole under its own name, or not there"
        )
        assert out.exists() or ended(out) == 0
        assert same(weights(out), in_memory(models))


@pytest.mark.parametrize("change", ["recipe", "files"])
def test_an_unfinished_merge_of_something_else_is_begun_again(models, tmp_path, monkeypatch, change):
    copy = tmp_path / "models"
    shutil.copytree(models, copy)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write", full)
        with pytest.raises(InputError, match=r"no space left for .* the same command goes on"):
            run(recipe(copy), tmp_path / "out", quiet())
    assert (tmp_path / ".out.partial").is_dir()
    if change == "files":
        shard = next((copy / "math").glob("*.safetensors"))
        os.utime(shard, ns=(1, 1))
    said = Console(record=True, file=io.StringIO(), width=200)
    asked = recipe(copy, **({"scale": 0.1} if change == "recipe" else {}))
    out = run(asked, tmp_path / "out", said)
    assert f"an unfinished merge had other {change}: begun again" in said.export_text()
    assert same(weights(out), merge(asked.task_vectors.load(), asked.rules, asked.scale, asked.exclude))


def test_a_folder_with_something_in_it_is_left_alone(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    for attempt in (
        lambda: run(recipe(models), tmp_path / "out", quiet()),
        lambda: report(recipe(models), tmp_path / "out"),
    ):
        with pytest.raises(InputError, match="out exists already"):
            attempt()
    (tmp_path / "out" / "thesis.tex").unlink()
    assert run(recipe(models), tmp_path / "out", quiet()).is_dir()


def test_one_merge_at_a_time_writes_a_folder(models, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    with locked(partial / LOCK), pytest.raises(InputError, match=r"another merge into .*out is going on"):
        run(recipe(models), tmp_path / "out", quiet())
    assert [file.name for file in partial.iterdir()] == [LOCK]
    assert not (run(recipe(models), tmp_path / "out", quiet()) / LOCK).exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(models, tmp_path, there):
    if there:
        (tmp_path / "place").mkdir()
    (tmp_path / "out").symlink_to("place")
    report(recipe(models), tmp_path / "out")
    run(recipe(models), tmp_path / "out", quiet())
    assert (tmp_path / "out").is_symlink()
    assert same(weights(tmp_path / "place"), in_memory(models))


def test_the_folder_that_one_is_in_is_not_replaced(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be the one that you are in"):
        report(recipe(models), Path())


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def command(models, tmp_path, monkeypatch, capsys):
    """Run `adamerge` with arguments: exit status and what it said."""
    (models / "recipe.yaml").write_text(json.dumps(RECIPE))

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["adamerge", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, " ".join((printed.out + printed.err).split())

    return call


def test_the_command_merges(command, models, tmp_path):
    status, said = command("merge", models / "recipe.yaml", "--output", tmp_path / "out")
    assert status == 0
    assert "merged into" in said
    assert same(weights(tmp_path / "out"), in_memory(models))


def test_a_dry_run_says_what_would_be_done_and_reads_no_weights(command, models, tmp_path, monkeypatch):
    monkeypatch.setattr("adamerge.tensor_files.SafetensorsState._read", None)
    status, said = command("merge", models / "recipe.yaml", "--dry-run", "--output", tmp_path / "out")
    assert status == 0
    assert list(tmp_path.iterdir()) == []
    for words in (
        "base, math, code",
        "19 merged, 2 copied from the base",
        "vocabulary 90 rows",
        "rules Trim, ElectSign",
        "reads 3 ×",
        "free",
    ):
        assert words in said, words


SWAP = {"LayerSwap": {"outer": "math", "inner": "code", "bottom": 2, "top": 1}}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([SWAP], r"2 \+ 1 outer blocks, and the longest stack of the model has only 2"),
        (["Mean", {"Consensus": {"agree": 3}}], "Consensus keeps what 3 experts or more need"),
        ([{"Cabs": {"n": 3, "m": 4}}, "Mean"], r"Cabs\(n=3, m=4\) has room for 1 experts, there are 2"),
    ],
)
def test_what_needs_no_weights_to_be_refused_is_refused_before_any_is_read(models, monkeypatch, rules, words):
    monkeypatch.setattr("adamerge.tensor_files.SafetensorsState._read", None)
    with pytest.raises(InputError, match=words):
        report(recipe(models, rules=rules))


@pytest.mark.parametrize(
    ("rules", "measured", "words"),
    [
        (["Fisher"], {}, "Fisher needs the fisher of 'math', which was not measured"),
        (["Fisher"], {"fisher/other": 1.0}, "the fisher of other tensors .* other was measured"),
        (
            ["Fisher"],
            {f"fisher/{QUERY}": 1.0},
            r"q_proj.weight: the fisher of .math. has shape \[\], expected \[32, 32\]",
        ),
        (["SensMerging", "Mean"], {"agreement/math": 1.0}, "SensMerging needs the sensitivity of 'math'"),
        (["SensMerging", "Mean"], {f"sensitivity/{QUERY}": 1.0}, "SensMerging needs the agreement of 'math'"),
        (
            ["SensMerging", "Mean"],
            {f"sensitivity/{QUERY}": 1.0, "agreement/math": 1.0},
            "SensMerging needs the agreement of 'math' with all of math, code",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused_before_weights_are_read(
    models, tmp_path, monkeypatch, rules, measured, words
):
    found = Observation({key: torch.tensor(value) for key, value in measured.items()})
    Statistics({"math": found, "code": found}).save(tmp_path)
    asked = recipe(models, rules=[{rules[0]: {"statistics": str(tmp_path)}}, *rules[1:]])
    read_no_weights(monkeypatch)
    with pytest.raises(InputError, match=words):
        report(asked)


def read_no_weights(monkeypatch) -> None:
    """Only statistics, whose names begin with what was measured."""
    read = SafetensorsState._read

    def checked(self, name, *place):
        assert "/" in name, f"{name} was read"
        return read(self, name, *place)

    monkeypatch.setattr(SafetensorsState, "_read", checked)


def test_whether_statistics_are_of_these_weights_is_left_to_the_merge(models, tmp_path, monkeypatch):
    found = Observation({f"fisher/{QUERY}": torch.ones(32, 32)}, signatures={QUERY: 1e3})
    Statistics({"math": found, "code": found}).save(tmp_path)
    asked = recipe(models, rules=[{"Fisher": {"statistics": str(tmp_path)}}])
    with monkeypatch.context() as patch:
        read_no_weights(patch)
        report(asked)
    with pytest.raises(InputError, match="measured on other weights"):
        run(asked, tmp_path / "out", quiet())


def test_a_merge_has_its_name_once_all_of_it_is_on_the_disk(models, tmp_path, monkeypatch):
    flushed, out, partial = [], tmp_path / "out", tmp_path / ".out.partial"
    monkeypatch.setattr(running, "flush", lambda path: flushed.append((path, out.exists())))
    run(recipe(models), out, quiet())
    names = {file.name for file in out.iterdir()}
    assert {path.name for path, _ in flushed if path.parent == partial} - {LOCK} == names
    assert [path for path, renamed in flushed if not renamed][-1] == partial
    assert [path for path, renamed in flushed if renamed] == [tmp_path]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_read(models, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"the merge takes .* kB and .* has 1\.0 kB left: make room"):
        report(recipe(models), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{bse: x}", "recipe.yaml: a recipe has no key 'bse': did you mean 'base'?"),
        ("[", "recipe.yaml cannot be read as YAML"),
        ("{base: x, base: y}", "recipe.yaml cannot be read as YAML: the key 'base' is given twice, in lines 1 and 1"),
        (None, "error: there is no recipe "),
        (
            "{base: ., experts: {a: ~nobody-at-all/x}}",
            "recipe.yaml: ~nobody-at-all/x: there is no home folder for ~nobody-at-all: write the path out",
        ),
        (
            "{base: ., experts: {a: .}, rules: [{Fisher: {statistics: ~nobody-at-all/x}}]}",
            "recipe.yaml: ~nobody-at-all/x: there is no home folder",
        ),
    ],
)
def test_errors_are_a_sentence(command, tmp_path, text, words):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    status, said = command("merge", tmp_path / "recipe.yaml", "--dry-run")
    assert status == 1
    assert words in said
    assert "Traceback" not in said


def test_what_the_system_refuses_is_a_sentence_too(command, models, tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".out.partial"))

    monkeypatch.setattr(Path, "mkdir", refused)
    status, said = command("merge", models / "recipe.yaml", "--output", tmp_path / "out")
    assert status == 1
    assert "error: [Errno 13] Permission denied" in said


def test_paths_may_begin_at_home(command, models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(models))
    status, said = command("merge", "~/recipe.yaml", "--output", "~/merged")
    assert status == 0, said
    shutil.rmtree(models / "merged")  # fails where it is not
    for arguments in (("~nobody-at-all/x",), (models / "recipe.yaml", "--output", "~nobody-at-all/x")):
        assert command("merge", *arguments) == (
            1,
            "error: ~nobody-at-all/x: there is no home folder for ~nobody-at-all: write the path out",
        )


def test_an_output_is_wanted(command, models):
    status, said = command("merge", models / "recipe.yaml")
    assert status == 1
    assert "name the folder to write: --output" in said


def test_a_recipe_may_be_read_from_anywhere(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (models / "recipe.yaml").write_text(json.dumps(RECIPE))
    assert read(models / "recipe.yaml").task_vectors.tasks == ("math", "code")
