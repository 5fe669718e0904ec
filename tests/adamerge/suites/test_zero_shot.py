"""Zero-shot heads: the closed form, batches, the cache and its key, and words that cannot make a head."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adamerge import InputError
from adamerge.suites.zero_shot import TextModel, locate, text_model, zero_shot_head, zero_shot_weights

NAMES, TEMPLATES = ("cat", "dog", "big {} owl"), ("a photo of a {}.", "the {}!", "{}")
DIM = 6


def encode(prompts: list[str]) -> torch.Tensor:
    """A feature per prompt that depends on its every letter."""
    rows = [
        [float((i + 1) * ord(letter) % (7 + d) - 3) for i, letter in enumerate(p)] for p in prompts for d in range(DIM)
    ]
    return torch.tensor([sum(row) + 0.5 for row in rows], dtype=torch.float64).view(-1, DIM)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    return tmp_path / "zero_shot"


@pytest.fixture
def calls():
    return []


@pytest.fixture
def text(calls):
    def counted(prompts):
        calls.extend(prompts)
        return encode(prompts)

    return TextModel(counted, scale=50.0, fingerprint="text 1")


def test_closed_form():
    rows = []
    for name in NAMES:
        units = [F.normalize(encode([t.replace("{}", name)])[0], dim=0) for t in TEMPLATES]
        rows.append(F.normalize(torch.stack(units).mean(dim=0), dim=0))
    torch.testing.assert_close(zero_shot_weights(encode, NAMES, TEMPLATES), torch.stack(rows).float())


def test_one_template_gives_the_unit_features_themselves():
    wanted = F.normalize(encode(list(NAMES)), dim=-1).float()
    torch.testing.assert_close(zero_shot_weights(encode, NAMES, ["{}"]), wanted)


def test_batches_do_not_matter(capfd):
    names, sizes = [f"class {i}" for i in range(50)], []

    def batches(prompts):
        sizes.append(len(prompts))
        return encode(prompts)

    weights = zero_shot_weights(batches, names, TEMPLATES)
    assert len(sizes) > 1
    assert sum(sizes) == 150
    torch.testing.assert_close(weights[[7]], zero_shot_weights(encode, names[7:8], TEMPLATES))
    assert capfd.readouterr() == ("", "")


def test_no_graph_is_kept():
    weight = torch.ones(DIM, requires_grad=True)
    assert not zero_shot_weights(lambda prompts: encode(prompts).float() * weight, NAMES, TEMPLATES).requires_grad


def test_head_is_cached(text, calls, cache):
    first = zero_shot_head(text, NAMES, TEMPLATES)
    assert len(calls) == 9
    again = zero_shot_head(text, list(NAMES), list(TEMPLATES), "another name")
    assert len(calls) == 9
    assert torch.equal(first.weight, again.weight)
    assert (again.scale, again.normalize, again.bias) == (50.0, True, None)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    ("names", "templates", "fingerprint"),
    [
        (("cat", "dog", "owl"), TEMPLATES, "text 1"),
        (("dog", "cat", "big {} owl"), TEMPLATES, "text 1"),
        (NAMES, ("a photo of a {}.", "the {}!"), "text 1"),
        (NAMES, TEMPLATES, "text 2"),
    ],
    ids=["names", "order of names", "templates", "text model"],
)
def test_the_key_knows_what_made_the_head(text, calls, cache, names, templates, fingerprint):
    zero_shot_head(text, NAMES, TEMPLATES)
    calls.clear()
    zero_shot_head(dataclasses.replace(text, fingerprint=fingerprint), names, templates)
    assert len(calls) == len(names) * len(templates)
    assert len(list(cache.iterdir())) == 2


def test_a_head_whose_making_fails_is_not_cached(text, cache):
    def fails(prompts):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        zero_shot_head(dataclasses.replace(text, encode=fails), NAMES, TEMPLATES)
    assert not list(cache.glob("*"))


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ((), TEMPLATES, "no classes"),
        (NAMES, (), "no prompt templates"),
        (("cat", "dog", "cat"), TEMPLATES, "both named 'cat'"),
        (NAMES, ("a photo",), "'a photo' has no {}"),
    ],
)
def test_words_that_make_no_head(text, names, templates, message):
    with pytest.raises(InputError, match=f"task 'pets'.*{message}"):
        zero_shot_head(text, names, templates, "pets")


# Text models over checkpoints -----------------------------------------------------------------------------------------


def tower():
    return nn.Sequential(nn.Linear(DIM, 8), nn.Tanh(), nn.Linear(8, 3))


def over(path, settings=None):
    def encoder(model):
        return lambda prompts: model(encode(prompts).float())

    return text_model(path, tower, encoder, settings or {}, lambda name: [name, f"text.{name}"])


def saved(path, change=0.0, scale=3.0, prefix=""):
    torch.manual_seed(1)
    state = tower().state_dict() | {"logit_scale": torch.tensor(scale)}
    state["2.bias"] = state["2.bias"] + change
    torch.save({prefix + name: value for name, value in state.items()} | {"visual.w": torch.ones(2)}, path)
    return state


def test_text_model_encodes_with_the_weights_of_its_checkpoint(tmp_path):
    state = saved(tmp_path / "a.pt")
    random = torch.random.get_rng_state()
    text, model = over(tmp_path / "a.pt"), tower()
    features = text.encode(["cat", "dog"])
    assert text.scale == pytest.approx(torch.tensor(3.0).exp().item())
    del state["logit_scale"]
    torch.random.set_rng_state(random)
    model.load_state_dict(state)
    torch.testing.assert_close(features, model(encode(["cat", "dog"]).float()))


def test_fingerprints_are_of_weights_and_settings_alone(tmp_path):
    files = {"same": {}, "prefixed": {"prefix": "text."}, "bias": {"change": 1e-3}, "scale": {"scale": 2.0}}
    for name, options in files.items():
        saved(tmp_path / f"{name}.pt", **options)
    prints = {name: over(tmp_path / f"{name}.pt").fingerprint for name in files}
    assert prints["same"] == prints["prefixed"]
    assert len(set(prints.values())) == 3
    assert over(tmp_path / "same.pt", {"activation": "gelu"}).fingerprint not in prints.values()


def test_what_a_checkpoint_lacks_is_named():
    shapes = tower().state_dict()
    state = {name: value for name, value in shapes.items() if name != "2.bias"}
    with pytest.raises(InputError, match=r"mine lacks 1 of the 4 tensors .* 2.bias; its own begin with 0, 2"):
        locate("mine", state, shapes, lambda name: [name])
    assert "2.bias" not in locate("mine", state, shapes, lambda name: [name], spare=("2.bias",))
