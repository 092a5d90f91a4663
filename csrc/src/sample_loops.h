// Plain loops, as in loops.h, over the epochs of each sample: statistics of samples, and sums within groups.
#pragma once
#include "loops.h"

namespace fmn {
namespace loops {

using Planes = uint64_t[8][SampleBlock::words];

// Adds to the numbers of word w how many of eight bits are set: full adders, three bits to two, then the carry.
FMN_INLINE uint64_t add3(uint64_t& sum, uint64_t b, uint64_t c) {
    const uint64_t a = sum;
    sum = a ^ b ^ c;
    return (a & b) | ((a ^ b) & c);
}
FMN_INLINE void add8(const uint64_t* bits, Planes& planes, int64_t w) {
    const uint64_t twos[4] = {add3(planes[0][w], bits[0], bits[1]), add3(planes[0][w], bits[2], bits[3]),
                              add3(planes[0][w], bits[4], bits[5]), add3(planes[0][w], bits[6], bits[7])};
    const uint64_t fours[2] = {add3(planes[1][w], twos[0], twos[1]), add3(planes[1][w], twos[2], twos[3])};
    uint64_t carry = add3(planes[2][w], fours[0], fours[1]);
    for (int p = 3; p < 8; ++p) {
        const uint64_t both = planes[p][w] & carry;
        planes[p][w] ^= carry;
        carry = both;
    }
}

// Sets the numbers of word w, where one of eight bits is set, to 8 * high + the place of the last one; with the bits in reverse
// order and `flip`, of the first.
FMN_INLINE void set_place(const uint64_t* bits, uint64_t where, const uint64_t* high, uint64_t flip, Planes& planes,
                          int64_t w) {
    const uint64_t above5 = bits[6] | bits[7], above3 = above5 | bits[4] | bits[5];
    const uint64_t low[3] = {bits[7] | (~bits[6] & (bits[5] | (~bits[4] & (bits[3] | (~bits[2] & bits[1]))))),
                             above5 | (~above3 & (bits[2] | bits[3])), above3};
    for (int p = 0; p < 8; ++p) planes[p][w] = (planes[p][w] & ~where) | ((p < 3 ? low[p] ^ flip : high[p - 3]) & where);
}
FMN_INLINE uint64_t any8(const uint64_t* bits) {
    return (bits[0] | bits[1] | bits[2]) | (bits[3] | bits[4] | bits[5]) | (bits[6] | bits[7]);
}

// A loop per number: its planes stay in registers.
FMN_INLINE void update_samples(const uint8_t* const* rows, int n_rows, int64_t begin, int64_t end, int e, SampleBlock* block) {
    constexpr int n = sample_rows;
    uint64_t valid[n], high[5], bits[n];
    for (int k = 0; k < n; ++k) valid[k] = k < n_rows ? ~uint64_t(0) : 0;
    for (int p = 0; p < 5; ++p) high[p] = (e >> (3 + p) & 1) ? ~uint64_t(0) : 0;
    FMN_NO_ALIAS  // the rows do not overlap the block
    for (int64_t w = begin; w < end; ++w) {
        for (int k = 0; k < n; ++k) bits[k] = ~load<uint64_t>(rows[k] + 8 * w) & valid[k];
        add8(bits, block->planes[SampleBlock::wrong], w);
    }
    FMN_NO_ALIAS
    for (int64_t w = begin; w < end; ++w) {
        for (int k = 0; k < n; ++k) bits[k] = ~load<uint64_t>(rows[k] + 8 * w) & valid[k];
        set_place(bits, any8(bits), high, 0, block->planes[SampleBlock::last_wrong], w);
    }
    FMN_NO_ALIAS
    for (int64_t w = begin; w < end; ++w) {
        for (int k = 0; k < n; ++k)
            bits[k] = ~load<uint64_t>(rows[k] + 8 * w) & valid[k] & (k > 0 ? load<uint64_t>(rows[k - 1] + 8 * w) : block->was[w]);
        block->was[w] = load<uint64_t>(rows[n - 1] + 8 * w);
        add8(bits, block->planes[SampleBlock::events], w);
    }
    FMN_NO_ALIAS
    for (int64_t w = begin; w < end; ++w) {
        for (int k = 0; k < n; ++k) bits[k] = load<uint64_t>(rows[k] + 8 * w);
        set_place(bits, any8(bits), high, 0, block->planes[SampleBlock::last], w);
    }
    FMN_NO_ALIAS
    for (int64_t w = begin; w < end; ++w) {
        for (int k = 0; k < n; ++k) bits[k] = load<uint64_t>(rows[n - 1 - k] + 8 * w);
        const uint64_t any = any8(bits);
        set_place(bits, any & ~block->seen[w], high, ~uint64_t(0), block->planes[SampleBlock::first], w);
        block->seen[w] |= any;
    }
}

// Eight bytes at a time, as the rows of 8 x 8 bits; swaps blocks of one, two and four bits.
FMN_INLINE void transpose_from(int64_t begin, const uint8_t* const* rows, int64_t n, uint8_t* out) {
    FMN_NO_ALIAS
    for (int64_t i = begin / 8; i < (n + 7) / 8; ++i) {
        uint64_t v = 0;
        for (int k = 0; k < 8; ++k) v |= uint64_t(rows[k][i]) << 8 * k;
        uint64_t t = (v ^ v >> 7) & 0x00AA00AA00AA00AAu;
        v ^= t ^ t << 7;
        t = (v ^ v >> 14) & 0x0000CCCC0000CCCCu;
        v ^= t ^ t << 14;
        t = (v ^ v >> 28) & 0x00000000F0F0F0F0u;
        v ^= t ^ t << 28;
        for (int k = 0; k < 8; ++k) out[8 * i + k] = static_cast<uint8_t>(v >> 8 * k);
    }
}
FMN_INLINE void transpose(const uint8_t* const* rows, int64_t n, uint8_t* out) { transpose_from(0, rows, n, out); }

template <void (*transpose)(const uint8_t* const* rows, int64_t n, uint8_t* out)>
FMN_INLINE void add_samples(const SampleBlock& block, int64_t n, int32_t base, int32_t length, int32_t* counts,
                            int64_t stride) {
    using B = SampleBlock;
    uint8_t numbers[B::n_numbers][B::size];
    for (int number = 0; number < B::n_numbers; ++number) {
        const uint8_t* planes[8];
        for (int p = 0; p < 8; ++p) planes[p] = reinterpret_cast<const uint8_t*>(block.planes[number][p]);
        transpose(planes, n, numbers[number]);
    }
    int32_t *first = counts, *last = first + stride, *events = last + stride, *right = events + stride, *wrong = right + stride;
    FMN_NO_ALIAS
    for (int64_t i = 0; i < n; ++i) {
        const int32_t n_wrong = numbers[B::wrong][i];
        const bool any_right = n_wrong < length, begin = base == 0;
        const int32_t was_first = begin ? -1 : first[i], was_last = begin ? -1 : last[i], was_wrong = begin ? -1 : wrong[i];
        first[i] = (was_first < 0) & any_right ? base + numbers[B::first][i] : was_first;
        last[i] = any_right ? base + numbers[B::last][i] : was_last;
        wrong[i] = n_wrong > 0 ? base + numbers[B::last_wrong][i] : was_wrong;
        events[i] = (begin ? 0 : events[i]) + numbers[B::events][i];
        right[i] = (begin ? 0 : right[i]) + length - n_wrong;
    }
}

// The epochs at which each sample is right; only of those that are wrong, or right, at the reference epoch.
struct CountBits {
    uint32_t right[2][GroupBlock::size];

    FMN_INLINE void read(const GroupBlock& b, const uint8_t* const* bytes) {
        const uint8_t* const bits[4] = {bytes[0], bytes[1], bytes[2], bytes[3]};
        FMN_NO_ALIAS
        for (int64_t i = 0; i < b.n_samples; ++i) {
            const uint32_t all = bits[0][i] | uint32_t(bits[1][i]) << 8 | uint32_t(bits[2][i]) << 16 | uint32_t(bits[3][i]) << 24;
            right[1][i] = all & (0 - uint32_t(b.at_end[i]));
            right[0][i] = all ^ right[1][i];
        }
    }
};

FMN_INLINE void add_counts(const GroupBlock& b, const uint8_t* const* right, CountLines* lines) {
    CountBits bits;
    bits.read(b, right);
    for (const Run* run = b.runs; run < b.runs + b.n_runs; ++run)
        for (int64_t k = run->begin; k < run->end; ++k) {
            const int at_end = b.at_end[b.order[k]];
            uint16_t* counts = lines[run->group].counts[at_end];
            for (int half = 0; half < 2; ++half, counts += 16) {
                const uint16_t now = static_cast<uint16_t>(bits.right[at_end][b.order[k]] >> 16 * half);
                FMN_NO_ALIAS
                for (int j = 0; j < 16; ++j)
                    counts[j] = static_cast<uint16_t>(counts[j] + ((now & static_cast<uint16_t>(1 << j)) != 0));
            }
        }
}

FMN_INLINE void add_weights(const GroupBlock& b, const uint8_t* right, WeightLines* lines) {
    for (const Run* run = b.runs; run < b.runs + b.n_runs; ++run)
        for (int64_t k = run->begin; k < run->end; ++k) {
            const int64_t i = b.order[k];
            auto& sums = lines[run->group].sums;
            const double w = b.weights[i];
            for (int j = 0; j < weight_lanes; ++j) {
                const bool now = right[i] >> j & 1, at_end = b.at_end[i];
                if (now) sums[0][j] += w;
                if (now != at_end) sums[now ? 1 : 2][j] += w;
                if (now & at_end) sums[3][j] += w;
            }
        }
}

}  // namespace loops
}  // namespace fmn
