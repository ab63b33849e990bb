/* A product of few rows as XLA calls it, on the processor.
 *
 *     product    x [B, in], weight [out, in]    -> y [B, out]
 *
 * x and weight in float32 or bfloat16, both in the same; y in theirs or float32. */
#ifndef DUET_PRODUCT_HANDLER_H
#define DUET_PRODUCT_HANDLER_H

#include "xla_ffi.h"

xla_error *duet_product(struct xla_call *call);

#endif
