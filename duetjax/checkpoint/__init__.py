"""Where a model comes from and how its weights reach memory.

`source` turns --model into a `ModelSource`, `huggingface` reads safetensors weights, `dummy`
invents them. Needs no jax: arrays are numpy's, with ml_dtypes' bfloat16.
"""
