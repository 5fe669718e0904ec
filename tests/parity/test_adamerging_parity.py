"""Layer-wise AdaMerging against a reference implementation: every step's losses, gradients and coefficients."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from modules import Coefficients, Entropy, MergedModel


@pytest.mark.parametrize("micro_batches", [False, True], ids=["one forward", "micro-batches"])
def test_twenty_steps_of_layer_wise_adamerging(shared, small_clip, micro_batches):
    expected = torch.load(shared / "parity/adamerging_layer_wise.pt", weights_only=True)["fp64"]
    model = MergedModel(small_clip.tower, small_clip.vectors, Coefficients("tensor"))
    objective = Entropy(eps=1e-8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    columns = [model.coefficients.groups.index(f"vision.{name}") for name in small_clip.param_names]

    for step, images in enumerate(small_clip.images):

        def loss(task: str, features: Tensor) -> Tensor:
            return objective(SimpleNamespace(logits=features @ small_clip.heads[task].T)).mean()

        tasks = small_clip.tasks
        if micro_batches:
            losses = model.in_parts([lambda t=t, x=x: loss(t, model(x)) for t, x in zip(tasks, images, strict=True)])
        else:
            features = model(images.flatten(0, 1)).split(images.shape[1])
            losses = [loss(t, z) for t, z in zip(tasks, features, strict=True)]
        optimizer.zero_grad()
        sum(losses).backward()
        torch.testing.assert_close(torch.stack(losses).detach(), expected["losses"][step].double(), rtol=0, atol=1e-9)
        grads = model.coefficients.raw.grad[columns].T
        torch.testing.assert_close(grads, expected["grads"][step].double(), rtol=0, atol=1e-9)
        optimizer.step()
        learned = model.coefficients().detach()[columns].T
        torch.testing.assert_close(learned, expected["lambdas"][step].double(), rtol=0, atol=1e-9)

    for name, value in model.merged_state_dict().items():
        torch.testing.assert_close(value, expected["merged"][name.removeprefix("vision.")], rtol=0, atol=1e-9)
