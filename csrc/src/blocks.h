// Counts of one block of a matrix, in either format: the work of one thread between two locks.
#pragma once
#include <algorithm>
#include <cstring>

#include "loops.h"

namespace fmn {

// First byte of row e from sample i on; for bits, i is a multiple of 8.
inline const uint8_t* at(const fmn_matrix* m, int64_t e, int64_t i) {
    return m->data + e * m->stride + (m->format == FMN_BITS ? i / 8 : i);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }  // a + b - 1 may overflow

inline int64_t row_bytes(const fmn_matrix* m) { return m->format == FMN_BITS ? ceil_div(m->n_samples, 8) : m->n_samples; }

// Mask of the bits in a row's last, incomplete byte; 0 if all bytes are complete.
inline uint8_t tail_mask(int64_t n_samples) { return static_cast<uint8_t>((1 << n_samples % 8) - 1); }

inline int popcount8(unsigned v) {
    int n = 0;
    for (; v; v &= v - 1) ++n;
    return n;
}

constexpr int64_t reference_piece = 1 << 19;  // samples: 64 KiB of bits

// A piece of the reference row as bits: a pointer into the matrix, or a packed copy.
struct ReferencePiece {
    const uint8_t* bits;
    uint8_t packed[reference_piece / 8];

    void read(const Kernels& k, const fmn_matrix* m, int64_t reference, int64_t start, int64_t n) {
        bits = m->format == FMN_BITS ? at(m, reference, start) : packed;
        if (m->format == FMN_BYTES) k.pack(at(m, reference, start), n, packed);
    }
};

// Counts right and retained of n_rows epochs from e on, in a piece of the samples.
inline void count(const Kernels& k, const fmn_matrix* m, int64_t e, int n_rows, int64_t start, int64_t n, const uint8_t* ref,
           int64_t* counts) {
    const uint8_t* rows[count_rows];
    for (int r = 0; r < n_rows; ++r) rows[r] = at(m, e + r, start);
    if (m->format == FMN_BYTES) return k.count_bytes(rows, n_rows, ref, n, counts);
    k.count_bits(rows, n_rows, ref, n / 8, counts);
    const uint8_t mask = tail_mask(n);
    for (int r = 0; mask && r < n_rows; ++r) {
        counts[2 * r] += popcount8(rows[r][n / 8] & mask);
        counts[2 * r + 1] += popcount8(rows[r][n / 8] & ref[n / 8] & mask);
    }
}

// Computes forgotten and learned from right and retained; all four are sums over the same samples.
inline void derive(int64_t* counts, int64_t plane, int64_t n_epochs, int64_t reference) {
    for (int64_t i = 0; i < plane; ++i) {
        const int64_t right_at_reference = counts[i / n_epochs * n_epochs + reference];
        counts[plane + i] = counts[i] - counts[3 * plane + i];
        counts[2 * plane + i] = right_at_reference - counts[3 * plane + i];
    }
}

// Into the level-2 cache: the level-1 cache is too small for the next rows. GCC takes a function that only prefetches for one
// without effect, and drops its calls unless they are inlined first.
FMN_INLINE void prefetch(const uint8_t* bytes, int64_t n) {
#ifdef __GNUC__
    for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(bytes + i, 0, 1);
#endif
}

// Rows of a block of samples as bits in whole words: pointers into the matrix, or copies.
class Rows {
public:
    Rows(const Kernels& k, const fmn_matrix* m, int64_t start, int64_t n) : k_(k), m_(m), start_(start), n_(n) {
        copied_ = m->format == FMN_BYTES || n % 64 > 0;
        // Bytes are read and prefetched between the updates, so that memory and processor work at the same time.
        step = m->format == FMN_BYTES ? 512 : SampleBlock::size;
    }

    int64_t step;  // samples of one read

    // Samples from i on, at epochs e to e + n_rows - 1; the other rows are zeros.
    const uint8_t* const* read(int64_t e, int n_rows, int64_t i) {
        static const uint8_t zeros[SampleBlock::size / 8] = {};
        const int64_t n = std::min(step, n_ - i);
        for (int r = 0; r < sample_rows; ++r) {
            rows_[r] = r < n_rows ? at(m_, e + r, start_) : zeros;
            if (!copied_ || r >= n_rows) continue;
            if (m_->format == FMN_BITS) std::memcpy(copies_[r], rows_[r], static_cast<size_t>(ceil_div(n_, 8)));
            else {
                const uint8_t* next = at(m_, std::min(e + r + sample_rows, m_->n_epochs - 1), start_) + i;
                prefetch(next, n);
                k_.pack(rows_[r] + i, n, copies_[r] + i / 8);
            }
            rows_[r] = copies_[r];
        }
        return rows_;
    }

private:
    const Kernels& k_;
    const fmn_matrix* m_;
    int64_t start_, n_;
    bool copied_;
    const uint8_t* rows_[sample_rows];
    uint8_t copies_[sample_rows][SampleBlock::size / 8] = {};
};

inline void count_samples(const Kernels& k, const fmn_matrix* m, int64_t start, int64_t size, int32_t* counts) {
    SampleBlock block = {};
    Rows rows(k, m, start, size);
    const int32_t n_epochs = static_cast<int32_t>(m->n_epochs);
    for (int32_t base = 0, length; base < n_epochs; base += length) {
        length = std::min(n_epochs - base, SampleBlock::max_epochs);
        for (int32_t e = 0; e < length; e += sample_rows) {
            const int n_rows = std::min(length - e, sample_rows);
            for (int64_t i = 0; i < size; i += rows.step) {
                const uint8_t* const* read = rows.read(base + e, n_rows, i);
                k.update_samples(read, n_rows, i / 64, ceil_div(std::min(i + rows.step, size), 64), e, &block);
            }
        }
        k.add_samples(block, size, base, length, counts + start, m->n_samples);
        std::memset(block.planes, 0, sizeof block.planes);
        std::memset(block.seen, 0, sizeof block.seen);
    }
}

// A tile of the all-pairs matrix: 32 rows against 32, in pieces of the samples that stay in the level-2 cache.
struct OverlapTile {
    static constexpr int rows = 32;
    static constexpr int64_t piece = 2048;  // bytes of bits
    int64_t counts[rows][rows] = {};
    uint8_t packed[2][rows][piece];
    const uint8_t *a[rows], *b[rows];

    // Reads rows i, i + 1, ... as bits. Places past the last row repeat it: count_overlaps takes several rows at once.
    void read(const Kernels& k, const fmn_matrix* m, int64_t i, int64_t start, int64_t n, int side, int n_places) {
        const uint8_t** out = side ? b : a;
        for (int64_t row = 0; row < n_places; ++row) {
            const int64_t e = std::min(i + row, m->n_epochs - 1);
            out[row] = m->format == FMN_BITS ? at(m, e, start) : packed[side][row];
            if (m->format == FMN_BYTES) k.pack(at(m, e, start), n, packed[side][row]);
        }
    }

    void add(const Kernels& k, const fmn_matrix* m, int64_t i0, int64_t j0, int64_t start, int64_t n) {
        const int n_i = static_cast<int>(std::min<int64_t>(rows, m->n_epochs - i0));
        const int n_j = static_cast<int>(std::min<int64_t>(rows, m->n_epochs - j0));
        read(k, m, i0, start, n, 0, (n_i + overlap_rows - 1) / overlap_rows * overlap_rows);
        read(k, m, j0, start, n, 1, (n_j + overlap_columns - 1) / overlap_columns * overlap_columns);
        for (int i = 0; i < n_i; i += overlap_rows)
            for (int j = i0 == j0 ? i / overlap_columns * overlap_columns : 0; j < n_j; j += overlap_columns)
                k.count_overlaps(a + i, b + j, n / 8, &counts[i][j], rows);
        const uint8_t mask = tail_mask(n);
        for (int i = 0; mask && i < n_i; ++i)
            for (int j = 0; j < n_j; ++j) counts[i][j] += popcount8(a[i][n / 8] & b[j][n / 8] & mask);
    }
};

}  // namespace fmn
