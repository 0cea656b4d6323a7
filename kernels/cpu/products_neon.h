/* Products of rows of codes with int8 planes on 64-bit ARM; included by products_neon.c and products_dotprod.c.
 *
 * The includer defines TARGET, the attribute of functions; PRODUCTS, the exported name; and
 *   dot(sum, w, x)  sum + the products of 32 bytes w with 32 numbers at x, in any four parts; a byte is at most 42
 *
 * With few planes, the bytes 4 w + 31 of 32 weights go from the tables to registers, and are multiplied by every plane.
 * With more, a stretch of some rows is expanded to memory, and blocks of rows and planes are multiplied. */
#include <string.h>

#define FEW 4       /* planes whose sums are kept in registers while codes are decoded */
#define ROWS 4      /* multiplied together by */
#define TOGETHER 4  /* planes */
#define STRETCH 256 /* codes of a row that are expanded at a time, a multiple of 4 */

TARGET INLINE int8x16_t pair(const uint64_t *table, uint64_t first, uint64_t second) {
    return vreinterpretq_s8_u64(vcombine_u64(vld1_u64(table + first), vld1_u64(table + second)));
}

TARGET INLINE weights decode(const int codebook, const char *codes) {
    weights w;
    if (codebook == QUIP_E8P) {
        uint64_t four;
        memcpy(&four, codes, sizeof four);
        w.low = veorq_s8(pair(quip_e8p_pattern, four >> 8 & 255, four >> 24 & 255),
                         pair(quip_e8p_signs, four & 255, four >> 16 & 255));
        w.high = veorq_s8(pair(quip_e8p_pattern, four >> 40 & 255, four >> 56),
                          pair(quip_e8p_signs, four >> 32 & 255, four >> 48 & 255));
    } else {
        uint32_t four;
        memcpy(&four, codes, sizeof four);
        w.low = pair(quip_e8_points, four & 255, four >> 8 & 255);
        w.high = pair(quip_e8_points, four >> 16 & 255, four >> 24);
    }
    return w;
}

/* The last one to three codes of a row, completed with zeros: planes are completed as well. */
TARGET INLINE weights decode_last(const int codebook, const char *codes, int count) {
    char copy[8] = {0};
    memcpy(copy, codes, (size_t)count * code_bytes(codebook));
    return decode(codebook, copy);
}

TARGET INLINE void few_planes(const int codebook, const char *codes, int64_t blocks, const int8_t *planes, int64_t stride,
                              const int columns, int32_t (*sums)[LANES], int r) {
    int32x4_t sum[FEW], other[FEW]; /* two of each plane, so that one need not wait for the other */
    int64_t k = 0;
    UNROLL for (int c = 0; c < columns; c++) sum[c] = other[c] = vdupq_n_s32(0);
    for (; k + 8 <= blocks; k += 8) {
        const weights first = decode(codebook, codes + k * code_bytes(codebook));
        const weights second = decode(codebook, codes + (k + 4) * code_bytes(codebook));
        UNROLL for (int c = 0; c < columns; c++) {
            const int8_t *x = planes + c * stride + BLOCK * k;
            sum[c] = dot(sum[c], first, x);
            other[c] = dot(other[c], second, x + 32);
        }
    }
    for (; k < blocks; k += 4) {
        const char *at = codes + k * code_bytes(codebook);
        const weights w = k + 4 <= blocks ? decode(codebook, at) : decode_last(codebook, at, (int)(blocks - k));
        UNROLL for (int c = 0; c < columns; c++) sum[c] = dot(sum[c], w, planes + c * stride + BLOCK * k);
    }
    UNROLL for (int c = 0; c < columns; c++) sums[c][r] = vaddvq_s32(vaddq_s32(sum[c], other[c]));
}

/* Sums of `rows` expanded rows, `size` bytes apart, and of `columns` planes; bytes: a multiple of 32. */
TARGET INLINE void multiply(const int8_t *expanded, int64_t size, int64_t bytes, const int rows, const int8_t *x,
                            int64_t stride, const int columns, int32_t (*sums)[LANES], int64_t row) {
    int32x4_t sum[ROWS][TOGETHER];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns; c++) sum[r][c] = vdupq_n_s32(0);
    for (int64_t i = 0; i < bytes; i += 32) {
        weights w[ROWS];
        UNROLL for (int r = 0; r < rows; r++) {
            w[r].low = vld1q_s8(expanded + r * size + i);
            w[r].high = vld1q_s8(expanded + r * size + i + 16);
        }
        UNROLL for (int c = 0; c < columns; c++) UNROLL for (int r = 0; r < rows; r++)
            sum[r][c] = dot(sum[r][c], w[r], x + c * stride + i);
    }
    UNROLL for (int c = 0; c < columns; c++) UNROLL for (int r = 0; r < rows; r++) sums[c][row + r] += vaddvq_s32(sum[r][c]);
}

TARGET INLINE void many_planes(const int codebook, const char *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                               int64_t stride, int columns, int32_t (*sums)[LANES]) {
    int8_t expanded[ROWS][BLOCK * STRETCH];
    const int64_t size = sizeof *expanded;
    memset(sums, 0, (size_t)columns * sizeof *sums);
    for (int64_t row = 0; row < rows; row += ROWS)
        for (int64_t first = 0; first < blocks; first += STRETCH) {
            const int64_t count = blocks - first < STRETCH ? blocks - first : STRETCH, bytes = (count + 3) / 4 * 32;
            const int together = rows - row < ROWS ? (int)(rows - row) : ROWS;
            for (int r = 0; r < together; r++) {
                const char *at = codes + ((row + r) * blocks + first) * code_bytes(codebook);
                for (int64_t k = 0; k < count; k += 4, at += 4 * code_bytes(codebook)) {
                    const weights w = k + 4 <= count ? decode(codebook, at) : decode_last(codebook, at, (int)(count - k));
                    vst1q_s8(expanded[r] + BLOCK * k, w.low);
                    vst1q_s8(expanded[r] + BLOCK * k + 16, w.high);
                }
            }
            const int8_t *x = planes + BLOCK * first;
            int c = 0;
            for (; together == ROWS && c + TOGETHER <= columns; c += TOGETHER)
                multiply(expanded[0], size, bytes, ROWS, x + c * stride, stride, TOGETHER, sums + c, row);
            for (; c < columns; c++) {
                if (together == ROWS)
                    multiply(expanded[0], size, bytes, ROWS, x + c * stride, stride, 1, sums + c, row);
                else
                    for (int r = 0; r < together; r++)
                        multiply(expanded[r], size, bytes, 1, x + c * stride, stride, 1, sums + c, row + r);
            }
        }
}

TARGET INLINE void products(const int codebook, const char *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                            int64_t stride, int columns, int32_t (*sums)[LANES]) {
    if (columns > FEW) {
        many_planes(codebook, codes, rows, blocks, planes, stride, columns, sums);
        return;
    }
    for (int r = 0; r < rows; r++, codes += blocks * code_bytes(codebook)) switch (columns) {
            case 1: few_planes(codebook, codes, blocks, planes, stride, 1, sums, r); break;
            case 2: few_planes(codebook, codes, blocks, planes, stride, 2, sums, r); break;
            case 3: few_planes(codebook, codes, blocks, planes, stride, 3, sums, r); break;
            default: few_planes(codebook, codes, blocks, planes, stride, FEW, sums, r);
        }
}

TARGET HIDDEN void PRODUCTS(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                            int64_t stride, int columns, int32_t (*sums)[LANES]) {
    if (codebook == QUIP_E8P)
        products(QUIP_E8P, codes, rows, blocks, planes, stride, columns, sums);
    else
        products(QUIP_E8, codes, rows, blocks, planes, stride, columns, sums);
}
