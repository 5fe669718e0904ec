"""WEMoE against a reference implementation: the losses, gradients and gates of twenty steps."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modules import BlockRouter, Coefficients, Entropy, MergedModel

RUNS = {
    "wemoe_router1": lambda: BlockRouter(depth=1, per="batch"),
    "wemoe_router2_samplewise": lambda: BlockRouter(depth=2, per="sample"),
}
EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.mark.parametrize("micro_batches", [False, True], ids=["one forward", "micro-batches"])
@pytest.mark.parametrize("run", RUNS)
def test_twenty_steps_of_wemoe(shared, small_clip, run, micro_batches):
    reference = torch.load(shared / f"parity/{run}.pt", weights_only=True)
    expected, tasks = reference["fp64"], small_clip.tasks
    model = MergedModel(small_clip.tower, small_clip.vectors, Coefficients("model", init=0.3), RUNS[run]())
    model.coefficients.requires_grad_(False)
    assert model.router.sites == ("vision.encoder.layers.0.mlp", "vision.encoder.layers.1.mlp")
    gates = list(model.router.gates.parameters())  # in the reference's order: block by block, first layer first
    assert [list(gate.shape) for gate in gates] == [list(value.shape) for value in reference["gate_init"].values()]
    with torch.no_grad():
        for gate, name in zip(gates, expected["gate_param_names"], strict=True):
            gate.copy_(reference["gate_init"][name])
    objective, optimizer = Entropy(eps=1e-8), torch.optim.Adam(gates, lr=1e-3)

    def loss(task: str, features: Tensor) -> Tensor:
        return objective(SimpleNamespace(logits=features @ small_clip.heads[task].T)).mean()

    def alone(task: str, images: Tensor) -> Tensor:
        with model.of({task: len(images)}):
            return loss(task, model(images))

    for step, images in enumerate(small_clip.images):
        if micro_batches:
            parts = [lambda t=t, x=x: alone(t, x) for t, x in zip(tasks, images, strict=True)]
            losses = model.in_parts(parts, gates)
        else:
            with model.of(dict.fromkeys(tasks, images.shape[1])):
                features = model(images.flatten(0, 1)).split(images.shape[1])
            losses = [loss(t, z) for t, z in zip(tasks, features, strict=True)]
        optimizer.zero_grad()
        sum(losses).backward()
        assert_close(torch.stack(losses).detach(), expected["losses"][step], **EXACT)
        if step in expected["gate_grads"]:
            assert_close([gate.grad for gate in gates], expected["gate_grads"][step], **EXACT)
        optimizer.step()
        if step in expected["gate_params"]:
            assert_close([gate.detach() for gate in gates], expected["gate_params"][step], **EXACT)

    model.eval()
    with torch.no_grad():
        for task, images in enumerate(small_clip.images[0]):
            features = model(images) @ small_clip.heads[tasks[task]].T
            pooled = expected["eval_pooled_samplewise"][task]
            z = torch.nn.functional.normalize(pooled @ small_clip.tower.projection.T, dim=-1)
            assert_close(features, z @ small_clip.heads[tasks[task]].T, **EXACT)
