"""Local: the pool, explicit paths, heads and class names from checkpoints, YAML, and what `check` finds."""

import jsonargparse
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adamerge import InputError
from adamerge.backbones import MLP
from adamerge.data import ArrayImages, DataSource, HubData, ImageFolders, Npz, Preprocess, TorchData, fetch
from adamerge.suites import Suite
from adamerge.suites.local import Local

CLASSES = {"digits": ("0", "1", "2"), "letters": ("a", "b")}
DIM = 5


def backbone(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(image_size=4, dim=DIM, depth=2)


class Memory(DataSource):
    """Six black images with labels in turn."""

    def __init__(self, classes):
        self._classes = tuple(classes)

    @property
    def classes(self):
        return self._classes

    def dataset(self, split, preprocess):
        return ArrayImages(np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % len(self.classes), preprocess)


def data() -> dict[str, DataSource]:
    return {task: Memory(names) for task, names in CLASSES.items()}


def head(task: str) -> dict[str, torch.Tensor]:
    rows = len(CLASSES[task])
    return {"weight": torch.arange(rows * DIM).view(rows, DIM) / 8, "bias": torch.arange(rows) / 4}


def lightning(state, heads, classes=None):
    """What a checkpoint of `trainers.FineTune` holds, but for the optimiser."""
    tensors = {f"backbone.{name}": value for name, value in state.items()}
    for task in heads:
        tensors |= {f"heads.{task}.{name}": value for name, value in head(task).items()}
    return {"state_dict": tensors, "epoch": 3, "classes": {task: list((classes or CLASSES)[task]) for task in heads}}


@pytest.fixture
def states():
    return {name: backbone(seed).state_dict() for seed, name in enumerate(("base", *CLASSES))}


@pytest.fixture
def pool(tmp_path, states):
    """A pool as fine-tuning leaves it."""
    folder = tmp_path / "pool"
    folder.mkdir()
    torch.save(lightning(states["base"], CLASSES), folder / "base.ckpt")
    for task in CLASSES:
        torch.save(lightning(states[task], [task]), folder / f"{task}.ckpt")
    return folder


@pytest.fixture
def plain(tmp_path, states):
    """State dicts of the backbone in several formats, and heads beside them."""
    folder = tmp_path / "plain"
    (folder / "letters").mkdir(parents=True)
    save_file(states["base"], folder / "base.safetensors")
    torch.save(states["digits"], folder / "digits.pt")
    save_file(states["letters"], folder / "letters" / "model.safetensors")
    save_file(head("digits"), folder / "digits.head.safetensors")
    torch.save({"weight": head("letters")["weight"]}, folder / "letters.head.pt")
    return folder


def heads_of(folder) -> dict[str, str]:
    return {"digits": str(folder / "digits.head.safetensors"), "letters": str(folder / "letters.head.pt")}


def assert_holds(suite, states):
    task_vectors = suite.task_vectors()
    assert task_vectors.tasks == ("digits", "letters")
    assert task_vectors.base.keys() == states["base"].keys() == suite.backbone().state_dict().keys()
    for name, value in states["base"].items():
        assert torch.equal(task_vectors.base[name], value)
        expected = torch.stack([states[task][name] - value for task in CLASSES])
        assert torch.equal(task_vectors.deltas[name], expected)


class TestPool:
    def test_of_lightning_checkpoints(self, pool, states):
        suite = Local(data(), backbone(7), pool=str(pool))
        suite.check()
        assert_holds(suite, states)
        for task, names in CLASSES.items():
            assert suite.classes(task) == names
            assert torch.equal(suite.head(task).weight, head(task)["weight"])
            assert torch.equal(suite.head(task).bias, head(task)["bias"])
            assert (suite.head(task).normalize, suite.head(task).scale) == (False, 1.0)

    def test_experts_without_a_task_come_after_the_others(self, pool, states):
        suite = Local(data(), backbone(), pool=str(pool), experts={"more": str(pool / "letters.ckpt")})
        suite.check()
        assert (suite.tasks, suite.experts) == (("digits", "letters"), ("digits", "letters", "more"))
        vectors = suite.task_vectors()
        assert vectors.tasks == suite.experts
        assert all(torch.equal(delta[2], delta[1]) for delta in vectors.deltas.values())

    def test_of_plain_state_dicts(self, plain, states):
        suite = Local(data(), backbone(7), pool=str(plain), heads=heads_of(plain))
        suite.check()
        assert_holds(suite, states)
        assert torch.equal(suite.head("digits").bias, head("digits")["bias"])
        assert suite.head("letters").bias is None

    def test_explicit_paths_come_first(self, pool, plain, states):
        other = backbone(11).state_dict()
        save_file(other, pool / "elsewhere.safetensors")
        suite = Local(
            data(),
            backbone(),
            pool=str(pool),
            experts={"letters": str(pool / "elsewhere.safetensors")},
            heads=heads_of(plain),
        )
        suite.check()
        assert_holds(suite, states | {"letters": other})

    def test_explicit_paths_alone(self, pool, plain, states):
        experts = {"digits": str(pool / "digits.ckpt"), "letters": str(plain / "letters")}
        suite = Local(
            data(),
            backbone(),
            base=str(plain / "base.safetensors"),
            experts=experts,
            heads={"letters": heads_of(plain)["letters"]},
        )
        suite.check()
        assert_holds(suite, states)
        assert torch.equal(suite.head("digits").weight, head("digits")["weight"])

    def test_building_opens_nothing(self, tmp_path):
        suite = Local({"a": Npz(tmp_path / "none.npz")}, backbone(), pool=str(tmp_path / "none"))
        assert suite.tasks == ("a",)
        with pytest.raises(InputError, match=r"no such folder: .*none"):
            suite.check()

    def test_head_tensors_outlive_their_file(self, pool):
        weights = Local(data(), backbone(), pool=str(pool)).head("digits")
        path = pool / "digits.ckpt"
        path.write_bytes(bytes(path.stat().st_size))  # as when the expert is trained again meanwhile
        assert torch.equal(weights.weight, head("digits")["weight"])

    def test_backbone_with_a_child_called_backbone(self, tmp_path):
        model = nn.ModuleDict({"backbone": backbone(1)})
        save_file(model.state_dict(), tmp_path / "base.safetensors")
        torch.save(lightning(model.state_dict(), ["digits"]), tmp_path / "digits.ckpt")
        suite = Local({"digits": Memory("012")}, model, pool=str(tmp_path))
        with pytest.warns(UserWarning, match="expert 'digits' is identical to the base"):
            task_vectors = suite.task_vectors()
        assert task_vectors.base.keys() == model.state_dict().keys()

    def test_a_head_of_ones_own_may_be_for_other_classes(self, pool, plain, states):
        torch.save(lightning(states["digits"], ["digits"], {"digits": "xyzuv"}), pool / "digits.ckpt")
        Local(data(), backbone(), pool=str(pool), heads=heads_of(plain)).check()

    def test_images_are_preprocessed_as_told(self, pool):
        suite = Local(
            data(), backbone(), pool=str(pool), preprocess=Preprocess(2, mean=(0.0, 0.5, 1.0), std=(1.0, 1.0, 1.0))
        )
        image, label = suite.dataset("letters", "test")[1]
        assert image[:, 0, 0].tolist() == [0.0, -0.5, -1.0]
        assert (tuple(image.shape), label) == ((3, 2, 2), 1)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "suite Local lacks its base: give it, or give pool"),
            ({"base": "b"}, "suite Local lacks its expert 'digits'"),
            ({"base": "b", "experts": {"digits": "d"}}, "suite Local lacks its expert 'letters'"),
            ({"pool": "p", "heads": {"signs": "s"}}, "heads has 'signs', which is no task"),
        ],
    )
    def test_options_that_do_not_go_together(self, options, message):
        with pytest.raises(InputError, match=message):
            Local(data(), backbone(), **options)

    def test_no_task(self):
        with pytest.raises(InputError, match="suite Local has no task"):
            Local({}, backbone(), pool="p")

    def test_task_named_base(self):
        with pytest.raises(InputError, match="rename the task"):
            Local({"base": Memory("ab")}, backbone(), pool="p")

    def test_expert_that_is_not_in_the_pool(self, pool):
        (pool / "letters.ckpt").rename(pool / "lettres.ckpt")
        with pytest.raises(
            InputError, match=r"pool has no checkpoint of 'letters' .*; it holds base.ckpt, digits.ckpt, lettres.ckpt"
        ):
            Local(data(), backbone(), pool=str(pool)).check()

    def test_two_checkpoints_of_one_name(self, pool):
        (pool / "letters").mkdir()
        with pytest.raises(InputError, match=r"several checkpoints of 'letters', letters.ckpt and letters: keep one"):
            Local(data(), backbone(), pool=str(pool)).check()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("layers.1.weight"), "it has no tensor layers.1.weight"),
            (lambda state: state.update(fc=torch.zeros(1)), "the backbone has no tensor fc"),
            (
                lambda state: state.update({"layers.0.bias": torch.zeros(9)}),
                r"layers.0.bias has shape \[9\], the backbone's has \[5\]",
            ),
        ],
    )
    @pytest.mark.parametrize("who", ["base", "letters"])
    def test_tensors_that_do_not_fit_the_backbone(self, pool, states, change, message, who):
        change(states[who])
        torch.save(lightning(states[who], CLASSES), pool / f"{who}.ckpt")
        culprit = "the base" if who == "base" else "expert 'letters'"
        suite = Local(data(), backbone(), pool=str(pool))
        for run in (suite.check, suite.task_vectors):
            with pytest.raises(
                InputError, match=rf"{culprit} \(.*{who}\.ckpt\) does not fit the backbone MLP: {message}"
            ):
                run()

    def test_no_head(self, plain):
        with pytest.raises(
            InputError,
            match=r"task 'digits' has no head: .*digits.pt has no head\. .* give heads.digits a file with weight",
        ):
            Local(data(), backbone(), pool=str(plain)).check()

    def test_head_of_a_task_by_another_name(self, pool):
        (pool / "digits.ckpt").rename(pool / "numbers.ckpt")
        suite = Local({"numbers": Memory("012")}, backbone(), pool=str(pool))
        with pytest.raises(
            InputError, match=r"task 'numbers' has no head: .*numbers.ckpt only has heads of digits\. Name the task as"
        ):
            suite.check()

    def test_head_file_without_weight(self, plain):
        save_file({"w": torch.zeros(3, DIM)}, plain / "digits.head.safetensors")
        with pytest.raises(
            InputError, match=r"task 'digits': its head .*digits.head.safetensors has no tensor 'weight'; it holds w"
        ):
            Local(data(), backbone(), pool=str(plain), heads=heads_of(plain)).check()

    def test_head_with_other_rows(self, plain):
        save_file({"weight": torch.zeros(4, DIM)}, plain / "digits.head.safetensors")
        with pytest.raises(InputError, match=r"task 'digits' has 3 classes, its head has shape \[4, 5\]"):
            Local(data(), backbone(), pool=str(plain), heads=heads_of(plain)).check()

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("0", "1", "2", "3"), "expected 4 classes, found 3; class 3: expected '3', found none"),
            (("0", "1"), "expected 2 classes, found 3; class 2: expected none, found '2'"),
            (("0", "one", "2"), "class 1: expected 'one', found '1'"),
            (("2", "1", "0"), "class 0: expected '2', found '0'"),
        ],
    )
    def test_data_with_other_classes_than_the_expert(self, pool, states, names, message):
        torch.save(lightning(states["digits"], ["digits"], {"digits": names}), pool / "digits.ckpt")
        with pytest.raises(
            InputError,
            match=rf"task 'digits': its data has not the classes that .*digits.ckpt was trained on: {message}",
        ):
            Local(data(), backbone(), pool=str(pool)).check()

    def test_bad_data_names_the_task(self, pool, tmp_path):
        sources = data() | {"letters": Npz(tmp_path / "none.npz")}
        with pytest.raises(InputError, match=r"task 'letters': no such file: .*none.npz"):
            Local(sources, backbone(), pool=str(pool)).check()


YAML = """
suite:
  class_path: adamerge.suites.local.Local
  init_args:
    pool: {pool}
    name: mine
    preprocess: {{size: 4, mean: [0, 0, 0], std: [1, 1, 1]}}
    backbone: {{class_path: adamerge.backbones.MLP, init_args: {{image_size: 4, dim: 5, depth: 2}}}}
    data:
      digits: {{class_path: adamerge.data.Npz, init_args: {{path: {npz}}}}}
      letters: {{class_path: adamerge.data.ImageFolders, init_args: {{test: {folder}, on_bad_image: skip}}}}
      mnist:
        class_path: adamerge.data.TorchData
        init_args:
          test: {{class_path: torchvision.datasets.MNIST, init_args: {{root: {root}, train: false}}}}
      pets: {{class_path: adamerge.data.HubData, init_args: {{path: {hub}, train: null, label: fine_label}}}}
"""


def parse(text: str) -> Suite:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--suite", type=Suite)
    config = parser.parse_string(text)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(config).suite


def test_yaml_builds_every_source_without_opening_it(tmp_path, pool):
    paths = {name: tmp_path / name for name in ("npz", "folder", "root", "hub")}
    suite = parse(YAML.format(pool=pool, **paths))
    assert isinstance(suite, Local)
    assert suite.tasks == ("digits", "letters", "mnist", "pets")
    assert [type(source) for source in suite.data.values()] == [Npz, ImageFolders, TorchData, HubData]
    assert (suite.name, suite.preprocess) == ("mine", Preprocess(4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    assert isinstance(suite.backbone(), nn.Module)
    for task, message in {"digits": "no such file", "letters": "no such folder", "mnist": "Dataset not found"}.items():
        with pytest.raises(InputError, match=message):
            suite.dataset(task, "test")


def test_yaml_with_a_wrong_option_names_it(tmp_path):
    text = YAML.replace("on_bad_image", "on_bad_imag").format(pool="p", npz="n", folder="f", root="r", hub="h")
    with pytest.raises(jsonargparse.ArgumentError, match="on_bad_imag"):
        parse(text)


def test_real_images(shared, tmp_path):
    vision, classes = shared / "data" / "vision", {}
    sources = {task: Npz(vision / f"{task}.npz") for task in ("mnist", "omniglot50")}
    model = MLP(image_size=32, dim=DIM, depth=1)
    torch.save({"state_dict": {f"backbone.{n}": v for n, v in model.state_dict().items()}}, tmp_path / "base.ckpt")
    for task, source in sources.items():
        classes[task] = list(source.classes)
        tensors = {f"backbone.{name}": value + 1 for name, value in model.state_dict().items()}
        tensors[f"heads.{task}.weight"] = torch.zeros(len(source.classes), DIM)
        torch.save({"state_dict": tensors, "classes": {task: classes[task]}}, tmp_path / f"{task}.ckpt")
    suite = Local(sources, model, pool=str(tmp_path))
    suite.check()
    images, labels = fetch(suite.dataset("omniglot50", "test"), range(300))
    assert images.shape == (300, 3, 32, 32)
    assert set(labels.tolist()) <= set(range(50))
