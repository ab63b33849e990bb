"""What a model's makers recommend for sampling: generation_config.json."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from duetjax.checkpoint.folder import read_object, shown
from duetjax.config import ModelConfig, ModelFolderError, token_ids

_FILE = "generation_config.json"
# Sampling keys that are not served yet, with the values that change nothing.
_UNUSED: Mapping[str, tuple[float, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Defaults for requests that leave a parameter out.

    temperature, max_tokens: None where the model recommends nothing. eos_token_ids end every
    request: generation_config.json's, or config.json's if that names none. ignored: names of
    recommended sampling parameters that are not served.
    """

    temperature: float | None = None
    max_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()


def read_generation(folder: Path, config: ModelConfig) -> GenerationDefaults:
    """Reads a folder's generation_config.json, which may be missing; unknown keys are ignored.

    As in vLLM, temperature counts whatever do_sample says, and max_new_tokens is max_tokens.
    `ModelFolderError` names the key at fault.
    """
    if not os.path.lexists(folder / _FILE):
        return GenerationDefaults(eos_token_ids=config.eos_token_ids)
    hf = read_object(folder / _FILE)
    temperature, max_tokens = hf.get("temperature"), hf.get("max_new_tokens")
    if temperature is not None and not (
        type(temperature) in (int, float) and 0 <= temperature <= 2
    ):
        raise _fault(folder, "temperature", "a number from 0 to 2", temperature)
    if max_tokens is not None and not (type(max_tokens) is int and 1 <= max_tokens < 2**31):
        raise _fault(folder, "max_new_tokens", "an integer of at least 1", max_tokens)
    eos = token_ids(hf.get("eos_token_id"), f"{shown(folder / _FILE)}: eos_token_id")
    return GenerationDefaults(
        temperature=None if temperature is None else float(temperature),
        max_tokens=max_tokens,
        eos_token_ids=eos or config.eos_token_ids,
        ignored=tuple(
            key for key, neutral in _UNUSED.items() if hf.get(key) not in (None, *neutral)
        ),
    )


def _fault(folder: Path, key: str, wanted: str, value: object) -> ModelFolderError:
    return ModelFolderError(
        f"{shown(folder / _FILE)}: {key} must be {wanted}, not {shown(repr(value))}; correct it"
    )
