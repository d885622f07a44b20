/* zstd frames (RFC 8878) that are entropy coding and nothing else, at several times the speed of
 * libzstd, which looks for matches first and codes one symbol at a time.
 *
 * A frame states its size and needs no window beyond it. Each of its blocks is Huffman-coded
 * literals in four streams and no sequences, all blocks by one table that the first one brings; a
 * block that this would not shrink is stored raw. Any zstd decoder reads the result.
 */
#include "huffman.h"

#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    BLOCK_BYTES = 128 << 10, /* RFC 8878, 3.1.1.2.4: Block_Maximum_Size */
    STREAM_BYTES = BLOCK_BYTES / 4 * MAX_BITS / 8 + 16,
    FRAME_HEADER = 9,
    BLOCK_HEADER = 3,
    LITERALS_HEADER = 5,
    JUMP_TABLE = 6,
    MIN_CODED = 256, /* a last block that is shorter is stored raw: four streams want symbols */
    SLACK = 16,      /* stores are of 8 bytes, of which up to 7 lie behind the end */
};

typedef struct {
    table_t table;
    uint8_t stream[STREAM_BYTES];
    int has_tree; /* whether some block has brought the table already */
} coder_t;

EXPORT size_t ckptd_entropy_scratch(void) { return sizeof(coder_t); }

/* --- streams --------------------------------------------------------------------------------- */

typedef struct {
    uint64_t word; /* the newest bits at the top; below the valid ones lies rubbish */
    uint64_t bits;
    uint8_t *out;
} stream_t;

static inline void add(stream_t *s, code_t code) {
    s->word = s->word >> (code & 63) | code;
    s->bits += code;
}

static inline void flush(stream_t *s) {
    s->bits &= 0xff;
    uint64_t word = s->word >> ((64 - s->bits) & 63);
    memcpy(s->out, &word, 8);
    s->out += s->bits >> 3;
    s->bits &= 7;
}

static size_t finish(stream_t *s, const uint8_t *begin) {
    add(s, (code_t)1 << 63 | 1); /* the mark that shows where the last bit is */
    uint64_t word = s->word >> (64 - (s->bits & 0xff));
    memcpy(s->out, &word, 8);
    return (size_t)(s->out - begin) + (((s->bits & 0xff) + 7) >> 3);
}

static inline void add_two(stream_t *s, const table_t *t, const uint8_t *at, int is_paired) {
    if (is_paired) {
        add(s, t->pairs[at[0] | at[1] << 8]);
    } else {
        add(s, t->single[at[1]]);
        add(s, t->single[at[0]]);
    }
}

/* Code two streams at once, from their ends: neither waits for the other's shifts. 4 symbols make
 * at most 44 bits and 7 are left from before, so the low byte of a word is never a valid one. */
static inline void code_two(const table_t *t, const uint8_t *one, size_t one_size,
                            const uint8_t *two, size_t two_size, uint8_t *one_out,
                            uint8_t *two_out, size_t *sizes, int is_paired) {
    stream_t a = {0, 0, one_out}, b = {0, 0, two_out};
    size_t both = (one_size < two_size ? one_size : two_size) & ~(size_t)3;
    while (one_size > both) add(&a, t->single[one[--one_size]]), flush(&a);
    while (two_size > both) add(&b, t->single[two[--two_size]]), flush(&b);
    for (size_t at = both; at; at -= 4) {
        add_two(&a, t, one + at - 2, is_paired);
        add_two(&b, t, two + at - 2, is_paired);
        add_two(&a, t, one + at - 4, is_paired);
        add_two(&b, t, two + at - 4, is_paired);
        flush(&a);
        flush(&b);
    }
    sizes[0] = finish(&a, one_out);
    sizes[1] = finish(&b, two_out);
}

/* --- blocks and frame ------------------------------------------------------------------------ */

static void put_number(uint8_t *out, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) out[i] = (uint8_t)(value >> 8 * i);
}

static uint8_t *put_block(uint8_t *out, int is_last, int type, size_t size) {
    put_number(out, (uint64_t)is_last | (uint64_t)type << 1 | (uint64_t)size << 3, BLOCK_HEADER);
    return out + BLOCK_HEADER;
}

/* Write the four streams with their jump table; return where they end. */
static uint8_t *put_streams(coder_t *c, const uint8_t *source, size_t size, uint8_t *jumps) {
    const table_t *t = &c->table;
    size_t each = (size + 3) / 4, rest = size - 3 * each, sizes[4];
    uint8_t *out = jumps + JUMP_TABLE;
    for (int i = 0; i < 4; i += 2) {
        const uint8_t *one = source + (size_t)i * each;
        const uint8_t *two = one + each;
        size_t two_size = i ? rest : each;
        if (t->distinct > MAX_PAIRED) {
            code_two(t, one, each, two, two_size, out, c->stream, sizes + i, 0);
        } else {
            code_two(t, one, each, two, two_size, out, c->stream, sizes + i, 1);
        }
        out += sizes[i];
        memcpy(out, c->stream, sizes[i + 1]);
        out += sizes[i + 1];
    }
    for (int i = 0; i < 3; i++) put_number(jumps + 2 * i, sizes[i], 2);
    return out;
}

static uint8_t *store_block(const uint8_t *source, size_t size, int is_last, uint8_t *out) {
    out = put_block(out, is_last, 0, size);
    memcpy(out, source, size);
    return out + size;
}

static uint8_t *code_block(coder_t *c, const uint8_t *source, size_t size, int is_last,
                           uint8_t *out) {
    if (size < MIN_CODED) return store_block(source, size, is_last, out);
    uint8_t *literals = out + BLOCK_HEADER, *body = literals + LITERALS_HEADER, *at = body;
    if (!c->has_tree) {
        memcpy(at, c->table.tree, c->table.tree_bytes);
        at += c->table.tree_bytes;
    }
    at = put_streams(c, source, size, at);
    size_t coded = (size_t)(at - body);
    *at++ = 0; /* no sequences */
    if ((size_t)(at - literals) >= size) return store_block(source, size, is_last, out);
    put_block(out, is_last, 2, (size_t)(at - literals));
    uint64_t type = c->has_tree ? 3 : 2; /* treeless, or with a tree; 3: sizes of 18 bits each */
    put_number(literals, type | 3 << 2 | (uint64_t)size << 4 | (uint64_t)coded << 22, 5);
    c->has_tree = 1;
    return at;
}

static uint8_t *repeat_block(uint8_t symbol, size_t size, int is_last, uint8_t *out) {
    out = put_block(out, is_last, 1, size);
    *out = symbol;
    return out + 1;
}

/* The most bytes that the whole frame takes: exactly what the codes do, and all headers. */
static size_t bound(const table_t *t, size_t size) {
    size_t blocks = (size + BLOCK_BYTES - 1) / BLOCK_BYTES, total = 0;
    for (int i = 0; i < t->distinct; i++) {
        total += (size_t)t->counts[t->symbols[i]] * t->bits[t->symbols[i]];
    }
    size_t each = BLOCK_HEADER + LITERALS_HEADER + JUMP_TABLE + 4 + 1;
    return total / 8 + 1 + FRAME_HEADER + t->tree_bytes + blocks * each + MIN_CODED + SLACK;
}

/* Get the table ready; 0 if there is none, or what it makes might not fit into `room`. */
static int prepare(table_t *t, const uint8_t *source, size_t size, size_t room) {
    ckptd_table_count(t, source, size);
    if (t->distinct == 1) {
        return room >= FRAME_HEADER + (BLOCK_HEADER + 1) * (size / BLOCK_BYTES + 1);
    }
    if (!ckptd_table_describe(t) || bound(t, size) > room) return 0;
    ckptd_table_assign(t);
    return 1;
}

/* Write `source` as one frame to `out`.
 *
 * `scratch` is `ckptd_entropy_scratch()` bytes, aligned to 8; its contents mean nothing. Returns the
 * length of the frame; 0 if it might not fit into `room`, or the source is not for this coder: less
 * than MIN_BYTES, over 4 GiB, or of a distribution that the format cannot describe. Up to `room`
 * bytes are written in any case.
 */
EXPORT size_t ckptd_entropy(const uint8_t *source, size_t size, uint8_t *out, size_t room,
                            void *scratch) {
    coder_t *c = scratch;
    if (size < MIN_BYTES || size >> 32 || !prepare(&c->table, source, size, room)) return 0;
    put_number(out, 0xFD2FB528, 4);
    out[4] = 0xA0; /* the size in four bytes, and the whole frame is its window */
    put_number(out + 5, size, 4);
    c->has_tree = 0;
    uint8_t *at = out + FRAME_HEADER;
    for (size_t begin = 0; begin < size; begin += BLOCK_BYTES) {
        size_t left = size - begin, now = left < BLOCK_BYTES ? left : BLOCK_BYTES;
        if (c->table.distinct == 1) {
            at = repeat_block(source[0], now, now == left, at);
        } else {
            at = code_block(c, source + begin, now, now == left, at);
        }
    }
    return (size_t)(at - out);
}
