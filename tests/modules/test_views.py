"""What a step knows of images: computed once, shared by tasks, looked up where it is known."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors
from adamerge.backbones import TinyViT
from adamerge.suites import HeadWeights
from modules import BlockRouter, Coefficients, FeatureRouter, Head, Heads, MergedModel, Pass, Surgery, View

DIM, CLASSES = 8, {"a": 3, "b": 5}


@pytest.fixture
def model() -> nn.Module:
    return TinyViT(image_size=16, patch=8, dim=DIM, depth=2, heads=2).double().eval()


@pytest.fixture
def vectors(model: nn.Module) -> TaskVectors:
    base = model.state_dict()
    experts = {task: {n: v + 0.1 * torch.randn_like(v) for n, v in base.items()} for task in CLASSES}
    return TaskVectors.from_state_dicts(base, experts)


@pytest.fixture
def heads() -> Heads:
    return Heads({task: Head(HeadWeights(torch.randn(count, DIM).double())) for task, count in CLASSES.items()})


@pytest.fixture
def images() -> dict[str, Tensor]:
    return {"a": torch.randn(2, 3, 16, 16).double(), "b": torch.randn(3, 3, 16, 16).double()}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many images each pass through the merged model has taken."""
    seen: list[int] = []
    original = MergedModel.forward
    monkeypatch.setattr(MergedModel, "forward", lambda self, x: seen.append(len(x)) or original(self, x))
    return seen


def test_views_share_one_pass_over_all_tasks(model, vectors, heads, images, calls):
    merged = MergedModel(model, vectors, Coefficients())
    passed = Pass(merged, images)
    views = {task: View(task, {"images": x}, passed, heads) for task, x in images.items()}
    assert calls == []  # nothing before it is asked for
    for number, (task, view) in enumerate(views.items()):
        assert view.number == number
        assert view.logits.shape == (len(images[task]), CLASSES[task])
        assert view.features is view.raw
    assert calls == [5]
    for task, view in views.items():
        assert_close(view.raw, merged(images[task]), rtol=1e-12, atol=1e-12)
        assert_close(view.logits, heads[task](view.raw))
        assert view.blocks == []


def test_token_means_of_the_blocks_come_with_the_pass(model, vectors, heads, images):
    merged = MergedModel(model, vectors, Coefficients())
    passed = Pass(merged, images, blocks=True)
    for task, x in images.items():
        view = View(task, {"images": x}, passed, heads)
        with merged.blocks.recording() as expected:
            merged(x)
        assert_close(view.blocks, list(expected.values()), rtol=1e-12, atol=1e-12)


def test_a_correction_comes_between_features_and_head(model, vectors, heads, images):
    merged = MergedModel(model, vectors, Coefficients())
    surgery = Surgery(rank=2).bind(merged, DIM, images["a"][:1])
    nn.init.normal_(surgery.final["a"].up.weight)
    passed = Pass(merged, images)
    view, other = (View(task, {"images": x}, passed, heads, surgery) for task, x in images.items())
    assert_close(view.features, surgery.final["a"](view.raw))
    assert not torch.allclose(view.features, view.raw)
    assert_close(view.logits, heads["a"](view.features))
    assert_close(other.features, other.raw)


def test_what_is_known_is_not_computed(model, vectors, heads, images, calls):
    stored = {
        "merged": [torch.randn(9, DIM).double()],
        "shared": [torch.randn(9, DIM).double()],
        "expert": [torch.randn(9, size).double() for size in (DIM, 4, 6)],
    }
    asked = []

    def known(what: str, task: str, part: dict[str, Tensor]) -> list[Tensor]:
        asked.append((what, task))
        return [values[part["index"]] for values in stored[what]]

    merged = MergedModel(model, vectors, Coefficients(), FeatureRouter(), features=DIM).eval()
    own = nn.Linear(DIM, 2).double()
    index = torch.tensor([7, 2, 2])
    view = View("b", {"index": index}, Pass(merged, {}), heads, known=known, teachers={"b": own})
    assert torch.equal(view.raw, stored["merged"][0][index])
    assert torch.equal(view.task_logits, merged.router.logits(stored["shared"][0][index]))
    assert torch.equal(view.teacher.features, stored["expert"][0][index])
    assert [tuple(value.shape) for value in view.teacher.blocks] == [(3, 4), (3, 6)]
    assert torch.equal(view.teacher.logits, own(view.teacher.features))  # the head that the expert came with
    assert not view.teacher.logits.requires_grad
    assert (calls, asked) == ([], [("merged", "b"), ("shared", "b"), ("expert", "b")])


def test_an_expert_without_a_head_of_its_own_has_the_merges(model, vectors, heads, images):
    features = torch.randn(2, DIM).double()
    view = View(
        "a",
        {"images": images["a"], "index": torch.arange(2)},
        Pass(MergedModel(model, vectors, Coefficients()), images),
        heads,
        known=lambda what, task, part: [features] if what == "expert" else None,
    )
    assert_close(view.teacher.logits, heads["a"](features))
    assert view.raw.shape == (2, DIM)


def test_the_routers_opinion_rests_on_the_shared_experts_features(model, vectors, heads, images):
    merged = MergedModel(model, vectors, Coefficients(init=0.0), FeatureRouter(), features=DIM).eval()
    passed = Pass(merged, images)
    for task, x in images.items():
        expected = merged.router.logits(model(x))
        view = View(task, {"images": x}, passed, heads)
        # what is not routed is the base's, at coefficients of zero
        assert_close(view.task_logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("router", [None, BlockRouter])
def test_without_a_router_of_tasks_there_is_no_opinion(model, vectors, heads, images, router):
    merged = MergedModel(model, vectors, Coefficients(), router and router(), features=DIM)
    view = View("a", {"images": images["a"]}, Pass(merged, images), heads)
    with pytest.raises(InputError, match="the business of a router with logits; this run has none"):
        _ = view.task_logits


def test_what_was_not_prepared_is_named(model, vectors, heads, images):
    view = View("a", {"images": images["a"]}, Pass(MergedModel(model, vectors, Coefficients()), images), heads)
    with pytest.raises(InputError, match="the objective must declare that it needs a teacher"):
        _ = view.teacher
    with pytest.raises(InputError, match="this stream has no labels"):
        _ = view.labels
    labels = torch.tensor([0, 2])
    assert (
        View("a", {"labels": labels}, Pass(MergedModel(model, vectors, Coefficients()), images), heads).labels is labels
    )


def test_a_pass_that_knows_the_shared_features_gives_what_the_model_gives(model, vectors, heads, images):
    merged = MergedModel(model, vectors, Coefficients(), FeatureRouter(), features=DIM).eval()
    torch.nn.init.normal_(list(merged.router.parameters())[-2])  # weights that differ from image to image
    passed = Pass(merged, images)
    for task, x in images.items():
        raw = View(task, {"images": x}, passed, heads).raw
        torch.testing.assert_close(raw, merged(x), rtol=0, atol=1e-9)
        assert (raw - raw[:1]).abs().max() > 1e-3
