"""ClipVision over tiny Hugging Face models: features, kinds of expert folders, heads, what `check` finds, overlays."""

import json
import shutil
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.utils.logging import disable_progress_bar

from adamerge import InputError
from adamerge.data import Npz, fetch
from adamerge.suites import Suite
from adamerge.suites.clip import ClipVision

OVERLAYS = sorted((Path(__file__).parents[3] / "configs" / "suites").glob("clip_*.yaml"))
CLASSES = {"mnist": ["0 - zero", "1 - one", "2 - two"], "pets": ["my_cat", "dog"]}
SIZE, DIM = 16, 12
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!:\"'-/"
_VOCABULARY = [*_CHARACTERS, *(c + "</w>" for c in _CHARACTERS), "ph", "pho", "phot", "photo</w>", "<|startoftext|>"]


def tiny_config(layers=2):
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(_VOCABULARY) + 1, "max_position_embeddings": 40, "eos_token_id": len(_VOCABULARY)}
    text |= {"bos_token_id": len(_VOCABULARY) - 1}
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    vision |= {"image_size": SIZE, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)


def tiny_model(seed, layers=2):
    torch.manual_seed(seed)
    model = CLIPModel(tiny_config(layers)).eval()
    for parameter in model.parameters():  # norms and biases too must be told apart
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def save_tokenizer(folder):
    vocabulary = {token: i for i, token in enumerate([*_VOCABULARY, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\np h\nph o\npho t\nphot o</w>\n")
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A base with its tokenizer and one expert per task, as transformers writes them, and images."""
    folder = tmp_path_factory.mktemp("clip")
    disable_progress_bar()
    tiny_model(0).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    for seed, task in enumerate(CLASSES, 1):
        tiny_model(seed).vision_model.save_pretrained(folder / task)
        rng = np.random.default_rng(seed)
        arrays = {f"x_{s}": rng.integers(0, 256, (6, 20, 30, 3), dtype=np.uint8) for s in ("train", "test")}
        labels = {f"y_{s}": np.arange(6) % len(CLASSES[task]) for s in ("train", "test")}
        np.savez(folder / f"{task}.npz", classes=np.array(CLASSES[task]), **arrays, **labels)
    return folder


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))


def suite(pool, **options):
    given = {"base": str(pool / "base"), "experts": {task: str(pool / task) for task in CLASSES}}
    given["data"] = {task: Npz(pool / f"{task}.npz") for task in CLASSES}
    return ClipVision(**given | options)


def loaded(clip, state):
    model = clip.backbone()
    model.load_state_dict(state)
    return model


def copied(pool, tmp_path, task="pets"):
    """A copy of an expert's folder to change, and its tensors."""
    shutil.copytree(pool / task, tmp_path / task)
    return tmp_path / task, load_file(tmp_path / task / "model.safetensors")


def with_expert(pool, folder, task="pets"):
    return suite(pool, experts={t: str(folder if t == task else pool / t) for t in CLASSES})


def test_features_are_those_of_transformers(pool):
    clip, images = suite(pool), torch.randn(3, 3, SIZE, SIZE)
    vectors = clip.task_vectors()
    assert vectors.tasks == clip.tasks == tuple(CLASSES)
    assert list(vectors.base) == list(clip.backbone().state_dict())
    base = CLIPModel.from_pretrained(pool / "base").eval()
    with torch.no_grad():
        features = loaded(clip, vectors.base)(images)
        torch.testing.assert_close(features, base.get_image_features(images).pooler_output, atol=1e-6, rtol=0)
        for task in CLASSES:
            base.vision_model = CLIPVisionModel.from_pretrained(pool / task).eval()
            wanted = base.get_image_features(images).pooler_output
            features = loaded(clip, vectors.expert(task))(images)
            torch.testing.assert_close(features, wanted, atol=1e-6, rtol=0)
    assert features.shape == (3, DIM)
    assert not torch.allclose(features.norm(dim=-1), torch.ones(3))


def prefixed(state):
    return {f"vision_model.{name}": tensor for name, tensor in state.items()}


def old_bin(folder, state):
    (folder / "model.safetensors").unlink()
    ids = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    torch.save(prefixed(state) | ids, folder / "pytorch_model.bin")


def old_safetensors(folder, state):
    save_file(prefixed(state), folder / "model.safetensors", metadata={"format": "pt"})


def whole_model(folder, state):
    model = tiny_model(0)
    model.vision_model.load_state_dict(state)
    model.save_pretrained(folder)


@pytest.mark.parametrize("write", [old_safetensors, old_bin, whole_model])
def test_every_kind_of_expert_folder_gives_the_same_task_vectors(pool, tmp_path, write):
    write(*copied(pool, tmp_path))
    wanted, got = suite(pool).task_vectors(), with_expert(pool, tmp_path / "pets").task_vectors()
    assert list(got.deltas) == list(wanted.deltas)
    assert all(torch.equal(got.deltas[name], delta) for name, delta in wanted.deltas.items())
    assert got.fingerprints == wanted.fingerprints


def test_experts_without_projection_share_that_of_the_base(pool):
    vectors = suite(pool).task_vectors()
    assert not vectors.deltas["visual_projection.weight"].any()
    assert set(vectors.base) - set(vectors.rows) == {"visual_projection.weight"}


def test_experts_with_a_projection_of_their_own_keep_it(pool, tmp_path):
    model = tiny_model(5)
    config = model.config.vision_config
    config.projection_dim = DIM
    own = CLIPVisionModelWithProjection(config)
    own.vision_model, own.visual_projection = model.vision_model, model.visual_projection
    own.save_pretrained(tmp_path / "pets")
    vectors, images = with_expert(pool, tmp_path / "pets").task_vectors(), torch.randn(2, 3, SIZE, SIZE)
    assert "visual_projection.weight" in vectors.rows
    with torch.no_grad():
        features = loaded(suite(pool), vectors.expert("pets"))(images)
        torch.testing.assert_close(features, own.eval()(images).image_embeds, atol=1e-6, rtol=0)


def test_half_precision_experts_are_read_as_they_are(pool, tmp_path):
    folder, state = copied(pool, tmp_path)
    save_file({name: tensor.half() for name, tensor in state.items()}, folder / "model.safetensors")
    vectors = with_expert(pool, folder).task_vectors()
    name = "vision_model.post_layernorm.weight"
    assert vectors.deltas[name].dtype == torch.float32
    assert torch.equal(vectors.deltas[name][1], state["post_layernorm.weight"].half().float() - vectors.base[name])


def test_a_half_precision_base_gives_a_model_and_heads_in_full(pool, tmp_path):
    tiny_model(0).half().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    for half in ("text_config", "vision_config"):
        config[half]["dtype"] = "float16"
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    clip = suite(pool, base=str(tmp_path / "base"))
    clip.check()
    assert {tensor.dtype for tensor in clip.backbone().state_dict().values()} == {torch.float32}
    model = loaded(clip, clip.task_vectors().base)
    assert model(torch.randn(2, 3, SIZE, SIZE)).dtype == clip.head("pets").weight.dtype == torch.float32
    torch.testing.assert_close(clip.head("pets").weight, suite(pool).head("pets").weight, atol=0.01, rtol=0)


def test_weights_take_gradients_through_functional_call(pool):
    clip = suite(pool)
    state = {name: value.clone().requires_grad_() for name, value in clip.task_vectors().base.items()}
    functional_call(clip.backbone(), state, (torch.randn(2, 3, SIZE, SIZE),)).square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in state.values())


def test_heads_compare_directions_with_the_model_s_scale(pool):
    clip, model = suite(pool), CLIPModel.from_pretrained(pool / "base").eval()
    head = clip.head("pets")
    assert head.weight.shape == (2, DIM)
    assert head.normalize
    assert head.bias is None
    assert head.scale == pytest.approx(model.logit_scale.exp().item())
    torch.testing.assert_close(head.weight.norm(dim=-1), torch.ones(2))
    assert clip.classes("mnist") == ("0", "1", "2")
    assert clip.classes("pets") == ("my cat", "dog")


def test_given_words_replace_the_usual_ones(pool):
    names, templates = {"pets": ["tiger", "wolf"]}, {"pets": ["{}!"]}
    usual, own = suite(pool), suite(pool, class_names=names, templates=templates)
    assert own.classes("pets") == ("tiger", "wolf")
    assert not torch.equal(own.head("pets").weight, usual.head("pets").weight)
    assert torch.equal(own.head("mnist").weight, usual.head("mnist").weight)
    assert not torch.equal(suite(pool, templates=templates).head("pets").weight, usual.head("pets").weight)


def test_the_text_tower_may_lie_elsewhere(pool, tmp_path):
    model = tiny_model(9)
    model.save_pretrained(tmp_path / "text")
    save_tokenizer(tmp_path / "text")
    other = suite(pool, text_model=str(tmp_path / "text"))
    other.check()
    assert other.head("pets").scale == pytest.approx(model.logit_scale.exp().item())
    assert not torch.equal(other.head("pets").weight, suite(pool).head("pets").weight)


def test_images_are_preprocessed_as_by_clip(pool):
    clip, processor = suite(pool), CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    arrays = np.load(pool / "pets.npz")
    images, labels = fetch(clip.dataset("pets", "test"), [0, 3])
    wanted = [processor(Image.fromarray(arrays["x_test"][i]), return_tensors="pt").pixel_values[0] for i in (0, 3)]
    torch.testing.assert_close(images, torch.stack([torch.as_tensor(image) for image in wanted]), atol=2e-2, rtol=0)
    assert labels.tolist() == arrays["y_test"][[0, 3]].tolist()


def test_a_good_suite_passes_its_check_silently(pool, capfd, caplog, recwarn):
    clip, state = suite(pool), torch.random.get_rng_state()
    assert isinstance(clip, Suite)
    assert clip.name == "base"
    clip.prepare(lambda *args, **kwargs: pytest.fail("nothing is to be trained"))
    clip.check()
    clip.backbone()
    clip.task_vectors()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert not recwarn.list
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_backbone_exports_to_a_folder_that_transformers_opens(pool, tmp_path):
    clip, images = suite(pool), torch.randn(2, 3, SIZE, SIZE)
    model = loaded(clip, clip.task_vectors().expert("mnist"))
    model.save_pretrained(tmp_path / "merged")
    again = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images).image_embeds, model(images))


# What does not fit ----------------------------------------------------------------------------------------------------


def test_a_missing_expert_is_named(pool, tmp_path):
    clip = with_expert(pool, tmp_path / "gone")
    with pytest.raises(InputError, match=r"expert 'pets'.*gone"):
        clip.check()


def test_a_missing_base_is_named(pool, tmp_path):
    with pytest.raises(InputError, match=r"base.*gone"):
        suite(pool, base=str(tmp_path / "gone")).check()


def test_a_hub_model_that_cannot_be_fetched_is_named(pool):
    with pytest.raises(InputError, match="nobody/no-such-model"):
        suite(pool, base="nobody/no-such-model").check()


def test_a_tensor_that_an_expert_lacks_is_named(pool, tmp_path):
    folder, state = copied(pool, tmp_path)
    del state["pre_layrnorm.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"expert 'pets'.*lacks 1 of the .* pre_layrnorm.bias"):
        with_expert(pool, folder).check()


def test_an_expert_of_another_size_is_refused(pool, tmp_path):
    folder, state = copied(pool, tmp_path)
    state["embeddings.position_embedding.weight"] = torch.zeros(10, 24)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"expert 'pets'.*position_embedding.weight has shape \[10, 24\].*\[5, 24\]"):
        with_expert(pool, folder).check()


def test_a_deeper_expert_is_refused(pool, tmp_path):
    tiny_model(3, layers=3).vision_model.save_pretrained(tmp_path / "pets")
    with pytest.raises(InputError, match=r"expert 'pets'.*more layers than the model: encoder.layers.2"):
        with_expert(pool, tmp_path / "pets").check()


def test_a_base_must_be_a_clip_folder(pool, tmp_path):
    shutil.copytree(pool / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(InputError, match="model type 'siglip'"):
        suite(pool, base=str(tmp_path / "base")).check()
    (tmp_path / "base" / "config.json").write_text('{"model_type": ["clip"]}')
    with pytest.raises(InputError, match=r"model type \['clip'\]"):
        suite(pool, base=str(tmp_path / "base")).check()
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(InputError, match=r"no Hugging Face CLIP folder.*config.json"):
        suite(pool, base=str(tmp_path / "base")).check()


def test_a_base_needs_a_projection_and_a_text_tower(pool):
    with pytest.raises(InputError, match=r"base .*visual_projection.weight"):
        suite(pool, base=str(pool / "pets")).check()
    with pytest.raises(InputError, match=r"pets.* model type 'clip_vision_model'"):
        suite(pool, text_model=str(pool / "pets")).check()


def test_a_text_tower_of_another_width_is_refused(pool, tmp_path):
    config = tiny_config()
    config.projection_dim = DIM + 1
    CLIPModel(config).save_pretrained(tmp_path / "text")
    save_tokenizer(tmp_path / "text")
    with pytest.raises(InputError, match=r"text model .* 13 features, .* 12"):
        suite(pool, text_model=str(tmp_path / "text")).check()


def test_a_text_model_without_a_tokenizer_is_named(pool, tmp_path):
    tiny_model(0).save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match=r"text.*tokenizer"):
        suite(pool, text_model=str(tmp_path / "text")).check()


def test_experts_without_data_come_after_the_others(pool):
    first, second = CLASSES
    clip = suite(pool, data={second: Npz(pool / f"{second}.npz")})
    clip.check()
    assert (clip.tasks, clip.experts) == ((second,), (second, first))
    assert clip.task_vectors().tasks == clip.experts


def test_every_task_needs_an_expert_and_data(pool):
    with pytest.raises(InputError, match="'pets' lacks one"):
        suite(pool, experts={"mnist": str(pool / "mnist")})
    with pytest.raises(InputError, match="'mnist' lacks one"):
        suite(pool, data={})
    with pytest.raises(InputError, match="no task"):
        suite(pool, experts={}, data={})


@pytest.mark.parametrize("option", ["class_names", "templates"])
def test_words_for_an_unknown_task_are_refused(pool, option):
    with pytest.raises(InputError, match=f"{option} has no task 'dogs'"):
        suite(pool, **{option: {"dogs": ["a {}"]}})


def test_class_names_must_be_as_many_as_the_classes(pool):
    with pytest.raises(InputError, match="'pets' has 2 classes in its data, but 1 class_names"):
        suite(pool, class_names={"pets": ["cat"]}).check()


def test_labels_outside_of_the_classes_are_found(pool, tmp_path):
    arrays = dict(np.load(pool / "pets.npz"))
    np.savez(tmp_path / "pets.npz", **arrays | {"y_test": np.arange(6)})
    data = {"mnist": Npz(pool / "mnist.npz"), "pets": Npz(tmp_path / "pets.npz")}
    with pytest.raises(InputError, match=r"'pets'.*label 2"):
        suite(pool, data=data).check()


# Overlays -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_build_suites(pool, path):
    given = yaml.safe_load(path.read_text())["model"]["init_args"]["suite"]
    given["init_args"]["data"] = yaml.safe_load((path.parent / given["init_args"]["data"]).read_text())
    assert given["class_path"] == "adamerge.suites.ClipVision"
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--suite", type=Suite)
    clip = parser.instantiate(parser.parse_object({"suite": given})).suite
    assert clip.base.startswith("openai/clip-vit-")
    for where in clip._experts.values():
        assert where.startswith(f"tanganke/{clip.name}_")
    here = dict.fromkeys(clip.tasks, "mnist")
    given["init_args"]["base"] = str(pool / "base")
    given["init_args"]["experts"] = {task: str(pool / name) for task, name in here.items()}
    given["init_args"]["data"] = {
        task: {"class_path": "adamerge.data.Npz", "init_args": {"path": str(pool / f"{name}.npz")}}
        for task, name in here.items()
    }
    clip = parser.instantiate(parser.parse_object({"suite": given})).suite
    clip.check()
    assert clip.tasks == tuple(here)


def test_the_eight_tasks_come_in_the_order_of_the_field():
    for path in OVERLAYS:
        if path.stem != "clip_b32_torchvision":
            tasks = list(yaml.safe_load(path.read_text())["model"]["init_args"]["suite"]["init_args"]["experts"])
            assert tasks == ["sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
