"""What a tensor is, read from its name: the policy table that every merge shares.

| kind       | example                            | merged as                                       |
|------------|------------------------------------|-------------------------------------------------|
| parameter  | weights, biases, norms, embeddings | base + combined deltas                          |
| statistics | BatchNorm running mean, variance   | mean over the experts: a variance stays positive |
| constant   | position ids, counters, masks      | copied from the base                            |

Blocks are discovered from numbers in names; which tensors embed tokens, head a model or fuse queries, keys and values
is said by patterns for each family of architectures (`FAMILIES`), which are data: a new family is one line.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["parameter", "statistics", "constant"]
Role = Literal["embedding", "head", "final", "qkv"]

_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")
_TABLE = re.compile(
    r"(^|\.)(wte|wpe|shared|relative_attention_bias|relative_position_bias_table|(?!patch)\w*embed(?!_out)\w*)(\.weight)?$"
)
_INDEX = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")


@dataclass(frozen=True)
class Family:
    """How one family of architectures names its parts: patterns for the end of a name.

    Attributes:
        name: of the family.
        embedding: the token embedding, one row per token.
        head: what turns features into logits, one row per token or class.
        final: norms and projections between the last block and the head.
        qkv: queries, keys and values in one tensor, one after the other along the longer side.
    """

    name: str
    embedding: str = ""
    head: str = ""
    final: str = ""
    qkv: str = ""


FAMILIES = (
    Family("Llama, Mistral, Qwen, Gemma", r"embed_tokens\.weight", r"lm_head\.(weight|bias)", r"model\.norm\.\w+"),
    Family("GPT-2", r"wte\.weight", r"lm_head\.weight", r"ln_f\.\w+", r"attn\.c_attn\.(weight|bias)"),
    Family("GPT-NeoX, Pythia", r"embed_in\.weight", r"embed_out\.weight", r"final_layer_norm\.\w+"),
    Family("BERT, RoBERTa", r"word_embeddings\.weight", r"(lm_head|predictions)\.(\w+\.)*(weight|bias)", r"pooler\..+"),
    Family("T5, BART", r"shared\.weight", r"(lm_head\.weight|final_logits_bias)", r"final_layer_norm\.weight"),
    Family("CLIP", r"token_embedding\.weight", "", r"(post_layernorm|final_layer_norm|\w+_projection)\.\w+"),
    Family("OpenCLIP", "", "", r"(ln_post|ln_final)\.\w+|proj|text_projection", r"in_proj_(weight|bias)"),
    Family("timm, DINO", "", r"head\.(weight|bias)", r"(?<!\.)(fc_norm|norm)\.\w+", r"attn\.qkv\.(weight|bias)"),
    Family("ResNet and other classifiers", "", r"(fc|classifier)\.(weight|bias)"),
)


def kind(name: str, tensor: Tensor) -> Kind:
    """The kind of one tensor of a state dict."""
    if not tensor.is_floating_point():
        return "constant"
    return "statistics" if _STATISTICS.search(name) else "parameter"


def role(name: str) -> Role | None:
    """What a parameter does, where its name tells."""
    inside = _INDEX.search(name) is not None
    for which in ("qkv",) if inside else ("embedding", "head", "final", "qkv"):
        if any(re.search(rf"(^|\.)({getattr(family, which)})$", name) for family in FAMILIES if getattr(family, which)):
            return which  # type: ignore[return-value]
    return None


def is_table(name: str) -> bool:
    """Whether a tensor's rows are looked up, by token or position or type, where no layer multiplies it."""
    return _TABLE.search(name) is not None


def block_of(names: Iterable[str]) -> dict[str, str]:
    """Group parameter names by the block they sit in.

    A block is the first numbered container on the way to a tensor (`encoder.layers.3.mlp.fc1.weight` is in
    `encoder.layers.3`); what is outside any block is grouped by its outermost modules, up to two of them.
    Stacks that hold other stacks (`layer1.0.conv1.weight` in a ResNet) split at the first number as well.
    """
    blocks = {}
    for name in names:
        found = _INDEX.search(name)
        blocks[name] = name[: found.end()] if found else ".".join(name.split(".")[:-1][:2]) or name
    return blocks


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep every tensor lies, from 0 in the first block of its stack to 1 in the last.

    Outside any block, heads and what stands between the last block and a head are at 1, all else is at 0.
    """
    names = list(names)
    places = {name: (name[: found.start()], int(found[1])) for name in names if (found := _INDEX.search(name))}
    last: dict[str, int] = {}
    for stack, index in places.values():
        last[stack] = max(index, last.get(stack, 0))
    depth = {name: index / max(last[stack], 1) for name, (stack, index) in places.items()}
    return {name: depth.get(name, float(role(name) in ("head", "final"))) for name in names}
