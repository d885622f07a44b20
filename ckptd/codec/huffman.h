/* Huffman tables for zstd's literals (RFC 8878, 4.2.1), as entropy.c uses them. */
#ifndef CKPTD_HUFFMAN_H
#define CKPTD_HUFFMAN_H

#include <stddef.h>
#include <stdint.h>

enum {
    MIN_BYTES = 1024,      /* below, headers weigh more than speed */
    MIN_PAIRED = 32 << 10, /* below, clearing the counters of pairs would take longest */
    MAX_PAIRED = 96,       /* of more symbols, the pairs do not fit into a core's nearest cache */
    MAX_BITS = 11,         /* the longest Huffman code of literals */
};

/* Code of one or two symbols: the bits at the top of the word, their number in its low byte. */
typedef uint64_t code_t;

typedef struct {
    code_t pairs[1 << 16]; /* by two bytes as they lie in memory; only those that occur are set */
    code_t single[256];
    uint32_t pair_counts[1 << 16];
    uint32_t counts[256];
    uint8_t bits[256];    /* of each symbol's code; 0: does not occur */
    uint8_t symbols[256]; /* those that occur */
    int distinct;
    int longest;
    int last;          /* the greatest symbol that occurs */
    uint8_t tree[160]; /* the table as a frame brings it */
    size_t tree_bytes;
} table_t;

/* Count the symbols of `source`; afterwards `distinct` is known. */
void ckptd_table_count(table_t *t, const uint8_t *source, size_t size);

/* Choose the codes' lengths for at least two symbols, and describe them in `tree`; 0 if the format
 * has no way to describe these. */
int ckptd_table_describe(table_t *t);

/* Fill in the codes. */
void ckptd_table_assign(table_t *t);

#endif
