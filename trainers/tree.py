"""Merging in a tree (SUPERMERGE, arXiv:2412.10416): experts in groups, then the merges, until one is left.

    python -m trainers.tree --group 2 --output runs/tree -- --config configs/suites/mini.yaml --trainer.max_steps 200

A node is an ordinary run of `train.py fit`, with what follows `--`, on a pool of at most `group` experts and on the
tasks of its leaves; its merge is exported and is an expert of the next level. So no process holds more than `group`
task vectors, however many experts there are. Experts are grouped in the order of the suite, and one that is alone moves
up as it is. Coefficients begin at one over the number of experts, where the method does not say.

Every node has a folder, named after its leaves; the root's holds the results, `tree.md` what every node cost. The same
command again goes on where it was interrupted.
"""

import argparse
import io
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, get_loader
from rich.console import Console

from adamerge import InputError
from adamerge.files import write_text
from adamerge.plain_files import check_classes
from adamerge.suites import Suite
from trainers import cli
from trainers.compare_runs import TRAIN, Record, Run, execute, reason, wait
from trainers.results import markdown_table

#: What joins the names of the experts that a merge is made of.
JOINT = "+"


@dataclass(frozen=True)
class Node(Run):
    """One merge, in the folder root/method; the seed is among the arguments."""

    @property
    def folder(self) -> Path:
        return self.root / self.method

    @property
    def merge(self) -> Path:
        """Where its weights are exported."""
        return self.folder / "merged.safetensors"

    def make(self) -> Record:
        """Adapt and export, as far as it is not done."""
        record = self.record()
        if record is None or self.results() is None:
            self.merge.unlink(missing_ok=True)
            record = execute(self)
        if record.error is None and not self.merge.is_file():
            last, log = self.folder / "checkpoints" / "last.ckpt", self.folder / "export.txt"
            config = ["--config", str(self.folder / "config.yaml"), "--ckpt_path", str(last)]
            code, _ = wait([sys.executable, str(TRAIN), "export", *config, "--output", str(self.merge)], log)
            if code:
                raise InputError(f"{self.method} was not exported: {reason(code, log)} ({log})")
        if record.error is not None:
            raise InputError(f"{self.method} failed: {record.error} ({self.folder / 'log.txt'})")
        return record


class Tree:
    """The levels of a tree over a suite's experts."""

    def __init__(self, group: int, output: Path, arguments: Sequence[str]) -> None:
        if group < 2:
            raise InputError(f"a group has at least 2 experts, not {group}")
        self.group, self.output, self.arguments = group, output, tuple(arguments)
        self.spec = _suite_of(arguments)
        self.suite = _build(self.spec)
        if self.suite.experts != self.suite.tasks:
            odd = sorted(set(self.suite.experts) ^ set(self.suite.tasks))
            raise InputError(
                f"in a tree every expert has a task to be merged on, and every task one; {odd[0]!r} has not"
            )

    def run(self) -> list[tuple[int, Node, Record]]:
        """Make all nodes, level by level; returns each with the number of task vectors that it held."""
        made: list[tuple[int, Node, Record]] = []
        pool: dict[str, tuple[str, ...]] = {task: (task,) for task in self.suite.tasks}  # by expert, its leaves
        sources = {task: task for task in pool}
        while len(pool) > 1:
            names, merges = list(pool), {}
            for first in range(0, len(names), self.group):
                members = names[first : first + self.group]
                leaves = tuple(leaf for name in members for leaf in pool[name])
                name = JOINT.join(leaves)
                merges[name] = leaves
                if len(members) > 1:
                    node = self.node(name, leaves, {member: sources[member] for member in members})
                    Console().print(f"{len(made) + 1}. {name}", highlight=False, soft_wrap=True)
                    made.append((len(members), node, node.make()))
                    sources[name] = str(node.merge)
            pool = merges
        return made

    def node(self, name: str, leaves: Sequence[str], experts: Mapping[str, str]) -> Node:
        """The run that merges some experts on the tasks of their leaves."""
        of = {"suite": self.spec, "tasks": list(leaves), "experts": dict(experts), "scale": 1 / len(experts)}
        suite = {"class_path": "adamerge.suites.Subset", "init_args": of}
        overlay = self.output / "suites" / f"{name}.yaml"
        write_text(overlay, json.dumps({"model": {"init_args": {"suite": suite}}}, indent=1) + "\n")  # JSON is YAML
        return Node(name, 0, self.output, (*self.arguments, "--config", str(overlay), "--name", name))


def _suite_of(arguments: Sequence[str]) -> dict[str, Any]:
    """The suite that these arguments of `train.py fit` name, as its class and arguments."""
    with redirect_stdout(io.StringIO()) as printed:
        try:
            cli.main(["fit", *arguments, "--print_config"])
        except SystemExit as end:
            if end.code:
                raise
    try:
        spec: dict[str, Any] = get_loader("yaml")(printed.getvalue())["model"]["init_args"]["suite"]
    except KeyError:
        raise InputError("a tree is made of adaptations: the model that was given has no suite") from None
    return spec


def _build(spec: Mapping[str, Any]) -> Suite:
    parser = ArgumentParser(exit_on_error=False)
    check_classes(spec)
    parser.add_subclass_arguments(Suite, "suite")
    suite: Suite = parser.instantiate(parser.parse_object({"suite": dict(spec)})).suite
    return suite


def report(made: Sequence[tuple[int, Node, Record]]) -> str:
    """What every node achieved and cost, in Markdown."""
    rows = []
    for held, node, record in made:
        scores = {row["method"]: row["average"] for row in (node.results() or {"rows": ()})["rows"]}
        accuracy = [f"{100 * scores[f'this run, {when}']:.1f}" for when in ("start", "adapted")]
        rows.append([node.method, str(held), *accuracy, f"{record.seconds:.0f}", f"{record.peak_gb or 0:.2f}"])
    header = ["merge of", "task vectors held", "start", "adapted", "s", "peak GB"]
    lines = ["# Merging in a tree: accuracy in % on the tasks of the leaves", "", *markdown_table(header, rows), ""]
    return "\n".join([*lines, f"The last merge is {made[-1][1].merge}.", ""])


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends in a sentence on stderr and exit code 2."""
    sys.path.insert(0, str(Path.cwd()))  # so that class_path finds a user's own module, as in `train.py`
    given = list(sys.argv[1:] if args is None else args)
    at = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="python -m trainers.tree", description=_ABOUT, allow_abbrev=False)
    parser.add_argument("--group", type=int, default=2, help="most experts that are merged at once; default: 2")
    parser.add_argument("--output", type=Path, default=Path("runs/tree"), help="default: runs/tree")
    options = parser.parse_args(given[:at])
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop jobs with it: end as cleanly
    try:
        made = Tree(options.group, options.output, given[at + 1 :]).run()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    text = report(made)
    write_text(options.output / "tree.md", text)
    Console().print(text, highlight=False, soft_wrap=True)


_ABOUT = "Merge experts in a tree, so that no process holds more than a group. Repeat the command to go on."

if __name__ == "__main__":
    main()
