/* What every handler of XLA's calls begins with. */
#ifndef DUET_FFI_CALL_H
#define DUET_FFI_CALL_H

#include <stdbool.h>

#include "xla_ffi.h"

xla_error *duet_ffi_error(const struct xla_call *call, int code, const char *message);
/* Answers XLA where it only asks a handler for the version that it was written for. */
bool duet_ffi_is_query(const struct xla_call *call);
/* An error where this version of XLA may lay out its structures otherwise, else NULL. */
xla_error *duet_ffi_check_version(const struct xla_call *call);

#endif
