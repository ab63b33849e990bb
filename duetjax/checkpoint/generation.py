"""What a model's makers recommend for sampling: generation_config.json."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duetjax.checkpoint.folder import read_object, shown
from duetjax.config import InvalidRequest, ModelConfig, ModelFolderError, SamplingParams, token_ids

_FILE = "generation_config.json"
# The file's names of what `SamplingParams` has, and ours.
_SERVED: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# Sampling keys that are not served, with the values that change nothing.
_UNUSED: Mapping[str, tuple[float, ...]] = {
    "typical_p": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
}
_NO_ADVICE = SamplingParams(max_tokens=None)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Defaults for requests that leave a parameter out.

    sampling: what the model's makers recommend over the API's own defaults; its max_tokens is None
    where they recommend none. eos_token_ids end every request: generation_config.json's, or
    config.json's if that names none, without those beyond the vocabulary, which are never sampled.
    ignored: names of recommended sampling parameters that are not served.
    """

    sampling: SamplingParams = _NO_ADVICE
    eos_token_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()


def read_generation(folder: Path, config: ModelConfig) -> GenerationDefaults:
    """Reads a folder's generation_config.json, which may be missing; unknown keys are ignored.

    As in vLLM, sampling parameters count whatever do_sample says, and max_new_tokens is max_tokens.
    `ModelFolderError` names the key at fault.
    """
    hf = read_object(folder / _FILE) if os.path.lexists(folder / _FILE) else {}
    eos = token_ids(hf.get("eos_token_id"), f"{shown(folder / _FILE)}: eos_token_id")
    return GenerationDefaults(
        sampling=_sampling(hf, folder),
        eos_token_ids=tuple(t for t in eos or config.eos_token_ids if t < config.vocab_size),
        ignored=tuple(
            key for key, neutral in _UNUSED.items() if hf.get(key) not in (None, *neutral)
        ),
    )


def _sampling(hf: Mapping[str, Any], folder: Path) -> SamplingParams:
    given = {ours: hf[key] for key, ours in _SERVED.items() if hf.get(key) is not None}
    try:
        return SamplingParams(**{"max_tokens": None} | given)
    except InvalidRequest as fault:
        [key] = [key for key, ours in _SERVED.items() if ours == fault.param]
        reason = str(fault).removeprefix(fault.param or "")
        raise ModelFolderError(f"{shown(folder / _FILE)}: {key}{reason}; correct it") from None
