"""An inspection of a job, carried out and shown: tables and sentences, `report.json`, figures."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.files import write_text
from adamerge.fused import split
from adamerge.inspecting import verdict
from adamerge.inspecting.geometry import Geometry, measure, ratio
from adamerge.inspecting.spectra import Spectrum, decompose_all, evenly, matrices
from adamerge.inspecting.verdict import Finding, Topic, against, findings, percent
from adamerge.preflight import memory, passes
from adamerge.recipes import Job
from adamerge.scales import matching

_HEADINGS: dict[Topic, str] = {
    "mergeable": "Mergeable?",
    "fights": "Who fights?",
    "signs": "Signs",
    "spaces": "Spaces",
    "try": "Worth trying",
}


@dataclass(frozen=True)
class Cost:
    """What a merge would take on this machine.

    Attributes:
        memory: bytes at the peak, about, by the job's own rules.
        passes: how often these read all tensors, the merge itself included.
        reading: seconds of one such pass, as long as this inspection's own took.
        matrices: how many there are to decompose, by rules that do.
        decomposing: seconds for all of them and all experts, from those that were decomposed here; None if none was.
    """

    memory: int
    passes: int
    reading: float
    matrices: int
    decomposing: float | None


@dataclass(frozen=True)
class Inspection:
    """All that was found out."""

    geometry: Geometry
    spectra: list[Spectrum]
    cost: Cost
    findings: list[Finding]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        geometry = self.geometry
        share, weighted = against(geometry) if geometry.blocks else (0.0, 0.0)
        unrelated = {"chance": geometry.chance, "weighted_chance": geometry.opposition}
        return {
            "tasks": geometry.tasks,
            "blocks": geometry.blocks,
            "findings": [asdict(finding) for finding in self.findings],
            "cosine": _plain(geometry.cosine),
            "kinship": {"pearson": _plain(geometry.kinship), "distance": _plain(geometry.distance)},
            "agreement_of_signs": _plain(geometry.agreement),
            "norm": _plain(geometry.norm),
            "norm_relative_to_base": _plain(geometry.relative),
            "reach_of_sum": _plain(geometry.reach),
            "signs": {"minority": share, "weighted": weighted, **unrelated},
            "by_block": {
                block: {
                    "cosine": _plain(geometry.cosines[b]),
                    "norm": _plain(geometry.norms[b]),
                    "minority": _plain(ratio(geometry.against[b], geometry.changed[b])),
                    "against_sum": _plain(ratio(geometry.against_mass[b], geometry.mass[b])),
                }
                for b, block in enumerate(geometry.blocks)
            },
            "matrices": {spectrum.name: _matrix(spectrum) for spectrum in self.spectra},
            "cost": asdict(self.cost),
            "thresholds": {name: value for name, value in vars(verdict).items() if isinstance(value, float)},
        }


def inspect(job: Job, limit: int, console: Console) -> Inspection:
    """Read all tensors once and decompose at most `limit` matrices; the job's rules are not applied."""
    vectors = job.task_vectors
    if job.exclude:
        vectors = vectors.without(name for pattern in job.exclude for name in matching(pattern, vectors.base))
    if job.split_fused_qkv:
        vectors, _ = split(vectors)
    names = matrices(vectors)
    entries = sum(meta(vectors.base, name).numel() for name in vectors.deltas)
    start = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("reading all tensors", total=entries)
        geometry = measure(vectors, lambda count: progress.advance(bar, count))
        reading = time.perf_counter() - start
        bar = progress.add_task("decomposing matrices", total=len(evenly(names, limit)))
        spectra = decompose_all(vectors, limit, lambda name: progress.advance(bar))
    work = {name: _work(meta(vectors.base, name).shape) for name in names}
    done = sum(work[spectrum.name] for spectrum in spectra)
    seconds = sum(spectrum.seconds for spectrum in spectra) * sum(work.values()) / done if done else None
    cost = Cost(memory(job), passes(job) + 1, reading, len(names), seconds)
    return Inspection(geometry, spectra, cost, findings(geometry, spectra))


def show(inspection: Inspection) -> RenderableType:
    """Tables, then sentences."""
    geometry, parts = inspection.geometry, list[RenderableType]()
    if geometry.blocks:
        parts += [_experts(geometry), Text(), _pairs(geometry.tasks, "cosine", geometry.cosine), *_kinship(geometry)]
        parts += [Text(), _blocks(geometry, inspection.spectra), Text()]
    for topic, heading in _HEADINGS.items():
        sentences = [finding.text for finding in inspection.findings if finding.topic == topic]
        if sentences:
            parts += _section(heading, sentences)
    parts += _section("What it takes", costs(inspection))
    return Group(*parts, Text("These are hints from weights alone: held-out data decide."))


def write(inspection: Inspection, folder: Path) -> None:
    """`report.txt`, `report.json` and figures."""
    from adamerge.inspecting import figures  # matplotlib takes a second

    text = StringIO()
    Console(file=text, width=120).print(show(inspection))
    write_text(folder / "report.txt", text.getvalue())
    write_text(folder / "report.json", json.dumps(inspection.as_dict(), indent=2) + "\n")
    figures.draw(inspection.geometry, inspection.spectra, folder)


def costs(inspection: Inspection) -> list[str]:
    """Memory and time of a merge, in sentences."""
    cost, done = inspection.cost, len(inspection.spectra)
    times = "once" if cost.passes == 1 else f"{cost.passes} times, {_seconds(cost.passes * cost.reading)} in all"
    lines = [
        f"By this recipe, a merge takes about {decimal(cost.memory)} of memory and reads all tensors {times}; one pass "
        f"took {_seconds(cost.reading)} here."
    ]
    if cost.decomposing is not None:
        lines.append(
            f"Decomposing the {cost.matrices} matrices of every expert, as spectral rules do, takes about "
            f"{_seconds(cost.decomposing)} more ({done} of them were decomposed here)."
        )
    return lines


def _section(heading: str, sentences: Sequence[str]) -> list[RenderableType]:
    return [Text(heading, style="bold"), *(Padding(Text(sentence), (0, 0, 0, 2)) for sentence in sentences)]


def _experts(geometry: Geometry) -> Table:
    table = _table("expert", "norm", "of the base's", "sum's reach", "minority sign", "against the sum")
    rows = (
        geometry.norm,
        geometry.relative,
        geometry.reach,
        ratio(geometry.against.sum(0), geometry.changed.sum(0)),
        ratio(geometry.against_mass.sum(0), geometry.mass.sum(0)),
    )
    for task, *values in zip(geometry.tasks, *(row.tolist() for row in rows), strict=True):
        norm, relative, reach, share, weighted = values
        table.add_row(task, f"{norm:.3g}", percent(relative), verdict.two(reach), percent(share), percent(weighted))
    return table


def _pairs(tasks: Sequence[str], what: str, values: Tensor) -> Table:
    table = _table(what, *tasks)
    for task, row in zip(tasks, values.tolist(), strict=True):
        table.add_row(task, *map(verdict.two, row))
    return table


def _kinship(geometry: Geometry) -> list[RenderableType]:
    """A table where it would show something else than that of the cosines."""
    if geometry.kinship.sub(geometry.cosine).abs().max() < 0.005:
        return [Text("Kinship, the correlation over all entries, is the same to two digits.")]
    return [Text(), _pairs(geometry.tasks, "kinship", geometry.kinship)]


def _blocks(geometry: Geometry, spectra: Sequence[Spectrum]) -> Table:
    table = _table(
        "block", "lowest cosine", "of", "mean norm", "minority sign", "against the sum", "interference / chance"
    )
    names, several = verdict.pair_names(geometry.tasks), len(geometry.tasks) > 1
    cosines = verdict.pairs(geometry.cosines)
    shares = ratio(geometry.against.sum(1), geometry.changed.sum(1)).tolist()
    weighted = ratio(geometry.against_mass.sum(1), geometry.mass.sum(1)).tolist()
    for b, block in enumerate(geometry.blocks):
        lowest = (verdict.two(cosines[b].min()), names[int(cosines[b].argmin())]) if several else ("", "")
        found = [spectrum.relative_interference for spectrum in spectra if spectrum.block == block]
        shared = f"{sum(found) / len(found):.1f} × chance" if found else ""
        norm = f"{geometry.norms[b].mean():.3g}"
        table.add_row(block, *lowest, norm, percent(shares[b]), percent(weighted[b]), shared)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        words = column in ("expert", "cosine", "kinship", "block", "of")
        table.add_column(column, justify="left" if words else "right", no_wrap=column == "block")
    return table


def _matrix(spectrum: Spectrum) -> dict[str, Any]:
    return {
        "shape": spectrum.shape,
        "rank": spectrum.rank,
        "kept": _plain(spectrum.kept),
        "overlap": _plain(spectrum.overlap),
        "overlap_of_outputs": _plain(spectrum.left),
        "overlap_of_inputs": _plain(spectrum.right),
        "interference": spectrum.interference,
        "interference_of_random_spaces": spectrum.chance,
        "effective_rank_of_sum": spectrum.effective_rank,
        "singular_values": _plain(spectrum.values),
        "singular_values_of_sum": _plain(spectrum.total),
    }


def _plain(values: Tensor) -> Any:
    """Numbers or lists of them, to six digits."""
    return [_plain(part) for part in values] if values.dim() else float(f"{values:.6g}")


def _work(shape: Sequence[int]) -> int:
    """What a decomposition's time grows with."""
    return shape[0] * shape[1] * min(shape)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
