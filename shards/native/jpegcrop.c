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

    JSAMPARRAY row = cinfo.mem->alloc_sarray((j_common_ptr)&cinfo, JPOOL_IMAGE, columns * CHANNELS, 1);
    const uint8_t *inside = row[0] + (left - first) * CHANNELS;
    size_t bytes = (size_t)width * CHANNELS;
    JDIMENSION bottom = (JDIMENSION)top + height;

    if (top > MARGIN) jpeg_skip_scanlines(&cinfo, top - MARGIN);
    while (cinfo.output_scanline < bottom) {
        JDIMENSION at = cinfo.output_scanline;
        jpeg_read_scanlines(&cinfo, row, 1);
        if (at >= (JDIMENSION)top) memcpy(out + (at - top) * bytes, inside, bytes);
    }
    int answer = ends_well(&cinfo) ? JPEGCROP_DONE : JPEGCROP_LOOK_AGAIN;
    jpeg_destroy_decompress(&cinfo);
    return answer;
}
