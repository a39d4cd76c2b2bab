/* A rectangle of a baseline JPEG, as RGB: the same bits as decoding all of it, at full size or a fraction of it,
 * and cutting the rectangle out.
 *
 * Only the blocks around the rectangle are transformed, upsampled and converted, and nothing below it is
 * decoded. Whatever libjpeg warns about, and every kind of JPEG that is not plain, gets the answer
 * JPEGCROP_LOOK_AGAIN: then the full decoder is to be asked.
 */
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or newer is needed: others have no cropping, or upsample in another way"
#endif

enum { JPEGCROP_DONE = 0, JPEGCROP_LOOK_AGAIN = 1 };

enum { CHANNELS = 3, MARGIN = 2 };

typedef struct {
    struct jpeg_error_mgr base; /* first: libjpeg knows a whole one by this part */
    jmp_buf give_up;
} errors;

static void on_error(j_common_ptr cinfo) {
    longjmp(((errors *)cinfo->err)->give_up, 1);
}

static void on_message(j_common_ptr cinfo, int level) {
    if (level < 0) on_error(cinfo); /* a warning: the data is damaged */
}

static int is_plain(j_decompress_ptr cinfo) {
    J_COLOR_SPACE space = cinfo->jpeg_color_space;
    return !cinfo->progressive_mode && !cinfo->arith_code && !jpeg_has_multiple_scans(cinfo) &&
           (space == JCS_YCbCr || space == JCS_GRAYSCALE || space == JCS_RGB);
}

/* Is the rest of the file what a whole one has there: entropy-coded data and restart markers up to the end
 * of the image? A file that was cut short, or goes on with anything else, is for the full decoder to judge.
 */
static int ends_well(j_decompress_ptr cinfo) {
    const uint8_t *at = cinfo->src->next_input_byte, *end = at + cinfo->src->bytes_in_buffer;
    int code = cinfo->unread_marker; /* that libjpeg has read ahead, or 0 */
    while (code == 0x00 || code == 0xFF || (code >= JPEG_RST0 && code <= JPEG_RST0 + 7)) {
        at = memchr(at, 0xFF, end - at);
        if (!at || ++at == end) return 0;
        code = *at; /* 0x00 makes data of the byte before, 0xFF is filling */
    }
    return code == JPEG_EOI;
}

/* libjpeg's entropy decoder, as far as it is called from outside: so in every libjpeg-turbo, but in a header that not all
 * systems have. */
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
    boolean insufficient_data;
};

/* Reading the Huffman codes takes most of the time, and this does it in two thirds of libjpeg's: the stuffing is taken
 * out before, a code and the bits of its value are found in one look-up, and outside the rectangle nothing is kept.
 * Whatever is not as it should be is for the full decoder to judge.
 */
#define RARELY(condition) __builtin_expect(condition, 0)

enum {
    LOOK = 10,      /* bits looked up at once */
    PADDING = 4096, /* zeros after the data: more than any MCU takes, so that its end need not be checked inside one */
    END = 128,      /* what an end of block adds to the place in it: more than all runs do */
    MOST_DC = 1 << 20
};

typedef struct {
    uint32_t look[1 << LOOK]; /* the entry for what the next bits begin with; 0: a longer code, or none */
    int32_t limit[17];        /* one past the last code of each length, with zeros appended up to 16 bits */
    int32_t offset[17];       /* added to a code of each length, gives its place in `symbols` */
    const uint8_t *symbols;
} table;

typedef struct {
    uint64_t bits;     /* the next ones, from the top */
    int count;         /* how many of them count */
    const uint8_t *at; /* where the following ones are */
} bit_reader;

typedef struct {
    bit_reader in;
    const uint8_t *end;
    JDIMENSION column, first, last; /* of MCUs: the next one, and those that are kept */
    int dc[MAX_COMPS_IN_SCAN];      /* of the block before */
    const table *dc_table[MAX_COMPS_IN_SCAN], *ac_table[MAX_COMPS_IN_SCAN];
    table tables[2 * MAX_COMPS_IN_SCAN];
} scan;

static const uint8_t natural_order[DCTSIZE2] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

/* An entry: how many bits the code and its value have, how many the value, and how far it goes on in the block. */
static uint32_t make_entry(int length, int symbol) {
    uint32_t run = symbol >> 4, size = symbol & 15, step = size || run == 15 ? run + 1 : END;
    return (length + size) | size << 8 | step << 16;
}

static void make_table(table *made, const JHUFF_TBL *from) { /* libjpeg has found nothing wrong in it */
    int32_t code = 0, index = 0;
    memset(made->look, 0, sizeof made->look);
    made->symbols = from->huffval;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        made->offset[length] = index - code;
        for (int i = 0; i < from->bits[length]; i++, code++, index++) {
            if (length > LOOK) continue;
            uint32_t *at = made->look + (code << (LOOK - length));
            for (int n = 0; n < 1 << (LOOK - length); n++) at[n] = make_entry(length, from->huffval[index]);
        }
        made->limit[length] = code << (16 - length);
    }
}

static inline void fill(bit_reader *in) { /* to 56 bits or more */
    uint64_t next;
    memcpy(&next, in->at, sizeof next);
    in->bits |= __builtin_bswap64(next) >> in->count;
    in->at += (63 - in->count) >> 3;
    in->count |= 56;
}

static inline uint32_t next_entry(j_decompress_ptr cinfo, bit_reader *in, const table *t) {
    if (RARELY(in->count < 32)) fill(in); /* a code and its value have 31 at most */
    uint32_t entry = t->look[in->bits >> (64 - LOOK)];
    if (RARELY(!entry)) {
        int32_t code = in->bits >> 48;
        int length = LOOK + 1;
        while (length <= 16 && code >= t->limit[length]) length++;
        if (length > 16) on_error((j_common_ptr)cinfo);
        entry = make_entry(length, t->symbols[(code >> (16 - length)) + t->offset[length]]);
    }
    return entry;
}

static inline void take(bit_reader *in, uint32_t entry) {
    in->bits <<= entry & 63;
    in->count -= entry & 63;
}

/* The value of the entry that is next: its bits, and those that begin with 0 stand for negative numbers. */
static inline int value(const bit_reader *in, uint32_t entry) {
    int size = entry >> 8 & 15;
    uint64_t bits = in->bits << ((entry & 63) - size);
    return (int)(bits >> 1 >> (63 - size)) + ((int)((int64_t)~bits >> 63) & (1 - (1 << size)));
}

/* Go on to the next coefficient that is not zero, and keep it unless `block` is NULL; false at the end of the block. */
static inline __attribute__((always_inline)) int next_coefficient(j_decompress_ptr cinfo, bit_reader *in,
                                                                  const table *ac, int *k, JCOEF *block) {
    uint32_t entry = next_entry(cinfo, in, ac);
    *k += entry >> 16;
    if (block && *k < DCTSIZE2) block[natural_order[*k]] = value(in, entry);
    take(in, entry);
    return *k < DCTSIZE2 - 1;
}

/* What libjpeg calls for each MCU in turn. Where `blocks` is NULL it wants none. */
static boolean decode_mcu(j_decompress_ptr cinfo, JBLOCKROW *blocks) {
    scan *s = cinfo->client_data;
    bit_reader in = s->in;
    if (s->column < s->first || s->column > s->last) blocks = NULL;
    if (++s->column == cinfo->MCUs_per_row) s->column = 0;

    for (int b = 0; b < cinfo->blocks_in_MCU; b++) {
        int component = cinfo->MCU_membership[b], k = 0, more;
        const table *ac = s->ac_table[component];
        fill(&in);
        uint32_t entry = next_entry(cinfo, &in, s->dc_table[component]);
        int dc = s->dc[component] += value(&in, entry);
        take(&in, entry);
        if (dc > MOST_DC || dc < -MOST_DC) on_error((j_common_ptr)cinfo);
        /* One filling is enough for three coefficients but for rare ones: so the processor foresees where to go on. */
        if (blocks) {
            JCOEF *block = *blocks[b];
            block[0] = dc;
            do {
                fill(&in);
                more = next_coefficient(cinfo, &in, ac, &k, block) && next_coefficient(cinfo, &in, ac, &k, block) &&
                       next_coefficient(cinfo, &in, ac, &k, block);
            } while (more);
        } else {
            do {
                fill(&in);
                more = next_coefficient(cinfo, &in, ac, &k, NULL) && next_coefficient(cinfo, &in, ac, &k, NULL) &&
                       next_coefficient(cinfo, &in, ac, &k, NULL);
            } while (more);
        }
        if (k >= DCTSIZE2 && k < END) on_error((j_common_ptr)cinfo);
    }
    if ((in.at - s->end) * 8 > in.count) on_error((j_common_ptr)cinfo);
    s->in = in;
    return TRUE;
}

/* Let libjpeg read its blocks with our decoder; false where there are restart markers, which only its own knows. */
static int read_faster(j_decompress_ptr cinfo, scan *s, JDIMENSION first, JDIMENSION last) {
    if (cinfo->restart_interval) return 0;
    const uint8_t *from = cinfo->src->next_input_byte, *end = from + cinfo->src->bytes_in_buffer, *mark;
    uint8_t *to = cinfo->mem->alloc_large((j_common_ptr)cinfo, JPOOL_IMAGE, end - from + PADDING);
    s->in = (bit_reader){0, 0, to};
    for (int code = 0; code != JPEG_EOI;) { /* 0xFF 0x00 stands for 0xFF */
        if (code || !(mark = memchr(from, 0xFF, end - from)) || mark + 1 == end) on_error((j_common_ptr)cinfo);
        memcpy(to, from, mark + 1 - from);
        to += mark + 1 - from;
        code = mark[1];
        from = mark + 2;
    }
    s->end = to - 1; /* without the marker's 0xFF */
    memset(to - 1, 0, PADDING);

    s->column = 0;
    s->first = first;
    s->last = last;
    for (int i = 0; i < cinfo->comps_in_scan; i++) {
        const jpeg_component_info *component = cinfo->cur_comp_info[i];
        s->dc[i] = 0;
        make_table(s->tables + 2 * i, cinfo->dc_huff_tbl_ptrs[component->dc_tbl_no]);
        make_table(s->tables + 2 * i + 1, cinfo->ac_huff_tbl_ptrs[component->ac_tbl_no]);
        s->dc_table[i] = s->tables + 2 * i;
        s->ac_table[i] = s->tables + 2 * i + 1;
    }
    cinfo->client_data = s;
    cinfo->entropy->decode_mcu = decode_mcu;
    return 1;
}

/* Decode the rectangle of `height` rows from `top` and `width` columns from `left` of the image at 1/`shrink` of
 * its size, which is 1, 2, 4 or 8, to out[height][width][3].
 *
 * Returns JPEGCROP_DONE, or JPEGCROP_LOOK_AGAIN where the JPEG is damaged, not baseline, has other colours,
 * or does not contain the rectangle; `out` is then of no use. Threads may call it at the same time.
 */
int jpegcrop_decode(const uint8_t *data, size_t size, int shrink, int top, int left, int height, int width,
                    uint8_t *out) {
    struct jpeg_decompress_struct cinfo;
    errors err;
    scan s;

    cinfo.err = jpeg_std_error(&err.base);
    err.base.error_exit = on_error;
    err.base.emit_message = on_message;
    cinfo.mem = NULL; /* so that it may be destroyed even where creating it fails */
    if (setjmp(err.give_up)) {
        jpeg_destroy_decompress(&cinfo);
        return JPEGCROP_LOOK_AGAIN;
    }
    jpeg_create_decompress(&cinfo);
    jpeg_mem_src(&cinfo, data, size);
    jpeg_read_header(&cinfo, TRUE);
    cinfo.scale_num = 1;
    cinfo.scale_denom = shrink;
    cinfo.out_color_space = JCS_RGB;
    cinfo.dct_method = JDCT_ISLOW;
    jpeg_calc_output_dimensions(&cinfo);
    if (!is_plain(&cinfo) || top < 0 || left < 0 || height < 1 || width < 1 ||
        (JDIMENSION)top + height > cinfo.output_height || (JDIMENSION)left + width > cinfo.output_width)
        on_error((j_common_ptr)&cinfo);
    jpeg_start_decompress(&cinfo);

    /* Colour is interpolated between neighbouring samples, which at the edges of what is decoded are
     * missing: those columns and rows are decoded beside the rectangle, and left out. With two, there are
     * also always two samples of colour in a row; of one, libjpeg would not interpolate. */
    JDIMENSION first = left > MARGIN ? left - MARGIN : 0;
    JDIMENSION end = (JDIMENSION)left + width + MARGIN;
    JDIMENSION columns = (end < cinfo.output_width ? end : cinfo.output_width) - first;
    jpeg_crop_scanline(&cinfo, &first, &columns); /* moves `first` down to the edge of a block */
    JDIMENSION mcu = DCTSIZE / shrink * (cinfo.comps_in_scan > 1 ? cinfo.max_h_samp_factor : 1); /* columns of one */
    int faster = read_faster(&cinfo, &s, first / mcu, (first + columns - 1) / mcu);

    /* To a row at an address of 16 or 32 libjpeg writes past the cache, and reading it takes as long as its Huffman codes. */
    JSAMPROW row = cinfo.mem->alloc_large((j_common_ptr)&cinfo, JPOOL_IMAGE, columns * CHANNELS + 1) + 1;
    const uint8_t *inside = row + (left - first) * CHANNELS;
    size_t bytes = (size_t)width * CHANNELS;
    JDIMENSION bottom = (JDIMENSION)top + height;

    if (top > MARGIN) jpeg_skip_scanlines(&cinfo, top - MARGIN);
    while (cinfo.output_scanline < bottom) {
        JDIMENSION at = cinfo.output_scanline;
        jpeg_read_scanlines(&cinfo, &row, 1);
        if (at >= (JDIMENSION)top) memcpy(out + (at - top) * bytes, inside, bytes);
    }
    int answer = faster || ends_well(&cinfo) ? JPEGCROP_DONE : JPEGCROP_LOOK_AGAIN;
    jpeg_destroy_decompress(&cinfo);
    return answer;
}
