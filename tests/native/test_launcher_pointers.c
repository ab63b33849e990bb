/* Every address that a program uses must lie in memory that somebody keeps. */
#include "harness.h"

#include <stdio.h>

static drv_address kept; /* 4096 bytes */
enum { KEPT = 4096 };

static void prepare(void) {
    open_device();
    kept = new_memory(KEPT);
}

struct argument {
    drv_address first;
    int number, rest; /* of the word: what lies there by chance may be the start of an address */
    drv_address inside;
    unsigned char odd[5];
};

static const size_t sizes[] = {sizeof(drv_address), sizeof(int), sizeof(struct argument)};

struct call {
    void *function;
    drv_address plain;
    struct argument structure;
};

static void enqueue_call(void *argument) {
    struct call *call = argument;
    int number = 3;
    enqueue(call->function, (void *[]){&call->plain, &number, &call->structure});
}

static int checks(duet_program *program) {
    struct duet_range range = {kept, KEPT, true};
    poison_last_error();
    return duet_program_check(program, &range, 1);
}

static void is_stray(duet_program *program, const char *word) {
    check_refusal(__FILE__, __LINE__, "duet_program_check", DUET_UNSAFE, checks(program), word);
    duet_program_free(program);
    forget(program);
}

static struct call call_with(unsigned flags) {
    struct call call = {new_kernel("culprit", flags, sizes, 3, NULL), kept, {kept, 5, 0, kept, {0}}};
    return call;
}

static void strays_in_parameters_are_named(void) {
    static const unsigned flags[] = {FAKE_MODULE, FAKE_LIBRARY, FAKE_EXTRA};
    prepare();
    drv_address stray = new_memory(64);
    for (size_t i = 0; i < 3; i++) {
        struct call call = call_with(flags[i]);
        OK(checks(record_unchecked(enqueue_call, &call)));
        call.plain = stray;
        is_stray(record_unchecked(enqueue_call, &call), "culprit");
        call = call_with(flags[i]);
        call.structure.first = stray + 63;
        is_stray(record_unchecked(enqueue_call, &call), "culprit");
        call = call_with(flags[i]);
        call.structure.inside = stray;
        is_stray(record_unchecked(enqueue_call, &call), "culprit");
    }
}

static void the_last_byte_is_inside_and_the_next_is_not(void) {
    prepare();
    /* Behind `kept` there must be memory that is not kept, or one sees no pointer in it. */
    drv_address behind = new_memory(4096);
    CHECK(behind == kept + KEPT);
    struct call call = call_with(FAKE_MODULE);
    call.plain = kept + KEPT - 1;
    OK(checks(record_unchecked(enqueue_call, &call)));
    call.plain = kept + KEPT;
    is_stray(record_unchecked(enqueue_call, &call), "culprit");
}

static void the_first_byte_is_inside_and_the_one_before_is_not(void) {
    open_device();
    drv_address before = new_memory(512);
    kept = new_memory(KEPT);
    CHECK(before + 512 == kept);
    struct call call = call_with(FAKE_MODULE);
    OK(checks(record_unchecked(enqueue_call, &call)));
    call.plain = kept - 1;
    is_stray(record_unchecked(enqueue_call, &call), "culprit");
}

static void numbers_and_null_are_no_addresses(void) {
    prepare();
    struct call call = call_with(FAKE_MODULE);
    call.plain = 0;
    call.structure.first = 1;
    call.structure.inside = 0xffffffff;
    OK(checks(record_unchecked(enqueue_call, &call)));
    call.structure.inside = 0x3ff0000000000000; /* 1.0 */
    OK(checks(record_unchecked(enqueue_call, &call)));
    call.structure.inside = 0xbff0000000000000; /* -1.0 */
    OK(checks(record_unchecked(enqueue_call, &call)));
}

struct move {
    drv_address dst, src;
    size_t bytes;
};

static void enqueue_copy(void *argument) {
    struct move *move = argument;
    CU(cu.cuMemcpyDtoDAsync(move->dst, move->src, move->bytes, xla));
}

static void enqueue_fill(void *argument) {
    struct move *move = argument;
    CU(cu.cuMemsetD8Async(move->dst, 1, move->bytes, xla));
}

static void copies_must_lie_inside_with_all_their_bytes(void) {
    prepare();
    drv_address behind = new_memory(4096);
    CHECK(behind == kept + KEPT);
    struct duet_range both = {kept, 2 * KEPT, true};
    struct move move = {kept + 1024, kept + KEPT - 100, 100};
    OK(checks(record_unchecked(enqueue_copy, &move)));
    move = (struct move){kept + KEPT - 100, kept, 100};
    OK(checks(record_unchecked(enqueue_copy, &move)));
    /* An allocation's end in the middle of a copy is the driver's to refuse. */
    move = (struct move){behind, kept, 100};
    is_stray(record_unchecked(enqueue_copy, &move), NULL);
    move = (struct move){kept, behind, 1};
    is_stray(record_unchecked(enqueue_copy, &move), NULL);
    duet_program *program = record_unchecked(enqueue_copy, &move);
    OK(duet_program_check(program, &both, 1));
    struct duet_range short_by_one[] = {{kept, 99, true}, {kept + 1024, 500, true}};
    move = (struct move){kept, kept + 1024, 100};
    program = record_unchecked(enqueue_copy, &move);
    REFUSED(UNSAFE, NULL, duet_program_check(program, short_by_one, 2));
    short_by_one[0].bytes = 100;
    OK(duet_program_check(program, short_by_one, 2));
    short_by_one[1].bytes = 99;
    REFUSED(UNSAFE, NULL, duet_program_check(program, short_by_one, 2));
}

static void fills_must_lie_inside_with_all_their_bytes(void) {
    prepare();
    struct move move = {kept + 10, 0, 100};
    duet_program *program = record_unchecked(enqueue_fill, &move);
    struct duet_range range = {kept + 10, 100, true};
    OK(duet_program_check(program, &range, 1));
    range.bytes = 99;
    REFUSED(UNSAFE, NULL, duet_program_check(program, &range, 1));
    range = (struct duet_range){kept + 11, 100, true};
    REFUSED(UNSAFE, NULL, duet_program_check(program, &range, 1));
}

static void enqueue_rows(void *argument) {
    const bool *copy = argument;
    drv_copy_3d rows = {.src_type = DRV_MEMORY_DEVICE, .src_device = kept, .src_pitch = 64,
                        .src_height = 4, .dst_type = DRV_MEMORY_DEVICE, .dst_device = kept + 2048,
                        .dst_pitch = 32, .dst_height = 4, .width_bytes = 16, .height = 4,
                        .depth = 1};
    if (*copy)
        CU(cu.cuMemcpy3DAsync(&rows, xla));
    else
        CU(cu.cuMemsetD2D32Async(kept, 64, 7, 4, 4, xla));
}

static void rows_count_up_to_the_last_ones_end(void) {
    bool copy = false;
    prepare();
    duet_program *fill = record_unchecked(enqueue_rows, &copy);
    copy = true;
    duet_program *rows = record_unchecked(enqueue_rows, &copy);
    struct duet_range ranges[] = {{kept, 3 * 64 + 16, true}, {kept + 2048, 3 * 32 + 16, true}};
    OK(duet_program_check(fill, ranges, 1));
    OK(duet_program_check(rows, ranges, 2));
    ranges[0].bytes--;
    REFUSED(UNSAFE, NULL, duet_program_check(fill, ranges, 1));
    REFUSED(UNSAFE, NULL, duet_program_check(rows, ranges, 2));
    ranges[0].bytes++;
    ranges[1].bytes--;
    REFUSED(UNSAFE, NULL, duet_program_check(rows, ranges, 2));
}

static void copies_and_results_added_must_lie_inside(void) {
    prepare();
    drv_address stray = new_memory(64);
    void *adder = new_add("add", FAKE_MODULE);
    struct duet_range range = {kept, KEPT, true};
    for (int variant = 0; variant < 5; variant++) {
        duet_program *program = record_add(adder, kept, 1);
        int added = DUET_OK;
        if (variant == 0)
            added = duet_program_add_copy(program, stray, kept, 8);
        if (variant == 1)
            added = duet_program_add_copy(program, kept, stray, 8);
        if (variant == 2)
            added = duet_program_add_result(program, stray, 8);
        if (variant == 3)
            added = duet_program_add_result(program, kept + KEPT - 7, 8);
        if (variant == 4)
            added = duet_program_add_copy(program, kept, kept + KEPT - 7, 8);
        OK(added);
        REFUSED(UNSAFE, NULL, duet_program_check(program, &range, 1));
        REFUSED(STATE, NULL, duet_program_build(program, DUET_DECODE, 1));
    }
    duet_program *program = record_add(adder, kept, 1);
    OK(duet_program_add_copy(program, kept + KEPT - 8, kept, 8));
    OK(duet_program_add_result(program, kept + KEPT - 8, 8));
    OK(duet_program_check(program, &range, 1));
}

static void what_is_not_checked_is_not_built(void) {
    prepare();
    struct call call = call_with(FAKE_MODULE);
    duet_program *program = record_unchecked(enqueue_call, &call);
    REFUSED(STATE, NULL, duet_program_build(program, DUET_DECODE, 1));
    REFUSED(UNSAFE, NULL, duet_program_check(program, NULL, 0));
    REFUSED(STATE, NULL, duet_program_build(program, DUET_DECODE, 1));
    OK(checks(program));
    OK(duet_program_build(program, DUET_DECODE, 1));
    CHECK(duet_program_is_built(program, DUET_DECODE, 1));
    CHECK(!duet_program_is_built(program, DUET_DECODE, 2));
    CHECK(!duet_program_is_built(program, DUET_PREFILL, 1));
}

static void adding_makes_a_program_unchecked(void) {
    prepare();
    struct call call = call_with(FAKE_MODULE);
    for (int result = 0; result < 2; result++) {
        duet_program *program = record_unchecked(enqueue_call, &call);
        OK(checks(program));
        OK(result ? duet_program_add_result(program, kept, 8)
                  : duet_program_add_copy(program, kept, kept + 8, 8));
        REFUSED(STATE, NULL, duet_program_build(program, DUET_DECODE, 1));
        OK(checks(program));
        OK(duet_program_build(program, DUET_DECODE, 1));
    }
}

static void a_check_that_fails_takes_an_earlier_one_back(void) {
    prepare();
    struct call call = call_with(FAKE_MODULE);
    duet_program *program = record_unchecked(enqueue_call, &call);
    OK(checks(program));
    REFUSED(UNSAFE, NULL, duet_program_check(program, NULL, 0));
    REFUSED(STATE, NULL, duet_program_build(program, DUET_DECODE, 1));
}

static duet_program *user_of(drv_address at, const struct duet_range *ranges, size_t count) {
    struct call call = call_with(FAKE_MODULE);
    call.plain = call.structure.first = call.structure.inside = at;
    duet_program *program = record_unchecked(enqueue_call, &call);
    OK(duet_program_check(program, ranges, count));
    return program;
}

static void lanes_may_share_only_what_is_shared(void) {
    prepare();
    struct duet_range ranges[] = {{kept, 1024, true}, {kept + 1024, 1024, false},
                                  {kept + 2048, 1024, false}};
    duet_program *shared = user_of(kept, ranges, 3), *also_shared = user_of(kept + 8, ranges, 3);
    duet_program *one = user_of(kept + 1024, ranges, 3), *same = user_of(kept + 2047, ranges, 3);
    duet_program *other = user_of(kept + 2048, ranges, 3);
    OK(duet_program_check_apart(shared, also_shared));
    OK(duet_program_check_apart(shared, one));
    OK(duet_program_check_apart(one, other));
    REFUSED(UNSAFE, NULL, duet_program_check_apart(one, same));
    REFUSED(UNSAFE, NULL, duet_program_check_apart(same, one));
    REFUSED(UNSAFE, NULL, duet_program_check_apart(other, other));
}

static void private_memory_of_one_is_the_same_in_a_larger_range_of_the_other(void) {
    prepare();
    struct duet_range small = {kept + 1000, 24, false}, large = {kept, 2048, false};
    duet_program *one = user_of(kept + 1000, &small, 1), *other = user_of(kept + 8, &large, 1);
    REFUSED(UNSAFE, NULL, duet_program_check_apart(one, other));
    REFUSED(UNSAFE, NULL, duet_program_check_apart(other, one));
}

static void copies_and_results_count_when_programs_are_held_apart(void) {
    prepare();
    struct duet_range ranges[] = {{kept, 1024, true}, {kept + 1024, 1024, false}};
    duet_program *one = user_of(kept + 1024, ranges, 2);
    for (int variant = 0; variant < 3; variant++) {
        struct call call = call_with(FAKE_MODULE);
        duet_program *other = record_unchecked(enqueue_call, &call);
        if (variant == 0)
            OK(duet_program_add_copy(other, kept, kept + 1032, 8));
        if (variant == 1)
            OK(duet_program_add_copy(other, kept + 1032, kept, 8));
        if (variant == 2)
            OK(duet_program_add_result(other, kept + 2040, 8));
        OK(duet_program_check(other, ranges, 2));
        REFUSED(UNSAFE, NULL, duet_program_check_apart(one, other));
    }
}

static void a_check_that_fails_leaves_nothing_to_hold_apart(void) {
    prepare();
    struct duet_range range = {kept, 2048, false};
    duet_program *one = user_of(kept, &range, 1), *other = user_of(kept + 8, &range, 1);
    REFUSED(UNSAFE, NULL, duet_program_check(one, NULL, 0));
    poison_last_error();
    CHECK(duet_program_check_apart(one, other) < 0);
}

static void only_checked_programs_are_held_apart(void) {
    prepare();
    struct duet_range range = {kept, KEPT, true};
    struct call call = call_with(FAKE_MODULE);
    duet_program *checked = user_of(kept, &range, 1);
    duet_program *unchecked = record_unchecked(enqueue_call, &call);
    REFUSED(STATE, NULL, duet_program_check_apart(checked, unchecked));
    REFUSED(STATE, NULL, duet_program_check_apart(unchecked, checked));
}

static void ranges_in_any_order_and_many_of_them_are_found(void) {
    prepare();
    struct duet_range ranges[KEPT / 8];
    for (size_t i = 0; i < KEPT / 8; i++)
        ranges[i * 77 % (KEPT / 8)] = (struct duet_range){kept + 8 * i, 8, true};
    struct call call = call_with(FAKE_MODULE);
    for (size_t i = 0; i < 64; i++) {
        call.plain = kept + 61 * i;
        duet_program *program = record_unchecked(enqueue_call, &call);
        OK(duet_program_check(program, ranges, KEPT / 8));
    }
    size_t gap = 77 * 5 % (KEPT / 8);
    ranges[gap].bytes = 7;
    call.plain = ranges[gap].start + 6;
    OK(duet_program_check(record_unchecked(enqueue_call, &call), ranges, KEPT / 8));
    call.plain = ranges[gap].start + 7;
    duet_program *program = record_unchecked(enqueue_call, &call);
    REFUSED(UNSAFE, "culprit", duet_program_check(program, ranges, KEPT / 8));
}

static void an_address_of_a_stray_is_told(void) {
    char text[32];
    prepare();
    struct call call = call_with(FAKE_MODULE);
    call.plain = new_memory(64) + 24;
    snprintf(text, sizeof text, "%llx", call.plain);
    is_stray(record_unchecked(enqueue_call, &call), text);
}

SUITE(pointer_tests,
      TEST(strays_in_parameters_are_named),
      TEST(the_last_byte_is_inside_and_the_next_is_not),
      TEST(the_first_byte_is_inside_and_the_one_before_is_not),
      TEST(numbers_and_null_are_no_addresses),
      TEST(copies_must_lie_inside_with_all_their_bytes),
      TEST(fills_must_lie_inside_with_all_their_bytes),
      TEST(rows_count_up_to_the_last_ones_end),
      TEST(copies_and_results_added_must_lie_inside),
      TEST(what_is_not_checked_is_not_built),
      TEST(adding_makes_a_program_unchecked),
      TEST(a_check_that_fails_takes_an_earlier_one_back),
      TEST(lanes_may_share_only_what_is_shared),
      TEST(private_memory_of_one_is_the_same_in_a_larger_range_of_the_other),
      TEST(copies_and_results_count_when_programs_are_held_apart),
      TEST(a_check_that_fails_leaves_nothing_to_hold_apart),
      TEST(only_checked_programs_are_held_apart),
      TEST(ranges_in_any_order_and_many_of_them_are_found),
      TEST(an_address_of_a_stray_is_told));
