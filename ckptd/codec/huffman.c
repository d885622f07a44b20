/* Which code each symbol has, and how a frame says so: see huffman.h. */
#include "huffman.h"

#include <string.h>

/* Symbols whose weights four bits each can give (RFC 8878, 4.2.1.1). */
enum { MAX_DIRECT = 128 };

/* --- statistics ------------------------------------------------------------------------------ */

/* Four tables, so that the same symbol twice in a row does not wait for itself. */
static void count_singly(uint32_t *counts, const uint8_t *source, size_t size) {
    uint32_t four[4][256];
    size_t at = 0;
    memset(four, 0, sizeof four);
    for (; at + 4 <= size; at += 4) {
        for (size_t i = 0; i < 4; i++) four[i][source[at + i]]++;
    }
    for (; at < size; at++) four[0][source[at]]++;
    for (int s = 0; s < 256; s++) counts[s] = four[0][s] + four[1][s] + four[2][s] + four[3][s];
}

/* Two symbols at a time: half the increments, as long as the pairs that occur are few. */
static void count_pairs(table_t *t, const uint8_t *source, size_t size) {
    size_t at = 0;
    memset(t->pair_counts, 0, sizeof t->pair_counts);
    memset(t->counts, 0, sizeof t->counts);
    for (; at + 8 <= size; at += 8) {
        uint64_t word;
        memcpy(&word, source + at, 8);
        t->pair_counts[word & 0xffff]++;
        t->pair_counts[word >> 16 & 0xffff]++;
        t->pair_counts[word >> 32 & 0xffff]++;
        t->pair_counts[word >> 48]++;
    }
    for (; at < size; at++) t->counts[source[at]]++;
    for (int high = 0; high < 256; high++) {
        const uint32_t *row = t->pair_counts + (high << 8);
        uint32_t sum = 0;
        for (int low = 0; low < 256; low++) {
            sum += row[low];
            t->counts[low] += row[low];
        }
        t->counts[high] += sum;
    }
}

static void list_symbols(table_t *t) {
    t->distinct = 0;
    for (int s = 0; s < 256; s++) {
        if (t->counts[s]) t->symbols[t->distinct++] = (uint8_t)(t->last = s);
    }
}

void ckptd_table_count(table_t *t, const uint8_t *source, size_t size) {
    count_singly(t->counts, source, size < MIN_PAIRED ? size : MIN_BYTES);
    list_symbols(t);
    if (size < MIN_PAIRED) return;
    if (t->distinct > MAX_PAIRED) {
        count_singly(t->counts, source, size);
    } else {
        count_pairs(t, source, size);
    }
    list_symbols(t);
}

/* --- code lengths ---------------------------------------------------------------------------- */

static void sort_by_count(const table_t *t, uint8_t *order) {
    for (int i = 0; i < t->distinct; i++) {
        uint8_t symbol = t->symbols[i];
        int at = i;
        for (; at && t->counts[order[at - 1]] > t->counts[symbol]; at--) order[at] = order[at - 1];
        order[at] = symbol;
    }
}

/* Fill `of_length[n]` with the number of codes of n bits; `order` is by rising count. Huffman's
 * algorithm with two queues: leaves in order, and the nodes made of them, which come in order. */
static void count_lengths(const table_t *t, const uint8_t *order, int *of_length) {
    uint32_t weight[512];
    int parent[512], depth[512], leaf = 0, inner = t->distinct, made = t->distinct;
    for (int i = 0; i < t->distinct; i++) weight[i] = t->counts[order[i]];
    for (; made < 2 * t->distinct - 1; made++) {
        weight[made] = 0;
        for (int child = 0; child < 2; child++) {
            int is_leaf = leaf < t->distinct && (inner >= made || weight[leaf] <= weight[inner]);
            int least = is_leaf ? leaf++ : inner++;
            weight[made] += weight[least];
            parent[least] = made;
        }
    }
    memset(of_length, 0, (MAX_BITS + 1) * sizeof *of_length);
    depth[made - 1] = 0;
    for (int i = made - 2; i >= 0; i--) {
        depth[i] = depth[parent[i]] + 1;
        if (i < t->distinct) of_length[depth[i] < MAX_BITS ? depth[i] : MAX_BITS]++;
    }
}

/* Codes that were cut to MAX_BITS claim more than there is: push a shorter code down, and hang one
 * of the longest beside it, which takes exactly one longest code off the claim each time. */
static void make_room(int *of_length) {
    int claimed = 0;
    for (int n = 1; n <= MAX_BITS; n++) claimed += of_length[n] << (MAX_BITS - n);
    for (; claimed > 1 << MAX_BITS; claimed--) {
        int n = MAX_BITS - 1;
        while (!of_length[n]) n--;
        of_length[n]--;
        of_length[n + 1] += 2;
        of_length[MAX_BITS]--;
    }
}

static void choose_lengths(table_t *t) {
    uint8_t order[256];
    int of_length[MAX_BITS + 1], at = 0;
    sort_by_count(t, order);
    count_lengths(t, order, of_length);
    make_room(of_length);
    memset(t->bits, 0, sizeof t->bits);
    t->longest = 0;
    for (int n = MAX_BITS; n; n--) {
        if (of_length[n] && !t->longest) t->longest = n;
        for (int i = 0; i < of_length[n]; i++) t->bits[order[at++]] = (uint8_t)n;
    }
}

/* RFC 8878, 4.2.1.3: the longest codes come first, symbols of one length in their own order. */
void ckptd_table_assign(table_t *t) {
    uint32_t next = 0;
    for (int n = t->longest; n; n--) {
        for (int i = 0; i < t->distinct; i++) {
            int s = t->symbols[i];
            if (t->bits[s] == n) t->single[s] = (code_t)next++ << (64 - n) | (code_t)n;
        }
        next >>= 1;
    }
    if (t->distinct > MAX_PAIRED) return;
    /* Streams are written from their end: of two symbols the latter comes first. */
    for (int i = 0; i < t->distinct; i++) {
        for (int j = 0; j < t->distinct; j++) {
            int early = t->symbols[i], late = t->symbols[j];
            code_t bits = t->bits[early] + (code_t)t->bits[late];
            code_t high = t->single[early] & ~(code_t)0xff;
            code_t low = (t->single[late] & ~(code_t)0xff) >> t->bits[early];
            t->pairs[late << 8 | early] = high | low | bits;
        }
    }
}

/* --- the table as the frame brings it -------------------------------------------------------- */

typedef struct {
    uint64_t word;
    int bits;
    uint8_t *out;
} writer_t;

static void put_bits(writer_t *w, uint32_t value, int bits) {
    w->word |= (uint64_t)value << w->bits;
    for (w->bits += bits; w->bits >= 8; w->bits -= 8, w->word >>= 8) *w->out++ = (uint8_t)w->word;
}

static void flush_bits(writer_t *w) {
    if (w->bits) *w->out++ = (uint8_t)w->word;
    w->word = 0, w->bits = 0;
}

enum { FSE_LOG = 6, FSE_SIZE = 1 << FSE_LOG, WEIGHTS = MAX_BITS + 1 };

/* Share the FSE_SIZE states out among the weights, at least one to each that occurs, and never all
 * to one. */
static void share_states(const uint8_t *weight, int count, int *share) {
    int left = FSE_SIZE, most = 0, of[WEIGHTS] = {0};
    for (int i = 0; i < count; i++) of[weight[i]]++;
    for (int v = 0; v < WEIGHTS; v++) {
        share[v] = of[v] * FSE_SIZE / count;
        if (of[v] && !share[v]) share[v] = 1;
        if (of[v] > of[most]) most = v;
        left -= share[v];
    }
    share[most] += left;
}

/* RFC 8878, 4.1.1: how probable each value is, in as few bits as what is left leaves possible. */
static void put_shares(writer_t *w, const int *share) {
    int left = FSE_SIZE, is_after_zero = 0;
    put_bits(w, FSE_LOG - 5, 4);
    for (int v = 0; left; v++) {
        if (is_after_zero) {
            int zeros = 0;
            while (!share[v + zeros]) zeros++;
            v += zeros;
            for (; zeros >= 3; zeros -= 3) put_bits(w, 3, 2);
            put_bits(w, (uint32_t)zeros, 2);
        }
        int bits = 1;
        while (1 << bits < left + 2) bits++; /* values up to left + 1 */
        int spare = (1 << bits) - (left + 2), half = 1 << (bits - 1), value = share[v] + 1;
        if (value < spare) {
            put_bits(w, (uint32_t)value, bits - 1);
        } else {
            put_bits(w, (uint32_t)(value < half ? value : value + spare), bits);
        }
        left -= share[v];
        is_after_zero = !share[v];
    }
    flush_bits(w);
}

/* RFC 8878, 4.2.1.2: the weights through two states that take turns, written from the end. */
static void put_weights(writer_t *w, const uint8_t *weight, int count, const int *share) {
    uint8_t value_of[FSE_SIZE], next[WEIGHTS][FSE_SIZE];
    int base[FSE_SIZE], bits[FSE_SIZE], first[WEIGHTS], seen[WEIGHTS] = {0}, state[2] = {-1, -1};
    for (int v = 0, at = 0; v < WEIGHTS; v++) {
        for (int i = 0; i < share[v]; i++) {
            value_of[at] = (uint8_t)v;
            at = (at + (FSE_SIZE >> 1) + (FSE_SIZE >> 3) + 3) & (FSE_SIZE - 1);
        }
    }
    for (int s = 0; s < FSE_SIZE; s++) {
        int v = value_of[s], rank = share[v] + seen[v], log = 0;
        if (!seen[v]++) first[v] = s;
        while (rank >> (log + 1)) log++;
        bits[s] = FSE_LOG - log;
        base[s] = (rank << bits[s]) - FSE_SIZE;
        for (int i = 0; i < 1 << bits[s]; i++) next[v][base[s] + i] = (uint8_t)s;
    }
    for (int i = count - 1; i >= 0; i--) {
        int *now = state + (i & 1), v = weight[i];
        if (*now < 0) {
            *now = first[v]; /* one that wants bits: their lack tells the decoder that it is done */
            continue;
        }
        int s = next[v][*now];
        put_bits(w, (uint32_t)(*now - base[s]), bits[s]);
        *now = s;
    }
    put_bits(w, (uint32_t)state[1], FSE_LOG);
    put_bits(w, (uint32_t)state[0], FSE_LOG);
    put_bits(w, 1, 1);
    flush_bits(w);
}

/* Describe the table in `tree`; 0 if the format has no way to. The last weight goes without saying. */
int ckptd_table_describe(table_t *t) {
    choose_lengths(t);
    uint8_t weight[256];
    for (int s = 0; s < t->last; s++) {
        weight[s] = (uint8_t)(t->bits[s] ? t->longest + 1 - t->bits[s] : 0);
    }
    if (t->last <= MAX_DIRECT) {
        weight[t->last] = 0;
        t->tree[0] = (uint8_t)(127 + t->last);
        t->tree_bytes = 1;
        for (int s = 0; s < t->last; s += 2) {
            t->tree[t->tree_bytes++] = (uint8_t)(weight[s] << 4 | weight[s + 1]);
        }
        return 1;
    }
    int share[WEIGHTS];
    share_states(weight, t->last, share);
    for (int v = 0; v < WEIGHTS; v++) {
        if (share[v] == FSE_SIZE) return 0;
    }
    writer_t w = {0, 0, t->tree + 1};
    put_shares(&w, share);
    put_weights(&w, weight, t->last, share);
    t->tree_bytes = (size_t)(w.out - t->tree);
    t->tree[0] = (uint8_t)(t->tree_bytes - 1);
    return t->tree_bytes <= 128;
}
