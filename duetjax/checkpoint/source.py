"""What --model means: the bundled demo, a folder, a preset or a hub id, tried in this order."""

import importlib.resources
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from duetjax.checkpoint.folder import read_object, shown
from duetjax.checkpoint.generation import GenerationDefaults, read_generation
from duetjax.checkpoint.weights import check_weights
from duetjax.config import ConfigError, ModelConfig, ModelFolderError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


class SourceKind(StrEnum):
    """Which of the four meanings of --model held."""

    DEMO = "demo"
    FOLDER = "folder"
    PRESET = "preset"
    HUB = "hub"


class LoadFormat(StrEnum):
    """Where weights come from: AUTO reads the folder's files, DUMMY draws random ones."""

    AUTO = "auto"
    DUMMY = "dummy"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model found: `name` is what the server calls it, `folder` is None for a preset."""

    name: str
    kind: SourceKind
    folder: Path | None
    config: ModelConfig
    generation: GenerationDefaults

    @property
    def description(self) -> str:
        """One line for the user: which of the meanings of --model held, and where it is."""
        found = {
            SourceKind.DEMO: "the demo that ships with duetjax, as no --model was given",
            SourceKind.FOLDER: f"the folder {self.folder}",
            SourceKind.PRESET: "a preset, as no folder has that name",
            SourceKind.HUB: f"a hub id, as no folder or preset has that name: {self.folder}",
        }
        return f"model {self.name}: {found[self.kind]}"


def resolve_model(model: str | None, *, load_format: str = LoadFormat.AUTO) -> ModelSource:
    """Finds the model that --model names and reads its configuration, downloading from the hub.

    None is the bundled demo. With load_format "dummy" no weights are looked for, which presets
    need, as they have none. Raises `ModelFolderError`, and `ConfigError` for another load_format.
    """
    if load_format not in list(LoadFormat):
        raise ConfigError(f"--load-format {load_format}: choose {' or '.join(LoadFormat)}")
    weights = load_format == LoadFormat.AUTO
    if model is None:
        return _in_folder("duetjax-demo", SourceKind.DEMO, _demo_folder(), weights)
    if model and os.path.isdir(named := os.path.expanduser(model)):
        folder = Path(named).resolve()
        return _in_folder(folder.name, SourceKind.FOLDER, folder, weights)
    if model in preset_names():
        return _preset(model, weights)
    return _in_folder(model, SourceKind.HUB, _hub_folder(model, weights), weights)


def preset_names() -> tuple[str, ...]:
    """The models known by name, without weights."""
    return tuple(sorted(file.stem for file in _presets_folder().glob("*.json")))


def check_context(config: ModelConfig, max_model_len: int) -> None:
    """Refuses a context that the model was not made for, naming --max-model-len as the cure.

    Sliding windows are not implemented; up to the window they are full attention.
    """
    window = config.sliding_window
    if window is not None and max_model_len > window:
        raise ConfigError(
            f"--max-model-len {max_model_len} exceeds the model's sliding window of {window}"
            f" tokens, which is not supported; use --max-model-len {window} or less"
        )
    if max_model_len > config.max_position_embeddings:
        longest = config.max_position_embeddings
        raise ConfigError(
            f"--max-model-len {max_model_len} exceeds the model's max_position_embeddings;"
            f" use --max-model-len {longest} or less"
        )


def _in_folder(name: str, kind: SourceKind, folder: Path, weights: bool) -> ModelSource:
    hf = read_object(folder / "config.json")
    try:
        config = ModelConfig.from_hf(hf)
    except ModelFolderError as error:
        raise ModelFolderError(f"{shown(folder)}: {error}") from error
    if weights:
        check_weights(folder)
    return ModelSource(name, kind, folder, config, read_generation(folder, config))


def _preset(name: str, weights: bool) -> ModelSource:
    hf = read_object(_presets_folder() / f"{name}.json")
    if weights:
        raise ModelFolderError(
            f"--model {name} is a preset, shapes without weights ({hf['_source']}); add"
            " --load-format dummy for random ones, or give the model's folder or hub id"
        )
    config = ModelConfig.from_hf(hf)
    defaults = GenerationDefaults(eos_token_ids=config.eos_token_ids)
    return ModelSource(name, SourceKind.PRESET, None, config, defaults)


def _hub_folder(model: str, weights: bool) -> Path:
    tried = f"--model {shown(model)}: no such folder, not a preset ({', '.join(preset_names())})"
    if os.path.isfile(model):
        raise ModelFolderError(f"--model {shown(model)} is a file; give the folder that holds it")
    if not _HUB_ID.fullmatch(model):
        raise ModelFolderError(f"{tried}, and not a hub id of the form org/name; correct it")
    from duetjax.checkpoint.hub import download  # slow to import, and needed here only

    try:
        return download(model, weights=weights)
    except ModelFolderError as error:
        raise ModelFolderError(f"{tried}, and on the hub {error}") from error


def _demo_folder() -> Path:
    try:
        config = importlib.resources.files("duetjax.demo") / "config.json"
    except ModuleNotFoundError:
        config = None
    if not isinstance(config, Path) or not config.is_file():
        raise ModelFolderError(
            "the bundled demo model is missing from this installation; give --model,"
            " or install duetjax again"
        )
    return config.parent


def _presets_folder() -> Path:
    return Path(str(importlib.resources.files("duetjax.presets"))) / "models"
