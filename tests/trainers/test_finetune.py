import math
from pathlib import Path

import numpy as np
import pytest
import torch

from adamerge import InputError
from adamerge.backbones import MLP
from adamerge.data import ArrayImages, Npz, Preprocess
from adamerge.suites import Local
from trainers import FineTune, fine_tune
from trainers.augment import shift_and_flip
from trainers.cli import main
from trainers.finetune import warmup_cosine


def stripes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy 4 × 4 images, bright in the left or the right half."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.integers(0, 80, (count, 4, 4, 3))
    images[labels == 0, :, :2] += 150
    images[labels == 1, :, 2:] += 150
    return images.astype(np.uint8), labels


def settings(**kwargs):
    return {"steps": 30, "lr": 1e-2, "batch_size": 16, "weight_decay": 0.0, "seed": 0, "label": "test", **kwargs}


@pytest.fixture
def data() -> dict[str, ArrayImages]:
    return {"stripes": ArrayImages(*stripes(40, 0), Preprocess())}


CLASSES = {"stripes": ("left", "right")}


def test_fine_tuning_learns_the_task_and_leaves_its_arguments_alone(data):
    backbone = MLP(image_size=4, dim=8)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state, heads = fine_tune(backbone, data, CLASSES, heads=None, **settings())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])
    backbone.load_state_dict(state)
    images, labels = ArrayImages(*stripes(40, 1), Preprocess()).batch(torch.arange(40))
    head = heads["stripes"]
    logits = backbone(images) @ head.weight.T + head.bias
    assert (logits.argmax(1) == labels).float().mean() > 0.9


def test_given_heads_stay_frozen_and_the_seed_decides_everything(data):
    backbone = MLP(image_size=4, dim=8)
    _, heads = fine_tune(backbone, data, CLASSES, heads=None, **settings(steps=2))
    first, kept = fine_tune(backbone, data, CLASSES, heads=heads, **settings(steps=3))
    assert torch.equal(kept["stripes"].weight, heads["stripes"].weight)
    torch.rand(3)  # the caller's own random numbers play no part
    again, _ = fine_tune(backbone, data, CLASSES, heads=heads, **settings(steps=3))
    other, _ = fine_tune(backbone, data, CLASSES, heads=heads, **settings(steps=3, seed=1))
    for name in first:
        assert torch.equal(first[name], again[name])
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_learning_rate_rises_and_falls():
    factors = [warmup_cosine(step, warmup=0.1, steps=100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert factors[100] == pytest.approx(0.0)


def test_shift_moves_images_and_repeats_edges():
    image = torch.arange(25.0).view(1, 1, 5, 5).expand(64, 3, 5, 5)
    moved = shift_and_flip(image, shift=1, flip=False, key=(0,))
    padded = torch.nn.functional.pad(image[:1], (1, 1, 1, 1), mode="replicate")[0]
    windows = {(r, c): padded[:, r : r + 5, c : c + 5] for r in range(3) for c in range(3)}
    found = [[at for at, window in windows.items() if torch.equal(window, one)] for one in moved]
    assert all(len(at) == 1 for at in found)
    assert len({at[0] for at in found}) == 9
    assert torch.equal(moved, shift_and_flip(image, shift=1, flip=False, key=(0,)))
    assert not torch.equal(moved, shift_and_flip(image, shift=1, flip=False, key=(1,)))


def test_flip_mirrors_about_half_of_the_images():
    image = torch.arange(9.0).view(1, 1, 3, 3).expand(200, 1, 3, 3)
    flipped = shift_and_flip(image, shift=0, flip=True, key=(0,))
    mirrored = sum(torch.equal(one, image[0].flip(2)) for one in flipped)
    same = sum(torch.equal(one, image[0]) for one in flipped)
    assert mirrored + same == 200
    assert 70 < mirrored < 130


@pytest.fixture
def pool(tmp_path, monkeypatch) -> Path:
    """A base of two tasks and an expert of each, made from the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    for seed, task in enumerate(("stripes", "bands")):
        (x, y), (x_test, y_test) = stripes(40, seed), stripes(20, seed + 10)
        np.savez(f"{task}.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test, classes=np.array(["left", "right"]))
    (tmp_path / "pool").mkdir()
    source = "{task}: {{class_path: adamerge.data.Npz, init_args: {{path: {task}.npz}}}}"
    root = Path(__file__).resolve().parents[2]
    both = ", ".join(source.format(task=task) for task in ("stripes", "bands"))
    for name, tasks in (
        ("base", both),
        ("stripes", source.format(task="stripes")),
        ("bands", source.format(task="bands")),
    ):
        arguments = [
            "fit",
            f"--config={root}/configs/finetune.yaml",
            f"--data.init_args.data={{{tasks}}}",
            f"--name={name}",
        ]
        arguments += [
            "--model.init_args.backbone={class_path: adamerge.backbones.MLP, init_args: {image_size: 4, dim: 8}}"
        ]
        if name != "base":
            arguments += ["--model.init_args.init=pool/base.ckpt", "--model.init_args.freeze_heads=true"]
        main([*arguments, "--trainer.max_steps=12", "--trainer.accelerator=cpu"])
        Path(f"runs/{name}/checkpoints/last.ckpt").rename(f"pool/{name}.ckpt")
    return tmp_path / "pool"


def test_a_pool_of_fine_tuned_checkpoints_is_a_suite(pool):
    suite = Local({task: Npz(f"{task}.npz") for task in ("stripes", "bands")}, MLP(image_size=4, dim=8), pool=str(pool))
    suite.check()
    vectors = suite.task_vectors()
    assert vectors.tasks == ("stripes", "bands")
    assert len(vectors.rows) == 4
    base = torch.load(pool / "base.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(suite.head("bands").weight, base["heads.bands.weight"])
    assert torch.equal(vectors.base["layers.0.weight"], base["backbone.layers.0.weight"])


def test_another_class_list_than_that_of_init_is_refused(pool):
    module = FineTune(MLP(image_size=4, dim=8), init=str(pool / "base.ckpt"), freeze_heads=True)
    with pytest.raises(
        InputError, match=r"the head of 'bands' is for classes \['left', 'right'\], the data has \['up', 'down'\]"
    ):
        module.set_tasks({"bands": ("up", "down")})
    with pytest.raises(InputError, match=r"base\.ckpt does not fit MLP: they differ in"):
        FineTune(MLP(image_size=4, dim=9), init=str(pool / "base.ckpt")).set_tasks({"bands": ("left", "right")})
