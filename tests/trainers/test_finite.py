"""Steps whose gradient is no number: nothing moves, they are counted, and what is stored is always finite."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_adaptation import learned

from adamerge import InputError
from modules import Entropy
from trainers.finite import Finite, fuse

#: The second one skips a step by itself, where its device finds that out.
ADAMS = [partial(torch.optim.Adam, lr=1e-3), partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.5, fused=True)]
adams = pytest.mark.parametrize("adam", ADAMS, ids=["at once", "a step later"])


class Failing(Entropy):
    """Entropy that is no number in some steps."""

    def __init__(self, steps=(), value=float("nan")) -> None:
        super().__init__()
        self.steps, self.value, self.calls = steps, value, 0

    def forward(self, view):
        self.calls += 1
        step = (self.calls - 1) // 3  # three tasks
        return super().forward(view) * (self.value if step in self.steps else 1.0)


@adams
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(adapt, value, adam):
    adapt = partial(adapt, optimizer=adam)
    before, _ = adapt(steps=2)
    after, trainer = adapt(steps=3, objective=Failing([2], value))
    assert torch.equal(learned(before), learned(after))
    assert after.finite.skipped == 1
    later, trainer = adapt(steps=6, objective=Failing([2, 4], value))
    assert later.finite.state_dict() == {"skipped": 2, "row": 0}
    assert not torch.equal(learned(later), learned(after))
    optimizer = trainer.optimizers[0].state_dict()["state"][0]
    assert optimizer["step"] == 4, "skipped steps are none of the optimiser's"
    assert optimizer["exp_avg"].isfinite().all()


@adams
@pytest.mark.parametrize(("skip_steps", "reached"), [(0, 1), (2, 3)])
def test_too_many_in_a_row_stop_the_run_with_what_it_had_learned(adapt, tmp_path, skip_steps, reached, adam):
    adapt = partial(adapt, optimizer=adam)
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(InputError, match=rf"the gradient is nan at step {3 + reached} \({reached} such steps in a row"):
        adapt(steps=9, objective=Failing([3, 4, 5, 6, 7]), skip_steps=skip_steps, callbacks=[keep])
    good, _ = adapt(steps=3)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["coefficients.raw"], learned(good))
    assert saved["adamerge"]["finite"]["skipped"] == reached - 1


@adams
def test_the_last_step_counts_too(adapt, adam):
    with pytest.raises(InputError, match=r"the gradient is nan at step 3 \(1 such steps in a row"):
        adapt(steps=3, objective=Failing([2]), skip_steps=0, optimizer=adam)


def test_nobody_asks_for_the_norm_of_a_step_before_the_next(monkeypatch):
    """On its device the step is skipped at once; in host memory that is known a step later."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, finite = torch.optim.Adam([weight], fused=True), Finite(10)
    asked = []
    monkeypatch.setattr(finite, "_count", lambda value, step: asked.append((value, step)))
    for step, norm in enumerate((1.0, float("nan"), 2.0), 1):
        before, weight.grad = weight.detach().clone(), torch.full((3,), norm)
        assert finite.passes(torch.tensor(norm), step, optimizer)
        assert len(asked) == step - 1
        optimizer.step()
        assert torch.equal(weight, before) == (step == 2)
    assert optimizer.state[weight]["step"] == 2
    finite.settle()
    finite.settle()
    assert str(asked) == "[(1.0, 1), (nan, 2), (2.0, 3)]"


def test_adam_is_fused_on_a_gpu_alone_and_unless_told_how():
    for kwargs in ({}, {"foreach": True}):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], **kwargs)
        fuse(optimizer)
        assert not optimizer.param_groups[0]["fused"]


@pytest.mark.gpu
def test_adam_skips_by_itself_on_a_gpu(adapt):
    adapt = partial(adapt, trainer={"accelerator": "gpu"})
    before, _ = adapt(steps=2)
    after, trainer = adapt(steps=3, objective=Failing([2]))
    assert torch.equal(learned(before), learned(after))
    assert after.finite.skipped == 1
    assert all(group["fused"] for group in trainer.optimizers[0].param_groups)
    for kwargs in ({"foreach": True}, {"capturable": True}):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1, device="cuda"))], **kwargs)
        fuse(optimizer)
        assert not optimizer.param_groups[0]["fused"]


@adams
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_is_resumed_goes_on_counting(adapt, tmp_path, adam):
    adapt = partial(adapt, optimizer=adam)
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, enable_version_counter=False)
    adapt(steps=4, objective=Failing([2, 3]), callbacks=[keep])
    resumed, _ = adapt(steps=5, objective=Failing([0]), ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.finite.state_dict() == {"skipped": 3, "row": 3}


def test_numbers_that_a_step_made_infinite_are_never_stored(adapt, tmp_path):
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(InputError, match=r"coefficients\.raw is not finite after step 1: lower the learning rate"):
        adapt(steps=3, optimizer=lambda p: torch.optim.SGD(p, lr=1e38), objective=Failing([0], 1e9), callbacks=[keep])
    assert not list(tmp_path.glob("*.ckpt"))


def test_what_cannot_be_skipped(adapt):
    with pytest.raises(InputError, match="skip_steps is how many steps in a row may be skipped: 0 or more, not -1"):
        adapt(skip_steps=-1)
