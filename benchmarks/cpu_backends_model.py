"""A Llama shape of 100M parameters with random weights, in the formats of several engines.

For cpu_backends.py: a Hugging Face folder, and a GGUF file of the same weights for llama.cpp.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32_000, 768, 12, 12, 4, 64, 2048
EPS, THETA, MAX_LEN = 1e-5, 10_000.0, 2304


def random_tensors() -> dict[str, np.ndarray]:
    """float32 weights by Hugging Face's names; projections keep the size of what they project."""
    draw = np.random.default_rng(0)

    def normal(rows: int, columns: int) -> np.ndarray:
        return draw.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)

    tensors = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        parts = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
        for name, shape in parts.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    return tensors | {"model.norm.weight": np.ones(HIDDEN, np.float32)}


def write_folder(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A Hugging Face folder without a tokenizer."""
    from safetensors.numpy import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "max_position_embeddings": MAX_LEN,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GGUF_ALIGNMENT, GGUF_F32, GGUF_BF16 = 32, 0, 30


def write_gguf(file: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """The same weights for llama.cpp (GGUF version 3), norms in float32, without a vocabulary."""
    keys = {
        "general.architecture": "llama",
        "llama.vocab_size": VOCAB,
        "llama.context_length": MAX_LEN,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": EPS,
        "llama.rope.freq_base": THETA,
        "llama.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "no_vocab",
    }
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    header += [_gguf_text(key) + _gguf_value(value) for key, value in keys.items()]
    data, offset = [], 0
    for name, tensor in tensors.items():
        wide = tensor.ndim == 1 or dtype == "float32"
        array = _gguf_rows(name, tensor)
        raw = array.tobytes() if wide else _bfloat16(array).tobytes()
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        kind = GGUF_F32 if wide else GGUF_BF16
        shape = struct.pack(f"<I{array.ndim}Q", array.ndim, *reversed(array.shape))
        header.append(_gguf_text(name) + shape + struct.pack("<IQ", kind, offset))
        data.append(raw + bytes(-len(raw) % GGUF_ALIGNMENT))
        offset += len(data[-1])
    head = b"".join(header)
    with file.open("wb") as out:
        out.writelines([head, bytes(-len(head) % GGUF_ALIGNMENT), *data])


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _gguf_text(value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def _gguf_rows(name: str, tensor: np.ndarray) -> np.ndarray:
    """llama.cpp rotates neighbours (2i, 2i + 1) of a head, Hugging Face (i, i + D/2)."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    halves = tensor.reshape(-1, 2, HEAD_DIM // 2, tensor.shape[1])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even, as the bits [...] uint16."""
    bits = array.view(np.uint32) if array.flags.c_contiguous else array.copy().view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
