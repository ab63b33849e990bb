"""Choosing the next token inside a program: penalties, masks, filters and one draw per row.

The order is vLLM's: mask, min_tokens, bias, penalties, temperature, min_p, top_k, top_p. No step
sorts the vocabulary. It is cut into groups of 64; the 64 greatest logits lie in the 64 groups with
the greatest maxima, so two sorts of at most 4,096 elements give them in order: the candidates. What
a filter keeps is always "every logit at or above some value", ties together. A row whose kept set
ends inside the candidates draws among them. Any other row draws `_PROPOSALS` times from a superset
of its kept set (chunk of groups, group, element) and takes the first that one reduction over the
vocabulary finds inside. If none is, it draws among the candidates, which are inside.

Two approximations, both only for rows that keep more than 64 tokens. That last draw moves the
distribution by at most (1 - a) ** 16, where a is the kept share of the superset: top_p, or with
top_k the mass of its tokens over that of all logits not below the top_k-th greatest group maximum.
And with top_k > 64 and top_p < 1 together, top_p is a share of an upper bound of the mass that
top_k keeps (the candidates, and for the others the last candidate's probability each).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_GREEDY_BELOW = 1e-5  # dividing logits by less would overflow; vLLM draws the line there too
_GROUP = 64
_CANDIDATES = 64  # with _GROUP at most 4096 elements to sort: one kernel
_PROPOSALS = 16
_NUM_TOP = 20


class RowParams(NamedTuple):
    """Sampling parameters of the rows of one step, leading axis [B] everywhere.

    temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty: float32 [B];
    a temperature under 1e-5 is greedy. top_k: int32 [B], off at 0 and below. seed: uint32 [B, 2],
    high word first. min_position: int32 [B]: stop ids are not allowed for a token that will stand
    before it. stop_ids: int32 [B, NS]; bias_ids: int32 [B, NB]; bias_values: float32 [B, NB].
    Unused ids are -1.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    top_k: jax.Array
    seed: jax.Array
    min_position: jax.Array
    stop_ids: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array


class Sampled(NamedTuple):
    """What one step sampled; logprobs are natural and by the raw logits.

    token: int32 [B]; logprob: float32 [B], of the token; top_ids: int32 [B, N] and top_logprobs:
    float32 [B, N], N = min(20, V), most likely first, lower id first where equal; is_finite:
    bool [B]: all raw logits are finite and some token is allowed, else the rest means nothing.
    """

    token: jax.Array
    logprob: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    is_finite: jax.Array


class _Top(NamedTuple):
    """values [B, k] descending, ids [B, k], maxima [B, G]: all groups' maxima, descending."""

    values: jax.Array
    ids: jax.Array
    maxima: jax.Array


def sample(
    logits: jax.Array,
    params: RowParams,
    counts: jax.Array,
    prompt_mask: jax.Array,
    allowed: jax.Array,
    position: jax.Array,
) -> Sampled:
    """One token per row, its logprob and the most likely tokens.

    logits [B, V] float32, V from 2 to 262,144; counts [B, V] int16: how often each id stands in the
    output so far; prompt_mask, allowed [B, ceil(V / 32)] uint32: bit v % 32 of word v // 32;
    position [B] int32: where the sampled token will stand. Random bits are a function of (seed,
    position) alone, so a row draws the same in any batch and after a recompute, up to rounding.
    """
    size = logits.shape[1]
    poisoned = jnp.where(jnp.isfinite(logits), logits, jnp.nan)
    raw = _top(logits, _grouped(poisoned).max(-1), _NUM_TOP)
    mass = jnp.exp(_grouped(logits) - raw.values[:, :1, None]).sum(-1).sum(-1)
    normaliser = raw.values[:, :1] + jnp.log(mass)[:, None]

    adjusted = _adjusted(logits, params, counts, prompt_mask, allowed, position)
    best = _top(adjusted, _grouped(adjusted).max(-1), _CANDIDATES)
    drawn = _draw(adjusted, best, params, position)
    token = jnp.where(params.temperature < _GREEDY_BELOW, best.ids[:, 0], drawn)
    finite = jnp.isfinite(raw.maxima[:, 0]) & jnp.isfinite(raw.maxima[:, -1])  # NaN sorts last
    kept = min(_NUM_TOP, size)
    return Sampled(
        token,
        (_gather(logits, token[:, None]) - normaliser)[:, 0],
        raw.ids[:, :kept],
        (raw.values - normaliser)[:, :kept],
        finite & jnp.isfinite(best.values[:, 0]),
    )


def _grouped(logits: jax.Array) -> jax.Array:
    rest = -logits.shape[1] % _GROUP
    padded = jnp.pad(logits, ((0, 0), (0, rest)), constant_values=-jnp.inf)
    return padded.reshape(logits.shape[0], -1, _GROUP)


def _gather(array: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, ids, axis=1, mode="clip")


def _top(logits: jax.Array, maxima: jax.Array, k: int) -> _Top:
    """The k greatest of each row; lower id first where equal, among groups as among elements."""
    maxima, groups = _sorted(maxima, jax.lax.broadcasted_iota(jnp.int32, maxima.shape, 1))
    ids = groups[:, :k, None] * _GROUP + jnp.arange(_GROUP)
    ids = ids.reshape(ids.shape[0], -1)
    values = jnp.where(ids < logits.shape[1], _gather(logits, ids), -jnp.inf)
    values, ids = _sorted(values, ids)
    return _Top(values[:, :k], ids[:, :k], maxima)


def _sorted(values: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    descending, ids = jax.lax.sort((-values, ids), dimension=1, num_keys=2)
    return -descending, ids


def _adjusted(
    logits: jax.Array,
    params: RowParams,
    counts: jax.Array,
    prompt_mask: jax.Array,
    allowed: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """Logits after masks, biases, penalties and temperature, [B, V].

    Biased and stop ids are few: their values are computed apart and written over the others'.
    """
    size = logits.shape[1]
    dense = _penalised(
        jnp.where(_unpacked(allowed, size), logits, -jnp.inf),
        counts,
        _unpacked(prompt_mask, size),
        params,
    )
    stops = jnp.where((position < params.min_position)[:, None], params.stop_ids, -1)
    ids = jnp.concatenate([params.bias_ids, stops], axis=1)
    bias = jnp.concatenate([params.bias_values, jnp.full(stops.shape, -jnp.inf)], axis=1)
    same = ids[:, :, None] == ids[:, None, :]  # an id given twice gets both
    biased = _gather(logits, ids) + jnp.where(same, bias[:, None, :], 0.0).sum(-1)
    sparse = _penalised(
        jnp.where(_bit(allowed, ids), biased, -jnp.inf),
        _gather(counts, ids),
        _bit(prompt_mask, ids),
        params,
    )
    target = jnp.where(ids < 0, size, ids)  # a negative index would count from the end
    rows = jnp.arange(ids.shape[0])[:, None]
    return dense.at[rows, target].set(sparse, mode="drop")


def _penalised(
    logits: jax.Array, counts: jax.Array, in_prompt: jax.Array, params: RowParams
) -> jax.Array:
    repetition, frequency, presence, temperature = (
        value[:, None]
        for value in (
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            jnp.where(params.temperature < _GREEDY_BELOW, 1.0, params.temperature),
        )
    )
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_prompt | (counts > 0), repeated, logits)
    logits = logits - frequency * counts - presence * (counts > 0)
    return logits / temperature


def _unpacked(mask: jax.Array, size: int) -> jax.Array:
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return bits.reshape(mask.shape[0], -1)[:, :size] != 0


def _bit(mask: jax.Array, ids: jax.Array) -> jax.Array:
    return _gather(mask, ids >> 5) >> (ids & 31).astype(jnp.uint32) & 1 != 0


def _draw(adjusted: jax.Array, best: _Top, params: RowParams, position: jax.Array) -> jax.Array:
    """One token of each row's kept set, [B]."""
    floor = _floor(best, params)
    weights = _weight(_grouped(adjusted), best, floor[:, None, None]).sum(-1)
    total = weights.sum(-1)
    candidates = jnp.exp(best.values - best.values[:, :1])
    beyond = jnp.maximum(params.top_k - _CANDIDATES, 0)
    bound = candidates.sum(-1) + beyond * candidates[:, -1]
    total = jnp.where(beyond > 0, jnp.minimum(total, bound), total)
    limit = jnp.where(params.top_p < 1, jnp.maximum(params.top_p, 1e-9) * total, jnp.inf)

    greater = best.values[:, None, :] > best.values[:, :, None]
    above = jnp.where(greater, candidates[:, None, :], 0.0).sum(-1)
    inside = (best.values >= floor[:, None]) & (above < limit[:, None]) & (candidates > 0)
    first = jnp.zeros((), jnp.uint32)
    choice = _race(jnp.where(inside, candidates, 0.0), params.seed, position, first)
    closed = _gather(best.ids, choice[:, None])[:, 0]

    tokens, values = _proposals(adjusted, weights, best, floor, (params.seed, position))
    mass, count = _above(adjusted, best.values[:, 0], values)
    accepted = (mass < limit[:, None]) & ((beyond == 0)[:, None] | (count < params.top_k[:, None]))
    opened = _gather(tokens, jnp.argmax(accepted, axis=1)[:, None])[:, 0]
    return jnp.where(inside[:, -1] & accepted.any(1), opened, closed)


def _floor(best: _Top, params: RowParams) -> jax.Array:
    """A logit that min_p and top_k keep nothing below, [B]; exactly their cut if top_k <= 64."""
    lowest = best.values[:, 0] + jnp.log(params.min_p)
    place = jnp.maximum(params.top_k - 1, 0)[:, None]
    among_groups = jnp.where(
        params.top_k <= best.maxima.shape[1], _gather(best.maxima, place)[:, 0], -jnp.inf
    )
    among_candidates = _gather(best.values, place)[:, 0]
    cut = jnp.where(params.top_k <= _CANDIDATES, among_candidates, among_groups)
    return jnp.where(params.top_k > 0, jnp.maximum(lowest, cut), lowest)


def _weight(logits: jax.Array, best: _Top, floor: jax.Array) -> jax.Array:
    highest = best.values[:, 0].reshape(floor.shape)
    return jnp.where(logits >= floor, jnp.exp(logits - highest), 0.0)
