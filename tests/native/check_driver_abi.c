/* Holds launcher/csrc/driver.h against a real cuda.h, at compile time: sizes, offsets, values,
 * prototypes and exported names. Compiled only where a cuda.h is found:
 *     gcc -std=gnu11 -Wall -Wextra -Werror -fsyntax-only -Ilauncher/csrc -I<dir of cuda.h> <this>
 * cuda.h comes first: its #defines then rename the fields of struct driver in this file only. */
#include <cuda.h>

#include "driver.h"

#define SIZE(ours, theirs)                                                                         \
    _Static_assert(sizeof(ours) == sizeof(theirs) && _Alignof(ours) == _Alignof(theirs), #ours)
#define FIELD(ours, field, theirs, their_field)                                                    \
    _Static_assert(offsetof(ours, field) == offsetof(theirs, their_field) &&                       \
                       sizeof(((ours *)0)->field) == sizeof(((theirs *)0)->their_field),           \
                   #ours "." #field)
#define VALUE(ours, theirs)                                                                        \
    _Static_assert((long long)(ours) == (long long)(theirs), #ours " is not " #theirs)

SIZE(drv_device, CUdevice);
SIZE(drv_address, CUdeviceptr);
SIZE(drv_result, CUresult);
SIZE(drv_device_attribute, CUdevice_attribute);
SIZE(drv_function_attribute, CUfunction_attribute);
SIZE(drv_pointer_attribute, CUpointer_attribute);
SIZE(drv_memory_type, CUmemorytype);
SIZE(drv_capture_mode, CUstreamCaptureMode);
SIZE(drv_capture_status, CUstreamCaptureStatus);
SIZE(drv_node_type, CUgraphNodeType);
SIZE(drv_attribute_id, CUlaunchAttributeID);
SIZE(drv_resource_type, CUdevResourceType);

#define ERROR(name) VALUE(DRV_ERROR_##name, CUDA_ERROR_##name)
VALUE(DRV_SUCCESS, CUDA_SUCCESS);
ERROR(INVALID_VALUE);
ERROR(OUT_OF_MEMORY);
ERROR(NOT_INITIALIZED);
ERROR(DEINITIALIZED);
ERROR(NO_DEVICE);
ERROR(INVALID_DEVICE);
ERROR(INVALID_CONTEXT);
ERROR(INVALID_HANDLE);
ERROR(ILLEGAL_STATE);
ERROR(LOSSY_QUERY);
ERROR(NOT_FOUND);
ERROR(NOT_READY);
ERROR(ILLEGAL_ADDRESS);
ERROR(LAUNCH_OUT_OF_RESOURCES);
ERROR(CONTEXT_IS_DESTROYED);
ERROR(LAUNCH_FAILED);
ERROR(COOPERATIVE_LAUNCH_TOO_LARGE);
ERROR(NOT_SUPPORTED);
ERROR(STREAM_CAPTURE_UNSUPPORTED);
ERROR(STREAM_CAPTURE_INVALIDATED);
ERROR(STREAM_CAPTURE_MERGE);
ERROR(STREAM_CAPTURE_UNMATCHED);
ERROR(STREAM_CAPTURE_UNJOINED);
ERROR(STREAM_CAPTURE_ISOLATION);
ERROR(STREAM_CAPTURE_IMPLICIT);
ERROR(CAPTURED_EVENT);
ERROR(STREAM_CAPTURE_WRONG_THREAD);
ERROR(INVALID_CLUSTER_SIZE);
ERROR(INVALID_RESOURCE_TYPE);
ERROR(INVALID_RESOURCE_CONFIGURATION);
ERROR(UNKNOWN);

#define DEVICE(name) VALUE(DRV_DEVICE_##name, CU_DEVICE_ATTRIBUTE_##name)
DEVICE(MULTIPROCESSOR_COUNT);
DEVICE(CAN_MAP_HOST_MEMORY);
DEVICE(UNIFIED_ADDRESSING);
DEVICE(COMPUTE_CAPABILITY_MAJOR);
DEVICE(COMPUTE_CAPABILITY_MINOR);
DEVICE(STREAM_PRIORITIES_SUPPORTED);
DEVICE(COOPERATIVE_LAUNCH);
DEVICE(CLUSTER_LAUNCH);
DEVICE(CAN_USE_64_BIT_STREAM_MEM_OPS);

#define FUNCTION(name) VALUE(DRV_FUNCTION_##name, CU_FUNC_ATTRIBUTE_##name)
FUNCTION(MAX_THREADS_PER_BLOCK);
FUNCTION(SHARED_SIZE_BYTES);
FUNCTION(LOCAL_SIZE_BYTES);
FUNCTION(NUM_REGS);
FUNCTION(MAX_DYNAMIC_SHARED_SIZE_BYTES);
FUNCTION(PREFERRED_SHARED_MEMORY_CARVEOUT);
FUNCTION(CLUSTER_SIZE_MUST_BE_SET);
FUNCTION(REQUIRED_CLUSTER_WIDTH);
FUNCTION(REQUIRED_CLUSTER_HEIGHT);
FUNCTION(REQUIRED_CLUSTER_DEPTH);
FUNCTION(NON_PORTABLE_CLUSTER_SIZE_ALLOWED);
FUNCTION(CLUSTER_SCHEDULING_POLICY_PREFERENCE);

#define POINTER(name) VALUE(DRV_POINTER_##name, CU_POINTER_ATTRIBUTE_##name)
POINTER(CONTEXT);
POINTER(MEMORY_TYPE);
POINTER(DEVICE_POINTER);
POINTER(HOST_POINTER);
POINTER(DEVICE_ORDINAL);
POINTER(RANGE_START_ADDR);
POINTER(RANGE_SIZE);

VALUE(DRV_MEMORY_HOST, CU_MEMORYTYPE_HOST);
VALUE(DRV_MEMORY_DEVICE, CU_MEMORYTYPE_DEVICE);
VALUE(DRV_MEMORY_ARRAY, CU_MEMORYTYPE_ARRAY);
VALUE(DRV_MEMORY_UNIFIED, CU_MEMORYTYPE_UNIFIED);
VALUE(DRV_STREAM_DEFAULT, CU_STREAM_DEFAULT);
VALUE(DRV_STREAM_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
VALUE(DRV_EVENT_DEFAULT, CU_EVENT_DEFAULT);
VALUE(DRV_EVENT_DISABLE_TIMING, CU_EVENT_DISABLE_TIMING);
VALUE(DRV_EVENT_WAIT_DEFAULT, CU_EVENT_WAIT_DEFAULT);
VALUE(DRV_STREAM_WRITE_DEFAULT, CU_STREAM_WRITE_VALUE_DEFAULT);
VALUE(DRV_GREEN_CONTEXT_DEFAULT_STREAM, CU_GREEN_CTX_DEFAULT_STREAM);
VALUE(DRV_HOST_ALLOC_PORTABLE, CU_MEMHOSTALLOC_PORTABLE);
VALUE(DRV_HOST_ALLOC_DEVICE_MAP, CU_MEMHOSTALLOC_DEVICEMAP);
VALUE(DRV_INSTANTIATE_USE_NODE_PRIORITY, CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY);
VALUE(DRV_SPLIT_IGNORE_COSCHEDULING, CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING);
VALUE(DRV_SPLIT_MAX_POTENTIAL_CLUSTER_SIZE, CU_DEV_SM_RESOURCE_SPLIT_MAX_POTENTIAL_CLUSTER_SIZE);
VALUE(DRV_CAPTURE_GLOBAL, CU_STREAM_CAPTURE_MODE_GLOBAL);
VALUE(DRV_CAPTURE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
VALUE(DRV_CAPTURE_RELAXED, CU_STREAM_CAPTURE_MODE_RELAXED);
VALUE(DRV_CAPTURE_NONE, CU_STREAM_CAPTURE_STATUS_NONE);
VALUE(DRV_CAPTURE_ACTIVE, CU_STREAM_CAPTURE_STATUS_ACTIVE);
VALUE(DRV_CAPTURE_INVALIDATED, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
VALUE(DRV_DEPENDENCY_DEFAULT, CU_GRAPH_DEPENDENCY_TYPE_DEFAULT);
VALUE(DRV_DEPENDENCY_PROGRAMMATIC, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC);
VALUE(DRV_SCHEDULING_DEFAULT, CU_CLUSTER_SCHEDULING_POLICY_DEFAULT);
VALUE(DRV_SCHEDULING_SPREAD, CU_CLUSTER_SCHEDULING_POLICY_SPREAD);
VALUE(DRV_SCHEDULING_LOAD_BALANCING, CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING);
VALUE(DRV_MEM_SYNC_DOMAIN_DEFAULT, CU_LAUNCH_MEM_SYNC_DOMAIN_DEFAULT);
VALUE(DRV_MEM_SYNC_DOMAIN_REMOTE, CU_LAUNCH_MEM_SYNC_DOMAIN_REMOTE);
VALUE(DRV_RESOURCE_INVALID, CU_DEV_RESOURCE_TYPE_INVALID);
VALUE(DRV_RESOURCE_SM, CU_DEV_RESOURCE_TYPE_SM);
VALUE(DRV_EXTRA_END, CU_LAUNCH_PARAM_END_AS_INT);
VALUE(DRV_EXTRA_BUFFER, CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT);
VALUE(DRV_EXTRA_SIZE, CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT);

#define NODE(ours, theirs) VALUE(DRV_NODE_##ours, CU_GRAPH_NODE_TYPE_##theirs)
NODE(KERNEL, KERNEL);
NODE(MEMCPY, MEMCPY);
NODE(MEMSET, MEMSET);
NODE(HOST, HOST);
NODE(GRAPH, GRAPH);
NODE(EMPTY, EMPTY);
NODE(WAIT_EVENT, WAIT_EVENT);
NODE(EVENT_RECORD, EVENT_RECORD);
NODE(EXT_SEMAPHORE_SIGNAL, EXT_SEMAS_SIGNAL);
NODE(EXT_SEMAPHORE_WAIT, EXT_SEMAS_WAIT);
NODE(MEM_ALLOC, MEM_ALLOC);
NODE(MEM_FREE, MEM_FREE);
NODE(BATCH_MEM_OP, BATCH_MEM_OP);
NODE(CONDITIONAL, CONDITIONAL);

#define ATTRIBUTE(name) VALUE(DRV_ATTRIBUTE_##name, CU_LAUNCH_ATTRIBUTE_##name)
ATTRIBUTE(IGNORE);
ATTRIBUTE(ACCESS_POLICY_WINDOW);
ATTRIBUTE(COOPERATIVE);
ATTRIBUTE(CLUSTER_DIMENSION);
ATTRIBUTE(CLUSTER_SCHEDULING_POLICY_PREFERENCE);
ATTRIBUTE(PROGRAMMATIC_STREAM_SERIALIZATION);
ATTRIBUTE(PRIORITY);
ATTRIBUTE(MEM_SYNC_DOMAIN_MAP);
ATTRIBUTE(MEM_SYNC_DOMAIN);
ATTRIBUTE(PREFERRED_CLUSTER_DIMENSION);
ATTRIBUTE(DEVICE_UPDATABLE_KERNEL_NODE);
ATTRIBUTE(PREFERRED_SHARED_MEMORY_CARVEOUT);

#define EDGE(field) FIELD(drv_edge_data, field, CUgraphEdgeData, field)
SIZE(drv_edge_data, CUgraphEdgeData);
EDGE(from_port);
EDGE(to_port);
EDGE(type);
EDGE(reserved);

#define WINDOW(ours, theirs) FIELD(drv_access_window, ours, CUaccessPolicyWindow, theirs)
SIZE(drv_access_window, CUaccessPolicyWindow);
WINDOW(base, base_ptr);
WINDOW(bytes, num_bytes);
WINDOW(hit_ratio, hitRatio);
WINDOW(hit_property, hitProp);
WINDOW(miss_property, missProp);

#define UNION(ours, theirs) FIELD(drv_attribute_value, ours, CUlaunchAttributeValue, theirs)
SIZE(drv_attribute_value, CUlaunchAttributeValue);
UNION(bytes, pad);
UNION(access_window, accessPolicyWindow);
UNION(cooperative, cooperative);
UNION(cluster, clusterDim);
UNION(cluster.x, clusterDim.x);
UNION(cluster.y, clusterDim.y);
UNION(cluster.z, clusterDim.z);
UNION(scheduling_policy, clusterSchedulingPolicyPreference);
UNION(programmatic_serialization, programmaticStreamSerializationAllowed);
UNION(priority, priority);
UNION(mem_sync_domain_map, memSyncDomainMap);
UNION(mem_sync_domain_map.default_, memSyncDomainMap.default_);
UNION(mem_sync_domain_map.remote, memSyncDomainMap.remote);
UNION(mem_sync_domain, memSyncDomain);
UNION(preferred_cluster, preferredClusterDim);
UNION(device_updatable.updatable, deviceUpdatableKernelNode.deviceUpdatable);
UNION(device_updatable.device_node, deviceUpdatableKernelNode.devNode);
UNION(shared_memory_carveout, sharedMemCarveout);

SIZE(drv_attribute, CUlaunchAttribute);
FIELD(drv_attribute, id, CUlaunchAttribute, id);
FIELD(drv_attribute, value, CUlaunchAttribute, value);

#define CONFIG(ours, theirs) FIELD(drv_launch_config, ours, CUlaunchConfig, theirs)
SIZE(drv_launch_config, CUlaunchConfig);
CONFIG(grid_x, gridDimX);
CONFIG(grid_y, gridDimY);
CONFIG(grid_z, gridDimZ);
CONFIG(block_x, blockDimX);
CONFIG(block_y, blockDimY);
CONFIG(block_z, blockDimZ);
CONFIG(shared_bytes, sharedMemBytes);
CONFIG(stream, hStream);
CONFIG(attributes, attrs);
CONFIG(num_attributes, numAttrs);

#define KERNEL(ours, theirs) FIELD(drv_kernel_params, ours, CUDA_KERNEL_NODE_PARAMS, theirs)
SIZE(drv_kernel_params, CUDA_KERNEL_NODE_PARAMS);
KERNEL(function, func);
KERNEL(grid_x, gridDimX);
KERNEL(grid_y, gridDimY);
KERNEL(grid_z, gridDimZ);
KERNEL(block_x, blockDimX);
KERNEL(block_y, blockDimY);
KERNEL(block_z, blockDimZ);
KERNEL(shared_bytes, sharedMemBytes);
KERNEL(params, kernelParams);
KERNEL(extra, extra);
KERNEL(kernel, kern);
KERNEL(context, ctx);

#define MEMSET(ours, theirs) FIELD(drv_memset_params, ours, CUDA_MEMSET_NODE_PARAMS, theirs)
SIZE(drv_memset_params, CUDA_MEMSET_NODE_PARAMS);
MEMSET(dst, dst);
MEMSET(pitch, pitch);
MEMSET(value, value);
MEMSET(element_size, elementSize);
MEMSET(width, width);
MEMSET(height, height);

#define COPY(ours, theirs) FIELD(drv_copy_3d, ours, CUDA_MEMCPY3D, theirs)
SIZE(drv_copy_3d, CUDA_MEMCPY3D);
COPY(src_x_bytes, srcXInBytes);
COPY(src_y, srcY);
COPY(src_z, srcZ);
COPY(src_lod, srcLOD);
COPY(src_type, srcMemoryType);
COPY(src_host, srcHost);
COPY(src_device, srcDevice);
COPY(src_array, srcArray);
COPY(reserved0, reserved0);
COPY(src_pitch, srcPitch);
COPY(src_height, srcHeight);
COPY(dst_x_bytes, dstXInBytes);
COPY(dst_y, dstY);
COPY(dst_z, dstZ);
COPY(dst_lod, dstLOD);
COPY(dst_type, dstMemoryType);
COPY(dst_host, dstHost);
COPY(dst_device, dstDevice);
COPY(dst_array, dstArray);
COPY(reserved1, reserved1);
COPY(dst_pitch, dstPitch);
COPY(dst_height, dstHeight);
COPY(width_bytes, WidthInBytes);
COPY(height, Height);
COPY(depth, Depth);

/* Older headers ask for less alignment than the newest: ours must do for both. */
_Static_assert(sizeof(drv_resource) == sizeof(CUdevResource), "drv_resource");
_Static_assert(_Alignof(drv_resource) >= _Alignof(CUdevResource), "drv_resource");
FIELD(drv_resource, type, CUdevResource, type);
FIELD(drv_resource, hidden, CUdevResource, _internal_padding);
FIELD(drv_resource, sm.count, CUdevResource, sm.smCount);
FIELD(drv_resource, sm.min_partition, CUdevResource, sm.minSmPartitionSize);
FIELD(drv_resource, sm.coscheduled_alignment, CUdevResource, sm.smCoscheduledAlignment);
#if CUDA_VERSION >= 13050
FIELD(drv_resource, next, CUdevResource, nextResource);
#endif

/* The layouts agree; now let each of our types stand for theirs, and compare whole prototypes. */
#define drv_device CUdevice
#define drv_address CUdeviceptr
#define drv_context CUcontext
#define drv_green_context CUgreenCtx
#define drv_resource_desc CUdevResourceDesc
#define drv_stream CUstream
#define drv_event CUevent
#define drv_function CUfunction
#define drv_kernel CUkernel
#define drv_graph CUgraph
#define drv_graph_node CUgraphNode
#define drv_graph_exec CUgraphExec
#define drv_result CUresult
#define drv_device_attribute CUdevice_attribute
#define drv_function_attribute CUfunction_attribute
#define drv_pointer_attribute CUpointer_attribute
#define drv_capture_mode CUstreamCaptureMode
#define drv_capture_status CUstreamCaptureStatus
#define drv_node_type CUgraphNodeType
#define drv_attribute_id CUlaunchAttributeID
#define drv_attribute_value CUlaunchAttributeValue
#define drv_edge_data CUgraphEdgeData
#define drv_launch_config CUlaunchConfig
#define drv_kernel_params CUDA_KERNEL_NODE_PARAMS
#define drv_memset_params CUDA_MEMSET_NODE_PARAMS
#define drv_copy_3d CUDA_MEMCPY3D
#define drv_resource CUdevResource
#define drv_resource_type CUdevResourceType

#define SPELL(name) #name /* the argument has been expanded by then: cuMemAlloc is cuMemAlloc_v2 */
#define CHECK(name, symbol, parameters)                                                            \
    _Static_assert(__builtin_types_compatible_p(CUresult(*) parameters, __typeof__(&name)),        \
                   symbol " has another prototype");                                               \
    _Static_assert(__builtin_strcmp(SPELL(name), symbol) == 0, symbol " is exported as another");

DRIVER_REQUIRED(CHECK)
