// Kernels as plain loops. They are the portable set and the tails of the other sets; inlined into functions of a wider
// instruction set, they are also the loops that the compiler vectorises well itself. They are always inlined, so that no copy
// compiled for AVX is shared by accident.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifdef __GNUC__
#define FMN_INLINE inline __attribute__((always_inline))
#else
#define FMN_INLINE inline
#endif

namespace fmn {
namespace loops {

template <class T>
FMN_INLINE T load(const void* p) {  // of any alignment
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// Population count by pairs, nibbles and one multiplication, with 64-bit integers only.
FMN_INLINE int64_t popcount(uint64_t v) {
    v -= (v >> 1) & 0x5555555555555555u;
    v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
    return static_cast<int64_t>((((v + (v >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u) >> 56);
}

// Eight bytes to eight bits: each nonzero byte to 1, then one multiplication that moves byte k's to bit k of the top byte.
FMN_INLINE uint8_t pack8(const uint8_t* bytes) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    uint64_t v = 0;
    for (int k = 0; k < 8; ++k) v |= uint64_t(bytes[k]) << 8 * k;
#else
    uint64_t v = load<uint64_t>(bytes);
#endif
    v = ((((v & 0x7F7F7F7F7F7F7F7Fu) + 0x7F7F7F7F7F7F7F7Fu) | v) >> 7) & 0x0101010101010101u;
    return static_cast<uint8_t>(v * 0x0102040810204080u >> 56);
}

FMN_INLINE void pack(const uint8_t* bytes, int64_t n, uint8_t* bits) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) bits[i / 8] = pack8(bytes + i);
    if (i == n) return;
    uint8_t last[8] = {};
    for (int k = 0; i + k < n; ++k) last[k] = bytes[i + k];
    bits[i / 8] = pack8(last);
}

// Eight bits to eight bytes: repeat the byte eight times, keep one bit of each, then turn nonzero bytes into 1.
FMN_INLINE void unpack(const uint8_t* bits, int64_t n, uint8_t* bytes) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const uint64_t own = (bits[i / 8] * 0x0101010101010101u) & 0x8040201008040201u;
        const uint64_t ones = ((own + 0x7F7F7F7F7F7F7F7Fu) >> 7) & 0x0101010101010101u;
        for (int k = 0; k < 8; ++k) bytes[i + k] = static_cast<uint8_t>(ones >> 8 * k);  // one store, if little-endian
    }
    for (; i < n; ++i) bytes[i] = bits[i / 8] >> i % 8 & 1;
}

// Adds the counts of one row from `begin` on.
FMN_INLINE void count_bytes_from(int64_t begin, const uint8_t* row, const uint8_t* ref, int64_t n, int64_t* counts) {
    for (int64_t i = begin; i < n; i += 248) {  // 248 ones fit the byte accumulators the compiler may choose
        const int64_t size = n - i < 248 ? n - i : 248;
        uint8_t ref_bytes[248];
        unpack(ref + i / 8, size, ref_bytes);
        uint32_t right = 0, retained = 0;
        for (int64_t k = 0; k < size; ++k) {
            right += row[i + k] != 0;
            retained += (row[i + k] != 0) & ref_bytes[k];
        }
        counts[0] += right;
        counts[1] += retained;
    }
}

FMN_INLINE void count_bytes(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    for (int r = 0; r < n_rows; ++r) {
        counts[2 * r] = counts[2 * r + 1] = 0;
        count_bytes_from(0, rows[r], ref, n, counts + 2 * r);
    }
}

FMN_INLINE void count_bits_from(int64_t begin, const uint8_t* row, const uint8_t* ref, int64_t n, int64_t* counts) {
    int64_t i = begin;
    for (; i + 8 <= n; i += 8) {
        const uint64_t word = load<uint64_t>(row + i);
        counts[0] += popcount(word);
        counts[1] += popcount(word & load<uint64_t>(ref + i));
    }
    for (; i < n; ++i) {
        counts[0] += popcount(row[i]);
        counts[1] += popcount(row[i] & ref[i]);
    }
}

FMN_INLINE void count_bits(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    for (int r = 0; r < n_rows; ++r) {
        counts[2 * r] = counts[2 * r + 1] = 0;
        count_bits_from(0, rows[r], ref, n, counts + 2 * r);
    }
}

FMN_INLINE void count_overlaps_from(int64_t begin, const uint8_t* const* a, const uint8_t* const* b, int64_t n,
                                    int64_t* counts, int64_t stride) {
    for (int i = 0; i < overlap_rows; ++i)
        for (int k = 0; k < overlap_columns; ++k) {
            int64_t at = begin, count = 0;
            for (; at + 8 <= n; at += 8) count += popcount(load<uint64_t>(a[i] + at) & load<uint64_t>(b[k] + at));
            for (; at < n; ++at) count += popcount(a[i][at] & b[k][at]);
            counts[i * stride + k] += count;
        }
}

FMN_INLINE void count_overlaps(const uint8_t* const* a, const uint8_t* const* b, int64_t n, int64_t* counts,
                               int64_t stride) {
    count_overlaps_from(0, a, b, n, counts, stride);
}

template <class T>
FMN_INLINE void compare_as(const uint8_t* predictions, const int64_t* labels, int64_t n, uint8_t* bytes) {
    FMN_NO_ALIAS
    for (int64_t i = 0; i < n; ++i) {
        const T p = load<T>(predictions + i * static_cast<int64_t>(sizeof(T)));
        const int64_t y = labels[i];  // a uint64 of 2^63 or more turns negative and equals no label
        bytes[i] = (static_cast<int64_t>(p) == y) & (T(-1) < T(0) || y >= 0);
    }
}

FMN_INLINE void compare(const void* predictions, fmn_type type, const int64_t* labels, int64_t n, uint8_t* bits) {
    const auto* p = static_cast<const uint8_t*>(predictions);
    uint8_t bytes[compare_block];
    switch (type) {
        case FMN_INT8: compare_as<int8_t>(p, labels, n, bytes); break;
        case FMN_UINT8: compare_as<uint8_t>(p, labels, n, bytes); break;
        case FMN_INT16: compare_as<int16_t>(p, labels, n, bytes); break;
        case FMN_UINT16: compare_as<uint16_t>(p, labels, n, bytes); break;
        case FMN_INT32: compare_as<int32_t>(p, labels, n, bytes); break;
        case FMN_UINT32: compare_as<uint32_t>(p, labels, n, bytes); break;
        case FMN_INT64: compare_as<int64_t>(p, labels, n, bytes); break;
        default: compare_as<uint64_t>(p, labels, n, bytes);
    }
    pack(bytes, n, bits);
}

// Turns a float's sign and magnitude bits into an integer of the same order, in which 0.0 equals -0.0: scores of all four
// types are compared as integers, without conversion.
template <class Int>
FMN_INLINE Int magnitude(Int bits) {
    return static_cast<Int>(bits & static_cast<Int>(~(Int(1) << (8 * sizeof(Int) - 1))));
}
template <class Int>
FMN_INLINE Int ordered(Int bits) {
    const Int sign = static_cast<Int>(bits >> (8 * sizeof(Int) - 1));  // 0 or -1
    return static_cast<Int>((magnitude(bits) ^ sign) - sign);
}

// A sample is right if no score before the label's reaches it and none after it exceeds it.
template <class Int>
FMN_INLINE bool compare_scores_as(const uint8_t* scores, Int infinity, int64_t n_classes, int64_t stride,
                                  const int64_t* labels, int64_t n, uint8_t* bytes) {
    constexpr int64_t size = sizeof(Int);
    bool any_nan = false;
    for (int64_t i = 0; i < n; ++i) {
        const uint8_t* row = scores + i * stride;
        const int64_t y = labels[i];
        const Int at_label = ordered(load<Int>(row + y * size)), below = static_cast<Int>(at_label - 1);
        Int beaten = 0, nan = 0;  // 0 or -1
        for (int64_t k = 0; k < y; ++k) {
            const Int bits = load<Int>(row + k * size);
            beaten = static_cast<Int>(beaten | -(ordered(bits) > below));
            nan = static_cast<Int>(nan | -(magnitude(bits) > infinity));
        }
        for (int64_t k = y; k < n_classes; ++k) {
            const Int bits = load<Int>(row + k * size);
            beaten = static_cast<Int>(beaten | -(ordered(bits) > at_label));
            nan = static_cast<Int>(nan | -(magnitude(bits) > infinity));
        }
        bytes[i] = !(beaten | nan);
        any_nan |= nan != 0;
    }
    return any_nan;
}

FMN_INLINE bool compare_scores(const uint8_t* scores, fmn_type type, int64_t n_classes, int64_t stride,
                               const int64_t* labels, int64_t n, uint8_t* bytes) {
    switch (type) {
        case FMN_FLOAT16: return compare_scores_as<int16_t>(scores, 0x7C00, n_classes, stride, labels, n, bytes);
        case FMN_BFLOAT16: return compare_scores_as<int16_t>(scores, 0x7F80, n_classes, stride, labels, n, bytes);
        case FMN_FLOAT32: return compare_scores_as<int32_t>(scores, 0x7F800000, n_classes, stride, labels, n, bytes);
        default:
            return compare_scores_as<int64_t>(scores, 0x7FF0000000000000, n_classes, stride, labels, n, bytes);
    }
}

FMN_INLINE double as_double(int64_t bits) { return load<double>(&bits); }

// Floating-point types: `at` loads number i as double.
template <class T>
struct Wide {
    static FMN_INLINE double at(const uint8_t* p, int64_t i) { return load<T>(p + i * static_cast<int64_t>(sizeof(T))); }
};

// Converts half by its bits: moves exponent and fraction to their places in a double and corrects the exponent's bias. A
// subnormal is built as 2^-14 plus its value; then 2^-14 is subtracted.
struct Half {
    static FMN_INLINE double at(const uint8_t* p, int64_t i) {
        const int64_t bits = load<uint16_t>(p + 2 * i), fraction = (bits & 0x7FFF) << 42;
        const double normal = as_double(fraction + (int64_t(1008) << 52));
        const double subnormal = as_double(fraction + (int64_t(1009) << 52)) - 1.0 / 16384;
        const double magnitude = bits & 0x7C00 ? normal : subnormal;
        return bits & 0x8000 ? -magnitude : magnitude;
    }
};

struct Bfloat16 {
    static FMN_INLINE double at(const uint8_t* p, int64_t i) {
        const uint32_t bits = uint32_t(load<uint16_t>(p + 2 * i)) << 16;
        return load<float>(&bits);
    }
};

template <class Type>
FMN_INLINE void mean_of(const void* const* rows, int64_t offset, int64_t n_rows, int64_t n, double* out) {
    const auto row = [=](int64_t r) { return static_cast<const uint8_t*>(rows[r]) + offset; };
    const uint8_t *p = row(0);
    FMN_NO_ALIAS
    for (int64_t i = 0; i < n; ++i) out[i] = Type::at(p, i);
    if (n_rows == 1) return;
    for (int64_t r = 1; r < n_rows; ++r) {
        p = row(r);
        FMN_NO_ALIAS
        for (int64_t i = 0; i < n; ++i) out[i] += Type::at(p, i);
    }
    const double count = static_cast<double>(n_rows);
    for (int64_t i = 0; i < n; ++i) out[i] /= count;
}

FMN_INLINE void mean(const void* const* rows, int64_t offset, fmn_type type, int64_t n_rows, int64_t n, double* out) {
    if (type == FMN_FLOAT16) return mean_of<Half>(rows, offset, n_rows, n, out);
    if (type == FMN_BFLOAT16) return mean_of<Bfloat16>(rows, offset, n_rows, n, out);
    if (type == FMN_FLOAT32) return mean_of<Wide<float>>(rows, offset, n_rows, n, out);
    mean_of<Wide<double>>(rows, offset, n_rows, n, out);
}

// Whether n numbers are not negative and have a sum within `tolerance` of 1.
FMN_INLINE bool sums_to_one(const double* row, int64_t n, double tolerance) {
    double sums[8] = {};
    int64_t bad = 0;
    double sum = 0;
    int64_t k = 0;
    for (; k + 8 <= n; k += 8)
        for (int j = 0; j < 8; ++j) {
            sums[j] += row[k + j];
            bad |= -int64_t(!(row[k + j] >= 0));
        }
    for (; k < n; ++k) {
        sum += row[k];
        bad |= -int64_t(!(row[k] >= 0));
    }
    for (double s : sums) sum += s;
    return !bad && sum >= 1 - tolerance && sum <= 1 + tolerance;
}

// The lead over another class k is the label's score minus that of k; in a mixture it is a + epsilon * (b - a) for leads a now
// and b then. A mixture is right if its lead is positive over classes before the label and not negative over those after it.
// A lead that is lost at one end only is lost on one side of its crossing.
struct Leads {
    int64_t never, surely_never, crosses;  // 0 or -1
    double now, then;                      // scores of the label
    int64_t label;

    // Bounds the error of a lead of two mixed probabilities, and of a crossing times its slope.
    static constexpr double rounding = 4e-15;

    FMN_INLINE void look(const double* p, const double* q, int64_t n) {
        never = crosses = surely_never = 0;
        for (int64_t k = 0; k < label; ++k) {
            const int64_t lost_now = -int64_t(p[k] >= now), lost_then = -int64_t(q[k] >= then);
            never |= lost_now & lost_then;
            crosses |= lost_now | lost_then;
        }
        for (int64_t k = label + 1; k < n; ++k) {
            const int64_t lost_now = -int64_t(p[k] > now), lost_then = -int64_t(q[k] > then);
            never |= lost_now & lost_then;
            crosses |= lost_now | lost_then;
        }
        for (int64_t k = 0; never && k < n; ++k)
            surely_never |= -int64_t(now - p[k] + rounding < 0) & -int64_t(then - q[k] + rounding < 0);
    }

    // At the crossing of a class before the label the end is open: the next double stands for it. Doubles >= 0 are compared by
    // their bits, as integers, so that the compiler vectorises the maximum and the minimum.
    template <bool widest>
    FMN_INLINE Interval cross(const double* p, const double* q, int64_t n) const {
        const int64_t zero = 0, one = bits(1.0), least = 1;
        int64_t lo = zero, hi = one, widest_lo = zero, widest_hi = one;
        for (int64_t k = 0; k < n; ++k) {
            const double a = now - p[k], b = then - q[k];
            const int64_t before = -int64_t(k < label);
            const int64_t lost_now = -int64_t(a < 0) | (-int64_t(a == 0) & before);
            const int64_t lost_then = -int64_t(b < 0) | (-int64_t(b == 0) & before);
            int64_t at = bits(a / (a - b));
            at = at > least ? at : least;
            const int64_t after = at - before > one ? one : at - before, up = after & lost_now;
            const int64_t down = ((at + before) & lost_then) | (one & ~lost_then);
            lo = up > lo ? up : lo;
            hi = down < hi ? down : hi;
            if (!widest) continue;
            const double wide_a = a + rounding, wide_b = b + rounding;
            const int64_t wide_at = bits(wide_a / (wide_a - wide_b)), ends = -int64_t(wide_b < 0);
            const int64_t wide_up = wide_at & -int64_t(wide_a < 0), wide_down = (wide_at & ends) | (one & ~ends);
            widest_lo = wide_up > widest_lo ? wide_up : widest_lo;
            widest_hi = wide_down < widest_hi ? wide_down : widest_hi;
        }
        return {as_double(lo), as_double(hi), as_double(widest_lo), as_double(widest_hi)};
    }

    static FMN_INLINE int64_t bits(double v) { return load<int64_t>(&v); }

    // The ends for one class that is lost at one end only.
    static FMN_INLINE double start(double a, double b, bool before) {
        const int64_t at = bits(a / (a - b)), up = (at > 1 ? at : 1) + before, one = bits(1.0);
        return as_double(up < one ? up : one);
    }
    static FMN_INLINE double stop(double a, double b, bool before) {
        const int64_t at = bits(a / (a - b));
        return as_double((at > 1 ? at : 1) - before);
    }
};

FMN_INLINE Interval interval(const double* now, const double* then, int64_t n, int64_t label, bool widest) {
    Leads l;
    l.now = now[label], l.then = then[label], l.label = label;
    l.look(now, then, n);
    if (l.surely_never) return {1, 0, 1, 0};
    if (!l.crosses) return {0, 1, 0, 1};
    if (!widest) return l.never ? Interval{1, 0, 0, 1} : l.cross<false>(now, then, n);
    Interval v = l.cross<true>(now, then, n);
    if (l.never) v.lo = 1, v.hi = 0;
    return v;
}

FMN_INLINE void right_at(const double* now, const double* then, int64_t n, int64_t label, const double* epsilon,
                         int64_t n_epsilons, bool* right) {
    for (int64_t i = 0; i < n_epsilons; ++i) {
        const double eps = epsilon[i], rest = 1 - eps, score = eps * then[label] + rest * now[label];
        int64_t beaten = 0, reached = 0;
        for (int64_t k = 0; k < n; ++k) {
            const double other = eps * then[k] + rest * now[k];
            beaten |= -int64_t(other > score);
            reached -= -int64_t(other >= score);
        }
        bool first = true;  // of equal scores, if there are others
        for (int64_t k = 0; !beaten && reached > 1 && k < label; ++k) first &= !(eps * then[k] + rest * now[k] == score);
        right[i] = first && !beaten;
    }
}

}  // namespace loops
}  // namespace fmn
