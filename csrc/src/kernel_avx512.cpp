// AVX-512 kernels (F, BW, VPOPCNTDQ: Ice Lake, Zen 4 and later). Function attributes as in kernel_avx2.cpp. With
// -DFMN_SIMDE the same source runs on any x86-64, each instruction emulated: this tests it without AVX-512.
#include "sample_loops.h"

#ifdef FMN_X86
#ifdef FMN_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#define FMN_AVX512 __attribute__((target("popcnt")))
#else
#include <immintrin.h>
#define FMN_AVX512 __attribute__((target("avx512f,avx512bw,avx512vpopcntdq,f16c,popcnt")))
#endif

namespace fmn {
namespace {

FMN_AVX512 inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
FMN_AVX512 inline void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

FMN_AVX512 inline int64_t sum(__m512i v) {  // of eight 64-bit lanes
    int64_t lanes[8], total = 0;
    store(lanes, v);
    for (int64_t lane : lanes) total += lane;
    return total;
}

FMN_AVX512 inline uint64_t pack64(const uint8_t* bytes) {
    const __m512i v = load(bytes);
    return _mm512_test_epi8_mask(v, v);
}

// As in kernel_avx2.cpp, with a mask register for the word.
template <int n_rows>
FMN_AVX512 inline void count_bytes_by(const uint8_t* const* rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    int64_t sums[2 * n_rows] = {}, i = 0;
    for (; i + 64 <= n; i += 64) {
        const uint64_t end = loops::load<uint64_t>(ref + i / 8);
        for (int r = 0; r < n_rows; ++r) {
            const uint64_t now = pack64(rows[r] + i);
            sums[2 * r] += __builtin_popcountll(now);
            sums[2 * r + 1] += __builtin_popcountll(now & end);
        }
    }
    for (int r = 0; r < n_rows; ++r) loops::count_bytes_from(i, rows[r], ref, n, sums + 2 * r);
    for (int k = 0; k < 2 * n_rows; ++k) counts[k] = sums[k];
}

FMN_AVX512 void count_bytes(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    int r = 0;
    for (; r + 2 <= n_rows; r += 2) count_bytes_by<2>(rows + r, ref, n, counts + 2 * r);
    if (r < n_rows) count_bytes_by<1>(rows + r, ref, n, counts + 2 * r);
}

// One vpopcntq per 64 bytes and count. Bound by memory, or in cache by the loads.
template <int n_rows>
FMN_AVX512 inline void count_bits_by(const uint8_t* const* rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    __m512i sum64[2 * n_rows];
    for (auto& s : sum64) s = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        const __m512i end = load(ref + i);
        for (int r = 0; r < n_rows; ++r) {
            const __m512i now = load(rows[r] + i), both = _mm512_and_si512(now, end);
            sum64[2 * r] = _mm512_add_epi64(sum64[2 * r], _mm512_popcnt_epi64(now));
            sum64[2 * r + 1] = _mm512_add_epi64(sum64[2 * r + 1], _mm512_popcnt_epi64(both));
        }
    }
    for (int k = 0; k < 2 * n_rows; ++k) counts[k] = sum(sum64[k]);
    for (int r = 0; r < n_rows; ++r) loops::count_bits_from(i, rows[r], ref, n, counts + 2 * r);
}

FMN_AVX512 void count_bits(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    if (n_rows == count_rows) return count_bits_by<count_rows>(rows, ref, n, counts);
    for (int r = 0; r < n_rows; ++r) count_bits_by<1>(rows + r, ref, n, counts + 2 * r);
}

// Four rows against four: each load serves several counts. Bound by the population counts.
FMN_AVX512 void count_overlaps(const uint8_t* const* a, const uint8_t* const* b, int64_t n, int64_t* counts, int64_t stride) {
    __m512i sum64[overlap_rows][overlap_columns];
    for (auto& row : sum64)
        for (auto& s : row) s = _mm512_setzero_si512();
    int64_t at = 0;
    for (; at + 64 <= n; at += 64) {
        const __m512i rows[overlap_rows] = {load(a[0] + at), load(a[1] + at), load(a[2] + at), load(a[3] + at)};
        for (int k = 0; k < overlap_columns; ++k) {
            const __m512i column = load(b[k] + at);
            for (int i = 0; i < overlap_rows; ++i)
                sum64[i][k] = _mm512_add_epi64(sum64[i][k], _mm512_popcnt_epi64(_mm512_and_si512(rows[i], column)));
        }
    }
    for (int i = 0; i < overlap_rows; ++i)
        for (int k = 0; k < overlap_columns; ++k) counts[i * stride + k] += sum(sum64[i][k]);
    if (at < n) loops::count_overlaps_from(at, a, b, n, counts, stride);
}

FMN_AVX512 void pack(const uint8_t* bytes, int64_t n, uint8_t* bits) {
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        const uint64_t word = pack64(bytes + i);
        __builtin_memcpy(bits + i / 8, &word, 8);
    }
    loops::pack(bytes + i, n - i, bits + i / 8);
}

FMN_AVX512 void unpack(const uint8_t* bits, int64_t n, uint8_t* bytes) {
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        store(bytes + i, _mm512_maskz_mov_epi8(loops::load<uint64_t>(bits + i / 8), _mm512_set1_epi8(1)));
    loops::unpack(bits + i / 8, n - i, bytes + i);
}

// For int64, the most common type, without bytes in between: a comparison gives eight bits.
FMN_AVX512 void compare(const void* predictions, fmn_type type, const int64_t* labels, int64_t n, uint8_t* bits) {
    const auto* p = static_cast<const uint8_t*>(predictions);
    int64_t i = 0;
    for (; type == FMN_INT64 && i + 8 <= n; i += 8)
        bits[i / 8] = static_cast<uint8_t>(_mm512_cmpeq_epi64_mask(load(p + 8 * i), load(labels + i)));
    if (i < n) loops::compare(p + 8 * i, type, labels + i, n - i, bits + i / 8);
}

FMN_AVX512 bool compare_scores(const uint8_t* scores, fmn_type type, int64_t n_classes, int64_t stride,
                               const int64_t* labels, int64_t n, uint8_t* bytes) {
    return loops::compare_scores(scores, type, n_classes, stride, labels, n, bytes);
}

FMN_AVX512 void update_samples(const uint8_t* const* rows, int n_rows, int64_t begin, int64_t end, int e, SampleBlock* block) {
    loops::update_samples(rows, n_rows, begin, end, e, block);
}

// 64 bits of a row are the mask of 64 bytes.
FMN_AVX512 void transpose(const uint8_t* const* rows, int64_t n, uint8_t* out) {
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        __m512i v = _mm512_setzero_si512();
        for (int k = 0; k < 8; ++k)
            v = _mm512_mask_add_epi8(v, loops::load<uint64_t>(rows[k] + i / 8), v, _mm512_set1_epi8(static_cast<char>(1 << k)));
        store(out + i, v);
    }
    loops::transpose_from(i, rows, n, out);
}

FMN_AVX512 void add_samples(const SampleBlock& block, int64_t n, int32_t base, int32_t length, int32_t* counts, int64_t stride) {
    loops::add_samples<transpose>(block, n, base, length, counts, stride);
}

// The bits of 32 epochs are the mask.
FMN_AVX512 void add_counts(const GroupBlock& b, const uint8_t* const* right, CountLines* lines) {
    loops::CountBits bits;
    bits.read(b, right);
    const __m512i one = _mm512_set1_epi16(1);
    for (const Run* run = b.runs; run < b.runs + b.n_runs; ++run) {
        auto& counts = lines[run->group].counts;
        __m512i sums[2] = {load(counts[0]), load(counts[1])};
        for (int64_t k = run->begin; k < run->end; ++k)
            for (int end = 0; end < 2; ++end)
                sums[end] = _mm512_mask_add_epi16(sums[end], bits.right[end][b.order[k]], sums[end], one);
        for (int end = 0; end < 2; ++end) store(counts[end], sums[end]);
    }
}

// The bits of eight epochs are the mask. Bound by the latency of the additions, which are in the order of the samples.
FMN_AVX512 void add_weights(const GroupBlock& b, const uint8_t* right, WeightLines* lines) {
    static const int64_t masks[2] = {0, -1};
    for (const Run* run = b.runs; run < b.runs + b.n_runs; ++run) {
        auto& line = lines[run->group].sums;
        __m512d sums[4];
        for (int row = 0; row < 4; ++row) sums[row] = _mm512_loadu_pd(line[row]);
        for (int64_t k = run->begin; k < run->end; ++k) {
            const int64_t i = b.order[k];
            const uint8_t now = right[i], not_now = static_cast<uint8_t>(~now);
            const __m512d w = _mm512_set1_pd(b.weights[i]);
            const __m512i bits = _mm512_castpd_si512(w), end_bits = _mm512_and_si512(bits, _mm512_set1_epi64(masks[b.at_end[i]]));
            const __m512d w_end = _mm512_castsi512_pd(end_bits), w_not = _mm512_castsi512_pd(_mm512_xor_si512(bits, end_bits));
            sums[0] = _mm512_mask_add_pd(sums[0], now, sums[0], w);
            sums[1] = _mm512_mask_add_pd(sums[1], now, sums[1], w_not);
            sums[2] = _mm512_mask_add_pd(sums[2], not_now, sums[2], w_end);
            sums[3] = _mm512_mask_add_pd(sums[3], now, sums[3], w_end);
        }
        for (int row = 0; row < 4; ++row) _mm512_storeu_pd(line[row], sums[row]);
    }
}

// Half precision by the processor's own conversion, exact for subnormals too.
FMN_AVX512 void mean(const void* const* rows, int64_t offset, fmn_type type, int64_t n_rows, int64_t n, double* out) {
    const __m512d count = _mm512_set1_pd(static_cast<double>(n_rows));
    int64_t i = 0;
    for (; type == FMN_FLOAT16 && i + 8 <= n; i += 8) {
        __m512d sum = _mm512_setzero_pd();
        for (int64_t r = 0; r < n_rows; ++r) {
            const auto* p = static_cast<const uint8_t*>(rows[r]) + offset + 2 * i;
            const __m256 v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
            sum = _mm512_add_pd(sum, __builtin_convertvector(v, __m512d));
        }
        _mm512_storeu_pd(out + i, n_rows == 1 ? sum : _mm512_div_pd(sum, count));
    }
    if (i < n) loops::mean(rows, offset + 2 * i, type, n_rows, n - i, out + i);
}

// The least of eight numbers, as in `sum`; the greatest too.
FMN_AVX512 inline int64_t least(__m512i v) {
    int64_t lanes[8], found = INT64_MAX;
    store(lanes, v);
    for (int64_t lane : lanes) found = lane < found ? lane : found;
    return found;
}
FMN_AVX512 inline int64_t greatest(__m512i v) {
    int64_t lanes[8], found = INT64_MIN;
    store(lanes, v);
    for (int64_t lane : lanes) found = lane > found ? lane : found;
    return found;
}

// Leads of the label over eight classes, as in loops.h; classes that lose none, most of them, need no crossings. As an
// integer, a lead is below 0, or before the label below 1, if it is lost: a lead of 0 is never -0.0.
template <bool widest>
FMN_AVX512 inline Interval interval_of(const double* now, const double* then, int64_t n, int64_t label) {
    const __m512d own_now = _mm512_set1_pd(now[label]), own_then = _mm512_set1_pd(then[label]);
    const __m512i zero = _mm512_setzero_si512(), first = _mm512_set1_epi64(1), eight = _mm512_set1_epi64(8);
    const __m512i one = _mm512_castpd_si512(_mm512_set1_pd(1.0));
    __m512i lo = zero, hi = one, widest_lo = zero, widest_hi = one;
    __m512i place = _mm512_sub_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64(label));
    bool never = false, crosses = false;
    for (int64_t k = 0; k < n; k += 8, place = _mm512_add_epi64(place, eight)) {
        const __m512d a = _mm512_sub_pd(own_now, _mm512_loadu_pd(now + k)), b = _mm512_sub_pd(own_then, _mm512_loadu_pd(then + k));
        const __m512i before = _mm512_maskz_mov_epi64(_mm512_cmpgt_epi64_mask(zero, place), first);
        const unsigned some = n - k < 8 ? (1u << (n - k)) - 1 : 0xFF;
        const unsigned lost_now = some & _mm512_cmpgt_epi64_mask(before, _mm512_castpd_si512(a));
        const unsigned lost_then = some & _mm512_cmpgt_epi64_mask(before, _mm512_castpd_si512(b));
        if (!(lost_now | lost_then)) continue;
        crosses = true;
        if (lost_now & lost_then) {
            if (!widest) return {1, 0, 0, 1};
            never = true;
        }
        const __m512i crossing = _mm512_castpd_si512(_mm512_div_pd(a, _mm512_sub_pd(a, b)));
        const __m512i at = _mm512_mask_max_epi64(first, 0xFF, crossing, first), up = _mm512_add_epi64(at, before);
        lo = _mm512_mask_max_epi64(lo, static_cast<uint8_t>(lost_now), lo, _mm512_mask_min_epi64(one, 0xFF, up, one));
        hi = _mm512_mask_min_epi64(hi, static_cast<uint8_t>(lost_then), hi, _mm512_sub_epi64(at, before));
        if (!widest) continue;
        const __m512d rounding = _mm512_set1_pd(loops::Leads::rounding);
        const __m512d wide_a = _mm512_add_pd(a, rounding), wide_b = _mm512_add_pd(b, rounding);
        const unsigned wide_now = lost_now & _mm512_cmpgt_epi64_mask(zero, _mm512_castpd_si512(wide_a));
        const unsigned wide_then = lost_then & _mm512_cmpgt_epi64_mask(zero, _mm512_castpd_si512(wide_b));
        if (wide_now & wide_then) return {1, 0, 1, 0};
        const __m512i wide = _mm512_castpd_si512(_mm512_div_pd(wide_a, _mm512_sub_pd(wide_a, wide_b)));
        widest_lo = _mm512_mask_max_epi64(widest_lo, static_cast<uint8_t>(wide_now), widest_lo, wide);
        widest_hi = _mm512_mask_min_epi64(widest_hi, static_cast<uint8_t>(wide_then), widest_hi, wide);
    }
    if (!crosses) return {0, 1, 0, 1};
    Interval v = {loops::as_double(greatest(lo)), loops::as_double(least(hi)), 0, 1};
    if (widest) v.widest_lo = loops::as_double(greatest(widest_lo)), v.widest_hi = loops::as_double(least(widest_hi));
    if (never) v.lo = 1, v.hi = 0;
    return v;
}

FMN_AVX512 Interval interval(const double* now, const double* then, int64_t n, int64_t label, bool widest) {
    return widest ? interval_of<true>(now, then, n, label) : interval_of<false>(now, then, n, label);
}

// Loops of the mixtures, vectorised by the compiler.
FMN_AVX512 bool sums_to_one(const double* row, int64_t n, double tolerance) {
    return loops::sums_to_one(row, n, tolerance);
}
FMN_AVX512 void right_at(const double* now, const double* then, int64_t n, int64_t label, const double* epsilon, int64_t n_epsilons,
                        bool* right) {
    loops::right_at(now, then, n, label, epsilon, n_epsilons, right);
}

}  // namespace

const Kernels avx512_kernels = {"avx512", count_bytes,    count_bits,          count_overlaps, pack,        unpack,
                                compare,  compare_scores, update_samples, add_samples, transpose, add_counts, add_weights, mean,
                                sums_to_one, interval, right_at};

}  // namespace fmn
#endif
