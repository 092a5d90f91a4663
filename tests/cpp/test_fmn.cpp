// The C API against plain loops: random matrices of awkward sizes, strides, offsets and formats, the edges of every block,
// several threads at once. Run once per FMN_ISA.
//
//     test_fmn [cases = 20000] [seed = from the clock]      prints both; a failure is repeated by its seed
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "fmn/fmn.h"

static std::string context;  // of the current case, for the message of a failure

#define CHECK(condition)                                                                             \
    do {                                                                                             \
        if (!(condition)) {                                                                          \
            std::fprintf(stderr, "%s:%d: %s %s\n", __FILE__, __LINE__, #condition, context.c_str()); \
            std::exit(1);                                                                            \
        }                                                                                            \
    } while (0)

#ifndef FMN_TEST_RNG  // tests/fuzz/fuzz_fmn.cpp has another source of random numbers
#define FMN_TEST_RNG std::mt19937_64
#endif
using Rng = FMN_TEST_RNG;
using Bytes = std::vector<uint8_t>;

static int64_t pick(Rng& rng, int64_t low, int64_t high) { return low + static_cast<int64_t>(rng() % (high - low + 1)); }

// Mostly small, often at the edge of a block of the kernels.
static int64_t any_size(Rng& rng) {
    static const int64_t edges[] = {8, 16, 32, 64, 128, 255 * 32, 512, 2048, 4096, 8192};
    if (rng() % 4) return pick(rng, 0, 70);
    const int64_t edge = edges[rng() % 10];
    return edge > 600 && rng() % 16 ? pick(rng, 0, 300) : edge + pick(rng, -2, 2);
}

static int64_t any_epochs(Rng& rng, int64_t n_samples) {
    if (n_samples < 100 && rng() % 64 == 0) return pick(rng, 240, 520);  // the sample counts' blocks end at 248
    return rng() % 4 ? pick(rng, 1, 12) : pick(rng, 0, 40);
}

// A matrix at some offset in memory, and the same values as plain rows of 0 and 1.
struct Case {
    Bytes memory;
    fmn_matrix m;
    std::vector<Bytes> right;
    int n_threads;

    explicit Case(Rng& rng) {
        const int64_t n = any_size(rng), e = any_epochs(rng, n), format = rng() % 2;
        const int64_t width = format ? (n + 7) / 8 : n, padding = pick(rng, 0, 70), offset = pick(rng, 0, 63);
        const int layout = static_cast<int>(rng() % 8), density = static_cast<int>(pick(rng, 0, 8));
        memory.resize(offset + (e > 0 ? (e - 1) * (width + padding) + width : 0));  // no spare byte, so that AddressSanitizer sees any overrun
        for (auto& b : memory)  // any byte but zero is right; bits past the last sample are noise
            b = format ? static_cast<uint8_t>(rng()) : static_cast<int>(rng() % 8) < density ? 1 + rng() % 255 : 0;
        m = {memory.data() + offset, e, n, width + padding, format ? FMN_BITS : FMN_BYTES};
        if (layout == 0 && e > 0) m.data += (e - 1) * m.stride, m.stride = -m.stride;
        if (layout == 1) m.stride = 0;
        n_threads = static_cast<int>(pick(rng, 0, 3));
        for (int64_t i = 0; i < e; ++i) {
            right.emplace_back(n);
            const uint8_t* row = m.data + i * m.stride;
            for (int64_t j = 0; j < n; ++j) right[i][j] = format ? row[j / 8] >> j % 8 & 1 : row[j] != 0;
        }
        context = "(" + std::to_string(e) + " x " + std::to_string(n) + ", format " + std::to_string(format) + ", stride " +
                  std::to_string(m.stride) + ", offset " + std::to_string(offset) + ")";
    }
};

static void check_curves(const Case& c, Rng& rng) {
    const int64_t e = c.m.n_epochs, n = c.m.n_samples, n_groups = pick(rng, 1, 5);
    if (e == 0) return;
    const int64_t r = pick(rng, 0, e - 1), plane = n_groups * e;
    std::vector<int64_t> groups(n), counts(4 * e), expected(4 * e), by_group(4 * plane), by_loop(4 * plane);
    std::vector<double> weights(n), sums(4 * plane), sums_by_loop(4 * plane);
    for (auto& g : groups) g = pick(rng, 0, n_groups - 1);
    for (auto& w : weights) w = static_cast<double>(rng() % 1000) / 7;
    for (int64_t i = 0; i < e; ++i)
        for (int64_t j = 0; j < n; ++j) {
            const bool now = c.right[i][j], end = c.right[r][j], is[] = {now, now && !end, !now && end, now && end};
            for (int row = 0; row < 4; ++row)
                if (is[row]) {
                    const int64_t at = row * plane + groups[j] * e + i;
                    expected[row * e + i]++, by_loop[at]++, sums_by_loop[at] += weights[j];
                }
        }
    CHECK(fmn_curve_counts(&c.m, r, c.n_threads, counts.data()) == FMN_OK);
    CHECK(counts == expected);
    CHECK(fmn_group_counts(&c.m, r, groups.data(), n_groups, c.n_threads, by_group.data()) == FMN_OK);
    CHECK(by_group == by_loop);
    // Two pieces of the samples add up to the same bits.
    const int64_t cut = n > 8 ? n / 2 / 8 * 8 : 0;
    fmn_matrix head = c.m, tail = c.m;
    head.n_samples = cut, tail.n_samples = n - cut, tail.data += c.m.format == FMN_BITS ? cut / 8 : cut;
    CHECK(fmn_group_sums(&head, r, groups.data(), n_groups, weights.data(), c.n_threads, sums.data()) == FMN_OK);
    CHECK(fmn_group_sums(&tail, r, groups.data() + cut, n_groups, weights.data() + cut, c.n_threads, sums.data()) == FMN_OK);
    CHECK(sums == sums_by_loop);
    std::fill(counts.begin(), counts.end(), 0);
    CHECK(fmn_curve_counts(&tail, r, 1, counts.data()) == FMN_OK && fmn_curve_counts(&head, r, 2, counts.data()) == FMN_OK);
    CHECK(counts == expected);
}

static void check_samples(const Case& c) {
    const int64_t e = c.m.n_epochs, n = c.m.n_samples;
    std::vector<int32_t> counts(5 * n + 1, 77), expected(5 * n + 1, -1);
    expected[5 * n] = 77;
    for (int64_t j = 0; j < n; ++j) {
        int32_t* at = &expected[j];
        at[2 * n] = at[3 * n] = 0;
        for (int32_t i = 0; i < e; ++i) {
            if (c.right[i][j]) {
                if (at[0] < 0) at[0] = i;
                at[n] = i;
                at[3 * n]++;
            } else {
                at[4 * n] = i;
                at[2 * n] += i > 0 && c.right[i - 1][j];
            }
        }
    }
    CHECK(fmn_sample_counts(&c.m, c.n_threads, counts.data()) == FMN_OK);
    CHECK(counts == expected);
}

static void check_overlap(const Case& c) {
    const int64_t e = c.m.n_epochs, n = c.m.n_samples;
    if (e > 100) return;  // the loop below would be slow; large ones are checked in main
    std::vector<int64_t> counts(e * e + 1, 5), expected(e * e + 1, 5);
    for (int64_t i = 0; i < e; ++i)
        for (int64_t j = 0; j < e; ++j)
            for (int64_t s = 0; s < n; ++s) expected[i * e + j] += c.right[i][s] & c.right[j][s];
    CHECK(fmn_overlap_counts(&c.m, c.n_threads, counts.data()) == FMN_OK);
    CHECK(counts == expected);
}

static void check_packing(const Case& c, Rng& rng) {
    const int64_t e = c.m.n_epochs, n = c.m.n_samples, width = (n + 7) / 8, gap = pick(rng, 0, 9);
    Bytes bits(e * (width + gap) + 1, 0xEE), bytes(e * (n + gap) + 1, 0xEE);
    const fmn_matrix packed = {bits.data(), e, n, width + gap, FMN_BITS};
    if (c.m.format == FMN_BYTES) {
        CHECK(fmn_pack(&c.m, c.n_threads, bits.data(), width + gap) == FMN_OK);
        CHECK(fmn_unpack(&packed, c.n_threads, bytes.data(), n + gap) == FMN_OK);
        for (int64_t i = 0; i < e; ++i)
            if (n % 8) CHECK(bits[i * (width + gap) + n / 8] >> n % 8 == 0);
    } else {
        CHECK(fmn_pack(&c.m, 1, bits.data(), width) == FMN_INVALID_ARGUMENT);
        CHECK(fmn_unpack(&c.m, c.n_threads, bytes.data(), n + gap) == FMN_OK);
    }
    for (int64_t i = 0; n > 0 && i < e; ++i) CHECK(std::memcmp(&bytes[i * (n + gap)], c.right[i].data(), n) == 0);
    CHECK(bits.back() == 0xEE && bytes.back() == 0xEE);
    for (int64_t i = 0; gap && i < e; ++i) CHECK(bits[i * (width + gap) + width] == 0xEE && bytes[i * (n + gap) + n] == 0xEE);
}

template <class T>
static void check_predictions(Rng& rng, fmn_type type) {
    const int64_t n = any_size(rng), e = pick(rng, 0, 3), width = (n + 7) / 8, offset = pick(rng, 0, 9);
    const int64_t stride = n * static_cast<int64_t>(sizeof(T)) + pick(rng, 0, 9);
    Bytes memory(offset + e * stride + 1), bits(e * width + 1, 0xEE);
    std::vector<int64_t> labels(n);
    for (auto& y : labels) y = rng() % 8 ? pick(rng, 0, 120) : static_cast<int64_t>(rng());
    Bytes expected(e * width + 1);
    expected.back() = 0xEE;
    for (int64_t i = 0; i < e; ++i)
        for (int64_t j = 0; j < n; ++j) {
            const T p = static_cast<T>(rng() % 2 ? static_cast<uint64_t>(labels[j]) : rng());
            std::memcpy(&memory[offset + i * stride + j * sizeof(T)], &p, sizeof(T));
            const bool same = std::is_signed<T>::value || labels[j] >= 0
                                  ? static_cast<__int128>(p) == static_cast<__int128>(labels[j]) : false;
            expected[i * width + j / 8] |= same << j % 8;
        }
    CHECK(fmn_pack_predictions(memory.data() + offset, type, e, n, stride, labels.data(), 2, bits.data(), width) == FMN_OK);
    CHECK(bits == expected);
}

// Scores that are small integers, so that there are ties, and sometimes infinity, NaN or zero.
static double any_score(Rng& rng, bool nan) {
    const double inf = std::numeric_limits<double>::infinity(), special[] = {0.0, -0.0, inf, -inf};
    if (rng() % 8 == 0) return special[rng() % 4];
    return nan && rng() % 64 == 0 ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(pick(rng, -4, 4));
}

// The bits of a whole number, zero, infinity or NaN as IEEE half (10 bits of fraction) or bfloat16 (7).
static uint16_t half_bits(double v, int fraction, int bias) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0, infinity = static_cast<uint16_t>(0x7FFF >> fraction << fraction);
    if (std::isnan(v)) return 0x7FFF;
    if (std::isinf(v)) return sign | infinity;
    if (v == 0) return sign;
    const int exponent = std::ilogb(v);
    const int mantissa = static_cast<int>((std::fabs(v) / std::ldexp(1.0, exponent) - 1) * (1 << fraction));
    return static_cast<uint16_t>(sign | (exponent + bias) << fraction | mantissa);
}

static void put(uint8_t* to, fmn_type type, double v) {
    const float f = static_cast<float>(v);
    if (type == FMN_FLOAT64) return void(std::memcpy(to, &v, 8));
    if (type == FMN_FLOAT32) return void(std::memcpy(to, &f, 4));
    const uint16_t h = type == FMN_FLOAT16 ? half_bits(v, 10, 15) : half_bits(v, 7, 127);
    std::memcpy(to, &h, 2);
}

static int64_t size_of(fmn_type type) { return type == FMN_FLOAT64 ? 8 : type == FMN_FLOAT32 ? 4 : 2; }

static void check_scores(Rng& rng, fmn_type type) {
    const int64_t n = pick(rng, 0, 140), k = rng() % 4 ? pick(rng, 1, 12) : pick(rng, 1, 140), offset = pick(rng, 0, 9);
    const int64_t size = size_of(type), stride = k * size + pick(rng, 0, 9);
    Bytes memory(offset + n * stride + 1), bits((n + 7) / 8 + 1, 0xEE), expected((n + 7) / 8 + 1);
    expected.back() = 0xEE;
    std::vector<int64_t> labels(n);
    const bool nan = rng() % 8 == 0;
    bool any_nan = false;
    for (int64_t i = 0; i < n; ++i) {
        double best = 0;
        int64_t arg_max = -1, n_nan = 0;
        for (int64_t j = 0; j < k; ++j) {
            const double v = any_score(rng, nan);
            put(&memory[offset + i * stride + j * size], type, v);
            n_nan += std::isnan(v);
            if (arg_max < 0 || v > best) best = v, arg_max = j;
        }
        labels[i] = rng() % 2 && arg_max >= 0 ? arg_max : pick(rng, 0, k - 1);
        any_nan |= n_nan > 0;
        expected[i / 8] |= (n_nan == 0 && labels[i] == arg_max) << i % 8;
    }
    const auto status = fmn_pack_scores(memory.data() + offset, type, n, k, stride, labels.data(), 2, bits.data());
    CHECK(status == (any_nan ? FMN_NOT_A_NUMBER : FMN_OK));
    CHECK(bits == expected);
}

static fmn_type any_float(Rng& rng) { return static_cast<fmn_type>(pick(rng, FMN_FLOAT16, FMN_FLOAT64)); }

// Reads what `put` wrote, or any other finite number, subnormal ones included.
static double get(const uint8_t* p, fmn_type type) {
    double d;
    float f;
    uint16_t h;
    if (type == FMN_FLOAT64) return std::memcpy(&d, p, 8), d;
    if (type == FMN_FLOAT32) return std::memcpy(&f, p, 4), f;
    std::memcpy(&h, p, 2);
    const int n_bits = type == FMN_FLOAT16 ? 10 : 7, bias = type == FMN_FLOAT16 ? 15 : 127;
    const int exponent = (h & 0x7FFF) >> n_bits, fraction = h & ((1 << n_bits) - 1);
    const double v = std::ldexp(exponent ? (1 << n_bits) + fraction : fraction, std::max(exponent, 1) - bias - n_bits);
    return h & 0x8000 ? -v : v;
}

// A number in [0, 1], or in [-8, 0]: a multiple of 1 / units if units > 0, so that there are ties, or of any size.
static void put_any(Rng& rng, fmn_type type, int64_t units, bool low, uint8_t* to) {
    if (units == 0 && size_of(type) == 2) {
        const auto h = static_cast<uint16_t>(pick(rng, 0, type == FMN_FLOAT16 ? 0x3C00 : 0x3F80) | (low ? 0x8000 : 0));
        std::memcpy(to, &h, 2);
        return;
    }
    double v = units ? static_cast<double>(pick(rng, 0, units)) / static_cast<double>(units) : std::ldexp(rng() >> 11, -53);
    if (units == 0 && rng() % 16 == 0) v = std::ldexp(v, -static_cast<int>(rng() % 1075));
    put(to, type, low ? -8 * v : v);
}

struct Range { double lo, hi; };

// A predictor and epochs of random scores: as the library takes them, each array without a spare byte, and as doubles.
struct Mixture {
    fmn_mixture m;
    bool low;
    std::vector<Bytes> memory;  // of the epochs, then of the predictor
    std::vector<const void*> epochs;
    std::vector<std::vector<double>> scores;
    std::vector<int64_t> labels, weights;

    Mixture(Rng& rng, int64_t n, int64_t k, int64_t n_epochs) : low(rng() % 8 == 0), labels(n) {
        static const int64_t any_units[] = {0, 0, 4, 10, 64};
        const int64_t units = any_units[rng() % 5];
        const fmn_type types[] = {any_float(rng), any_float(rng)};
        for (int64_t e = 0; e <= n_epochs; ++e) {
            const fmn_type type = types[e == n_epochs];
            memory.emplace_back(n * k * size_of(type)), scores.emplace_back(n * k);
            const bool same = e > 0 && (e < n_epochs || types[0] == types[1]) && rng() % 8 == 0;  // ties at every epsilon
            if (same) memory[e] = memory[e - 1];
            for (int64_t i = 0; i < n * k; ++i) {
                uint8_t* at = memory[e].data() + i * size_of(type);
                if (!same) put_any(rng, type, units, low, at);
                scores[e][i] = get(at, type);
            }
            if (e < n_epochs) epochs.push_back(memory[e].data());
        }
        const int64_t most = rng() % 2 ? 3 : (int64_t(1) << 62) / (n + 1);
        if (rng() % 2) weights.resize(n);
        for (auto& w : weights) w = rng() % 4 ? pick(rng, 0, most) : 0;
        for (int64_t i = 0; i < n; ++i) {  // half of the labels where the first epoch is right
            const double* row = scores[0].data() + i * k;
            labels[i] = rng() % 2 ? std::max_element(row, row + k) - row : pick(rng, 0, k - 1);
        }
        m = {memory.back().data(), epochs.data(), n_epochs, types[1], types[0], n, k, labels.data(),
             weights.empty() ? nullptr : weights.data()};
        context = "(mixture " + std::to_string(n) + " x " + std::to_string(k) + ", types " + std::to_string(types[0]) + " " +
                  std::to_string(types[1]) + ", units " + std::to_string(units) + (low ? ", low" : "") + ")";
    }

    int64_t weight(int64_t i) const { return weights.empty() ? 1 : weights[i]; }

    std::vector<double> mean(int64_t first, int64_t last) const {
        std::vector<double> out = scores[first];
        for (int64_t e = first + 1; e <= last; ++e)
            for (size_t i = 0; i < out.size(); ++i) out[i] += scores[e][i];
        for (auto& v : out) v /= static_cast<double>(last - first + 1);
        return out;
    }

    // Whether sample i is right at epsilon; `then` are scores of all samples.
    bool right(int64_t i, const std::vector<double>& then, double epsilon) const {
        int64_t arg_max = 0;
        double best = 0;
        for (int64_t c = 0; c < m.n_classes; ++c) {
            const double a = epsilon * then[i * m.n_classes + c], b = (1 - epsilon) * scores.back()[i * m.n_classes + c];
            const double v = a + b;  // not one fused operation: -ffp-contract=off where the processor has them
            if (c == 0 || v > best) best = v, arg_max = c;
        }
        return arg_max == labels[i];
    }

    // Whether it might be right, with an error of 1e-13 in its lead.
    bool nearly_right(int64_t i, const std::vector<double>& then, double epsilon) const {
        const double *p = &scores.back()[i * m.n_classes], *q = &then[i * m.n_classes];
        bool is = true;
        for (int64_t c = 0; c < m.n_classes; ++c) {
            const double a = p[labels[i]] - p[c], b = q[labels[i]] - q[c];
            is &= (1 - epsilon) * a + epsilon * b >= -1e-13;
        }
        return is;
    }

    // The closed interval of epsilon on which it is right, an open end moved to the next double; lo > hi if it never is.
    Range interval(int64_t i, const std::vector<double>& then) const {
        const double *p = &scores.back()[i * m.n_classes], *q = &then[i * m.n_classes];
        const int64_t y = labels[i];
        double lo = 0, hi = 1;
        for (int64_t c = 0; c < m.n_classes; ++c) {
            const double a = p[y] - p[c], b = q[y] - q[c];
            const bool lost_now = c < y ? a <= 0 : a < 0, lost_then = c < y ? b <= 0 : b < 0;
            if (lost_now && lost_then) return {1, 0};
            const double crossing = std::max(a / (a - b), std::numeric_limits<double>::denorm_min());
            if (lost_now) lo = std::max(lo, c < y ? std::min(std::nextafter(crossing, 2), 1.0) : crossing);
            if (lost_then) hi = std::min(hi, c < y ? std::nextafter(crossing, -1) : crossing);
        }
        return {lo, hi};
    }
};

static void check_mixture_right(const Mixture& x, Rng& rng) {
    const int64_t first = pick(rng, 0, x.m.n_epochs - 1), last = pick(rng, first, x.m.n_epochs - 1);
    std::vector<double> epsilon(rng() % 16 ? pick(rng, 0, 6) : pick(rng, 62, 66));
    for (auto& e : epsilon) e = rng() % 4 ? std::ldexp(rng() >> 11, -53) : 0.25 * static_cast<double>(pick(rng, -1, 5));
    std::vector<int64_t> right(epsilon.size(), 5), expected(right), again(right);
    const auto then = x.mean(first, last);
    for (size_t j = 0; j < epsilon.size(); ++j)
        for (int64_t i = 0; i < x.m.n_samples; ++i) expected[j] += x.right(i, then, epsilon[j]) ? x.weight(i) : 0;
    const int n_threads = static_cast<int>(pick(rng, 0, 3)), n = static_cast<int>(epsilon.size());
    CHECK(fmn_mixture_right(&x.m, first, last, epsilon.data(), n, n_threads, right.data()) == FMN_OK);
    CHECK(right == expected);
    CHECK(fmn_mixture_right(&x.m, first, last, epsilon.data(), n, 3, again.data()) == FMN_OK && again == right);
}

static void check_best_epsilon(const Mixture& x, Rng& rng) {
    const int64_t n_windows = pick(rng, 0, 3), n_grid = pick(rng, 0, 6), n = x.m.n_samples;
    std::vector<int64_t> windows, right(n_windows), right_again(n_windows);
    for (int64_t c = 0; c < n_windows; ++c) {
        windows.push_back(pick(rng, 0, x.m.n_epochs - 1));
        windows.push_back(pick(rng, windows.back(), x.m.n_epochs - 1));
    }
    std::vector<double> grid(n_grid), epsilon(n_windows), epsilon_again(n_windows);
    for (auto& g : grid) g = rng() % 2 ? std::ldexp(rng() >> 11, -53) : 0.125 * static_cast<double>(pick(rng, 0, 8));
    for (int64_t j = 0; n > 0 && n_windows > 0 && j < n_grid; j += 2) {  // where rounding decides
        const Range v = x.interval(pick(rng, 0, n - 1), x.mean(windows[0], windows[1]));
        grid[j] = std::min(std::max((v.lo > 0 ? v.lo : v.hi) + std::ldexp(pick(rng, -4, 4), -53), 0.0), 1.0);
    }
    std::sort(grid.begin(), grid.end());
    std::vector<int64_t> on_grid(n_grid ? n_windows : 0), on_grid_again(on_grid);
    const int n_threads = static_cast<int>(pick(rng, 0, 3));
    CHECK(fmn_best_epsilon(&x.m, windows.data(), n_windows, grid.data(), n_grid, n_threads, epsilon.data(), right.data(),
                           on_grid.data()) == FMN_OK);
    CHECK(fmn_best_epsilon(&x.m, windows.data(), n_windows, grid.data(), n_grid, 3, epsilon_again.data(), right_again.data(),
                           on_grid_again.data()) == FMN_OK);
    CHECK(epsilon == epsilon_again && right == right_again && on_grid == on_grid_again);
    for (int64_t c = 0; c < n_windows; ++c) {
        const int64_t first = windows[2 * c], last = windows[2 * c + 1];
        const auto then = x.mean(first, last);
        std::vector<std::tuple<double, double, int64_t>> intervals;
        std::vector<double> starts = {0};
        for (int64_t i = 0; i < n; ++i) {
            const auto v = x.interval(i, then);
            if (v.lo > v.hi || x.weight(i) == 0) continue;
            intervals.emplace_back(v.lo, v.hi, x.weight(i)), starts.push_back(v.lo);
        }
        // The most weight first, then a stretch that is long enough, then the lowest.
        std::tuple<int64_t, bool, double, double> best{1, false, 0, 0};
        for (const double at : starts) {
            int64_t sum = 0;
            double end = 1;
            for (const auto& [lo, hi, w] : intervals) {
                if (lo <= at && at <= hi) sum += w;
                if (at <= hi) end = std::min(end, hi);
            }
            best = std::min(best, std::make_tuple(-sum, end - at <= 1e-12, at, end));
        }
        int64_t at_epsilon = 0;
        for (const auto& [lo, hi, w] : intervals)
            if (lo <= epsilon[c] && epsilon[c] <= hi) at_epsilon += w;
        CHECK(0 <= epsilon[c] && epsilon[c] <= 1);
        CHECK(right[c] == -std::get<0>(best) && right[c] == at_epsilon);
        CHECK(epsilon[c] == (std::get<2>(best) + std::get<3>(best)) / 2);
        if (n_grid == 0) continue;
        std::vector<int64_t> evaluated(n_grid), at_most(n_grid);
        CHECK(fmn_mixture_right(&x.m, first, last, grid.data(), n_grid, 1, evaluated.data()) == FMN_OK);
        for (int64_t j = 0; j < n_grid; ++j)
            for (int64_t i = 0; i < n; ++i) at_most[j] += x.nearly_right(i, then, grid[j]) ? x.weight(i) : 0;
        if (!x.low) CHECK(on_grid[c] >= *std::max_element(evaluated.begin(), evaluated.end()));  // rounding grows with scores
        CHECK(on_grid[c] <= *std::max_element(at_most.begin(), at_most.end()));
    }
}

// With what earlier calls have seen of the windows, for other predictors too: the same results, and upper bounds.
static void check_seen(const Mixture& x, Rng& rng) {
    fmn_mixture m = x.m;
    const int64_t n_windows = pick(rng, 1, 3), n = x.m.n_samples;
    std::vector<int64_t> windows, right(n_windows), bound(n_windows), expected(n_windows);
    for (int64_t c = 0; c < n_windows; ++c) {
        windows.push_back(pick(rng, 0, x.m.n_epochs - 1));
        windows.push_back(pick(rng, windows.back(), x.m.n_epochs - 1));
    }
    std::vector<double> epsilon(n_windows), expected_epsilon(n_windows), now(n * x.m.n_classes);
    std::vector<uint16_t> seen(n_windows * n + 1);
    for (int round = 0; round < 3; ++round) {
        CHECK(fmn_best_epsilon(&m, windows.data(), n_windows, nullptr, 0, 1, expected_epsilon.data(), expected.data(),
                               nullptr) == FMN_OK);
        for (const int exact : {0, 1, 0}) {
            auto& out = exact ? right : bound;
            CHECK(fmn_best_epsilon_seen(&m, windows.data(), n_windows, exact, 1 + 2 * exact, seen.data(), epsilon.data(),
                                        out.data()) == FMN_OK);
            for (int64_t c = 0; c < n_windows; ++c) CHECK(out[c] >= expected[c]);
            if (exact) CHECK(right == expected && epsilon == expected_epsilon);
        }
        for (auto& score : now) score = 0.125 * static_cast<double>(pick(rng, 0, 8));
        m.current = now.data(), m.current_type = FMN_FLOAT64;
    }
    CHECK(seen.back() == 0);
}

static void check_mixture(Rng& rng) {
    const int64_t n = pick(rng, 0, rng() % 4 ? 20 : rng() % 4 ? 140 : 600);  // past 64 ends of intervals, buckets sort them
    const int64_t k = pick(rng, 1, rng() % 4 ? 12 : 40);
    const Mixture x(rng, n, k, pick(rng, 1, 5));
    check_mixture_right(x, rng);
    check_best_epsilon(x, rng);
    check_seen(x, rng);
}

// Rows of 64ths, which every type holds and which add up without rounding. One row has an error, or nearly has one.
static void check_probabilities(Rng& rng) {
    const fmn_type type = any_float(rng);
    const int64_t n = pick(rng, 0, 70), k = pick(rng, 1, 40), size = size_of(type), kind = n > 0 ? pick(rng, 0, 7) : 0;
    std::vector<double> rows(n * k);
    for (int64_t i = 0; i < n; ++i)
        for (int unit = 0; unit < 64; ++unit) rows[i * k + pick(rng, 0, k - 1)] += 1.0 / 64;
    if (kind > 0) {
        const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
        const double off[] = {0, 2.0 / 64, -2.0 / 64, 3.0 / 64, -3.0 / 64}, special[] = {-inf, inf, nan};
        double *row = &rows[pick(rng, 0, n - 1) * k], *most = std::max_element(row, row + k), *any = row + pick(rng, 0, k - 1);
        if (kind < 5) *most += off[kind];
        if (kind == 5) *most += *any + 1.0 / 64, *any = -1.0 / 64;  // the sum is still right
        if (kind == 6) *any = special[rng() % 3];
        if (kind == 7) std::fill(row, row + k, 0.0);
    }
    Bytes memory(n * k * size);
    for (int64_t j = 0; j < n * k; ++j) put(&memory[j * size], type, rows[j] == 0 && rng() % 2 ? -0.0 : rows[j]);
    int found = 7;
    context = "(probabilities, kind " + std::to_string(kind) + ", type " + std::to_string(type) + ")";
    const int n_threads = static_cast<int>(pick(rng, 0, 3));
    CHECK(fmn_check_probabilities(memory.data(), type, n, k, 2.0 / 64, n_threads, &found) == FMN_OK);
    CHECK(found == (kind < 3));
}

static void check_case(Rng& rng) {
    const Case c(rng);
    check_curves(c, rng);
    check_samples(c);
    check_overlap(c);
    check_packing(c, rng);
    context = "(predictions)";
    check_predictions<int8_t>(rng, FMN_INT8), check_predictions<uint8_t>(rng, FMN_UINT8);
    check_predictions<int16_t>(rng, FMN_INT16), check_predictions<uint16_t>(rng, FMN_UINT16);
    check_predictions<int32_t>(rng, FMN_INT32), check_predictions<uint32_t>(rng, FMN_UINT32);
    check_predictions<int64_t>(rng, FMN_INT64), check_predictions<uint64_t>(rng, FMN_UINT64);
    context = "(scores)";
    check_scores(rng, any_float(rng));
    check_mixture(rng);
    check_probabilities(rng);
}

// Large enough for threads inside one call, in both formats.
static void check_large(Rng& rng) {
    const int64_t e = 70, n = (1 << 20) + 13;
    Bytes bytes(e * n), bits(e * ((n + 7) / 8));
    for (auto& b : bytes) b = rng() % 3 == 0;
    const fmn_matrix m = {bytes.data(), e, n, n, FMN_BYTES};
    CHECK(fmn_pack(&m, 4, bits.data(), (n + 7) / 8) == FMN_OK);
    const fmn_matrix p = {bits.data(), e, n, (n + 7) / 8, FMN_BITS};
    std::vector<int64_t> of_bytes(4 * e), of_bits(4 * e), right(e), overlap(e * e), overlap_bits(e * e);
    for (int64_t i = 0; i < e; ++i)
        for (int64_t j = 0; j < n; ++j) right[i] += bytes[i * n + j];
    CHECK(fmn_curve_counts(&m, 3, 4, of_bytes.data()) == FMN_OK && fmn_curve_counts(&p, 3, 4, of_bits.data()) == FMN_OK);
    CHECK(of_bytes == of_bits && std::equal(right.begin(), right.end(), of_bytes.begin()));
    CHECK(fmn_overlap_counts(&m, 4, overlap.data()) == FMN_OK && fmn_overlap_counts(&p, 4, overlap_bits.data()) == FMN_OK);
    CHECK(overlap == overlap_bits);
    for (int64_t i = 0; i < e; ++i) {
        CHECK(overlap[i * e + i] == right[i]);
        CHECK(overlap[i * e + 3] == of_bytes[3 * e + i] && overlap[3 * e + i] == of_bytes[3 * e + i]);
    }
    std::vector<int32_t> samples(5 * n), samples_bits(5 * n);
    CHECK(fmn_sample_counts(&m, 4, samples.data()) == FMN_OK && fmn_sample_counts(&p, 1, samples_bits.data()) == FMN_OK);
    CHECK(samples == samples_bits);
    Bytes again(bytes.size());
    CHECK(fmn_unpack(&p, 4, again.data(), n) == FMN_OK && again == bytes);
}

// Mixtures with work for several threads in one call, and more windows than are held at once: six windows, repeated.
static void check_large_mixture(Rng& rng) {
    const int64_t n = 30011, k = 10, n_windows = 75, n_grid = 21;
    const Mixture x(rng, n, k, 3);
    const int64_t six[][2] = {{0, 0}, {1, 1}, {2, 2}, {0, 1}, {1, 2}, {0, 2}};
    std::vector<int64_t> windows, right[2], on_grid[2], at[2];
    for (int64_t c = 0; c < n_windows; ++c) windows.insert(windows.end(), six[c % 6], six[c % 6] + 2);
    std::vector<double> grid(n_grid), epsilon[2];
    for (int64_t j = 0; j < n_grid; ++j) grid[j] = static_cast<double>(j) / (n_grid - 1);
    for (int t = 0; t < 2; ++t) {
        epsilon[t].resize(n_windows), right[t].resize(n_windows), on_grid[t].resize(n_windows), at[t].resize(n_grid);
        CHECK(fmn_best_epsilon(&x.m, windows.data(), n_windows, grid.data(), n_grid, 1 + 2 * t, epsilon[t].data(),
                               right[t].data(), on_grid[t].data()) == FMN_OK);
        CHECK(fmn_mixture_right(&x.m, 0, 2, grid.data(), n_grid, 1 + 2 * t, at[t].data()) == FMN_OK);
    }
    CHECK(epsilon[0] == epsilon[1] && right[0] == right[1] && on_grid[0] == on_grid[1] && at[0] == at[1]);
    for (int64_t c = 0; c + 6 < n_windows; ++c) CHECK(epsilon[0][c] == epsilon[0][c + 6] && right[0][c] == right[0][c + 6]);
    for (int64_t c = 0; c < 6; ++c) {
        const auto then = x.mean(six[c][0], six[c][1]);
        int64_t sum = 0, some = 0;  // the weight right at epsilon, and at another place
        const double other = std::ldexp(rng() >> 11, -53);
        for (int64_t i = 0; i < n; ++i) {
            const auto v = x.interval(i, then);
            if (v.lo <= epsilon[0][c] && epsilon[0][c] <= v.hi) sum += x.weight(i);
            if (v.lo <= other && other <= v.hi) some += x.weight(i);
        }
        CHECK(sum == right[0][c] && sum >= some);
    }
    if (!x.low) CHECK(on_grid[0][5] >= *std::max_element(at[0].begin(), at[0].end()));
    std::vector<double> rows(200003 * 8, 0.125);
    int sound[3];
    CHECK(fmn_check_probabilities(rows.data(), FMN_FLOAT64, 200003, 8, 1e-6, 3, sound) == FMN_OK);
    rows.back() = 0.126;
    CHECK(fmn_check_probabilities(rows.data(), FMN_FLOAT64, 200003, 8, 1e-6, 1, sound + 1) == FMN_OK);
    CHECK(fmn_check_probabilities(rows.data(), FMN_FLOAT64, 200003, 8, 1e-6, 3, sound + 2) == FMN_OK);
    CHECK(sound[0] == 1 && sound[1] == 0 && sound[2] == 0);
}

// A zero stride repeats one row: counts past 2^32 without the memory.
static void check_overflow() {
    const int64_t n = 1 << 20, e = 4200;
    const Bytes one(n, 255);
    for (const auto format : {FMN_BYTES, FMN_BITS}) {
        // All epochs are the same row; as bits it holds 8 n samples, and 8 n e = 3.5e10 is past 2^32.
        const int64_t samples = format == FMN_BITS ? 8 * n : n;
        const fmn_matrix m = {one.data(), e, samples, 0, format};
        std::vector<int64_t> counts(4 * e);
        const int times = static_cast<int>((int64_t(1) << 33) / samples);  // added up in one output
        const fmn_matrix two = {one.data(), 2, samples, 0, format};
        std::vector<int64_t> many(8), overlap(4);
        for (int i = 0; i < times; ++i) {
            CHECK(fmn_curve_counts(&two, 0, 0, many.data()) == FMN_OK);
            if (format == FMN_BITS) CHECK(fmn_overlap_counts(&two, 0, overlap.data()) == FMN_OK);
        }
        CHECK(many[0] == int64_t(1) << 33 && many[7] == many[0] && many[2] == 0 && many[4] == 0);
        CHECK(format == FMN_BYTES || (overlap[0] == many[0] && overlap[1] == many[0]));
        CHECK(fmn_curve_counts(&m, 0, 0, counts.data()) == FMN_OK);
        for (int64_t i = 0; i < e; ++i) CHECK(counts[i] == samples && counts[3 * e + i] == samples && counts[e + i] == 0);
    }
    // A single count past 2^32 in one call would need a row of 2^33 samples in memory. Right-to-wrong changes and epochs are
    // bounded by n_epochs instead, which passes 2^16 here.
    const uint8_t pair[2] = {1, 0};
    const int64_t many = 200001;
    std::vector<int32_t> counts(5);
    const fmn_matrix same = {pair, many, 1, 0, FMN_BYTES};
    CHECK(fmn_sample_counts(&same, 1, counts.data()) == FMN_OK);
    CHECK(counts[0] == 0 && counts[1] == many - 1 && counts[2] == 0 && counts[3] == many && counts[4] == -1);
}

static void check_errors() {
    const Bytes one(64, 1);
    std::vector<int64_t> counts(400);
    std::vector<int32_t> samples(400);
    const int64_t groups[8] = {0, 1, 2, 0, 0, 0, 0, 0};
    const double weights[8] = {};
    uint8_t out[64];
    fmn_matrix m = {one.data(), 2, 8, 8, FMN_BYTES};
    const auto bad = FMN_INVALID_ARGUMENT;
    CHECK(fmn_curve_counts(&m, 2, 0, counts.data()) == bad && fmn_curve_counts(&m, -1, 0, counts.data()) == bad);
    CHECK(fmn_curve_counts(nullptr, 0, 0, counts.data()) == bad && fmn_curve_counts(&m, 0, 0, nullptr) == bad);
    CHECK(fmn_group_counts(&m, 0, groups, 2, 0, counts.data()) == bad && fmn_group_counts(&m, 0, groups, 0, 0, counts.data()) == bad);
    CHECK(fmn_group_counts(&m, 0, nullptr, 3, 0, counts.data()) == bad);
    CHECK(fmn_group_sums(&m, 0, groups, 3, nullptr, 0, reinterpret_cast<double*>(counts.data())) == bad);
    CHECK(fmn_group_sums(&m, 0, groups, 3, weights, 0, nullptr) == bad);
    CHECK(fmn_sample_counts(&m, 0, nullptr) == bad && fmn_overlap_counts(&m, 0, nullptr) == bad);
    CHECK(fmn_pack(&m, 0, nullptr, 1) == bad && fmn_unpack(&m, 0, out, 8) == bad);
    CHECK(fmn_pack_predictions(one.data(), FMN_FLOAT32, 1, 8, 8, groups, 0, out, 1) == bad);
    CHECK(fmn_pack_predictions(one.data(), FMN_INT8, -1, 8, 8, groups, 0, out, 1) == bad);
    CHECK(fmn_pack_predictions(one.data(), FMN_INT8, 1, 8, 8, nullptr, 0, out, 1) == bad);
    CHECK(fmn_pack_scores(one.data(), FMN_INT8, 4, 4, 4, groups, 0, out) == bad);
    CHECK(fmn_pack_scores(one.data(), FMN_FLOAT32, 4, 2, 8, groups, 0, out) == bad);  // label 2 of 2 classes
    CHECK(fmn_pack_scores(one.data(), FMN_FLOAT32, 4, 0, 8, groups, 0, out) == bad);
    for (const int64_t e : {int64_t(-1), int64_t(1) << 31}) {
        const fmn_matrix wrong = {one.data(), e, 8, 0, FMN_BYTES};
        CHECK(fmn_sample_counts(&wrong, 0, samples.data()) == bad);
    }
    m.format = 7;
    CHECK(fmn_curve_counts(&m, 0, 0, counts.data()) == bad);
    m = {nullptr, 2, 8, 8, FMN_BYTES};
    CHECK(fmn_curve_counts(&m, 0, 0, counts.data()) == bad);
    for (const int64_t c : counts) CHECK(c == 0);  // nothing was written
}

// Truthful calls: there is nothing to read or write, whatever the other sizes are.
static void check_nothing_to_read() {
    const int64_t most = std::numeric_limits<int64_t>::max();
    int64_t right = 7, on_grid = 7;
    double out = 7;
    int sound = 7;
    const double points[] = {0, 1};
    const void* one[1] = {nullptr};
    for (const int32_t format : {FMN_BYTES, FMN_BITS}) {
        const auto pack = format == FMN_BYTES ? fmn_pack : fmn_unpack;
        for (const auto& m : {fmn_matrix{nullptr, 0, most, 0, format}, fmn_matrix{nullptr, most, 0, 0, format}})
            CHECK(pack(&m, 3, nullptr, 0) == FMN_OK);
        const fmn_matrix no_epochs = {nullptr, 0, most, 0, format}, no_samples = {nullptr, (1u << 31) - 1, 0, 0, format};
        CHECK(fmn_overlap_counts(&no_epochs, 3, nullptr) == FMN_OK);
        CHECK(fmn_sample_counts(&no_samples, 3, nullptr) == FMN_OK);
        CHECK(fmn_curve_counts(&no_epochs, 0, 3, &right) == FMN_INVALID_ARGUMENT);  // no reference epoch
    }
    for (const auto& e : {std::make_pair(int64_t(0), most), std::make_pair(most, int64_t(0))})
        CHECK(fmn_pack_predictions(nullptr, FMN_INT64, e.first, e.second, 0, nullptr, 3, nullptr, 0) == FMN_OK);
    for (const int64_t n_classes : {int64_t(1) << 60, int64_t(1) << 61, most}) {
        CHECK(fmn_pack_scores(nullptr, FMN_FLOAT64, 0, n_classes, 0, nullptr, 3, nullptr) == FMN_OK);
        CHECK(fmn_check_probabilities(nullptr, FMN_FLOAT16, 0, n_classes, 0.01, 3, &sound) == FMN_OK && sound == 1);
        const int64_t windows[] = {0, 0, 0, most - 1, most - 1, most - 1};
        for (const int64_t n_epochs : {int64_t(1), most}) {
            const fmn_mixture m = {nullptr, one, n_epochs, FMN_FLOAT32, FMN_FLOAT64, 0, n_classes, nullptr, nullptr};
            for (int64_t w = 0; w < (n_epochs == 1 ? 1 : 3); ++w) {
                CHECK(fmn_mixture_right(&m, windows[2 * w], windows[2 * w + 1], points, 2, 3, &right) == FMN_OK);
                CHECK(fmn_best_epsilon(&m, windows + 2 * w, 1, points, 2, 3, &out, &right, &on_grid) == FMN_OK);
                CHECK(out == 0.5 && right == 0 && on_grid == 0);
            }
        }
    }
}

// Sizes whose product is above 2^62, and numbers that are no fmn_type, are refused before anything is read.
static void check_impossible_arguments() {
    const Bytes one(64, 1);
    const int64_t most = std::numeric_limits<int64_t>::max(), half = int64_t(1) << 32, labels[1] = {0};
    const double points[] = {0, 1};
    const void* epochs[1] = {one.data()};
    const auto bad = FMN_INVALID_ARGUMENT;
    int64_t counts[8] = {};
    int32_t samples[8] = {};
    double out = 0;
    uint8_t bits[8] = {};
    int sound = 7;
    for (const auto& size : {std::make_pair(int64_t(1), most), std::make_pair(most, int64_t(2)), std::make_pair(half, half)}) {
        const fmn_matrix m = {one.data(), size.first, size.second, 0, FMN_BYTES};
        CHECK(fmn_curve_counts(&m, 0, 0, counts) == bad && fmn_group_counts(&m, 0, labels, 1, 0, counts) == bad);
        CHECK(fmn_group_sums(&m, 0, labels, 1, points, 0, &out) == bad && fmn_sample_counts(&m, 0, samples) == bad);
        CHECK(fmn_overlap_counts(&m, 0, counts) == bad && fmn_pack(&m, 0, bits, 0) == bad);
        CHECK(fmn_pack_predictions(one.data(), FMN_INT8, size.first, size.second, 0, labels, 0, bits, 0) == bad);
        CHECK(fmn_pack_scores(one.data(), FMN_FLOAT16, size.first, size.second, 0, labels, 0, bits) == bad);
        CHECK(fmn_check_probabilities(one.data(), FMN_FLOAT16, size.first, size.second, 1, 0, &sound) == bad);
        const fmn_mixture p = {one.data(), epochs, 1, FMN_FLOAT16, FMN_FLOAT16, size.first, size.second, labels, nullptr};
        CHECK(fmn_mixture_right(&p, 0, 0, points, 2, 0, counts) == bad);
        CHECK(fmn_best_epsilon(&p, counts, 1, points, 2, 0, &out, counts + 2, counts + 3) == bad);
    }
    for (const int32_t type : {-1, 12, 15, 16, 99, INT32_MIN, INT32_MAX}) {
        CHECK(fmn_pack_predictions(one.data(), type, 1, 1, 8, labels, 0, bits, 1) == bad);
        CHECK(fmn_pack_scores(one.data(), type, 1, 1, 8, labels, 0, bits) == bad);
        CHECK(fmn_check_probabilities(one.data(), type, 1, 1, 1, 0, &sound) == bad);
        const fmn_mixture p = {one.data(), epochs, 1, type, FMN_FLOAT16, 1, 1, labels, nullptr};
        CHECK(fmn_mixture_right(&p, 0, 0, points, 2, 0, counts) == bad);
        const fmn_matrix m = {one.data(), 1, 8, 8, type};
        CHECK(fmn_curve_counts(&m, 0, 0, counts) == bad && fmn_unpack(&m, 0, bits, 8) == bad);
    }
    for (int i = 0; i < 8; ++i) CHECK(counts[i] == 0 && samples[i] == 0 && bits[i] == 0 && out == 0 && sound == 7);
}

static void check_mixture_errors() {
    const float p[6] = {};
    const void *epochs[] = {p, p}, *missing[] = {p, nullptr};
    const int64_t labels[] = {0, 1}, negative[] = {0, -1}, windows[] = {0, 1, 1, 1};
    const double points[] = {0, 1};
    const auto bad = FMN_INVALID_ARGUMENT;
    int sound = 7;
    int64_t right[2] = {7, 7}, on_grid[2] = {7, 7};
    uint16_t seen[4] = {};
    double epsilon[2] = {7, 7};
    const fmn_mixture good = {p, epochs, 2, FMN_FLOAT32, FMN_FLOAT32, 2, 3, labels, nullptr};
    const auto both_bad = [&](const fmn_mixture* m) {
        return fmn_mixture_right(m, 0, 1, points, 2, 0, right) == bad &&
               fmn_best_epsilon(m, windows, 2, points, 2, 0, epsilon, right, on_grid) == bad;
    };
    CHECK(both_bad(nullptr));
    fmn_mixture wrong[12];
    std::fill(wrong, wrong + 12, good);
    wrong[0].current = nullptr, wrong[1].epochs = nullptr, wrong[2].labels = nullptr;
    wrong[3].epochs = missing;
    wrong[4].n_epochs = -1, wrong[5].n_samples = -1, wrong[6].n_classes = 0;
    wrong[7].type = FMN_INT32, wrong[8].current_type = FMN_UINT8, wrong[9].type = 12;
    wrong[10].n_classes = 1, wrong[11].labels = negative;
    for (const auto& m : wrong) CHECK(both_bad(&m));
    const int64_t outside[][2] = {{-1, 0}, {1, 0}, {0, 2}, {2, 2}};
    for (const auto& w : outside) {
        CHECK(fmn_mixture_right(&good, w[0], w[1], points, 2, 0, right) == bad);
        CHECK(fmn_best_epsilon(&good, w, 1, points, 2, 0, epsilon, right, on_grid) == bad);
    }
    CHECK(fmn_mixture_right(&good, 0, 1, nullptr, 2, 0, right) == bad);
    CHECK(fmn_mixture_right(&good, 0, 1, points, 2, 0, nullptr) == bad);
    CHECK(fmn_mixture_right(&good, 0, 1, points, -1, 0, right) == bad);
    CHECK(fmn_best_epsilon(&good, nullptr, 2, points, 2, 0, epsilon, right, on_grid) == bad);
    CHECK(fmn_best_epsilon(&good, windows, -1, points, 2, 0, epsilon, right, on_grid) == bad);
    CHECK(fmn_best_epsilon(&good, windows, 2, nullptr, 2, 0, epsilon, right, on_grid) == bad);
    CHECK(fmn_best_epsilon(&good, windows, 2, points, -1, 0, epsilon, right, on_grid) == bad);
    CHECK(fmn_best_epsilon(&good, windows, 2, points, int64_t(1) << 31, 0, epsilon, right, on_grid) == bad);
    CHECK(fmn_best_epsilon(&good, windows, 2, points, 2, 0, nullptr, right, on_grid) == bad);
    CHECK(fmn_best_epsilon(&good, windows, 2, points, 2, 0, epsilon, nullptr, on_grid) == bad);
    CHECK(fmn_best_epsilon(&good, windows, 2, points, 2, 0, epsilon, right, nullptr) == bad);
    CHECK(fmn_best_epsilon_seen(&good, windows, 2, 1, 0, nullptr, epsilon, right) == bad);
    CHECK(fmn_best_epsilon_seen(nullptr, windows, 2, 1, 0, seen, epsilon, right) == bad);
    CHECK(fmn_best_epsilon_seen(&good, windows, 2, 0, 0, seen, epsilon, nullptr) == bad);
    CHECK(fmn_check_probabilities(p, FMN_INT8, 2, 3, 1, 0, &sound) == bad);
    CHECK(fmn_check_probabilities(p, FMN_FLOAT32, 2, 0, 1, 0, &sound) == bad);
    CHECK(fmn_check_probabilities(p, FMN_FLOAT32, -1, 3, 1, 0, &sound) == bad);
    CHECK(fmn_check_probabilities(nullptr, FMN_FLOAT32, 2, 3, 1, 0, &sound) == bad);
    CHECK(fmn_check_probabilities(p, FMN_FLOAT32, 2, 3, 1, 0, nullptr) == bad);
    for (int i = 0; i < 2; ++i) CHECK(right[i] == 7 && on_grid[i] == 7 && epsilon[i] == 7 && sound == 7);
    // Without samples no arrays are needed, and without a grid no place for its result.
    const fmn_mixture none = {nullptr, nullptr, 2, FMN_FLOAT32, FMN_FLOAT64, 0, 3, nullptr, nullptr};
    CHECK(fmn_mixture_right(&good, 0, 1, nullptr, 0, 0, nullptr) == FMN_OK);
    CHECK(fmn_best_epsilon(&good, nullptr, 0, nullptr, 0, 0, nullptr, nullptr, nullptr) == FMN_OK);
    CHECK(fmn_best_epsilon(&none, windows, 2, nullptr, 0, 0, epsilon, right, nullptr) == FMN_OK);
    CHECK(right[0] == 0 && right[1] == 0 && epsilon[0] == 0.5 && epsilon[1] == 0.5);
    CHECK(fmn_check_probabilities(nullptr, FMN_FLOAT32, 0, 3, 0, 0, &sound) == FMN_OK && sound == 1);
}

int main(int argc, char** argv) {
    const char* wanted = std::getenv("FMN_ISA");
    if (wanted && std::strcmp(wanted, fmn_instruction_set()) != 0) return 77;  // not on this processor: skipped
    const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 20000;
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10)
                                   : static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
    std::printf("instruction set %s, %d threads, %lld cases, seed %llu\n", fmn_instruction_set(), fmn_threads(),
                static_cast<long long>(cases), static_cast<unsigned long long>(seed));
    std::fflush(stdout);
    Rng rng(seed);
    for (int64_t i = 0; i < cases; ++i) check_case(rng);
    context = "(large)";
    check_errors();
    check_nothing_to_read();
    check_impossible_arguments();
    check_mixture_errors();
    check_large_mixture(rng);
    if (cases > 1000) check_large(rng), check_overflow();

    // Eight threads in the library at once.
    const Bytes bytes(1 << 20, 1);
    const fmn_matrix m = {bytes.data(), 20, 1 << 20, 0, FMN_BYTES};
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; ++t)
        threads.emplace_back([&m] {
            std::vector<int64_t> counts(80), overlap(400);
            CHECK(fmn_curve_counts(&m, 4, 2, counts.data()) == FMN_OK && counts[0] == m.n_samples && counts[79] == counts[0]);
            CHECK(fmn_overlap_counts(&m, 2, overlap.data()) == FMN_OK && overlap[1] == m.n_samples);
        });
    for (auto& t : threads) t.join();
    std::puts("ok");
    return 0;
}
