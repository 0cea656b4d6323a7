/* Tables of the E8P codebook, made when they are first needed. */
#include <pthread.h>
#include <string.h>

#include "common.h"

HIDDEN const char quip_e8p_triples[TRIPLES][4] = {E8P_TRIPLES};

HIDDEN uint64_t quip_e8p_pattern[256], quip_e8p_signs[256];
HIDDEN uint8_t quip_e8p_low[256], quip_e8p_high[256];

/* w = (q - 7.5) + shift for q = 7.5 +/- |v|, which is 15 - q with the other sign: in q, a sign is an exclusive or
 * with 15. The byte is 4 q, and 2 more where the shift is + 1/4. */
static void add_pattern(int pattern, const int *digits) {
    uint8_t bytes[BLOCK];
    int odd = 0;
    for (int i = 0; i < BLOCK; i++) {
        bytes[i] = (uint8_t)((8 | digits[i]) << 2);
        odd ^= digits[i] & 1;
        uint8_t *packed = i < 4 ? &quip_e8p_low[pattern] : &quip_e8p_high[pattern];
        *packed = (uint8_t)(*packed | digits[i] << 2 * (i & 3));
    }
    if (odd) bytes[7] ^= 15 << 2;
    memcpy(&quip_e8p_pattern[pattern], bytes, sizeof bytes);
}

static void make(void) {
    static const int sign_bit[BLOCK] = {0, 4, 1, 5, 2, 6, 3, 7};
    int pattern = 0, digits[BLOCK];
    for (int key = 0; key < 6561; key++) { /* 3^8 */
        int rest = key, norm = 0;          /* four times the squared norm, less 8 */
        for (int i = BLOCK - 1; i >= 0; i--, rest /= 3) {
            digits[i] = rest % 3;
            norm += digits[i] == 0 ? 0 : digits[i] == 1 ? 8 : 24;
        }
        if (norm <= 32) add_pattern(pattern++, digits);
    }
    for (int t = 0; t < TRIPLES; t++) {
        for (int i = 0; i < BLOCK; i++) digits[i] = !memchr(quip_e8p_triples[t], '0' + i, 3);
        add_pattern(pattern++, digits);
    }
    for (int code = 0; code < 256; code++) {
        uint8_t bytes[BLOCK];
        int parity = 0;
        for (int bit = 0; bit < 8; bit++) parity ^= code >> bit & 1;
        for (int i = 0; i < BLOCK; i++)
            bytes[i] = (uint8_t)(((code ^ parity) >> sign_bit[i] & 1 ? 15 << 2 : 0) | (parity ? 0 : 2));
        memcpy(&quip_e8p_signs[code], bytes, sizeof bytes);
    }
}

HIDDEN void quip_e8p_make_tables(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make);
}
