/* Holds launcher/csrc/xla_ffi.h against jaxlib's xla/ffi/api/c_api.h, at compile time: sizes,
 * offsets and values. Compiled only where that header is found (see the Makefile here). */
#include <stddef.h>
#include <stdint.h>

#include <xla/ffi/api/c_api.h>

#include "xla_ffi.h"

#define SIZE(ours, theirs)                                                                         \
    _Static_assert(sizeof(ours) == sizeof(theirs) && _Alignof(ours) == _Alignof(theirs), #ours)
#define FIELD(ours, field, theirs, their_field)                                                    \
    _Static_assert(offsetof(ours, field) == offsetof(theirs, their_field) &&                       \
                       sizeof(((ours *)0)->field) == sizeof(((theirs *)0)->their_field),           \
                   #ours "." #field)
#define VALUE(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #ours " is not " #theirs)

/* What the marker tells XLA that it was made for. */
_Static_assert(XLA_FFI_API_MAJOR == 0, "another major version of the interface");

VALUE(XLA_METADATA_EXTENSION, XLA_FFI_Extension_Metadata);
VALUE(XLA_INITIALIZE, XLA_FFI_ExecutionStage_INITIALIZE);
VALUE(XLA_EXECUTE, XLA_FFI_ExecutionStage_EXECUTE);
VALUE(XLA_FAILED_PRECONDITION, XLA_FFI_Error_Code_FAILED_PRECONDITION);
VALUE(XLA_INTERNAL, XLA_FFI_Error_Code_INTERNAL);
VALUE(XLA_SCALAR_ATTRIBUTE, XLA_FFI_AttrType_SCALAR);
VALUE(XLA_S32, XLA_FFI_DataType_S32);
VALUE(XLA_S64, XLA_FFI_DataType_S64);
VALUE(XLA_F32, XLA_FFI_DataType_F32);
VALUE(XLA_BF16, XLA_FFI_DataType_BF16);
VALUE(XLA_INVALID_ARGUMENT, XLA_FFI_Error_Code_INVALID_ARGUMENT);

SIZE(struct xla_extension, XLA_FFI_InternalExtension);
FIELD(struct xla_extension, struct_size, XLA_FFI_InternalExtension, struct_size);
FIELD(struct xla_extension, type, XLA_FFI_InternalExtension, type);
FIELD(struct xla_extension, next, XLA_FFI_InternalExtension, next);

SIZE(struct xla_version, XLA_FFI_Api_Version);
FIELD(struct xla_version, struct_size, XLA_FFI_Api_Version, struct_size);
FIELD(struct xla_version, extension, XLA_FFI_Api_Version, extension_start);
FIELD(struct xla_version, major, XLA_FFI_Api_Version, major_version);
FIELD(struct xla_version, minor, XLA_FFI_Api_Version, minor_version);

SIZE(struct xla_metadata, XLA_FFI_Metadata);
FIELD(struct xla_metadata, struct_size, XLA_FFI_Metadata, struct_size);
FIELD(struct xla_metadata, version, XLA_FFI_Metadata, api_version);
FIELD(struct xla_metadata, traits, XLA_FFI_Metadata, traits);
FIELD(struct xla_metadata, state_type, XLA_FFI_Metadata, state_type_id);

SIZE(struct xla_metadata_extension, XLA_FFI_Metadata_Extension);
FIELD(struct xla_metadata_extension, base, XLA_FFI_Metadata_Extension, extension_base);
FIELD(struct xla_metadata_extension, metadata, XLA_FFI_Metadata_Extension, metadata);

SIZE(struct xla_error_arguments, XLA_FFI_Error_Create_Args);
FIELD(struct xla_error_arguments, struct_size, XLA_FFI_Error_Create_Args, struct_size);
FIELD(struct xla_error_arguments, extension, XLA_FFI_Error_Create_Args, extension_start);
FIELD(struct xla_error_arguments, message, XLA_FFI_Error_Create_Args, message);
FIELD(struct xla_error_arguments, code, XLA_FFI_Error_Create_Args, errc);

SIZE(struct xla_stream_arguments, XLA_FFI_Stream_Get_Args);
FIELD(struct xla_stream_arguments, struct_size, XLA_FFI_Stream_Get_Args, struct_size);
FIELD(struct xla_stream_arguments, extension, XLA_FFI_Stream_Get_Args, extension_start);
FIELD(struct xla_stream_arguments, context, XLA_FFI_Stream_Get_Args, ctx);
FIELD(struct xla_stream_arguments, stream, XLA_FFI_Stream_Get_Args, stream);

/* Only the beginning of the table is declared. */
_Static_assert(sizeof(struct xla_api) <= sizeof(XLA_FFI_Api), "struct xla_api");
FIELD(struct xla_api, struct_size, XLA_FFI_Api, struct_size);
FIELD(struct xla_api, extension, XLA_FFI_Api, extension_start);
FIELD(struct xla_api, version, XLA_FFI_Api, api_version);
FIELD(struct xla_api, internal, XLA_FFI_Api, internal_api);
FIELD(struct xla_api, create_error, XLA_FFI_Api, XLA_FFI_Error_Create);
FIELD(struct xla_api, destroy_error, XLA_FFI_Api, XLA_FFI_Error_Destroy);
FIELD(struct xla_api, get_stream, XLA_FFI_Api, XLA_FFI_Stream_Get);
FIELD(struct xla_api, schedule, XLA_FFI_Api, XLA_FFI_ThreadPool_Schedule);
FIELD(struct xla_api, num_threads, XLA_FFI_Api, XLA_FFI_ThreadPool_NumThreads);

SIZE(struct xla_error_destroy_arguments, XLA_FFI_Error_Destroy_Args);
FIELD(struct xla_error_destroy_arguments, error, XLA_FFI_Error_Destroy_Args, error);

SIZE(struct xla_schedule_arguments, XLA_FFI_ThreadPool_Schedule_Args);
FIELD(struct xla_schedule_arguments, context, XLA_FFI_ThreadPool_Schedule_Args, ctx);
FIELD(struct xla_schedule_arguments, task, XLA_FFI_ThreadPool_Schedule_Args, task);
FIELD(struct xla_schedule_arguments, data, XLA_FFI_ThreadPool_Schedule_Args, data);

SIZE(struct xla_num_threads_arguments, XLA_FFI_ThreadPool_NumThreads_Args);
FIELD(struct xla_num_threads_arguments, context, XLA_FFI_ThreadPool_NumThreads_Args, ctx);
FIELD(struct xla_num_threads_arguments, num_threads, XLA_FFI_ThreadPool_NumThreads_Args,
      num_threads);

SIZE(struct xla_buffer, XLA_FFI_Buffer);
FIELD(struct xla_buffer, struct_size, XLA_FFI_Buffer, struct_size);
FIELD(struct xla_buffer, extension, XLA_FFI_Buffer, extension_start);
FIELD(struct xla_buffer, type, XLA_FFI_Buffer, dtype);
FIELD(struct xla_buffer, data, XLA_FFI_Buffer, data);
FIELD(struct xla_buffer, rank, XLA_FFI_Buffer, rank);
FIELD(struct xla_buffer, dimensions, XLA_FFI_Buffer, dims);

SIZE(struct xla_list, XLA_FFI_Args);
FIELD(struct xla_list, struct_size, XLA_FFI_Args, struct_size);
FIELD(struct xla_list, extension, XLA_FFI_Args, extension_start);
FIELD(struct xla_list, size, XLA_FFI_Args, size);
FIELD(struct xla_list, types, XLA_FFI_Args, types);
FIELD(struct xla_list, values, XLA_FFI_Args, args);
SIZE(struct xla_list, XLA_FFI_Rets);
FIELD(struct xla_list, values, XLA_FFI_Rets, rets);

SIZE(struct xla_text, XLA_FFI_ByteSpan);
FIELD(struct xla_text, start, XLA_FFI_ByteSpan, ptr);
FIELD(struct xla_text, length, XLA_FFI_ByteSpan, len);

SIZE(struct xla_scalar, XLA_FFI_Scalar);
FIELD(struct xla_scalar, type, XLA_FFI_Scalar, dtype);
FIELD(struct xla_scalar, value, XLA_FFI_Scalar, value);

SIZE(struct xla_attributes, XLA_FFI_Attrs);
FIELD(struct xla_attributes, struct_size, XLA_FFI_Attrs, struct_size);
FIELD(struct xla_attributes, extension, XLA_FFI_Attrs, extension_start);
FIELD(struct xla_attributes, size, XLA_FFI_Attrs, size);
FIELD(struct xla_attributes, types, XLA_FFI_Attrs, types);
FIELD(struct xla_attributes, names, XLA_FFI_Attrs, names);
FIELD(struct xla_attributes, values, XLA_FFI_Attrs, attrs);

SIZE(struct xla_call, XLA_FFI_CallFrame);
FIELD(struct xla_call, struct_size, XLA_FFI_CallFrame, struct_size);
FIELD(struct xla_call, extension, XLA_FFI_CallFrame, extension_start);
FIELD(struct xla_call, api, XLA_FFI_CallFrame, api);
FIELD(struct xla_call, context, XLA_FFI_CallFrame, ctx);
FIELD(struct xla_call, stage, XLA_FFI_CallFrame, stage);
FIELD(struct xla_call, arguments, XLA_FFI_CallFrame, args);
FIELD(struct xla_call, results, XLA_FFI_CallFrame, rets);
FIELD(struct xla_call, attributes, XLA_FFI_CallFrame, attrs);
FIELD(struct xla_call, future, XLA_FFI_CallFrame, future);
