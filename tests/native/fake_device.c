/* The double's device, its contexts, the splitting of its SMs, and the names of errors. */
#include <stdio.h>
#include <string.h>

#include "fake_internal.h"

/* ---- versions and errors --------------------------------------------------------------------- */

drv_result cuInit(unsigned int flags) {
    ENTER();
    if (flags)
        return leave(DRV_ERROR_INVALID_VALUE);
    fake.initialised = true;
    return leave(DRV_SUCCESS);
}

drv_result cuDriverGetVersion(int *version) {
    ENTER();
    *version = fake.driver_version;
    return leave(DRV_SUCCESS);
}

#define NAME(error)                                                                                \
    {DRV_ERROR_##error, "CUDA_ERROR_" #error}
static const struct {
    drv_result code;
    const char *name;
} error_names[] = {
    {DRV_SUCCESS, "CUDA_SUCCESS"},
    NAME(INVALID_VALUE),
    NAME(OUT_OF_MEMORY),
    NAME(NOT_INITIALIZED),
    NAME(DEINITIALIZED),
    NAME(NO_DEVICE),
    NAME(INVALID_DEVICE),
    NAME(INVALID_CONTEXT),
    NAME(INVALID_HANDLE),
    NAME(ILLEGAL_STATE),
    NAME(LOSSY_QUERY),
    NAME(NOT_FOUND),
    NAME(NOT_READY),
    NAME(ILLEGAL_ADDRESS),
    NAME(LAUNCH_OUT_OF_RESOURCES),
    NAME(CONTEXT_IS_DESTROYED),
    NAME(LAUNCH_FAILED),
    NAME(COOPERATIVE_LAUNCH_TOO_LARGE),
    NAME(NOT_SUPPORTED),
    NAME(STREAM_CAPTURE_UNSUPPORTED),
    NAME(STREAM_CAPTURE_INVALIDATED),
    NAME(STREAM_CAPTURE_MERGE),
    NAME(STREAM_CAPTURE_UNMATCHED),
    NAME(STREAM_CAPTURE_UNJOINED),
    NAME(STREAM_CAPTURE_ISOLATION),
    NAME(STREAM_CAPTURE_IMPLICIT),
    NAME(CAPTURED_EVENT),
    NAME(STREAM_CAPTURE_WRONG_THREAD),
    NAME(INVALID_CLUSTER_SIZE),
    NAME(INVALID_RESOURCE_TYPE),
    NAME(INVALID_RESOURCE_CONFIGURATION),
    NAME(UNKNOWN),
};

static drv_result name_of(drv_result error, const char **text) {
    *text = NULL;
    for (size_t i = 0; i < sizeof error_names / sizeof error_names[0]; i++)
        if (error_names[i].code == error)
            *text = error_names[i].name;
    return *text ? DRV_SUCCESS : DRV_ERROR_INVALID_VALUE;
}

drv_result cuGetErrorName(drv_result error, const char **text) {
    ENTER();
    return leave(name_of(error, text));
}

drv_result cuGetErrorString(drv_result error, const char **text) {
    ENTER();
    return leave(name_of(error, text)); /* the double has no prose for them */
}

/* ---- the device ------------------------------------------------------------------------------ */

drv_result cuDeviceGet(drv_device *device, int ordinal) {
    ENTER();
    *device = 0;
    return leave(ordinal ? DRV_ERROR_INVALID_DEVICE : DRV_SUCCESS);
}

drv_result cuDeviceGetCount(int *count) {
    ENTER();
    *count = 1;
    return leave(DRV_SUCCESS);
}

drv_result cuDeviceGetName(char *name, int size, drv_device device) {
    ENTER();
    if (device || size <= 0)
        return leave(device ? DRV_ERROR_INVALID_DEVICE : DRV_ERROR_INVALID_VALUE);
    snprintf(name, (size_t)size, "%s", fake.name);
    return leave(DRV_SUCCESS);
}

static drv_result attribute_of(drv_device_attribute attribute, int *value) {
    switch (attribute) {
    case DRV_DEVICE_MULTIPROCESSOR_COUNT:
        *value = (int)fake.primary.sm_count;
        return DRV_SUCCESS;
    case DRV_DEVICE_COMPUTE_CAPABILITY_MAJOR:
        *value = fake.major;
        return DRV_SUCCESS;
    case DRV_DEVICE_COMPUTE_CAPABILITY_MINOR:
        *value = fake.minor;
        return DRV_SUCCESS;
    case DRV_DEVICE_CLUSTER_LAUNCH:
        *value = fake.major >= 9;
        return DRV_SUCCESS;
    case DRV_DEVICE_CAN_MAP_HOST_MEMORY:
    case DRV_DEVICE_UNIFIED_ADDRESSING:
    case DRV_DEVICE_STREAM_PRIORITIES_SUPPORTED:
    case DRV_DEVICE_COOPERATIVE_LAUNCH:
        *value = 1;
        return DRV_SUCCESS;
    case DRV_DEVICE_CAN_USE_64_BIT_STREAM_MEM_OPS:
        *value = !fake.no_memory_operations;
        return DRV_SUCCESS;
    }
    return DRV_ERROR_INVALID_VALUE;
}

drv_result cuDeviceGetAttribute(int *value, drv_device_attribute attribute, drv_device device) {
    ENTER();
    return leave(device ? DRV_ERROR_INVALID_DEVICE : attribute_of(attribute, value));
}

/* ---- contexts -------------------------------------------------------------------------------- */

static _Thread_local struct {
    unsigned epoch;
    size_t count;
    struct context *at[16];
} stack;

static void refresh_stack(void) {
    if (stack.epoch != fake.epoch)
        stack.count = 0;
    stack.epoch = fake.epoch;
}

struct context *current_context(void) {
    refresh_stack();
    struct context *top = stack.count ? stack.at[stack.count - 1] : NULL;
    return top && fake.primary_retains ? top : NULL;
}

/* Whether a context may be made current: XLA aborts if it ever finds one that it does not know. */
static drv_result check_current(drv_context handle) {
    struct context *context = (struct context *)handle;
    if (context == &fake.primary)
        return fake.primary_retains ? DRV_SUCCESS : DRV_ERROR_INVALID_CONTEXT;
    violation("a green context is made current");
    return DRV_ERROR_INVALID_CONTEXT;
}

drv_result cuDevicePrimaryCtxRetain(drv_context *context, drv_device device) {
    ENTER();
    if (device)
        return leave(DRV_ERROR_INVALID_DEVICE);
    fake.primary_retains++;
    fake.primary.object.live = true;
    *context = (drv_context)&fake.primary;
    return leave(DRV_SUCCESS);
}

static void release_primary(void) {
    fake.primary_retains--;
    fake.primary.object.live = fake.primary_retains > 0;
}

drv_result cuDevicePrimaryCtxRelease(drv_device device) {
    ENTER();
    if (device)
        return leave(DRV_ERROR_INVALID_DEVICE);
    if (!live_of(FAKE_PRIMARY_RETAINS))
        return leave(DRV_ERROR_INVALID_CONTEXT);
    release_primary();
    return leave(DRV_SUCCESS);
}

drv_result cuCtxGetCurrent(drv_context *context) {
    ENTER();
    *context = (drv_context)current_context();
    return leave(DRV_SUCCESS);
}

drv_result cuCtxPushCurrent(drv_context context) {
    ENTER();
    refresh_stack();
    drv_result result = check_current(context);
    if (result || stack.count == sizeof stack.at / sizeof stack.at[0])
        return leave(result ? result : DRV_ERROR_INVALID_VALUE);
    stack.at[stack.count++] = (struct context *)context;
    return leave(DRV_SUCCESS);
}

drv_result cuCtxPopCurrent(drv_context *context) {
    ENTER();
    refresh_stack();
    if (!stack.count)
        return leave(DRV_ERROR_INVALID_CONTEXT);
    stack.count--;
    if (context)
        *context = (drv_context)stack.at[stack.count];
    return leave(DRV_SUCCESS);
}

drv_result cuCtxSetCurrent(drv_context context) {
    ENTER();
    refresh_stack();
    drv_result result = context ? check_current(context) : DRV_SUCCESS;
    if (result)
        return leave(result);
    if (stack.count) /* it replaces the top */
        stack.count--;
    if (context)
        stack.at[stack.count++] = (struct context *)context;
    return leave(DRV_SUCCESS);
}

drv_result cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER_WITH_CONTEXT();
    *least = 0;
    *greatest = -5;
    return leave(DRV_SUCCESS);
}

/* ---- splitting the SMs ----------------------------------------------------------------------- */

/* What a resource hides in its padding: a resource that was built by hand has none of it. */
struct hidden {
    uint64_t magic;
    uint32_t split; /* 0: the whole device or a green context; else it cannot be split again */
};

static const uint64_t resource_magic = 0xd0e7a5c3b1f29486u;

static struct hidden hidden_of(const drv_resource *resource) {
    struct hidden hidden;
    memcpy(&hidden, resource->hidden + 4, sizeof hidden);
    return hidden;
}

static unsigned smallest_group(unsigned flags) {
    if (flags & DRV_SPLIT_IGNORE_COSCHEDULING)
        return 2;
    return fake.major >= 9 ? 8 : 4;
}

static unsigned alignment(unsigned flags) {
    return fake.major >= 9 && !(flags & DRV_SPLIT_IGNORE_COSCHEDULING) ? 8 : 2;
}

static drv_resource resource_of(unsigned sm_count, uint32_t split) {
    struct hidden hidden = {.magic = resource_magic, .split = split};
    drv_resource resource;
    memset(&resource, 0, sizeof resource);
    if (!sm_count)
        return resource; /* of type INVALID */
    resource.type = DRV_RESOURCE_SM;
    memcpy(resource.hidden + 4, &hidden, sizeof hidden);
    resource.sm.count = sm_count;
    resource.sm.min_partition = smallest_group(0);
    resource.sm.coscheduled_alignment = alignment(0);
    return resource;
}

static drv_result check_resource(const drv_resource *resource) {
    if (resource->type != DRV_RESOURCE_SM)
        return DRV_ERROR_INVALID_RESOURCE_TYPE;
    if (hidden_of(resource).magic == resource_magic)
        return DRV_SUCCESS;
    violation("an SM resource that no driver call made");
    return DRV_ERROR_INVALID_VALUE;
}

drv_result cuDeviceGetDevResource(drv_device device, drv_resource *resource,
                                  drv_resource_type type) {
    ENTER();
    if (device || type != DRV_RESOURCE_SM)
        return leave(device ? DRV_ERROR_INVALID_DEVICE : DRV_ERROR_INVALID_RESOURCE_TYPE);
    *resource = resource_of(fake.primary.sm_count, 0);
    return leave(DRV_SUCCESS);
}

static drv_result split(drv_resource *result, unsigned *num_groups, const drv_resource *input,
                        drv_resource *remaining, unsigned size) {
    unsigned possible = input->sm.count / size;
    if (!possible)
        return DRV_ERROR_INVALID_RESOURCE_CONFIGURATION;
    if (!result || *num_groups > possible)
        *num_groups = possible;
    if (!result)
        return DRV_SUCCESS;
    for (unsigned i = 0; i < *num_groups; i++)
        result[i] = resource_of(size, 1);
    if (remaining)
        *remaining = resource_of(input->sm.count - *num_groups * size, 1);
    return DRV_SUCCESS;
}

drv_result cuDevSmResourceSplitByCount(drv_resource *result, unsigned int *num_groups,
                                       const drv_resource *input, drv_resource *remaining,
                                       unsigned int flags, unsigned int min_count) {
    ENTER();
    if (!num_groups || !input || (result && !*num_groups))
        return leave(DRV_ERROR_INVALID_VALUE);
    drv_result checked = check_resource(input);
    if (checked)
        return leave(checked);
    if (hidden_of(input).split)
        return leave(DRV_ERROR_INVALID_RESOURCE_CONFIGURATION);
    if (min_count > input->sm.count)
        return leave(DRV_ERROR_INVALID_VALUE);
    unsigned step = alignment(flags), least = smallest_group(flags);
    unsigned size = (min_count + step - 1) / step * step;
    /* `input` may be overwritten through `result`: work on a copy. */
    drv_resource whole = *input;
    return leave(split(result, num_groups, &whole, remaining, size < least ? least : size));
}

drv_result cuDevResourceGenerateDesc(drv_resource_desc *desc, drv_resource *resources,
                                     unsigned int num_resources) {
    ENTER();
    unsigned sm_count = 0;
    for (unsigned i = 0; i < num_resources; i++) {
        drv_result checked = check_resource(&resources[i]);
        if (checked)
            return leave(checked);
        sm_count += resources[i].sm.count;
    }
    if (!sm_count)
        return leave(DRV_ERROR_INVALID_VALUE);
    struct desc *made = new_object(sizeof *made, OBJECT_DESC);
    made->sm_count = sm_count;
    *desc = (drv_resource_desc)made;
    return leave(DRV_SUCCESS);
}

drv_result cuGreenCtxCreate(drv_green_context *context, drv_resource_desc desc, drv_device device,
                            unsigned int flags) {
    ENTER();
    if (device)
        return leave(DRV_ERROR_INVALID_DEVICE);
    if (!is_live(desc, OBJECT_DESC, "resource descriptor"))
        return leave(DRV_ERROR_INVALID_HANDLE);
    if (flags != DRV_GREEN_CONTEXT_DEFAULT_STREAM) /* the manual: it must be given */
        return leave(DRV_ERROR_INVALID_VALUE);
    struct context *made = new_object(sizeof *made, OBJECT_CONTEXT);
    made->id = ++fake.green_contexts;
    made->sm_count = ((struct desc *)desc)->sm_count;
    fake.primary_retains++; /* a green context keeps the primary one alive */
    fake.primary.object.live = true;
    *context = (drv_green_context)made;
    return leave(DRV_SUCCESS);
}

/* Streams and graphs must go before the green context that they run in. */
static void check_nothing_uses(const struct context *context) {
    for (const struct object *object = fake.objects; object; object = object->next) {
        if (!object->live)
            continue;
        if (object->kind == OBJECT_STREAM && ((const struct stream *)object)->context == context)
            violation("green context %u is destroyed before its stream", context->id);
        if (object->kind == OBJECT_EXEC && exec_uses((const struct exec *)object, context))
            violation("green context %u is destroyed before a graph that runs in it", context->id);
    }
}

drv_result cuGreenCtxDestroy(drv_green_context handle) {
    ENTER();
    if (!is_live(handle, OBJECT_CONTEXT, "green context"))
        return leave(DRV_ERROR_INVALID_CONTEXT);
    struct context *context = (struct context *)handle;
    check_nothing_uses(context);
    context->object.live = false;
    release_primary();
    return leave(DRV_SUCCESS);
}

drv_result cuGreenCtxGetDevResource(drv_green_context context, drv_resource *resource,
                                    drv_resource_type type) {
    ENTER();
    if (!is_live(context, OBJECT_CONTEXT, "green context"))
        return leave(DRV_ERROR_INVALID_CONTEXT);
    if (type != DRV_RESOURCE_SM)
        return leave(DRV_ERROR_INVALID_RESOURCE_TYPE);
    *resource = resource_of(((struct context *)context)->sm_count, 0);
    return leave(DRV_SUCCESS);
}
