/* Opening a device, and what its splits come to. */
#include "harness.h"

static void opens_and_reads(const char *preset, unsigned total, const unsigned (*expected)[3],
                            size_t count) {
    unsigned wanted[8];
    CHECK(fake_preset(preset) == 0);
    for (size_t i = 0; i < count; i++)
        wanted[i] = expected[i][0];
    open_with(options_for(wanted, count));
    CHECK(duet_num_splits(device) == count + 1);
    struct duet_split split;
    OK(duet_get_split(device, 0, &split));
    CHECK(split.decode_sms == total && split.prefill_sms == total);
    for (size_t i = 0; i < count; i++) {
        OK(duet_get_split(device, i + 1, &split));
        CHECK(split.wanted == expected[i][0]);
        CHECK(split.decode_sms == expected[i][1] && split.prefill_sms == expected[i][2]);
    }
    drop_device();
    check_given_back(preset);
}

static void splits_of_132_sms_round_up_to_eights(void) {
    static const unsigned expected[][3] = {{1, 8, 124}, {8, 8, 124}, {9, 16, 116}, {20, 24, 108},
                                           {32, 32, 100}, {64, 64, 68}, {124, 128, 4}};
    opens_and_reads("H200", 132, expected, 7);
}

static void splits_of_108_sms_round_up_to_twos_from_four(void) {
    static const unsigned expected[][3] = {{1, 4, 104}, {7, 8, 100}, {54, 54, 54}};
    opens_and_reads("A100", 108, expected, 3);
}

static void splits_of_142_sms_round_up_to_twos_from_four(void) {
    static const unsigned expected[][3] = {{3, 4, 138}, {31, 32, 110}, {71, 72, 70}};
    opens_and_reads("L40S", 142, expected, 3);
}

static void the_whole_device_is_split_0_even_without_others(void) {
    struct duet_split split = {9, 9, 9};
    open_with(options_for(NULL, 0));
    CHECK(duet_num_splits(device) == 1);
    OK(duet_get_split(device, 0, &split));
    CHECK(split.decode_sms == 132 && split.prefill_sms == 132);
    OK(duet_get_split(device, 0, NULL));
    REFUSED(INVALID, NULL, duet_get_split(device, 1, &split));
    REFUSED(INVALID, NULL, duet_get_split(device, (size_t)-1, NULL));
}

static void refuses_to_open(struct duet_options options, const char *word) {
    duet_device *none = NULL;
    poison_last_error();
    int status = duet_open(&options, &none);
    CHECK(status < 0 && !none);
    check_refusal(__FILE__, __LINE__, "duet_open", status, status, word);
    check_given_back("after a refused duet_open");
}

static void a_split_of_more_than_there_is_is_refused(void) {
    static const unsigned wanted[] = {16, 133};
    refuses_to_open(options_for(wanted, 2), NULL);
}

static void a_split_that_leaves_nothing_for_prefill_is_refused(void) {
    static const unsigned all[] = {132}, rounded[] = {16}, rounded_up[] = {15};
    refuses_to_open(options_for(all, 1), NULL);
    fake_configure(9, 0, 16, 13000, "small");
    refuses_to_open(options_for(rounded, 1), NULL);
    refuses_to_open(options_for(rounded_up, 1), NULL);
}

static void a_split_of_nothing_is_refused(void) {
    static const unsigned wanted[] = {0};
    refuses_to_open(options_for(wanted, 1), NULL);
}

static void a_library_that_is_not_there_is_no_driver(void) {
    duet_device *none = NULL;
    struct duet_options options = options_for(NULL, 0);
    options.libcuda = "/nowhere/libcuda.so";
    REFUSED(NO_DRIVER, "/nowhere/libcuda.so", duet_open(&options, &none));
    options.libcuda = "libm.so.6";
    REFUSED(NO_DRIVER, NULL, duet_open(&options, &none));
    CHECK(!none);
}

static void a_device_that_is_not_there_is_refused(void) {
    struct duet_options options = options_for(NULL, 0);
    options.ordinal = 1;
    refuses_to_open(options, NULL);
    options.ordinal = -1;
    refuses_to_open(options, NULL);
}

static void rings_of_no_size_are_refused(void) {
    struct duet_options options = options_for(NULL, 0);
    options.result_slots = 0;
    refuses_to_open(options, NULL);
}

static void opening_changes_no_current_context(void) {
    drv_context current = NULL;
    enter_primary();
    open_device();
    CU(cu.cuCtxGetCurrent(&current));
    CHECK(current == primary);
    drop_device();
    CU(cu.cuCtxGetCurrent(&current));
    CHECK(current == primary);
    leave_primary();
}

static void streams_of_decode_are_of_greater_priority(void) {
    open_device();
    drv_address cell = new_memory(8);
    duet_program *program = record_add(new_add("add", FAKE_MODULE), cell, 1);
    build_everywhere(program);
    for (size_t split = 0; split < SPLITS; split++) {
        num_noted = 0;
        settle(DUET_PREFILL, launch(program, DUET_PREFILL, split, 1), 1);
        settle(DUET_DECODE, launch(program, DUET_DECODE, split, 1), 1);
        CHECK(num_noted == 2 && noted[1].priority < noted[0].priority);
        CHECK(noted[1].priority == -5);
    }
}

static void a_device_can_be_opened_again_and_twice_at_once(void) {
    duet_device *other = NULL;
    struct duet_options options = options_for(NULL, 0);
    open_device();
    drop_device();
    open_device();
    OK(duet_open(&options, &other));
    CHECK(other && other != device && duet_num_splits(other) == 1);
    duet_free(other);
    CHECK(duet_num_splits(device) == SPLITS);
}

SUITE(split_tests,
      TEST(splits_of_132_sms_round_up_to_eights),
      TEST(splits_of_108_sms_round_up_to_twos_from_four),
      TEST(splits_of_142_sms_round_up_to_twos_from_four),
      TEST(the_whole_device_is_split_0_even_without_others),
      TEST(a_split_of_more_than_there_is_is_refused),
      TEST(a_split_that_leaves_nothing_for_prefill_is_refused),
      TEST(a_split_of_nothing_is_refused),
      TEST(a_library_that_is_not_there_is_no_driver),
      TEST(a_device_that_is_not_there_is_refused),
      TEST(rings_of_no_size_are_refused),
      TEST(opening_changes_no_current_context),
      TEST(streams_of_decode_are_of_greater_priority),
      TEST(a_device_can_be_opened_again_and_twice_at_once));
