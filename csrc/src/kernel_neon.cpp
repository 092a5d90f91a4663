// NEON kernels for 64-bit Arm, where NEON is always available. The compiler vectorises the plain loops, except the counts of
// bits (vcntq_u8 has no scalar equivalent) and packing.
#include "sample_loops.h"

#ifdef FMN_NEON
#include <arm_neon.h>

namespace fmn {
namespace {

const uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};  // bit k of a byte, twice

// Byte counters of 16 samples at a time, widened every 255 steps, before they can overflow. Bound by memory.
void count_bytes(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    const uint8x16_t place = vld1q_u8(places);
    for (int r = 0; r < n_rows; ++r, counts += 2) {
        counts[0] = counts[1] = 0;
        int64_t i = 0;
        while (i + 16 <= n) {
            uint8x16_t right8 = vdupq_n_u8(0), retained8 = right8;
            const int64_t steps = (n - i) / 16 < 255 ? (n - i) / 16 : 255;
            for (int64_t k = 0; k < steps; ++k, i += 16) {
                const uint8x16_t v = vld1q_u8(rows[r] + i), now = vtstq_u8(v, v);
                const uint8x16_t end = vcombine_u8(vdup_n_u8(ref[i / 8]), vdup_n_u8(ref[i / 8 + 1]));
                right8 = vsubq_u8(right8, now);
                retained8 = vsubq_u8(retained8, vandq_u8(now, vtstq_u8(end, place)));
            }
            counts[0] += vaddlvq_u8(right8);
            counts[1] += vaddlvq_u8(retained8);
        }
        loops::count_bytes_from(i, rows[r], ref, n, counts);
    }
}

// Byte counters grow by at most 8 a step: 31 steps before they are widened. Bound by memory.
void count_bits(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    for (int r = 0; r < n_rows; ++r, counts += 2) {
        counts[0] = counts[1] = 0;
        int64_t i = 0;
        while (i + 16 <= n) {
            uint8x16_t right8 = vdupq_n_u8(0), retained8 = right8;
            const int64_t steps = (n - i) / 16 < 31 ? (n - i) / 16 : 31;
            for (int64_t k = 0; k < steps; ++k, i += 16) {
                const uint8x16_t now = vld1q_u8(rows[r] + i);
                right8 = vaddq_u8(right8, vcntq_u8(now));
                retained8 = vaddq_u8(retained8, vcntq_u8(vandq_u8(now, vld1q_u8(ref + i))));
            }
            counts[0] += vaddlvq_u8(right8);
            counts[1] += vaddlvq_u8(retained8);
        }
        loops::count_bits_from(i, rows[r], ref, n, counts);
    }
}

void count_overlaps(const uint8_t* const* a, const uint8_t* const* b, int64_t n, int64_t* counts, int64_t stride) {
    int64_t at = 0;
    while (at + 16 <= n) {
        uint8x16_t sum8[overlap_rows][overlap_columns];
        for (auto& row : sum8)
            for (auto& s : row) s = vdupq_n_u8(0);
        const int64_t steps = (n - at) / 16 < 31 ? (n - at) / 16 : 31;
        for (int64_t step = 0; step < steps; ++step, at += 16) {
            const uint8x16_t rows[overlap_rows] = {vld1q_u8(a[0] + at), vld1q_u8(a[1] + at), vld1q_u8(a[2] + at), vld1q_u8(a[3] + at)};
            for (int k = 0; k < overlap_columns; ++k) {
                const uint8x16_t column = vld1q_u8(b[k] + at);
                for (int i = 0; i < overlap_rows; ++i) sum8[i][k] = vaddq_u8(sum8[i][k], vcntq_u8(vandq_u8(rows[i], column)));
            }
        }
        for (int i = 0; i < overlap_rows; ++i)
            for (int k = 0; k < overlap_columns; ++k) counts[i * stride + k] += vaddlvq_u8(sum8[i][k]);
    }
    if (at < n) loops::count_overlaps_from(at, a, b, n, counts, stride);
}

// Each byte keeps the one bit of its place; pairwise additions gather eight of them into one byte.
void pack(const uint8_t* bytes, int64_t n, uint8_t* bits) {
    const uint8x16_t mask = vld1q_u8(places);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const uint8x16_t v = vld1q_u8(bytes + i), own = vandq_u8(vtstq_u8(v, v), mask);
        bits[i / 8] = vaddv_u8(vget_low_u8(own));
        bits[i / 8 + 1] = vaddv_u8(vget_high_u8(own));
    }
    loops::pack(bytes + i, n - i, bits + i / 8);
}

}  // namespace

const Kernels neon_kernels = {
    "neon",        count_bytes,           count_bits,            count_overlaps,    pack,              loops::unpack,
    loops::compare, loops::compare_scores, loops::update_samples, loops::add_samples<loops::transpose>, loops::transpose, loops::add_counts, loops::add_weights,
    loops::mean, loops::sums_to_one, loops::interval, loops::right_at};

}  // namespace fmn
#endif
