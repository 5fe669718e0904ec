"""The pictures of suite Mini are deterministic, balanced and split cleanly; the small backbones keep their promises."""

import re

import numpy as np
import pytest
import torch

from adamerge.backbones import MLP, TinyViT
from adamerge.suites.mini_tasks import SIZE, TASKS, Recipe


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("clear", [False, True])
def test_draw_is_a_function_of_its_arguments(name: str, clear: bool) -> None:
    task, count = TASKS[name], 2 * len(TASKS[name].classes) + 1
    images, labels = task.draw("train", count, seed=3, clear=clear)
    again, labels_again = task.draw("train", count, seed=3, clear=clear)
    assert images.shape == (count, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (count,)
    assert labels.dtype == np.int64
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)
    assert images.std(axis=(1, 2, 3)).min() > 1  # no picture is empty
    for other in (
        task.draw("train", count, 4, clear),
        task.draw("test", count, 3, clear),
        task.draw("train", count, 3, not clear),
    ):
        assert not np.array_equal(images, other[0])


@pytest.mark.parametrize("name", TASKS)
def test_classes_are_balanced(name: str) -> None:
    task = TASKS[name]
    counts = np.bincount(task.draw("test", 3 * len(task.classes) + 2, seed=0)[1], minlength=len(task.classes))
    assert len(counts) == len(task.classes) == len(set(task.classes))
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", TASKS)
def test_train_and_test_share_no_picture(name: str) -> None:
    task = TASKS[name]
    train = {x.tobytes() for x in task.draw("train", 60, 0, clear=True)[0]}
    assert not train & {x.tobytes() for x in task.draw("test", 60, 0, clear=True)[0]}


def test_handwritten_digits_are_split_once_for_all_seeds() -> None:
    train = {x.tobytes() for seed in (0, 1) for x in TASKS["digits"].draw("train", 1400, seed, clear=True)[0]}
    tests = [
        [x.tobytes() for x in TASKS["digits"].draw("test", Recipe().test_per_task, s, clear=True)[0]] for s in (0, 1)
    ]
    assert len(set(tests[0])) == Recipe().test_per_task  # every test image once
    assert set(tests[0]) == set(tests[1])
    assert tests[0] != tests[1]
    assert len(train) == 1297
    assert not train & set(tests[0])


def test_fog_lowers_contrast() -> None:
    for task in TASKS.values():
        clear, fog = (task.draw("test", 40, 0, clear=c)[0].std(axis=(1, 2, 3)).mean() for c in (True, False))
        assert fog < clear, task.name


def test_draw_rejects_an_unknown_split_and_allows_no_images() -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        TASKS["print"].draw("valid", 1, 0)  # type: ignore[arg-type]
    assert TASKS["print"].draw("test", 0, 0)[0].shape == (0, SIZE, SIZE, 3)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("image_size", "patch"), [(32, 8), (16, 4), (48, 16)])
def test_vit_gives_one_feature_per_image(image_size: int, patch: int, class_token: bool) -> None:
    vit = TinyViT(image_size, patch, dim=16, depth=2, heads=2, class_token=class_token)
    assert vit.pos.shape == (1, (image_size // patch) ** 2, 16)
    assert vit(torch.rand(3, 3, image_size, image_size)).shape == (3, vit.dim)


def test_vit_default_size_and_names() -> None:
    names = {name: p.numel() for name, p in TinyViT().named_parameters()}
    wanted = r"(stem\.\d+|norm|blocks\.[0-3]\.(norm1|norm2|attn\.(qkv|proj)|mlp\.(fc1|fc2)))\.(weight|bias)|pos"
    assert all(re.fullmatch(wanted, name) for name in names)
    assert {"blocks.0.attn.qkv.weight", "blocks.3.mlp.fc1.weight"} <= set(names)
    assert sum(names.values()) < 600_000


def test_vit_treats_images_independently_and_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    vit = TinyViT(16, 4, dim=16, depth=2, heads=2, class_token=True)
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(vit(images)[1:2], vit(images[1:2]))
    vit(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.parameters())


def test_vit_errors_name_the_size() -> None:
    with pytest.raises(ValueError, match="divides image_size 30, got 8"):
        TinyViT(30)
    with pytest.raises(ValueError, match="dim 10 does not divide into 3 heads"):
        TinyViT(dim=10, heads=3)
    with pytest.raises(ValueError, match="give 4 tokens, not 16"):
        TinyViT(32, dim=16, depth=1, heads=2)(torch.rand(1, 3, 16, 16))


def test_mlp_gives_one_feature_per_image() -> None:
    mlp = MLP(image_size=8, dim=5, depth=3)
    assert mlp(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    assert next(name for name, _ in mlp.named_parameters()) == "layers.0.weight"
