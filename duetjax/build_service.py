"""Makes of a loaded model what an endpoint serves: `serve.app.create_app` of it is an ASGI app."""

import time
from collections.abc import Iterable

from duetjax.build import LoadedModel
from duetjax.serve.context import Service


def build_service(model: LoadedModel, names: Iterable[str] = ()) -> Service:
    """The endpoint's view of a model that was loaded with its tokenizer.

    names: that requests may call it by, the first of them for metrics too; none is the model's own.
    The app starts the engine; `model.engine.shutdown` is for whoever loaded it.
    """
    assert model.tokenizer is not None, f"{model.name} without a tokenizer"
    return Service(
        client=model.engine,
        tokenizer=model.tokenizer,
        model_names=tuple(dict.fromkeys(names)) or (model.name,),
        created=int(time.time()),
        max_model_len=model.max_model_len,
        vocab_size=model.config.vocab_size,
        eos_token_ids=model.generation.eos_token_ids,
        defaults=model.generation.sampling,
        compilations=model.compilations,
    )
