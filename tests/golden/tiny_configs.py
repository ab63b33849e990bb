"""Tiny models, one per way that a supported config.json can be spelled.

Each entry is a config.json as its family publishes it, at a size that a CPU runs in milliseconds.
Sizes differ on purpose (head_dim is not hidden_size / heads, the intermediate size is odd in units
of 8, rms_norm_eps is large enough to matter), so that a wrong field changes the logits.
"""

from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-2,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

CONFIGS: dict[str, dict[str, Any]] = {
    # The oldest spelling: no kv heads (as many as heads), no head_dim, no rope keys at all.
    "llama-mha-tied": {**_LLAMA, "tie_word_embeddings": True, "torch_dtype": "float32"},
    # Wavelengths 6.3, 21.7 | 74.7 | 257 and longer: kept, blended and stretched frequencies.
    "llama-llama3-rope": {
        **_LLAMA,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "rope_theta": 20000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 96,
        },
        "eos_token_id": [2, 5, 7],
        "torch_dtype": "float32",
    },
    "llama-biases": {
        **_LLAMA,
        "hidden_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 500.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
    },
    "llama-linear-rope": {
        **_LLAMA,
        "vocab_size": 251,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "linear", "factor": 2.5},
        "torch_dtype": "float32",
    },
    # As transformers 5 writes it: everything about rope in one object, and `dtype`.
    # Wavelengths 6.3, 12.6 | 25.1, 50.2 | 100 and longer.
    "llama-rope-parameters": {
        **_LLAMA,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 4096.0,
            "factor": 4.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 9.0,
            "original_max_position_embeddings": 160,
        },
        "dtype": "float32",
    },
    "qwen2": {**_QWEN2, "use_sliding_window": False, "sliding_window": None},
    # use_sliding_window false: the window must be ignored, short as it is.
    "qwen2-window-off": {
        **_QWEN2,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 160,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-2,
        "attention_bias": False,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 192,
        "hidden_size": 64,
        "intermediate_size": 120,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-2,
        "rope_theta": 100000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
}
