/* Work in items that depend on nothing of each other, on XLA's threads and the caller's. */
#ifndef DUET_SHARING_H
#define DUET_SHARING_H

#include <stddef.h>

#include "xla_ffi.h"

typedef void duet_item(const void *work, size_t item);

/* Runs items 0 to num_items, each once, and returns when all have been. Threads take one after
 * another, the caller too, who may well do all of it: the others may be at other work, and nobody
 * waits for a thread that has not begun. call: NULL for work that is not worth sharing. */
void duet_share(const struct xla_call *call, duet_item *run, const void *work, size_t num_items);

#endif
