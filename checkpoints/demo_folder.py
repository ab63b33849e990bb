"""The files of checkpoints/demo, as a Hugging Face folder holds them; all are written by rename.

The folder stays usable at every moment: another process may load it while a training run ends.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from chat_format import BOS, BOS_ID, CHAT_TEMPLATE, END, END_ID, VOCABULARY
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

DEMO = Path(__file__).parent / "demo"
MAX_MODEL_LEN = 4096
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_MODEL_LEN,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": END_ID,
    "torch_dtype": "float32",
}
GENERATION = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "do_sample": False}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": END,
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": MAX_MODEL_LEN,
}


def write(folder: Path, tokenizer: Tokenizer, weights: Mapping[str, np.ndarray]) -> None:
    """Writes configuration, tokenizer, chat template and weights (Hugging Face names, float32)."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "config.json", _json(CONFIG))
    _replace(folder / "generation_config.json", _json(GENERATION))
    _replace(folder / "tokenizer_config.json", _json(TOKENIZER))
    _replace(folder / "chat_template.jinja", CHAT_TEMPLATE)
    _replace(folder / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")
    part = folder / "model.safetensors.part"
    save_file(dict(weights), part, metadata={"format": "pt"})
    part.chmod(0o644)  # safetensors creates it for its owner only
    part.rename(folder / "model.safetensors")


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Weights of a folder by their Hugging Face names."""
    return dict(load_file(folder / "model.safetensors"))


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.rename(path)
