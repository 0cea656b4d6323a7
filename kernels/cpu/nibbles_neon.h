/* Products of tiles of nibbles (nibbles.c) on 64-bit ARM; included by products_neon.c and products_dotprod.c.
 *
 * The includer defines TARGET, NIBBLES, the exported name, and USE_DOT, whether there are dot products. */

#define STEP 32 /* bytes of four columns of sixteen rows: four vectors of four rows, two in lower and two in upper halves */
#define MOST_NIBBLE_COLUMNS 4

typedef struct {
    int8x16_t rows[4];
} nibble_step;

TARGET INLINE nibble_step read_step(const uint8_t *tile) {
    const uint8x16_t first = vld1q_u8(tile), second = vld1q_u8(tile + 16), mask = vdupq_n_u8(15);
    nibble_step s;
    s.rows[0] = vreinterpretq_s8_u8(vandq_u8(first, mask));
    s.rows[1] = vreinterpretq_s8_u8(vandq_u8(second, mask));
    s.rows[2] = vreinterpretq_s8_u8(vshrq_n_u8(first, 4));
    s.rows[3] = vreinterpretq_s8_u8(vshrq_n_u8(second, 4));
    return s;
}

#if USE_DOT
#define QUARTERS 4 /* steps whose numbers of a plane are loaded together */

TARGET INLINE void multiply_nibbles(const uint8_t *tile, int64_t fours, const int8_t *x, int64_t stride, const int columns,
                                    int32_t (*sums)[LANES]) {
    int32x4_t sum[MOST_NIBBLE_COLUMNS][4];
    UNROLL for (int c = 0; c < columns; c++) UNROLL for (int i = 0; i < 4; i++) sum[c][i] = vdupq_n_s32(0);
    int64_t k = 0;
    for (; k + QUARTERS <= fours; k += QUARTERS) {
        int8x16_t by[MOST_NIBBLE_COLUMNS];
        UNROLL for (int c = 0; c < columns; c++) by[c] = vld1q_s8(x + c * stride + 4 * k);
#define QUARTER(q)                                                                                                         \
    {                                                                                                                      \
        const nibble_step s = read_step(tile + (k + q) * STEP);                                                            \
        UNROLL for (int c = 0; c < columns; c++) UNROLL for (int i = 0; i < 4; i++)                                        \
            sum[c][i] = vdotq_laneq_s32(sum[c][i], s.rows[i], by[c], q);                                                   \
    }
        QUARTER(0)
        QUARTER(1)
        QUARTER(2)
        QUARTER(3)
#undef QUARTER
    }
    for (; k < fours; k++) {
        const nibble_step s = read_step(tile + k * STEP);
        UNROLL for (int c = 0; c < columns; c++) {
            const int8x16_t by = vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(x + c * stride + 4 * k)));
            UNROLL for (int i = 0; i < 4; i++) sum[c][i] = vdotq_s32(sum[c][i], s.rows[i], by);
        }
    }
    UNROLL for (int c = 0; c < columns; c++) UNROLL for (int i = 0; i < 4; i++)
        vst1q_s32(sums[c] + 4 * i, vshlq_n_s32(sum[c][i], 1));
}
#else
#define RUN 16 /* steps whose sums fit into 16 bits: 16 * 15 * 128 < 2^15 */

/* Two vectors of 16 bits for each four rows: two rows each, four columns apart. */
TARGET INLINE void multiply_nibbles(const uint8_t *tile, int64_t fours, const int8_t *x, int64_t stride,
                                    const int columns, int32_t (*sums)[LANES]) {
    for (int c = 0; c < columns; c++, x += stride) {
        int32x4_t sum[8]; /* of two rows each, in halves */
        UNROLL for (int i = 0; i < 8; i++) sum[i] = vdupq_n_s32(0);
        for (int64_t begin = 0; begin < fours; begin += RUN) {
            const int64_t end = begin + RUN < fours ? begin + RUN : fours;
            int16x8_t part[8];
            UNROLL for (int i = 0; i < 8; i++) part[i] = vdupq_n_s16(0);
            for (int64_t k = begin; k < end; k++) {
                const nibble_step s = read_step(tile + k * STEP);
                const int8x16_t by = vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(x + 4 * k)));
                UNROLL for (int i = 0; i < 4; i++) {
                    part[2 * i] = vmlal_s8(part[2 * i], vget_low_s8(s.rows[i]), vget_low_s8(by));
                    part[2 * i + 1] = vmlal_high_s8(part[2 * i + 1], s.rows[i], by);
                }
            }
            UNROLL for (int i = 0; i < 8; i++) sum[i] = vpadalq_s16(sum[i], part[i]);
        }
        UNROLL for (int i = 0; i < 4; i++)
            vst1q_s32(sums[c] + 4 * i, vshlq_n_s32(vpaddq_s32(sum[2 * i], sum[2 * i + 1]), 1));
    }
}
#endif

TARGET HIDDEN void NIBBLES(const uint8_t *tile, int64_t fours, const int8_t *planes, int64_t stride, int columns,
                           int32_t (*sums)[LANES]) {
    int c = 0;
    for (; c + MOST_NIBBLE_COLUMNS <= columns; c += MOST_NIBBLE_COLUMNS)
        multiply_nibbles(tile, fours, planes + c * stride, stride, MOST_NIBBLE_COLUMNS, sums + c);
    const int8_t *const x = planes + c * stride;
    switch (columns - c) {
        case 3: multiply_nibbles(tile, fours, x, stride, 3, sums + c); break;
        case 2: multiply_nibbles(tile, fours, x, stride, 2, sums + c); break;
        case 1: multiply_nibbles(tile, fours, x, stride, 1, sums + c); break;
        default: break;
    }
}
