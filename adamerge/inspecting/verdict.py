"""What the numbers of an inspection say in words: are these mergeable, who fights, where, and what is worth trying.

All of it follows from weights alone. Thresholds say where a number begins to matter in the geometry of a sum; none of
them was fitted to accuracies, and whether a rule helps is for held-out data to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.inspecting.geometry import Geometry, ratio
from adamerge.inspecting.spectra import Spectrum

#: ‖τ‖ / ‖θ₀‖ from which experts are taken to come from elsewhere: two independent networks of equal norm differ by √2
#: of it, fine-tuning as a rule moves a few hundredths.
ELSEWHERE = 1.0
#: ‖τ‖ / ‖θ₀‖ from which experts are far for fine-tuning: static merges of suite Mini's eight, 0.19 to 0.23 away, stay
#: 14 points of accuracy below them or more.
FAR = 0.1
#: Cosine below which two experts fight: at −0.1 and equal norms, adding the one takes back a tenth of the other's way.
FIGHT = -0.1
#: Standard deviations of chance that a fight in a block must also go beyond: blocks of a few large entries have many.
CLEAR = 3.0
#: A block's share of a pair's movement, Σ ‖τᵢ‖ ‖τⱼ‖, below which a fight in it is a footnote.
SMALL = 0.01
#: Mean cosine from which experts count as versions of one task: at 0.3, the sum of 8 goes 1 + 7 × 0.3 = 3.1 times as
#: far along each as it went itself, and shares rather than adds.
ALIKE = 0.3
#: Norms this many times another's: in the sum of two orthogonal task vectors, the larger then has 80 % of the energy.
#: Merged two by two, suite Mini's experts lose 14 points of accuracy beyond it and 8 below; cosines do not tell.
UNEVEN = 2.0
#: How many times the movement against the sum's sign of unrelated experts, from which electing signs is worth a trial:
#: at 0.9 times, with eight experts of suite Mini, it costs accuracy.
CONFLICT = 1.1
#: Share of the energy that ⌊r / K⌋ directions must keep for experts to fit side by side in one matrix: at 0.9, the
#: norm of what is cut off is below a third of the whole.
LOW_RANK = 0.9
#: Overlap beyond chance from which spaces are shared: a tenth of the way from random spaces to the same one.
SHARED = 0.1

Topic = Literal["mergeable", "fights", "signs", "spaces", "try"]


@dataclass(frozen=True)
class Finding:
    """One sentence, and what it is about. Of a rule worth trying, `rules` names the classes, in their order."""

    topic: Topic
    text: str
    rules: tuple[str, ...] = ()


def findings(geometry: Geometry, spectra: Sequence[Spectrum]) -> list[Finding]:
    """What to know before a merge, in the order in which to read it."""
    if not geometry.blocks:
        return [Finding("mergeable", "No expert differs from the base: there is nothing to merge.")]
    found = [*_mergeable(geometry), *_fights(geometry), *_signs(geometry), *_spaces(geometry, spectra)]
    return [*found, *_worth_trying(geometry, spectra)]


def pairs(table: Tensor) -> Tensor:
    """The entries [..., K (K − 1) / 2] of a symmetric table [..., K, K] above its diagonal."""
    rows, columns = torch.triu_indices(table.shape[-2], table.shape[-1], 1)
    return table[..., rows, columns]


def pair_names(tasks: Sequence[str]) -> list[str]:
    """In the order of `pairs`."""
    return [f"{one} and {other}" for i, one in enumerate(tasks) for other in tasks[i + 1 :]]


def elsewhere(geometry: Geometry) -> list[str]:
    """Experts that are as far from the base as another network would be."""
    return [task for task, far in zip(geometry.tasks, geometry.relative.tolist(), strict=True) if far >= ELSEWHERE]


def _mergeable(geometry: Geometry) -> list[Finding]:
    tasks, relative = geometry.tasks, geometry.relative
    said = []
    if still := [task for task, norm in zip(tasks, geometry.norm.tolist(), strict=True) if norm == 0]:
        said.append(f"{', '.join(still)}: identical to the base.")
    if far := elsewhere(geometry):
        names = ", ".join(far) + (" lies" if len(far) == 1 else " lie")
        said.append(
            f"Not as they are: {names} {float(relative.max()):.2f} × the base's norm away from it, as far "
            "as an independently trained network. They share no base; permutations may align them "
            "(adamerge.permutations)."
        )
    elif len(tasks) == 1:
        said.append(f"One expert, {percent(relative[0])} of the base's norm away from it: nothing to compare.")
    else:
        low, high = (percent(value) for value in (relative.min(), relative.max()))
        away = low if low == high else f"{low} to {high}"
        mean, least = pairs(geometry.cosine).mean(), pairs(geometry.cosine).min()
        distant = float(relative.max()) >= FAR
        verdict = "With care" if distant or float(least) < FIGHT else "Yes, as far as weights tell"
        said.append(
            f"{verdict}: the experts lie {away} of the base's norm away from it, and their mean cosine is {two(mean)}."
        )
        if distant:
            said.append("That is far for fine-tuning: expect a merge well below its experts, or tune them less.")
    reach = geometry.reach
    if len(tasks) > 1 and bool((reach < 0.5).any()):
        task = tasks[int(reach.argmin())]
        said.append(f"The plain sum goes only {two(reach.min())} of {task}'s own way along it.")
    return [Finding("mergeable", text) for text in said]


def _fights(geometry: Geometry) -> list[Finding]:
    if len(geometry.tasks) == 1:
        return []
    names, whole, blocks = pair_names(geometry.tasks), pairs(geometry.cosine), pairs(geometry.cosines)
    products = pairs(geometry.norms.unsqueeze(-1) * geometry.norms.unsqueeze(-2))
    fighting = (blocks < FIGHT) & (blocks < -CLEAR * pairs(geometry.noise))
    large = ratio(products, products.sum(0)) >= SMALL
    said = []
    for pair in (fighting & large).any(0).nonzero().flatten().tolist():
        column = blocks[:, pair].masked_fill(~(fighting & large)[:, pair], 1)
        where = _listed([geometry.blocks[b] for b in column.argsort().tolist() if float(column[b]) < 1])
        said.append(
            f"{names[pair]} fight in {where}: their cosine there is {two(column.min())} at worst, "
            f"{two(whole[pair])} over the whole model."
        )
    if not said:
        pair, block = int(whole.argmin()), int(blocks.masked_fill(~large, 1).amin(1).argmin())
        lowest = blocks.masked_fill(~large, 1)[block]
        said.append(
            f"No pair fights: the lowest cosine is {two(lowest.min())} in a block ({names[int(lowest.argmin())]} in "
            f"{geometry.blocks[block]}) and {two(whole[pair])} over the whole model ({names[pair]})."
        )
    if footnotes := (fighting & ~large).any(1).nonzero().flatten().tolist():
        small = _listed([geometry.blocks[b] for b in footnotes])
        said.append(f"Cosines below {FIGHT} in {small} hold less than {SMALL:.0%} of any pair's movement.")
    if uneven := _uneven(geometry):
        longest, shortest, times = uneven
        said.append(
            f"{longest} drowns {shortest} without a fight: it went {times:.1f} × as far, and a sum goes mostly its way."
        )
    return [Finding("fights", text) for text in said]


def _uneven(geometry: Geometry) -> tuple[str, str, float] | None:
    """The longest and the shortest expert, and how many times as long it is, where that is much."""
    norms = {task: norm for task, norm in zip(geometry.tasks, geometry.norm.tolist(), strict=True) if norm > 0}
    large, small = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    times = norms[large] / norms[small]
    return (large, small, times) if times >= UNEVEN else None


def _listed(blocks: Sequence[str]) -> str:
    more = f" and {len(blocks) - 3} more blocks" if len(blocks) > 3 else ""
    return ", ".join(blocks[:3]) + more


def _signs(geometry: Geometry) -> list[Finding]:
    if len(geometry.tasks) == 1:
        return []
    share, weighted = against(geometry)
    by_block = geometry.against_mass.sum(1) / geometry.mass.sum(1)
    block = int(by_block.argmax())
    text = (
        f"{percent(share)} of changed entries have the minority's sign (coins would give "
        f"{percent(geometry.chance)}); weighted by size, {percent(weighted)} of all movement is against the sum "
        f"({percent(geometry.opposition)} where experts have nothing to do with each other), "
        f"{percent(by_block[block])} in {geometry.blocks[block]}."
    )
    return [Finding("signs", text)]


def against(geometry: Geometry) -> tuple[float, float]:
    """Share of changed entries whose sign is the minority's, and of movement that is against the sum's sign."""
    share = geometry.against.sum() / geometry.changed.sum()
    return float(share), float(geometry.against_mass.sum() / geometry.mass.sum())


def _spaces(geometry: Geometry, spectra: Sequence[Spectrum]) -> list[Finding]:
    if not spectra or len(geometry.tasks) == 1:
        return []
    mean = pairs(torch.stack([spectrum.overlap for spectrum in spectra])).mean(0)
    closest = int(mean.argmax())
    worst = max(spectra, key=lambda spectrum: spectrum.relative_interference)
    text = (
        f"Spaces overlap by {mean.mean():.2f} on average (0 is chance, 1 the same space), most for "
        f"{pair_names(geometry.tasks)[closest]} ({mean[closest]:.2f}); singular task interference is largest in "
        f"{worst.name}, {worst.relative_interference:.1f} × that of random spaces."
    )
    return [Finding("spaces", text)]


def _worth_trying(geometry: Geometry, spectra: Sequence[Spectrum]) -> list[Finding]:
    if elsewhere(geometry) or len(geometry.tasks) == 1:
        return []
    found = []
    mean = float(pairs(geometry.cosine).mean())
    if mean >= ALIKE:
        text = f"Mean or ModelStock: with a mean cosine of {two(mean)} the experts share most of their way."
        return [Finding("try", text, ("Mean", "ModelStock"))]
    if _uneven(geometry):
        text = (
            "Linear with weights of one over each expert's norm: a mean in which all experts go as far, and the short "
            "ones are not drowned."
        )
        found.append(Finding("try", text, ("Linear",)))
    if spectra:
        found.append(_spectral(spectra))
    weighted = against(geometry)[1]
    if weighted >= CONFLICT * geometry.opposition:
        text = (
            f"Trim and ElectSign (TIES): {percent(weighted)} of all movement is against the elected sign, more than "
            f"the {percent(geometry.opposition)} of unrelated experts."
        )
        found.append(Finding("try", text, ("Trim", "ElectSign")))
    if not found:
        text = f"TaskArithmetic: only {percent(weighted)} of all movement is against the sum."
        found.append(Finding("try", text, ("TaskArithmetic",)))
    text = "RegMean(relative=True), given unlabelled examples of every task: they show which directions inputs take."
    return [*found, Finding("try", text, ("RegMean",))]


def _spectral(spectra: Sequence[Spectrum]) -> Finding:
    """TSV-M where the experts fit side by side, Iso-C, which cuts nothing off, where they do not."""
    shares = torch.cat([spectrum.kept for spectrum in spectra])
    kept = float(shares[shares > 0].mean())
    overlap = float(pairs(torch.stack([spectrum.overlap for spectrum in spectra])).mean())
    if kept >= LOW_RANK:
        shared = f", and spaces overlap by {overlap:.2f}, which whitening undoes" if overlap >= SHARED else ""
        text = f"TsvM: with its share of the directions each expert keeps {percent(kept)} of its energy{shared}."
        return Finding("try", text, ("TsvM",))
    rank = sum(spectrum.effective_rank for spectrum in spectra) / len(spectra)
    text = (
        f"IsoC: a share of the directions keeps only {percent(kept)} of an expert's energy, so that TsvM would cut "
        f"off much; the sum's effective rank is {percent(rank)} of the full one, which IsoC makes 100 %."
    )
    return Finding("try", text, ("IsoC",))


def two(value: Tensor | float) -> str:
    """With two decimals, and no −0.00."""
    return f"{round(float(value), 2) + 0.0:.2f}"


def percent(share: Tensor | float) -> str:
    """With one decimal below 10 %, else none."""
    share = 100 * float(share)
    return f"{share:.1f} %" if share < 10 else f"{share:.0f} %"
