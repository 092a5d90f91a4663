// AVX2 kernels. Function attributes, not compiler flags, select the instruction set, so nothing else in the program is
// compiled for AVX2; no <vector> or <algorithm> here for the same reason.
#include "kernels.h"

#ifdef FMN_HAVE_AVX2
#include <immintrin.h>
#define FMN_AVX2 __attribute__((target("avx2,popcnt")))

namespace fmn {
namespace {

FMN_AVX2 inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

FMN_AVX2 inline int64_t sum(__m256i v) {  // of four 64-bit lanes
    return _mm256_extract_epi64(v, 0) + _mm256_extract_epi64(v, 1) + _mm256_extract_epi64(v, 2) +
           _mm256_extract_epi64(v, 3);
}

// Per 32 bytes: compare with zero (0xFF where wrong) and subtract from byte counters; vpsadbw widens them every 255 steps,
// before they can overflow. Counts wrong and wrong-at-either, the complements of what is wanted.
FMN_AVX2 void count_row(const uint8_t* row, const uint8_t* ref, int64_t n, int64_t* right, int64_t* retained) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i wrong64 = zero, either64 = zero;
    int64_t i = 0;
    while (i + 32 <= n) {
        __m256i wrong8 = zero, either8 = zero;
        const int64_t blocks = (n - i) / 32 < 255 ? (n - i) / 32 : 255;
        for (int64_t k = 0; k < blocks; ++k, i += 32) {
            const __m256i wrong = _mm256_cmpeq_epi8(load(row + i), zero);
            const __m256i wrong_ref = _mm256_cmpeq_epi8(load(ref + i), zero);
            wrong8 = _mm256_sub_epi8(wrong8, wrong);
            either8 = _mm256_sub_epi8(either8, _mm256_or_si256(wrong, wrong_ref));
        }
        wrong64 = _mm256_add_epi64(wrong64, _mm256_sad_epu8(wrong8, zero));
        either64 = _mm256_add_epi64(either64, _mm256_sad_epu8(either8, zero));
    }
    int64_t tail_right, tail_retained;
    base_kernels.count_row(row + i, ref + i, n - i, &tail_right, &tail_retained);
    *right = i - sum(wrong64) + tail_right;
    *retained = i - sum(either64) + tail_retained;
}

// One popcnt per 8 bytes, in four independent sums.
FMN_AVX2 int64_t count_and(const uint8_t* a, const uint8_t* b, int64_t n_bytes) {
    int64_t total[4] = {0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 32 <= n_bytes; i += 32) {
        uint64_t x[4], y[4];
        __builtin_memcpy(x, a + i, 32);
        __builtin_memcpy(y, b + i, 32);
        for (int k = 0; k < 4; ++k) total[k] += __builtin_popcountll(x[k] & y[k]);
    }
    return total[0] + total[1] + total[2] + total[3] + base_kernels.count_and(a + i, b + i, n_bytes - i);
}

// 32 samples a step.
FMN_AVX2 void update_samples(const uint8_t* before, const uint8_t* now, int64_t n, uint8_t e, SampleBlock* block) {
    update_samples_loop(before, now, n, e, block);
}

}  // namespace

const Kernels avx2_kernels = {"avx2", count_row, count_and, update_samples};

}  // namespace fmn
#endif
