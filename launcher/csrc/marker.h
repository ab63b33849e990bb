/* The handler of the custom call that ends every program. */
#ifndef DUET_MARKER_H
#define DUET_MARKER_H

#include "xla_ffi.h"

/* For XLA's stages INITIALIZE and EXECUTE alike, as it is told which. */
xla_error *duet_marker(struct xla_call *call);

#endif
