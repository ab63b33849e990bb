#include "product_handler.h"

#include <stdio.h>

#include "ffi_call.h"
#include "product.h"
#include "sharing.h"

enum { WORTH_SHARING = 1 << 17 }; /* weights: some ten microseconds to read */

static xla_error *refused(const struct xla_call *call, const char *what, const char *why) {
    char message[160];
    snprintf(message, sizeof message, "duetjax: %s of a product x [B, in], weight [out, in] %s",
             what, why);
    return duet_ffi_error(call, XLA_INVALID_ARGUMENT, message);
}

static bool is_matrix(const struct xla_buffer *buffer, int type) {
    return buffer->type == type && buffer->rank == 2;
}

static bool is_aligned(const struct xla_buffer *buffer) {
    return (uintptr_t)buffer->data % (buffer->type == XLA_F32 ? 4 : 2) == 0;
}

static xla_error *check(const struct xla_call *call, const struct xla_buffer *x,
                        const struct xla_buffer *weight, const struct xla_buffer *y) {
    if (!is_matrix(x, XLA_F32) && !is_matrix(x, XLA_BF16))
        return refused(call, "x", "is no matrix of float32 or bfloat16");
    if (!is_matrix(weight, x->type))
        return refused(call, "the weight", "is no matrix of x's type");
    if (weight->dimensions[1] != x->dimensions[1])
        return refused(call, "the weight", "has rows of another length than x");
    if (!is_matrix(y, x->type) && !is_matrix(y, XLA_F32))
        return refused(call, "the result", "is no matrix of x's type or float32");
    if (y->dimensions[0] != x->dimensions[0] || y->dimensions[1] != weight->dimensions[0])
        return refused(call, "the result", "is not [B, out]");
    if (!is_aligned(x) || !is_aligned(weight) || !is_aligned(y))
        return refused(call, "an operand", "does not begin at a number's address");
    return NULL;
}

static enum product_type type_of(const struct xla_buffer *buffer) {
    return buffer->type == XLA_F32 ? PRODUCT_F32 : PRODUCT_BF16;
}

static void run_item(const void *work, size_t item) {
    product_run(work, item);
}

static xla_error *multiply(const struct xla_call *call, const struct xla_buffer *x,
                           const struct xla_buffer *weight, const struct xla_buffer *y) {
    struct product work = {
        .x = x->data,
        .weight = weight->data,
        .y = y->data,
        .num_rows = (size_t)x->dimensions[0],
        .num_in = (size_t)x->dimensions[1],
        .num_out = (size_t)weight->dimensions[0],
        .type = type_of(x),
        .y_type = type_of(y),
        .code = product_best_code(),
    };
    if (!product_begin(&work))
        return duet_ffi_error(call, XLA_INTERNAL, "duetjax: no memory for a product's rows");
    bool is_large = work.num_in * work.num_out > WORTH_SHARING;
    duet_share(is_large ? call : NULL, run_item, &work, product_num_items(&work));
    product_end(&work);
    return NULL;
}

xla_error *duet_product(struct xla_call *call) {
    if (duet_ffi_is_query(call))
        return NULL;
    xla_error *error = duet_ffi_check_version(call);
    if (error != NULL)
        return error;
    if (call->arguments.size != 2 || call->results.size != 1)
        return duet_ffi_error(call, XLA_INVALID_ARGUMENT, "duetjax: a call without its operands");
    const struct xla_buffer *x = call->arguments.values[0], *weight = call->arguments.values[1];
    const struct xla_buffer *y = call->results.values[0];
    error = check(call, x, weight, y);
    return error != NULL ? error : multiply(call, x, weight, y);
}
