"""Experts that are LoRA adapters: what peft makes of the same folders, and one sentence for what cannot be merged."""

import io
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adamerge import InputError, TaskVectors, merge
from adamerge.adapters import Adapted
from adamerge.checkpoints import open_state
from adamerge.deltas import LowRank
from adamerge.mergekit import read
from adamerge.recipes import job, parse
from adamerge.rules import ElectSign, Mean, Trim
from adamerge.running import run

# What peft asks transformers for has another name by now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
ADAPTERS = {
    "math": LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
    "code": LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_rslora=True,
        rank_pattern={"up_proj": 4}, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 2},
    ),
}  # fmt: skip
Q, UP, DOWN = (f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny language model, two adapters of it, and with peft merged into it each."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=False)).save_pretrained(
        folder / "base"
    )
    for name, config in ADAPTERS.items():
        train(folder, name, AutoModelForCausalLM.from_pretrained(folder / "base"), config)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        merged = PeftModel.from_pretrained(base, folder / name).merge_and_unload()
        merged.save_pretrained(folder / f"{name}-merged")
    return folder


def train(folder: Path, name: str, base: torch.nn.Module, config: LoraConfig) -> None:
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / name)


def adapters(models: Path) -> TaskVectors:
    return TaskVectors.open(models / "base", {name: models / name for name in ADAPTERS})


def test_experts_are_what_peft_makes_of_them(models):
    for tv in (adapters(models), adapters(models).load()):
        for name in ADAPTERS:
            expected = load_file(models / f"{name}-merged" / "model.safetensors")
            assert_close(tv.expert(name), expected, rtol=1e-6, atol=1e-7)
    state = Adapted(open_state(models / "base"), models / "math")
    assert_close(state[Q], load_file(models / "math-merged" / "model.safetensors")[Q], rtol=1e-6, atol=1e-7)
    assert torch.equal(state.rows(Q, slice(3, 9)), state[Q][3:9])
    assert torch.equal(state.rows("lm_head.weight", slice(3, 9)), state["lm_head.weight"][3:9])


def test_deltas_are_factors_as_far_as_all_experts_are_adapters(models):
    deltas = adapters(models).deltas
    assert isinstance(deltas[Q], LowRank)
    assert deltas[Q].left.shape == (2, 16, 3)  # of rank 3 and 2
    assert not deltas[UP][0].any()
    assert deltas[UP][1].any()
    assert isinstance(deltas["lm_head.weight"], torch.Tensor)  # saved whole by one
    assert not deltas["model.embed_tokens.weight"].any()
    both = TaskVectors.open(models / "base", {"math": models / "math", "code": models / "code-merged"}).deltas[Q]
    assert_close(both, deltas[Q].dense(), rtol=0, atol=1e-7)
    assert torch.equal(both[0], deltas[Q][0])


def test_factors_are_not_rounded_to_the_precision_of_the_base(models, tmp_path):
    base = {name: value.bfloat16() for name, value in load_file(models / "base" / "model.safetensors").items()}
    save_file(base, tmp_path / "base.safetensors")
    tv = TaskVectors.open(tmp_path / "base.safetensors", {"math": models / "math"})
    file = load_file(models / "math" / "adapter_model.safetensors")
    a, b = (file[f"base_model.model.{Q.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
    assert_close(tv.deltas[Q].dense()[0], 6 / 3 * b @ a, rtol=0, atol=1e-7)
    assert tv.expert("math")[Q].dtype == torch.bfloat16


@pytest.mark.parametrize("rules", [[Mean()], [Trim(0.4), ElectSign("sum")]], ids=["Mean", "TIES"])
def test_merges_are_those_of_the_merged_models(models, rules, monkeypatch):
    monkeypatch.setattr("adamerge.differences.PIECE", 100)
    whole = TaskVectors.open(models / "base", {name: models / f"{name}-merged" for name in ADAPTERS})
    expected = merge(whole, rules)
    for tv in (adapters(models), adapters(models).load()):
        # Of equal magnitudes a threshold keeps all or none: a few entries may fall on the other side by rounding.
        for name, value in merge(tv, rules).items():
            assert ((value - expected[name]).abs() < 1e-6).float().mean() > 0.98


def test_a_recipe_merges_adapters_into_a_model_that_opens(models, tmp_path):
    asked = job(parse({"base": "base", "experts": {n: n for n in ADAPTERS}, "rules": ["CoPa"], "scale": 0.1}), models)
    out = run(asked, tmp_path / "out", Console(file=io.StringIO()))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert_close(dict(model.state_dict()), merge(adapters(models), asked.rules, 0.1), rtol=0, atol=1e-6)
    assert not (out / "adapter_config.json").exists()
    with pytest.raises(InputError, match="tokenizer is 'math', an adapter"):
        job(parse({"base": "base", "experts": {"math": "math"}, "tokenizer": "math"}), models)


def test_mergekit_adds_adapters_to_models(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    listed = "[{model: base+math, parameters: {weight: 0.3}}, {model: base+code, parameters: {weight: 0.7}}]"
    (tmp_path / "m.yml").write_text(f"merge_method: linear\nmodels: {listed}")
    asked = read(tmp_path / "m.yml")
    math, code = (load_file(models / f"{name}-merged" / "model.safetensors") for name in ADAPTERS)
    expected = {name: 0.3 * math[name] + 0.7 * code[name] for name in math}
    assert_close(merge(asked.task_vectors, asked.rules, asked.scale), expected, rtol=0, atol=1e-6)
    assert asked.sources["base+math (adapter)"] == Path("math")
    (tmp_path / "m.yml").write_text(f"merge_method: linear\nmodels: {listed}".replace("+code", "+code-merged"))
    with pytest.raises(InputError, match="code-merged holds no adapter_config"):
        read(tmp_path / "m.yml")


def test_weights_that_are_kept_transposed(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    train(tmp_path, "x", model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "x")
    expected = peft.merge_and_unload().state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    tv = TaskVectors.open(tmp_path, {"x": tmp_path / "x"})
    assert_close(tv.expert("x")[name], expected[name], rtol=1e-6, atol=1e-7)
    assert_close(tv.piece(name, slice(2, 5))[1], tv.deltas[name].dense()[:, 2:5])
    split = merge(tv, [Mean()], split_fused_qkv=True)[name]
    assert_close(split, expected[name], rtol=1e-6, atol=1e-7)


# -- what cannot be merged ---------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    """Opens an adapter [4, 6] of rank 2 of one module, with changes to its config and its tensors."""
    tensors = {"w.lora_A.weight": torch.ones(2, 6), "w.lora_B.weight": torch.ones(4, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}

    def opened(changes=None, more=None, prefix="base_model.model.", **arguments) -> TaskVectors:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config | (changes or {})))
        held = {prefix + name: value for name, value in (tensors | (more or {})).items() if value is not None}
        save_file(held, tmp_path / "x" / "adapter_model.safetensors")
        save_file({"w.weight": torch.zeros(4, 6), "v.weight": torch.zeros(3)}, tmp_path / "base.safetensors")
        return TaskVectors.open(tmp_path / "base.safetensors", {"x": tmp_path / "x"})

    return opened


@pytest.mark.parametrize(
    ("changes", "more", "prefix"),
    [
        ({}, {}, ""),
        ({"lora_alpha": 8, "alpha_pattern": {"w": 4}}, {}, "base_model.model."),
        (
            {},
            {
                "w.lora_A.weight": None, "w.lora_B.weight": None,
                "w.lora_A.default.weight": torch.ones(2, 6), "w.lora_B.default.weight": torch.ones(4, 2),
                "v.modules_to_save.default.weight": torch.full((3,), 4.0),
            },
            "base_model.model.",
        ),
    ],
)  # fmt: skip
def test_names_in_their_forms(write, changes, more, prefix):
    expert = write(changes, more, prefix).expert("x")
    assert_close(expert["w.weight"], torch.full((4, 6), 4.0))
    assert torch.equal(expert["v.weight"], torch.full((3,), 4.0 if len(more) > 2 else 0.0))


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"peft_type": "IA3"}, {}, "is of type IA3: LORA alone"),
        ({"use_dora": True}, {}, "has use_dora: DoRA scales"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "'pissa_niter_4' changes the base's weights"),
        ({}, {"e.lora_embedding_A": torch.ones(2, 6)}, "adapters of embeddings are not merged"),
        ({}, {"w.lora_magnitude_vector": torch.ones(4)}, "a kind that has .*w.lora_magnitude_vector"),
        ({}, {"w.lora_B.weight": None}, "w has lora_A alone"),
        ({"r": 3}, {}, "w has rank 2, adapter_config.json says 3"),
        ({}, {"w.lora_A.weight": torch.ones(2, 5)}, r"\[2, 5\] and lora_B \[4, 2\] do not make a change of w.weight"),
        ({"fan_in_fan_out": True}, {}, r"\(fan_in_fan_out\) do not make a change of w.weight \[4, 6\]"),
        (
            {},
            {"u.lora_A.weight": torch.ones(2, 6), "u.lora_B.weight": torch.ones(4, 2)},
            "the base has no u.weight, its names are v.weight, w.weight",
        ),
        ({}, {"v.weight": torch.ones(2)}, r"expert 'x': v.weight has shape \[2\], the base has \[3\]"),
    ],
)
def test_adapters_that_are_refused(write, changes, more, words):
    with pytest.raises(InputError, match=words):
        write(changes, more)


def test_values_that_are_not_finite_are_named(write):
    tv = write({}, {"w.lora_B.weight": torch.full((4, 2), float("nan"))})
    with pytest.raises(InputError, match=r"expert 'x' has 8 NaN or infinite values in w\.weight"):
        tv.deltas["w.weight"]


def test_folders_that_are_not_whole(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Adapted({}, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no adapter_model"):
        Adapted({}, tmp_path)
    with pytest.raises(InputError, match="holds an adapter, no model: give it as an expert"):
        open_state(tmp_path)
