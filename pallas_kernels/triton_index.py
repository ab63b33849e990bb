"""Where everything lies that Triton's kernels read and write: plain Python, which Triton compiles.

What functions here take for integers are tensors of them in a kernel, and arrays in tests on a
processor. So they consist of operators and `min`, and their annotations of names that Triton knows.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.work_list import dealt

TILE_FIELDS = 4

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Form:
    """What fixes a kernel: K, G = H / K, S, D, M, and the sizes of its products.

    rows: queries times heads of a product, a power of two from 16 and from G. step: keys of a
    product, a power of two from 16.
    """

    num_kv_heads: int
    group: int
    page_size: int
    head_dim: int
    table_width: int
    rows: int
    step: int

    @property
    def width(self) -> int:
        """Columns of tensors that hold heads: tensors have powers of two."""
        return _power_from(self.head_dim)

    @property
    def group_rows(self) -> int:
        """Rows of one token: its heads on one KV head, and some that are nobody's."""
        return _power_from(self.group)

    @property
    def tile_tokens(self) -> int:
        """Tokens of one product."""
        return self.rows // self.group_rows

    @property
    def scale(self) -> float:
        """What q . k is multiplied by for scores in base 2."""
        return float(self.head_dim**-0.5 * _LOG2_E)


def _power_from(count: int) -> int:
    return 1 << (count - 1).bit_length()


def page_and_slot(key: int, form: "Form") -> tuple[int, int]:
    """Which of a row's pages a key is in, and where in that page."""
    return key // form.page_size, key % form.page_size


def kv_at(page: int, slot: int, head: int, which: int, form: "Form") -> int:
    """Where a key (which 0) or a value (1) begins in pages [P, K, 2, S, D]; page: wide enough."""
    pair = (page * form.num_kv_heads + head) * 2 + which
    return (pair * form.page_size + slot) * form.head_dim


def head_at(token: int, kv_head: int, member: int, form: "Form") -> int:
    """Which of all heads [tokens, H] one is, as a member of those that share a KV head."""
    return (token * form.num_kv_heads + kv_head) * form.group + member


def token_and_member(row: int, form: "Form") -> tuple[int, int]:
    """What a row of a product is: a token of the tile, and a member of the heads of a KV head."""
    return row // form.group_rows, row % form.group_rows


def chunk_bounds(chunk: int, tokens: int, length: int) -> tuple[int, int]:
    """First key of a chunk of so many tokens, and the key behind its last: none, or fewer, if 0."""
    first = chunk * tokens
    return first, min(first + tokens, length)


def partial_of(row: int, chunk: int, per_row: int) -> int:
    """Which of the partial results [B * per_row] belongs to a chunk of a row."""
    return row * per_row + chunk


def last_seen(token: int, tokens: int, behind: int) -> int:
    """The last key that a token of a tile sees, where the last token sees those before `behind`."""
    return behind - tokens + token


def tiles(
    row_offsets: jax.Array, cached_lengths: jax.Array, num_tokens: int, tile_tokens: int
) -> jax.Array:
    """The tiles of prefill [N, TILE_FIELDS] int32; a few small fusions, shared by all layers.

    Of each tile: its row, its first token, how many tokens it has, and how many keys the last of
    these sees. Rows are cut from their first token on, so that a token's place in its tile depends
    on no other row. Tokens behind the last row have tiles that see no key; surplus tiles are empty.
    """
    R = cached_lengths.shape[0]
    counts = jnp.append(row_offsets[1:], num_tokens) - row_offsets
    needed = (counts + tile_tokens - 1) // tile_tokens
    most = num_tokens // tile_tokens + R + 1  # no sum of those needed is more
    owner, place, _ = dealt(needed, most)
    first = place * tile_tokens
    tokens = jnp.clip(counts[owner] - first, 0, tile_tokens)
    behind = cached_lengths[jnp.minimum(owner, R - 1)] + first + tokens
    behind = jnp.where((owner < R) & (tokens > 0), behind, 0)
    fields = (jnp.minimum(owner, R - 1), row_offsets[owner] + first, tokens, behind)
    return jnp.stack(fields, axis=1).astype(jnp.int32)
