/* Antialiased resize of 8-bit RGB in Pillow's arithmetic, so that results are equal to the last bit.

   Pillow's rule, in facts: two passes, width and height, 8 bits in between; a kernel's weights are computed and
   normalised in double precision and rounded to 22 fractional bits (away from zero at a half); a value is
   (sum of weight * byte + 2^21) >> 22, cut to 0..255.

   Two 16-bit products stand for one 32-bit product: weight = high * 2^11 + low, both summed exactly modulo 2^32.
   Intermediate rows are few at a time, so that they stay in the first-level cache. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(VLMJAX_PLAIN)
#include <cpuid.h>
#include <immintrin.h>
#define WITH_AVX2 1
#else
#define WITH_AVX2 0
#endif

#define BITS 22 /* fractional bits of a weight: 32 less 8 for the byte less 2 for overshoot and sign */
#define SPLIT 11
#define BAND 4  /* rows resized in width together */
#define PAD 64  /* bytes behind a row that vectors may touch */

enum { BILINEAR = 2, BICUBIC = 3, LANCZOS = 1 }; /* Pillow's numbers */

typedef struct {
    int count;      /* outputs */
    int taps;       /* weights kept per output, a multiple of 4 */
    int *first;     /* first input of each output */
    int *used;      /* inputs of each output */
    int32_t *whole; /* weights [count][taps], zeros behind `used` */
    int16_t *high, *low;
} Weights;

static double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= 3.14159265358979323846;
    return sin(x) / x;
}

static double kernel(int kind, double x) {
    if (kind == LANCZOS) return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
    if (x < 0.0) x = -x;
    if (kind == BILINEAR) return x < 1.0 ? 1.0 - x : 0.0;
    const double a = -0.5; /* Keys' cubic */
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static void weights_free(Weights *w) {
    free(w->first);
    free(w->whole);
    free(w->high);
    w->first = NULL;
    w->whole = NULL;
    w->high = NULL;
}

/* Weights of outputs start..start+count of `size` that cover [from, to) of `length` inputs. */
static int weights_make(Weights *w, int kind, int length, float from, float to, int size, int start, int count) {
    const double scale = (double)(to - from) / size, stretch = scale < 1.0 ? 1.0 : scale;
    const double support = (kind == BICUBIC ? 2.0 : kind == LANCZOS ? 3.0 : 1.0) * stretch, inverse = 1.0 / stretch;
    const double most = ceil(support) * 2 + 1;
    memset(w, 0, sizeof(*w));
    if (!(most < 1 << 24)) return 0;
    w->count = count;
    w->taps = ((int)most + 3) / 4 * 4;
    const size_t cells = (size_t)count * w->taps;
    w->first = malloc(2 * sizeof(int) * count);
    w->whole = calloc(cells, sizeof(int32_t));
    w->high = malloc(2 * sizeof(int16_t) * cells);
    double *row = malloc(sizeof(double) * w->taps);
    if (!w->first || !w->whole || !w->high || !row) {
        free(row);
        weights_free(w);
        return 0;
    }
    w->used = w->first + count;
    w->low = w->high + cells;
    for (int i = 0; i < count; i++) {
        const double centre = from + (start + i + 0.5) * scale;
        int first = (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
        if (first < 0) first = 0;
        if (last > length) last = length;
        double sum = 0.0;
        for (int x = 0; x < last - first; x++) {
            row[x] = kernel(kind, (x + first - centre + 0.5) * inverse);
            sum += row[x];
        }
        int32_t *out = w->whole + (size_t)i * w->taps;
        for (int x = 0; x < last - first; x++) {
            const double value = (sum != 0.0 ? row[x] / sum : row[x]) * (1 << BITS);
            out[x] = (int32_t)(value < 0 ? value - 0.5 : value + 0.5);
        }
        w->first[i] = first;
        w->used[i] = last - first;
    }
    for (size_t i = 0; i < cells; i++) {
        w->high[i] = (int16_t)(w->whole[i] >> SPLIT);
        w->low[i] = (int16_t)(w->whole[i] & ((1 << SPLIT) - 1));
    }
    free(row);
    return 1;
}

static uint8_t cut(uint32_t sum) {
    const int32_t value = (int32_t)sum >> BITS;
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

/* One row in width: source pixels -> count pixels, from right to left where mirrored. */
static void row_plain(const Weights *w, const uint8_t *source, uint8_t *out, int mirror) {
    for (int j = 0; j < w->count; j++) {
        const int i = mirror ? w->count - 1 - j : j;
        const int32_t *k = w->whole + (size_t)i * w->taps;
        const uint8_t *p = source + 3 * (size_t)w->first[i];
        uint32_t r = 1u << (BITS - 1), g = r, b = r;
        for (int x = 0; x < w->used[i]; x++, p += 3) {
            r += (uint32_t)k[x] * p[0];
            g += (uint32_t)k[x] * p[1];
            b += (uint32_t)k[x] * p[2];
        }
        out[3 * j] = cut(r);
        out[3 * j + 1] = cut(g);
        out[3 * j + 2] = cut(b);
    }
}

/* One output row from `used` rows of `bytes` values each; `sums` holds one number per value. */
static void column_plain(const Weights *w, int i, uint8_t *const *rows, uint8_t *out, int bytes, uint32_t *sums) {
    const int32_t *k = w->whole + (size_t)i * w->taps;
    for (int x = 0; x < bytes; x++) sums[x] = 1u << (BITS - 1);
    for (int y = 0; y < w->used[i]; y++) {
        const uint8_t *row = rows[y];
        const uint32_t weight = (uint32_t)k[y];
        for (int x = 0; x < bytes; x++) sums[x] += weight * row[x];
    }
    for (int x = 0; x < bytes; x++) out[x] = cut(sums[x]);
}

#if WITH_AVX2
#define AVX2 __attribute__((target("avx2")))

/* Both halves of one vector: row a and row b. */
AVX2 static inline __m256i two_rows(const uint8_t *a, const uint8_t *b) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a)),
                                   _mm_loadu_si128((const __m128i *)b), 1);
}

AVX2 static inline __m256i pair(const int16_t *weights) {
    int32_t both;
    memcpy(&both, weights, 4);
    return _mm256_set1_epi32(both);
}

AVX2 static inline __m256i added(__m256i sums, __m256i values, __m256i weights) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(values, weights));
}

AVX2 static inline __m256i joined(__m256i high, __m256i low) {
    const __m256i half = _mm256_set1_epi32(1 << (BITS - 1));
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, SPLIT), low), half), BITS);
}

AVX2 static inline void store_two(__m256i sums, uint8_t *a, uint8_t *b) {
    const __m256i words = _mm256_packs_epi32(sums, sums), bytes = _mm256_packus_epi16(words, words);
    const int32_t first = _mm256_extract_epi32(bytes, 0), second = _mm256_extract_epi32(bytes, 4);
    memcpy(a, &first, 4);
    memcpy(b, &second, 4);
}

/* Four rows in width. Each pixel's store spills one byte, which the next pixel overwrites. */
AVX2 static void rows_avx2(const Weights *w, const uint8_t *const source[BAND], uint8_t *const out[BAND], int mirror) {
    /* Taps 0 and 1, then 2 and 3, of one colour side by side as 16-bit numbers. */
    const __m256i near = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i far = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    for (int j = 0; j < w->count; j++) {
        const int i = mirror ? w->count - 1 - j : j, used = w->used[i];
        const int16_t *high = w->high + (size_t)i * w->taps, *low = w->low + (size_t)i * w->taps;
        size_t offset = 3 * (size_t)w->first[i];
        __m256i h0 = _mm256_setzero_si256(), l0 = h0, h1 = h0, l1 = h0;
        int x = 0;
        for (; x + 2 < used; x += 4, offset += 12) {
            const __m256i a = two_rows(source[0] + offset, source[1] + offset);
            const __m256i b = two_rows(source[2] + offset, source[3] + offset);
            const __m256i an = _mm256_shuffle_epi8(a, near), af = _mm256_shuffle_epi8(a, far);
            const __m256i bn = _mm256_shuffle_epi8(b, near), bf = _mm256_shuffle_epi8(b, far);
            const __m256i kh = pair(high + x), mh = pair(high + x + 2), kl = pair(low + x), ml = pair(low + x + 2);
            h0 = added(added(h0, an, kh), af, mh);
            h1 = added(added(h1, bn, kh), bf, mh);
            l0 = added(added(l0, an, kl), af, ml);
            l1 = added(added(l1, bn, kl), bf, ml);
        }
        if (x < used) { /* one or two taps are left */
            const __m256i an = _mm256_shuffle_epi8(two_rows(source[0] + offset, source[1] + offset), near);
            const __m256i bn = _mm256_shuffle_epi8(two_rows(source[2] + offset, source[3] + offset), near);
            const __m256i kh = pair(high + x), kl = pair(low + x);
            h0 = added(h0, an, kh);
            h1 = added(h1, bn, kh);
            l0 = added(l0, an, kl);
            l1 = added(l1, bn, kl);
        }
        store_two(joined(h0, l0), out[0] + 3 * j, out[1] + 3 * j);
        store_two(joined(h1, l1), out[2] + 3 * j, out[3] + 3 * j);
    }
}

/* 32 values of one output row. Two rows at a time; an odd last row is paired with itself and weight 0. */
AVX2 static inline __m256i column_32(uint8_t *const *rows, int x, int used, const int16_t *high, const int16_t *low) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i h0 = zero, h1 = zero, h2 = zero, h3 = zero, l0 = zero, l1 = zero, l2 = zero, l3 = zero;
    for (int y = 0; y < used; y += 2) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)(rows[y] + x));
        const __m256i b = _mm256_loadu_si256((const __m256i *)(rows[y + 1 < used ? y + 1 : y] + x));
        const __m256i left = _mm256_unpacklo_epi8(a, b), right = _mm256_unpackhi_epi8(a, b);
        const __m256i v0 = _mm256_unpacklo_epi8(left, zero), v1 = _mm256_unpackhi_epi8(left, zero);
        const __m256i v2 = _mm256_unpacklo_epi8(right, zero), v3 = _mm256_unpackhi_epi8(right, zero);
        const __m256i kh = pair(high + y), kl = pair(low + y);
        h0 = added(h0, v0, kh);
        h1 = added(h1, v1, kh);
        h2 = added(h2, v2, kh);
        h3 = added(h3, v3, kh);
        l0 = added(l0, v0, kl);
        l1 = added(l1, v1, kl);
        l2 = added(l2, v2, kl);
        l3 = added(l3, v3, kl);
    }
    /* Packing keeps to 16-byte halves, as unpacking did: the values come back in order. */
    const __m256i first = _mm256_packs_epi32(joined(h0, l0), joined(h1, l1));
    const __m256i second = _mm256_packs_epi32(joined(h2, l2), joined(h3, l3));
    return _mm256_packus_epi16(first, second);
}

AVX2 static void column_avx2(const Weights *w, int i, uint8_t *const *rows, uint8_t *out, int bytes) {
    const int16_t *high = w->high + (size_t)i * w->taps, *low = w->low + (size_t)i * w->taps;
    int x = 0;
    for (; x + 32 <= bytes; x += 32)
        _mm256_storeu_si256((__m256i *)(out + x), column_32(rows, x, w->used[i], high, low));
    if (x < bytes) { /* the ring's rows are padded, the caller's output is not */
        uint8_t rest[32];
        _mm256_storeu_si256((__m256i *)rest, column_32(rows, x, w->used[i], high, low));
        memcpy(out + x, rest, bytes - x);
    }
}
#endif

/* 1 where vector code runs: the processor has AVX2, and the system keeps its registers (bits 1 and 2 of XCR0).
   Asked here, since zig's __builtin_cpu_supports says no to everything. */
int vlmjax_vectors(void) {
#if WITH_AVX2
    unsigned a, b, c, d, kept, rest;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    __asm__("xgetbv" : "=a"(kept), "=d"(rest) : "c"(0));
    return (kept & 6) == 6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
#else
    return 0;
#endif
}

/* Bytes that vector loads of four taps may read behind the last tap used. */
static size_t padded(int pixels) { return 3 * (size_t)pixels + PAD; }

typedef struct {
    const uint8_t *pixels, *end;
    int64_t stride;
    int height, width;
} Source;

/* Row y of the source, copied to `spare` where vectors would read behind the end of the image. */
static const uint8_t *safe_row(const Source *s, int y, uint8_t *spare) {
    const uint8_t *row = s->pixels + s->stride * y;
    if (s->end - row >= (ptrdiff_t)padded(s->width)) return row;
    memcpy(spare, row, 3 * (size_t)s->width);
    return spare;
}

static void four_rows(const Weights *w, const uint8_t *const from[BAND], uint8_t *const to[BAND], int mirror,
                      int vectors) {
#if WITH_AVX2
    if (vectors) {
        rows_avx2(w, from, to, mirror);
        return;
    }
#endif
    (void)vectors;
    for (int b = 0; b < BAND; b++) row_plain(w, from[b], to[b], mirror);
}

static void one_column(const Weights *w, int i, uint8_t *const *rows, uint8_t *out, int bytes, uint32_t *sums,
                       int vectors) {
#if WITH_AVX2
    if (vectors) {
        column_avx2(w, i, rows, out, bytes);
        return;
    }
#endif
    (void)vectors;
    column_plain(w, i, rows, out, bytes, sums);
}

/* Width first. Input rows are resized when an output row first needs them, into a ring. */
static int across_down(const Source *s, const Weights *across, const Weights *down, int mirror, int vectors,
                       uint8_t *out) {
    const int bytes = 3 * across->count, ring = down->taps + BAND, rows = down->count;
    const int last = down->first[rows - 1] + down->used[rows - 1];
    const size_t pitch = padded(across->count), spare = padded(s->width);
    uint8_t *memory = calloc(pitch * ring + spare * BAND, 1), *copies = memory + pitch * ring;
    uint8_t **turn = malloc(sizeof(uint8_t *) * ring);
    uint32_t *sums = malloc(sizeof(uint32_t) * bytes);
    const int ready = memory && turn && sums;
    int next = ready ? down->first[0] : 0;
    for (int i = 0; ready && i < rows; i++) {
        const int first = down->first[i], used = down->used[i];
        for (; next < first + used; next += BAND) {
            const uint8_t *from[BAND];
            uint8_t *to[BAND];
            for (int b = 0; b < BAND; b++) { /* what would come after the last row is made and not used */
                from[b] = safe_row(s, next + b < last ? next + b : last - 1, copies + spare * b);
                to[b] = memory + pitch * ((next + b) % ring);
            }
            four_rows(across, from, to, mirror, vectors);
        }
        for (int y = 0; y < used; y++) turn[y] = memory + pitch * ((first + y) % ring);
        one_column(down, i, turn, out + (size_t)i * bytes, bytes, sums, vectors);
    }
    free(memory);
    free(turn);
    free(sums);
    return ready;
}

/* Height first, on the columns that the width will need; four output rows at a time. */
static int down_across(const Source *s, const Weights *across, const Weights *down, int mirror, int vectors,
                       uint8_t *out) {
    const int rows = down->count, left = across->first[0], bytes = 3 * across->count;
    const int last = across->first[across->count - 1] + across->used[across->count - 1], span = 3 * (last - left);
    const size_t pitch = padded(last), out_pitch = padded(across->count), spare = padded(s->width);
    uint8_t *memory = calloc((pitch + out_pitch) * BAND + spare * down->taps, 1);
    uint8_t *made = memory + pitch * BAND, *copies = made + out_pitch * BAND;
    uint8_t **turn = malloc(sizeof(uint8_t *) * down->taps);
    uint32_t *sums = malloc(sizeof(uint32_t) * span);
    const int ready = memory && turn && sums;
    for (int i = 0; ready && i < rows; i += BAND) {
        const uint8_t *from[BAND];
        uint8_t *to[BAND];
        for (int b = 0; b < BAND; b++) {
            const int row = i + b < rows ? i + b : rows - 1;
            for (int y = 0; y < down->used[row]; y++)
                turn[y] = (uint8_t *)safe_row(s, down->first[row] + y, copies + spare * y) + 3 * (size_t)left;
            one_column(down, row, turn, memory + pitch * b + 3 * (size_t)left, span, sums, vectors);
            from[b] = memory + pitch * b;
            to[b] = made + out_pitch * b;
        }
        four_rows(across, from, to, mirror, vectors);
        for (int b = 0; b < BAND && i + b < rows; b++) memcpy(out + (size_t)(i + b) * bytes, to[b], bytes);
    }
    free(memory);
    free(turn);
    free(sums);
    return ready;
}

/* Columns left..left+columns and rows top..top+rows of the resize of box (x0, y0, x1, y1) to width x height.

   source: RGB bytes, `stride` bytes from row to row, in_height x in_width pixels; out: rows x columns x 3 bytes.
   kind: Pillow's number of the kernel; height_first: order of the two passes; mirror: columns in reverse order;
   vectors: 0 keeps to plain C. Returns 0, or 1 when memory is short. */
int vlmjax_resize(const uint8_t *source, int64_t stride, int in_height, int in_width, const float *box, int height,
                  int width, int top, int left, int rows, int columns, int kind, int height_first, int mirror,
                  int vectors, uint8_t *out) {
    const Source s = {source, source + stride * (int64_t)(in_height - 1) + 3 * (int64_t)in_width, stride, in_height,
                      in_width};
    Weights across, down;
    if (!weights_make(&across, kind, in_width, box[0], box[2], width, left, columns)) return 1;
    if (!weights_make(&down, kind, in_height, box[1], box[3], height, top, rows)) {
        weights_free(&across);
        return 1;
    }
    const int done = height_first ? down_across(&s, &across, &down, mirror, vectors, out)
                                  : across_down(&s, &across, &down, mirror, vectors, out);
    weights_free(&across);
    weights_free(&down);
    return done ? 0 : 1;
}
