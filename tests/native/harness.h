/* What the launcher's tests share: an H200 that the double pretends to be, XLA's side of it (the
 * primary context, one stream, memory), kernels, recordings, and how a test says what must hold.
 *
 * Every test runs in a process of its own, a few at once. When it returns, programs and device are given back and
 * nothing but what the harness made may be live, no context current, nothing done wrong. */
#ifndef HARNESS_H
#define HARNESS_H

#include <pthread.h>
#include <string.h>

#include "fake_cuda.h"
#include "launcher.h"
#include "marker.h"

struct test {
    const char *sentence;
    void (*run)(void);
};

#define TEST(name) {#name, name}
#define SUITE(name, ...) const struct test name[] = {__VA_ARGS__, {NULL, NULL}}

void fail_at(const char *file, int line, const char *text) __attribute__((noreturn));
void check_status(const char *file, int line, const char *call, int wanted, int status);
void poison_last_error(void);
/* A refusal has one line, this call's own, and `word` is in it. */
void check_refusal(const char *file, int line, const char *call, int wanted, int status,
                   const char *word);

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            fail_at(__FILE__, __LINE__, #condition);                                               \
    } while (0)
#define OK(call) check_status(__FILE__, __LINE__, #call, DUET_OK, call)
#define IS(status, call) check_status(__FILE__, __LINE__, #call, DUET_##status, call)
#define REFUSED(status, word, call)                                                                \
    do {                                                                                           \
        poison_last_error();                                                                       \
        check_refusal(__FILE__, __LINE__, #call, DUET_##status, call, word);                       \
    } while (0)
#define CU(call) CHECK((call) == DRV_SUCCESS)

/* ---- the world ------------------------------------------------------------------------------- */

extern struct driver cu;
extern const char *fake_path;
extern drv_context primary;
extern drv_stream xla;      /* XLA's, in the primary context */
extern duet_device *device; /* of open_device; NULL before and after drop_device */

enum { SPLITS = 4 }; /* of open_device, on 132 SMs: all, 16/116, 32/100, 64/68 */

struct duet_options options_for(const unsigned *sms, size_t count);
void open_device(void);
void open_with(struct duet_options options);
void drop_device(void); /* frees the programs of `record`, then the device */
void check_given_back(const char *when); /* only the harness's own things are live */
/* Ends a test after which not all can be given back. */
void end_here(void) __attribute__((noreturn));
void count_injected(size_t calls);       /* failing calls that a test has tried, for the summary */

void enter_primary(void);
void leave_primary(void);
drv_address new_memory(size_t bytes); /* zeroed, and in `mine` */
void *host_of(drv_address address);
uint64_t value_of(drv_address cell);
void set_value(drv_address cell, uint64_t value);

extern struct duet_range mine[256]; /* all that new_memory gave, shared */
extern size_t num_mine;

/* ---- kernels --------------------------------------------------------------------------------- */

/* add(cell, amount) adds to a 64-bit cell; every run of any kernel of these is noted. */
void *new_add(const char *name, unsigned flags);
void *new_kernel(const char *name, unsigned flags, const size_t *sizes, size_t count,
                 fake_callback callback);

struct noted {
    char function[32];
    unsigned sm_count, context;
    int priority;
    unsigned grid[3], block[3], shared_bytes;
    bool has_attribute[19];
    drv_attribute_value attribute[19];
};
extern struct noted noted[512];
extern size_t num_noted;
void note(const struct fake_run *run); /* for callbacks of a test's own */

/* Launches on XLA's stream as XLA does. */
void enqueue(void *function, void **params);
void enqueue_with(void *function, void **params, drv_launch_config config,
                  const drv_attribute *attributes, size_t count);
void enqueue_add(void *function, drv_address cell, int amount);

/* ---- recordings ------------------------------------------------------------------------------ */

typedef void (*body)(void *argument);

/* What XLA's thread does when an armed executable runs. */
void run_captured(int64_t id, body enqueue_all, void *argument);
duet_program *record_unchecked(body enqueue_all, void *argument);
duet_program *record(body enqueue_all, void *argument); /* and checked against `mine` */
void discard(duet_program *program); /* NULL: nothing */
void forget(duet_program *program); /* the test frees it itself */
void build_everywhere(duet_program *program); /* both lanes, all splits */
duet_program *record_add(void *function, drv_address cell, int amount); /* checked */

/* ---- running --------------------------------------------------------------------------------- */

enum { SOON = 1000000000 }; /* more than enough, in ns: a second */

uint64_t launch(duet_program *program, enum duet_lane lane, size_t split, unsigned steps);
/* Runs all that was asked for and waits until the launcher has seen step `last`; settle also
 * releases it. */
void complete(enum duet_lane lane, uint64_t last, uint64_t seed);
void settle(enum duet_lane lane, uint64_t last, uint64_t seed);
uint64_t random_of(uint64_t *state);

#endif
