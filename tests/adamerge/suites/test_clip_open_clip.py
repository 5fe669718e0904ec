"""ClipVision over a tiny open_clip model: features, kinds of weight files, the text tower, what does not fit."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from adamerge import InputError
from adamerge.data import Npz
from adamerge.suites.clip import ClipVision
from adamerge.suites.clip_tasks import usual_templates

CONFIG = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
CLASSES = {"dtd": ["banded", "dotted"], "signs": ["stop", "give_way", "50"]}


def tiny_model(seed):
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CONFIG).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(seed) for seed, name in enumerate(("base", *CLASSES))}


@pytest.fixture(scope="module")
def pool(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    save_file(models["base"].state_dict(), folder / "base.safetensors")
    for task, names in CLASSES.items():
        save_file(models[task].visual.state_dict(), folder / f"{task}.safetensors")
        images, labels = np.zeros((4, 16, 16, 3), np.uint8), np.arange(4) % len(names)
        np.savez(folder / f"{task}.npz", x_test=images, y_test=labels, classes=np.array(names))
    return folder


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))


def suite(pool, **options):
    given = {"base": str(pool / "base.safetensors"), "open_clip": str(pool / "tiny.json")}
    given["experts"] = {task: str(pool / f"{task}.safetensors") for task in CLASSES}
    given["data"] = {task: Npz(pool / f"{task}.npz") for task in CLASSES}
    return ClipVision(**given | options)


def test_features_are_those_of_open_clip(pool, models):
    clip, images = suite(pool), torch.randn(3, 3, 16, 16)
    vectors, model = clip.task_vectors(), clip.backbone()
    assert list(vectors.base) == list(model.state_dict())
    assert "transformer.resblocks.0.attn.in_proj_weight" in vectors.rows
    assert set(vectors.rows) == set(vectors.base)
    states = {"base": vectors.base} | {task: vectors.expert(task) for task in CLASSES}
    for name, state in states.items():
        model.load_state_dict(state)
        with torch.no_grad():
            torch.testing.assert_close(model(images), models[name].encode_image(images), atol=1e-6, rtol=0)


def test_heads_are_those_of_its_text_tower(pool, models):
    clip, tokenize = suite(pool), open_clip.SimpleTokenizer(context_length=77)
    clip.check()
    names = {"dtd": ["banded", "dotted"], "signs": ["stop", "give way", "50"]}
    for task, words in names.items():
        with torch.no_grad():
            rows = [
                [
                    models["base"].encode_text(tokenize([t.replace("{}", w)]), normalize=True)[0]
                    for t in usual_templates(task)
                ]
                for w in words
            ]
        wanted = torch.stack([F.normalize(torch.stack(row).mean(dim=0), dim=0) for row in rows])
        torch.testing.assert_close(clip.head(task).weight, wanted)
    assert clip.head("signs").scale == pytest.approx(models["base"].logit_scale.exp().item())
    assert clip.name == "base"


@pytest.mark.parametrize("kind", ["whole .pt", "tower .pt", "module .pt", "Lightning .ckpt"])
def test_every_kind_of_weight_file_gives_the_same_task_vectors(pool, models, tmp_path, kind):
    model, path = models["signs"], tmp_path / f"signs{kind.split()[1]}"
    state = model.visual.state_dict() if kind == "tower .pt" else model.state_dict()
    if kind == "module .pt":
        state = {f"model.{name}": value for name, value in state.items()}
    torch.save({"state_dict": state} if kind.startswith("Lightning") else state, path)
    experts = {"dtd": str(pool / "dtd.safetensors"), "signs": str(path)}
    wanted, got = suite(pool).task_vectors(), suite(pool, experts=experts).task_vectors()
    assert got.fingerprints == wanted.fingerprints
    assert all(torch.equal(got.deltas[name], delta) for name, delta in wanted.deltas.items())


def test_a_base_without_text_tower_needs_one_elsewhere(pool, models, tmp_path):
    save_file(models["base"].visual.state_dict(), tmp_path / "tower.safetensors")
    alone = suite(pool, base=str(tmp_path / "tower.safetensors"))
    with pytest.raises(InputError, match=r"text model .*tower.safetensors lacks"):
        alone.check()
    both = suite(pool, base=str(tmp_path / "tower.safetensors"), text_model=str(pool / "base.safetensors"))
    both.check()
    assert torch.equal(both.head("dtd").weight, suite(pool).head("dtd").weight)
    assert both.task_vectors().fingerprints == suite(pool).task_vectors().fingerprints


def test_the_activation_makes_another_head(pool, tmp_path):
    (tmp_path / "gelu.json").write_text(json.dumps(CONFIG | {"quick_gelu": False}))
    other = suite(pool, open_clip=str(tmp_path / "gelu.json"))
    assert not torch.equal(other.head("dtd").weight, suite(pool).head("dtd").weight)


def test_named_architectures_are_those_of_open_clip(pool):
    assert suite(pool, open_clip="ViT-B-32-quickgelu").dataset("dtd", "test")[0][0].shape == (3, 224, 224)
    with pytest.raises(InputError, match=r"no architecture 'ViT-B-33'; see .*ViT-B-32"):
        suite(pool, open_clip="ViT-B-33").check()


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "xlm-roberta-base-ViT-B-32", "ViT-B-16-SigLIP"])
def test_other_text_towers_are_refused(pool, name):
    with pytest.raises(InputError, match="only CLIP's own text tower"):
        suite(pool, open_clip=name).check()


def test_unreadable_configs_and_files_are_named(pool, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for path in (tmp_path / "bad.json", tmp_path / "gone.json"):
        with pytest.raises(InputError, match=rf"config .*{path.name} cannot be read"):
            suite(pool, open_clip=str(path)).check()
    with pytest.raises(InputError, match=r"base.*gone.pt"):
        suite(pool, base=str(tmp_path / "gone.pt")).check()
    (tmp_path / "odd.json").write_text(json.dumps({"text_cfg": {}}))
    with pytest.raises(InputError, match=r"odd.json .*vision_cfg"):
        suite(pool, open_clip=str(tmp_path / "odd.json")).check()


def test_building_and_reading_is_silent(pool, capfd, caplog, recwarn):
    clip, state = suite(pool), torch.random.get_rng_state()
    clip.check()
    clip.backbone()
    clip.task_vectors()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert not recwarn.list
    assert torch.equal(torch.random.get_rng_state(), state)
