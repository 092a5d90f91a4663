// Counts and sums of weights within groups. Each block of samples is brought in the order of their groups; then each sum stays in
// registers for all samples of a group.
#include <exception>
#include <mutex>
#include <vector>

#include "blocks.h"
#include "threads.h"

namespace {

using namespace fmn;

constexpr int64_t block = GroupBlock::size;

// A block of samples: its order by group, and its rows as bits of each sample.
class Block {
public:
    Block(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups)
        : m_(m), reference_(reference), groups_(groups), sizes_(static_cast<size_t>(n_groups)) {}

    std::vector<Run> runs;

    void read(int64_t start, int64_t n) {
        start_ = start, n_ = n;
        read_epochs(reference_, 1, at_end_);
        const int64_t* groups = groups_ + start;
        runs.clear();
        for (int64_t i = 0; i < n; ++i)
            if (sizes_[static_cast<size_t>(groups[i])]++ == 0) runs.push_back({groups[i], 0, 0});
        int64_t place = 0;
        for (Run& run : runs) {
            run.begin = place, run.end = place += sizes_[static_cast<size_t>(run.group)];
            sizes_[static_cast<size_t>(run.group)] = static_cast<uint16_t>(run.begin);
        }
        for (int64_t i = 0; i < n; ++i) order_[sizes_[static_cast<size_t>(groups[i])]++] = static_cast<uint16_t>(i);
        for (const Run& run : runs) sizes_[static_cast<size_t>(run.group)] = 0;
    }

    GroupBlock samples(const double* weights) const {
        return {runs.data(), static_cast<int64_t>(runs.size()), n_, order_, at_end_, weights};
    }

    // Bit k of out[i]: sample i of the block was right at epoch e + k; zeros past the last epoch.
    void read_eight(int64_t e, uint8_t* out) {
        read_epochs(e, static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(8, m_->n_epochs - e))), out);
    }

private:
    void read_epochs(int64_t e, int n_rows, uint8_t* out) {
        static const uint8_t zeros[block / 8] = {};
        const uint8_t* rows[8];
        for (int row = 0; row < 8; ++row) {
            rows[row] = row < n_rows ? at(m_, e + row, start_) : zeros;
            if (m_->format == FMN_BITS || row >= n_rows) continue;
            prefetch(at(m_, std::min(e + row + 8, m_->n_epochs - 1), start_), n_);
            kernels().pack(rows[row], n_, packed_[row]);
            rows[row] = packed_[row];
        }
        kernels().transpose(rows, n_, out);
    }

    const fmn_matrix* m_;
    int64_t reference_, start_ = 0, n_ = 0;
    const int64_t* groups_;
    std::vector<uint16_t> sizes_;  // zeros between the blocks
    uint16_t order_[block];
    uint8_t at_end_[block], packed_[8][block / 8];
};

template <class Add>
void each_block(Block& b, int64_t begin, int64_t end, const Add& add) {
    for (int64_t start = begin; start < end; start += block) {
        b.read(start, std::min(block, end - start));
        add(start);
    }
}

// Counts samples [begin, end).
void count_part(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups, int64_t begin, int64_t end,
                std::mutex& adding, int64_t* counts) {
    const int64_t tiles = ceil_div(m->n_epochs, count_lanes);
    std::vector<CountLines> lines(static_cast<size_t>(tiles * n_groups));
    std::vector<uint16_t> sizes(static_cast<size_t>(n_groups));  // bound the counts of a group
    const auto move = [&](int64_t g) {
        const std::lock_guard<std::mutex> lock(adding);
        int64_t *right = counts + g * m->n_epochs, *retained = right + 3 * n_groups * m->n_epochs;
        for (int64_t e = 0; e < m->n_epochs; ++e) {
            const auto& of = lines[static_cast<size_t>(e / count_lanes * n_groups + g)].counts;
            right[e] += of[0][e % count_lanes] + of[1][e % count_lanes];
            retained[e] += of[1][e % count_lanes];
        }
        for (int64_t tile = 0; tile < tiles; ++tile) lines[static_cast<size_t>(tile * n_groups + g)] = {};
        sizes[static_cast<size_t>(g)] = 0;
    };
    Block b(m, reference, groups, n_groups);
    each_block(b, begin, end, [&](int64_t) {
        for (const Run& run : b.runs) {
            uint16_t& size = sizes[static_cast<size_t>(run.group)];
            if (size > UINT16_MAX - block) move(run.group);
            size = static_cast<uint16_t>(size + run.end - run.begin);
        }
        uint8_t right[count_lanes / 8][block];
        const uint8_t* const rows[] = {right[0], right[1], right[2], right[3]};
        for (int64_t tile = 0; tile < tiles; ++tile) {
            for (int k = 0; k < count_lanes / 8; ++k) b.read_eight(tile * count_lanes + 8 * k, right[k]);
            kernels().add_counts(b.samples(nullptr), rows, &lines[static_cast<size_t>(tile * n_groups)]);
        }
    });
    for (int64_t g = 0; g < n_groups; ++g) move(g);
}

// Adds the weights at the epochs of tiles [begin, end).
void add_tiles(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups, const double* weights,
               int64_t begin, int64_t end, double* sums) {
    std::vector<WeightLines> lines(static_cast<size_t>((end - begin) * n_groups));
    const auto each_line = [&](const auto& copy) {
        for (int64_t tile = begin; tile < end; ++tile)
            for (int64_t g = 0; g < n_groups; ++g)
                for (int row = 0; row < 4; ++row)
                    copy(lines[static_cast<size_t>((tile - begin) * n_groups + g)].sums[row],
                         sums + (row * n_groups + g) * m->n_epochs + tile * weight_lanes,
                         std::min<int64_t>(weight_lanes, m->n_epochs - tile * weight_lanes));
    };
    each_line([](double* line, const double* sum, int64_t n) { std::copy_n(sum, n, line); });
    Block b(m, reference, groups, n_groups);
    each_block(b, 0, m->n_samples, [&](int64_t start) {
        uint8_t right[block];
        for (int64_t tile = begin; tile < end; ++tile) {
            b.read_eight(tile * weight_lanes, right);
            kernels().add_weights(b.samples(weights + start), right, &lines[static_cast<size_t>((tile - begin) * n_groups)]);
        }
    });
    each_line([](const double* line, double* sum, int64_t n) { std::copy_n(line, n, sum); });
}

}  // namespace

extern "C" {

fmn_status fmn_group_counts(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups, int n_threads,
                            int64_t* counts) {
    if (!valid(m, reference) || !counts || !valid_groups(groups, m->n_samples, n_groups)) return FMN_INVALID_ARGUMENT;
    std::mutex adding;
    const double work = 4.0 * m->n_epochs * m->n_samples;
    const bool done = split_allocating(ceil_div(m->n_samples, block), work, n_threads, [&](int64_t begin, int64_t end) {
        count_part(m, reference, groups, n_groups, begin * block, std::min(end * block, m->n_samples), adding, counts);
    });
    if (!done) return FMN_OUT_OF_MEMORY;
    derive(counts, n_groups * m->n_epochs, m->n_epochs, reference);
    return FMN_OK;
}

fmn_status fmn_group_sums(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups,
                          const double* weights, int n_threads, double* sums) {
    if (!valid(m, reference) || !sums || (!weights && m->n_samples > 0) ||
        !valid_groups(groups, m->n_samples, n_groups))
        return FMN_INVALID_ARGUMENT;
    const double work = 16.0 * m->n_epochs * m->n_samples;
    const bool done = split_allocating(ceil_div(m->n_epochs, weight_lanes), work, n_threads, [&](int64_t begin, int64_t end) {
        add_tiles(m, reference, groups, n_groups, weights, begin, end, sums);
    });
    return done ? FMN_OK : FMN_OUT_OF_MEMORY;
}

}  // extern "C"
