"""What of a mergekit file is refused, and what is said."""

import json
from pathlib import Path

import pytest
import torch

from adamerge import InputError
from adamerge.mergekit import read
from adamerge.mergekit.companions import vocabulary

ONE = "merge_method: linear\nmodels: [{model: one}]\n"
# -- what is refused, and what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a mapping"),
        ("a: [1", "not one YAML document"),
        ("merge_method: linear\nmodells: []", "unknown key 'modells': did you mean 'models'"),
        ("merge_method: liner\nmodels: []", "merge_method 'liner' is not supported: did you mean 'linear'"),
        ("merge_method: zipit\nmodels: []", "'zipit' is not supported; there are breadcrumbs, "),
        ("merge_method: linear", "either `models` or `slices`"),
        ("merge_method: linear\nmodels: []", "models: expected a list"),
        ("merge_method: ties\nmodels: [{model: one}]", "ties needs a `base_model`"),
        ("merge_method: linear\nmodels: [{modle: one}]", r"unknown key 'modle' in models\[0\]: did you mean 'model'"),
        ("merge_method: linear\nmodels: [{parameters: {}}]", r"models\[0\] names no `model`"),
        (ONE + "normalize: false", "normalize belongs under `parameters`: mergekit does not see it"),
        (ONE + "parameters: {wieght: 1}", "'wieght' in parameters: .* 'weight'"),
        (ONE + "parameters: {weight: much}", "parameters.weight: expected a number"),
        (ONE + "parameters: {weight: .nan}", "expected a finite number"),
        (ONE + "parameters: {weight: []}", "parameters.weight is an empty list"),
        (
            ONE + "parameters: {weight: [{pattern: mlp, value: 1}]}",
            r"unknown key 'pattern' in parameters.weight\[0\]; there are filter, value",
        ),
        (ONE + "dtype: float15", "dtype 'float15' .* did you mean 'float16'"),
        ("merge_method: linear\nmodels: [{model: one+lora}]", "no such model: one$|no such model: lora"),
        ("merge_method: linear\nmodels: [{model: one++lora}]", "expected one adapter after the model"),
        ("merge_method: linear\nmodels: [{model: org/one@main}]", "names a revision"),
        ("merge_method: linear\nmodels: [{model: {path: one}}]", "expected a folder or Hub id"),
        ("merge_method: linear\nmodels: [{model: ./nowhere}]", "no such model: ./nowhere"),
        ("merge_method: linear\nmodels: [{model: ~nobody-at-all/x}]", "~nobody-at-all/x: there is no home folder"),
        (f"merge_method: linear\nmodels: [{{model: {'y' * 300}}}]", "no such model: yyy"),
        (
            f"merge_method: linear\nmodels: [{{model: one, parameters: {{weight: {10**400}}}}}]",
            "expected a number, got 1000",
        ),
        ("merge_method: linear\nmodules: {}", "`modules` is not supported"),
        ("base_model: one\ngate_mode: hidden\nexperts: []", "mixtures of experts are not built here"),
        ("merge_method: karcher\nmodels: [{model: one}, {model: one}]", "listed twice: one, one"),
        ("merge_method: linear\nmodels: [{model: one}, {model: two}]", "one has no `weight` for lm_head.weight"),
        (
            ONE + "parameters: {weight: [{filter: mlp, value: 1}]}",
            "one has no `weight` for lm_head.weight: .* the last needs no filter",
        ),
        (ONE + "parameters: {weight: 0}", "the weights sum to 0 .* set `normalize: false`"),
        (
            "merge_method: multislerp\nmodels: [{model: one}]\nparameters: {weight: 0}",
            "the weights sum to 0 .* set `normalize_weights: false`",
        ),
        (
            "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}]\nbase_model: zero",
            "zero, the base_model, is one of the models that linear merges, and has no `weight` for lm_head.weight",
        ),
        (
            "merge_method: passthrough\nmodels: [{model: one}]\nbase_model: zero",
            "passthrough takes 1 models with the base_model, got 2",
        ),
        ("merge_method: slerp\nmodels: [{model: one}]\nbase_model: zero", "slerp has no `t` for lm_head.weight"),
        (
            "merge_method: slerp\nmodels: [{model: one}, {model: two}]\nbase_model: zero",
            "slerp takes 1 models besides the base_model, got 2",
        ),
        ("merge_method: passthrough\nmodels: [{model: one}, {model: two}]", "passthrough takes 1 models, got 2"),
        ("merge_method: model_stock\nmodels: [{model: one}]\nbase_model: zero", "takes at least 2 models besides"),
        (
            "merge_method: ties\nmodels: [{model: one}]\nbase_model: zero\nparameters: {weight: 1, density: -1}",
            "one, lm_head.weight: expected density >= 0, got -1",
        ),
        (
            "merge_method: della\nmodels: [{model: one}]\nbase_model: zero\nparameters: {weight: 1, density: 0.9}",
            "0 < density ± epsilon < 1, got 0.9 ± 0.15",
        ),
        (
            "merge_method: breadcrumbs\nmodels: [{model: one}]\nbase_model: zero\nparameters: {weight: 1, gamma: 1}",
            "expected 0 <= gamma < 1, got 1",
        ),
        ("merge_method: linear\nslices: [{sources: [{model: one}]}]", r"layer_range: expected \[start, stop\]"),
        ("merge_method: linear\nslices: [{sources: [{model: one, layer_range: [3, 2]}]}]", r"got \[3, 2\]"),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: one, layer_range: [0, 6]}]}]",
            "one has 5 layers: there is no layer 5",
        ),
        (
            "merge_method: linear\n"
            "slices: [{sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [0, 3]}]}]",
            "different numbers of layers",
        ),
        (
            "merge_method: ties\nbase_model: zero\n"
            "slices: [{sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [1, 3]}]}]",
            "list the base model zero among its sources",
        ),
        (
            ONE + "tokenizer_source: base\ntokenizer: {source: base}",
            "either `tokenizer_source` or `tokenizer`",
        ),
        (
            ONE + "tokenizer: {source: base, tokens: {a: {source: one}}}",
            "tokenizer.tokens is not supported",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(models, text, message, job):
    with pytest.raises(InputError, match=message):
        job(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.yml cannot be read"):
        read(tmp_path / "nothing.yml")


def test_what_has_no_effect_is_said(models, job):
    text = """
models: [{model: one, parameters: {weight: 1, density: 0.5, normalize: false}}, {model: zero}]
merge_method: linear
base_model: zero
parameters: {weight: 1, int8_mask: true, t: 0.5}
chat_template: auto
dtype: bfloat16
random_seed: 3
"""
    assert job(text).notes == (
        "random_seed has no effect, as in mergekit",
        "density has no effect: linear does not use it",
        "normalize has no effect under models[0].parameters: it belongs to the `parameters` of the merge",
        "int8_mask has no effect: masks take one byte per entry anyway",
        "t has no effect: linear does not use it",
        "chat_template has no effect: the tokenizer keeps its own",
        "computed in float32 and rounded once, where mergekit computes in bfloat16",
    )


def test_experts_in_a_layer_are_said_to_be_merged_one_by_one(models, save, job):
    text = "merge_method: karcher\nmodels: [{model: one}"
    assert job(text + "]").notes == ()
    save("mixture", {name.replace("up_proj", "experts.0.w1"): value for name, value in models["one"].items()})
    assert "mixture's experts are merged one by one" in job(text.replace("one", "mixture") + "]").notes[0]


def test_the_precision_of_half_models_is_said(models, save, job):
    said = "computed in float32 and rounded once, where mergekit computes in {}"
    save("half", {name: value.half() for name, value in models["one"].items()})
    text = "models: [{model: half}]\nmerge_method: karcher\n"
    assert said.format("float16") in job(text).notes
    assert said.format("bfloat16") in job(text + "dtype: bfloat16").notes
    assert job(text + "dtype: float32\nout_dtype: float16").notes == ()


@pytest.mark.parametrize(("method", "said"), [("dare_ties", "random masks"), ("sce", "energy"), ("slerp", "on a line")])
def test_differences_by_design_are_said(models, method, said, job):
    found = job(
        f"models: [{{model: one}}]\nmerge_method: {method}\nbase_model: zero\nparameters: {{weight: 1, t: 0.5}}"
    )
    assert said in " ".join(found.notes)


def test_config_and_tokenizer_are_those_of_the_base_if_one_is_named(models, job):
    text = "models: [{model: one}, {model: two}]\nmerge_method: linear\nparameters: {weight: 1}\n"
    assert job(text).copy_from == Path("one")
    assert job(text + "base_model: zero").copy_from == Path("zero")


def test_out_dtype_goes_before_dtype(models, run, job):
    text = "models: [{model: one}]\nmerge_method: passthrough\ndtype: float32\n"
    assert job(text).dtype == torch.float32
    assert job(text + "out_dtype: float16").dtype == torch.float16
    assert {value.dtype for value in run(text + "out_dtype: float16").values()} == {torch.float16}


# -- tokenizers --------------------------------------------------------------------------------------------------------


def tokens(folder: Path, *words: str) -> None:
    vocab = {word: row for row, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))


@pytest.mark.parametrize("source", ["base", "union", "two", "model:two"])
def test_a_tokenizer_of_the_same_words(models, tmp_path, source, job):
    text = f"models: [{{model: one}}, {{model: two}}]\nmerge_method: karcher\ntokenizer_source: {source}"
    for name in ("one", "two"):
        tokens(tmp_path / name, "a", "b")
    job(text)
    tokens(tmp_path / "two", "b", "a")
    with pytest.raises(InputError, match=f"tokenizer {source.removeprefix('model:')!r} is not supported"):
        job(text)


def test_other_words_are_said(models, tmp_path, job):
    tokens(tmp_path / "one", "a", "b")
    tokens(tmp_path / "two", "b", "a")
    assert (
        "two has another vocabulary than one"
        in job("models: [{model: one}, {model: two}]\nmerge_method: karcher").notes[-1]
    )


def test_the_config_is_the_base_models_whoever_the_tokenizer_is_from(models, tmp_path, job):
    for name, eos in (("one", 1), ("two", 2)):
        tokens(tmp_path / name, "a", "b")
        (tmp_path / name / "config.json").write_text(json.dumps({"eos_token_id": eos, "num_hidden_layers": 5}))
    found = job("models: [{model: one}, {model: two}]\nmerge_method: karcher\ntokenizer_source: two")
    assert found.copy_from == Path("two")
    assert found.config == {"eos_token_id": 1}


def test_vocabularies_are_read_from_what_there_is(tmp_path):
    assert vocabulary(tmp_path) is None
    (tmp_path / "vocab.txt").write_bytes(b"a")
    assert vocabulary(tmp_path) == b"a"
    added = [{"content": "c", "id": 7}]
    unigram = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert vocabulary(tmp_path) == {"a": 0, "b": 1, "c": 7}


def test_rotary_frequencies_are_left_out(models, tmp_path, save, run):
    """Old Llama checkpoints hold them, fine-tuned ones do not."""
    save("old", models["zero"] | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    for rows in ("[{model: old}, {model: one}]", "[{model: one}, {model: old}]"):
        assert sorted(run(f"models: {rows}\nmerge_method: karcher")) == sorted(models["zero"])
