"""Learning against perturbations: the ball, the direction, what is added to the loss, and resumption."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_suite import TinySuite

from adamerge import InputError, objectives
from modules import Coefficients, ConcreteMask, Entropy
from trainers import Adversarial, BiLevel
from trainers.adaptation import Adaptation


def on_a_batch(program: Adversarial) -> tuple[Adaptation, dict, dict]:
    """A run, a batch of it, and the losses of one step on that batch."""
    module = Adaptation(TinySuite(), Coefficients("tensor"), Entropy(), program=program)
    module.configure_model()
    images = {task: module.suite.dataset(task, "test").batch(torch.arange(8))[0] for task in module.suite.tasks}
    batch = {task: {"images": x, "index": torch.arange(8)} for task, x in images.items()}
    return module, batch, program.losses(module, batch)[0]


def test_the_loss_of_perturbed_images_is_added():
    program = Adversarial(alpha=0.3, radius=0.5)
    module, batch, losses = on_a_batch(program)
    for task, part in batch.items():
        clean, attacked = module(part["images"], task), module(part["images"] + program.deltas[task], task)
        expected = objectives.entropy(clean).mean() + 0.3 * objectives.entropy(attacked).mean()
        torch.testing.assert_close(losses[task], expected)


def test_a_perturbation_stays_in_its_ball_and_changes_more_and_more_predictions():
    program = Adversarial(radius=2.0, lr=0.2)
    module, batch, _ = on_a_batch(program)

    def harm() -> float:
        with torch.no_grad():
            return sum(
                objectives.pseudo_label(
                    module(part["images"] + program.deltas[task], task), module(part["images"], task)
                ).mean()
                for task, part in batch.items()
            ).item()

    first = harm()
    assert all(delta.norm() == pytest.approx(0.4, rel=1e-5) for delta in program.deltas.values())
    for _ in range(10):
        program.losses(module, batch)
    assert harm() > first
    assert all(delta.norm() <= 2.0001 for delta in program.deltas.values())


def test_the_gradient_is_that_of_the_coefficients_alone():
    program = Adversarial(alpha=0.5)
    module, _, losses = on_a_batch(program)
    torch.stack(list(losses.values())).sum().backward()
    assert module.coefficients.raw.grad.abs().sum() > 0
    assert all(not delta.requires_grad for delta in program.deltas.values())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("inner", [lambda: None, lambda: BiLevel(stale=True)], ids=["joint", "bi-level"])
def test_resumes_bit_for_bit(adapt, tmp_path, inner):
    def arguments():
        parts = {"elements": ConcreteMask(), "learn": ["elements"], "optimizer": partial(torch.optim.Adam, lr=0.01)}
        return {**parts, "program": Adversarial(inner=inner())}

    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole, _ = adapt(steps=5, callbacks=[keep], **arguments())
    resumed, _ = adapt(steps=5, callbacks=[keep], ckpt_path=tmp_path / "kept/step=2.ckpt", **arguments())
    for (name, value), (_, other) in zip(whole.learned(), resumed.learned(), strict=True):
        assert torch.equal(value, other), name


def test_wrong_use_is_refused(adapt):
    with pytest.raises(InputError, match=r"needs positive numbers: alpha=0, radius=8\.0, lr=0\.1"):
        Adversarial(alpha=0)
    with pytest.raises(InputError, match="BiLevel moves the coefficients"):
        adapt(program=Adversarial(inner=BiLevel()))
