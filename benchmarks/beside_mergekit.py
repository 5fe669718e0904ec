"""Whole merges beside mergekit's: `python -m benchmarks.beside_mergekit --mergekit-yaml PATH`, of an installed one.

Makes a base and four models of a small Llama's shapes in bfloat16, gives both programs the same files, drops them from
the page cache before each merge, and measures seconds and resident memory of the commands. Files are deleted then.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from benchmarks.static_merge import PYTHON, forget, make, measure

MODELS = ("one", "two", "three", "four")


#: By method: which is the base model, how many models there are besides, parameters of the merge and of each model.
METHODS: dict[str, tuple[str | None, int, dict[str, Any], dict[str, float]]] = {
    "linear": (None, 4, {}, {"weight": 0.25}),
    "task_arithmetic": ("base", 4, {}, {"weight": 0.3}),
    "slerp": ("one", 2, {"t": 0.4}, {}),
    "karcher": (None, 4, {}, {}),
    "dare_ties": ("base", 4, {}, {"weight": 0.5, "density": 0.5}),
    "ties": ("base", 4, {"normalize": True}, {"weight": 1.0, "density": 0.2}),
    "sce": ("base", 4, {"select_topk": 0.5}, {}),
}


def recipe(method: str, folder: Path) -> dict[str, Any]:
    """What both programs read."""
    base, count, shared, own = METHODS[method]
    rows = [{"model": str(folder / model), "parameters": own} for model in MODELS[:count]]
    based = {"base_model": str(folder / base)} if base else {}
    return {"models": rows, "merge_method": method, "dtype": "bfloat16", "parameters": shared, **based}


def shapes(width: int, inner: int, vocabulary: int, blocks: int) -> dict[str, torch.Tensor]:
    """Tensors of a Llama, without data."""
    block = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    block |= {f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    block |= {"mlp.down_proj.weight": (width, inner), "input_layernorm.weight": (width,)}
    block |= {"post_attention_layernorm.weight": (width,)}
    every: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    every |= {f"model.layers.{n}.{name}": shape for n in range(blocks) for name, shape in block.items()}
    every |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in every.items()}


def main() -> None:
    """Make, measure by each method, say, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-yaml", type=Path, required=True, help="the program, in an environment of its own")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--folder", type=Path, help="where to put the files; a temporary folder by default")
    asked = parser.parse_args()
    width, inner = asked.width, 11 * asked.width // 4
    config = LlamaConfig(
        vocab_size=asked.vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=asked.blocks,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    tensors = shapes(width, inner, asked.vocabulary, asked.blocks)
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        for n, model in enumerate(("base", *MODELS)):
            make(folder / model, tensors, n)
            config.save_pretrained(folder / model)
        count = sum(tensor.numel() for tensor in tensors.values())
        table = Table(title=f"{count / 1e9:.2f} billion parameters, {torch.get_num_threads()} threads")
        for column in ("method", "adamerge, s", "GB", "mergekit, s", "GB", "times as fast"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for method in asked.methods:
            file, merged = folder / "merge.yml", folder / "merged"
            file.write_text(yaml.safe_dump(recipe(method, folder), sort_keys=False))
            quiet = ["--quiet", "--no-write-model-card", "--no-copy-tokenizer"]
            ours = [*PYTHON, "adamerge", "merge", str(file), "--output", str(merged)]
            theirs = [str(asked.mergekit_yaml.absolute()), str(file), str(merged), *quiet]
            found = []
            for command in (ours, theirs):
                forget(folder)
                found.append(measure(command))
                shutil.rmtree(merged)
            (seconds, peak), (others, most) = found
            row = (seconds, peak, others, most, others / seconds)
            table.add_row(method, *(f"{value:.{digits}f}" for value, digits in zip(row, (1, 2, 1, 2, 1), strict=True)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
