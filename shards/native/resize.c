/* OpenCV's bilinear resize of RGB (INTER_LINEAR, without antialiasing): the same bits in a third of the time, mirrored for
 * nothing.
 *
 * As there, a pixel is made of its neighbours in the row and then of two such rows, in whole numbers: weights are in
 * 2048ths, and each step cuts off bits. Beyond an edge lies the edge; in rows, but not between rows, it is then taken
 * alone.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>

#define VECTORS __attribute__((target("avx2")))

enum { CHANNELS = 3, ONE = 2048 };

typedef struct {
    int at; /* the pixel on the left or above; -1 beyond the edge */
    int16_t near, far; /* the weights of it and of the next one */
} tap;

static tap make_tap(int from, int to, int i) {
    double scale = 1.0 / ((double)to / from);
    float x = (float)((i + 0.5) * scale - 0.5);
    int at = (int)floorf(x);
    x -= (float)at;
    return (tap){at, (int16_t)lrintf((1 - x) * ONE), (int16_t)lrintf(x * ONE)};
}

/* Where each pixel of a row comes from, in bytes, and the weights of the two there, once for each of four channels. */
typedef struct {
    int *from;
    int16_t (*weights)[8];
} row_taps;

/* Make each pixel from two of a row that is 8 bytes longer than it seems, two at once: there are taps for an even number
 * of them, and `out` has room for that and a number more. */
VECTORS static void across(const uint8_t *row, row_taps taps, int width, int16_t *out) {
    const __m256i pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    for (int i = 0; i < width; i += 2, out += 2 * CHANNELS) {
        __m128i one = _mm_loadl_epi64((const __m128i *)(row + taps.from[i]));
        __m128i other = _mm_loadl_epi64((const __m128i *)(row + taps.from[i + 1]));
        __m256i two = _mm256_inserti128_si256(_mm256_castsi128_si256(one), other, 1);
        __m256i weights = _mm256_loadu_si256((const __m256i *)taps.weights[i]);
        __m256i sums = _mm256_srai_epi32(_mm256_madd_epi16(_mm256_shuffle_epi8(two, pairs), weights), 4);
        sums = _mm256_packs_epi32(sums, sums);
        _mm_storel_epi64((__m128i *)out, _mm256_castsi256_si128(sums));
        _mm_storel_epi64((__m128i *)(out + CHANNELS), _mm256_extracti128_si256(sums, 1));
    }
}

/* Make a row of two. */
VECTORS static void down(const int16_t *restrict above, const int16_t *restrict below, tap t, int count,
                         uint8_t *restrict out) {
    for (int i = 0; i < count; i++) {
        int16_t sum = (int16_t)((int16_t)((above[i] * t.near) >> 16) + (int16_t)((below[i] * t.far) >> 16) + 2);
        out[i] = (uint8_t)(sum >> 2);
    }
}

static int inside(int at, int length) {
    return at < 0 ? 0 : at < length ? at : length - 1;
}

/* Resize an image whose rows are `stride` bytes apart to out[to_height][to_width][3]; `mirror` it, left to right, or
 * not. Returns 0, or 1 where the processor is not for it or there is no memory: then OpenCV is to be asked. Threads may
 * call it at the same time.
 */
int jpegcrop_resize(const uint8_t *image, size_t stride, int height, int width, int to_height, int to_width, int mirror,
                    uint8_t *out) {
    if (!__builtin_cpu_supports("avx2")) return 1;
    int count = CHANNELS * to_width, even = (to_width + 1) & ~1, room = CHANNELS * even + 1;
    size_t bytes = (size_t)CHANNELS * width;
    row_taps taps = {calloc(even, sizeof *taps.from), calloc(even, sizeof *taps.weights)};
    int16_t *rows = malloc(2 * room * sizeof *rows);
    uint8_t *longer = calloc(bytes + 8, 1);
    int answer = !taps.from || !taps.weights || !rows || !longer;
    if (answer) goto end;

    for (int i = 0; i < to_width; i++) {
        tap t = make_tap(width, to_width, i);
        if (t.at < 0 || t.at >= width - 1) t = (tap){inside(t.at, width), ONE, 0};
        int to = mirror ? to_width - 1 - i : i;
        taps.from[to] = CHANNELS * t.at;
        for (int k = 0; k < 8; k++) taps.weights[to][k] = k % 2 ? t.far : t.near;
    }
    int held[2] = {-1, -1}; /* which of the image's rows are in `rows` */
    for (int y = 0; y < to_height; y++) {
        tap t = make_tap(height, to_height, y);
        const int16_t *pair[2];
        for (int k = 0; k < 2; k++) {
            int at = inside(t.at + k, height), slot = at & 1;
            int16_t *row = rows + slot * room;
            if (held[slot] != at) {
                const uint8_t *from = image + at * stride;
                if ((height - 1 - at) * stride < 8) from = memcpy(longer, from, bytes); /* nothing may lie behind it */
                across(from, taps, to_width, row);
                held[slot] = at;
            }
            pair[k] = row;
        }
        down(pair[0], pair[1], t, count, out + (size_t)y * count);
    }
end:
    free(taps.from);
    free(taps.weights);
    free(rows);
    free(longer);
    return answer;
}
#else
int jpegcrop_resize(const uint8_t *image, size_t stride, int height, int width, int to_height, int to_width, int mirror,
                    uint8_t *out) {
    (void)image, (void)stride, (void)height, (void)width, (void)to_height, (void)to_width, (void)mirror, (void)out;
    return 1;
}
#endif
