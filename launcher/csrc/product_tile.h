/* Sums of some rows and outputs, included once for each kind of processor, which decides about
 * WIDTH and ROWS. VERSION(name) tells the copies apart. No include guard, on purpose. */

typedef float VERSION(vec) __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t VERSION(words) __attribute__((vector_size(4 * WIDTH)));
#define vec VERSION(vec)
#define words VERSION(words)
#define load_row VERSION(load_row)
#define load_weights VERSION(load_weights)
#define sum_of VERSION(sum_of)
#define add_products VERSION(add_products)
#define tile VERSION(tile)
#define tiles VERSION(tiles)
#define run_typed VERSION(run_typed)

INLINE vec load_row(const float *from) {
    vec values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* A half of a step's weights, of which there are `count`, and zeros behind them. Numbers of 16
 * bits are widened where they lie: those in even places are one half, those in odd the other. */
INLINE vec load_weights(enum product_type type, size_t half, const char *from, size_t count) {
    words bits = {0};
    size_t skipped = type == PRODUCT_F32 ? half * WIDTH : 0, size = size_of(type);
    size_t bytes = count > skipped ? (count - skipped) * size : 0;
    memcpy(&bits, from + skipped * size, bytes < sizeof bits ? bytes : sizeof bits);
    if (type == PRODUCT_F32)
        return (vec)bits;
    return (vec)(half == 0 ? bits << 16 : bits & 0xffff0000);
}

/* In the same order for every caller: the upper half onto the lower, and so on. */
INLINE float sum_of(vec v) {
    quad parts[WIDTH / 4];
    memcpy(parts, &v, sizeof parts);
    for (int half = WIDTH / 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

/* Adds a step of each row and output. */
INLINE void add_products(const struct product *work, enum product_type type, size_t num_rows,
                         size_t num_outs, const float *x, const char *weights, size_t count,
                         vec (*sums)[OUTS]) {
    for (size_t half = 0; half < 2; half++) {
        vec w[OUTS];
        for (size_t o = 0; o < num_outs; o++) {
            const char *from = weights + o * work->num_in * size_of(type);
            w[o] = load_weights(type, half, from, count);
            if (type == PRODUCT_F32 || half == 0)
                __builtin_prefetch(from + half * sizeof(vec) + AHEAD);
        }
        for (size_t r = 0; r < num_rows; r++) {
            vec values = load_row(x + r * row_stride(work) + half * WIDTH);
            for (size_t o = 0; o < num_outs; o++)
                sums[r][o] += values * w[o];
        }
    }
}

/* Where it is called the numbers of rows and outputs are constants: all sums are in registers. */
INLINE void tile(const struct product *work, enum product_type type, size_t row, size_t num_rows,
                 size_t out, size_t num_outs) {
    size_t rest = work->num_in % (2 * WIDTH), whole = work->num_in - rest, size = size_of(type);
    const float *x = work->rows + row * row_stride(work);
    const char *weights = (const char *)work->weight + out * work->num_in * size;
    vec sums[ROWS][OUTS];
    for (size_t r = 0; r < num_rows; r++)
        for (size_t o = 0; o < num_outs; o++)
            sums[r][o] = (vec){0};
    for (size_t i = 0; i < whole; i += 2 * WIDTH)
        add_products(work, type, num_rows, num_outs, x + i, weights + i * size, 2 * WIDTH, sums);
    if (rest > 0)
        add_products(work, type, num_rows, num_outs, x + whole, weights + whole * size, rest,
                     sums);
    for (size_t r = 0; r < num_rows; r++)
        for (size_t o = 0; o < num_outs; o++)
            put(work, row + r, out + o, sum_of(sums[r][o]));
}

/* All rows of some outputs, whose weights stay in the cache meanwhile. */
INLINE void tiles(const struct product *work, enum product_type type, size_t out,
                  size_t num_outs) {
    size_t row = 0;
    for (; row + ROWS <= work->num_rows; row += ROWS)
        tile(work, type, row, ROWS, out, num_outs);
    for (; row + 2 <= work->num_rows; row += 2)
        tile(work, type, row, 2, out, num_outs);
    if (row < work->num_rows)
        tile(work, type, row, 1, out, num_outs);
}

INLINE void run_typed(const struct product *work, enum product_type type, size_t out, size_t end) {
    for (; out + OUTS <= end; out += OUTS)
        tiles(work, type, out, OUTS);
    for (; out < end; out++)
        tiles(work, type, out, 1);
}

static void VERSION(run)(const struct product *work, size_t out, size_t end) {
    if (work->type == PRODUCT_F32)
        run_typed(work, PRODUCT_F32, out, end);
    else
        run_typed(work, PRODUCT_BF16, out, end);
}

#undef vec
#undef words
#undef load_row
#undef load_weights
#undef sum_of
#undef add_products
#undef tile
#undef tiles
#undef run_typed
