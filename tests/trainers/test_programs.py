"""What a step does with its batch: bi-level steps, preferences and MGDA."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_suite import TinySuite

from adamerge import InputError
from modules import Coefficients, ConcreteMask, Entropy, FeatureRouter, Surgery, TaskIdentity
from trainers import MGDA, BiLevel, Stream, Weighted
from trainers.adaptation import Adaptation
from trainers.phases import Phase
from trainers.programs import shortest

SGD = partial(torch.optim.SGD, lr=0.1)


def concrete(stale: bool = False, lr: float = 0.1) -> dict:
    return {
        "elements": ConcreteMask(),
        "phases": [
            Phase(Entropy(), ["elements"], share=0.5, program=BiLevel(lr, stale)),
            Phase(Entropy(), ["coefficients"]),
        ],
    }


# -- bi-level ----------------------------------------------------------------------------------------------------------


class Spy(BiLevel):
    """Keeps the batch, and the coefficients that the outer loss is taken at."""

    def losses(self, run, batch):
        self.batch, inner, outer = batch, run.losses, []

        def losses(part, weights=None):
            outer.append((part, run.coefficients().detach().clone()))
            return inner(part, weights)

        run.losses = losses
        try:
            return super().losses(run, batch)
        finally:
            run.losses = inner
            self.seen = outer


def test_a_bi_level_step_is_taken_where_the_inner_step_leads(adapt):
    spy = Spy(lr=0.05 / 0.3)
    module, _ = adapt(steps=1, elements=ConcreteMask(), learn=["elements"], program=spy, optimizer=SGD)
    (inner, at_inner), (outer, at_outer) = spy.seen
    start = torch.full_like(at_inner, 0.3)
    torch.testing.assert_close(at_inner, start)  # the gradient of the inner step is taken at λ
    torch.testing.assert_close((at_outer - start).abs(), torch.full_like(start, 0.05))  # a step of Adam: ± η
    torch.testing.assert_close(module.coefficients().detach(), start)  # and λ is where it was
    for task, part in spy.batch.items():
        assert torch.equal(torch.cat([inner[task]["index"], outer[task]["index"]]), part["index"])


def test_the_inner_step_goes_down(adapt):
    spy = Spy(lr=3e-3)
    module, _ = adapt(steps=1, elements=ConcreteMask(), learn=["elements"], program=spy, optimizer=SGD)
    module.elements.eval()
    (inner, start), (_, moved) = spy.seen
    with torch.no_grad(), module.coefficients.at(start):
        before = sum(module.losses(inner)[0].values())
    with torch.no_grad(), module.coefficients.at(moved):
        assert sum(module.losses(inner)[0].values()) < before


def test_the_published_order_takes_the_gradient_at_the_last_weights(adapt):
    spy = Spy(lr=0.05 / 0.3, stale=True)
    adapt(steps=2, elements=ConcreteMask(), learn=["elements"], program=spy, optimizer=SGD)
    (_, at_inner), (_, at_outer) = spy.seen
    for values in (at_inner, at_outer):
        torch.testing.assert_close((values - 0.3).abs(), torch.full_like(values, 0.05))


@pytest.mark.parametrize("micro_batches", [False, True])
def test_concrete_adamerging_learns_the_mask_and_then_the_coefficients(adapt, micro_batches):
    module, _ = adapt(steps=3, **concrete(), optimizer=SGD)
    assert torch.equal(module.coefficients().detach(), torch.full_like(module.coefficients(), 0.3)) is False
    assert any(bool(p.any()) for p in module.elements.parameters())
    other, _ = adapt(steps=3, **concrete(), optimizer=SGD, micro_batches=micro_batches)
    torch.testing.assert_close(module.coefficients(), other.coefficients(), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("stale", [False, True])
def test_a_bi_level_run_resumes_bit_for_bit(adapt, tmp_path, stale):
    whole, _ = adapt(steps=8, **concrete(stale))
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    adapt(steps=8, callbacks=[keep], **concrete(stale))
    for step in (3, 6):
        path = tmp_path / f"kept/step={step}.ckpt"
        resumed, _ = adapt(steps=8, ckpt_path=path, callbacks=[keep], **concrete(stale))
        for (name, value), (_, other) in zip(whole.learned(), resumed.learned(), strict=True):
            assert torch.equal(value, other), name


def test_what_bi_level_cannot_do_is_refused(adapt):
    with pytest.raises(InputError, match="BiLevel moves the coefficients in its inner step: leave them out of learn"):
        adapt(elements=ConcreteMask(), program=BiLevel())
    with pytest.raises(InputError, match="batch_size must be at least 2"):
        adapt(elements=ConcreteMask(), learn=["elements"], program=BiLevel(), stream=Stream(batch_size=1))


def test_elements_do_not_learn_from_the_router_alone(adapt):
    kwargs = {"router": FeatureRouter(), "objective": TaskIdentity(), "elements": ConcreteMask()}
    with pytest.raises(InputError, match="elements cannot learn from TaskIdentity"):
        adapt(suite=TinySuite(vit=True), learn=["router", "elements"], **kwargs)


# -- several tasks -----------------------------------------------------------------------------------------------------


def gradients(program, **kwargs) -> tuple[dict, torch.Tensor]:
    """Losses and the gradient of the coefficients on one batch."""
    module = Adaptation(TinySuite(), Coefficients("tensor"), Entropy(), program=program, **kwargs)
    module.configure_model()
    batch = {
        task: {"images": module.suite.dataset(task, "test").batch(torch.arange(4))[0], "index": torch.arange(4)}
        for task in module.suite.tasks
    }
    losses, _ = module.phase.stepper.losses(module, batch)
    torch.stack(list(losses.values())).sum().backward()
    return losses, module.coefficients.raw.grad


@pytest.mark.parametrize("micro_batches", [False, True])
def test_a_preference_weights_the_tasks(micro_batches):
    alone = [gradients(Weighted({t: float(t == task) for t in TinySuite().tasks}))[1] for task in TinySuite().tasks]
    preference = dict(zip(TinySuite().tasks, (0.5, 2.0), strict=False))
    _, both = gradients(Weighted(preference), micro_batches=micro_batches)
    torch.testing.assert_close(both, 0.5 * alone[0] + 2 * alone[1] + alone[2])


@pytest.mark.parametrize("micro_batches", [False, True])
def test_mgda_descends_for_every_task(micro_batches):
    alone = [gradients(Weighted({t: float(t == task) for t in TinySuite().tasks}))[1] for task in TinySuite().tasks]
    _, mixed = gradients(MGDA(), micro_batches=micro_batches)
    for gradient in alone:  # the shortest vector of the hull: ⟨g, g_t⟩ ≥ ‖g‖²
        assert (gradient * mixed).sum() >= mixed.square().sum() * (1 - 1e-4)
    flat = torch.stack([g.flatten() for g in alone]).double()
    weights = shortest(flat @ flat.T)
    torch.testing.assert_close(mixed.flatten(), (weights @ flat).float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("gram", "weights"),
    [
        ([[1.0, 0.0], [0.0, 4.0]], [0.8, 0.2]),  # orthogonal: α ∝ 1 / ‖g‖²
        ([[1.0, 2.0], [2.0, 5.0]], [1.0, 0.0]),  # the first lies within the second's shadow
        ([[1.0, -1.0], [-1.0, 1.0]], [0.5, 0.5]),  # opposite: no common descent
        ([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_the_shortest_vector_of_a_hull(gram, weights):
    torch.testing.assert_close(shortest(torch.tensor(gram).double()), torch.tensor(weights).double(), atol=1e-6, rtol=0)


def test_the_shortest_vector_of_many():
    vectors = torch.randn(12, 5).double() + 0.7
    gram = vectors @ vectors.T
    alpha = shortest(gram)
    assert alpha.sum() == pytest.approx(1)
    assert (gram @ alpha).min() >= (alpha @ gram @ alpha) * (1 - 1e-6) - 1e-9  # optimality


def test_mgda_moves_corrections_too(adapt):
    module, _ = adapt(steps=2, correction=Surgery(rank=3), learn=["coefficients", "heads"], program=MGDA())
    assert not torch.equal(module.coefficients(), torch.full_like(module.coefficients(), 0.3))


@pytest.mark.parametrize(
    ("preference", "message"),
    [({"four": 1.0}, "preference names 'four'; tasks are one, two, three"), ({"one": -1.0}, "at least 0")],
)
def test_a_wrong_preference_is_refused(adapt, preference, message):
    with pytest.raises(InputError, match=message):
        adapt(program=Weighted(preference))
