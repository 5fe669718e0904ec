"""Two small backbones, images in and features out: the ViT of suite Mini and an MLP for tests."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / √d) v per head: (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, dim / heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """The feed-forward half of a block: fc2(gelu(fc1 x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """A ViT for small images: stride-2 convolutions, `depth` blocks, one feature (B, dim).

    The stem halves the image until one token covers `patch` pixels: 32 × 32 gives 4 × 4 tokens.
    The feature is the normed class token, or the mean of the normed tokens without one.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch: int = 8,
        dim: int = 96,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        if patch < 2 or patch != 1 << halvings or image_size % patch:
            raise ValueError(f"patch must be a power of two that divides image_size {image_size}, got {patch}")
        widths = [3, *(max(8, dim >> (halvings - 1 - i)) for i in range(halvings - 1)), dim]
        layers: list[nn.Module] = []
        for wide_in, wide_out in pairwise(widths):
            layers += [nn.Conv2d(wide_in, wide_out, 3, stride=2, padding=1), nn.GELU()]
        self.stem = nn.Sequential(*layers[:-1])  # the last convolution embeds, so no activation
        self.cls = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.dim = dim

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)  # (B, N, dim)
        if x.shape[1] != self.pos.shape[1]:
            raise ValueError(f"images of {tuple(images.shape[-2:])} give {x.shape[1]} tokens, not {self.pos.shape[1]}")
        x = x + self.pos
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x.mean(dim=1) if self.cls is None else x[:, 0]


class MLP(nn.Module):
    """Flatten, then Linear and ReLU `depth` times: features (B, dim) for tests and laptops."""

    def __init__(self, image_size: int = 32, channels: int = 3, dim: int = 64, depth: int = 2) -> None:
        super().__init__()
        sizes = [channels * image_size**2] + [dim] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dim = dim

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return x
