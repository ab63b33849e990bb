/* y = x @ weight.T for few rows x, at the speed at which the weight can be read.
 *
 * The work is cut into items, each of some outputs of all rows. A sum is taken along x from its
 * beginning, as many values at a time as the processor adds at once, and these partial sums are
 * added up in a fixed order: a row's bits depend on neither its company, the items nor the threads,
 * but on the processor. Sums are float32 for every type; y is rounded once. */
#ifndef DUET_PRODUCT_H
#define DUET_PRODUCT_H

#include <stdbool.h>
#include <stddef.h>

enum product_type { PRODUCT_F32, PRODUCT_BF16 };
/* Instructions that there is code for, the best last. */
enum product_code { PRODUCT_PLAIN, PRODUCT_AVX2, PRODUCT_AVX512 };

/* x [num_rows, num_in] and weight [num_out, num_in] are of one type, y [num_rows, num_out] of that
 * or float32. */
struct product {
    const void *x, *weight;
    void *y;
    size_t num_rows, num_in, num_out;
    enum product_type type, y_type;
    enum product_code code; /* one that product_has */
    float *rows;            /* x as items read it */
};

bool product_has(enum product_code code);
enum product_code product_best_code(void);

/* Arranges x; false if there is no memory for that. To be called before any item is run. */
bool product_begin(struct product *work);
void product_end(struct product *work);
/* Pieces of the work that may run at the same time. */
size_t product_num_items(const struct product *work);
void product_run(const struct product *work, size_t item);

#endif
