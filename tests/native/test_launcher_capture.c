/* Recording: arm, begin, end, take, abort, and what is in between. */
#include "harness.h"

static drv_address cell;
static void *adder;

static void prepare(void) {
    open_device();
    cell = new_memory(8);
    adder = new_add("add", FAKE_MODULE);
}

static void enqueue_one(void *unused) {
    (void)unused;
    enqueue_add(adder, cell, 1);
}

/* XLA's stream is not capturing, and does what it is asked. */
static void check_stream_usable(void) {
    drv_capture_status status = DRV_CAPTURE_INVALIDATED;
    fake_drain(1);
    uint64_t before = value_of(cell);
    enter_primary();
    CU(cu.cuStreamIsCapturing(xla, &status));
    CHECK(status == DRV_CAPTURE_NONE);
    enqueue_one(NULL);
    CU(cu.cuStreamSynchronize(xla));
    leave_primary();
    CHECK(value_of(cell) == before + 1);
}

static void a_captured_run_executes_nothing(void) {
    prepare();
    record(enqueue_one, NULL);
    fake_drain(1);
    CHECK(value_of(cell) == 0);
    check_stream_usable();
}

static void a_program_knows_its_outputs(void) {
    static const duet_address outputs[] = {0x1000, 0x2000, 0x1000};
    duet_program *program = NULL;
    size_t count = 9;
    prepare();
    OK(duet_capture_arm(device, 5));
    enter_primary();
    OK(duet_capture_begin(5, xla, outputs, 3));
    enqueue_one(NULL);
    OK(duet_capture_end(5));
    leave_primary();
    OK(duet_capture_take(device, 5, &program));
    const duet_address *seen = duet_program_outputs(program, &count);
    CHECK(count == 3 && seen != outputs && memcmp(seen, outputs, sizeof outputs) == 0);
    discard(program);
}

static void runs_that_are_not_armed_do_nothing(void) {
    prepare();
    enter_primary();
    OK(duet_capture_begin(1, xla, NULL, 0));
    enqueue_one(NULL);
    OK(duet_capture_end(1));
    CU(cu.cuStreamSynchronize(xla));
    leave_primary();
    CHECK(value_of(cell) == 1 && fake_calls("cuStreamBeginCapture") == 0);
    duet_program *program = NULL;
    REFUSED(STATE, NULL, duet_capture_take(device, 1, &program));
    CHECK(!program);
}

static void marks_before_any_device_do_nothing(void) {
    enter_primary();
    OK(duet_capture_begin(1, xla, NULL, 0));
    OK(duet_capture_end(1));
    leave_primary();
}

static void another_program_run_while_one_is_armed_does_not_become_it(void) {
    duet_program *program = NULL;
    prepare();
    OK(duet_capture_arm(device, 7));
    enter_primary();
    int begun = duet_capture_begin(8, xla, NULL, 0);
    enqueue_one(NULL);
    int ended = duet_capture_end(8);
    leave_primary();
    CHECK(begun == ended);
    CHECK(duet_capture_take(device, 8, &program) < 0 && !program);
    CHECK(duet_capture_take(device, 7, &program) < 0 && !program);
    fake_drain(1);
    duet_capture_abort(device);
    check_stream_usable();
}

static void another_program_run_inside_a_capture_is_recorded_or_breaks_it(void) {
    duet_program *program = NULL;
    prepare();
    OK(duet_capture_arm(device, 7));
    enter_primary();
    OK(duet_capture_begin(7, xla, NULL, 0));
    enqueue_one(NULL);
    int begun = duet_capture_begin(8, xla, NULL, 0);
    enqueue_one(NULL);
    int ended = duet_capture_end(8);
    enqueue_one(NULL);
    duet_capture_end(7);
    leave_primary();
    int taken = duet_capture_take(device, 7, &program);
    CHECK(begun < 0 || ended < 0 || taken < 0 || duet_program_census(program).kernels == 3);
    discard(program);
    duet_capture_abort(device);
    check_stream_usable();
}

static void an_armed_device_cannot_be_armed_again(void) {
    prepare();
    OK(duet_capture_arm(device, 7));
    REFUSED(STATE, NULL, duet_capture_arm(device, 7));
    REFUSED(STATE, NULL, duet_capture_arm(device, 8));
    run_captured(7, enqueue_one, NULL);
    duet_program *program = NULL;
    OK(duet_capture_take(device, 7, &program));
    discard(program);
    OK(duet_capture_arm(device, 8));
    OK(duet_capture_abort(device));
}

static void one_capture_at_a_time_in_the_process(void) {
    static const unsigned sms[] = {16};
    struct duet_options options = options_for(sms, 1);
    duet_device *other = NULL;
    duet_program *program = NULL;
    prepare();
    OK(duet_open(&options, &other));
    OK(duet_capture_arm(device, 7));
    REFUSED(STATE, NULL, duet_capture_arm(other, 8));
    run_captured(7, enqueue_one, NULL);
    REFUSED(STATE, NULL, duet_capture_take(other, 7, &program));
    OK(duet_capture_take(device, 7, &program));
    discard(program);
    OK(duet_capture_arm(other, 8));
    run_captured(8, enqueue_one, NULL);
    OK(duet_capture_take(other, 8, &program));
    discard(program);
    duet_free(other);
}

static void taking_what_has_not_run_is_refused(void) {
    duet_program *program = NULL;
    prepare();
    REFUSED(STATE, NULL, duet_capture_take(device, 7, &program));
    OK(duet_capture_arm(device, 7));
    REFUSED(STATE, NULL, duet_capture_take(device, 7, &program));
    CHECK(!program);
    duet_capture_abort(device);
    check_stream_usable();
}

static void taking_in_the_middle_is_refused(void) {
    duet_program *program = NULL;
    prepare();
    OK(duet_capture_arm(device, 7));
    enter_primary();
    OK(duet_capture_begin(7, xla, NULL, 0));
    enqueue_one(NULL);
    leave_primary();
    REFUSED(STATE, NULL, duet_capture_take(device, 7, &program));
    duet_capture_abort(device);
    check_stream_usable();
}

static void taking_another_is_refused_and_the_right_one_still_there(void) {
    duet_program *program = NULL;
    prepare();
    OK(duet_capture_arm(device, 7));
    run_captured(7, enqueue_one, NULL);
    CHECK(duet_capture_take(device, 8, &program) < 0 && !program);
    OK(duet_capture_take(device, 7, &program));
    duet_program *second = NULL;
    REFUSED(STATE, NULL, duet_capture_take(device, 7, &second));
    discard(program);
}

static void a_second_run_of_the_armed_executable_is_not_recorded(void) {
    duet_program *program = NULL;
    prepare();
    OK(duet_capture_arm(device, 7));
    run_captured(7, enqueue_one, NULL);
    enter_primary();
    int begun = duet_capture_begin(7, xla, NULL, 0);
    enqueue_one(NULL);
    int ended = duet_capture_end(7);
    leave_primary();
    if (begun == DUET_OK && ended == DUET_OK) { /* an ordinary run then */
        fake_drain(1);
        CHECK(value_of(cell) == 1);
    }
    int taken = duet_capture_take(device, 7, &program);
    if (taken == DUET_OK)
        CHECK(duet_program_census(program).kernels == 1);
    discard(program);
    duet_capture_abort(device);
    check_stream_usable();
}

static void beginning_twice_is_told_and_leaves_the_stream_usable(void) {
    duet_program *program = NULL;
    prepare();
    OK(duet_capture_arm(device, 7));
    enter_primary();
    OK(duet_capture_begin(7, xla, NULL, 0));
    int again = duet_capture_begin(7, xla, NULL, 0);
    duet_capture_end(7);
    leave_primary();
    CHECK(again < 0 || duet_capture_take(device, 7, &program) < 0);
    discard(program);
    duet_capture_abort(device);
    check_stream_usable();
}

static void aborting_at_each_stage_leaves_nothing(void) {
    prepare();
    for (int stage = 0; stage < 4; stage++) {
        CHECK(duet_capture_arm(device, 7) == DUET_OK);
        enter_primary();
        if (stage > 0)
            OK(duet_capture_begin(7, xla, NULL, 0));
        if (stage > 1)
            enqueue_one(NULL);
        if (stage > 2)
            OK(duet_capture_end(7));
        leave_primary();
        OK(duet_capture_abort(device));
        CHECK(fake_live(FAKE_GRAPHS) == 0);
        check_stream_usable();
        duet_program *program = NULL;
        REFUSED(STATE, NULL, duet_capture_take(device, 7, &program));
    }
    duet_program *program = record(enqueue_one, NULL);
    CHECK(duet_program_census(program).kernels == 1);
}

static void the_marks_of_an_aborted_run_still_to_come_do_nothing(void) {
    prepare();
    OK(duet_capture_arm(device, 7));
    enter_primary();
    OK(duet_capture_begin(7, xla, NULL, 0));
    leave_primary();
    OK(duet_capture_abort(device));
    enter_primary();
    enqueue_one(NULL);
    duet_capture_end(7); /* OK or told, but no harm */
    leave_primary();
    fake_drain(1);
    CHECK(value_of(cell) == 1);
    check_stream_usable();
}

static void closing_in_the_middle_of_a_capture_ends_it(void) {
    prepare();
    OK(duet_capture_arm(device, 7));
    enter_primary();
    OK(duet_capture_begin(7, xla, NULL, 0));
    enqueue_one(NULL);
    leave_primary();
    drop_device();
    check_given_back("closed in the middle of a capture");
    check_stream_usable();
    open_device();
    record(enqueue_one, NULL);
}

static void closing_with_an_untaken_recording_frees_it(void) {
    prepare();
    OK(duet_capture_arm(device, 7));
    run_captured(7, enqueue_one, NULL);
    drop_device();
    check_given_back("closed before taking");
    check_stream_usable();
}

static void freeing_the_armed_device_lets_another_be_armed(void) {
    prepare();
    OK(duet_capture_arm(device, 7));
    drop_device();
    open_device();
    OK(duet_capture_arm(device, 8));
    OK(duet_capture_abort(device));
}

static void a_capture_that_breaks_is_told_and_the_stream_usable(void) {
    duet_program *program = NULL;
    prepare();
    OK(duet_capture_arm(device, 7));
    enter_primary();
    OK(duet_capture_begin(7, xla, NULL, 0));
    enqueue_one(NULL);
    CHECK(cu.cuStreamSynchronize(xla) != DRV_SUCCESS); /* invalidates it */
    REFUSED(DRIVER, "INVALIDATED", duet_capture_end(7));
    leave_primary();
    CHECK(duet_capture_take(device, 7, &program) < 0 && !program);
    OK(duet_capture_abort(device));
    check_stream_usable();
    record(enqueue_one, NULL);
}

static void a_stream_that_is_capturing_already_is_told(void) {
    drv_graph graph = NULL;
    prepare();
    OK(duet_capture_arm(device, 7));
    enter_primary();
    CU(cu.cuStreamBeginCapture(xla, DRV_CAPTURE_RELAXED));
    poison_last_error();
    CHECK(duet_capture_begin(7, xla, NULL, 0) < 0 && *duet_last_error());
    OK(duet_capture_abort(device));
    cu.cuStreamEndCapture(xla, &graph);
    if (graph)
        CU(cu.cuGraphDestroy(graph));
    leave_primary();
    check_stream_usable();
}

static void enqueue_nothing(void *unused) {
    (void)unused;
}

static void an_empty_program_is_one_or_is_refused(void) {
    prepare();
    OK(duet_capture_arm(device, 7));
    run_captured(7, enqueue_nothing, NULL);
    duet_program *program = NULL;
    int status = duet_capture_take(device, 7, &program);
    CHECK(status == DUET_OK ? program != NULL : program == NULL && *duet_last_error());
    if (program) {
        OK(duet_program_check(program, NULL, 0));
        OK(duet_program_build(program, DUET_DECODE, 1));
        settle(DUET_DECODE, launch(program, DUET_DECODE, 1, 2), 1);
    }
    discard(program);
}

SUITE(capture_tests,
      TEST(a_captured_run_executes_nothing),
      TEST(a_program_knows_its_outputs),
      TEST(runs_that_are_not_armed_do_nothing),
      TEST(marks_before_any_device_do_nothing),
      TEST(another_program_run_while_one_is_armed_does_not_become_it),
      TEST(another_program_run_inside_a_capture_is_recorded_or_breaks_it),
      TEST(an_armed_device_cannot_be_armed_again),
      TEST(one_capture_at_a_time_in_the_process),
      TEST(taking_what_has_not_run_is_refused),
      TEST(taking_in_the_middle_is_refused),
      TEST(taking_another_is_refused_and_the_right_one_still_there),
      TEST(a_second_run_of_the_armed_executable_is_not_recorded),
      TEST(beginning_twice_is_told_and_leaves_the_stream_usable),
      TEST(aborting_at_each_stage_leaves_nothing),
      TEST(the_marks_of_an_aborted_run_still_to_come_do_nothing),
      TEST(closing_in_the_middle_of_a_capture_ends_it),
      TEST(closing_with_an_untaken_recording_frees_it),
      TEST(freeing_the_armed_device_lets_another_be_armed),
      TEST(a_capture_that_breaks_is_told_and_the_stream_usable),
      TEST(a_stream_that_is_capturing_already_is_told),
      TEST(an_empty_program_is_one_or_is_refused));
