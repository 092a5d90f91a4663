// Mixtures of a predictor with windows of epochs: the intervals in which a sample is right, and the best epsilon.
#include <atomic>
#include <exception>
#include <mutex>
#include <vector>

#include "blocks.h"
#include "loops.h"
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

constexpr int64_t unit = 64;  // samples: one thread gathers the intervals of a unit

// Scores of the current predictor and of a window as double, for as many samples as stay in the level-2 cache.
class Block {
public:
    explicit Block(const fmn_mixture* m)
        : size(std::max<int64_t>(1, std::min<int64_t>(unit, (1 << 14) / m->n_classes))), m(m), k(kernels()), n(m->n_classes),
          now(static_cast<size_t>(size * n)), then(now.size()) {}

    const int64_t size;  // most samples at a time

    void read(int64_t begin, int64_t end) {
        start = begin, stop = end;
        mean(&m->current, m->current_type, 1, begin, end, now.data());
    }

    const double* current(int64_t i) const { return &now[static_cast<size_t>((i - start) * n)]; }

    // Calls work(sample, mean scores of the window's epochs) for the samples with weight that `needed` accepts. Fetches epoch
    // `next`, if there is one, into the cache at the same time: a few rows of each epoch are no pattern for the processor.
    template <class Needed, class Work>
    void each(int64_t first, int64_t last, int64_t next, const Needed& needed, const Work& work) {
        bool need[unit + 1] = {};
        for (int64_t i = start; i < stop; ++i) need[i - start] = weight(m, i) != 0 && needed(i);
        const int64_t bytes = n * type_size(m->type);
        for (int64_t i = start, end; i < stop; i = end + 1) {  // runs of them
            for (end = i; need[end - start]; ++end) {}
            if (next >= 0) prefetch(static_cast<const uint8_t*>(m->epochs[next]) + i * bytes, (std::min(end + 1, stop) - i) * bytes);
            if (i < end) mean(m->epochs + first, m->type, last - first + 1, i, end, then.data());
            for (int64_t at = i; at < end; ++at) work(at, &then[static_cast<size_t>((at - i) * n)]);
        }
    }

private:
    void mean(const void* const* rows, int32_t type, int64_t n_rows, int64_t begin, int64_t end, double* out) const {
        k.mean(rows, begin * n * type_size(type), static_cast<fmn_type>(type), n_rows, (end - begin) * n, out);
    }

    const fmn_mixture* m;
    const Kernels& k;
    int64_t n, start = 0, stop = 0;
    std::vector<double> now, then;
};

// For each sample of a block, the class with the highest current score if it is not the label. Where it beats the label in a
// window too, no mixture is right: two scores tell it instead of all.
class Rivals {
public:
    Rivals(const fmn_mixture* m, bool widest) : m(m), widest(widest) {}

    void read(const Block& block, int64_t begin, int64_t end) {
        start = begin;
        for (int64_t i = begin; i < end; ++i) {
            const double *row = block.current(i), own = row[m->labels[i]];
            const int64_t k = std::max_element(row, row + m->n_classes) - row;
            rival[i - begin] = k != m->labels[i] && beaten(own, row[k], k < m->labels[i]) ? k : -1;
        }
    }

    bool may_be_right(int64_t i, int64_t first, int64_t last) const {
        const int64_t k = rival[i - start], label = m->labels[i];
        return k < 0 || !beaten(mean(i, label, first, last), mean(i, k, first, last), k < label);
    }

private:
    // As in Leads: with `widest`, beaten whatever rounding does.
    bool beaten(double own, double other, bool before) const {
        return widest ? own - other + loops::Leads::rounding < 0 : before ? other >= own : other > own;
    }

    double mean(int64_t i, int64_t c, int64_t first, int64_t last) const {
        const int64_t at = i * m->n_classes + c;
        if (m->type == FMN_FLOAT16) return mean_of<loops::Half>(at, first, last);
        if (m->type == FMN_BFLOAT16) return mean_of<loops::Bfloat16>(at, first, last);
        if (m->type == FMN_FLOAT32) return mean_of<loops::Wide<float>>(at, first, last);
        return mean_of<loops::Wide<double>>(at, first, last);
    }

    template <class Type>
    double mean_of(int64_t at, int64_t first, int64_t last) const {
        const auto score = [=](int64_t e) { return Type::at(static_cast<const uint8_t*>(m->epochs[e]), at); };
        double sum = score(first);
        for (int64_t e = first + 1; e <= last; ++e) sum += score(e);
        return sum / static_cast<double>(last - first + 1);
    }

    const fmn_mixture* m;
    bool widest;
    int64_t start = 0, rival[unit];
};

struct End {
    double at;
    int64_t weight;
};

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

    void clear(int64_t begin, int64_t end) {  // of samples; begin is a multiple of unit
        for (auto u = begin / unit; u < ceil_div(end, unit); ++u)
            n_starts[static_cast<size_t>(u)] = n_stops[static_cast<size_t>(u)] = 0, from_zero[static_cast<size_t>(u)] = 0;
        if (!grid_end.empty()) std::fill(grid_end.begin() + begin, grid_end.begin() + end, 0);
    }

    void add(int64_t i, const Interval& v, int64_t w) {
        const auto u = static_cast<size_t>(i / unit), begin = u * unit;
        const bool some = v.lo <= v.hi;  // no branches: nobody can predict them
        starts[begin + static_cast<size_t>(n_starts[u])] = {v.lo, w};
        n_starts[u] += some & (v.lo > 0);
        stops[begin + static_cast<size_t>(n_stops[u])] = {v.hi, w};
        n_stops[u] += some & (v.hi < 1);
        from_zero[u] += w & -int64_t(some & !(v.lo > 0));
    }

    // Returns the weight that is right in the best stretch of [0, 1], and writes its middle. Counts in buckets first: only the
    // ends in buckets that may hold the best stretch are sorted.
    int64_t best(double* epsilon) const {
        std::vector<int64_t> up(buckets + 1), down(up), before(up);
        each(starts, n_starts, [&](const End& e) { up[bucket(e)] += e.weight; });
        each(stops, n_stops, [&](const End& e) { down[bucket(e)] += e.weight; });
        int64_t now = 0, most = 0;
        for (int64_t w : from_zero) most = now += w;
        for (size_t b = 0; b <= buckets; now += up[b] - down[b], ++b) {
            before[b] = now;
            if (up[b] > 0) most = std::max(most, now + up[b] - down[b]);  // at the bucket's last start it is that, or more
        }
        bool chosen[buckets + 1], stops_chosen[buckets + 1], open = true;  // open: the stop after a chosen start is missing
        for (size_t b = 0; b <= buckets; ++b) {
            chosen[b] = up[b] > 0 && before[b] + up[b] >= most;
            stops_chosen[b] = chosen[b] || open;
            open = chosen[b] || (open && down[b] == 0);
        }
        return sweep(sorted(starts, n_starts, chosen), sorted(stops, n_stops, stops_chosen), before, epsilon);
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

private:
    static constexpr size_t buckets = 512;  // of [0, 1]

    static size_t bucket(const End& e) { return static_cast<size_t>(e.at * buckets); }

    template <class Work>
    static void each(const std::vector<End>& ends, const std::vector<int32_t>& sizes, const Work& work) {
        for (size_t u = 0; u < sizes.size(); ++u)
            std::for_each(&ends[u * unit], &ends[u * unit] + sizes[u], work);
    }

    static std::vector<End> sorted(const std::vector<End>& ends, const std::vector<int32_t>& sizes, const bool* chosen) {
        std::vector<End> out;
        each(ends, sizes, [&](const End& e) { if (chosen[bucket(e)]) out.push_back(e); });
        std::sort(out.begin(), out.end(), [](const End& a, const End& b) { return a.at < b.at; });
        return out;
    }

    // The best stretch that begins at 0 or at one of some starts. `before` is the weight that is right before each bucket.
    static int64_t sweep(const std::vector<End>& starts, const std::vector<End>& stops, const std::vector<int64_t>& before,
                         double* epsilon) {
        size_t start = 0, stop = 0, last = 0;
        int64_t now = before[0], most = -1;
        bool long_enough = false;
        for (double at = 0;;) {
            const size_t b = bucket({at, 0});
            if (b > last) {
                for (now = before[last = b]; stop < stops.size() && bucket(stops[stop]) < b; ++stop) {}
            }
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
};

// Number of points of an ascending grid in [0, 1] below x, or up to x if `or_equal`: a guess, then steps.
int64_t points_below(const double* grid, int64_t n, double x, bool or_equal) {
    int64_t i = x > 0 ? static_cast<int64_t>(x * static_cast<double>(n - 1)) : 0;
    while (i < n && (or_equal ? grid[i] <= x : grid[i] < x)) ++i;
    while (i > 0 && (or_equal ? grid[i - 1] > x : grid[i - 1] >= x)) --i;
    return i;
}

// The best epsilon of some windows: first the intervals, split over the samples; then the windows one by one.
bool best_of(const fmn_mixture* m, const int64_t* windows, int64_t n_windows, const double* grid, int64_t n_grid,
             int n_threads, std::vector<Ends>& ends, double* epsilon, int64_t* right, int64_t* on_grid) {
    const auto& k = kernels();
    const int64_t n = m->n_samples;
    const double work = 64.0 * n * (m->n_classes + 16.0) * n_windows;
    const bool read = split_allocating(ceil_div(n, unit), work, n_threads, [&](int64_t begin, int64_t end) {
        Block block(m);
        Rivals rivals(m, n_grid > 0);
        end = std::min(end * unit, n);
        for (int64_t c = 0; c < n_windows; ++c) ends[static_cast<size_t>(c)].clear(begin * unit, end);
        for (int64_t start = begin * unit, stop; start < end; start = stop) {
            stop = std::min(start + block.size, end);
            block.read(start, stop);
            if (n_windows > 1) rivals.read(block, start, stop);
            for (int64_t c = 0; c < n_windows; ++c) {
                const int64_t first = windows[2 * c], last = windows[2 * c + 1];
                Ends& of = ends[static_cast<size_t>(c)];
                const int64_t next = c + 1 < n_windows ? windows[2 * c + 3] : -1;
                const auto may_be_right = [&](int64_t i) { return n_windows == 1 || rivals.may_be_right(i, first, last); };
                block.each(first, last, next, may_be_right, [&](int64_t i, const double* then) {
                    const Interval v = k.interval(block.current(i), then, m->n_classes, m->labels[i], n_grid > 0);
                    of.add(i, v, weight(m, i));
                    if (n_grid == 0) return;
                    const auto at = static_cast<size_t>(i);
                    of.grid_first[at] = static_cast<int32_t>(points_below(grid, n_grid, v.widest_lo, false));
                    of.grid_end[at] = static_cast<int32_t>(points_below(grid, n_grid, v.widest_hi, true));
                });
            }
        }
    });
    return read && split_allocating(n_windows, 64.0 * n * n_windows, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            const Ends& of = ends[static_cast<size_t>(c)];
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
    const double work = 8.0 * n_samples * (n_classes + 8.0);
    std::atomic<bool> all{true};
    const bool done = split_allocating(n_samples, work, n_threads, [&](int64_t begin, int64_t end) {
        const int64_t at_once = std::max<int64_t>(1, (1 << 9) / n_classes), bytes = n_classes * type_size(type);
        std::vector<double> rows(static_cast<size_t>(at_once * n_classes));
        for (int64_t i = begin; i < end && all; i += at_once) {
            const int64_t n = std::min(at_once, end - i);
            k.mean(&scores, i * bytes, static_cast<fmn_type>(type), 1, n * n_classes, rows.data());
            for (int64_t row = 0; row < n; ++row)
                if (!k.sums_to_one(&rows[static_cast<size_t>(row * n_classes)], n_classes, tolerance)) all = false;
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
        Block block(m);
        std::vector<int64_t> sums(static_cast<size_t>(n_epsilons));
        constexpr int64_t most = 64;
        bool is_right[most];
        for (int64_t start = begin, stop; start < end; start = stop) {
            stop = std::min(start + block.size, end);
            block.read(start, stop);
            block.each(first, last, -1, [](int64_t) { return true; }, [&](int64_t i, const double* then) {
                for (int64_t j = 0; j < n_epsilons; j += most) {
                    const int64_t n = std::min(most, n_epsilons - j);
                    k.right_at(block.current(i), then, m->n_classes, m->labels[i], epsilon + j, n, is_right);
                    for (int64_t l = 0; l < n; ++l)
                        if (is_right[l]) sums[static_cast<size_t>(j + l)] += weight(m, i);
                }
            });
        }
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
    const int64_t at_once = std::max<int64_t>(1, (int64_t(1) << 18) / std::max<int64_t>(8, m->n_samples));
    try {
        std::vector<Ends> ends(static_cast<size_t>(std::min(at_once, n_windows)), Ends(m->n_samples, n_grid > 0));
        for (int64_t c = 0; c < n_windows; c += at_once)
            if (!best_of(m, windows + 2 * c, std::min(at_once, n_windows - c), grid, n_grid, n_threads, ends, epsilon + c,
                         right + c, on_grid ? on_grid + c : nullptr))
                return FMN_OUT_OF_MEMORY;
    } catch (const std::exception&) {
        return FMN_OUT_OF_MEMORY;
    }
    return FMN_OK;
}

}  // extern "C"
