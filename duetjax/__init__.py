"""DuetJAX: an LLM server in JAX that keeps every token stream steady while long prompts prefill.

Importing this package loads neither jax nor starlette; the names below load what they need.
"""

from typing import TYPE_CHECKING

from duetjax.config import SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from duetjax.async_llm import AsyncLLM
    from duetjax.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "StructuredOutputsParams", "__version__"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from duetjax.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from duetjax.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module 'duetjax' has no attribute {name!r}")
