"""What an engine needs of a tokenizer, to constrain answers by."""

from typing import TYPE_CHECKING

from duetjax.checkpoint.source import ModelSource
from duetjax.constrain.permits import PermitIssuer

if TYPE_CHECKING:  # it loads what a machine that only measures does not have
    from duetjax.text.tokenizer import Tokenizer


def permit_issuer(source: ModelSource, tokenizer: "Tokenizer | None") -> PermitIssuer | None:
    """Who says what constrained answers may sample; None without a tokenizer or an end token."""
    eos = source.generation.eos_token_ids
    if tokenizer is None or not eos:
        return None
    return PermitIssuer(tokenizer.to_json, source.config.vocab_size, eos)
