// Portable kernels: plain C++, vectorised by the compiler where it can. Also the tail of the others.
#include <cstring>

#include "kernels.h"

namespace fmn {
namespace {

void count_row(const uint8_t* row, const uint8_t* ref, int64_t n, int64_t* right, int64_t* retained) {
    int64_t n_right = 0, n_retained = 0;
    for (int64_t start = 0; start < n; start += 255) {  // 255 ones fit the byte accumulators the compiler may choose
        const int64_t stop = start + 255 < n ? start + 255 : n;
        uint32_t block_right = 0, block_retained = 0;
        for (int64_t i = start; i < stop; ++i) {
            block_right += row[i] != 0;
            block_retained += (row[i] != 0) & (ref[i] != 0);
        }
        n_right += block_right;
        n_retained += block_retained;
    }
    *right = n_right;
    *retained = n_retained;
}

// Population count by pairs, nibbles and one multiplication: no instruction beyond 64-bit integers.
inline int64_t popcount(uint64_t v) {
    v -= (v >> 1) & 0x5555555555555555u;
    v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
    return static_cast<int64_t>((((v + (v >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u) >> 56);
}

int64_t count_and(const uint8_t* a, const uint8_t* b, int64_t n_bytes) {
    int64_t total = 0, i = 0;
    for (; i + 8 <= n_bytes; i += 8) {
        uint64_t x, y;
        std::memcpy(&x, a + i, 8);
        std::memcpy(&y, b + i, 8);
        total += popcount(x & y);
    }
    for (; i < n_bytes; ++i) total += popcount(a[i] & b[i]);
    return total;
}

void update_samples(const uint8_t* before, const uint8_t* now, int64_t n, uint8_t e, SampleBlock* block) {
    update_samples_loop(before, now, n, e, block);
}

}  // namespace

const Kernels base_kernels = {"base", count_row, count_and, update_samples};

}  // namespace fmn
