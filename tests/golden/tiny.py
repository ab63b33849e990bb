"""Weights, prompts and checkpoint folders of the tiny models, the same bits on every machine.

Every value is a hash of (tensor name, index), so no weights are committed: whoever has this file
has the checkpoints. Needs the standard library and numpy only, Python 3.11 or newer, because
`make_golden.py` uses it in another environment than the tests do. The safetensors files are written
by hand here, so the reader under test is not fed by its own library's writer.
"""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from golden.tiny_configs import CONFIGS

__all__ = ["CONFIGS", "fingerprint", "prompt", "tensor_shapes", "weights", "write_checkpoint"]


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape ([out, in] for linears) of every tensor that a config.json calls for."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    qwen2 = config["model_type"] == "qwen2"
    qkv_bias = qwen2 or config.get("attention_bias", False)
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden, qkv_bias),
        "self_attn.k_proj": (kv_heads * head_dim, hidden, qkv_bias),
        "self_attn.v_proj": (kv_heads * head_dim, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, heads * head_dim, qkv_bias and not qwen2),
        "mlp.gate_proj": (inner, hidden, config.get("mlp_bias", False)),
        "mlp.up_proj": (inner, hidden, config.get("mlp_bias", False)),
        "mlp.down_proj": (hidden, inner, config.get("mlp_bias", False)),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config["model_type"] == "qwen3":
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        for name, (rows, columns, bias) in linears.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"model.layers.{i}.{name}.bias"] = (rows,)
        for name, size in norms.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (size,)
    return shapes


def weights(config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, float32 array) for every tensor of a config.json."""
    for name, shape in tensor_shapes(config).items():
        center, scale = _center_and_scale(name, shape)
        yield name, (center + scale * _uniform(name, shape)).astype(np.float32)


def prompt(name: str, length: int) -> np.ndarray:
    """The first `length` prompt tokens [length] int32 of the tiny model called `name`."""
    vocab = CONFIGS[name]["vocab_size"]
    return (_hash(f"prompt of {name}", length) % np.uint64(vocab)).astype(np.int32)


def fingerprint(name: str) -> str:
    """SHA-256 over the config and every weight: a golden file made from others is stale."""
    digest = hashlib.sha256(json.dumps(CONFIGS[name], sort_keys=True).encode())
    for tensor, value in weights(CONFIGS[name]):
        digest.update(tensor.encode() + value.astype("<f4").tobytes())
    return digest.hexdigest()


def write_checkpoint(name: str, folder: Path, dtype: str = "float32", shards: int = 1) -> None:
    """Writes the tiny model called `name` as a Hugging Face folder: config.json and safetensors.

    dtype: float32 or bfloat16 (rounded to nearest even). shards: number of weight files; more than
    one are listed in model.safetensors.index.json. The folder is made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(CONFIGS[name])
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = dict(weights(config))
    if shards == 1:
        _write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(np.array_split(np.array(list(tensors)), shards), start=1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        shard = {str(tensor): tensors[str(tensor)] for tensor in names}
        _write_safetensors(folder / file, shard, dtype)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.size for value in tensors.values()) * (4 if dtype == "float32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _center_and_scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Middle and half width of a tensor's uniform values.

    Linears keep the variance of their input (half width sqrt(3 / columns)) times a gain. The gains
    give attention scores of spread 1 and logits of spread 2, and let the layers count without
    drowning the embedding, which would amplify bfloat16's rounding. The final norm has both signs,
    or a tied head would answer most tokens with themselves.
    """
    if name.endswith(".bias"):
        return 0.0, 0.3
    if name == "model.norm.weight":
        return 0.0, 0.5
    if name.endswith("norm.weight"):
        return (1.1 if "self_attn" in name else 1.0), 0.4
    if name == "model.embed_tokens.weight":
        return 0.0, 2.0
    gains = {"v_proj": 0.8, "o_proj": 0.8, "down_proj": 0.7, "lm_head": 7.0}
    return 0.0, gains.get(name.split(".")[-2], 1.0) * math.sqrt(3.0 / shape[1])


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float64 values in [-1, 1), multiples of 2^-23, one for each index of `shape`."""
    size = int(np.prod(shape))
    top = (_hash(name, size) >> np.uint64(40)).astype(np.int64)
    return ((top - 2**23) / 2.0**23).reshape(shape)


def _hash(name: str, size: int) -> np.ndarray:
    """Uint64 [size]: SplitMix64's stream from a seed that is the CRC-32 of `name`, mixed once."""
    seed = _mix(np.array([zlib.crc32(name.encode())], np.uint64))
    step = np.uint64(0x9E3779B97F4A7C15)
    return _mix(seed + step * np.arange(1, size + 1, dtype=np.uint64))


def _mix(z: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """Writes tensors one after another behind the format's header: u64 length, then JSON."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    end = 0
    for name, value in tensors.items():
        blobs.append(_encode(value, dtype))
        start, end = end, end + len(blobs[-1])
        code = {"float32": "F32", "bfloat16": "BF16"}[dtype]
        header[name] = {"dtype": code, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def _encode(value: np.ndarray, dtype: str) -> bytes:
    if dtype == "float32":
        return value.astype("<f4").tobytes()
    bits = value.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()
