"""Choosing the next token inside a program: penalties, masks, filters and one draw per row.

The order is vLLM's: mask, min_tokens, bias, penalties, temperature, min_p, top_k, top_p. No step
sorts the vocabulary. It is cut into groups of 64; the 64 greatest logits lie in the 64 groups with
the greatest maxima, so two sorts of at most 4,096 elements give them in order: the candidates. What
filters keep is always "every logit at or above some value", so equal logits stay or go together. A
row whose kept set ends inside the candidates draws among them. Any other row draws 16 times from a
superset of its kept set and takes the first that a reduction over the vocabulary finds inside; if
none is, it draws among the candidates, which are.

Two approximations. That last draw moves the distribution of such a row by (1 - a) ** 16 at most, a
being the kept share of the superset's mass: at least top_p, or 1 without top_p; with top_k > 64 the
superset is what lies at or above the top_k-th greatest group maximum (everything, if there are not
so many groups). And with top_k > 64 and top_p < 1, top_p counts from an upper bound of the mass
that top_k keeps: the candidates', and for each further token the last candidate's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

_GREEDY_BELOW = 1e-5  # dividing logits by less would overflow; vLLM draws the line there too
_GROUP = 64
_CANDIDATES = 64  # with _GROUP at most 4096 elements to sort: one kernel
_PROPOSALS = 16
_NUM_TOP = 20
_LEAST_TOP_P = 1e-9  # keeps the greatest logit
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


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
    """values [B, k] descending, ids [B, k], maxima [B, G]: all groups' maxima, descending.

    Take the first value from the maxima and the last by a reduction: slices of `values` would make
    XLA for CPUs sort everything in place of selecting, many times as slow.
    """

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
    *,
    may_branch: bool = False,
) -> Sampled:
    """One token per row, its logprob and the most likely tokens.

    logits [B, V] float32, V from 2 to 262,144; counts [B, V] int16: how often each id stands in the
    output so far; prompt_mask, allowed [B, ceil(V / 32)] uint32: bit v % 32 of word v // 32;
    position [B] int32: where the sampled token will stand. Random bits are a function of (seed,
    position) alone, so a row draws the same in any batch and after a recompute, up to rounding.
    may_branch: leave out what no row needs, to the same result; on a GPU the host would decide.
    """
    size = logits.shape[1]
    poisoned = jnp.where(jnp.isfinite(logits), logits, jnp.nan)
    raw = _top(logits, _grouped(poisoned).max(-1), _NUM_TOP)
    highest = raw.maxima[:, :1]
    mass = jnp.exp(logits - highest).sum(-1, keepdims=True)
    normaliser = highest + jnp.log(mass)

    adjusted = _adjusted(logits, params, counts, prompt_mask, allowed, position)
    best = _top(adjusted, _grouped(adjusted).max(-1), _CANDIDATES)
    token = _draw(adjusted, best, params, position, may_branch=may_branch)
    token = jnp.minimum(token, size - 1)  # a row of NaN may have chosen padding
    finite = jnp.isfinite(raw.maxima[:, 0]) & jnp.isfinite(raw.maxima[:, -1])  # NaN is at an end
    kept = min(_NUM_TOP, size)
    return Sampled(
        token,
        (_gather(logits, token[:, None]) - normaliser)[:, 0],
        raw.ids[:, :kept],
        (raw.values - normaliser)[:, :kept],
        finite & jnp.isfinite(best.maxima[:, 0]),
    )


def _grouped(logits: jax.Array) -> jax.Array:
    rest = -logits.shape[1] % _GROUP
    padded = jnp.pad(logits, ((0, 0), (0, rest)), constant_values=-jnp.inf)
    return padded.reshape(logits.shape[0], -1, _GROUP)


def _gather(array: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, ids, axis=1, mode="clip")


def _top(logits: jax.Array, maxima: jax.Array, k: int) -> _Top:
    """The k greatest of each row; where several are the very greatest, the lowest id is first."""
    maxima, groups = jax.lax.top_k(maxima, maxima.shape[1])
    groups = groups[:, :k]
    ids = (groups[:, :, None] * _GROUP + jnp.arange(_GROUP)).reshape(groups.shape[0], -1)
    elements = jnp.where(ids < logits.shape[1], _gather(logits, ids), -jnp.inf)
    values, places = jax.lax.top_k(elements, k)
    return _Top(values, _gather(groups, places // _GROUP) * _GROUP + places % _GROUP, maxima)


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


def _draw(
    adjusted: jax.Array, best: _Top, params: RowParams, position: jax.Array, *, may_branch: bool
) -> jax.Array:
    """One token of each row's kept set, [B], the greatest logit's if the row is greedy."""
    highest, floor = best.maxima[:, 0], _floor(best, params)
    weights = _weight(_grouped(adjusted), highest, floor).sum(-1)
    weights = jax.lax.optimization_barrier(weights)  # else XLA sums the vocabulary twice
    normaliser = highest + jnp.log(weights.sum(-1))
    masses = jnp.exp(best.values - normaliser[:, None])  # of the candidates
    beyond = jnp.maximum(params.top_k - _CANDIDATES, 0)
    bound = jnp.where(beyond > 0, masses.sum(-1) + beyond * masses.min(-1), 1.0)
    top_p = jnp.maximum(params.top_p, _LEAST_TOP_P)
    limit = jnp.where(top_p < 1, top_p * jnp.minimum(bound, 1.0), jnp.inf)[:, None]

    greater = best.values[:, None, :] > best.values[:, :, None]
    above = jnp.where(greater, masses[:, None, :], 0.0).sum(-1)
    inside = (best.values >= floor[:, None]) & (above < limit) & (masses > 0)
    chosen = _race(jnp.where(inside, masses, 0.0), _bits(params.seed, position, 0, _CANDIDATES))

    def proposed() -> tuple[jax.Array, jax.Array]:
        tokens = _proposals(adjusted, weights, (highest, floor), params.seed, position)
        mass, count = _above(adjusted, normaliser, _gather(adjusted, tokens))
        return tokens, (mass < limit) & ((beyond == 0)[:, None] | (count < params.top_k[:, None]))

    def nothing() -> tuple[jax.Array, jax.Array]:
        shape = (adjusted.shape[0], _PROPOSALS)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)

    if may_branch:
        is_needed = (inside.all(1) & (params.temperature >= _GREEDY_BELOW)).any()
        tokens, accepted = jax.lax.cond(is_needed, proposed, nothing)
    else:
        tokens, accepted = proposed()
    greedy = params.temperature < _GREEDY_BELOW
    is_open = inside.all(1) & accepted.any(1) & ~greedy
    closed = _pick(best.ids, jnp.where(greedy, 0, chosen))
    return jnp.where(is_open, _pick(tokens, accepted.argmax(1)), closed)


def _floor(best: _Top, params: RowParams) -> jax.Array:
    """A logit below which min_p and top_k keep nothing, [B]; with top_k <= 64 exactly their cut."""
    lowest = best.maxima[:, 0] + jnp.log(params.min_p)
    place = jnp.maximum(params.top_k - 1, 0)
    among_groups = jnp.where(place < best.maxima.shape[1], _pick(best.maxima, place), -jnp.inf)
    cut = jnp.where(params.top_k <= _CANDIDATES, _pick(best.values, place), among_groups)
    return jnp.where(params.top_k > 0, jnp.maximum(lowest, cut), lowest)


def _weight(logits: jax.Array, highest: jax.Array, floor: jax.Array) -> jax.Array:
    """Probability as a share of the highest's, 0 below the floor; logits [B, n, m]."""
    shares = jnp.exp(logits - highest[:, None, None])
    return jnp.where(logits >= floor[:, None, None], shares, 0.0)


def _proposals(
    adjusted: jax.Array,
    weights: jax.Array,
    bounds: tuple[jax.Array, jax.Array],
    seed: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """Ids drawn independently from the logits not below the floor, [B, _PROPOSALS].

    weights [B, G]: of the groups; bounds: highest logit and floor. Three short races, for a chunk
    of groups, a group and an element, replace one over the vocabulary.
    """
    num_rows, num_groups = weights.shape
    weights = jnp.pad(weights, ((0, 0), (0, -num_groups % _GROUP)))
    chunks = weights.reshape(num_rows, -1, _GROUP).sum(-1)

    def raced(stream: int, among: jax.Array) -> jax.Array:
        bits = _bits(seed, position, stream, _PROPOSALS * among.shape[2])
        return _race(among, bits.reshape(num_rows, _PROPOSALS, -1))

    chunk = raced(1, jnp.broadcast_to(chunks[:, None], (num_rows, _PROPOSALS, chunks.shape[1])))
    group = chunk * _GROUP + raced(2, _members(weights, chunk, 0.0))
    element = raced(3, _weight(_members(adjusted, group, -jnp.inf), *bounds))
    return group * _GROUP + element


def _members(array: jax.Array, block: jax.Array, beyond: float) -> jax.Array:
    """Elements [B, n, _GROUP] of the blocks [B, n] of an array [B, m]; `beyond` where it ends."""
    places = (block[:, :, None] * _GROUP + jnp.arange(_GROUP)).reshape(block.shape[0], -1)
    members = jnp.where(places < array.shape[1], _gather(array, places), beyond)
    return members.reshape(*block.shape, _GROUP)


def _above(
    adjusted: jax.Array, normaliser: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mass and number of the logits strictly greater than each of `values`, [B, _PROPOSALS].

    One reduction of many operands, so that the vocabulary is read once. Each mass has exponentials
    of its own, relative to its value: those that operands share XLA may store, a second [B, V].
    """
    columns = [values[:, i, None] for i in range(_PROPOSALS)]
    operands = [jnp.where(adjusted > v, jnp.exp(adjusted - v), 0.0) for v in columns]
    operands += [(adjusted > v).astype(jnp.float32) for v in columns]
    zeros = [jnp.float32(0)] * len(operands)
    sums = jax.lax.reduce(operands, zeros, _add_each, (1,))
    relative, counts = jnp.stack(sums[:_PROPOSALS], 1), jnp.stack(sums[_PROPOSALS:], 1)
    return relative * jnp.exp(values - normaliser[:, None]), counts


def _add_each(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> list[jax.Array]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _pick(array: jax.Array, index: jax.Array) -> jax.Array:
    return _gather(array, index[:, None])[:, 0]


def _race(weights: jax.Array, bits: jax.Array) -> jax.Array:
    """An index along the last axis, with a probability in proportion to its weight, 0 if that is 0.

    Entrants arrive after exponential times with their weights as rates; the first one wins.
    """
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    lead = jnp.log(weights) - jnp.log(-jnp.log1p(-uniform))
    return jnp.argmax(lead, axis=-1).astype(jnp.int32)


def _bits(seed: jax.Array, position: jax.Array, stream: int, count: int) -> jax.Array:
    """Random words, uint32 [B, count]: Threefry-2x32-20 with the seed as key.

    The counter is (position, stream and index); the first word of each block is used. Written out,
    because unlike jax.random's it fuses into its consumer. Source: Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", 2011.
    """
    keys = (seed[:, :1], seed[:, 1:], seed[:, :1] ^ seed[:, 1:] ^ jnp.uint32(0x1BD11BDA))
    index = jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(stream << 16)
    x = position.astype(jnp.uint32)[:, None] + keys[0]
    y = index[None, :] + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x = x + y
            y = (y << rotation | y >> (32 - rotation)) ^ x
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return x
