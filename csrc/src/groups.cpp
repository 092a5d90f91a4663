// Counts and sums of weights within groups. A tile of epochs adds to lines of its own, which stay in the level-1 cache for up
// to some hundred groups, and moves them to the caller's array.
#include <exception>
#include <vector>

#include "blocks.h"
#include "threads.h"

namespace {

using namespace fmn;

constexpr int64_t block = 2048;  // samples that are read at a time

// Calls add(start, n, right, at_end) for each block of the samples, in order. Bit k of right[b][i]: sample start + i was right
// at epoch first + 8 * b + k; zeros past the last epoch. at_end[i] is 1 if it was right at the reference epoch, else 0.
template <int n_bytes>
class Blocks {
public:
    Blocks(const fmn_matrix* m, int64_t first, int64_t reference) : m_(m), first_(first), reference_(reference) {}

    template <class Add>
    void each(const Add& add) {
        for (int64_t start = 0; start < m_->n_samples; start += block) {
            const int64_t n = std::min(block, m_->n_samples - start);
            for (int b = 0; b < n_bytes; ++b) {
                const int64_t e = first_ + 8 * b;
                read(e, static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(8, m_->n_epochs - e))), start, n, right_[b]);
            }
            read(reference_, 1, start, n, at_end_);
            const uint8_t* right[n_bytes];
            for (int b = 0; b < n_bytes; ++b) right[b] = right_[b];
            add(start, n, right, at_end_);
        }
    }

private:
    void read(int64_t e, int n_rows, int64_t start, int64_t n, uint8_t* out) {
        const uint8_t* rows[8];
        for (int row = 0; row < n_rows; ++row) {
            rows[row] = m_->format == FMN_BITS ? unpacked_[row] : at(m_, e + row, start);
            if (m_->format == FMN_BITS) kernels().unpack(at(m_, e + row, start), n, unpacked_[row]);
        }
        kernels().gather(rows, n_rows, n, out);
    }

    const fmn_matrix* m_;
    int64_t first_, reference_;
    uint8_t right_[n_bytes][block], at_end_[block], unpacked_[8][block];
};

// The lines of a group in a tile of 32 epochs: samples that are wrong at the reference epoch, and samples that are right.
struct CountLines {
    CountLine at_end[2];

    void move(int64_t n_lanes, int64_t* right, int64_t* retained) {
        for (int64_t lane = 0; lane < n_lanes; ++lane) {
            right[lane] += at_end[0].counts[lane] + at_end[1].counts[lane];
            retained[lane] += at_end[1].counts[lane];
        }
        *this = {};
    }
};

void count_tile(const fmn_matrix* m, int64_t tile, int64_t reference, const int64_t* groups, int64_t n_groups,
                CountLines* lines, uint16_t* sizes, int64_t* counts) {
    const int64_t first = tile * count_lanes, n_lanes = std::min<int64_t>(count_lanes, m->n_epochs - first);
    const auto move = [=](int64_t g) {
        int64_t* right = counts + g * m->n_epochs + first;
        lines[g].move(n_lanes, right, right + 3 * n_groups * m->n_epochs);
    };
    Blocks<count_lanes / 8>(m, first, reference).each([=](int64_t start, int64_t n, const uint8_t* const* right, const uint8_t* at_end) {
        for (int64_t i = start; i < start + n; ++i) {  // sizes[g] bounds the counts of group g, which this block must not overflow
            uint16_t& size = sizes[groups[i]];
            if (++size <= UINT16_MAX - block) continue;
            move(groups[i]);
            size = block;
        }
        kernels().add_counts({right, at_end, groups + start, n, lines->at_end});
    });
    for (int64_t g = 0; g < n_groups; ++g) move(g);
}

void add_tile(const fmn_matrix* m, int64_t tile, int64_t reference, const int64_t* groups, int64_t n_groups,
              const double* weights, WeightLines* lines, double* sums) {
    const int64_t first = tile * weight_lanes, n_lanes = std::min<int64_t>(weight_lanes, m->n_epochs - first);
    const auto each_row = [=](const auto& copy) {
        for (int64_t g = 0; g < n_groups; ++g)
            for (int row = 0; row < 4; ++row) copy(lines[g].sums[row], sums + (row * n_groups + g) * m->n_epochs + first);
    };
    each_row([=](double* line, const double* sum) { std::copy_n(sum, n_lanes, line); });
    Blocks<1>(m, first, reference).each([=](int64_t start, int64_t n, const uint8_t* const* right, const uint8_t* at_end) {
        kernels().add_weights({right[0], at_end, groups + start, weights + start, n, n_groups, lines});
    });
    each_row([=](const double* line, double* sum) { std::copy_n(line, n_lanes, sum); });
}

}  // namespace

extern "C" {

fmn_status fmn_group_counts(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups, int n_threads,
                            int64_t* counts) {
    if (!valid(m, reference) || !counts || !valid_groups(groups, m->n_samples, n_groups)) return FMN_INVALID_ARGUMENT;
    try {
        const int64_t tiles = ceil_div(m->n_epochs, count_lanes);
        std::vector<CountLines> lines(static_cast<size_t>(tiles * n_groups));
        std::vector<uint16_t> sizes(lines.size());
        split(tiles, 4.0 * m->n_epochs * m->n_samples, n_threads, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; ++tile)
                count_tile(m, tile, reference, groups, n_groups, &lines[tile * n_groups], &sizes[tile * n_groups], counts);
        });
    } catch (const std::exception&) {
        return FMN_OUT_OF_MEMORY;
    }
    derive(counts, n_groups * m->n_epochs, m->n_epochs, reference);
    return FMN_OK;
}

fmn_status fmn_group_sums(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups,
                          const double* weights, int n_threads, double* sums) {
    if (!valid(m, reference) || !sums || (!weights && m->n_samples > 0) ||
        !valid_groups(groups, m->n_samples, n_groups))
        return FMN_INVALID_ARGUMENT;
    try {
        const int64_t tiles = ceil_div(m->n_epochs, weight_lanes);
        std::vector<WeightLines> lines(static_cast<size_t>(tiles * n_groups));
        split(tiles, 16.0 * m->n_epochs * m->n_samples, n_threads, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; ++tile)
                add_tile(m, tile, reference, groups, n_groups, weights, &lines[tile * n_groups], sums);
        });
    } catch (const std::exception&) {
        return FMN_OUT_OF_MEMORY;
    }
    return FMN_OK;
}

}  // extern "C"
