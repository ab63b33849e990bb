/* Numbers of 16 bits: the upper half of a float32. */
#ifndef DUET_BFLOAT16_H
#define DUET_BFLOAT16_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float duet_from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* To the nearest, ties to even. */
static inline uint16_t duet_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value))
        return (uint16_t)(bits >> 16) | 0x40;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#endif
