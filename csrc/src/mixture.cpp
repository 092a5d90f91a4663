// Mixtures of a predictor with windows of epochs: the intervals in which a sample is right, and the best epsilon.
#include <atomic>
#include <exception>
#include <mutex>
#include <vector>

#include "blocks.h"
#include "threads.h"

namespace {

using namespace fmn;

bool valid(const fmn_mixture* m) {
    if (!m || m->n_epochs < 0 || !valid_sizes(m->n_samples, m->n_classes) || m->n_classes < 1) return false;
    if (!is_float(m->type) || !is_float(m->current_type)) return false;
    if (m->n_samples == 0) return true;
    return m->current && m->epochs && std::all_of(m->epochs, m->epochs + m->n_epochs, [](const void* p) { return p; }) &&
           valid_groups(m->labels, m->n_samples, m->n_classes);
}

bool valid_window(const fmn_mixture* m, int64_t first, int64_t last) {
    return 0 <= first && first <= last && last < m->n_epochs;
}

int64_t weight(const fmn_mixture* m, int64_t i) { return m->weights ? m->weights[i] : 1; }

// Scores of the current predictor and of a range of epochs as double, and window means. Holds as many samples at a time as
// stay in the level-2 cache.
class Scores {
public:
    Scores(const fmn_mixture* m, int64_t first, int64_t last)
        : m(m), k(kernels()), first(first), n(m->n_classes), block(block_samples(m, first, last)),
          rows(static_cast<size_t>((last - first + 2) * block * n)), sum(static_cast<size_t>(n)) {}

    // Calls work(sample) for the samples of [begin, end) that have weight.
    template <class Work>
    void each(int64_t begin, int64_t end, const Work& work) {
        for (start = begin; start < end; start += block) {
            const int64_t size = std::min(block, end - start);
            widen(m->current, m->current_type, size, rows.data());
            const auto epochs = static_cast<int64_t>(rows.size()) / (block * n) - 1;
            for (int64_t e = 0; e < epochs; ++e) widen(m->epochs[first + e], m->type, size, plane(first + e));
            for (now = 0; now < size; ++now)
                if (weight(m, start + now) != 0) work(start + now);
        }
    }

    const double* current() const { return &rows[static_cast<size_t>(now * n)]; }

    const double* mean(int64_t from, int64_t to) {
        const double* a = plane(from) + now * n;
        if (from == to) return a;
        const double count = static_cast<double>(to - from + 1), *b = plane(from + 1) + now * n;
        double* out = sum.data();
        for (int64_t c = 0; c < n; ++c) out[c] = a[c] + b[c];
        for (int64_t e = from + 2; e <= to; ++e) {
            const double* more = plane(e) + now * n;
            for (int64_t c = 0; c < n; ++c) out[c] += more[c];
        }
        for (int64_t c = 0; c < n; ++c) out[c] /= count;
        return out;
    }

private:
    static int64_t block_samples(const fmn_mixture* m, int64_t first, int64_t last) {
        return std::max<int64_t>(1, std::min<int64_t>(64, (1 << 15) / ((last - first + 2) * m->n_classes)));
    }

    double* plane(int64_t e) { return &rows[static_cast<size_t>((e - first + 1) * block * n)]; }

    void widen(const void* scores, int32_t type, int64_t size, double* out) const {
        const auto t = static_cast<fmn_type>(type);
        k.widen(static_cast<const uint8_t*>(scores) + start * n * type_size(t), t, size * n, out);
    }

    const fmn_mixture* m;
    const Kernels& k;
    int64_t first, n, block, start = 0, now = 0;
    std::vector<double> rows, sum;
};

struct End {
    double at;
    int64_t weight;
};

// Sorts ends in [0, 1]: into as many buckets as there are ends, then within the buckets.
void sort(std::vector<End>& ends) {
    const auto before = [](const End& a, const End& b) { return a.at < b.at; };
    const size_t n = ends.size();
    if (n < 64) return std::sort(ends.begin(), ends.end(), before);
    const auto bucket = [=](const End& e) { return static_cast<size_t>(e.at * static_cast<double>(n)); };
    std::vector<uint32_t> begin(n + 2);
    for (const End& e : ends) ++begin[bucket(e) + 1];
    for (size_t b = 0; b <= n; ++b) begin[b + 1] += begin[b];
    std::vector<End> sorted(n);
    std::vector<uint32_t> next(begin);
    for (const End& e : ends) sorted[next[bucket(e)]++] = e;
    for (size_t b = 0; b <= n; ++b)
        if (begin[b + 1] - begin[b] > 1)
            std::sort(sorted.begin() + begin[b], sorted.begin() + begin[b + 1], before);
    ends.swap(sorted);
}

constexpr int64_t unit = 64;  // samples: one thread gathers the intervals of a unit

// The intervals of one window. The ends of a unit stand at the front of its part of `starts` and `stops`.
struct Ends {
    std::vector<End> starts, stops;     // those above 0, those below 1
    std::vector<int32_t> n_starts, n_stops;  // number in each unit
    std::vector<int64_t> from_zero;     // of each unit: weight that is right at 0
    std::vector<int32_t> grid_first, grid_end;  // of each sample: points of the grid at which it may be right

    Ends(int64_t n, bool grid) {
        const auto size = static_cast<size_t>(n), units = static_cast<size_t>(ceil_div(n, unit));
        starts.resize(size), stops.resize(size), n_starts.resize(units), n_stops.resize(units), from_zero.resize(units);
        if (grid) grid_first.resize(size), grid_end.resize(size);
    }

    void add(int64_t i, const Interval& v, int64_t w) {
        const auto u = static_cast<size_t>(i / unit), begin = u * unit;
        if (v.lo > v.hi) return;
        if (v.lo > 0) starts[begin + static_cast<size_t>(n_starts[u]++)] = {v.lo, w};
        else from_zero[u] += w;
        if (v.hi < 1) stops[begin + static_cast<size_t>(n_stops[u]++)] = {v.hi, w};
    }

    static void compact(std::vector<End>& ends, const std::vector<int32_t>& sizes) {
        auto out = ends.begin();
        for (size_t u = 0; u < sizes.size(); ++u) {
            const auto begin = ends.begin() + static_cast<std::ptrdiff_t>(u * unit);
            out = std::copy(begin, begin + sizes[u], out);
        }
        ends.erase(out, ends.end());
        sort(ends);
    }

    // Returns the weight that is right in the best stretch of [0, 1], and writes its middle.
    int64_t best(double* epsilon) {
        compact(starts, n_starts), compact(stops, n_stops);
        int64_t now = 0;
        for (int64_t w : from_zero) now += w;
        size_t start = 0, stop = 0;
        int64_t most = -1;
        bool long_enough = false;
        for (double at = 0;;) {
            for (; stop < stops.size() && stops[stop].at < at; ++stop) now -= stops[stop].weight;
            for (; start < starts.size() && starts[start].at <= at; ++start) now += starts[start].weight;
            const double end = stop < stops.size() ? stops[stop].at : 1;
            const bool is_long = end - at > 1e-12;
            if (now > most || (now == most && is_long && !long_enough))
                most = now, long_enough = is_long, *epsilon = (at + end) / 2;
            if (start == starts.size()) return most;
            at = starts[start].at;
        }
    }

    int64_t most_on_grid(int64_t n_grid, const fmn_mixture* m) const {
        std::vector<int64_t> change(static_cast<size_t>(n_grid) + 1);
        for (size_t i = 0; i < grid_first.size(); ++i)
            if (grid_first[i] < grid_end[i]) {
                change[static_cast<size_t>(grid_first[i])] += weight(m, static_cast<int64_t>(i));
                change[static_cast<size_t>(grid_end[i])] -= weight(m, static_cast<int64_t>(i));
            }
        int64_t now = 0, most = 0;
        for (int64_t c : change) most = std::max(most, now += c);
        return most;
    }
};

// Number of points of an ascending grid in [0, 1] below x, or up to x if `or_equal`: a guess, then steps.
int64_t points_below(const double* grid, int64_t n, double x, bool or_equal) {
    int64_t i = x > 0 ? static_cast<int64_t>(x * static_cast<double>(n)) : 0;
    while (i < n && (or_equal ? grid[i] <= x : grid[i] < x)) ++i;
    while (i > 0 && (or_equal ? grid[i - 1] > x : grid[i - 1] >= x)) --i;
    return i;
}

// The best epsilon of some windows: first the intervals, split over the samples; then the windows one by one.
bool best_of(const fmn_mixture* m, const int64_t* windows, int64_t n_windows, const double* grid, int64_t n_grid,
             int n_threads, double* epsilon, int64_t* right, int64_t* on_grid) {
    const auto& k = kernels();
    const int64_t n = m->n_samples;
    std::vector<Ends> ends;
    int64_t first = windows[0], last = windows[1];
    for (int64_t c = 0; c < n_windows; ++c) {
        ends.emplace_back(n, n_grid > 0);
        first = std::min(first, windows[2 * c]), last = std::max(last, windows[2 * c + 1]);
    }
    const double work = 64.0 * n * (m->n_classes + 16.0) * n_windows;
    const bool read = split_allocating(ceil_div(n, unit), work, n_threads, [&](int64_t begin, int64_t end) {
        Scores scores(m, first, last);
        scores.each(begin * unit, std::min(end * unit, n), [&](int64_t i) {
            for (int64_t c = 0; c < n_windows; ++c) {
                const double* then = scores.mean(windows[2 * c], windows[2 * c + 1]);
                const Interval v = k.interval(scores.current(), then, m->n_classes, m->labels[i], n_grid > 0);
                Ends& of = ends[static_cast<size_t>(c)];
                of.add(i, v, weight(m, i));
                if (n_grid == 0) continue;
                const auto at = static_cast<size_t>(i);
                of.grid_first[at] = static_cast<int32_t>(points_below(grid, n_grid, v.widest_lo, false));
                of.grid_end[at] = static_cast<int32_t>(points_below(grid, n_grid, v.widest_hi, true));
            }
        });
    });
    return read && split_allocating(n_windows, 512.0 * n * n_windows, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            Ends& of = ends[static_cast<size_t>(c)];
            if (n_grid > 0) on_grid[c] = of.most_on_grid(n_grid, m);
            right[c] = of.best(epsilon + c);
        }
    });
}

}  // namespace

extern "C" {

fmn_status fmn_check_probabilities(const void* scores, int32_t type, int64_t n_samples, int64_t n_classes, double tolerance,
                                   int n_threads, int* sound) {
    if (!is_float(type) || !valid_sizes(n_samples, n_classes) || n_classes < 1 || (!scores && n_samples > 0) || !sound)
        return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    const double read = 1.0 * n_samples * n_classes * type_size(type);
    std::atomic<bool> all{true};
    const bool done = split_allocating(n_samples, read, n_threads, [&](int64_t begin, int64_t end) {
        std::vector<double> row(static_cast<size_t>(n_classes));
        const int64_t bytes = n_classes * type_size(type);
        for (int64_t i = begin; i < end && all; ++i) {
            k.widen(static_cast<const uint8_t*>(scores) + i * bytes, static_cast<fmn_type>(type), n_classes, row.data());
            if (!k.sums_to_one(row.data(), static_cast<int64_t>(row.size()), tolerance)) all = false;
        }
    });
    *sound = all;
    return done ? FMN_OK : FMN_OUT_OF_MEMORY;
}

fmn_status fmn_mixture_right(const fmn_mixture* m, int64_t first, int64_t last, const double* epsilon, int64_t n_epsilons,
                             int n_threads, int64_t* right) {
    if (!valid(m) || !valid_window(m, first, last) || n_epsilons < 0) return FMN_INVALID_ARGUMENT;
    if (n_epsilons > 0 && (!epsilon || !right)) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    std::mutex adding;
    const double work = 16.0 * m->n_samples * (m->n_classes + 16.0) * n_epsilons;
    const bool done = split_allocating(m->n_samples, work, n_threads, [&](int64_t begin, int64_t end) {
        Scores scores(m, first, last);
        std::vector<int64_t> sums(static_cast<size_t>(n_epsilons));
        constexpr int64_t block = 64;
        bool is_right[block];
        scores.each(begin, end, [&](int64_t i) {
            const double* then = scores.mean(first, last);
            for (int64_t j = 0; j < n_epsilons; j += block) {
                const int64_t n = std::min(block, n_epsilons - j);
                k.right_at(scores.current(), then, m->n_classes, m->labels[i], epsilon + j, n, is_right);
                for (int64_t l = 0; l < n; ++l)
                    if (is_right[l]) sums[static_cast<size_t>(j + l)] += weight(m, i);
            }
        });
        const std::lock_guard<std::mutex> lock(adding);
        for (int64_t j = 0; j < n_epsilons; ++j) right[j] += sums[static_cast<size_t>(j)];
    });
    return done ? FMN_OK : FMN_OUT_OF_MEMORY;
}

fmn_status fmn_best_epsilon(const fmn_mixture* m, const int64_t* windows, int64_t n_windows, const double* grid, int64_t n_grid,
                            int n_threads, double* epsilon, int64_t* right, int64_t* on_grid) {
    if (!valid(m) || n_windows < 0 || n_grid < 0 || n_grid > INT32_MAX) return FMN_INVALID_ARGUMENT;
    if (n_windows > 0 && (!windows || !epsilon || !right)) return FMN_INVALID_ARGUMENT;
    if (n_grid > 0 && (!grid || (!on_grid && n_windows > 0))) return FMN_INVALID_ARGUMENT;
    for (int64_t c = 0; c < n_windows; ++c)
        if (!valid_window(m, windows[2 * c], windows[2 * c + 1])) return FMN_INVALID_ARGUMENT;
    const int64_t at_once = std::max<int64_t>(1, (int64_t(1) << 21) / std::max<int64_t>(8, m->n_samples));
    try {
        for (int64_t c = 0; c < n_windows; c += at_once)
            if (!best_of(m, windows + 2 * c, std::min(at_once, n_windows - c), grid, n_grid, n_threads, epsilon + c, right + c,
                         on_grid ? on_grid + c : nullptr))
                return FMN_OUT_OF_MEMORY;
    } catch (const std::exception&) {
        return FMN_OUT_OF_MEMORY;
    }
    return FMN_OK;
}

}  // extern "C"
