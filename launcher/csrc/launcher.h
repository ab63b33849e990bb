/* Runs recorded XLA executables on parts of a GPU's SMs: the C interface of the launcher.
 *
 * A device has two lanes, prefill and decode, and a list of splits that say how many SMs each lane
 * has; split 0 is the whole device for both. A program is what XLA enqueued for one execution of
 * one executable, recorded once and replayed on any lane and split it was built for. Nothing here
 * waits for the GPU except duet_wait and duet_close.
 *
 * Threads: any function may be called from any thread, duet_close included. Calls that change a
 * device take turns; duet_wait, duet_completed, duet_result, duet_release and duet_clear never wait
 * for those. A closed device answers every call that can fail with DUET_STATE (DUET_DEAD, if it had
 * failed), except for facts that never change: splits, census, outputs. The caller's duty: nothing
 * uses a program or a device while it is freed, or afterwards; what duet_result points to is not
 * read once the step has been released or the device closed; and duet_descriptor's is not watched
 * once the device is closed.
 *
 * Every function that can fail returns a status. duet_last_error() then has one line about it,
 * kept for each thread until its next failure.
 */
#ifndef DUET_LAUNCHER_H
#define DUET_LAUNCHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum duet_status {
    DUET_OK = 0,
    DUET_TIMEOUT = 1,     /* duet_wait: not yet */
    DUET_BUSY = 2,        /* a ring is full: try again once a step has been released */
    DUET_INVALID = -1,    /* an argument is wrong */
    DUET_NO_DRIVER = -2,  /* no usable libcuda */
    DUET_DRIVER = -3,     /* the driver refused a call; the device goes on */
    DUET_STATE = -4,      /* not now: calls came in the wrong order */
    DUET_UNSAFE = -5,     /* replaying this program would not be what XLA ran */
    DUET_NO_MEMORY = -6,
    DUET_DEAD = -7,       /* the device has failed for good: what every call and waiter gets */
};

enum duet_lane { DUET_PREFILL = 0, DUET_DECODE = 1, DUET_LANES = 2 };

typedef struct duet_device duet_device;
typedef struct duet_program duet_program;
typedef uint64_t duet_address; /* in device memory */

/* decode_sms [num_splits]: how many SMs decode asks for in each split; prefill gets the rest.
 * result_bytes: most that one step copies to the host. result_slots: steps of a lane whose results
 * may be on the host at once. staging_bytes: of each lane, for duet_copy_in. replay_lists: enqueue
 * recorded kernels one by one instead of as graphs. */
struct duet_options {
    const char *libcuda; /* NULL: libcuda.so.1 */
    int ordinal;
    const unsigned *decode_sms;
    size_t num_splits;
    size_t result_bytes;
    unsigned result_slots;
    size_t staging_bytes;
    bool replay_lists;
};

/* What a split came to: the driver rounds what was asked for. */
struct duet_split {
    unsigned wanted, decode_sms, prefill_sms;
};

/* What a recording consists of. branches: nodes that wait for more than one other. */
struct duet_census {
    unsigned kernels, copies, fills, empties, clusters, cooperative, programmatic_edges, branches;
};

/* Memory that somebody keeps: [start, start + bytes). shared: lanes may use it at the same time. */
struct duet_range {
    duet_address start;
    size_t bytes;
    bool shared;
};

const char *duet_last_error(void);

int duet_open(const struct duet_options *options, duet_device **device);
/* Lets lanes finish (5 s at most), then gives everything back to the driver, except what work that
 * has not finished may still use: that is never given back. Idempotent. */
void duet_close(duet_device *device);
/* Closes, and frees the handle. Its programs must have been freed. NULL: nothing. */
void duet_free(duet_device *device);
/* Splits there are, 0 included; `split` may be NULL. DUET_INVALID: there is no such one. */
size_t duet_num_splits(const duet_device *device);
int duet_get_split(const duet_device *device, size_t index, struct duet_split *split);

/* Recording: arm, run the executable once (its marker calls begin and end), take; or abort. One
 * capture at a time in the process, and nothing else may run on XLA's stream meanwhile: it would be
 * recorded, or break the recording. The captured run executes nothing. */
int duet_capture_arm(duet_device *device, int64_t id);
/* Whether `id` has been armed; otherwise begin and end do nothing. */
bool duet_capture_is_armed(int64_t id);
int duet_capture_begin(int64_t id, void *stream, const duet_address *outputs, size_t num_outputs);
int duet_capture_end(int64_t id);
int duet_capture_take(duet_device *device, int64_t id, duet_program **program);
int duet_capture_abort(duet_device *device);

/* Waits for its own steps: what it uses may be freed behind it, unless a lane is stuck and 5 s have
 * passed. NULL: nothing. */
void duet_program_free(duet_program *program);
struct duet_census duet_program_census(const duet_program *program);
/* The addresses of the executable's outputs, as its marker saw them. */
const duet_address *duet_program_outputs(const duet_program *program, size_t *count);
/* Copies on the device after each step: what the step put out is its next input. */
int duet_program_add_copy(duet_program *program, duet_address dst, duet_address src, size_t bytes);
/* Parts of a step's result, copied to the host in this order, one behind the other. */
int duet_program_add_result(duet_program *program, duet_address src, size_t bytes);
/* DUET_UNSAFE unless every address that the program uses lies in a range; names the first stray. */
int duet_program_check(duet_program *program, const struct duet_range *ranges, size_t count);
/* DUET_UNSAFE if programs of two lanes use the same memory that is not shared. Both are checked, and
 * of one device. */
int duet_program_check_apart(const duet_program *one, const duet_program *other);
/* Records the program anew on a lane of a split, where its kernels then stay. */
int duet_program_build(duet_program *program, enum duet_lane lane, size_t split);
bool duet_program_is_built(const duet_program *program, enum duet_lane lane, size_t split);

/* Enqueues `steps` steps, each with its first `num_results` results, behind whatever the lane has.
 * Steps of a lane are numbered from 1: `last` is the last one's number. Every step takes a slot of
 * the lane's ring until it is released, even one without results. */
int duet_launch(duet_program *program, enum duet_lane lane, size_t split, unsigned steps,
                unsigned num_results, uint64_t *last);
/* Before the lane's next launch: a copy from the host (`src` may be reused on return) ... */
int duet_copy_in(duet_device *device, enum duet_lane lane, size_t split, duet_address dst,
                 const void *src, size_t bytes);
/* ... a copy on the device ... */
int duet_copy(duet_device *device, enum duet_lane lane, size_t split, duet_address dst,
              duet_address src, size_t bytes);
/* ... and waiting for everything that the other lane has been given so far. */
int duet_lane_wait(duet_device *device, enum duet_lane waiter, size_t split);

/* A step that does nothing: once it has completed, so has whatever the lane was given before, and
 * the room of copies from the host is free again. It takes a slot of the ring like any other. */
int duet_fence(duet_device *device, enum duet_lane lane, size_t split, uint64_t *step);

/* Number of the lane's last completed step. */
int duet_completed(duet_device *device, enum duet_lane lane, uint64_t *step);
int duet_wait(duet_device *device, enum duet_lane lane, uint64_t step, int64_t timeout_ns);
/* Readable once a step has completed or the device has failed, until duet_clear. -1: closed. */
int duet_descriptor(duet_device *device);
void duet_clear(duet_device *device);
/* The result of a completed step, valid until it is released: that one and all before it. */
int duet_result(duet_device *device, enum duet_lane lane, uint64_t step, const void **data,
                size_t *bytes);
int duet_release(duet_device *device, enum duet_lane lane, uint64_t step);

#endif
