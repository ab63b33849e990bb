/* The device: contexts and streams of every split, pinned memory of every lane. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static const int64_t CLOSE_TIMEOUT_NS = 5 * (int64_t)1000000000;

int duet_enter(duet_device *device) {
    pthread_mutex_lock(&device->writer);
    int status = DUET_OK;
    if (atomic_load(&device->dead))
        status = duet_fail(DUET_DEAD, "the device has failed: %s", device->why);
    else if (device->primary == NULL)
        status = duet_fail(DUET_STATE, "the device is closed");
    else
        status = duet_driver_result(device, device->driver.cuCtxPushCurrent(device->primary),
                                    "cuCtxPushCurrent");
    if (status != DUET_OK)
        pthread_mutex_unlock(&device->writer);
    return status;
}

int duet_leave(duet_device *device, int status) {
    drv_context ours;
    drv_result popped = device->driver.cuCtxPopCurrent(&ours);
    if (status == DUET_OK)
        status = duet_driver_result(device, popped, "cuCtxPopCurrent");
    pthread_mutex_unlock(&device->writer);
    return status;
}

static int open_streams(duet_device *device, struct split *split, int greatest) {
    for (int lane = 0; lane < DUET_LANES; lane++) {
        int priority = lane == DUET_DECODE ? greatest : 0;
        drv_stream *stream = &split->streams[lane];
        if (split->contexts[lane] == NULL)
            DRIVER_CALL(device, cuStreamCreateWithPriority, stream, DRV_STREAM_NON_BLOCKING,
                        priority);
        else
            DRIVER_CALL(device, cuGreenCtxStreamCreate, stream, split->contexts[lane],
                        DRV_STREAM_NON_BLOCKING, priority);
    }
    return DUET_OK;
}

/* A green context of some SMs; `count` is what it says that it has. */
static int open_context(duet_device *device, drv_resource *sms, drv_green_context *context,
                        unsigned *count) {
    drv_resource_desc description;
    drv_resource got;
    DRIVER_CALL(device, cuDevResourceGenerateDesc, &description, sms, 1);
    DRIVER_CALL(device, cuGreenCtxCreate, context, description, device->id,
                DRV_GREEN_CONTEXT_DEFAULT_STREAM);
    DRIVER_CALL(device, cuGreenCtxGetDevResource, *context, &got, DRV_RESOURCE_SM);
    *count = got.sm.count;
    return DUET_OK;
}

static int open_split(duet_device *device, struct split *split, const drv_resource *all) {
    drv_resource decode, prefill;
    memset(&decode, 0, sizeof decode);
    memset(&prefill, 0, sizeof prefill);
    unsigned groups = 1, wanted = split->sms.wanted;
    DRIVER_CALL(device, cuDevSmResourceSplitByCount, &decode, &groups, all, &prefill, 0, wanted);
    if (groups != 1 || prefill.type != DRV_RESOURCE_SM || prefill.sm.count == 0)
        return duet_fail(DUET_INVALID, "a split of %u SMs for decode leaves none of %u for prefill",
                         wanted, all->sm.count);
    int status = open_context(device, &decode, &split->contexts[DUET_DECODE],
                              &split->sms.decode_sms);
    if (status == DUET_OK)
        status = open_context(device, &prefill, &split->contexts[DUET_PREFILL],
                              &split->sms.prefill_sms);
    if (status == DUET_OK && split->sms.decode_sms + split->sms.prefill_sms > all->sm.count)
        status = duet_fail(DUET_DRIVER, "a split of %u and %u SMs overlaps: the device has %u",
                           split->sms.decode_sms, split->sms.prefill_sms, all->sm.count);
    return status;
}

static int open_splits(duet_device *device, const struct duet_options *options) {
    int least, greatest;
    drv_resource all;
    memset(&all, 0, sizeof all);
    DRIVER_CALL(device, cuCtxGetStreamPriorityRange, &least, &greatest);
    DRIVER_CALL(device, cuDeviceGetDevResource, device->id, &all, DRV_RESOURCE_SM);
    device->splits = calloc(options->num_splits + 1, sizeof *device->splits);
    if (device->splits == NULL)
        return duet_fail(DUET_NO_MEMORY, "no memory for %zu splits", options->num_splits);
    device->num_splits = options->num_splits + 1;
    device->splits[0].sms = (struct duet_split){0, all.sm.count, all.sm.count};
    for (size_t i = 0; i < device->num_splits; i++) {
        struct split *split = &device->splits[i];
        int status = DUET_OK;
        if (i > 0) {
            split->sms.wanted = options->decode_sms[i - 1];
            status = open_split(device, split, &all);
        }
        if (status == DUET_OK)
            status = open_streams(device, split, greatest);
        if (status != DUET_OK)
            return status;
    }
    return DUET_OK;
}

static int open_pinned(duet_device *device, void **memory, size_t bytes) {
    DRIVER_CALL(device, cuMemHostAlloc, memory, bytes,
                DRV_HOST_ALLOC_PORTABLE | DRV_HOST_ALLOC_DEVICE_MAP);
    memset(*memory, 0, bytes);
    return DUET_OK;
}

static int open_step_ends(duet_device *device, struct lane *lane) {
    lane->step_ends = calloc(device->result_slots, sizeof *lane->step_ends);
    if (lane->step_ends == NULL)
        return duet_fail(DUET_NO_MEMORY, "no memory for %u events", device->result_slots);
    for (unsigned i = 0; i < device->result_slots; i++)
        DRIVER_CALL(device, cuEventCreate, &lane->step_ends[i], DRV_EVENT_DISABLE_TIMING);
    return DUET_OK;
}

static int open_lane(duet_device *device, struct lane *lane, size_t staging_bytes) {
    DRIVER_CALL(device, cuEventCreate, &lane->tail, DRV_EVENT_DISABLE_TIMING);
    int status = open_pinned(device, (void **)&lane->counter, sizeof *lane->counter);
    if (status == DUET_OK)
        status = open_pinned(device, (void **)&lane->results,
                             device->result_slots * device->result_bytes);
    if (status == DUET_OK)
        status = open_pinned(device, (void **)&lane->staging.memory, staging_bytes);
    if (status != DUET_OK)
        return status;
    lane->staging.bytes = staging_bytes;
    lane->result_sizes = calloc(device->result_slots, sizeof *lane->result_sizes);
    if (lane->result_sizes == NULL)
        return duet_fail(DUET_NO_MEMORY, "no memory for %u results", device->result_slots);
    if (!device->writes_counters)
        return open_step_ends(device, lane);
    void *counter = (void *)lane->counter;
    DRIVER_CALL(device, cuMemHostGetDevicePointer, &lane->counter_address, counter, 0);
    return DUET_OK;
}

static int open_inside(duet_device *device, const struct duet_options *options) {
    int can_write = 0;
    DRIVER_CALL(device, cuDeviceGetAttribute, &can_write, DRV_DEVICE_CAN_USE_64_BIT_STREAM_MEM_OPS,
                device->id);
    device->writes_counters = can_write != 0;
    int status = open_splits(device, options);
    for (int lane = 0; lane < DUET_LANES && status == DUET_OK; lane++)
        status = open_lane(device, &device->lanes[lane], options->staging_bytes);
    return status == DUET_OK ? duet_completion_open(device) : status;
}

static int open_device(duet_device *device, const struct duet_options *options) {
    char why[256];
    if (driver_load(&device->driver, options->libcuda, why, sizeof why) != 0)
        return duet_fail(DUET_NO_DRIVER, "%s", why);
    DRIVER_CALL(device, cuInit, 0);
    DRIVER_CALL(device, cuDeviceGet, &device->id, options->ordinal);
    drv_context primary;
    DRIVER_CALL(device, cuDevicePrimaryCtxRetain, &primary, device->id);
    device->primary = primary;
    int status = duet_enter(device);
    if (status != DUET_OK)
        return status;
    return duet_leave(device, open_inside(device, options));
}

static int check_options(const struct duet_options *options) {
    if (options->result_bytes == 0 || options->result_slots == 0 || options->staging_bytes == 0)
        return duet_fail(DUET_INVALID, "result_bytes, result_slots and staging_bytes must be"
                                       " positive, not %zu, %u and %zu",
                         options->result_bytes, options->result_slots, options->staging_bytes);
    if (options->result_bytes > SIZE_MAX / options->result_slots)
        return duet_fail(DUET_INVALID, "%u results of %zu bytes do not fit into memory",
                         options->result_slots, options->result_bytes);
    for (size_t i = 0; i < options->num_splits; i++)
        if (options->decode_sms[i] == 0)
            return duet_fail(DUET_INVALID, "split %zu gives decode no SMs", i + 1);
    return DUET_OK;
}

/* The locks; waiting goes by the monotonic clock, which nobody sets. */
static int open_locks(duet_device *device) {
    pthread_condattr_t monotonic;
    if (pthread_condattr_init(&monotonic) != 0)
        return duet_fail(DUET_NO_MEMORY, "no memory for locks");
#ifndef __APPLE__
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
#endif
    pthread_mutex_init(&device->writer, NULL);
    pthread_mutex_init(&device->mutex, NULL);
    pthread_cond_init(&device->advanced, &monotonic);
    pthread_cond_init(&device->work, NULL);
    pthread_condattr_destroy(&monotonic);
    return DUET_OK;
}

int duet_open(const struct duet_options *options, duet_device **device) {
    *device = NULL;
    int status = check_options(options);
    if (status != DUET_OK)
        return status;
    duet_device *made = calloc(1, sizeof *made);
    if (made == NULL)
        return duet_fail(DUET_NO_MEMORY, "no memory for a device");
    made->result_bytes = options->result_bytes;
    made->result_slots = options->result_slots;
    made->replay_lists = options->replay_lists;
    made->read_end = made->write_end = -1;
    status = open_locks(made);
    if (status != DUET_OK) {
        free(made);
        return status;
    }
    status = open_device(made, options);
    if (status == DUET_OK) {
        *device = made;
        return DUET_OK;
    }
    char why[512];
    snprintf(why, sizeof why, "%s", duet_last_error());
    duet_free(made);
    return duet_fail(status, "%s", why);
}

/* What follows gives back as much as there is, whatever the driver answers: it may be dead. */

/* Pinned memory is only given back once nothing can write to it any more. */
static void close_lane(duet_device *device, struct lane *lane, bool is_idle) {
    if (lane->tail != NULL)
        GIVE_BACK(device, cuEventDestroy, lane->tail);
    for (unsigned i = 0; lane->step_ends != NULL && i < device->result_slots; i++)
        if (lane->step_ends[i] != NULL)
            GIVE_BACK(device, cuEventDestroy, lane->step_ends[i]);
    void *pinned[] = {(void *)lane->counter, lane->results, lane->staging.memory};
    for (size_t i = 0; is_idle && i < sizeof pinned / sizeof *pinned; i++)
        if (pinned[i] != NULL)
            GIVE_BACK(device, cuMemFreeHost, pinned[i]);
    free(lane->step_ends);
    free(lane->result_sizes);
    lane->tail = NULL, lane->step_ends = NULL, lane->result_sizes = NULL;
    lane->counter = NULL, lane->results = NULL, lane->staging.memory = NULL;
}

static void close_splits(duet_device *device, bool is_idle) {
    for (size_t i = 0; i < device->num_splits; i++)
        for (int lane = 0; lane < DUET_LANES; lane++)
            if (device->splits[i].streams[lane] != NULL)
                GIVE_BACK(device, cuStreamDestroy, device->splits[i].streams[lane]);
    for (size_t i = 0; is_idle && i < device->num_splits; i++)
        for (int lane = 0; lane < DUET_LANES; lane++)
            if (device->splits[i].contexts[lane] != NULL)
                GIVE_BACK(device, cuGreenCtxDestroy, device->splits[i].contexts[lane]);
}

/* Whether all that was enqueued is done by then, copies behind the last step and what a device that
 * we gave up still runs included. A stream that answers with an error runs nothing any more. */
static bool is_done_by(duet_device *device, struct timespec deadline) {
    const struct timespec pause = {.tv_nsec = 1000000};
    for (size_t i = 0; i < device->num_splits; i++)
        for (int lane = 0; lane < DUET_LANES; lane++) {
            drv_stream stream = device->splits[i].streams[lane];
            while (stream != NULL && device->driver.cuStreamQuery(stream) == DRV_ERROR_NOT_READY) {
                if (duet_is_past(deadline))
                    return false;
                nanosleep(&pause, NULL);
            }
        }
    return true;
}

/* Work that does not finish may yet run. The driver gives back streams, events and graphs behind
 * it, but memory and contexts at once: those are left to the end of the process, as is our reference
 * to the primary context, in which that memory is. */
static void close_inside(duet_device *device) {
    struct timespec deadline = duet_deadline_in(CLOSE_TIMEOUT_NS);
    drv_context ours;
    duet_completion_drain(device, deadline);
    GIVE_BACK(device, cuCtxPushCurrent, device->primary);
    bool is_idle = is_done_by(device, deadline);
    duet_completion_stop(device);
    duet_capture_forget(device);
    for (duet_program *program = device->programs; program != NULL; program = program->next)
        duet_program_drop(program);
    device->programs = NULL;
    close_splits(device, is_idle);
    for (int lane = 0; lane < DUET_LANES; lane++)
        close_lane(device, &device->lanes[lane], is_idle);
    GIVE_BACK(device, cuCtxPopCurrent, &ours);
    if (is_idle)
        GIVE_BACK(device, cuDevicePrimaryCtxRelease, device->id);
    device->primary = NULL;
}

void duet_close(duet_device *device) {
    pthread_mutex_lock(&device->writer);
    if (device->primary != NULL)
        close_inside(device);
    driver_unload(&device->driver);
    duet_completion_close(device);
    pthread_mutex_unlock(&device->writer);
}

void duet_free(duet_device *device) {
    if (device == NULL)
        return;
    duet_close(device);
    free(device->splits);
    pthread_cond_destroy(&device->advanced);
    pthread_cond_destroy(&device->work);
    pthread_mutex_destroy(&device->mutex);
    pthread_mutex_destroy(&device->writer);
    free(device);
}

size_t duet_num_splits(const duet_device *device) {
    return device->num_splits;
}

int duet_get_split(const duet_device *device, size_t index, struct duet_split *split) {
    if (index >= device->num_splits)
        return duet_fail(DUET_INVALID, "there is no split %zu: %zu exist", index,
                         device->num_splits);
    if (split != NULL)
        *split = device->splits[index].sms;
    return DUET_OK;
}
