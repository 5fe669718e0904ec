"""Kinds of tensors and blocks of names, for the layouts of common architectures."""

import pytest
import torch

from adamerge.kinds import block_of, depths, is_table, kind, role

FLOAT, INTEGER = torch.zeros(2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("weight", FLOAT, "parameter"),
        ("logit_scale", torch.tensor(1.0), "parameter"),
        ("encoder.layers.0.norm.weight", FLOAT.half(), "parameter"),
        ("running_mean", FLOAT, "statistics"),
        ("layer1.0.bn1.running_var", FLOAT, "statistics"),
        ("layer1.0.bn1.num_batches_tracked", torch.tensor(3), "constant"),
        ("embeddings.position_ids", INTEGER, "constant"),
        ("attention.mask", torch.ones(2, dtype=torch.bool), "constant"),
        ("not_running_mean", FLOAT, "parameter"),
        ("running_mean.weight", FLOAT, "parameter"),
        ("prerunning_var", FLOAT, "parameter"),
    ],
)
def test_kinds(name, tensor, expected):
    assert kind(name, tensor) == expected


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wpe.weight", True),
        ("embeddings.position_embedding.weight", True),
        ("bert.embeddings.token_type_embeddings.weight", True),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", True),
        ("positional_embedding", True),
        ("pos_embed", True),
        ("gpt_neox.embed_out.weight", False),
        ("patch_embed.proj.weight", False),
        ("embeddings.patch_embedding.weight", False),
        ("encoder.layers.0.self_attn.k_proj.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_tables_are_looked_up(name, table):
    assert is_table(name) == table


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder.layers.3.mlp.fc1.weight", "encoder.layers.3"),
        ("encoder.layers.11.layer_norm1.bias", "encoder.layers.11"),
        ("transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("layer1.0.downsample.1.weight", "layer1.0"),
        ("0.weight", "0"),
        ("embeddings.patch_embedding.weight", "embeddings.patch_embedding"),
        ("embeddings.class_embedding", "embeddings"),
        ("pre_layrnorm.weight", "pre_layrnorm"),
        ("positional_embedding", "positional_embedding"),
        ("prompts.0", "prompts"),
        ("conv2d.weight", "conv2d"),
    ],
)
def test_blocks(name, block):
    assert block_of([name]) == {name: block}


def test_blocks_keep_every_name_in_its_order():
    names = ["head.weight", "blocks.10.w", "blocks.1.w", "blocks.1.b"]
    blocks = block_of(iter(names))
    assert list(blocks) == names
    assert list(blocks.values()) == ["head", "blocks.10", "blocks.1", "blocks.1"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("bert.embeddings.word_embeddings.weight", "embedding"),
        ("text_model.embeddings.token_embedding.weight", "embedding"),
        ("embeddings.position_embedding.weight", None),
        ("lm_head.weight", "head"),
        ("head.bias", "head"),
        ("model.norm.weight", "final"),
        ("transformer.ln_f.bias", "final"),
        ("visual.proj", "final"),
        ("norm.weight", "final"),
        ("blocks.3.norm.weight", None),
        ("model.layers.0.self_attn.q_proj.weight", None),
        ("transformer.resblocks.0.attn.in_proj_weight", "qkv"),
        ("blocks.11.attn.qkv.bias", "qkv"),
        ("h.2.attn.c_attn.weight", "qkv"),
        ("h.2.attn.c_proj.weight", None),
    ],
)
def test_roles(name, expected):
    assert role(name) == expected


def test_depth_is_counted_in_each_stack():
    names = [
        "wte.weight",
        "vision.layers.0.w",
        "vision.layers.4.w",
        "text.h.0.w",
        "text.h.1.w",
        "text.h.2.w",
        "ln_f.bias",
    ]
    assert list(depths(names).values()) == [0, 0, 1, 0, 0.5, 1, 1]
    assert depths(["only.0.w"]) == {"only.0.w": 0}
