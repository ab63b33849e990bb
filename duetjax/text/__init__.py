"""Text on both sides of the model: tokenizer, chat template, incremental decoding, stop strings."""
