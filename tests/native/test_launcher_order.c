/* Calls in the wrong order, closing, freeing: told or harmless, never a crash. */
#include "harness.h"

static drv_address cell;
static duet_program *adder;

static void prepare(void) {
    open_device();
    cell = new_memory(64);
    adder = record_add(new_add("add", FAKE_MODULE), cell, 1);
    build_everywhere(adder);
}

static void a_closed_device_answers_every_call_with_a_state(void) {
    uint64_t number = 0;
    const void *data;
    size_t bytes;
    duet_program *none = NULL;
    prepare();
    settle(DUET_DECODE, launch(adder, DUET_DECODE, 1, 1), 1);
    duet_close(device);
    duet_close(device);
    check_given_back("closed");
    REFUSED(STATE, "clos", duet_capture_arm(device, 1));
    REFUSED(STATE, NULL, duet_capture_take(device, 1, &none));
    REFUSED(STATE, NULL, duet_capture_abort(device));
    REFUSED(STATE, "clos", duet_launch(adder, DUET_DECODE, 1, 1, 0, &number));
    REFUSED(STATE, "clos", duet_program_build(adder, DUET_DECODE, 1));
    REFUSED(STATE, NULL, duet_program_add_copy(adder, cell, cell + 8, 8));
    REFUSED(STATE, NULL, duet_program_add_result(adder, cell, 8));
    REFUSED(STATE, NULL, duet_program_check(adder, mine, num_mine));
    REFUSED(STATE, "clos", duet_copy(device, DUET_DECODE, 1, cell, cell + 8, 8));
    REFUSED(STATE, "clos", duet_copy_in(device, DUET_DECODE, 1, cell, &number, 8));
    REFUSED(STATE, "clos", duet_lane_wait(device, DUET_DECODE, 1));
    REFUSED(STATE, "clos", duet_fence(device, DUET_DECODE, 1, &number));
    REFUSED(STATE, "clos", duet_completed(device, DUET_DECODE, &number));
    REFUSED(STATE, "clos", duet_wait(device, DUET_DECODE, 1, 0));
    REFUSED(STATE, "clos", duet_result(device, DUET_DECODE, 1, &data, &bytes));
    REFUSED(STATE, "clos", duet_release(device, DUET_DECODE, 1));
    REFUSED(STATE, "clos", duet_program_check_apart(adder, adder));
    duet_clear(device);
    CHECK(!none && duet_descriptor(device) == -1);
    struct duet_split split;
    OK(duet_get_split(device, 1, &split)); /* a fact */
    CHECK(duet_num_splits(device) == SPLITS && split.decode_sms == 16);
}

static void programs_may_be_freed_after_the_close(void) {
    prepare();
    fake_mode(FAKE_THREADS);
    launch(adder, DUET_DECODE, 1, 4);
    duet_close(device);
    CHECK(value_of(cell) == 4);
    check_given_back("closed with programs alive");
    CHECK(!duet_program_is_built(adder, DUET_DECODE, 1));
    size_t count = 9;
    CHECK(duet_program_census(adder).kernels == 1);
    duet_program_outputs(adder, &count);
    CHECK(count == 0);
    duet_program_free(adder);
    forget(adder);
    duet_free(device);
    device = NULL;
}

static void a_program_freed_with_work_in_flight_lets_it_finish(void) {
    for (int lane = 0; lane < DUET_LANES; lane++) {
        prepare();
        fake_mode(FAKE_THREADS);
        fake_delay_us(2000);
        launch(adder, lane, 1, 8);
        duet_program_free(adder);
        CHECK(value_of(cell) == 8 && fake_violations() == 0); /* at once */
        forget(adder);
        CHECK(fake_live(FAKE_EXECS) == 0 && fake_live(FAKE_GRAPHS) == 0);
        drop_device();
    }
}

static void freeing_nothing_is_harmless(void) {
    duet_program_free(NULL);
    duet_free(NULL);
}

/* The harness counts violations: the double knows what must go before what. */
static void closing_goes_in_the_drivers_order(void) {
    static const char *const order[] = {"cuGraphExecDestroy", "cuStreamDestroy",
                                        "cuGreenCtxDestroy", "cuDevicePrimaryCtxRelease"};
    prepare();
    size_t first_of[4] = {0}, last_of[4] = {0}, begin = fake_total_calls();
    drop_device();
    for (size_t i = begin; i < fake_total_calls(); i++) {
        for (size_t k = 0; k < 4; k++) {
            if (strcmp(fake_log(i), order[k]) != 0)
                continue;
            first_of[k] = first_of[k] ? first_of[k] : i;
            last_of[k] = i;
        }
    }
    for (size_t k = 0; k < 4; k++) {
        CHECK(first_of[k] > 0);
        if (k > 0)
            CHECK(last_of[k - 1] < first_of[k]);
    }
}

static void programs_keep_no_graph_longer_than_themselves(void) {
    prepare();
    duet_program *other = record_add(new_add("add", FAKE_LIBRARY), cell, 1);
    size_t execs = fake_live(FAKE_EXECS), graphs = fake_live(FAKE_GRAPHS);
    build_everywhere(other);
    CHECK(fake_live(FAKE_EXECS) == execs + SPLITS * DUET_LANES);
    duet_program_free(other);
    forget(other);
    CHECK(fake_live(FAKE_EXECS) == execs && fake_live(FAKE_GRAPHS) <= graphs);
}

static void nothing_to_release_take_or_abort_is_told(void) {
    duet_program *program = NULL;
    prepare();
    REFUSED(STATE, NULL, duet_capture_take(device, 3, &program));
    int status = duet_capture_abort(device); /* nothing to abort: harmless or told */
    CHECK(status == DUET_OK || status == DUET_STATE);
    CHECK(duet_release(device, DUET_DECODE, 1) < 0);
    OK(duet_release(device, DUET_DECODE, 0));
}

static void adding_to_a_built_program_changes_what_it_was_built_for_or_is_refused(void) {
    prepare();
    int status = duet_program_add_copy(adder, cell + 8, cell, 8);
    if (status != DUET_OK) {
        CHECK(status == DUET_STATE);
        return;
    }
    /* Unchecked now: it may not run as if it were. */
    uint64_t last = 0;
    CHECK(duet_launch(adder, DUET_DECODE, 1, 1, 0, &last) == DUET_STATE);
    OK(duet_program_check(adder, mine, num_mine));
    OK(duet_program_build(adder, DUET_DECODE, 1));
    settle(DUET_DECODE, launch(adder, DUET_DECODE, 1, 1), 1);
    CHECK(value_of(cell + 8) == value_of(cell));
}

static void copies_of_nothing_are_refused_or_nothing(void) {
    unsigned char byte = 1;
    prepare();
    int status = duet_copy(device, DUET_DECODE, 1, cell, cell + 8, 0);
    CHECK(status == DUET_OK || status == DUET_INVALID);
    status = duet_copy_in(device, DUET_DECODE, 1, cell, &byte, 0);
    CHECK(status == DUET_OK || status == DUET_INVALID);
    settle(DUET_DECODE, launch(adder, DUET_DECODE, 1, 1), 1);
    CHECK(value_of(cell) == 1);
}

static void programs_of_another_device_are_not_mixed_up(void) {
    duet_device *other = NULL;
    struct duet_options options = options_for(NULL, 0);
    prepare();
    OK(duet_open(&options, &other));
    REFUSED(INVALID, NULL, duet_copy(other, DUET_DECODE, 1, cell, cell + 8, 8)); /* no split 1 */
    settle(DUET_DECODE, launch(adder, DUET_DECODE, 1, 2), 1);
    uint64_t done = 9;
    OK(duet_completed(other, DUET_DECODE, &done));
    CHECK(done == 0 && value_of(cell) == 2);
    duet_program *program = NULL;
    OK(duet_capture_arm(other, 9));
    enter_primary();
    OK(duet_capture_begin(9, xla, NULL, 0));
    OK(duet_capture_end(9));
    leave_primary();
    OK(duet_capture_take(other, 9, &program));
    OK(duet_program_check(program, NULL, 0));
    REFUSED(INVALID, "two devices", duet_program_check_apart(adder, program));
    duet_program_free(program);
    duet_free(other);
    settle(DUET_DECODE, launch(adder, DUET_DECODE, 1, 1), 1);
}

SUITE(order_tests,
      TEST(a_closed_device_answers_every_call_with_a_state),
      TEST(programs_may_be_freed_after_the_close),
      TEST(a_program_freed_with_work_in_flight_lets_it_finish),
      TEST(freeing_nothing_is_harmless),
      TEST(closing_goes_in_the_drivers_order),
      TEST(programs_keep_no_graph_longer_than_themselves),
      TEST(nothing_to_release_take_or_abort_is_told),
      TEST(adding_to_a_built_program_changes_what_it_was_built_for_or_is_refused),
      TEST(copies_of_nothing_are_refused_or_nothing),
      TEST(programs_of_another_device_are_not_mixed_up));
