"""Several methods on one suite over several seeds, side by side: tables, figures and every run, in one folder.

    python -m trainers.compare --suite configs/suites/mini.yaml --methods configs/methods/*.yaml --seeds 0 1 2
    ... --config configs/quickstart.yaml --output runs/compare -- --trainer.max_steps 100

Every (method, seed) is a child process of `train.py fit`. What comes later wins: `--config`s, the method, the suite
(whose overlay may set steps and rates for the size of its model), the seed, and what follows `--`. The same command
again repeats nothing that is done, goes on with what was interrupted, and tries again what failed. A run is the same
while its arguments and the files that they name are: after a change of code, take another `--output`.

Exit codes: 0 where all is well, 1 where runs failed (the others are in the tables), 2 for bad input, 130 after Ctrl-C.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from adamerge import InputError
from adamerge.files import write_text
from trainers import compare_figures, plans
from trainers.compare_runs import Record, Run
from trainers.comparison import Comparison, Outcome


class Plan(plans.Plan):
    """What is to be compared, seed by seed."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, _parser())
        seeds, root = self.given.seeds, self.output / "runs"
        if min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise InputError(f"seeds must be different numbers from 0 on, not {' '.join(map(str, seeds))}")
        self.runs = [self.run(root, path.stem, seed, path) for seed in seeds for path in self.methods]


def _parser() -> plans.Parser:
    parser = plans.Parser(
        prog="python -m trainers.compare",
        description="Compare methods on one suite over several seeds. Repeat the command to go on where it stopped.",
        epilog="What follows `--` is handed to every run, after all else: -- --trainer.max_steps 100",
        allow_abbrev=False,
    )
    plans.shared_arguments(parser, "runs/compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends in a sentence on stderr and exit code 2."""
    given = list(sys.argv[1:] if args is None else args)
    plan = plans.read(Plan, given)
    code = plans.make(plan, _ending)
    comparison = _report(plan, "python -m trainers.compare " + shlex.join(given))
    raise SystemExit(code or bool(comparison.failures))


def _ending(run: Run, record: Record) -> str:
    """How a run ended, in a line."""
    if record.error:
        return f"failed: {record.error}"
    averages = {row["method"]: row["average"] for row in (run.results() or {}).get("rows", ())}
    average = averages.get("this run, adapted")
    score = "not scored" if average is None else f"{100 * average:.1f} %"
    return f"{score}, {record.seconds:.0f} s, {record.peak_gb or 0:.1f} GB"


def _report(plan: Plan, command: str) -> Comparison:
    """Gather what there is, method by method; write and print it."""
    outcomes = []
    for run in sorted(plan.runs, key=lambda run: list(plan.titles).index(run.method)):
        record, results = run.record() or Record("", "not run yet"), run.results()
        fate = (results, None if results else record.error, record.seconds, record.peak_gb)
        outcomes.append(Outcome(plan.titles[run.method], run.seed, *fate, str(run.folder / "log.txt")))
    comparison = Comparison.of(outcomes, plan.suite.stem, command, plan.seeded)
    write_text(plan.output / "compare.json", json.dumps(asdict(comparison), indent=1) + "\n")
    write_text(plan.output / "compare.md", comparison.markdown())
    compare_figures.draw(comparison, plan.output / "figures")
    comparison.show()
    Console().print(f"Tables and figures are in {plan.output}", soft_wrap=True, highlight=False)
    return comparison


if __name__ == "__main__":
    main()
