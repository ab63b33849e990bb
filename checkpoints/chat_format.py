"""The demo model's tokenizer and chat format: special tokens, template, documents as token ids.

A message is its role's token, its text, and <|end|>, which also ends plain text: it is the one
end-of-sequence token. The loss weighs each token of a document by whose words it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from corpus import Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 2048
BOS, END, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|begin_of_text|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
BOS_ID, END_ID = SPECIAL.index(BOS), SPECIAL.index(END)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ["system", "user", "assistant"] -%}
{{- raise_exception("roles are system, user and assistant, not " ~ message.role) -}}
{%- endif -%}
{{- "<|" ~ message.role ~ "|>" ~ message.content | trim ~ "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|assistant|>" -}}
{%- endif -%}
"""

_ASKED = 0.1  # questions and system prompts are given, not to be invented


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as token ids, and the loss weight of predicting each of them."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of 2,048 tokens, special tokens first; begins every text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Encoded]:
    """Documents as the chat template lays them out, or <|begin_of_text|>text<|end|> where plain."""
    return [_encode(tokenizer, document) for document in documents]


def _encode(tokenizer: Tokenizer, document: Document) -> Encoded:
    parts: list[tuple[str, str, float]] = []
    if document.plain is not None:
        parts.append(("", document.plain, 1.0))
    if document.system is not None:
        parts.append((SYSTEM, document.system, _ASKED))
    for turn in document.turns:
        parts += [(USER, turn.question, _ASKED), (ASSISTANT, turn.answer, 1.0)]
    ids, weights = [BOS_ID], [0.0]
    for role, text, weight in parts:
        words = tokenizer.encode(text.strip(), add_special_tokens=False).ids
        words.append(END_ID)
        if role:
            ids.append(SPECIAL.index(role))
            weights.append(_ASKED)
        ids += words
        weights += [weight] * len(words)
    return Encoded(tuple(ids), tuple(weights))
