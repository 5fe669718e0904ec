"""Parameters at every level, and layers stacked anew."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError
from adamerge.rules.sphere import slerp

LAYERS = 5
Q, UP, EMBED, NORM, HEAD = (
    "model.layers.{}.self_attn.q_proj.weight",
    "model.layers.{}.mlp.up_proj.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)
Run = Callable[[str], dict[str, Tensor]]

# -- parameters at every level -----------------------------------------------------------------------------------------


def shares(run: Run, text: str, models: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """How much of model `two` is in every tensor of a linear merge of `one` and `two`."""
    found = {}
    for name, value in run(text).items():
        a, b = models["one"][name], models["two"][name]
        found[name] = round(float(((value - a) / (b - a)).mean()), 9)
    return found


LINEAR = """
models:
  - model: one
    parameters: {{weight: {one}}}
  - model: two
    parameters: {{weight: {two}}}
merge_method: linear
parameters: {{normalize: true}}
"""


def test_a_gradient_runs_over_the_layers(models, run):
    found = shares(run, LINEAR.format(one="[1, 0.5, 0]", two="[0, 0.5, 1]"), models)
    assert [found[Q.format(layer)] for layer in range(LAYERS)] == [0, 0.25, 0.5, 0.75, 1]
    assert found[EMBED] == found[NORM] == found[HEAD] == 0  # what is no layer has the first number


def test_the_first_condition_that_fits_counts(models, run):
    two = "[{filter: self_attn, value: [0, 1]}, {filter: layers.2, value: 3}, {filter: '*', value: 1}]"
    found = shares(run, LINEAR.format(one=1, two=two), models)
    expected = [layer / 4 / (1 + layer / 4) for layer in range(LAYERS)]
    assert [found[Q.format(layer)] for layer in range(LAYERS)] == pytest.approx(expected)
    assert [found[UP.format(layer)] for layer in range(LAYERS)] == [0.5, 0.5, 0.75, 0.5, 0.5]
    assert found[EMBED] == 0.5


def test_conditions_that_do_not_fit_leave_it_to_the_next_level(models, run):
    text = """
models: [{model: one, parameters: {weight: {filter: mlp, value: 3}}}, {model: two}]
merge_method: linear
parameters: {weight: 1}
"""
    found = shares(run, text, models)
    assert found[UP.format(0)] == 0.25
    assert found[Q.format(0)] == found[HEAD] == 0.5


def test_a_source_goes_before_its_slice_and_a_slice_before_the_file(models, run):
    def part(start: int, stop: int, own: str, of_slice: str) -> str:
        return f"""
  - sources:
      - {{model: one, layer_range: [{start}, {stop}], parameters: {{weight: 1}}}}
      - {{model: two, layer_range: [{start}, {stop}]{own}}}
{of_slice}"""

    one = "    parameters: {weight: 1}"
    text = f"""
slices:{part(0, 1, ", parameters: {weight: 3}", one)}{part(1, 2, "", one)}{part(2, 5, "", "")}
merge_method: linear
parameters: {{weight: 9}}
"""
    found = shares(run, text, models)
    assert [found[Q.format(layer)] for layer in range(LAYERS)] == [0.75, 0.5, 0.9, 0.9, 0.9]
    assert found[EMBED] == 0.75
    assert found[HEAD] == 0.9


def test_a_gradient_in_a_slice_runs_over_that_slice(models, run):
    text = """
slices:
  - sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [0, 2], parameters: {weight: [0, 1]}}]
  - sources: [{model: one, layer_range: [2, 5]}, {model: two, layer_range: [2, 5], parameters: {weight: [0, 1]}}]
merge_method: linear
parameters: {weight: 1}
"""
    found = shares(run, text, models)
    assert [found[Q.format(layer)] for layer in range(LAYERS)] == pytest.approx([0, 0.5, 0, 1 / 3, 0.5])
    assert found[EMBED] == found[NORM] == found[HEAD] == 0


def test_a_filter_of_a_source_is_for_its_own_names(models, run):
    text = """
slices:
  - sources:
      - {model: one, layer_range: [0, 2]}
      - {model: two, layer_range: [1, 3], parameters: {weight: [{filter: layers.2., value: 3}, {value: 1}]}}
merge_method: linear
parameters: {weight: 1}
"""
    merged = run(text)
    for layer, share in ((0, 0.5), (1, 0.75)):
        a, b = models["one"][Q.format(layer)], models["two"][Q.format(layer + 1)]
        assert_close(merged[Q.format(layer)], (1 - share) * a + share * b, rtol=0, atol=1e-12)


# -- slices ------------------------------------------------------------------------------------------------------------

FRANKEN = """
slices:
  - sources: [{model: one, layer_range: [0, 4]}]
  - sources: [{model: two, layer_range: [2, 5], parameters: {scale: [{filter: mlp, value: 0.5}, {value: 1}]}}]
merge_method: passthrough
dtype: float32
"""


def test_passthrough_stacks_layers(models, run):
    merged = run(FRANKEN)
    expected = {EMBED: models["one"][EMBED], NORM: models["two"][NORM], HEAD: models["two"][HEAD]}
    for layer, (model, index) in enumerate([*(("one", i) for i in range(4)), *(("two", i) for i in range(2, 5))]):
        expected[Q.format(layer)] = models[model][Q.format(index)]
        expected[UP.format(layer)] = models[model][UP.format(index)] * (0.5 if model == "two" else 1)
    assert sorted(merged) == sorted(expected)
    assert all(torch.equal(value, expected[name].float()) for name, value in merged.items())
    assert {value.dtype for value in merged.values()} == {torch.float32}


def test_a_slice_without_layers_says_whose_head_it_is(models, run):
    """And norm: what follows the layers comes from the last slice."""
    text = """
slices:
  - sources:
      - {model: one, layer_range: [0, 5], parameters: {weight: 0.5}}
      - {model: two, layer_range: [0, 5], parameters: {weight: 0.5}}
  - sources: [{model: three, layer_range: [5, 5], parameters: {weight: 1}}]
merge_method: linear
"""
    merged = run(text)
    for name, value in merged.items():
        mean = (models["one"][name] + models["two"][name]) / 2
        assert_close(value, models["three"][name] if name in (HEAD, NORM) else mean, rtol=0, atol=1e-12)
    assert merged.keys() == models["one"].keys()


def test_the_head_is_merged_from_all_sources_of_the_last_slice(models, run, job):
    text = """
slices:
  - sources: [{model: one, layer_range: [0, 2]}]
  - sources:
      - {model: one, layer_range: [2, 5], parameters: {weight: 0.25}}
      - {model: two, layer_range: [2, 5], parameters: {weight: 0.75}}
merge_method: linear
parameters: {weight: 1}
"""
    found = shares(run, text, models)
    assert (found[EMBED], found[NORM], found[HEAD]) == (0, 0.75, 0.75)
    assert (
        "all 2 sources of the last slice: mergekit takes as many of them as the first slice has, 1"
        in job(text).notes[-1]
    )


def test_stacking_changes_the_config(models, tmp_path, job):
    for name in ("one", "two"):
        config = {
            "num_hidden_layers": 5,
            "eos_token_id": [1, 2, 3, 4, 5],
            "layer_types": [f"{name}{i}" for i in range(5)],
        }
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    found = job(FRANKEN)
    assert found.config == {
        "num_hidden_layers": 7,
        "layer_types": ["one0", "one1", "one2", "one3", "two2", "two3", "two4"],
    }
    assert found.copy_from == Path("one")


def test_a_count_inside_the_text_config_changes_too(models, tmp_path, job):
    for name in ("one", "two"):
        (tmp_path / name / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 5, "size": 3}}))
    assert job(FRANKEN).config == {"text_config": {"num_hidden_layers": 7, "size": 3}}


def test_a_slice_may_have_one_source_and_another_two(models, run):
    text = """
slices:
  - sources: [{model: one, layer_range: [0, 2]}]
  - sources: [{model: one, layer_range: [2, 5]}, {model: zero, layer_range: [1, 4]}]
  - sources: [{model: zero, layer_range: [4, 5]}]
merge_method: slerp
base_model: zero
parameters: {t: 0.25}
"""
    merged = run(text)
    assert torch.equal(merged[Q.format(1)], models["one"][Q.format(1)])
    assert torch.equal(merged[Q.format(5)], models["zero"][Q.format(4)])
    a, b = models["zero"][Q.format(1)], models["one"][Q.format(2)]
    assert_close(merged[Q.format(2)], slerp(a, b, 0.25), rtol=0, atol=1e-12)


def test_the_base_of_a_slice_need_not_be_listed(models, run):
    text = """
slices:
  - sources: [{model: one, layer_range: [1, 3], parameters: {weight: 0.5}}]
merge_method: task_arithmetic
base_model: zero
"""
    merged = run(text)
    for layer in (0, 1):
        mean = (models["zero"][Q.format(layer + 1)] + models["one"][Q.format(layer + 1)]) / 2
        assert_close(merged[Q.format(layer)], mean, rtol=0, atol=1e-12)
    assert Q.format(2) not in merged


def test_slices_take_no_base_that_they_do_not_list(models, run):
    text = """
slices: [{sources: [{model: one, layer_range: [0, 5]}, {model: two, layer_range: [0, 5]}]}]
merge_method: linear
parameters: {weight: 1}
"""
    merged = run(text)
    assert all(torch.equal(merged[name], value) for name, value in run(text + "base_model: zero").items())


def test_slices_of_the_same_layers_are_models(models, run, job):
    text = """
slices:
  - sources:
      - {model: zero, layer_range: [0, 5]}
      - {model: one, layer_range: [0, 5]}
merge_method: slerp
base_model: zero
parameters: {t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {value: 0.5}]}
"""
    sliced = run(text)
    whole = run(text.replace("slices:\n  - sources:", "models:").replace(", layer_range: [0, 5]", ""))
    assert all(torch.equal(whole[name], value) for name, value in sliced.items())
    assert torch.equal(sliced[Q.format(0)], models["zero"][Q.format(0)])
    assert job(text).config == {}


def test_models_of_different_layers_are_refused(models, tmp_path, job, save):
    odd = {name: value for name, value in models["one"].items() if name != Q.format(3)}
    save("odd", odd | {"model.layers.3.self_attn.q_proj.bias": torch.zeros(3, dtype=torch.float64)})
    text = (
        "slices: [{{sources: [{{model: one, layer_range: {0}}}, {{model: odd, layer_range: {0}}}]}}]\n"
        "merge_method: karcher"
    )
    job(text.format("[0, 2]"))
    with pytest.raises(
        InputError, match=r"one and odd do not have the same tensors: only odd has .self_attn.q_proj.bias"
    ):
        job(text.format("[2, 5]"))


def test_models_of_several_towers_are_merged_whole(tmp_path, monkeypatch, run, job):
    monkeypatch.chdir(tmp_path)
    for name, value in (("one", 0.0), ("two", 1.0)):
        tensors = {
            f"{tower}.layers.{i}.w": torch.full((2,), value) for tower, n in (("enc", 3), ("dec", 2)) for i in range(n)
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    merged = run(LINEAR.format(one="[1, 0]", two="[0, 1]"))
    assert [float(merged[f"enc.layers.{i}.w"][0]) for i in range(3)] == [0, 0.5, 1]
    assert [float(merged[f"dec.layers.{i}.w"][0]) for i in range(2)] == [0, 1]
    with pytest.raises(
        InputError, match=r"one has several stacks of layers \(dec.layers., enc.layers.\): merge it whole"
    ):
        job("slices: [{sources: [{model: one, layer_range: [0, 1]}]}]\nmerge_method: passthrough")


def test_models_that_tie_their_embeddings_and_others_are_not_stacked(models, tmp_path, job):
    (tmp_path / "one" / "config.json").write_text(json.dumps({"num_hidden_layers": 5, "tie_word_embeddings": True}))
    with pytest.raises(InputError, match="only some of one, two tie input and output embeddings"):
        job(FRANKEN)
