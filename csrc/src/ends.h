// The ends of the intervals in which samples are right: the stretch of [0, 1] in which the most weight is right.
#pragma once
#include <algorithm>
#include <vector>

#include "loops.h"
#include "threads.h"

namespace fmn {

inline int64_t weight(const fmn_mixture* m, int64_t i) { return m->weights ? m->weights[i] : 1; }

constexpr int64_t unit = 64;  // samples: one thread gathers the intervals of a unit

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
inline int64_t points_below(const double* grid, int64_t n, double x, bool or_equal) {
    int64_t i = x > 0 ? static_cast<int64_t>(x * static_cast<double>(n - 1)) : 0;
    while (i < n && (or_equal ? grid[i] <= x : grid[i] < x)) ++i;
    while (i > 0 && (or_equal ? grid[i - 1] > x : grid[i - 1] >= x)) --i;
    return i;
}

}  // namespace fmn
