"""Which method to use, without a label: short runs of several methods, ranked by what unlabelled images say of them.

    python -m trainers.recommend --suite configs/suites/mini.yaml --methods configs/methods/*.yaml --seed 0 --steps 100
    ... --config configs/quickstart.yaml --output runs/recommend -- --data.init_args.batch_size 8

Every method adapts twice, on one half of the images each, in child processes of `train.py fit` that score nothing. What
they have learned, and merges without adaptation, are then asked about the same images of every task. The same command
again repeats no run that is done; see `trainers.compare` for what wins, and for the exit codes.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import get_loader
from lightning.fabric import Fabric
from rich.console import Console

from adamerge import InputError
from adamerge.files import write_text
from trainers import plans
from trainers.adaptation import Adaptation
from trainers.compare_runs import Record, Run
from trainers.judging import Judge
from trainers.ranking import Candidate, Ranking


class Plan(plans.Plan):
    """Two runs of every method, each on a half of the images."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, _parser())
        self.seed, steps = self.given.seed, self.given.steps
        if self.seed < 0 or steps < 1:
            raise InputError(f"a seed is a number from 0 on, steps are one or more: got {self.seed} and {steps}")
        self.always = ("--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0")
        self.always += ("--report.scores", "false", "--report.figures", "false")
        self.runs = [self._half(path, half) for path in self.methods for half in (0, 1)]

    def _half(self, method: Path, half: int) -> Run:
        root = self.output / "runs" / f"half{half}"
        return self.run(root, method.stem, self.seed, method, "--data.init_args.half", str(half))

    def title(self, run: Run) -> str:
        return f"{self.titles[run.method]}, {run.root.name}"


def _parser() -> plans.Parser:
    parser = plans.Parser(
        prog="python -m trainers.recommend",
        description="Rank methods on one suite without labels. Repeat the command to go on where it stopped.",
        epilog="What follows `--` is handed to every run: -- --data.init_args.batch_size 8",
        allow_abbrev=False,
    )
    plans.shared_arguments(parser, "runs/recommend")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--steps", type=int, default=100, help="of every run; default: 100")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends in a sentence on stderr and exit code 2."""
    given = list(sys.argv[1:] if args is None else args)
    plan = plans.read(Plan, given)
    code = plans.make(plan, _ending)
    ranking = Ranking.of(candidates(plan), plan.suite.stem, "python -m trainers.recommend " + shlex.join(given))
    write_text(plan.output / "recommend.json", json.dumps(asdict(ranking), indent=1) + "\n")
    write_text(plan.output / "recommend.md", ranking.markdown())
    ranking.show()
    Console().print(f"The ranking is in {plan.output}", soft_wrap=True, highlight=False)
    raise SystemExit(code or bool(ranking.failures))


def _ending(run: Run, record: Record) -> str:
    """How a run ended, in a line."""
    return f"failed: {record.error}" if record.error else f"{record.seconds:.0f} s, {record.peak_gb or 0:.1f} GB"


def candidates(plan: Plan) -> list[Candidate]:
    """Merges without adaptation, then the methods, with what the images say of them."""
    done = [run for run in (plan.preparation(plan.seed), *plan.runs) if run.results() is not None]
    if not done:
        return [Candidate(title, True, error=_fate(plan, stem)) for stem, title in plan.titles.items()]
    judge = _judge(done[0], plan.seed)
    found = [Candidate(name, False, judge.criteria(own, own)) for name, own in judge.ask_static().items()]
    for stem, title in plan.titles.items():
        error = _fate(plan, stem)
        found.append(Candidate(title, True, error=error) if error else _candidate(plan, stem, judge))
    return found


def _fate(plan: Plan, method: str) -> str | None:
    """Why there is nothing to be asked of a method's two runs; none if both are done."""
    missing = [run for run in plan.runs if run.method == method and run.results() is None]
    return next(
        (f"{(run.record() or Record('', 'not run yet')).error} ({run.folder / 'log.txt'})" for run in missing), None
    )


def _candidate(plan: Plan, method: str, judge: Judge) -> Candidate:
    """A method whose two runs are done."""
    first, second = (run for run in plan.runs if run.method == method)
    told = [what for what in (first.results() or {})["information"] if what not in ("images", "task id")]
    try:
        criteria = judge.criteria(*(judge.ask(_restored(run, suite=judge.suite)) for run in (first, second)))
    except Exception as error:  # out of memory, say: the others shall not be lost
        return Candidate(plan.titles[method], True, error=" ".join(f"{type(error).__name__}: {error}".split()))
    return Candidate(plan.titles[method], True, criteria, tuple(told))


def _judge(run: Run, seed: int) -> Judge:
    """A judge of the images that a run adapts on, on its device."""
    config = get_loader("yaml")((run.folder / "config.yaml").read_text(encoding="utf-8"))
    device: torch.device = Fabric(accelerator=config["trainer"]["accelerator"], devices=1).device
    return Judge(_restored(run).suite, config["data"]["init_args"]["split"], seed=seed, device=device)


def _restored(run: Run, **more: object) -> Adaptation:
    return Adaptation.load_from_checkpoint(run.folder / "checkpoints" / "last.ckpt", map_location="cpu", **more)


if __name__ == "__main__":
    main()
