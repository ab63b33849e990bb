/* The part of XLA's FFI binary interface that the launcher's handlers use, so that building the launcher needs
 * no header of jaxlib's. tests/native/check_xla_abi.c holds it against jaxlib's own (c_api.h). */
#ifndef DUET_XLA_FFI_H
#define DUET_XLA_FFI_H

#include <stddef.h>
#include <stdint.h>

enum { XLA_METADATA_EXTENSION = 1 };
enum xla_stage { XLA_INITIALIZE = 2, XLA_EXECUTE = 3 };
enum xla_code { XLA_INVALID_ARGUMENT = 3, XLA_FAILED_PRECONDITION = 9, XLA_INTERNAL = 13 };
enum xla_attribute_type { XLA_SCALAR_ATTRIBUTE = 3 };
enum xla_data_type { XLA_S32 = 4, XLA_S64 = 5, XLA_F32 = 11, XLA_BF16 = 16 };

typedef struct xla_error xla_error;

struct xla_extension {
    size_t struct_size;
    int type;
    struct xla_extension *next;
};

struct xla_version {
    size_t struct_size;
    struct xla_extension *extension;
    int major, minor;
};

struct xla_metadata {
    size_t struct_size;
    struct xla_version version;
    uint32_t traits;
    int64_t state_type;
};

struct xla_metadata_extension {
    struct xla_extension base;
    struct xla_metadata *metadata;
};

struct xla_error_arguments {
    size_t struct_size;
    struct xla_extension *extension;
    const char *message;
    int code;
};

struct xla_stream_arguments {
    size_t struct_size;
    struct xla_extension *extension;
    void *context;
    void *stream; /* out */
};

struct xla_error_destroy_arguments {
    size_t struct_size;
    struct xla_extension *extension;
    xla_error *error;
};

struct xla_schedule_arguments {
    size_t struct_size;
    struct xla_extension *extension;
    void *context;
    void (*task)(void *data);
    void *data;
};

struct xla_num_threads_arguments {
    size_t struct_size;
    struct xla_extension *extension;
    void *context;
    int64_t *num_threads; /* out */
};

/* The functions that XLA offers; those behind num_threads are of no interest. */
struct xla_api {
    size_t struct_size;
    struct xla_extension *extension;
    struct xla_version version;
    const void *internal;
    xla_error *(*create_error)(struct xla_error_arguments *);
    void *get_details;
    void (*destroy_error)(struct xla_error_destroy_arguments *);
    void *register_handler;
    xla_error *(*get_stream)(struct xla_stream_arguments *);
    void *unused[6];
    xla_error *(*schedule)(struct xla_schedule_arguments *);
    xla_error *(*num_threads)(struct xla_num_threads_arguments *);
};

struct xla_buffer {
    size_t struct_size;
    struct xla_extension *extension;
    int type;
    void *data;
    int64_t rank;
    int64_t *dimensions;
};

struct xla_list {
    size_t struct_size;
    struct xla_extension *extension;
    int64_t size;
    int *types;
    void **values;
};

struct xla_text {
    const char *start;
    size_t length;
};

struct xla_scalar {
    int type;
    void *value;
};

struct xla_attributes {
    size_t struct_size;
    struct xla_extension *extension;
    int64_t size;
    int *types;
    struct xla_text **names;
    void **values;
};

struct xla_call {
    size_t struct_size;
    struct xla_extension *extension;
    const struct xla_api *api;
    void *context;
    int stage;
    struct xla_list arguments, results;
    struct xla_attributes attributes;
    void *future;
};

#endif
