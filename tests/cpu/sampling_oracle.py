"""What a row's next token may be, exactly: vLLM's order of steps in float64, one row at a time."""

from dataclasses import dataclass, field

import numpy as np

CANDIDATES = 64


@dataclass(frozen=True)
class Row:
    """One row to sample from; logits [V] float32, ids and counts as Python values."""

    logits: np.ndarray
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    counts: dict[int, int] = field(default_factory=dict)
    prompt: frozenset[int] = frozenset()
    allowed: frozenset[int] | None = None
    bias: tuple[tuple[int, float], ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_position: int = 0
    position: int = 0
    seed: tuple[int, int] = (0, 0)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    highest = logits.max()
    return logits - highest - np.log(np.exp(logits - highest).sum())


def adjusted(row):
    """Logits [V] after masks, biases, penalties and temperature."""
    logits = row.logits.astype(np.float64)
    V = len(logits)
    if row.allowed is not None:
        logits[[v for v in range(V) if v not in row.allowed]] = -np.inf
    if row.position < row.min_position:
        logits[list(row.stop_ids)] = -np.inf
    for v, bias in row.bias:
        logits[v] += bias
    for v in set(row.counts) | row.prompt:
        logits[v] = logits[v] / row.repetition if logits[v] > 0 else logits[v] * row.repetition
    for v, count in row.counts.items():
        logits[v] -= row.frequency * count + row.presence * (count > 0)
    return logits if row.temperature < 1e-5 else logits / row.temperature


def distribution(row):
    """Probabilities [V] of the next token of a row that is not greedy.

    Equal logits stay or go together. With top_k above CANDIDATES, top_p counts from the upper bound
    that duetjax.model.sampling documents.
    """
    logits = adjusted(row)
    p = np.exp(logits - logits.max())
    p[p < row.min_p * (1 - 1e-6)] = 0  # 1e-6: the greatest itself at min_p = 1, in any rounding
    descending = np.sort(p)[::-1]
    bound = p.sum()
    if row.top_k > 0:
        p[p < descending[min(row.top_k, len(p)) - 1]] = 0
        bound = p.sum()
    if CANDIDATES < row.top_k < len(p):
        rest = row.top_k - CANDIDATES
        bound = descending[:CANDIDATES].sum() + rest * descending[CANDIDATES - 1]
    if row.top_p < 1:
        above = np.array([descending[descending > value].sum() for value in p])
        p[above >= row.top_p * bound] = 0
    return p / p.sum()
