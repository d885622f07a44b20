/* The planes of ckptd/codec/planes.py, in one pass over the words: read that file first.
 *
 * Compilers turn these loops into vector code. Stored planes lie at any address, so every pointer
 * is to a type that may.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t __attribute__((aligned(1), may_alias)) u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) u32;
typedef uint64_t __attribute__((aligned(1), may_alias)) u64;

/* `is_signed`: words are rotated, the sign into bit 0. Without: they have none, and the high plane
 * has seven bits. Both are constants where these are inlined. */

INLINE void split16(const u16 *restrict words, size_t count, uint8_t *restrict high,
                    uint8_t *restrict exponent, const int is_signed) {
    for (size_t i = 0; i < count; i++) {
        uint16_t word = words[i];
        high[i] = (uint8_t)(is_signed ? word << 1 | word >> 15 : word & 0x7f);
        exponent[i] = (uint8_t)(word >> 7);
    }
}

INLINE void join16(const uint8_t *restrict high, const uint8_t *restrict exponent, size_t count,
                   u16 *restrict words, const int is_signed) {
    for (size_t i = 0; i < count; i++) {
        uint16_t low = high[i];
        words[i] = (uint16_t)(exponent[i] << 7 | (is_signed ? low >> 1 | low << 15 : low));
    }
}

INLINE void split32(const u32 *restrict words, size_t count, u16 *restrict low,
                    uint8_t *restrict high, uint8_t *restrict exponent, const int is_signed) {
    for (size_t i = 0; i < count; i++) {
        uint32_t word = words[i], rest = is_signed ? word << 1 | word >> 31 : word;
        low[i] = (uint16_t)rest;
        high[i] = (uint8_t)(rest >> 16 & (is_signed ? 0xff : 0x7f));
        exponent[i] = (uint8_t)(word >> 23);
    }
}

INLINE void join32(const u16 *restrict low, const uint8_t *restrict high,
                   const uint8_t *restrict exponent, size_t count, u32 *restrict words,
                   const int is_signed) {
    for (size_t i = 0; i < count; i++) {
        uint32_t rest = low[i] | (uint32_t)high[i] << 16;
        words[i] = (uint32_t)exponent[i] << 23 | (is_signed ? rest >> 1 | rest << 31 : rest);
    }
}

INLINE void split64(const u64 *restrict words, size_t count, u32 *restrict low,
                    u16 *restrict middle, uint8_t *restrict high, uint8_t *restrict exponent,
                    const int is_signed) {
    for (size_t i = 0; i < count; i++) {
        uint64_t word = words[i], rest = is_signed ? word << 1 | word >> 63 : word;
        low[i] = (uint32_t)rest;
        middle[i] = (uint16_t)(rest >> 32);
        high[i] = (uint8_t)(rest >> 48 & (is_signed ? 0xff : 0x7f));
        exponent[i] = (uint8_t)(word >> 55);
    }
}

INLINE void join64(const u32 *restrict low, const u16 *restrict middle,
                   const uint8_t *restrict high, const uint8_t *restrict exponent, size_t count,
                   u64 *restrict words, const int is_signed) {
    for (size_t i = 0; i < count; i++) {
        uint64_t rest = low[i] | (uint64_t)middle[i] << 32 | (uint64_t)high[i] << 48;
        words[i] = (uint64_t)exponent[i] << 55 | (is_signed ? rest >> 1 | rest << 63 : rest);
    }
}

FAST static void split(int word_bytes, const void *words, size_t count, uint8_t *mantissa,
                       uint8_t *high, uint8_t *exponent, int is_signed) {
    u16 *middle = (u16 *)(mantissa + 4 * count);
    switch (2 * word_bytes + !!is_signed) {
    case 4: split16(words, count, high, exponent, 0); break;
    case 5: split16(words, count, high, exponent, 1); break;
    case 8: split32(words, count, (u16 *)mantissa, high, exponent, 0); break;
    case 9: split32(words, count, (u16 *)mantissa, high, exponent, 1); break;
    case 16: split64(words, count, (u32 *)mantissa, middle, high, exponent, 0); break;
    case 17: split64(words, count, (u32 *)mantissa, middle, high, exponent, 1); break;
    }
}

FAST static void join(int word_bytes, const uint8_t *mantissa, const uint8_t *high,
                      const uint8_t *exponent, size_t count, void *words, int is_signed) {
    const u16 *low = (const u16 *)mantissa, *middle = (const u16 *)(mantissa + 4 * count);
    switch (2 * word_bytes + !!is_signed) {
    case 4: join16(high, exponent, count, words, 0); break;
    case 5: join16(high, exponent, count, words, 1); break;
    case 8: join32(low, high, exponent, count, words, 0); break;
    case 9: join32(low, high, exponent, count, words, 1); break;
    case 16: join64((const u32 *)mantissa, middle, high, exponent, count, words, 0); break;
    case 17: join64((const u32 *)mantissa, middle, high, exponent, count, words, 1); break;
    }
}

/* --- seven bits a value ---------------------------------------------------------------------- */

/* Eight values of seven bits, a byte each, to 56 bits: pairs, then fours, then all. */
INLINE uint64_t squeeze(uint64_t v) {
    v = (v & 0x007f007f007f007f) | (v & 0x7f007f007f007f00) >> 1;
    v = (v & 0x00003fff00003fff) | (v & 0x3fff00003fff0000) >> 2;
    return (v & 0x000000000fffffff) | (v & 0x0fffffff00000000) >> 4;
}

INLINE uint64_t stretch(uint64_t v) {
    v = (v & 0x000000000fffffff) | (v & 0x00fffffff0000000) << 4;
    v = (v & 0x00003fff00003fff) | (v & 0x0fffc0000fffc000) << 2;
    return (v & 0x007f007f007f007f) | (v & 0x3f803f803f803f80) << 1;
}

/* `packed` may be `values`: what is written never reaches what is still to be read. All groups but
 * the last are moved as eight bytes, of which the next group's overwrites or ignores the eighth. */
static void pack(const uint8_t *values, size_t count, uint8_t *packed) {
    uint64_t v;
    for (; count > 8; count -= 8, values += 8, packed += 7) {
        memcpy(&v, values, 8);
        v = squeeze(v);
        memcpy(packed, &v, 8);
    }
    v = 0;
    memcpy(&v, values, count);
    v = squeeze(v);
    memcpy(packed, &v, count ? 7 : 0);
}

static void unpack(const uint8_t *packed, size_t count, uint8_t *values) {
    uint64_t v;
    for (; count > 8; count -= 8, values += 8, packed += 7) {
        memcpy(&v, packed, 8);
        v = stretch(v);
        memcpy(values, &v, 8);
    }
    v = 0;
    memcpy(&v, packed, count ? 7 : 0);
    v = stretch(v);
    memcpy(values, &v, count);
}

/* --- what Python calls ----------------------------------------------------------------------- */

static int has_sign(int word_bytes, const uint8_t *words, size_t count) {
    uint8_t top[64], any = 0;
    memset(top, 0, sizeof top);
    size_t size = count * (size_t)word_bytes, at = 0;
    for (; at + 64 <= size; at += 64) {
        for (size_t i = 0; i < 64; i++) top[i] |= words[at + i];
    }
    for (; at < size; at++) top[at & 63] |= words[at];
    for (int i = word_bytes - 1; i < 64; i += word_bytes) any |= top[i];
    return any >> 7;
}

/* Take `count` words apart. `mantissa` gets all planes but the exponents', back to back, and must
 * have room for one byte less than a word each, rounded up to whole groups of eight.
 *
 * Returns 0, with nothing split, for words that have a sign where `is_signed` says that none has.
 */
EXPORT int ckptd_split(int word_bytes, int is_signed, const void *words, size_t count,
                       uint8_t *mantissa, uint8_t *exponent) {
    uint8_t *high = mantissa + (size_t)(word_bytes - 2) * count;
    if (!is_signed && has_sign(word_bytes, words, count)) return 0;
    split(word_bytes, words, count, mantissa, high, exponent, is_signed);
    if (!is_signed) pack(high, count, high);
    return 1;
}

/* Undo `ckptd_split`; `scratch` is `count` bytes, used where there are no signs. */
EXPORT void ckptd_join(int word_bytes, int is_signed, const uint8_t *mantissa,
                       const uint8_t *exponent, size_t count, void *words, uint8_t *scratch) {
    const uint8_t *high = mantissa + (size_t)(word_bytes - 2) * count;
    if (!is_signed) unpack(high, count, scratch);
    join(word_bytes, mantissa, is_signed ? high : scratch, exponent, count, words, is_signed);
}
