"""Where a model comes from and how its weights reach memory.

`source` turns --model into a `ModelSource`, `weights` reads what its folder holds (`huggingface`:
safetensors, `orbax`: Orbax), `convert` rewrites one format as the other, `dummy` invents weights.
Needs no jax itself: arrays are numpy's, with ml_dtypes' bfloat16. Only `orbax` imports the library
of that name, which brings jax along.
"""
