"""The alphabet engine (tests/unit/fake_engine.py) as a loaded model, for what is built on one."""

import functools
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

from fake_engine import END, FakeEngine
from serve_setup import write_tokenizer

from duetjax.build import LoadedModel
from duetjax.checkpoint.generation import GenerationDefaults
from duetjax.text.tokenizer import Tokenizer

MAX_LEN = 256


@functools.cache
def alphabet_tokenizer() -> Tokenizer:
    """Token id = byte, 256 = <|end|>, and a chat template that ends in ">"."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return Tokenizer.from_folder(Path(folder))


def alphabet_model(engine: FakeEngine, *, eos: bool = False) -> LoadedModel:
    """A model whose output a person can write down; eos: whether "<|end|>", after "z", ends it."""
    return LoadedModel(
        name="alphabet",
        config=SimpleNamespace(vocab_size=END + 1),
        tokenizer=alphabet_tokenizer(),
        generation=GenerationDefaults(eos_token_ids=(END,) if eos else ()),
        max_model_len=MAX_LEN,
        engine=engine,
        _seeds=random.Random(0),
    )
