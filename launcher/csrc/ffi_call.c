#include "ffi_call.h"

xla_error *duet_ffi_error(const struct xla_call *call, int code, const char *message) {
    struct xla_error_arguments arguments = {sizeof arguments, NULL, message, code};
    return call->api->create_error(&arguments);
}

/* The answer is XLA's own version: we use what versions have in common. */
bool duet_ffi_is_query(const struct xla_call *call) {
    struct xla_extension *extension = call->extension;
    if (extension == NULL || extension->type != XLA_METADATA_EXTENSION)
        return false;
    struct xla_metadata *metadata = ((struct xla_metadata_extension *)extension)->metadata;
    metadata->version.major = call->api->version.major;
    metadata->version.minor = call->api->version.minor;
    metadata->traits = 0;
    return true;
}

xla_error *duet_ffi_check_version(const struct xla_call *call) {
    if (call->api->version.major == 0 && call->struct_size >= offsetof(struct xla_call, future) &&
        call->api->struct_size >= sizeof *call->api)
        return NULL;
    return duet_ffi_error(
        call, XLA_FAILED_PRECONDITION,
        "duetjax: this version of jax is not known to the launcher; install another");
}
