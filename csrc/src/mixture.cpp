// Mixtures of a predictor with windows of epochs: the intervals in which a sample is right, and the best epsilon.
#include <atomic>
#include <exception>
#include <mutex>
#include <vector>

#include "blocks.h"
#include "ends.h"
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

// Scores of the current predictor and of a window as double, for as many samples as stay in the level-2 cache.
class Block {
public:
    explicit Block(const fmn_mixture* m)
        : size(std::max<int64_t>(1, std::min<int64_t>(unit, (1 << 14) / m->n_classes))), m(m), k(kernels()), n(m->n_classes),
          now(static_cast<size_t>(size * n) + interval_lanes), then(now.size()) {}

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
            if (i == end) continue;
            if (next >= 0) prefetch(static_cast<const uint8_t*>(m->epochs[next]) + i * bytes, (end - i) * bytes);
            mean(m->epochs + first, m->type, last - first + 1, i, end, then.data());
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

// Settles samples without reading all classes of a window. The rival of a sample is the class with the highest current score,
// if it beats the label. Where it beats the label in the window too, no mixture is right. What was `seen` of the sample in the
// window tells more: that the label wins there, or a class that beats it, `tight` if its crossing ended the interval.
class Rivals {
public:
    Rivals(const fmn_mixture* m, bool widest) : m(m), widest(widest) {}

    void read(const Block& block, int64_t begin, int64_t end) {
        start = begin;
        for (int64_t i = begin; i < end; ++i) {
            const double* row = block.current(i);
            const int64_t k = std::max_element(row, row + m->n_classes) - row, label = m->labels[i];
            rival[i - begin] = k != label && beaten(row[label], row[k], k < label) ? k : -1;
        }
    }

    bool may_be_right(int64_t i, int64_t first, int64_t last, int64_t next) const {
        const int64_t k = rival[i - start], label = m->labels[i];
        if (k >= 0) fetch(next, i, {label, k});
        return k < 0 || !beaten(mean(i, label, first, last), mean(i, k, first, last), k < label);
    }

    // Writes the interval if it is known without all classes; unless `exact`, one that contains it is enough.
    bool settle(const Block& block, int64_t i, int64_t first, int64_t last, int64_t next, bool exact, uint16_t* seen,
                Interval* v) const {
        const double* row = block.current(i);
        const int64_t label = m->labels[i], now = rival[i - start], then = *seen < beats ? -1 : (*seen - beats) / 2;
        *v = {1, 0, 1, 0};
        if (then >= 0 && beaten(row[label], row[then], then < label)) return true;
        if (now < 0 && *seen == wins) return *v = {0, 1, 0, 1}, true;
        const bool enough = !exact && (*seen & tight);
        if (now < 0 && !enough) return false;
        fetch(next, i, {label, now, then});
        const double own = mean(i, label, first, last), of_now = now < 0 ? 0 : mean(i, now, first, last);
        if (now >= 0 && beaten(own, of_now, now < label)) return *seen = code(now, 0), true;
        if (!enough) return false;
        v->lo = now < 0 ? 0 : loops::Leads::start(row[label] - row[now], own - of_now, now < label);
        v->hi = then < 0 ? 1 : loops::Leads::stop(row[label] - row[then], own - mean(i, then, first, last), then < label);
        return true;
    }

    // What is seen of a sample in a window with these scores: of the classes that beat the label, the one that ends the interval.
    uint16_t see(const double* now, const double* then, int64_t label) const {
        uint16_t found = wins;
        double end = 2;
        for (int64_t k = 0; k < m->n_classes; ++k) {
            const bool before = k < label;
            if (k == label || !beaten(then[label], then[k], before)) continue;
            if (beaten(now[label], now[k], before)) return code(k, tight);
            const double at = loops::Leads::stop(now[label] - now[k], then[label] - then[k], before);
            if (at < end) end = at, found = code(k, tight);
        }
        return found;
    }

private:
    enum : uint16_t { nothing = 0, tight = 1, wins = tight, beats = 2 };  // beats + 2 * k, or that + tight: class k beats the label

    static uint16_t code(int64_t k, int is_tight) {
        return static_cast<uint16_t>(k <= (UINT16_MAX - beats) / 2 - 1 ? beats + 2 * k + is_tight : int64_t(nothing));
    }

    // As in Leads: with `widest`, beaten whatever rounding does.
    bool beaten(double own, double other, bool before) const {
        return widest ? own - other + loops::Leads::rounding < 0 : before ? other >= own : other > own;
    }

    // Scores at the last epoch of the next window, if there is one, into the cache: memory limits all of this.
    FMN_INLINE void fetch(int64_t next, int64_t i, std::initializer_list<int64_t> classes) const {
        for (int64_t k : classes)
            if (next >= 0 && k >= 0)
                prefetch(static_cast<const uint8_t*>(m->epochs[next]) + (i * m->n_classes + k) * type_size(m->type), 1);
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

// The best epsilon of some windows: first the intervals, split over the samples; then the windows one by one.
bool best_of(const fmn_mixture* m, const int64_t* windows, int64_t n_windows, const double* grid, int64_t n_grid,
             int n_threads, std::vector<Ends>& ends, bool exact, uint16_t* seen, double* epsilon, int64_t* right, int64_t* on_grid) {
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
            if (n_windows > 1 || seen) rivals.read(block, start, stop);
            for (int64_t c = 0; c < n_windows; ++c) {
                const int64_t first = windows[2 * c], last = windows[2 * c + 1];
                Ends& of = ends[static_cast<size_t>(c)];
                const int64_t next = c + 1 < n_windows ? windows[2 * c + 3] : -1;
                uint16_t* in_window = seen ? seen + c * n : nullptr;
                if (seen && next >= 0) prefetch(reinterpret_cast<const uint8_t*>(in_window + n + start), 2 * (stop - start));
                const auto needed = [&](int64_t i) {
                    if (!seen) return n_windows == 1 || rivals.may_be_right(i, first, last, next);
                    Interval v;
                    if (!rivals.settle(block, i, first, last, next, exact, in_window + i, &v)) return true;
                    of.add(i, v, weight(m, i));
                    return false;
                };
                block.each(first, last, next, needed, [&](int64_t i, const double* then) {
                    const Interval v = k.interval(block.current(i), then, m->n_classes, m->labels[i], n_grid > 0);
                    of.add(i, v, weight(m, i));
                    if (seen) in_window[i] = rivals.see(block.current(i), then, m->labels[i]);
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

// Both functions of the C API. Without `exact`, `right` is an upper bound.
fmn_status best_epsilon(const fmn_mixture* m, const int64_t* windows, int64_t n_windows, const double* grid, int64_t n_grid,
                        int n_threads, bool exact, uint16_t* seen, double* epsilon, int64_t* right, int64_t* on_grid) {
    if (!valid(m) || n_windows < 0 || n_grid < 0 || n_grid > INT32_MAX) return FMN_INVALID_ARGUMENT;
    if (n_windows > 0 && (!windows || !epsilon || !right)) return FMN_INVALID_ARGUMENT;
    if (n_grid > 0 && (!grid || (!on_grid && n_windows > 0))) return FMN_INVALID_ARGUMENT;
    for (int64_t c = 0; c < n_windows; ++c)
        if (!valid_window(m, windows[2 * c], windows[2 * c + 1])) return FMN_INVALID_ARGUMENT;
    const int64_t at_once = std::max<int64_t>(1, (int64_t(1) << 18) / std::max<int64_t>(8, m->n_samples));
    try {
        std::vector<Ends> ends(static_cast<size_t>(std::min(at_once, n_windows)), Ends(m->n_samples, n_grid > 0));
        for (int64_t c = 0; c < n_windows; c += at_once)
            if (!best_of(m, windows + 2 * c, std::min(at_once, n_windows - c), grid, n_grid, n_threads, ends,
                         exact, seen ? seen + c * m->n_samples : nullptr, epsilon + c, right + c, on_grid ? on_grid + c : nullptr))
                return FMN_OUT_OF_MEMORY;
    } catch (const std::exception&) {
        return FMN_OUT_OF_MEMORY;
    }
    return FMN_OK;
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
    return best_epsilon(m, windows, n_windows, grid, n_grid, n_threads, true, nullptr, epsilon, right, on_grid);
}

fmn_status fmn_best_epsilon_seen(const fmn_mixture* m, const int64_t* windows, int64_t n_windows, int exact, int n_threads,
                                 uint16_t* seen, double* epsilon, int64_t* right) {
    if (!seen && n_windows > 0) return FMN_INVALID_ARGUMENT;
    return best_epsilon(m, windows, n_windows, nullptr, 0, n_threads, exact, seen, epsilon, right, nullptr);
}

}  // extern "C"
