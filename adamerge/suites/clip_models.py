"""CLIP models of two libraries: how each builds its towers, names its tensors and makes text features."""

import difflib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adamerge.checkpoints import hub_folder, meta, open_state
from adamerge.errors import InputError
from adamerge.files import expanded
from adamerge.plain_files import read_json
from adamerge.suites.zero_shot import Encode, TextModel, locate, text_model

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_hub_folder = cache(hub_folder)  # one look at the Hub per model and run
_OPEN_CLIP_ARGUMENTS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias", "nonscalar_logit_scale")


class ClipFamily(ABC):
    """How one library builds a CLIP model and names its tensors."""

    image_size: int
    #: D, the number of features.
    width: int
    #: Tensors of the visual tower that experts may lack; they then use the base's.
    spare: tuple[str, ...] = ()

    @abstractmethod
    def vision(self) -> nn.Module:
        """The visual tower with fresh weights: images [B, 3, H, W] -> features [B, D]."""

    @abstractmethod
    def spellings(self, name: str) -> list[str]:
        """A tensor of the visual tower as each kind of checkpoint names it."""

    @abstractmethod
    def text(self, where: Path) -> TextModel:
        """The text half, from that folder or file."""


class HuggingFaceClip(ClipFamily):
    """Folders as `save_pretrained` of transformers writes them."""

    spare = ("visual_projection.weight",)

    def __init__(self, folder: Path) -> None:
        self.config = _config(folder, "vision", "visual_projection.weight")
        self.image_size, self.width = int(self.config.image_size), int(self.config.projection_dim)

    def vision(self) -> nn.Module:
        return HuggingFaceTower(self.config)

    def spellings(self, name: str) -> list[str]:  # transformers before and since 5
        return [name, name.removeprefix("vision_model.")]

    def text(self, where: Path) -> TextModel:
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        config = _config(where, "text", "text_projection.weight")
        if not any((where / file).is_file() for file in ("tokenizer.json", "vocab.json")):  # transformers makes one up
            raise InputError(f"text model {where} has no tokenizer.json, and no vocab.json with merges.txt")

        def encoder(model: Any) -> Encode:
            tokenizer = CLIPTokenizer.from_pretrained(where)
            how = {"padding": True, "truncation": True, "max_length": config.max_position_embeddings}
            return lambda prompts: model(**tokenizer(prompts, return_tensors="pt", **how)).text_embeds

        decisive = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id")
        settings = {name: getattr(config, name) for name in decisive}
        return text_model(where, lambda: CLIPTextModelWithProjection(config), encoder, settings, lambda name: [name])


class HuggingFaceTower(nn.Module):
    """`CLIPVisionModelWithProjection`, but from images alone to image embeddings alone."""

    def __init__(self, config: Any) -> None:
        from transformers import CLIPVisionModelWithProjection

        super().__init__()
        model = CLIPVisionModelWithProjection(config)
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual_projection(self.vision_model(pixel_values=images).pooler_output)
        return features

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that `CLIPVisionModelWithProjection.from_pretrained` opens."""
        from transformers import CLIPVisionModelWithProjection

        with torch.device("meta"):
            model = CLIPVisionModelWithProjection(self.config)
        model.vision_model, model.visual_projection = self.vision_model, self.visual_projection
        model.save_pretrained(folder)


class OpenClip(ClipFamily):
    """Files of weights of open_clip models, whose attention keeps q, k and v in one tensor."""

    def __init__(self, name: str) -> None:
        self.config = _open_clip_config(name)
        self.image_size, self.width = int(self.config["vision_cfg"]["image_size"]), int(self.config["embed_dim"])

    def vision(self) -> nn.Module:
        visual: nn.Module = self._build().visual
        return visual

    def spellings(self, name: str) -> list[str]:  # the whole model, its visual tower, a module that holds the model
        return [f"visual.{name}", name, f"model.visual.{name}"]

    def text(self, where: Path) -> TextModel:
        def build() -> nn.Module:
            model: nn.Module = self._build()
            del model.visual
            return model

        def encoder(model: Any) -> Encode:
            from open_clip import SimpleTokenizer

            tokenize = SimpleTokenizer(context_length=model.context_length)
            return lambda prompts: model.encode_text(tokenize(prompts))

        settings = {key: value for key, value in self.config.items() if key != "vision_cfg"}
        return text_model(where, build, encoder, settings, lambda name: [name, f"model.{name}"])

    def _build(self) -> Any:
        from open_clip import CLIP

        return CLIP(**self.config)


class Tensors(Mapping[str, Tensor]):
    """A state dict put together from others: for every name, the state that holds the tensor and its name there."""

    def __init__(self, places: dict[str, tuple[Mapping[str, Tensor], str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        state, old = self._places[name]
        return state[old]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:  # without reading, unlike Mapping's own
        return name in self._places

    def meta(self, name: str) -> Tensor:
        """Shape and dtype of one tensor, without reading it."""
        return meta(*self._places[name])


def open_tower(
    owner: str, where: str, shapes: Mapping[str, Tensor], family: ClipFamily, spare: Mapping[str, Tensors]
) -> Tensors:
    """The visual tower of a checkpoint; what it lacks comes from `spare`."""
    state = open_state(local_path(where, owner))
    names = locate(f"{owner} ({where})", state, shapes, family.spellings, spare)
    return Tensors({name: (state, names[name]) if name in names else (spare[name], name) for name in shapes})


def local_path(where: str, owner: str) -> Path:
    """A local file or folder, or the folder of a Hub id, downloaded if need be."""
    path = expanded(where)
    if path.exists():
        return path
    if _HUB_ID.fullmatch(where) and not path.parent.exists():
        return _hub_folder(where)
    raise InputError(f"{owner}: no such file or folder: {path}")


def _config(folder: Path, half: Literal["vision", "text"], projection: str) -> Any:
    """The configuration of one half of a Hugging Face CLIP model, as wide as its projection in fact is."""
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    path = folder / "config.json"
    try:
        kind = read_json(path)["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder} is no Hugging Face CLIP folder: {why} on reading its config.json") from error
    kinds = {"clip": CLIPConfig, f"clip_{half}_model": CLIPVisionConfig if half == "vision" else CLIPTextConfig}
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{path} is of model type {kind!r}; expected {' or '.join(kinds)}")
    config: Any = kinds[kind].from_pretrained(folder)
    config = getattr(config, f"{half}_config", config)
    config.dtype = torch.float32  # whatever it was saved in: parts of the model would follow
    if projection in set(state := open_state(folder)):
        config.projection_dim = meta(state, projection).shape[0]
    return config


def _open_clip_config(name: str) -> dict[str, Any]:
    """An open_clip architecture as arguments of `open_clip.CLIP`."""
    import open_clip

    try:
        config = json.loads(Path(name).read_text()) if name.endswith(".json") else open_clip.get_model_config(name)
    except (OSError, ValueError) as error:
        raise InputError(f"open_clip config {name} cannot be read: {error}") from error
    if config is None:
        near = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), n=4)) or "open_clip.list_models()"
        raise InputError(f"open_clip has no architecture {name!r}; see {near}")
    config = config.get("model_cfg", config) if isinstance(config, dict) else {}
    if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]:
        raise InputError(f"open_clip config {name} has no {', '.join(missing)}")
    foreign = {"hf_model_name", "hf_tokenizer_name"} & set(config["text_cfg"])
    if foreign or config.get("custom_text") or "multimodal_cfg" in config:
        raise InputError(f"open_clip {name!r}: only CLIP's own text tower and tokenizer are supported")
    return {key: value for key, value in config.items() if key in _OPEN_CLIP_ARGUMENTS}
