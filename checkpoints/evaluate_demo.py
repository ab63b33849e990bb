"""Scores a demo checkpoint on questions.json: greedy, through its own chat template.

A question counts when the answer contains all its required words (any case). Shows what shuffled
weights score, so that a score means something. The decoder runs densely, without the server.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_folder
import jax
import jax.numpy as jnp
import numpy as np

from duetjax.config import ModelConfig
from duetjax.model.decoder import Definition, causal_attention
from duetjax.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said; `ended`: with the end-of-turn token, not cut at max_tokens."""

    text: str
    ended: bool

    def has(self, required: Sequence[str]) -> bool:
        """Whether all required words occur, in any case."""
        return all(word.lower() in self.text.lower() for word in required)


class Demo:
    """A loaded folder that answers many prompts at once, greedily."""

    def __init__(self, folder: Path, weights: Mapping[str, np.ndarray]) -> None:
        config = json.loads((folder / "config.json").read_text())
        self._tokenizer = Tokenizer.from_folder(folder)
        self._next = _next_tokens(ModelConfig.from_hf(config), weights)

    def prompt(self, question: str) -> list[int]:
        """Token ids of a conversation of one question that waits for the assistant."""
        return self._tokenizer.encode_chat([{"role": "user", "content": question}])

    def answers(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
        """Continues each prompt up to the end token or `max_tokens` further tokens."""
        rows = [list(prompt) for prompt in prompts]
        tokens = np.zeros((len(rows), max(map(len, rows)) + max_tokens), np.int32)
        ended = [False] * len(rows)
        for _ in range(max_tokens):
            for row, ids in enumerate(rows):
                tokens[row, : len(ids)] = ids
            chosen = self._next(tokens, np.asarray([len(ids) - 1 for ids in rows]))
            for row, token in enumerate(chosen.tolist()):
                ended[row] = ended[row] or token == self._tokenizer.eos_token_id
                if not ended[row]:
                    rows[row].append(token)
            if all(ended):
                break
        pairs = zip(rows, prompts, ended, strict=True)
        return [Answer(self._tokenizer.decode(ids[len(p) :]), end) for ids, p, end in pairs]


def _next_tokens(
    config: ModelConfig, weights: Mapping[str, np.ndarray]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    definition = Definition(config, jnp.float32)
    fused = definition.fusion.fuse(weights.items())
    leaves = definition.ordered({name: jnp.asarray(array) for name, array in fused})

    @jax.jit
    def run(leaves: list[jax.Array], tokens: jax.Array, last: jax.Array) -> jax.Array:
        decoder = definition.bind(leaves)
        hidden = decoder(tokens, jnp.arange(tokens.shape[1]), causal_attention)
        return jnp.argmax(decoder.logits(hidden[jnp.arange(len(last)), last]), axis=-1)

    return lambda tokens, last: np.asarray(run(leaves, tokens, last))


def shuffled(weights: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """The same numbers in every tensor, in random places: a model that has learnt nothing."""
    rng = np.random.default_rng(seed)
    return {name: rng.permutation(w.ravel()).reshape(w.shape) for name, w in weights.items()}


def score(demo: Demo, questions: Mapping[str, Any], kind: str, *, verbose: bool) -> tuple[int, int]:
    """(answers with all required words, answers that ended) for "question" or "paraphrase"."""
    items = questions["items"]
    prompts = [demo.prompt(item[kind]) for item in items]
    answers = demo.answers(prompts, questions["max_tokens"])
    for item, answer in zip(items, answers, strict=True):
        good = answer.has(item["required"]) and answer.ended
        if verbose:
            print(f"{'ok  ' if good else 'MISS'} {item[kind]}\n     {answer.text}")
    right = sum(a.has(item["required"]) for item, a in zip(items, answers, strict=True))
    return right, sum(answer.ended for answer in answers)


def main() -> None:
    """Prints every answer and the scores, also of shuffled weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=demo_folder.DEMO)
    parser.add_argument("--questions", type=Path, default=demo_folder.DEMO / "questions.json")
    options = parser.parse_args()
    questions = json.loads(options.questions.read_text())
    weights = demo_folder.read_weights(options.folder)
    for name, chosen in (("trained", weights), ("shuffled", shuffled(weights))):
        demo = Demo(options.folder, chosen)
        for kind in ("question", "paraphrase"):
            right, ended = score(demo, questions, kind, verbose=name == "trained")
            total = len(questions["items"])
            print(f"{name} weights, {kind}s: {right} of {total} right, {ended} ended", flush=True)


if __name__ == "__main__":
    main()
