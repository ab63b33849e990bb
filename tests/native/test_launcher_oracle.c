/* The state of slots, after any interleaving, is what doing everything one by one gives. */
#include "harness.h"

enum { SLOTS = 4, AREA = SLOTS * 8 };

/* On the device. Decode: out = f(in, params), in <- out after each step. Prefill: what a slot starts
 * with, made in `made` from `prompt`, fed back to `first` and handed over from there. */
static drv_address in, out, params, prompt, made, first;
static duet_program *decode, *prefill;

/* The same, one by one. */
static struct {
    uint64_t in[SLOTS], out[SLOTS], params[SLOTS], prompt, made, first;
} model;
static uint64_t expected_results[2][64][SLOTS]; /* by lane and number modulo 64 */
static uint64_t launched[2], released[2], taken[2];
static uint64_t random_state = 11;

static uint64_t pick(uint64_t count) {
    return (random_of(&random_state) >> 20) % count;
}

static void decode_step(const struct fake_run *run, void *user) {
    (void)run, (void)user;
    uint64_t *to = host_of(out), *from = host_of(in), *param = host_of(params);
    for (size_t i = 0; i < SLOTS; i++)
        to[i] = from[i] * 31 + param[i] + i;
}

static void prefill_step(const struct fake_run *run, void *user) {
    (void)run, (void)user;
    set_value(made, value_of(first) * 17 + value_of(prompt));
}

static void enqueue_areas(void *function) {
    enqueue(function, (void *[]){&in, &out, &params, &prompt, &made, &first});
}

static void prepare(void) {
    static const size_t six[] = {8, 8, 8, 8, 8, 8};
    open_device();
    in = new_memory(AREA), out = new_memory(AREA), params = new_memory(AREA);
    prompt = new_memory(8), made = new_memory(8), first = new_memory(8);
    decode = record_unchecked(enqueue_areas,
                              new_kernel("decode", FAKE_MODULE, six, 6, decode_step));
    OK(duet_program_add_copy(decode, in, out, AREA));
    OK(duet_program_add_result(decode, out, AREA));
    prefill = record_unchecked(enqueue_areas,
                               new_kernel("prefill", FAKE_EXTRA, six, 6, prefill_step));
    OK(duet_program_add_copy(prefill, first, made, 8));
    OK(duet_program_add_result(prefill, made, 8));
    OK(duet_program_check(decode, mine, num_mine));
    OK(duet_program_check(prefill, mine, num_mine));
    build_everywhere(decode);
    build_everywhere(prefill);
}

static void model_decode(void) {
    for (size_t i = 0; i < SLOTS; i++)
        model.out[i] = model.in[i] * 31 + model.params[i] + i;
    memcpy(model.in, model.out, AREA);
    memcpy(expected_results[DUET_DECODE][++launched[DUET_DECODE] % 64], model.out, AREA);
}

static void model_prefill(void) {
    model.made = model.first = model.first * 17 + model.prompt;
    expected_results[DUET_PREFILL][++launched[DUET_PREFILL] % 64][0] = model.made;
}

static void read_results(enum duet_lane lane) {
    uint64_t done = 0;
    OK(duet_completed(device, lane, &done));
    CHECK(done >= taken[lane] && done <= launched[lane]);
    for (; taken[lane] < done; taken[lane]++) {
        const void *data = NULL;
        size_t bytes = 0;
        OK(duet_result(device, lane, taken[lane] + 1, &data, &bytes));
        CHECK(bytes == (lane == DUET_DECODE ? (size_t)AREA : 8));
        CHECK(!memcmp(data, expected_results[lane][(taken[lane] + 1) % 64], bytes));
    }
    OK(duet_release(device, lane, done));
    released[lane] = done;
}

static void make_room(void) {
    fake_drain(random_of(&random_state));
    for (int lane = 0; lane < DUET_LANES; lane++) {
        OK(duet_wait(device, lane, launched[lane], 5 * (int64_t)SOON));
        read_results(lane);
    }
}

static int try_launch(enum duet_lane lane, unsigned steps) {
    uint64_t last = 0;
    int status = duet_launch(lane == DUET_DECODE ? decode : prefill, lane, pick(SPLITS), steps, 1,
                             &last);
    CHECK(status == DUET_BUSY || last == launched[lane] + steps);
    for (unsigned i = 0; status == DUET_OK && i < steps; i++)
        lane == DUET_DECODE ? model_decode() : model_prefill();
    return status;
}

/* What prefill made becomes what a slot continues from; prefill goes on only when it is taken. */
static int hand_over(void) {
    size_t slot = pick(SLOTS), split = pick(SPLITS);
    OK(duet_lane_wait(device, DUET_DECODE, split));
    OK(duet_copy(device, DUET_DECODE, split, in + 8 * slot, first, 8));
    OK(duet_lane_wait(device, DUET_PREFILL, pick(SPLITS)));
    model.in[slot] = model.first;
    return DUET_OK;
}

static int set_param(void) {
    size_t slot = pick(SLOTS);
    uint64_t value = pick(1000), kept = value;
    int status = duet_copy_in(device, DUET_DECODE, pick(SPLITS), params + 8 * slot, &value, 8);
    value = ~value;
    if (status == DUET_OK)
        model.params[slot] = kept;
    return status;
}

static int set_prompt(void) {
    uint64_t value = pick(1000), kept = value;
    int status = duet_copy_in(device, DUET_PREFILL, pick(SPLITS), prompt, &value, 8);
    value = ~value;
    if (status == DUET_OK)
        model.prompt = kept;
    return status;
}

static int do_something(uint64_t choice) {
    switch (choice) {
    case 0:
    case 1:
        return try_launch(DUET_DECODE, (unsigned)pick(8) + 1);
    case 2:
        return try_launch(DUET_PREFILL, (unsigned)pick(3) + 1);
    case 3:
        return hand_over();
    case 4:
        return set_prompt();
    default:
        return set_param();
    }
}

static void check_state(void) {
    CHECK(!memcmp(host_of(in), model.in, AREA) && !memcmp(host_of(params), model.params, AREA));
    CHECK(value_of(first) == model.first && value_of(prompt) == model.prompt);
}

static void a_thousand_interleavings_end_where_doing_one_by_one_ends(void) {
    prepare();
    uint64_t busy = 0, rounds = 1000;
    for (uint64_t round = 0; round < rounds; round++) {
        for (int i = 0; i < 16; i++) {
            uint64_t choice = pick(6);
            int status = do_something(choice);
            busy += status == DUET_BUSY;
            CHECK(status == DUET_OK || status == DUET_BUSY);
            for (uint64_t steps = pick(12); steps > 0; steps--)
                fake_step(random_of(&random_state));
            if (pick(4) == 0)
                read_results(pick(2));
        }
        make_room();
        check_state();
    }
    CHECK(busy > 0 && launched[DUET_DECODE] > 10 * rounds);
}

static void the_same_with_threads_that_run_by_themselves(void) {
    prepare();
    fake_mode(FAKE_THREADS);
    for (int round = 0; round < 40; round++) {
        for (int i = 0; i < 16; i++) {
            int status = do_something(pick(6));
            CHECK(status == DUET_OK || status == DUET_BUSY);
            if (pick(3) == 0)
                read_results(pick(2));
        }
        for (int lane = 0; lane < DUET_LANES; lane++) {
            OK(duet_wait(device, lane, launched[lane], 5 * (int64_t)SOON));
            read_results(lane);
        }
    }
    enter_primary();
    drop_device(); /* what is copied behind the last steps is done then */
    leave_primary();
    check_state();
}

SUITE(oracle_tests, TEST(a_thousand_interleavings_end_where_doing_one_by_one_ends),
      TEST(the_same_with_threads_that_run_by_themselves));
