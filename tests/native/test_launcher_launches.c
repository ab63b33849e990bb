/* Steps of one lane: their order, numbers, feedback, results and rings. */
#include "harness.h"
#include "internal.h" /* to be at a number that takes years */

static drv_address input, output;

/* step(out, in): *out = *in + 1, and the second word of out = 1000 * *out. */
static void step(const struct fake_run *run, void *user) {
    (void)user;
    drv_address *out = run->params[0], *in = run->params[1];
    set_value(*out, value_of(*in) + 1);
    set_value(*out + 8, 1000 * value_of(*out));
    note(run);
}

static void enqueue_step(void *function) {
    enqueue(function, (void *[]){&output, &input});
}

/* A counter: what it puts out is its next input. Both words are its results, the second first. */
static duet_program *new_counter(void) {
    static const size_t two[] = {8, 8};
    if (!device)
        open_device();
    input = new_memory(16);
    output = new_memory(16);
    duet_program *program =
        record_unchecked(enqueue_step, new_kernel("step", FAKE_MODULE, two, 2, step));
    OK(duet_program_add_copy(program, input, output, 8));
    OK(duet_program_add_result(program, output + 8, 8));
    OK(duet_program_add_result(program, output, 4));
    OK(duet_program_check(program, mine, num_mine));
    build_everywhere(program);
    return program;
}

static void check_result(enum duet_lane lane, uint64_t number, uint64_t count) {
    const void *data = NULL;
    size_t bytes = 0;
    uint32_t low;
    uint64_t high;
    OK(duet_result(device, lane, number, &data, &bytes));
    CHECK(bytes == 12 && data);
    memcpy(&high, data, 8);
    memcpy(&low, (const char *)data + 8, 4);
    CHECK(high == 1000 * count && low == count);
}

static void steps_feed_back_and_each_has_its_own_result(void) {
    duet_program *program = new_counter();
    uint64_t last = 0;
    for (uint64_t seed = 0; seed < 20; seed++) {
        uint64_t before = last;
        unsigned steps = (unsigned)(seed % 8) + 1;
        OK(duet_launch(program, DUET_DECODE, seed % SPLITS, steps, 2, &last));
        CHECK(last == before + steps);
        complete(DUET_DECODE, last, seed);
        CHECK(value_of(input) == last);
        for (uint64_t number = before + 1; number <= last; number++)
            check_result(DUET_DECODE, number, number);
        OK(duet_release(device, DUET_DECODE, last));
    }
}

static void lists_feed_back_too(void) {
    struct duet_options options = options_for(NULL, 0);
    options.replay_lists = true;
    open_with(options);
    duet_program *program = new_counter();
    uint64_t last = 0;
    OK(duet_launch(program, DUET_PREFILL, 0, 8, 2, &last));
    complete(DUET_PREFILL, last, 1);
    CHECK(value_of(input) == 8);
    for (uint64_t number = 1; number <= 8; number++)
        check_result(DUET_PREFILL, number, number);
}

static void each_lane_counts_from_one(void) {
    duet_program *program = new_counter();
    uint64_t done = 99;
    OK(duet_completed(device, DUET_PREFILL, &done));
    CHECK(done == 0);
    CHECK(launch(program, DUET_PREFILL, 1, 3) == 3);
    CHECK(launch(program, DUET_DECODE, 1, 2) == 2);
    CHECK(launch(program, DUET_PREFILL, 2, 1) == 4);
    complete(DUET_PREFILL, 4, 1);
    complete(DUET_DECODE, 2, 1);
    OK(duet_completed(device, DUET_PREFILL, &done));
    CHECK(done == 4);
    OK(duet_completed(device, DUET_DECODE, &done));
    CHECK(done == 2);
}

static void only_the_first_results_are_copied(void) {
    duet_program *program = new_counter();
    static const size_t bytes_of[] = {0, 8, 12};
    uint64_t last = 0;
    for (unsigned count = 0; count <= 2; count++) {
        const void *data = NULL;
        size_t bytes = 99;
        OK(duet_launch(program, DUET_DECODE, 1, 1, count, &last));
        complete(DUET_DECODE, last, 1);
        OK(duet_result(device, DUET_DECODE, last, &data, &bytes));
        CHECK(bytes == bytes_of[count]);
    }
    REFUSED(INVALID, NULL, duet_launch(program, DUET_DECODE, 1, 1, 3, &last));
    CHECK(last == 3 && launch(program, DUET_DECODE, 1, 1) == 4);
}

static void results_too_large_for_a_slot_are_refused(void) {
    drv_address large = new_memory(256);
    open_device();
    void *adder = new_add("add", FAKE_MODULE);
    duet_program *program = record_add(adder, large, 1); /* 64 bytes to a slot */
    OK(duet_program_add_result(program, large, 60));
    OK(duet_program_add_result(program, large, 4));
    int status = duet_program_add_result(program, large, 1);
    if (status == DUET_OK) {
        OK(duet_program_check(program, mine, num_mine));
        status = duet_program_build(program, DUET_DECODE, 0);
    }
    CHECK(status == DUET_INVALID);
    program = record_add(adder, large, 1);
    CHECK(duet_program_add_result(program, large, 65) == DUET_INVALID);
    program = record_add(adder, large, 1);
    OK(duet_program_add_result(program, large, 60));
    OK(duet_program_add_result(program, large + 60, 4));
    OK(duet_program_check(program, mine, num_mine));
    OK(duet_program_build(program, DUET_DECODE, 0));
    for (unsigned char i = 0; i < 64; i++)
        ((unsigned char *)host_of(large))[i] = i;
    uint64_t last = 0;
    const unsigned char *data = NULL;
    size_t bytes = 0;
    OK(duet_launch(program, DUET_DECODE, 0, 2, 2, &last));
    complete(DUET_DECODE, last, 1);
    OK(duet_result(device, DUET_DECODE, 2, (const void **)&data, &bytes));
    CHECK(bytes == 64 && data[0] == 2);
    for (unsigned char i = 8; i < 64; i++)
        CHECK(data[i] == i);
}

static void a_full_ring_is_busy_and_takes_more_after_a_release(void) {
    duet_program *program = new_counter();
    uint64_t last = 0, other = 0; /* 16 slots */
    OK(duet_launch(program, DUET_DECODE, 1, 10, 2, &last));
    OK(duet_launch(program, DUET_DECODE, 2, 6, 2, &last));
    CHECK(last == 16);
    size_t pending = fake_pending();
    IS(BUSY, duet_launch(program, DUET_DECODE, 1, 1, 2, &last));
    CHECK(fake_pending() == pending && last == 16);
    OK(duet_launch(program, DUET_PREFILL, 1, 2, 2, &other)); /* the lanes have a ring each */
    complete(DUET_DECODE, 16, 7);
    IS(BUSY, duet_launch(program, DUET_DECODE, 1, 1, 2, &last)); /* completed, not released */
    OK(duet_release(device, DUET_DECODE, 3));
    IS(BUSY, duet_launch(program, DUET_DECODE, 1, 4, 2, &last));
    OK(duet_launch(program, DUET_DECODE, 3, 3, 2, &last));
    CHECK(last == 19);
    complete(DUET_DECODE, 19, 8);
    for (uint64_t number = 5; number <= 19; number++) {
        const void *data;
        size_t bytes;
        OK(duet_result(device, DUET_DECODE, number, &data, &bytes));
    }
    OK(duet_release(device, DUET_DECODE, 19));
    OK(duet_launch(program, DUET_DECODE, 1, 16, 2, &last));
    complete(DUET_DECODE, last, 9);
    uint64_t total = value_of(input); /* two steps more, on the other lane */
    check_result(DUET_DECODE, last, total);
    check_result(DUET_DECODE, last - 15, total - 15);
}

static void results_stay_until_their_release(void) {
    duet_program *program = new_counter();
    uint64_t last = 0;
    OK(duet_launch(program, DUET_DECODE, 1, 8, 2, &last));
    complete(DUET_DECODE, last, 1);
    OK(duet_launch(program, DUET_DECODE, 1, 8, 2, &last));
    complete(DUET_DECODE, last, 1);
    for (uint64_t number = 1; number <= 16; number++)
        check_result(DUET_DECODE, number, number);
}

static void step_numbers_go_on_past_32_bits(void) {
    duet_program *program = new_counter();
    const uint64_t begin = ((uint64_t)1 << 32) - 3;
    struct lane *lane = &device->lanes[DUET_DECODE];
    atomic_store(lane->counter, begin);
    atomic_store(&lane->submitted, begin);
    atomic_store(&lane->completed, begin);
    atomic_store(&lane->released, begin);
    uint64_t last = 0, done = 0;
    OK(duet_launch(program, DUET_DECODE, 1, 6, 1, &last));
    CHECK(last == begin + 6);
    complete(DUET_DECODE, last, 1);
    OK(duet_completed(device, DUET_DECODE, &done));
    CHECK(done == begin + 6);
    for (uint64_t step = begin + 1; step <= last; step++) {
        const void *data = NULL;
        size_t bytes = 0;
        OK(duet_result(device, DUET_DECODE, step, &data, &bytes));
        CHECK(bytes == 8 && *(const uint64_t *)data == 1000 * (step - begin));
    }
    OK(duet_release(device, DUET_DECODE, last));
}

static void more_steps_than_slots_are_not_taken(void) {
    duet_program *program = new_counter();
    uint64_t last = 77;
    int status = duet_launch(program, DUET_DECODE, 1, 17, 2, &last);
    CHECK(status == DUET_INVALID || status == DUET_BUSY);
    CHECK(fake_pending() == 0);
    CHECK(launch(program, DUET_DECODE, 1, 1) == 1);
}

static void what_cannot_be_launched_is_refused_and_enqueues_nothing(void) {
    new_counter();
    uint64_t last = 5;
    duet_program *program = record_add(new_add("add", FAKE_MODULE), input, 1);
    REFUSED(STATE, NULL, duet_launch(program, DUET_DECODE, 1, 1, 0, &last));
    OK(duet_program_build(program, DUET_DECODE, 1));
    REFUSED(STATE, NULL, duet_launch(program, DUET_DECODE, 2, 1, 0, &last));
    REFUSED(STATE, NULL, duet_launch(program, DUET_PREFILL, 1, 1, 0, &last));
    REFUSED(INVALID, NULL, duet_launch(program, DUET_DECODE, SPLITS, 1, 0, &last));
    REFUSED(INVALID, NULL, duet_launch(program, DUET_LANES, 1, 1, 0, &last));
    REFUSED(INVALID, NULL, duet_launch(program, (enum duet_lane)-1, 1, 1, 0, &last));
    REFUSED(INVALID, NULL, duet_launch(program, DUET_DECODE, 1, 0, 0, &last));
    REFUSED(INVALID, NULL, duet_program_build(program, DUET_LANES, 1));
    REFUSED(INVALID, NULL, duet_program_build(program, DUET_DECODE, SPLITS));
    CHECK(!duet_program_is_built(program, DUET_DECODE, SPLITS));
    CHECK(fake_pending() == 0 && launch(program, DUET_DECODE, 1, 1) == 1);
}

static void building_twice_does_no_harm(void) {
    duet_program *program = new_counter();
    int status = duet_program_build(program, DUET_DECODE, 1);
    CHECK(status == DUET_OK || status == DUET_STATE);
    complete(DUET_DECODE, launch(program, DUET_DECODE, 1, 3), 1);
    CHECK(value_of(input) == 3);
}

static void programs_take_turns_in_the_order_of_their_launches(void) {
    duet_program *counter = new_counter();
    duet_program *adder = record_add(new_add("add", FAKE_MODULE), input, 100);
    build_everywhere(adder);
    for (uint64_t seed = 0; seed < 30; seed++) {
        set_value(input, 0);
        launch(counter, DUET_DECODE, seed % SPLITS, 2);
        launch(adder, DUET_DECODE, (seed + 1) % SPLITS, 1);
        uint64_t last = launch(counter, DUET_DECODE, (seed + 2) % SPLITS, 1);
        settle(DUET_DECODE, last, seed);
        CHECK(value_of(input) == 103 && value_of(output) == 103);
    }
}

static void results_of_other_steps_are_refused(void) {
    duet_program *program = new_counter();
    const void *data;
    size_t bytes;
    uint64_t last = 0;
    REFUSED(STATE, NULL, duet_result(device, DUET_DECODE, 1, &data, &bytes));
    OK(duet_launch(program, DUET_DECODE, 1, 3, 2, &last));
    REFUSED(STATE, NULL, duet_result(device, DUET_DECODE, 1, &data, &bytes));
    complete(DUET_DECODE, last, 1);
    CHECK(duet_result(device, DUET_DECODE, 4, &data, &bytes) < 0);
    CHECK(duet_result(device, DUET_DECODE, 0, &data, &bytes) < 0);
    OK(duet_release(device, DUET_DECODE, 2));
    REFUSED(STATE, NULL, duet_result(device, DUET_DECODE, 2, &data, &bytes));
    check_result(DUET_DECODE, 3, 3);
    REFUSED(INVALID, NULL, duet_result(device, DUET_LANES, 3, &data, &bytes));
}

static void releases_of_what_is_not_complete_are_refused(void) {
    duet_program *program = new_counter();
    uint64_t last = 0;
    OK(duet_launch(program, DUET_DECODE, 1, 3, 2, &last));
    poison_last_error();
    CHECK(duet_release(device, DUET_DECODE, 1) < 0 && !strstr(duet_last_error(), "/poison"));
    complete(DUET_DECODE, last, 1);
    CHECK(duet_release(device, DUET_DECODE, 4) < 0);
    check_result(DUET_DECODE, 1, 1);
    OK(duet_release(device, DUET_DECODE, 3));
    duet_release(device, DUET_DECODE, 1); /* late: nothing happens */
    CHECK(duet_result(device, DUET_DECODE, 3, &(const void *){NULL}, &(size_t){0}) < 0);
    REFUSED(INVALID, NULL, duet_release(device, DUET_LANES, 1));
}

SUITE(launch_tests,
      TEST(steps_feed_back_and_each_has_its_own_result),
      TEST(lists_feed_back_too),
      TEST(each_lane_counts_from_one),
      TEST(only_the_first_results_are_copied),
      TEST(results_too_large_for_a_slot_are_refused),
      TEST(a_full_ring_is_busy_and_takes_more_after_a_release),
      TEST(results_stay_until_their_release),
      TEST(step_numbers_go_on_past_32_bits),
      TEST(more_steps_than_slots_are_not_taken),
      TEST(what_cannot_be_launched_is_refused_and_enqueues_nothing),
      TEST(building_twice_does_no_harm),
      TEST(programs_take_turns_in_the_order_of_their_launches),
      TEST(results_of_other_steps_are_refused),
      TEST(releases_of_what_is_not_complete_are_refused));
