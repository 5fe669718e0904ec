"""Statistics of a suite's experts on its images."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adamerge import InputError, TaskVectors, merge
from adamerge.data import ArrayImages, Preprocess
from adamerge.rules import Fisher, FwMerging, Mean, Merged, RegMean
from adamerge.suites import HeadWeights, Suite
from adamerge.suites.measuring import collect_suite, informed


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


class Two(Suite):
    name, tasks = "two", ("one", "two")

    def __init__(self, more: tuple[str, ...] = ()) -> None:
        self.more = more

    @property
    def experts(self) -> tuple[str, ...]:
        return self.tasks + self.more

    def backbone(self) -> nn.Module:
        return Backbone()

    def task_vectors(self) -> TaskVectors:
        torch.manual_seed(0)
        base, *experts = [{n: torch.randn(v.shape) for n, v in Backbone().state_dict().items()} for _ in range(4)]
        return TaskVectors.from_state_dicts(base, dict(zip(self.experts, experts, strict=False)))

    def classes(self, task: str) -> tuple[str, ...]:
        return ("a", "b", "c")

    def head(self, task: str) -> HeadWeights:
        return HeadWeights(torch.randn(3, 4, generator=torch.Generator().manual_seed(len(self.classes(task)))))

    def dataset(self, task: str, split: str) -> ArrayImages:
        rng = np.random.default_rng([self.tasks.index(task), split == "train"])
        pixels = rng.integers(256, size=(9, 2, 2, 3), dtype=np.uint8)
        return ArrayImages(pixels, np.arange(9) % 3, Preprocess())


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))


def test_the_gram_of_all_images_is_that_of_each_task():
    found = collect_suite(Two())
    for task in Two.tasks:
        images = torch.stack([image for image, _ in Two().dataset(task, "train")]).flatten(1)
        torch.testing.assert_close(found.find("gram", task, "fc.weight"), images.T @ images / 9)


def test_some_images_are_drawn_by_seed():
    grams = [collect_suite(Two(), examples=3, seed=seed).find("gram", "one", "fc.weight") for seed in (0, 0, 1)]
    assert torch.equal(grams[0], grams[1])
    assert not torch.equal(grams[0], grams[2])


def test_the_base_is_measured_on_the_images_of_all_tasks():
    found = collect_suite(Two(), ("magnitude",), of_base=True)
    images = torch.stack([image for task in Two.tasks for image, _ in Two().dataset(task, "train")]).flatten(1)
    assert list(found.observations) == ["base"]
    torch.testing.assert_close(found.find("magnitude", "base", "fc.weight"), images.abs().mean(0))


def test_true_labels_are_used_where_they_are_asked_for():
    sampled, given = (collect_suite(Two(), ("fisher",), targets=targets) for targets in ("sampled", "labels"))
    assert not torch.equal(sampled.find("fisher", "one", "fc.bias"), given.find("fisher", "one", "fc.bias"))


def test_rules_without_statistics_get_those_of_the_suite():
    vectors, rule = Two().task_vectors(), RegMean(rho=0.5)
    with pytest.raises(InputError, match="RegMean needs statistics of the experts"):
        merge(vectors, [rule])
    given = informed([rule], Two())
    expected = merge(vectors, [RegMean(collect_suite(Two()), rho=0.5)])
    assert torch.equal(merge(vectors, given)["fc.weight"], expected["fc.weight"])
    assert rule.statistics is None
    (merged,) = informed([Merged([Fisher()])], Two())
    mean = merge(vectors, [Mean()])["fc.weight"]
    assert not torch.allclose(merge(vectors, [merged])["fc.weight"], mean)
    own = RegMean(collect_suite(Two(), seed=3))
    assert informed([own, Mean()], Two())[0] is own


def test_experts_without_images_are_named():
    with pytest.raises(InputError, match="suite two has no images for its expert 'three'"):
        collect_suite(Two(more=("three",)))


def test_selection_asks_for_labels_and_takes_those_of_the_tasks():
    suite = Two(more=("three",))
    with pytest.raises(InputError, match="FwMerging needs labels"):
        informed([FwMerging()], suite)
    (rule,) = informed([FwMerging(steps=2)], suite, labels=True)
    shares = [float(rule.statistics.find("share", task, "fc.weight")) for task in suite.experts]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) > 0.6
