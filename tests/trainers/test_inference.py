"""Tasks that are not given: the router finds them, and a wrong task is a wrong answer."""

import json

import lightning as L
import pytest
import torch
from tiny_suite import TinySuite

from adamerge import InputError
from modules import BlockRouter, FeatureRouter, TaskIdentity
from trainers import Adaptation, Stream
from trainers.report import Report


def twin(**kwargs) -> dict:
    router = FeatureRouter(dropout=0.0, **kwargs)
    return {"router": router, "learn": ["router"], "objective": TaskIdentity(), "task_id": "inferred"}


def by_hand(module: Adaptation, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] whether the task of each test image is found, and whether task and class are."""
    images, labels = module.suite.dataset(task, "test").batch(torch.arange(23))
    merged = module.merged
    with torch.no_grad():
        z = merged.shared(images)
        found = merged.router.classifier(z).argmax(1)
        classes = torch.stack([module.heads[module.suite.tasks[k]](merged(images[i : i + 1]))[0].argmax() for i, k in
                               enumerate(found.tolist())])  # fmt: skip
    own = found == module.suite.tasks.index(task)
    return own, own & (classes == labels)


@pytest.fixture
def fitted(adapt, tmp_path):
    adam = {"optimizer": lambda params: torch.optim.Adam(params, lr=1e-2)}
    module, _ = adapt(
        steps=20, suite=TinySuite(vit=True), callbacks=[Report(references=False, figures=False)], **twin(), **adam
    )
    return module.eval(), json.loads((tmp_path / "results.json").read_text())


def test_results_are_those_of_a_hand_computation(fitted):
    module, results = fitted
    rows = {row["method"]: row["accuracy"] for row in results["rows"]}
    assert list(rows) == ["this run, start", "this run, adapted", "this run, task given"]
    shares = set()
    for task in module.suite.tasks:
        own, right = by_hand(module, task)
        assert results["task_identification"][task] == pytest.approx(own.double().mean().item())
        assert rows["this run, adapted"][task] == pytest.approx(right.double().mean().item())
        assert rows["this run, task given"][task] >= rows["this run, adapted"][task]
        shares.add(own.double().mean().item())
    assert any(0 < share < 1 for share in shares), "a router that is always right or wrong shows little"


def test_identifying_image_by_image(fitted):
    module, _ = fitted
    images, _ = module.suite.dataset("two", "test").batch(torch.arange(23))
    own, _ = by_hand(module, "two")
    assert module.identified(images, "two").equal(own)
    assert module.identify(images).equal(torch.cat([module.identify(image[None]) for image in images]))


def test_logits_of_a_wrong_task_are_those_of_another_class(fitted):
    module, _ = fitted
    images, _ = module.suite.dataset("two", "test").batch(torch.arange(23))
    own, logits = module.identified(images, "two"), module.scored(images, "two")
    classes = len(module.suite.classes("two"))
    assert logits.shape == (23, classes + 1)
    assert logits.argmax(1).eq(classes).equal(~own)
    torch.testing.assert_close(logits[:, :-1], module(images, "two"))


def test_validation_scores_as_the_report_does(fitted):
    module, results = fitted
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    scores = trainer.validate(module, datamodule=Stream(eval_batch_size=9), verbose=False)[0]
    adapted = {row["method"]: row["accuracy"] for row in results["rows"]}["this run, adapted"]
    assert adapted == pytest.approx({task: scores[f"accuracy/{task}"] for task in module.suite.tasks})


def test_given_tasks_leave_no_further_row(adapt, tmp_path):
    report = Report(references=False, figures=False)
    adapt(steps=2, callbacks=[report], **{**twin(), "task_id": "given"})
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["this run, start", "this run, adapted"]
    assert "task_identification" not in results


@pytest.mark.parametrize("router", [None, BlockRouter()])
def test_a_router_that_knows_tasks_is_needed(router):
    with pytest.raises(InputError, match="task_id 'inferred' needs a router that knows tasks, such as"):
        Adaptation(TinySuite(), router=router, task_id="inferred").configure_model()
