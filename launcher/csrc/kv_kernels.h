/* What runs on the pages of a pool: writing keys and values, and attention over them.
 *
 * Work is cut into items that depend on nothing but their row and head, and each visits its keys in
 * blocks from position 0 on: a query's result is the same bits alone, in any batch, in one piece
 * and in chunks, and on any number of threads. Decode and prefill differ in the last bits. */
#ifndef DUET_KV_KERNELS_H
#define DUET_KV_KERNELS_H

#include "kv_pool.h"

enum { KV_MOST_HEAD_DIM = 256, KV_MOST_GROUP = 32 };

/* Keys and values [num_tokens, num_heads, head_dim] go to a place each; what is not finite is
 * written as 0. A page or slot that the pool has not is left alone. */
void kv_write(const struct kv_pool *pool, size_t array, const void *keys, const void *values,
              const int32_t *page, const int32_t *slot, size_t num_tokens);

/* Causal attention of rows of queries over their pages.
 *
 * queries, out [num_queries, num_query_heads, head_dim] in the pool's type. Row r has queries
 * offsets[r] to offsets[r + 1], the first at position starts[r]; each sees the positions up to its
 * own. page_table [num_rows, table_width]. Queries behind the last row's come out as zeros. */
struct kv_attention {
    const struct kv_pool *pool;
    size_t array;
    const void *queries;
    void *out;
    const int32_t *page_table, *offsets, *starts;
    size_t num_queries, num_query_heads, num_rows, table_width;
    bool is_decode; /* one query a row: sums are ordered otherwise than for many */
};

/* Pieces of the work that may run at the same time; 0 if the sizes are not supported. */
size_t kv_num_items(const struct kv_attention *work);
void kv_attend(const struct kv_attention *work, size_t item);
/* About how many multiplications it all takes. */
double kv_cost(const struct kv_attention *work);

#endif
