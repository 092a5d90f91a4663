// Counts of one block of a matrix, in either format: the work of one thread between two locks.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernels.h"

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

// Adds the statistics of a block, whose epochs begin at `base`, to the counts of its samples (rows of n).
inline void add_block(const SampleBlock& block, int64_t size, int32_t base, int32_t length, int64_t n, int32_t* counts) {
    int32_t *first = counts, *last = counts + n, *events = counts + 2 * n, *right = counts + 3 * n, *wrong = counts + 4 * n;
    for (int row = 0; base == 0 && row < 5; ++row) std::fill_n(counts + row * n, size, row == 2 || row == 3 ? 0 : -1);
    FMN_NO_ALIAS
    for (int64_t i = 0; i < size; ++i) {
        const int32_t n_wrong = block.wrong[i];
        first[i] = (first[i] < 0) & (n_wrong < length) ? base + block.first[i] : first[i];
        last[i] = n_wrong < length ? base + block.last[i] : last[i];
        wrong[i] = n_wrong > 0 ? base + block.last_wrong[i] : wrong[i];
        events[i] += block.events[i];
        right[i] += length - n_wrong;
    }
}

// Rows of a block of samples as bytes, sample_rows at a time after the row before them: pointers into the matrix, or
// unpacked copies.
class Rows {
public:
    Rows(const Kernels& k, const fmn_matrix* m, int64_t start, int64_t n) : k_(k), m_(m), start_(start), n_(n) {}

    const uint8_t* const* read(int64_t e, int n_rows) {  // call in the order of the epochs
        const bool bits = m_->format == FMN_BITS;
        rows_[0] = e > 0 ? previous_ : nullptr;
        if (bits && e > 0) rows_[0] = static_cast<uint8_t*>(std::memcpy(unpacked_[0], previous_, sizeof unpacked_[0]));
        for (int i = 1; i <= n_rows; ++i) {
            rows_[i] = bits ? unpacked_[i] : at(m_, e + i - 1, start_);
            if (bits) k_.unpack(at(m_, e + i - 1, start_), n_, unpacked_[i]);
        }
        if (e == 0) rows_[0] = rows_[1];  // nothing is forgotten at the first epoch
        for (int64_t i = 0; i < n_rows; ++i)
            rows_[n_rows + 1 + i] = bits ? rows_[1] : at(m_, std::min(e + n_rows + i, m_->n_epochs - 1), start_);
        previous_ = rows_[n_rows];
        return rows_;
    }

private:
    const Kernels& k_;
    const fmn_matrix* m_;
    int64_t start_, n_;
    const uint8_t* previous_ = nullptr;
    const uint8_t* rows_[2 * sample_rows + 1] = {};
    uint8_t unpacked_[sample_rows + 1][SampleBlock::size];
};

inline void count_samples(const Kernels& k, const fmn_matrix* m, int64_t start, int64_t size, int32_t* counts) {
    SampleBlock block;
    Rows rows(k, m, start, size);
    const int32_t n_epochs = static_cast<int32_t>(m->n_epochs);
    for (int32_t base = 0, length; base < n_epochs; base += length) {
        length = std::min(n_epochs - base, SampleBlock::max_epochs);
        std::memset(&block, 0, sizeof block);
        for (int32_t e = 0, n_rows; e < length; e += n_rows) {
            n_rows = length - e >= sample_rows ? sample_rows : 1;
            k.update_samples(rows.read(base + e, n_rows), n_rows, size, static_cast<uint8_t>(e), &block);
        }
        add_block(block, size, base, length, m->n_samples, counts + start);
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
