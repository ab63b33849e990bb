/* The kernels of a pool as XLA calls them, on the processor.
 *
 * `handle` [2] int32: the pool's number and the array's. It stands for the pages wherever a program
 * would pass them, so what reads them comes after what has written them.
 *
 *     write               handle, keys, values [N, K, D], page, slot [N]       -> handle
 *     decode_attention    handle, queries [B, H, D], page_table [B, M], lengths [B] -> [B, H, D]
 *     prefill_attention   handle, queries [T, H, D], page_table [R, M], row_offsets [R + 1],
 *                         cached_lengths [R]                                   -> [T, H, D]
 */
#ifndef DUET_KV_HANDLERS_H
#define DUET_KV_HANDLERS_H

#include "xla_ffi.h"

xla_error *duet_kv_write(struct xla_call *call);
xla_error *duet_kv_decode_attention(struct xla_call *call);
xla_error *duet_kv_prefill_attention(struct xla_call *call);

#endif
