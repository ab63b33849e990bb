/* Several threads at once, on a device whose streams run by themselves. */
#include "harness.h"

#include <poll.h>
#include <stdatomic.h>
#include <unistd.h>

static drv_address cells;
static duet_program *counters[DUET_LANES];
static atomic_int ended[DUET_LANES];
enum { STEPS = 1500 };

struct feed {
    void *function;
    drv_address cell;
};

static void enqueue_feed(void *argument) {
    struct feed *feed = argument;
    enqueue_add(feed->function, feed->cell, 1);
}

static void start_with(bool lists, bool memory_operations) {
    static const unsigned sms[] = {16, 64};
    struct duet_options options = options_for(sms, 2);
    options.replay_lists = lists;
    fake_mode(FAKE_THREADS);
    fake_memory_operations(memory_operations);
    open_with(options);
    cells = new_memory(64);
    void *function = new_add("add", FAKE_MODULE);
    for (size_t lane = 0; lane < DUET_LANES; lane++) {
        struct feed feed = {function, cells + 32 * lane};
        counters[lane] = record_unchecked(enqueue_feed, &feed);
        OK(duet_program_add_result(counters[lane], feed.cell, 8));
        OK(duet_program_check(counters[lane], mine, num_mine));
        build_everywhere(counters[lane]);
    }
}

/* Launches on its lane, whatever others do; as often as its ring takes it. */
static void *launch_all(void *lane_as_pointer) {
    enum duet_lane lane = (enum duet_lane)(uintptr_t)lane_as_pointer;
    uint64_t last = 0, random = 3 + lane, value = 7;
    while (last < STEPS) {
        int status = duet_launch(counters[lane], lane, random_of(&random) % 3,
                                 (unsigned)(random % 4) + 1, 1, &last);
        if (status == DUET_BUSY)
            usleep(50);
        else
            OK(status);
        if (random % 5 == 0) {
            status = duet_copy_in(device, lane, 1, cells + 32 * lane + 16, &value, 8);
            CHECK(status == DUET_OK || status == DUET_BUSY);
        }
    }
    atomic_store(&ended[lane], (int)last);
    return NULL;
}

/* Takes results in order and gives their room back. */
static void *take_all(void *lane_as_pointer) {
    enum duet_lane lane = (enum duet_lane)(uintptr_t)lane_as_pointer;
    for (uint64_t step = 1; step <= STEPS; step++) {
        const void *data = NULL;
        size_t bytes = 0;
        int status = duet_wait(device, lane, step, 2000000);
        while (status != DUET_OK) { /* or not launched yet */
            CHECK(status == DUET_TIMEOUT || status == DUET_STATE || status == DUET_INVALID);
            usleep(100);
            status = duet_wait(device, lane, step, 2000000);
        }
        OK(duet_result(device, lane, step, &data, &bytes));
        CHECK(bytes == 8 && *(const uint64_t *)data == step);
        OK(duet_release(device, lane, step));
    }
    return NULL;
}

static atomic_bool stop;

static void *watch(void *unused) {
    uint64_t seen[DUET_LANES] = {0, 0};
    while (!atomic_load(&stop)) {
        struct pollfd one = {.fd = duet_descriptor(device), .events = POLLIN};
        CHECK(poll(&one, 1, 20) >= 0);
        duet_clear(device);
        for (int lane = 0; lane < DUET_LANES; lane++) {
            uint64_t done = 0;
            OK(duet_completed(device, lane, &done));
            CHECK(done >= seen[lane]);
            seen[lane] = done;
        }
    }
    return unused;
}

static void *order_lanes(void *unused) {
    uint64_t random = 77;
    while (!atomic_load(&stop)) {
        OK(duet_lane_wait(device, random_of(&random) % 2, random % 3));
        usleep(200);
    }
    return unused;
}

static void everything_at_once(bool lists, bool memory_operations) {
    static void *(*const jobs[])(void *) = {launch_all, take_all, launch_all, take_all};
    pthread_t threads[6];
    start_with(lists, memory_operations);
    for (size_t i = 0; i < 4; i++)
        CHECK(!pthread_create(&threads[i], NULL, jobs[i], (void *)(uintptr_t)(i / 2)));
    CHECK(!pthread_create(&threads[4], NULL, watch, NULL));
    CHECK(!pthread_create(&threads[5], NULL, order_lanes, NULL));
    for (size_t i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    atomic_store(&stop, true);
    pthread_join(threads[4], NULL);
    pthread_join(threads[5], NULL);
    for (int lane = 0; lane < DUET_LANES; lane++) {
        OK(duet_wait(device, lane, (uint64_t)atomic_load(&ended[lane]), 5 * (int64_t)SOON));
        CHECK(value_of(cells + 32 * (drv_address)lane) == (uint64_t)atomic_load(&ended[lane]));
    }
}

static void launches_results_releases_and_watching_go_on_at_once(void) {
    everything_at_once(false, true);
}

static void the_same_with_events(void) {
    everything_at_once(false, false);
}

static void the_same_with_lists(void) {
    everything_at_once(true, true);
}

static void *use_until_closed(void *lane_as_pointer) {
    enum duet_lane lane = (enum duet_lane)(uintptr_t)lane_as_pointer;
    uint64_t last = 0, done = 0;
    const void *data;
    size_t bytes;
    int status = DUET_OK;
    while (status != DUET_STATE) {
        duet_wait(device, lane, last, 1000000);
        if (duet_result(device, lane, last, &data, &bytes) == DUET_OK)
            duet_release(device, lane, last);
        duet_completed(device, lane, &done);
        duet_clear(device);
        OK(duet_get_split(device, 1, NULL));
        duet_program_is_built(counters[lane], lane, 1);
        duet_descriptor(device);
        status = duet_copy_in(device, lane, 2, cells + 16, &done, 8);
        CHECK(status == DUET_OK || status == DUET_BUSY || status == DUET_STATE);
        status = duet_program_check_apart(counters[0], counters[1]);
        CHECK(status == DUET_OK || status == DUET_STATE);
        status = duet_launch(counters[lane], lane, 1, 1, 1, &last);
        CHECK(status == DUET_OK || status == DUET_BUSY || status == DUET_STATE);
    }
    return NULL;
}

static void closing_under_use_ends_every_call_with_a_state(void) {
    pthread_t threads[4];
    start_with(false, true);
    for (size_t i = 0; i < 4; i++)
        CHECK(!pthread_create(&threads[i], NULL, use_until_closed, (void *)(uintptr_t)(i / 2)));
    usleep(30000);
    duet_close(device);
    for (size_t i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}

static void *close_too(void *unused) {
    duet_close(device);
    return unused;
}

static void closing_from_two_threads_is_closing_once(void) {
    pthread_t one, two;
    start_with(false, false);
    launch(counters[0], DUET_PREFILL, 1, 4);
    CHECK(!pthread_create(&one, NULL, close_too, NULL));
    CHECK(!pthread_create(&two, NULL, close_too, NULL));
    pthread_join(one, NULL);
    pthread_join(two, NULL);
}

static void *fail_elsewhere(void *unused) {
    CHECK(duet_get_split(device, 77, &(struct duet_split){0}) == DUET_INVALID);
    CHECK(strstr(duet_last_error(), "77"));
    return unused;
}

static void the_last_error_is_each_threads_own(void) {
    pthread_t other;
    start_with(false, true);
    CHECK(duet_get_split(device, 55, &(struct duet_split){0}) == DUET_INVALID);
    CHECK(!pthread_create(&other, NULL, fail_elsewhere, NULL));
    pthread_join(other, NULL);
    CHECK(strstr(duet_last_error(), "55"));
}

SUITE(thread_tests,
      TEST(launches_results_releases_and_watching_go_on_at_once),
      TEST(the_same_with_events),
      TEST(the_same_with_lists),
      TEST(closing_under_use_ends_every_call_with_a_state),
      TEST(closing_from_two_threads_is_closing_once),
      TEST(the_last_error_is_each_threads_own));
