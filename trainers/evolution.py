"""Searches by populations: CMA-ES over coefficients, and experts that mate and compete."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import cmaes
import torch
from torch import Tensor

from adamerge import InputError
from modules.bounds import bounded
from trainers.search import Search
from trainers.steps import Batch

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation

#: More coefficients than this are searched with a diagonal covariance: a full one has the square of their number.
_MANY = 100


class CMAES(Search):
    """Covariance matrix adaptation (arXiv:1604.00772) of the raw coefficients, as evolutionary merging uses it
    (arXiv:2403.13187).

    A step is a generation: N(m, σ² C) gives a population, the sum of the tasks' mean losses on the step's batch ranks
    it, and the better half moves m, σ and C. The coefficients are m, the distribution's mean: the best of a population
    owes its place to its batch as well. Where there are many coefficients, C is diagonal.

    Args:
        sigma: σ at the start, in raw coefficients.
        population: candidates per step; default: 4 + ⌊3 ln n⌋ for n coefficients.
        batches: the number of generations; default: as many as the run has steps.
    """

    bounds = ("none", "clamp", "softmax", "simplex", "sigmoid", "tanh")

    def __init__(self, sigma: float = 0.1, population: int | None = None, batches: int | None = None) -> None:
        super().__init__(batches)
        if sigma <= 0 or (population is not None and population < 4):
            raise InputError(f"CMAES needs sigma > 0 and a population of 4 or more, not {sigma} and {population}")
        self.sigma, self.population = sigma, population
        self._sampler: cmaes.CMA | cmaes.SepCMA | None = None

    def step(self, run: "Adaptation", batch: Batch) -> None:
        raw = run.coefficients.raw
        if not self.kept:
            self.kept = {"start": raw.detach().double().cpu().flatten(), "seed": int(torch.randint(2**31, ()))}
        sampler = self._sampler = self._sampler or self._replayed()
        points = [sampler.ask() for _ in range(sampler.population_size)]
        values = [torch.from_numpy(point).view_as(raw).to(raw) for point in points]
        scores = [self.score(run, batch, bounded(run.coefficients.bound, value)) for value in values]
        losses = [torch.stack([each.double().mean() for each in score.values()]).sum() for score in scores]
        told = torch.stack(losses).nan_to_num(nan=torch.inf)
        sampler.tell(list(zip(points, told.tolist(), strict=True)))
        self.kept["told"] = torch.cat([self.kept.get("told", told[:0]), told])
        raw.copy_(torch.from_numpy(sampler.mean.copy()).view_as(raw))

    def _replayed(self) -> "cmaes.CMA | cmaes.SepCMA":
        """A sampler in the state that follows from the seed and what it was told: it keeps nothing else."""
        start, told = self.kept["start"].numpy().copy(), self.kept.get("told", torch.zeros(0)).tolist()
        kind = cmaes.SepCMA if len(start) > _MANY else cmaes.CMA
        sampler = kind(mean=start, sigma=self.sigma, seed=self.kept["seed"], population_size=self.population)
        size = sampler.population_size
        if len(told) != size * self.kept.get("steps", 0):
            raise InputError(f"this search was begun with another population than {size}: resume with the same one")
        for first in range(0, len(told), size):
            generation = told[first : first + size]
            sampler.tell([(sampler.ask(), value) for value in generation])
        return sampler

    def reset(self) -> None:
        super().reset()
        self._sampler = None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._sampler = None


class M2N2(Search):
    """Merging of natural niches (M2N2, arXiv:2508.16204): merges mate by attraction and compete for images.

    The first merges are the base and the experts. An image is a resource that all share who score on it,
    fitness_i = Σ_x s_ix / (Σ_j s_jx + ε) with s = exp(−loss), so that one who knows what others do not lives on. Of two
    parents, one is drawn by fitness, the other by what it adds, Σ_x max(s_jx − s_ix, 0) / (Σ_l s_lx + ε). Their child
    takes m of the first and 1 − m of the second in the rows of coefficients before a random split point, in the order
    of depth, and 1 − m and m behind it. The fittest stay.

    The paper mixes by SLERP; here mixing is linear, so that every merge is one of coefficients, within the simplex that
    base and experts span. The coefficients are those of the merge with the highest score over its life beside its
    contemporaries', with one step of an average score counted in.

    Args:
        population: how many merges live on.
        children: how many are born in a step.
        batches: the number of steps.
    """

    def __init__(self, population: int = 16, children: int = 4, batches: int = 100) -> None:
        super().__init__(batches)
        if population < 2 or children < 1:
            raise InputError(f"M2N2 needs a population of two and a child at least, not {population} and {children}")
        self.population, self.children = population, children

    def step(self, run: "Adaptation", batch: Batch) -> None:
        merges, lead, age = self._living(run.coefficients.raw)
        scores = self._scores(run, batch, merges)
        born = torch.stack([self._child(merges, scores) for _ in range(self.children)])
        merges, scores = torch.cat([merges, born]), torch.cat([scores, self._scores(run, batch, born)])
        mean = scores.mean(1)
        lead = torch.cat([lead, lead.new_zeros(self.children)]) + mean - mean.mean()
        age = torch.cat([age, age.new_zeros(self.children)]) + 1
        stay = competition(scores).topk(min(self.population, len(merges))).indices.sort().values
        self.kept |= {"merges": merges[stay], "lead": lead[stay], "age": age[stay]}
        run.coefficients.assign(merges[stay][int((lead / (age + 1))[stay].argmax())])

    def _living(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients [N, rows, K], sum of leads in score [N] and age in steps [N]; at first of base and experts."""
        if "merges" not in self.kept:
            experts = torch.eye(raw.shape[1], dtype=torch.float64)
            first = torch.cat([torch.zeros_like(experts[:1]), experts])[:, None].repeat(1, len(raw), 1)
            return first, first.new_zeros(len(first)), first.new_zeros(len(first))
        return self.kept["merges"], self.kept["lead"], self.kept["age"]

    def _scores(self, run: "Adaptation", batch: Batch, merges: Tensor) -> Tensor:
        """exp(−loss) of every merge on every image, [N, images]."""
        losses = [torch.cat(list(self.score(run, batch, merge).values())) for merge in merges]
        return torch.stack(losses).double().neg().exp().nan_to_num(nan=0.0)

    @staticmethod
    def _child(merges: Tensor, scores: Tensor) -> Tensor:
        tiny = 1e-12  # where nobody adds anything, all are alike
        first = int(torch.multinomial(competition(scores) + tiny, 1))
        second = int(torch.multinomial(attraction(scores, first) + tiny, 1))
        share, split = torch.rand((), dtype=torch.float64), int(torch.randint(merges.shape[1] + 1, ()))
        return crossover(merges[first], merges[second], float(share), split)


def competition(scores: Tensor, eps: float = 1e-8) -> Tensor:
    """Fitness [N] where all share every image: Σ_x s_ix / (Σ_j s_jx + ε), of scores [N, images]."""
    return (scores / (scores.sum(0) + eps)).sum(1)


def attraction(scores: Tensor, first: int, eps: float = 1e-8) -> Tensor:
    """What each adds [N] to one of them where that is weak: Σ_x max(s_jx − s_ix, 0) / (Σ_l s_lx + ε)."""
    return ((scores - scores[first]).clamp(min=0) / (scores.sum(0) + eps)).sum(1)


def crossover(first: Tensor, second: Tensor, share: float, split: int) -> Tensor:
    """Of rows [G, K], `share` of the first and the rest of the second before the split point, the reverse behind it."""
    shares = torch.full((len(first), 1), 1 - share, dtype=first.dtype)
    shares[:split] = share
    return shares * first + (1 - shares) * second
