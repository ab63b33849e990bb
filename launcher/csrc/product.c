#include "product.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"

enum { STEP_PLAIN = 16, STEP_AVX2 = 16, STEP_AVX512 = 32 }; /* values of x and weight at a time */
enum { OUTS = 4 };                /* whose weights are read side by side */
enum { AHEAD = 2048, LINE = 64 }; /* bytes: how early weights are fetched; a line of the cache */
enum { ITEM_BYTES = 1 << 16 };    /* of weights: longer to read than an item to be taken */

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bfloat16 is widened in pairs");

#define INLINE static inline __attribute__((always_inline))

typedef float quad __attribute__((vector_size(16)));

INLINE size_t size_of(enum product_type type) {
    return type == PRODUCT_F32 ? sizeof(float) : sizeof(uint16_t);
}

/* Whole steps, and a line that keeps rows out of each other's places in the cache. */
INLINE size_t row_stride(const struct product *work) {
    size_t step = STEP_AVX512;
    return (work->num_in + step - 1) / step * step + LINE / sizeof(float);
}

INLINE void put(const struct product *work, size_t row, size_t out, float value) {
    size_t index = row * work->num_out + out;
    if (work->y_type == PRODUCT_F32)
        ((float *)work->y)[index] = value;
    else
        ((uint16_t *)work->y)[index] = duet_to_bf16(value);
}

/* The same code for several processors. */

#define WIDTH (STEP_PLAIN / 2)
#define ROWS 2
#define VERSION(name) name##_plain
#include "product_tile.h"
#undef WIDTH
#undef ROWS
#undef VERSION

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_CODES 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define WIDTH (STEP_AVX2 / 2)
#define ROWS 2
#define VERSION(name) name##_avx2
#include "product_tile.h"
#undef WIDTH
#undef ROWS
#undef VERSION
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx2,fma,prefer-vector-width=512")
#define WIDTH (STEP_AVX512 / 2)
#define ROWS 4
#define VERSION(name) name##_avx512
#include "product_tile.h"
#undef WIDTH
#undef ROWS
#undef VERSION
#pragma GCC pop_options
#endif

bool product_has(enum product_code code) {
#ifdef HAS_CODES
    if (code == PRODUCT_AVX512)
        return __builtin_cpu_supports("avx512dq");
    if (code == PRODUCT_AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return code == PRODUCT_PLAIN;
}

enum product_code product_best_code(void) {
    enum product_code code = PRODUCT_AVX512;
    while (!product_has(code))
        code--;
    return code;
}

/* Values of bfloat16 lie as load_weights leaves them: of each step those in even places first. */
static void arrange(const struct product *work, const uint16_t *from, float *to) {
    static const size_t steps[] = {STEP_PLAIN, STEP_AVX2, STEP_AVX512};
    size_t step = steps[work->code];
    for (size_t i = 0; i < work->num_in; i++) {
        size_t place = i % step;
        to[i - place + place / 2 + place % 2 * (step / 2)] = duet_from_bf16(from[i]);
    }
}

bool product_begin(struct product *work) {
    size_t stride = row_stride(work), bytes = work->num_rows * stride * sizeof(float);
    work->rows = aligned_alloc(LINE, (bytes + LINE) / LINE * LINE);
    if (work->rows == NULL)
        return false;
    for (size_t row = 0; row < work->num_rows; row++) {
        float *to = work->rows + row * stride;
        size_t first = row * work->num_in;
        memset(to + work->num_in / STEP_AVX512 * STEP_AVX512, 0,
               (stride - work->num_in / STEP_AVX512 * STEP_AVX512) * sizeof(float));
        if (work->type == PRODUCT_F32)
            memcpy(to, (const float *)work->x + first, work->num_in * sizeof(float));
        else
            arrange(work, (const uint16_t *)work->x + first, to);
    }
    return true;
}

void product_end(struct product *work) {
    free(work->rows);
}

/* Outputs of an item. */
static size_t item_outs(const struct product *work) {
    size_t bytes = OUTS * (work->num_in + 1) * size_of(work->type);
    return bytes > ITEM_BYTES ? OUTS : ITEM_BYTES / bytes * OUTS;
}

size_t product_num_items(const struct product *work) {
    return (work->num_out + item_outs(work) - 1) / item_outs(work);
}

void product_run(const struct product *work, size_t item) {
    static void (*const runs[])(const struct product *, size_t, size_t) = {
        run_plain,
#ifdef HAS_CODES
        run_avx2,
        run_avx512,
#endif
    };
    size_t out = item * item_outs(work), end = out + item_outs(work);
    runs[work->code](work, out, end < work->num_out ? end : work->num_out);
}
