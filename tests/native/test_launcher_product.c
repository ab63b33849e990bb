/* Products of few rows: by the code of every processor that this one can be, and through frames
 * like XLA's, with threads like XLA's. Memory ends where the numbers do, so that the sanitizer sees
 * who reads behind them. */
#include "harness.h"

#include <math.h>
#include <stdlib.h>

#include "bfloat16.h"
#include "product.h"
#include "product_handler.h"

enum { MOST_HELPERS = 3 };

static uint32_t dice;

static float random_number(void) {
    dice = dice * 1664525u + 1013904223u;
    return (float)(int32_t)dice * 0x1p-31f;
}

static void *memory(size_t count, enum product_type type) {
    void *numbers = malloc(count * (type == PRODUCT_F32 ? 4 : 2));
    CHECK(numbers != NULL);
    return numbers;
}

static void write_number(void *to, enum product_type type, size_t index, float value) {
    if (type == PRODUCT_F32)
        ((float *)to)[index] = value;
    else
        ((uint16_t *)to)[index] = duet_to_bf16(value);
}

static float number_at(const void *from, enum product_type type, size_t index) {
    return type == PRODUCT_F32 ? ((const float *)from)[index]
                               : duet_from_bf16(((const uint16_t *)from)[index]);
}

static void *random_numbers(size_t count, enum product_type type) {
    void *numbers = memory(count, type);
    for (size_t i = 0; i < count; i++)
        write_number(numbers, type, i, random_number());
    return numbers;
}

/* A product of its own random numbers; y is full of NaN until it is run. */
static struct product make(size_t rows, size_t in, size_t out, enum product_type type,
                           enum product_type y_type) {
    struct product work = {.num_rows = rows, .num_in = in, .num_out = out, .type = type,
                           .y_type = y_type, .x = random_numbers(rows * in, type),
                           .weight = random_numbers(out * in, type),
                           .y = memory(rows * out, y_type)};
    memset(work.y, 0xff, rows * out * (y_type == PRODUCT_F32 ? 4 : 2));
    return work;
}

static void drop(struct product *work) {
    free((void *)work->x);
    free((void *)work->weight);
    free(work->y);
}

static void run(struct product *work, enum product_code code) {
    work->code = code;
    CHECK(product_begin(work));
    for (size_t item = product_num_items(work); item-- > 0;)
        product_run(work, item);
    product_end(work);
}

/* In float64. Of a sum of n numbers the error grows with n, of a lane's with n / 8 or n / 16. */
static bool is_right(const struct product *work) {
    double rounding = work->y_type == PRODUCT_F32 ? 0 : 0x1p-8;
    for (size_t row = 0; row < work->num_rows; row++)
        for (size_t out = 0; out < work->num_out; out++) {
            double sum = 0, size = 0;
            for (size_t i = 0; i < work->num_in; i++) {
                double term = (double)number_at(work->x, work->type, row * work->num_in + i) *
                              (double)number_at(work->weight, work->type, out * work->num_in + i);
                sum += term, size += fabs(term);
            }
            float y = number_at(work->y, work->y_type, row * work->num_out + out);
            if (!(fabs((double)y - sum) <= rounding * fabs(sum) + 1e-6 * size))
                return false;
        }
    return true;
}

static const enum product_type types[][2] = {
    {PRODUCT_F32, PRODUCT_F32}, {PRODUCT_BF16, PRODUCT_BF16}, {PRODUCT_BF16, PRODUCT_F32}};
static const size_t lengths[] = {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 100, 768, 2050};

static void every_code_multiplies_any_sizes(void) {
    for (enum product_code code = 0; code <= product_best_code(); code++)
        for (size_t t = 0; product_has(code) && t < 3; t++)
            for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
                for (size_t rows = 1; rows <= 17; rows += rows < 9 ? 1 : 4)
                    for (size_t out = 1; out < 10; out += 2) {
                        struct product work =
                            make(rows, lengths[i], out, types[t][0], types[t][1]);
                        run(&work, code);
                        CHECK(is_right(&work));
                        drop(&work);
                    }
}

static void every_code_multiplies_by_a_weight_of_many_items(void) {
    for (enum product_code code = 0; code <= product_best_code(); code++)
        for (size_t t = 0; product_has(code) && t < 3; t++) {
            struct product work = make(3, 130, 1003, types[t][0], types[t][1]);
            CHECK(product_num_items(&work) > 3);
            run(&work, code);
            CHECK(is_right(&work));
            drop(&work);
        }
}

static void the_best_code_is_one_that_the_processor_has(void) {
    CHECK(product_has(PRODUCT_PLAIN) && product_has(product_best_code()));
    for (enum product_code code = product_best_code() + 1; code <= PRODUCT_AVX512; code++)
        CHECK(!product_has(code));
}

static void a_row_has_the_same_bits_alone_and_in_any_company(void) {
    for (enum product_code code = 0; code <= product_best_code(); code++)
        for (size_t t = 0; product_has(code) && t < 3; t++) {
            struct product all = make(16, 301, 37, types[t][0], PRODUCT_F32);
            run(&all, code);
            for (size_t first = 0; first < 16; first += 5)
                for (size_t rows = 1; first + rows <= 16; rows++) {
                    struct product some = all;
                    size_t size = all.type == PRODUCT_F32 ? 4 : 2;
                    some.x = (const char *)all.x + first * 301 * size;
                    some.y = memory(rows * 37, PRODUCT_F32);
                    some.num_rows = rows;
                    run(&some, code);
                    CHECK(!memcmp(some.y, (float *)all.y + first * 37, rows * 37 * 4));
                    free(some.y);
                }
            drop(&all);
        }
}

static void what_is_not_finite_stays_in_its_row_or_output(void) {
    static const float poisons[] = {NAN, INFINITY, -INFINITY};
    for (enum product_code code = 0; code <= product_best_code(); code++)
        for (size_t t = 0; product_has(code) && t < 6; t++) {
            enum product_type type = types[t % 2][0];
            struct product work = make(6, 45, 11, type, type);
            run(&work, code);
            size_t size = type == PRODUCT_F32 ? 4 : 2;
            char *healthy = memory(6 * 11, type);
            memcpy(healthy, work.y, 6 * 11 * size);
            write_number((void *)work.x, type, 4 * 45 + 44, poisons[t / 2]);
            write_number((void *)work.weight, type, 9 * 45, poisons[t / 2]);
            run(&work, code);
            for (size_t i = 0; i < 6 * 11; i++) {
                bool is_touched = i / 11 == 4 || i % 11 == 9;
                CHECK(is_touched ? !isfinite(number_at(work.y, type, i))
                                 : !memcmp((char *)work.y + i * size, healthy + i * size, size));
            }
            free(healthy);
            drop(&work);
        }
}

/* ---- as XLA calls it ------------------------------------------------------------------------- */

struct xla_error {
    char message[200];
    int code;
};

static struct xla_error made;
static int num_threads, num_scheduled, num_destroyed;
static bool refuse_tasks, refuse_count, is_late;
static pthread_t helpers[MOST_HELPERS];
static struct xla_schedule_arguments tasks[MOST_HELPERS];

static xla_error *create_error(struct xla_error_arguments *arguments) {
    strncpy(made.message, arguments->message, sizeof made.message - 1);
    made.code = arguments->code;
    return &made;
}

static void destroy_error(struct xla_error_destroy_arguments *arguments) {
    CHECK(arguments->error == &made);
    num_destroyed++;
}

static xla_error *count_threads(struct xla_num_threads_arguments *arguments) {
    *arguments->num_threads = num_threads;
    return refuse_count ? &made : NULL;
}

static void *help(void *data) {
    const struct xla_schedule_arguments *task = data;
    task->task(task->data);
    return NULL;
}

static xla_error *schedule(struct xla_schedule_arguments *arguments) {
    if (refuse_tasks)
        return &made;
    CHECK(num_scheduled < MOST_HELPERS);
    tasks[num_scheduled] = *arguments;
    if (!is_late)
        CHECK(!pthread_create(&helpers[num_scheduled], NULL, help, &tasks[num_scheduled]));
    num_scheduled++;
    return NULL;
}

static const struct xla_api api = {
    .struct_size = sizeof api,
    .version = {sizeof(struct xla_version), NULL, 0, 4},
    .create_error = create_error,
    .destroy_error = destroy_error,
    .schedule = schedule,
    .num_threads = count_threads,
};

static int xla_type(enum product_type type) {
    return type == PRODUCT_F32 ? XLA_F32 : XLA_BF16;
}

/* One call frame and all that it points to: x, weight, y. */
struct frame {
    int64_t dimensions[3][2];
    struct xla_buffer buffers[3];
    void *operands[3];
    struct xla_call call;
};

static void fill(struct frame *frame, const struct product *work) {
    void *data[] = {(void *)work->x, (void *)work->weight, work->y};
    size_t sizes[3][2] = {{work->num_rows, work->num_in},
                          {work->num_out, work->num_in},
                          {work->num_rows, work->num_out}};
    for (size_t i = 0; i < 3; i++) {
        for (size_t axis = 0; axis < 2; axis++)
            frame->dimensions[i][axis] = (int64_t)sizes[i][axis];
        frame->buffers[i] = (struct xla_buffer){sizeof(struct xla_buffer), NULL,
                                                xla_type(i < 2 ? work->type : work->y_type),
                                                data[i], 2, frame->dimensions[i]};
        frame->operands[i] = &frame->buffers[i];
    }
    frame->call = (struct xla_call){
        .struct_size = sizeof(struct xla_call),
        .api = &api,
        .stage = XLA_EXECUTE,
        .arguments = {sizeof(struct xla_list), NULL, 2, NULL, frame->operands},
        .results = {sizeof(struct xla_list), NULL, 1, NULL, frame->operands + 2}};
}

static void call(const struct product *work) {
    struct frame frame;
    fill(&frame, work);
    num_scheduled = num_destroyed = 0;
    CHECK(duet_product(&frame.call) == NULL);
}

static void finish_helpers(void) {
    for (int i = 0; i < num_scheduled; i++) {
        if (is_late)
            help(&tasks[i]);
        else
            CHECK(!pthread_join(helpers[i], NULL));
    }
}

/* Big enough to be shared. */
static struct product make_large(void) {
    return make(5, 500, 700, PRODUCT_BF16, PRODUCT_BF16);
}

static void any_number_of_threads_gives_the_same_bits(void) {
    struct product work = make_large();
    uint16_t alone[5 * 700];
    run(&work, product_best_code());
    memcpy(alone, work.y, sizeof alone);
    for (num_threads = 0; num_threads <= MOST_HELPERS + 1; num_threads++)
        for (int again = 0; again < 20; again++) {
            memset(work.y, 0xff, sizeof alone);
            call(&work);
            CHECK(!memcmp(work.y, alone, sizeof alone));
            CHECK(num_scheduled == (num_threads > 1 ? num_threads - 1 : 0));
            finish_helpers();
        }
    drop(&work);
}

static void threads_that_come_when_all_is_over_find_nothing_to_do(void) {
    num_threads = 3, is_late = true;
    struct product work = make_large();
    call(&work);
    CHECK(num_scheduled == 2 && is_right(&work));
    drop(&work);
    finish_helpers();
}

static void without_helpers_the_caller_does_all_of_it(void) {
    struct product work = make_large();
    num_threads = 4, refuse_tasks = true;
    call(&work);
    CHECK(num_destroyed == 3 && is_right(&work));
    refuse_tasks = false, refuse_count = true, num_threads = 1;
    memset(work.y, 0xff, 5 * 700 * 2);
    call(&work);
    CHECK(num_destroyed == 1 && num_scheduled == 0 && is_right(&work));
    drop(&work);
}

static void little_work_is_not_shared(void) {
    num_threads = 4;
    struct product work = make(2, 300, 300, PRODUCT_F32, PRODUCT_F32);
    call(&work);
    CHECK(product_num_items(&work) > 1 && num_scheduled == 0 && is_right(&work));
    drop(&work);
}

static void nothing_times_nothing_is_nothing(void) {
    static const size_t sizes[][3] = {{0, 8, 8}, {3, 0, 5}, {3, 8, 0}};
    for (size_t i = 0; i < 3; i++) {
        struct product work =
            make(sizes[i][0], sizes[i][1], sizes[i][2], PRODUCT_F32, PRODUCT_F32);
        call(&work);
        CHECK(is_right(&work));
        drop(&work);
    }
}

static void check_refused(struct frame *frame, const char *word) {
    made = (struct xla_error){"", 0};
    CHECK(duet_product(&frame->call) == &made);
    CHECK(made.code == XLA_INVALID_ARGUMENT && strstr(made.message, word));
}

static void operands_that_do_not_fit_are_refused_by_name(void) {
    struct product work = make(3, 20, 6, PRODUCT_BF16, PRODUCT_BF16);
    enum { X, WEIGHT, Y };
    struct {
        int operand, type, rank, axis, change, shift;
        const char *word;
    } wrongs[] = {
        {X, XLA_S32, 2, 0, 0, 0, "x of a product"},
        {X, XLA_BF16, 1, 0, 0, 0, "x of a product"},
        {X, XLA_F32, 2, 0, 0, 0, "no matrix of x's type"},
        {WEIGHT, XLA_F32, 2, 0, 0, 0, "no matrix of x's type"},
        {WEIGHT, XLA_BF16, 3, 0, 0, 0, "no matrix of x's type"},
        {WEIGHT, XLA_BF16, 2, 1, 1, 0, "another length than x"},
        {X, XLA_BF16, 2, 1, -1, 0, "another length than x"},
        {Y, XLA_S32, 2, 0, 0, 0, "the result"},
        {Y, XLA_BF16, 1, 0, 0, 0, "the result"},
        {Y, XLA_BF16, 2, 0, 1, 0, "not [B, out]"},
        {Y, XLA_BF16, 2, 1, -1, 0, "not [B, out]"},
        {X, XLA_BF16, 2, 0, 0, 1, "a number's address"},
        {WEIGHT, XLA_BF16, 2, 0, 0, 1, "a number's address"},
        {Y, XLA_F32, 2, 0, 0, 2, "a number's address"},
    };
    for (size_t i = 0; i < sizeof wrongs / sizeof *wrongs; i++) {
        struct frame frame;
        fill(&frame, &work);
        struct xla_buffer *buffer = &frame.buffers[wrongs[i].operand];
        buffer->type = wrongs[i].type, buffer->rank = wrongs[i].rank;
        buffer->dimensions[wrongs[i].axis] += wrongs[i].change;
        buffer->data = (char *)buffer->data + wrongs[i].shift;
        check_refused(&frame, wrongs[i].word);
    }
    drop(&work);
}

static void calls_without_their_operands_are_refused(void) {
    struct product work = make(3, 20, 6, PRODUCT_F32, PRODUCT_F32);
    struct frame frame;
    fill(&frame, &work);
    frame.call.arguments.size = 3;
    check_refused(&frame, "without its operands");
    fill(&frame, &work);
    frame.call.results.size = 0;
    check_refused(&frame, "without its operands");
    drop(&work);
}

SUITE(product_tests, TEST(every_code_multiplies_any_sizes),
      TEST(every_code_multiplies_by_a_weight_of_many_items),
      TEST(the_best_code_is_one_that_the_processor_has),
      TEST(a_row_has_the_same_bits_alone_and_in_any_company),
      TEST(what_is_not_finite_stays_in_its_row_or_output),
      TEST(any_number_of_threads_gives_the_same_bits),
      TEST(threads_that_come_when_all_is_over_find_nothing_to_do),
      TEST(without_helpers_the_caller_does_all_of_it), TEST(little_work_is_not_shared),
      TEST(nothing_times_nothing_is_nothing), TEST(operands_that_do_not_fit_are_refused_by_name),
      TEST(calls_without_their_operands_are_refused));
