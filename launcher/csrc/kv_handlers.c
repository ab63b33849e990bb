#include "kv_handlers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ffi_call.h"
#include "kv_kernels.h"
#include "sharing.h"

static const double WORTH_SHARING = 1 << 17; /* multiplications: some ten microseconds */

static struct xla_buffer *argument(const struct xla_call *call, int64_t index) {
    return call->arguments.values[index];
}

static size_t size(const struct xla_buffer *buffer, int64_t axis) {
    return (size_t)buffer->dimensions[axis];
}

static bool is(const struct xla_buffer *buffer, int type, int64_t rank) {
    return buffer->type == type && buffer->rank == rank;
}

static bool is_row(const struct xla_buffer *buffer, size_t length) {
    return is(buffer, XLA_S32, 1) && size(buffer, 0) == length;
}

static bool is_heads(const struct xla_buffer *buffer, const struct kv_pool *pool) {
    return is(buffer, pool->shape.type == KV_F32 ? XLA_F32 : XLA_BF16, 3) &&
           size(buffer, 2) == pool->shape.head_dim;
}

static xla_error *misfit(const struct xla_call *call, const char *what) {
    char message[160];
    snprintf(message, sizeof message, "duetjax: %s does not fit the pool of KV pages", what);
    return duet_ffi_error(call, XLA_INVALID_ARGUMENT, message);
}

/* The pool and array that a call's handle names; to be given back. */
static xla_error *open_call(const struct xla_call *call, int64_t num_arguments,
                            struct kv_pool **pool, size_t *array) {
    xla_error *unknown = duet_ffi_check_version(call);
    if (unknown != NULL)
        return unknown;
    if (call->arguments.size != num_arguments || call->results.size != 1 ||
        !is_row(argument(call, 0), 2))
        return duet_ffi_error(call, XLA_INVALID_ARGUMENT, "duetjax: a call without its operands");
    const int32_t *handle = argument(call, 0)->data;
    *pool = kv_pool_use(handle[0]);
    if (*pool == NULL)
        return duet_ffi_error(call, XLA_FAILED_PRECONDITION,
                              "duetjax: the pool of KV pages has been closed");
    *array = (size_t)handle[1];
    if (*array < (*pool)->shape.num_arrays)
        return NULL;
    kv_pool_give_back(*pool);
    return misfit(call, "the array's number");
}

typedef xla_error *body(const struct xla_call *call, const struct kv_pool *pool, size_t array);

static xla_error *on_pool(const struct xla_call *call, int64_t num_arguments, body *run) {
    struct kv_pool *pool = NULL;
    size_t array = 0;
    if (duet_ffi_is_query(call))
        return NULL;
    xla_error *error = open_call(call, num_arguments, &pool, &array);
    if (error != NULL || pool == NULL)
        return error;
    error = run(call, pool, array);
    kv_pool_give_back(pool);
    return error;
}

static xla_error *write_pages(const struct xla_call *call, const struct kv_pool *pool,
                              size_t array) {
    const struct xla_buffer *keys = argument(call, 1), *values = argument(call, 2);
    const struct xla_buffer *page = argument(call, 3), *slot = argument(call, 4);
    if (!is_heads(keys, pool) || !is_heads(values, pool) ||
        size(keys, 1) != pool->shape.num_heads || size(values, 1) != pool->shape.num_heads ||
        size(values, 0) != size(keys, 0))
        return misfit(call, "keys or values");
    if (!is_row(page, size(keys, 0)) || !is_row(slot, size(keys, 0)))
        return misfit(call, "where to write them");
    kv_write(pool, array, keys->data, values->data, page->data, slot->data, size(keys, 0));
    struct xla_buffer *handle = call->results.values[0];
    memmove(handle->data, argument(call, 0)->data, 2 * sizeof(int32_t));
    return NULL;
}

xla_error *duet_kv_write(struct xla_call *call) {
    return on_pool(call, 5, write_pages);
}

static void run_item(const void *work, size_t item) {
    kv_attend(work, item);
}

static xla_error *attention(const struct xla_call *call, const struct kv_attention *work) {
    const struct xla_buffer *queries = argument(call, 1), *out = call->results.values[0];
    const struct xla_buffer *table = argument(call, 2);
    if (!is_heads(queries, work->pool) || !is_heads(out, work->pool) ||
        size(out, 0) != size(queries, 0) || size(out, 1) != size(queries, 1))
        return misfit(call, "queries");
    if (!is(table, XLA_S32, 2) || size(table, 0) != work->num_rows)
        return misfit(call, "the page table");
    size_t num_items = kv_num_items(work);
    if (num_items == 0)
        return misfit(call, "the number or size of heads");
    duet_share(kv_cost(work) > WORTH_SHARING ? call : NULL, run_item, work, num_items);
    return NULL;
}

static struct kv_attention work_of(const struct xla_call *call, const struct kv_pool *pool,
                                   size_t array) {
    const struct xla_buffer *queries = argument(call, 1), *table = argument(call, 2);
    struct xla_buffer *out = call->results.values[0];
    return (struct kv_attention){
        .pool = pool,
        .array = array,
        .queries = queries->data,
        .out = out->data,
        .page_table = table->data,
        .num_queries = queries->rank > 0 ? size(queries, 0) : 0,
        .num_query_heads = queries->rank > 1 ? size(queries, 1) : 0,
        .table_width = table->rank > 1 ? size(table, 1) : 0,
    };
}

/* A decoding row is a prompt of one token that comes after the others. */
static xla_error *decode(const struct xla_call *call, const struct kv_pool *pool, size_t array) {
    struct kv_attention work = work_of(call, pool, array);
    const struct xla_buffer *lengths = argument(call, 3);
    size_t rows = work.num_queries;
    if (!is_row(lengths, rows))
        return misfit(call, "lengths");
    int32_t *offsets = malloc((2 * rows + 1) * sizeof *offsets);
    if (offsets == NULL)
        return duet_ffi_error(call, XLA_INTERNAL, "duetjax: no memory for an attention's rows");
    int32_t *starts = offsets + rows + 1;
    offsets[0] = 0;
    for (size_t row = 0; row < rows; row++) {
        offsets[row + 1] = (int32_t)row + 1;
        int32_t length = ((const int32_t *)lengths->data)[row];
        starts[row] = length > 0 ? length - 1 : 0;
    }
    work.offsets = offsets, work.starts = starts, work.num_rows = rows;
    work.is_decode = true;
    xla_error *error = attention(call, &work);
    free(offsets);
    return error;
}

xla_error *duet_kv_decode_attention(struct xla_call *call) {
    return on_pool(call, 4, decode);
}

/* Rows lie one behind the other, and within the queries. */
static bool are_in_order(const int32_t *offsets, const int32_t *starts, size_t num_rows,
                         size_t num_queries) {
    for (size_t row = 0; row < num_rows; row++)
        if (offsets[row + 1] < offsets[row] || starts[row] < 0)
            return false;
    return offsets[0] >= 0 && (size_t)offsets[num_rows] <= num_queries;
}

static xla_error *prefill(const struct xla_call *call, const struct kv_pool *pool, size_t array) {
    struct kv_attention work = work_of(call, pool, array);
    const struct xla_buffer *offsets = argument(call, 3), *starts = argument(call, 4);
    if (!is(starts, XLA_S32, 1) || !is_row(offsets, size(starts, 0) + 1) ||
        !are_in_order(offsets->data, starts->data, size(starts, 0), work.num_queries))
        return misfit(call, "rows");
    work.offsets = offsets->data, work.starts = starts->data;
    work.num_rows = size(starts, 0);
    return attention(call, &work);
}

xla_error *duet_kv_prefill_attention(struct xla_call *call) {
    return on_pool(call, 5, prefill);
}
