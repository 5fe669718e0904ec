"""Files as mergekit's users write them, run on tiny checkpoints in the Hub's format: transformers generates from it."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from adamerge.__main__ import main
from adamerge.checkpoints import open_state
from adamerge.merge import plan
from adamerge.mergekit import read

WORDS = ("<unk>", "</s>", *(f"word{i}" for i in range(22)))
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "eos_token_id": 1,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, tie_word_embeddings=False, sliding_window=None),
}

GRADIENT_SLERP = """
slices:
  - sources:
      - model: org/base
        layer_range: [0, 4]
      - model: org/one
        layer_range: [0, 4]
merge_method: slerp
base_model: org/base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""
TIES = """
models:
  - model: org/one
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: org/two
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: org/three
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
DARE_TIES = """
models:
  - model: org/base
    # no parameters necessary for base model
  - model: org/one
    parameters:
      density: 0.53
      weight: [0.4, 0.3]
  - model: org/two
    parameters:
      density:
        - filter: self_attn
          value: [0.2, 0.8]
        - filter: mlp
          value: 0.6
        - value: 0.4
      weight: 0.3
merge_method: dare_ties
base_model: org/base
parameters:
  int8_mask: true
dtype: bfloat16
tokenizer_source: union
"""
FRANKENMERGE = """
slices:
  - sources:
    - model: org/one
      layer_range: [0, 3]
  - sources:
    - model: org/two
      layer_range: [1, 4]
merge_method: passthrough
dtype: bfloat16
"""
LINEAR = """
models:
  - model: org/one
    parameters:
      weight: 1.0
  - model: org/two
    parameters:
      weight: 0.3
  - model: org/three
    parameters:
      weight: 0.5
merge_method: linear
dtype: float32
tokenizer_source: base
base_model: org/base
parameters: {weight: 0.2} # of the base
"""
FILES = {"slerp": GRADIENT_SLERP, "ties": TIES, "dare_ties": DARE_TIES, "passthrough": FRANKENMERGE, "linear": LINEAR}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def hub(request, tmp_path_factory) -> Path:
    """A folder with checkpoints org/base, org/one, org/two and org/three of one family, each with a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param])
    base = {name: value.clone() for name, value in model.state_dict().items()}
    words = Tokenizer(WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    for name in ("base", "one", "two", "three"):
        if name != "base":
            with torch.no_grad():
                for key, value in model.named_parameters():
                    value.copy_(base[key] + 0.02 * torch.randn(value.shape))
        model.bfloat16().save_pretrained(folder / "org" / name)
        model.float()
        tokenizer.save_pretrained(folder / "org" / name)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    state = open_state(folder)
    return {name: state[name].float() for name in state}


@pytest.mark.parametrize("kind", sorted(FILES))
def test_transformers_generates_from_the_merge(hub, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(hub)
    (tmp_path / "merge.yml").write_text(FILES[kind])
    monkeypatch.setattr(
        sys, "argv", ["adamerge", "merge", str(tmp_path / "merge.yml"), f"--output={tmp_path / 'merged'}"]
    )
    main()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert model.config.num_hidden_layers == len(model.model.layers) == (6 if kind == "passthrough" else 4)
    prompt = PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")("word1 word2", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        assert bool(model(prompt).logits.isfinite().all())
        assert model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=1).shape[1] > prompt.shape[1]


def test_gradients_and_filters_reach_the_tensors_they_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(hub)
    (tmp_path / "merge.yml").write_text(GRADIENT_SLERP)
    job = read(tmp_path / "merge.yml")
    merged = plan(job.task_vectors, job.rules, dtype=torch.float32)
    base, one = tensors(hub / "org" / "base"), tensors(hub / "org" / "one")
    first, last = "model.layers.0.", "model.layers.3."
    for name, value in merged.items():
        if (name.startswith(first) and "self_attn" in name) or (name.startswith(last) and "mlp" in name):  # t = 0
            assert_close(value, base[name])
        elif (name.startswith(last) and "self_attn" in name) or (name.startswith(first) and "mlp" in name):  # t = 1
            assert_close(value, one[name])


def test_a_weight_of_zero_leaves_a_model_out(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(hub)
    start, stop = TIES.index("  - model: org/three"), TIES.index("merge_method")
    merged = []
    for text in (TIES, TIES[:start] + TIES[stop:]):
        (tmp_path / "merge.yml").write_text(text)
        job = read(tmp_path / "merge.yml")
        merged.append(dict(plan(job.task_vectors, job.rules)))
    assert {name for name in merged[0] if not torch.equal(merged[0][name], merged[1][name])} == {
        name for name in merged[0] if "mlp" in name
    }


@pytest.mark.parametrize("hub", ["qwen2"], indirect=True)
def test_a_model_may_hold_its_tied_head(hub, tmp_path, monkeypatch):
    """Or leave it out: of models that tie head and embedding, both kinds of file are about."""
    shutil.copytree(hub, tmp_path / "hub")
    monkeypatch.chdir(tmp_path / "hub")
    weights = load_file("org/one/model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, "org/one/model.safetensors")
    text = "models: [{model: org/one}, {model: org/two}]\nmerge_method: task_arithmetic\nbase_model: org/base\n"
    (tmp_path / "merge.yml").write_text(text + "parameters: {weight: 0.5}")
    assert "lm_head.weight" not in read(tmp_path / "merge.yml").task_vectors.base
    for first, second in (("one", "two"), ("two", "one")):
        (tmp_path / "merge.yml").write_text(
            f"slices:\n- sources: [{{model: org/{first}, layer_range: [0, 2]}}]\n"
            f"- sources: [{{model: org/{second}, layer_range: [2, 4]}}]\nmerge_method: passthrough\n"
        )
        job = read(tmp_path / "merge.yml")
        assert ("lm_head.weight" in job.task_vectors.base) == (first == "one")
        if first == "one":  # which says that it is tied: the head of `two` is its embedding
            head = dict(plan(job.task_vectors, job.rules))["lm_head.weight"]
            assert torch.equal(head, load_file("org/two/model.safetensors")["model.embed_tokens.weight"])
