"""Tuning apart and merging in turns: what it equals with one local step, and by hand with several."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_suite import TinySuite

from adamerge import InputError
from modules import Coefficients, Entropy, PseudoLabels, Residual, Supervised
from trainers import Adaptation, Alternate, Stream

PLAIN = partial(torch.optim.SGD, lr=1.0)


def atm(adapt, program=None, optimizer=PLAIN, learn="elements", **kwargs):
    torch.manual_seed(0)
    settings = {"coefficients": Coefficients("tensor"), "elements": Residual(), "objective": Entropy()} | kwargs
    module, trainer = adapt(optimizer=optimizer, learn=[learn], program=program, **settings)
    return torch.cat([p.detach().flatten() for _, p in module.learned()]), trainer


@pytest.mark.parametrize("learn", ["elements", "coefficients"])
@pytest.mark.parametrize("micro_batches", [False, True])
def test_one_local_step_is_a_step_on_the_mean_loss(adapt, learn, micro_batches):
    merged, _ = atm(adapt, Alternate(local_steps=1, lr=0.3), learn=learn, steps=3, micro_batches=micro_batches)
    joint, _ = atm(adapt, optimizer=partial(torch.optim.SGD, lr=0.3 / len(TinySuite().tasks)), learn=learn, steps=3)
    torch.testing.assert_close(merged, joint, rtol=0, atol=1e-6)


def test_the_optimisers_rate_is_the_scale_of_the_merge(adapt):
    start = torch.zeros(())
    half, _ = atm(adapt, Alternate(2, 0.3), partial(torch.optim.SGD, lr=0.5), steps=1)
    whole, _ = atm(adapt, Alternate(2, 0.3), steps=1)
    torch.testing.assert_close(half - start, 0.5 * (whole - start))
    assert whole.abs().max() > 1e-3


def test_a_round_is_the_mean_of_what_each_task_tunes_apart(adapt, suite):
    """By hand: plain training of the merged weights, task by task, from the same point."""
    stream = Stream(batch_size=6, train_split="train")
    round_, _ = atm(adapt, Alternate(3, 0.2), steps=1, stream=stream, objective=Supervised(), allow_labels=True)
    reference = Adaptation(suite, Coefficients("tensor"))
    network, heads = reference.merged.materialise(), reference.heads
    batch, tuned = batch_of(suite, 6), []
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    for task, (images, labels) in batch.items():
        model = reference.merged.materialise().requires_grad_()
        for share in torch.arange(6).tensor_split(3):
            loss = torch.nn.functional.cross_entropy(heads[task](model(images[share])), labels[share])
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                p.data -= 0.2 * g
        tuned.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
    torch.testing.assert_close(round_, torch.stack(tuned).mean(0), rtol=0, atol=1e-6)
    assert not torch.allclose(tuned[0], tuned[1])


def batch_of(suite, size):
    """The images and labels of the first step."""
    from trainers.streams import StreamSteps

    datasets = {task: suite.dataset(task, "train") for task in suite.tasks}
    first = StreamSteps(datasets, size, 0, labels=True)[0]
    return {task: (part["images"], part["labels"]) for task, part in first.items()}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_goes_on_bit_for_bit(adapt, tmp_path):
    settings = {"objective": PseudoLabels(), "optimizer": partial(torch.optim.SGD, lr=0.7, momentum=0.9)}
    whole, _ = atm(adapt, Alternate(2, 0.1), steps=5, **settings)
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    atm(adapt, Alternate(2, 0.1), steps=3, callbacks=[keep], **settings)
    path = str(tmp_path / "last.ckpt")
    resumed, trainer = atm(adapt, Alternate(2, 0.1), steps=5, ckpt_path=path, callbacks=[keep], **settings)
    assert trainer.global_step == 5
    assert torch.equal(whole, resumed)


def test_what_is_learned_stays_where_it_was_if_a_task_fails(suite):
    class Fails(Entropy):
        def forward(self, view):
            if view.task == "two":
                raise RuntimeError("no")
            return super().forward(view)

    program = Alternate(2, 0.3)
    module = Adaptation(suite, elements=Residual(), objective=Fails(), program=program)
    module.configure_model()
    batch = {task: {"images": x, "index": torch.arange(6)} for task, (x, _) in batch_of(suite, 6).items()}
    with pytest.raises(RuntimeError, match="no"):
        program.losses(module, batch)
    assert all(not p.any() for p in module.elements.parameters())


def test_refusals(adapt):
    with pytest.raises(InputError, match=r"must be positive, got 0 and 0\.1"):
        Alternate(local_steps=0)
    with pytest.raises(InputError, match="takes 5 local steps: batch_size must be"):
        atm(adapt, Alternate(local_steps=5), steps=1)
