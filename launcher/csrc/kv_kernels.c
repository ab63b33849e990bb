#include "kv_kernels.h"

#include <math.h>
#include <string.h>

enum { WIDTH = 8, KEYS = 16, MOST_ROWS = 32 };

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));

/* Several versions of the same code, chosen by the processor when it is loaded. Sanitizers are not
 * ready by then. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=haswell", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* To the nearest, ties to even. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value))
        return (uint16_t)(bits >> 16) | 0x40;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float load(enum kv_type type, const void *from, size_t index) {
    return type == KV_F32 ? ((const float *)from)[index]
                          : from_bf16(((const uint16_t *)from)[index]);
}

INLINE void store(enum kv_type type, void *to, size_t index, float value) {
    if (type == KV_F32)
        ((float *)to)[index] = value;
    else
        ((uint16_t *)to)[index] = to_bf16(value);
}

INLINE vec load_vec(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store_vec(float *to, vec value) {
    memcpy(to, &value, sizeof value);
}

INLINE vec all(float value) {
    return value - (vec){0};
}

INLINE vec larger(vec one, vec other) {
    ints mask = one > other;
    return (vec)(((ints)one & mask) | ((ints)other & ~mask));
}

INLINE float sum_of(vec v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

INLINE float largest_of(vec v) {
    float most = v[0];
    for (int i = 1; i < WIDTH; i++)
        most = v[i] > most ? v[i] : most;
    return most;
}

/* e^x for x <= 0, to 2 units in the last place; 0 below -87. 2^n times a polynomial in what is left
 * of x / ln 2, |r| <= ln 2 / 2; ln 2 in two parts (Cody and Waite 1980). */
INLINE vec exponential(vec x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer */
    vec kept = larger(x, all(-87.0f));
    vec n = (kept * 1.44269504f + round) - round;
    vec r = (kept - n * 0.693359375f) - n * -2.12194440e-4f;
    vec p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    ints counts = x > -87.0f;
    return (vec)((ints)(p * (vec)power) & counts);
}

void kv_write(const struct kv_pool *pool, size_t array, const void *keys, const void *values,
              const int32_t *page, const int32_t *slot, size_t num_tokens) {
    const struct kv_shape *shape = &pool->shape;
    size_t D = shape->head_dim, width = shape->type == KV_F32 ? 4 : 2;
    for (size_t n = 0; n < num_tokens; n++) {
        if (page[n] < 0 || (size_t)page[n] >= shape->num_pages || slot[n] < 0 ||
            (size_t)slot[n] >= shape->page_size)
            continue;
        for (size_t head = 0; head < shape->num_heads; head++) {
            unsigned char *to =
                kv_keys(pool, array, (size_t)page[n], head) + (size_t)slot[n] * D * width;
            size_t from = (n * shape->num_heads + head) * D;
            for (size_t d = 0; d < D; d++) {
                float key = load(shape->type, keys, from + d);
                float value = load(shape->type, values, from + d);
                store(shape->type, to, d, isfinite(key) ? key : 0);
                store(shape->type, to + pool->head_bytes, d, isfinite(value) ? value : 0);
            }
        }
    }
}

static size_t group_of(const struct kv_attention *work) {
    return work->num_query_heads / work->pool->shape.num_heads;
}

/* Queries of one row that visit a block of keys together. */
static size_t tile_of(const struct kv_attention *work) {
    return MOST_ROWS / group_of(work);
}

static size_t row_tiles(const struct kv_attention *work, size_t row) {
    int32_t count = work->offsets[row + 1] - work->offsets[row];
    return count <= 0 ? 0 : ((size_t)count - 1) / tile_of(work) + 1;
}

size_t kv_num_items(const struct kv_attention *work) {
    const struct kv_shape *shape = &work->pool->shape;
    size_t tiles = 1; /* the last: queries behind the last row */
    if (work->num_query_heads % shape->num_heads != 0 || group_of(work) == 0 ||
        group_of(work) > KV_MOST_GROUP || shape->head_dim > KV_MOST_HEAD_DIM ||
        shape->page_size % KEYS != 0 || shape->head_dim % WIDTH != 0)
        return 0;
    for (size_t row = 0; row < work->num_rows; row++)
        tiles += row_tiles(work, row);
    return tiles * shape->num_heads;
}

double kv_cost(const struct kv_attention *work) {
    double visited = 0;
    for (size_t row = 0; row < work->num_rows; row++) {
        double count = work->offsets[row + 1] - work->offsets[row];
        if (count > 0)
            visited += count * (work->starts[row] + count / 2);
    }
    return visited * (double)(work->num_query_heads * work->pool->shape.head_dim);
}

/* One head's queries of a tile, and what has become of them: rows are queries, then their heads. */
struct tile {
    size_t row, first, count, head, num_rows;
    float queries[MOST_ROWS][KV_MOST_HEAD_DIM];
    float out[MOST_ROWS][KV_MOST_HEAD_DIM];
    float peak[MOST_ROWS], total[MOST_ROWS];
    bool is_finite[MOST_ROWS];
};

static size_t query_at(const struct kv_attention *work, const struct tile *tile, size_t row) {
    size_t group = group_of(work);
    return (tile->first + row / group) * work->num_query_heads + tile->head * group + row % group;
}

/* Which tile an item is; false for what lies behind the last row. */
static bool find(const struct kv_attention *work, size_t item, struct tile *tile) {
    size_t heads = work->pool->shape.num_heads, index = item / heads, size = tile_of(work);
    tile->head = item % heads;
    for (tile->row = 0; tile->row < work->num_rows; tile->row++) {
        size_t tiles = row_tiles(work, tile->row);
        if (index < tiles) {
            size_t end = (size_t)work->offsets[tile->row + 1];
            tile->first = (size_t)work->offsets[tile->row] + index * size;
            tile->count = end - tile->first < size ? end - tile->first : size;
            tile->num_rows = tile->count * group_of(work);
            return true;
        }
        index -= tiles;
    }
    return false;
}

static void clear_rest(const struct kv_attention *work, size_t head) {
    const struct kv_shape *shape = &work->pool->shape;
    size_t width = shape->type == KV_F32 ? 4 : 2, group = group_of(work);
    int32_t end = work->num_rows > 0 ? work->offsets[work->num_rows] : 0;
    for (size_t query = end > 0 ? (size_t)end : 0; query < work->num_queries; query++)
        memset((char *)work->out +
                   (query * work->num_query_heads + head * group) * shape->head_dim * width,
               0, group * shape->head_dim * width);
}

INLINE void begin(const struct kv_attention *work, struct tile *tile) {
    size_t D = work->pool->shape.head_dim;
    float scale = 1 / sqrtf((float)D);
    for (size_t row = 0; row < tile->num_rows; row++) {
        size_t from = query_at(work, tile, row) * D;
        tile->is_finite[row] = true;
        for (size_t d = 0; d < D; d++) {
            tile->queries[row][d] = load(work->pool->shape.type, work->queries, from + d) * scale;
            tile->is_finite[row] &= isfinite(tile->queries[row][d]) != 0;
        }
        memset(tile->out[row], 0, D * sizeof(float));
        tile->peak[row] = -INFINITY;
        tile->total[row] = 0;
    }
}

/* Products of a query with a block of keys, four keys at a time for the processor's sake. */
INLINE void score(const float *query, const float *keys, size_t D, float *scores) {
    for (size_t s = 0; s < KEYS; s += 4) {
        const float *key = keys + s * D;
        vec sums[4] = {{0}, {0}, {0}, {0}};
        for (size_t d = 0; d < D; d += WIDTH) {
            vec q = load_vec(query + d);
            for (int i = 0; i < 4; i++)
                sums[i] += q * load_vec(key + (size_t)i * D + d);
        }
        for (int i = 0; i < 4; i++)
            scores[s + (size_t)i] = sum_of(sums[i]);
    }
}

/* One row and one block of keys, of which it sees the first `visible` (Dao 2022: the running
 * maximum, sum and mean). */
INLINE void visit(struct tile *tile, size_t row, const float *keys, const float *values, size_t D,
                  size_t visible) {
    float scores[KEYS];
    score(tile->queries[row], keys, D, scores);
    for (size_t s = visible; s < KEYS; s++)
        scores[s] = -INFINITY;
    vec low = load_vec(scores), high = load_vec(scores + WIDTH);
    float peak = largest_of(larger(low, high));
    peak = peak > tile->peak[row] ? peak : tile->peak[row];
    low = exponential(low - peak);
    high = exponential(high - peak);
    float kept = exponential(all(tile->peak[row] - peak))[0];
    store_vec(scores, low);
    store_vec(scores + WIDTH, high);
    tile->peak[row] = peak;
    tile->total[row] = tile->total[row] * kept + sum_of(low + high);
    float *out = tile->out[row];
    for (size_t d = 0; d < D; d += WIDTH) {
        vec mean = load_vec(out + d) * kept;
        for (size_t s = 0; s < KEYS; s++)
            mean += load_vec(values + s * D + d) * scores[s];
        store_vec(out + d, mean);
    }
}

/* A block in float32: where it lies, or widened. */
INLINE const float *widened(enum kv_type type, const unsigned char *from, size_t count,
                            float *room) {
    if (type == KV_F32)
        return (const float *)from;
    for (size_t i = 0; i < count; i++)
        room[i] = from_bf16(((const uint16_t *)from)[i]);
    return room;
}

FOR_EACH_PROCESSOR
static void attend(const struct kv_attention *work, struct tile *tile) {
    const struct kv_pool *pool = work->pool;
    const struct kv_shape *shape = &pool->shape;
    float key_room[KEYS * KV_MOST_HEAD_DIM], value_room[KEYS * KV_MOST_HEAD_DIM];
    size_t D = shape->head_dim, group = group_of(work), width = shape->type == KV_F32 ? 4 : 2;
    const int32_t *table = work->page_table + tile->row * work->table_width;
    size_t start = (size_t)work->starts[tile->row] + tile->first -
                   (size_t)work->offsets[tile->row];
    size_t end = start + tile->count; /* keys that the last query sees */
    begin(work, tile);
    for (size_t at = 0; at < end; at += KEYS) {
        size_t index = at / shape->page_size;
        if (index >= work->table_width)
            break;
        size_t page = (size_t)table[index] < shape->num_pages ? (size_t)table[index] : 0;
        const unsigned char *block = kv_keys(pool, work->array, page, tile->head) +
                                     at % shape->page_size * D * width;
        const float *keys = widened(shape->type, block, KEYS * D, key_room);
        const float *values = widened(shape->type, block + pool->head_bytes, KEYS * D, value_room);
        for (size_t row = 0; row < tile->num_rows; row++) {
            size_t sees = start + row / group + 1;
            if (sees > at)
                visit(tile, row, keys, values, D, sees - at < KEYS ? sees - at : KEYS);
        }
    }
    for (size_t row = 0; row < tile->num_rows; row++) {
        /* Whoever brings what is not finite gets that back; pages are always finite. */
        float total = tile->is_finite[row] && tile->total[row] > 0 ? tile->total[row] : NAN;
        for (size_t d = 0; d < D; d++)
            store(shape->type, work->out, query_at(work, tile, row) * D + d,
                  tile->out[row][d] / total);
    }
}

void kv_attend(const struct kv_attention *work, size_t item) {
    struct tile tile;
    if (find(work, item, &tile))
        attend(work, &tile);
    else
        clear_rest(work, tile.head);
}
