/* The kernels of codes 3inst and mcg with AVX512-FP16, which adds the two halves of a state as these codes are defined. */
#include "trellis.h"

#if defined(TRELLIS_FP16)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512fp16")))
#define STATES 32 /* in one vector, of 16 bits each */
#define GROUPS (TILE_WEIGHTS / STATES)

/* Each 64 bits get the eight bytes in which four states begin, the first byte highest (places[0]), of which eight bits from
 * any bit on make a byte of a state (places[1]). */
static void prepare(trellis_plan *plan) {
    for (int l = 0; l < STATES; l++) {
        const int step_bits = plan->pair_bits / 2; /* these codes have no half bits */
        const int four = l / 4 * 4, byte = four * step_bits / 8, begin = l * step_bits - 8 * byte;
        /* memory has the second byte of a word first */
        for (int i = 0; i < 8; i++) plan->places[0][2 * four + 7 - i] = (uint8_t)((byte + i) ^ 1);
        for (int i = 0; i < 2; i++) plan->places[1][2 * l + i] = (uint8_t)(48 - begin + 8 * i);
    }
}

TARGET INLINE __m512i states(const trellis_plan *plan, const int16_t *tile, int group) {
    const int16_t *from = tile + group * plan->pair_bits;
    /* With less than 8 bits the states lie in 32 bytes; a load of only these crosses two cache lines less often. */
    __m512i bytes = plan->pair_bits < 16 ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)from))
                                         : _mm512_loadu_si512(from);
    if (group + 1 == GROUPS) bytes = _mm512_mask_set1_epi16(bytes, (__mmask32)1 << plan->pair_bits, tile[0]);
    const __m512i eight = _mm512_permutexvar_epi8(_mm512_load_si512(plan->places[0]), bytes);
    return _mm512_multishift_epi64_epi8(_mm512_load_si512(plan->places[1]), eight);
}

/* The weights of states s, as float16. */
TARGET INLINE __m512i values_of(__m512i s, int code) {
    const uint32_t factor = code == TRELLIS_3INST ? 89226354u : 0xcbac1fedu, addend = code == TRELLIS_3INST ? 64248484u : 0;
    const __m512i factor_low = _mm512_set1_epi16((int16_t)factor), factor_high = _mm512_set1_epi16((int16_t)(factor >> 16));
    __m512i low = _mm512_mullo_epi16(s, factor_low);
    __m512i high = _mm512_add_epi16(_mm512_mulhi_epu16(s, factor_low), _mm512_mullo_epi16(s, factor_high));
    if (addend) {
        const __m512i more = _mm512_set1_epi16((int16_t)addend);
        low = _mm512_add_epi16(low, more);
        high = _mm512_add_epi16(high, _mm512_set1_epi16((int16_t)(addend >> 16)));
        high = _mm512_mask_sub_epi16(high, _mm512_cmplt_epu16_mask(low, more), high, _mm512_set1_epi16(-1)); /* the carry */
    }
    const __m512i mask = _mm512_set1_epi16((int16_t)0x8fff), constant = _mm512_set1_epi16(0x3b60);
    low = _mm512_ternarylogic_epi64(low, mask, constant, 0x6a); /* a & b ^ c */
    high = _mm512_ternarylogic_epi64(high, mask, constant, 0x6a);
    return (__m512i)_mm512_add_ph((__m512h)low, (__m512h)high);
}

/* As float32. Through memory, because that does not use the arithmetic units, which are the bottleneck. */
TARGET INLINE void widen(__m512i weights, __m512 *first, __m512 *second) {
    __m256i halves[2] __attribute__((aligned(64)));
    _mm512_store_si512(halves, weights);
    __asm__("" : "+m"(halves));
    *first = _mm512_cvtph_ps(halves[0]);
    *second = _mm512_cvtph_ps(halves[1]);
}

TARGET INLINE void decode_as(const trellis_plan *plan, const int16_t *tile, float *weights, int code) {
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; g++) {
        __m512 first, second;
        widen(values_of(states(plan, tile, g), code), &first, &second);
        _mm512_storeu_ps(weights + STATES * g, first);
        _mm512_storeu_ps(weights + STATES * g + TILE, second);
    }
}

TARGET INLINE void products_as(const trellis_plan *plan, const int16_t *codes, int64_t tiles, const float *views,
                               float *sums, int code) {
    __m512 sum[2 * GROUPS];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * GROUPS; i++) sum[i] = _mm512_loadu_ps(sums + TILE * i);
    for (int64_t t = 0; t < tiles; t++) {
        const int16_t *tile = codes + t * (TILE / 2 * plan->pair_bits);
        const __m512 x[2] = {_mm512_loadu_ps(views + 2 * TILE * t), _mm512_loadu_ps(views + 2 * TILE * t + TILE)};
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) {
            __m512 first, second;
            widen(values_of(states(plan, tile, g), code), &first, &second);
            sum[2 * g] = _mm512_fmadd_ps(first, x[0], sum[2 * g]);
            sum[2 * g + 1] = _mm512_fmadd_ps(second, x[1], sum[2 * g + 1]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * GROUPS; i++) _mm512_storeu_ps(sums + TILE * i, sum[i]);
}

TARGET static void decode(const trellis_plan *plan, const int16_t *tile, float *weights) {
    if (plan->code == TRELLIS_3INST)
        decode_as(plan, tile, weights, TRELLIS_3INST);
    else
        decode_as(plan, tile, weights, TRELLIS_MCG);
}

TARGET static void products(const trellis_plan *plan, const int16_t *codes, int64_t tiles, const float *views,
                            float *sums) {
    if (plan->code == TRELLIS_3INST)
        products_as(plan, codes, tiles, views, sums, TRELLIS_3INST);
    else
        products_as(plan, codes, tiles, views, sums, TRELLIS_MCG);
}

HIDDEN void quip_trellis_use_fp16(trellis_kernels *kernels, int code) {
    if (code != TRELLIS_3INST && code != TRELLIS_MCG) return;
    kernels->prepare = prepare;
    kernels->decode = decode;
    kernels->products = products;
}
#endif
