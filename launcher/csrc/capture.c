/* Recording what XLA enqueues: one capture at a time in the process, on XLA's own stream.
 *
 * Whoever wants one arms it and has the executable run once. The executable's marker (marker.c)
 * begins the capture before XLA enqueues anything and ends it after the last of its operations. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum phase { IDLE, ARMED, CAPTURING, CAPTURED };

/* The marker is called by XLA, which knows no device of ours: hence a global. */
static struct {
    pthread_mutex_t mutex;
    enum phase phase;
    duet_device *device;
    int64_t id;
    drv_stream stream;
    drv_graph graph;
    duet_address *outputs;
    size_t num_outputs;
} capture = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static void reset(void) {
    free(capture.outputs);
    capture.outputs = NULL, capture.num_outputs = 0;
    capture.graph = NULL, capture.stream = NULL, capture.device = NULL;
    capture.phase = IDLE;
}

int duet_capture_arm(duet_device *device, int64_t id) {
    int status = duet_enter(device);
    if (status != DUET_OK)
        return status;
    pthread_mutex_lock(&capture.mutex);
    if (capture.phase != IDLE)
        status = duet_fail(DUET_STATE, "a capture of program %lld is under way: take or abort it",
                           (long long)capture.id);
    else
        capture.phase = ARMED, capture.device = device, capture.id = id;
    pthread_mutex_unlock(&capture.mutex);
    return duet_leave(device, status);
}

static int begin(void *stream, const duet_address *outputs, size_t num_outputs) {
    if (capture.phase != ARMED)
        return duet_fail(DUET_STATE, "program %lld ran twice while it was captured",
                         (long long)capture.id);
    duet_address *kept = calloc(num_outputs + 1, sizeof *kept);
    if (kept == NULL)
        return duet_fail(DUET_NO_MEMORY, "no memory for %zu addresses", num_outputs);
    if (num_outputs > 0)
        memcpy(kept, outputs, num_outputs * sizeof *kept);
    free(capture.outputs);
    capture.outputs = kept, capture.num_outputs = num_outputs;
    DRIVER_CALL(capture.device, cuStreamBeginCapture, stream, DRV_CAPTURE_RELAXED);
    capture.stream = stream, capture.phase = CAPTURING;
    return DUET_OK;
}

bool duet_capture_is_armed(int64_t id) {
    pthread_mutex_lock(&capture.mutex);
    bool is_armed = capture.phase != IDLE && capture.id == id;
    pthread_mutex_unlock(&capture.mutex);
    return is_armed;
}

int duet_capture_begin(int64_t id, void *stream, const duet_address *outputs, size_t num_outputs) {
    pthread_mutex_lock(&capture.mutex);
    int status = DUET_OK;
    if (capture.phase != IDLE && capture.id == id)
        status = begin(stream, outputs, num_outputs);
    pthread_mutex_unlock(&capture.mutex);
    return status;
}

int duet_capture_end(int64_t id) {
    pthread_mutex_lock(&capture.mutex);
    int status = DUET_OK;
    if (capture.phase == CAPTURING && capture.id == id) {
        status = duet_end_capture(capture.device, capture.stream, &capture.graph);
        capture.phase = status == DUET_OK ? CAPTURED : ARMED;
    }
    pthread_mutex_unlock(&capture.mutex);
    return status;
}

int duet_end_capture(duet_device *device, drv_stream stream, drv_graph *graph) {
    const struct driver *driver = &device->driver;
    drv_result result = driver->cuStreamEndCapture(stream, graph);
    if (result == DRV_SUCCESS)
        return DUET_OK;
    drv_capture_status status; /* a stream that stays in capture mode would be of no use to XLA */
    drv_graph rest = NULL;
    if (driver->cuStreamIsCapturing(stream, &status) == DRV_SUCCESS && status != DRV_CAPTURE_NONE &&
        driver->cuStreamEndCapture(stream, &rest) == DRV_SUCCESS && rest != NULL)
        GIVE_BACK(device, cuGraphDestroy, rest);
    *graph = NULL;
    return duet_driver_result(device, result, "cuStreamEndCapture");
}

static int take(duet_device *device, int64_t id, duet_program **program) {
    if (capture.phase == IDLE || capture.device != device || capture.id != id)
        return duet_fail(DUET_STATE, "no capture of program %lld has been armed", (long long)id);
    if (capture.phase != CAPTURED)
        return duet_fail(DUET_STATE, "program %lld has %s while it was to be captured",
                         (long long)id,
                         capture.phase == ARMED ? "not run to its marker" : "not ended");
    drv_graph graph = capture.graph;
    duet_address *outputs = capture.outputs;
    size_t num_outputs = capture.num_outputs;
    capture.graph = NULL, capture.outputs = NULL;
    reset();
    return duet_program_create(device, graph, outputs, num_outputs, program);
}

int duet_capture_take(duet_device *device, int64_t id, duet_program **program) {
    *program = NULL;
    int status = duet_enter(device);
    if (status != DUET_OK)
        return status;
    pthread_mutex_lock(&capture.mutex);
    status = take(device, id, program);
    pthread_mutex_unlock(&capture.mutex);
    return duet_leave(device, status);
}

void duet_capture_forget(duet_device *device) {
    pthread_mutex_lock(&capture.mutex);
    if (capture.phase != IDLE && capture.device == device) {
        if (capture.phase == CAPTURING)
            duet_end_capture(device, capture.stream, &capture.graph);
        if (capture.graph != NULL)
            GIVE_BACK(device, cuGraphDestroy, capture.graph);
        reset();
    }
    pthread_mutex_unlock(&capture.mutex);
}

int duet_capture_abort(duet_device *device) {
    int status = duet_enter(device);
    if (status != DUET_OK)
        return status;
    duet_capture_forget(device);
    return duet_leave(device, DUET_OK);
}
