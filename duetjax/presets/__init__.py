"""Facts about public models and GPUs, each with its source. A preset has no weights.

models/: in the form of their config.json. gpus/: what XLA asks of an absent GPU. profiles/:
what a model's programs cost, from compiling them. hardware/: what a GPU reaches on parts of it.
"""
