"""Candidates in order of how good they look without labels, as Markdown and as tables on the terminal."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console

from trainers.judging import Criteria
from trainers.results import markdown_table, show_table

#: The criterion that candidates are ranked by: of five, the one whose order was nearest to that of true accuracy.
CRITERION = "agreement"

#: How far ranking by it has been right. Spearman's correlation with true accuracy on average over tasks, measured with
#: `benchmarks.criteria`'s computation on finished runs (Mini, seeds 0 to 2: 13 methods of 400 steps and two static
#: merges, 1.00, 1.00, 0.98; MNIST, Fashion-MNIST and sign digits: 9 methods of 300 steps, 1.00), and with two runs of
#: 100 steps on half of the images each (Mini, seed 0: 11 methods, against their accuracy after 400 steps on all).
MEASURED = (
    "How far to trust it: models that were done adapting came in the order of their true accuracy (rank correlation "
    "0.98 to 1.00, suite Mini and three real sets); after two runs of 100 steps the order foretold that after 400 less "
    "well (0.92, one seed of Mini): methods that begin with a random router need more steps than that, and all that "
    "learns from the experts looks some points better than it is. Where experts are wrong, so is this."
)


@dataclass(frozen=True)
class Candidate:
    """A method, or a merge without adaptation, and what speaks for it; or why nothing is known of it."""

    name: str
    adapts: bool
    criteria: Criteria = field(default_factory=dict)
    told: tuple[str, ...] = ()
    error: str | None = None

    def mean(self, criterion: str) -> float:
        """A criterion on average over tasks; what is no number is worse than any."""
        value = statistics.fmean(self.criteria[criterion].values())
        return value if value == value else -1.0


@dataclass(frozen=True)
class Ranking:
    """Candidates, the best first; those that failed come last."""

    suite: str
    candidates: tuple[Candidate, ...]
    command: str = ""
    criterion: str = CRITERION
    measured: str = MEASURED

    @classmethod
    def of(cls, candidates: Sequence[Candidate], suite: str, command: str = "") -> "Ranking":
        """Put candidates in order; among equals, what comes first stays first."""

        def place(candidate: Candidate) -> float:
            return -candidate.mean(CRITERION) if candidate.criteria else 2.0

        return cls(suite, tuple(sorted(candidates, key=place)), command)

    @property
    def failures(self) -> list[str]:
        """A line for each candidate of which nothing is known."""
        return [f"{candidate.name}: {candidate.error}" for candidate in self.candidates if candidate.error]

    def verdict(self) -> str:
        """What is recommended, why, and how far that can be trusted."""
        known = [candidate for candidate in self.candidates if candidate.criteria]
        if not known:
            return "Nothing can be recommended: there are no results."
        best, static = known[0], next((candidate for candidate in known if not candidate.adapts), None)
        share = f"its classes are those of the experts for {100 * best.mean('agreement'):.1f} % of the images"
        if static is None:
            return f"Recommended: {best.name}; {share}. {self.measured}"
        if best is static:
            return f"Recommended: no adaptation ({best.name}); {share}, and no method comes nearer. {self.measured}"
        other = f"those of the best merge without adaptation ({static.name}) for {100 * static.mean('agreement'):.1f} %"
        return f"Recommended: {best.name}; {share}, {other}. {self.measured}"

    def markdown(self) -> str:
        """The whole report."""
        lines = [f"# {self.suite}: candidates in order, without labels", "", self.verdict(), ""]
        for header, rows in self._tables():
            lines += [*markdown_table(header, rows), ""]
        if self.failures:
            lines += ["## Candidates without results", "", *(f"- {line}" for line in self.failures), ""]
        return "\n".join([*lines, "Made by", "", "```bash", self.command, "```", ""])

    def show(self) -> None:
        """Print the tables, the verdict and what failed."""
        console = Console()
        for header, rows in self._tables():
            show_table(header, rows, [self.candidates[0].name])
            console.print()
        console.print(self.verdict(), highlight=False)
        for line in self.failures:
            console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)

    def _tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Criteria on average, in %, then the one that counts by task."""
        known = [candidate for candidate in self.candidates if candidate.criteria]
        if not known:
            return []
        criteria, tasks = known[0].criteria, list(known[0].criteria[self.criterion])
        means = [
            [each.name, *(_percent(each.mean(name)) for name in criteria), ", ".join(each.told) or "–"]
            for each in known
        ]
        by_task = [[each.name, *(_percent(each.criteria[self.criterion][task]) for task in tasks)] for each in known]
        return [(["candidate", *criteria, "told"], means), ([f"{self.criterion} by task", *tasks], by_task)]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
