"""Representation Surgery against a reference implementation: five AdaMerging steps, then thirty of the correction."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from modules import Coefficients, Entropy, MergedModel, RepresentationL1, Surgery

EXACT = {"rtol": 0, "atol": 1e-9}


def test_surgery_after_adamerging(shared, small_clip):
    reference = torch.load(shared / "parity/surgery.pt", weights_only=True)
    expected, tasks = reference["fp64"], small_clip.tasks
    model = MergedModel(small_clip.tower, small_clip.vectors, Coefficients("tensor"))
    columns = [model.coefficients.groups.index(f"vision.{name}") for name in small_clip.param_names]
    entropy, optimizer = Entropy(eps=1e-8), torch.optim.Adam(model.parameters(), lr=1e-3)
    for step, images in enumerate(small_clip.images[:5]):
        features = zip(tasks, model(images.flatten(0, 1)).split(images.shape[1]), strict=True)
        losses = [entropy(SimpleNamespace(logits=z @ small_clip.heads[t].T)).mean() for t, z in features]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        assert_close(torch.stack(losses).detach(), expected["ada_losses"][step], **EXACT)
        assert_close(model.coefficients().detach()[columns].T, expected["lambdas"][step], **EXACT)

    model.coefficients.requires_grad_(False)
    surgery = Surgery(rank=16).bind(model, features=32, sample=small_clip.images[0, 0, :1])
    mine = [part.weight for task in tasks for part in (surgery.final[task].down, surgery.final[task].up)]
    with torch.no_grad():
        for parameter, name in zip(mine, expected["surgery_param_names"], strict=True):
            parameter.copy_(reference["surgery_init"][f"{name}.weight"])
    update(small_clip, model, surgery, mine, expected)


def update(small_clip, model: MergedModel, surgery: Surgery, mine: list[nn.Parameter], expected) -> None:
    distance, optimizer, tasks = RepresentationL1(), torch.optim.Adam(mine, lr=1e-3), small_clip.tasks
    for step, images in enumerate(small_clip.images[5:15]):
        for number, (task, x) in enumerate(zip(tasks, images, strict=True)):
            with torch.no_grad():
                target = expert(small_clip, task, x)
            view = SimpleNamespace(features=surgery.features(model(x), task), teacher=SimpleNamespace(features=target))
            loss = distance(view).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert_close(loss.detach(), expected["l1_losses"][step, number], **EXACT)
            count = len(tasks) * step + number
            if count in expected["surgery_params"]:
                assert_close([p.detach() for p in mine], expected["surgery_params"][count], **EXACT)


def expert(small_clip, task: str, images: Tensor) -> Tensor:
    features: Tensor = functional_call(small_clip.tower, small_clip.experts[task], (images,))
    return features
