/* See harness.h. Usage: test_launcher <path of the double> [part of a test's name]. */
#include "harness.h"

#include <errno.h>
#include <stdio.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

struct driver cu;
const char *fake_path;
drv_context primary;
drv_stream xla;
duet_device *device;
struct duet_range mine[256];
size_t num_mine;
struct noted noted[512];
size_t num_noted;

static pthread_mutex_t note_lock = PTHREAD_MUTEX_INITIALIZER;
static duet_program *programs[256];
static size_t num_programs;
static int64_t next_id = 100;
static const char *running;        /* the test of this process */
static atomic_size_t *num_injected; /* in memory that all processes share */

/* ---- what must hold -------------------------------------------------------------------------- */

void fail_at(const char *file, int line, const char *text) {
    fprintf(stderr, "  %s\n  %s:%d: %s\n", running, strrchr(file, '/') ? strrchr(file, '/') + 1 : file, line,
            text);
    fprintf(stderr, "  last error: %s\n", duet_last_error());
    for (size_t i = 0; i < fake_violations() && fake_violation(i); i++)
        fprintf(stderr, "  violation: %s\n", fake_violation(i));
    _exit(1);
}

void check_status(const char *file, int line, const char *call, int wanted, int status) {
    char text[300];
    if (status == wanted)
        return;
    snprintf(text, sizeof text, "%s gave %d, not %d", call, status, wanted);
    fail_at(file, line, text);
}

void poison_last_error(void) {
    duet_device *none = NULL;
    struct duet_options options = options_for(NULL, 0);
    options.libcuda = "/poison";
    duet_open(&options, &none);
}

void check_refusal(const char *file, int line, const char *call, int wanted, int status,
                   const char *word) {
    char text[400];
    const char *error = duet_last_error();
    check_status(file, line, call, wanted, status);
    if (*error && !strchr(error, '\n') && !strstr(error, "/poison") &&
        (!word || strstr(error, word)))
        return;
    snprintf(text, sizeof text, "%s must leave one line with `%s`", call, word ? word : "");
    fail_at(file, line, text);
}

/* ---- the world ------------------------------------------------------------------------------- */

struct duet_options options_for(const unsigned *sms, size_t count) {
    return (struct duet_options){.libcuda = fake_path, .decode_sms = sms, .num_splits = count,
                                 .result_bytes = 64, .result_slots = 16, .staging_bytes = 4096};
}

void open_with(struct duet_options options) {
    CHECK(!device);
    OK(duet_open(&options, &device));
    CHECK(device);
}

void open_device(void) {
    static const unsigned sms[] = {16, 32, 64};
    open_with(options_for(sms, 3));
}

void drop_device(void) {
    for (size_t i = 0; i < num_programs; i++)
        duet_program_free(programs[i]);
    num_programs = 0;
    if (device)
        duet_free(device);
    device = NULL;
}

void discard(duet_program *program) {
    if (program)
        duet_program_free(program);
}

void forget(duet_program *program) {
    for (size_t i = 0; i < num_programs; i++)
        if (programs[i] == program)
            programs[i] = programs[--num_programs];
}

void enter_primary(void) {
    CU(cu.cuCtxPushCurrent(primary));
}

void leave_primary(void) {
    drv_context popped = NULL;
    CU(cu.cuCtxPopCurrent(&popped));
    CHECK(popped == primary);
}

drv_address new_memory(size_t bytes) {
    drv_address address = 0;
    enter_primary();
    CU(cu.cuMemAlloc(&address, bytes));
    leave_primary();
    memset(fake_host(address), 0, bytes);
    CHECK(num_mine < 256);
    mine[num_mine++] = (struct duet_range){address, bytes, true};
    return address;
}

void *host_of(drv_address address) {
    return fake_host(address);
}

uint64_t value_of(drv_address cell) {
    return *(uint64_t *)fake_host(cell);
}

void set_value(drv_address cell, uint64_t value) {
    *(uint64_t *)fake_host(cell) = value;
}

static void start(void) {
    fake_reset();
    fake_mode(FAKE_MANUAL);
    CU(cu.cuInit(0));
    CU(cu.cuDevicePrimaryCtxRetain(&primary, 0));
    enter_primary();
    CU(cu.cuStreamCreateWithPriority(&xla, DRV_STREAM_NON_BLOCKING, 0));
    leave_primary();
}

void check_given_back(const char *when) {
    static const struct {
        enum fake_kind kind;
        const char *name;
        size_t harness;
    } kinds[] = {{FAKE_PRIMARY_RETAINS, "primary retains", 1}, {FAKE_GREEN_CONTEXTS, "green", 0},
                 {FAKE_STREAMS, "streams", 1},                 {FAKE_EVENTS, "events", 0},
                 {FAKE_GRAPHS, "graphs", 0},                   {FAKE_EXECS, "execs", 0},
                 {FAKE_PINNED_ALLOCATIONS, "pinned", 0}};
    char text[1000];
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        size_t live = fake_live(kinds[i].kind);
        snprintf(text, sizeof text, "%s: %zu %s live, not %zu", when, live, kinds[i].name,
                 kinds[i].harness);
        if (live != kinds[i].harness)
            fail_at(__FILE__, __LINE__, text);
    }
    snprintf(text, sizeof text, "%s: %zu device allocations live, not %zu", when,
             fake_live(FAKE_DEVICE_ALLOCATIONS), num_mine);
    if (fake_live(FAKE_DEVICE_ALLOCATIONS) != num_mine)
        fail_at(__FILE__, __LINE__, text);
}

void end_here(void) {
    fake_reset(); /* its threads end too */
    _exit(0);
}

void count_injected(size_t calls) {
    atomic_fetch_add(num_injected, calls);
}

static void finish(void) {
    drv_context left = NULL;
    fake_drain(1); /* closing waits for what is enqueued, and here nobody else would run it */
    drop_device();
    check_given_back("at the end");
    CU(cu.cuCtxGetCurrent(&left));
    CHECK(!left);
    CHECK(fake_violations() == 0);
    fake_reset();
}

/* ---- kernels --------------------------------------------------------------------------------- */

void note(const struct fake_run *run) {
    pthread_mutex_lock(&note_lock);
    struct noted *entry = &noted[num_noted++ % 512];
    snprintf(entry->function, sizeof entry->function, "%s", run->function);
    entry->sm_count = run->sm_count;
    entry->context = run->context;
    entry->priority = run->priority;
    memcpy(entry->grid, run->grid, sizeof entry->grid);
    memcpy(entry->block, run->block, sizeof entry->block);
    entry->shared_bytes = run->shared_bytes;
    memcpy(entry->has_attribute, run->has_attribute, sizeof entry->has_attribute);
    memcpy(entry->attribute, run->attribute, sizeof entry->attribute);
    pthread_mutex_unlock(&note_lock);
}

static void add(const struct fake_run *run, void *user) {
    (void)user;
    *(uint64_t *)fake_host(*(drv_address *)run->params[0]) += (uint64_t)*(int *)run->params[1];
    note(run);
}

static const size_t add_sizes[] = {sizeof(drv_address), sizeof(int)};

void *new_kernel(const char *name, unsigned flags, const size_t *sizes, size_t count,
                 fake_callback callback) {
    return fake_function(name, sizes, count, flags, callback, NULL);
}

void *new_add(const char *name, unsigned flags) {
    return new_kernel(name, flags, add_sizes, 2, add);
}

void enqueue_with(void *function, void **params, drv_launch_config config,
                  const drv_attribute *attributes, size_t count) {
    config.stream = xla;
    config.attributes = (drv_attribute *)(uintptr_t)attributes;
    config.num_attributes = (unsigned)count;
    CU(cu.cuLaunchKernelEx(&config, function, params, NULL));
}

void enqueue(void *function, void **params) {
    drv_launch_config config = {.grid_x = 4, .grid_y = 1, .grid_z = 1, .block_x = 64, .block_y = 1,
                                .block_z = 1};
    enqueue_with(function, params, config, NULL, 0);
}

void enqueue_add(void *function, drv_address cell, int amount) {
    void *params[] = {&cell, &amount};
    enqueue(function, params);
}

/* ---- recordings ------------------------------------------------------------------------------ */

void run_captured(int64_t id, body enqueue_all, void *argument) {
    enter_primary();
    OK(duet_capture_begin(id, xla, NULL, 0));
    enqueue_all(argument);
    OK(duet_capture_end(id));
    leave_primary();
}

duet_program *record_unchecked(body enqueue_all, void *argument) {
    duet_program *program = NULL;
    int64_t id = next_id++;
    OK(duet_capture_arm(device, id));
    run_captured(id, enqueue_all, argument);
    OK(duet_capture_take(device, id, &program));
    CHECK(program && num_programs < 256);
    programs[num_programs++] = program;
    return program;
}

duet_program *record(body enqueue_all, void *argument) {
    duet_program *program = record_unchecked(enqueue_all, argument);
    OK(duet_program_check(program, mine, num_mine));
    return program;
}

struct addition {
    void *function;
    drv_address cell;
    int amount;
};

static void enqueue_addition(void *argument) {
    struct addition *one = argument;
    enqueue_add(one->function, one->cell, one->amount);
}

duet_program *record_add(void *function, drv_address cell, int amount) {
    struct addition one = {function, cell, amount};
    return record(enqueue_addition, &one);
}

void build_everywhere(duet_program *program) {
    for (int lane = 0; lane < DUET_LANES; lane++)
        for (size_t split = 0; split < duet_num_splits(device); split++)
            OK(duet_program_build(program, lane, split));
}

/* ---- running --------------------------------------------------------------------------------- */

uint64_t launch(duet_program *program, enum duet_lane lane, size_t split, unsigned steps) {
    uint64_t last = 0;
    OK(duet_launch(program, lane, split, steps, 0, &last));
    return last;
}

void complete(enum duet_lane lane, uint64_t last, uint64_t seed) {
    fake_drain(seed);
    OK(duet_wait(device, lane, last, 5 * (int64_t)SOON));
}

void settle(enum duet_lane lane, uint64_t last, uint64_t seed) {
    complete(lane, last, seed);
    OK(duet_release(device, lane, last));
}

uint64_t random_of(uint64_t *state) { /* xorshift */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* ---- all of them ----------------------------------------------------------------------------- */

extern const struct test split_tests[], capture_tests[], marker_tests[], recording_tests[],
    pointer_tests[], launch_tests[], lane_tests[], oracle_tests[], completion_tests[],
    thread_tests[], failure_tests[], order_tests[], product_tests[];

/* Those that take longest first. */
static const struct test *const suites[] = {
    completion_tests, failure_tests, oracle_tests, launch_tests, thread_tests,  split_tests,
    capture_tests, marker_tests,     order_tests,  lane_tests,   pointer_tests, recording_tests,
    product_tests};

enum { AT_ONCE = 4 }; /* they wait more than they work */

static struct process {
    pid_t id; /* 0: none */
    const struct test *test;
} processes[AT_ONCE];

static pid_t run_alone(const struct test *test) {
    pid_t child = fork();
    if (child != 0)
        return child;
    running = test->sentence;
    alarm(150);
    start();
    test->run();
    finish();
    exit(0);
}

/* Waits until one of the processes has ended, and makes its place free; 1 if its test has failed. */
static size_t reap(void) {
    int status = 0;
    pid_t ended;
    while ((ended = wait(&status)) < 0 && errno == EINTR)
        continue;
    for (size_t i = 0; i < AT_ONCE; i++) {
        if (ended < 0 || processes[i].id != ended)
            continue;
        processes[i].id = 0;
        if (WIFSIGNALED(status))
            fprintf(stderr, "  ended by %s\n", strsignal(WTERMSIG(status)));
        if (status != 0)
            fprintf(stderr, "FAILED %s\n", processes[i].test->sentence);
        return status != 0;
    }
    return 0;
}

static struct process *free_place(void) {
    for (size_t i = 0; i < AT_ONCE; i++)
        if (processes[i].id == 0)
            return &processes[i];
    return NULL;
}

static size_t begin(const struct test *test) {
    size_t failures = free_place() ? 0 : reap();
    struct process *place = free_place();
    *place = (struct process){run_alone(test), test};
    if (place->id > 0)
        return failures;
    fprintf(stderr, "FAILED %s: no process\n", test->sentence);
    place->id = 0;
    return failures + 1;
}

static bool is_any_left(void) {
    for (size_t i = 0; i < AT_ONCE; i++)
        if (processes[i].id != 0)
            return true;
    return false;
}

int main(int argc, char **argv) {
    char error[200];
    size_t failures = 0, count = 0;
    fake_path = argc > 1 ? argv[1] : NULL;
    num_injected = mmap(NULL, sizeof *num_injected, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (num_injected == MAP_FAILED || driver_load(&cu, fake_path, error, sizeof error)) {
        fprintf(stderr, "%s\n", num_injected == MAP_FAILED ? "no memory" : error);
        return 2;
    }
    for (size_t i = 0; i < sizeof suites / sizeof suites[0]; i++) {
        for (const struct test *test = suites[i]; test->run; test++) {
            if (argc > 2 && !strstr(test->sentence, argv[2]))
                continue;
            failures += begin(test);
            count++;
        }
    }
    while (is_any_left())
        failures += reap();
    driver_unload(&cu);
    printf("%zu tests, %zu failed; %zu driver calls failed in turn\n", count, failures,
           atomic_load(num_injected));
    return failures ? 1 : 0;
}
