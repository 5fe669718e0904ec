"""MLPs, linear layers and residual blocks found in networks of many libraries."""

import pytest
import torch
import torchvision
import transformers as hf
from torch import nn

from adamerge import InputError
from adamerge.backbones import MLP, TinyViT
from modules.structure import Site, blocks, is_transposed, linears, matching, mlps, sizes

DIM, HIDDEN = 16, 32
SMALL = {"hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip() -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**SMALL, image_size=16, patch_size=8))


def open_clip() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(16, 8, width=DIM, layers=2, heads=2, mlp_ratio=2.0, output_dim=8)


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, DIM, HIDDEN, num_classes=3)


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    size = {"img_size": 16, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return timm.models.VisionTransformer(**size, num_classes=3)


def timm_swiglu() -> nn.Module:
    timm = pytest.importorskip("timm")
    size = {"img_size": 16, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return timm.models.VisionTransformer(**size, num_classes=3, mlp_layer=timm.layers.SwiGLU)


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**SMALL, vocab_size=20, max_position_embeddings=8))


def gpt2() -> nn.Module:
    return hf.GPT2Model(hf.GPT2Config(vocab_size=20, n_positions=8, n_embd=DIM, n_layer=2, n_head=2, n_inner=HIDDEN))


def t5(gated: bool = False, inner: int = DIM) -> nn.Module:
    size = {"vocab_size": 20, "d_model": DIM, "d_kv": inner // 2, "num_heads": 2, "d_ff": HIDDEN, "num_layers": 2}
    return hf.T5Model(hf.T5Config(**size, feed_forward_proj="gated-gelu" if gated else "relu"))


def llama(head_dim: int = DIM // 2) -> nn.Module:
    return hf.LlamaModel(hf.LlamaConfig(**SMALL, num_key_value_heads=1, head_dim=head_dim, vocab_size=20))


def tiny(ratio: float = 2.0) -> nn.Module:
    return TinyViT(image_size=16, patch=8, dim=DIM, depth=2, heads=2, mlp_ratio=ratio)


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def numbered(place: str, *layers: str) -> dict[str, tuple[str, ...]]:
    return {place.format(i): tuple(layer.format(i) for layer in layers) for i in range(2)}


def t5_mlps(*ups: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for stack, layer in (("encoder", 1), ("decoder", 2)):
        place = f"{stack}.block.{{}}.layer.{layer}.DenseReluDense"
        found |= numbered(place, *(f"{place}.{up}" for up in ups), f"{place}.wo")
    return found


GATED = "layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj"
FC = "blocks.{}.mlp.fc1", "blocks.{}.mlp.fc2"
RESBLOCK = "transformer.resblocks.{}.mlp"
VISION = "encoder.layers.encoder_layer_{}.mlp"
WHERE = {
    "CLIP of transformers": (
        clip, numbered("encoder.layers.{}.mlp", "encoder.layers.{}.mlp.fc1", "encoder.layers.{}.mlp.fc2")
    ),
    "CLIP of open_clip": (open_clip, numbered(RESBLOCK, f"{RESBLOCK}.c_fc", f"{RESBLOCK}.c_proj")),
    "torchvision": (torchvision_vit, numbered(VISION, f"{VISION}.0", f"{VISION}.3")),
    "timm": (timm_vit, numbered("blocks.{}.mlp", *FC)),
    "timm, gated": (
        timm_swiglu, numbered("blocks.{}.mlp", "blocks.{}.mlp.fc1_g", "blocks.{}.mlp.fc1_x", "blocks.{}.mlp.fc2")
    ),
    "BERT": (
        bert, numbered("encoder.layer.{}", "encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense")
    ),
    "GPT-2": (gpt2, numbered("h.{}.mlp", "h.{}.mlp.c_fc", "h.{}.mlp.c_proj")),
    "T5": (t5, t5_mlps("wi")),
    "T5, gated": (lambda: t5(True), t5_mlps("wi_0", "wi_1")),
    "T5 with wide heads": (lambda: t5(inner=HIDDEN), t5_mlps("wi")),
    "Llama": (llama, numbered("layers.{}.mlp", *GATED)),
    "Llama with wide heads": (lambda: llama(DIM), numbered("layers.{}.mlp", *GATED)),
    "TinyViT": (tiny, numbered("blocks.{}.mlp", *FC)),
    "TinyViT, as wide as qkv": (lambda: tiny(3.0), numbered("blocks.{}.mlp", *FC)),
    "torch": (torch_encoder, numbered("layers.{}", "layers.{}.linear1", "layers.{}.linear2")),
}  # fmt: skip


@pytest.mark.parametrize("name", WHERE)
def test_mlps_are_found_wherever_they_are(name):
    make, expected = WHERE[name]
    model = make()
    sites = mlps(model)
    assert {site.name: site.layers for site in sites} == expected
    assert {site.width for site in sites} == {DIM}
    for site in sites:
        *ups, down = (sizes(model.get_submodule(layer)) for layer in site.layers)
        assert set(ups) == {down[::-1]}


def test_no_mlp():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"Sequential has no MLP .* give the router a scope pattern"):
        mlps(network)


def test_layers_of_squeeze_and_excitation_are_no_mlp():
    with pytest.raises(InputError, match="no MLP"):
        mlps(nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)))


# -- linear layers -----------------------------------------------------------------------------------------------------


def test_sizes_of_a_transposed_layer():
    layer = gpt2().get_submodule("h.0.mlp.c_fc")
    assert is_transposed(layer)
    assert sizes(layer) == (DIM, HIDDEN) == sizes(nn.Linear(DIM, HIDDEN))


def test_projections_that_torchs_attention_does_not_call_are_left_out():
    assert [name for name in linears(torchvision_vit()) if "attention" in name] == []
    assert len(linears(tiny())) == 2 * 4


def test_a_layer_that_shares_its_weight_with_the_embedding_is_left_out():
    config = hf.BertConfig(**SMALL, vocab_size=20, max_position_embeddings=8)
    model = hf.BertForMaskedLM(config)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert [name for name in linears(model) if name.startswith("cls")] == ["cls.predictions.transform.dense"]


# -- patterns ----------------------------------------------------------------------------------------------------------


def test_a_pattern_gives_the_outermost_modules_that_match():
    model = tiny()
    inside = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    whole = [Site(f"blocks.{i}", tuple(f"blocks.{i}.{part}" for part in inside), DIM) for i in range(2)]
    assert matching(model, r"blocks\.\d+") == whole
    assert matching(model, r"blocks\.\d+(\..*)?") == whole
    assert matching(model, r"blocks\.1\.mlp\.fc2") == [Site("blocks.1.mlp.fc2", ("blocks.1.mlp.fc2",), HIDDEN)]
    assert [site.name for site in matching(model, r".*\.attn")] == ["blocks.0.attn", "blocks.1.attn"]


def test_a_pattern_for_names_in_part_or_for_modules_without_linear_layers_matches_nothing():
    for pattern in ("mlp", r"stem.*"):
        with pytest.raises(InputError, match=r"matches '.*'; it has blocks\.0\.attn\.qkv"):
            matching(tiny(), pattern)


# -- blocks ------------------------------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=4)


BLOCKS = {
    "CLIP of transformers": (clip, ["encoder.layers.0", "encoder.layers.1"]),
    "CLIP of open_clip": (open_clip, ["transformer.resblocks.0", "transformer.resblocks.1"]),
    "torchvision": (torchvision_vit, ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]),
    "timm": (timm_vit, ["blocks.0", "blocks.1"]),
    "ResNet": (resnet, ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]),
    "TinyViT": (tiny, ["blocks.0", "blocks.1"]),
    "BERT": (bert, ["encoder.layer.0", "encoder.layer.1"]),
    "GPT-2": (gpt2, ["h.0", "h.1"]),
    "torch": (torch_encoder, ["layers.0", "layers.1"]),
    "a bare stack": (lambda: nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))), ["0", "1"]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_residual_blocks_are_found_wherever_they_are(name):
    make, expected = BLOCKS[name]
    model = make()
    found = blocks(model)
    assert list(found) == expected
    assert all(model.get_submodule(place) is module for place, module in found.items())


def test_no_blocks():
    for model in (MLP(image_size=4), nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.ReLU())):
        with pytest.raises(InputError, match=f"{type(model).__name__} has no stack of blocks of one class"):
            blocks(model)


def test_nothing_is_changed_by_looking():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mlps(model), matching(model, r".*\.mlp"), linears(model), blocks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
