/* Where XLA meets the launcher: the last operation of every program is a call of this handler.
 *
 * XLA initialises all operations of an executable before it enqueues any, so a capture that begins
 * here at INITIALIZE misses nothing; its EXECUTE comes after everything else has been enqueued. The
 * handler does nothing else, so that a program runs as if it had no marker unless it is armed. */
#include "marker.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "ffi_call.h"
#include "launcher.h"

/* The attribute `program`: which recording an execution belongs to; 0 where there is none. */
static bool find_program(const struct xla_attributes *attributes, int64_t *program) {
    static const char name[] = "program";
    *program = 0;
    for (int64_t i = 0; i < attributes->size; i++) {
        const struct xla_text *text = attributes->names[i];
        if (text->length != sizeof name - 1 || memcmp(text->start, name, text->length) != 0)
            continue;
        const struct xla_scalar *scalar = attributes->values[i];
        if (attributes->types[i] != XLA_SCALAR_ATTRIBUTE || scalar->type != XLA_S64)
            return false;
        memcpy(program, scalar->value, sizeof *program);
        return true;
    }
    return true;
}

static xla_error *begin(struct xla_call *call, int64_t program) {
    struct xla_stream_arguments arguments = {sizeof arguments, NULL, call->context, NULL};
    xla_error *error = call->api->get_stream(&arguments);
    if (error != NULL)
        return error;
    size_t count = (size_t)call->arguments.size;
    duet_address *addresses = calloc(count + 1, sizeof *addresses);
    if (addresses == NULL)
        return duet_ffi_error(call, XLA_INTERNAL, "duetjax: no memory for a program's addresses");
    for (size_t i = 0; i < count; i++)
        addresses[i] = (uintptr_t)((struct xla_buffer *)call->arguments.values[i])->data;
    int status = duet_capture_begin(program, arguments.stream, addresses, count);
    free(addresses);
    return status == DUET_OK ? NULL : duet_ffi_error(call, XLA_INTERNAL, duet_last_error());
}

xla_error *duet_marker(struct xla_call *call) {
    if (duet_ffi_is_query(call))
        return NULL;
    xla_error *unknown = duet_ffi_check_version(call);
    if (unknown != NULL)
        return unknown;
    int64_t program;
    if (!find_program(&call->attributes, &program))
        return duet_ffi_error(call, XLA_FAILED_PRECONDITION,
                    "duetjax: the marker's attribute `program` must be an int64");
    if (call->stage == XLA_INITIALIZE && duet_capture_is_armed(program))
        return begin(call, program);
    if (call->stage == XLA_EXECUTE && duet_capture_end(program) != DUET_OK)
        return duet_ffi_error(call, XLA_INTERNAL, duet_last_error());
    return NULL;
}
