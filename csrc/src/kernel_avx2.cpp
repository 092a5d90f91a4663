// AVX2 kernels. Function attributes select the instruction set, not compiler flags: nothing else in the program is compiled
// for AVX2. For the same reason this file includes neither <vector> nor <algorithm>.
#include "sample_loops.h"

#ifdef FMN_X86
#include <immintrin.h>
#define FMN_AVX2 __attribute__((target("avx2,f16c,popcnt")))

namespace fmn {
namespace {

FMN_AVX2 inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FMN_AVX2 inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

FMN_AVX2 inline int64_t sum(__m256i v) {  // of four 64-bit lanes
    return _mm256_extract_epi64(v, 0) + _mm256_extract_epi64(v, 1) + _mm256_extract_epi64(v, 2) +
           _mm256_extract_epi64(v, 3);
}

// Number of bits set in each byte, from a table of nibbles.
FMN_AVX2 inline __m256i popcount_bytes(__m256i v) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2,
                                           3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
                           _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
}

// 32 bytes to 32 bits: vpmovmskb takes the top bit of each.
FMN_AVX2 inline uint32_t pack32(const uint8_t* bytes) {
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(load(bytes), _mm256_setzero_si256())));
}

// Turns 64 bytes into a word of bits and counts them in general registers. Bound by memory. Takes two rows at once: the
// reference is a second stream, and reading it again for every row makes the processor prefetch badly.
template <int n_rows>
FMN_AVX2 inline void count_bytes_by(const uint8_t* const* rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    int64_t sums[2 * n_rows] = {}, i = 0;
    for (; i + 64 <= n; i += 64) {
        const uint64_t end = loops::load<uint64_t>(ref + i / 8);
        for (int r = 0; r < n_rows; ++r) {
            const uint64_t now = pack32(rows[r] + i) | uint64_t(pack32(rows[r] + i + 32)) << 32;
            sums[2 * r] += __builtin_popcountll(now);
            sums[2 * r + 1] += __builtin_popcountll(now & end);
        }
    }
    for (int r = 0; r < n_rows; ++r) loops::count_bytes_from(i, rows[r], ref, n, sums + 2 * r);
    for (int k = 0; k < 2 * n_rows; ++k) counts[k] = sums[k];
}

FMN_AVX2 void count_bytes(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    int r = 0;
    for (; r + 2 <= n_rows; r += 2) count_bytes_by<2>(rows + r, ref, n, counts + 2 * r);
    if (r < n_rows) count_bytes_by<1>(rows + r, ref, n, counts + 2 * r);
}

// Byte counters grow by at most 8 a step: 31 steps before vpsadbw widens them. Four rows share one read of the reference.
// Bound by memory, or in cache by the two shuffles per count.
template <int n_rows>
FMN_AVX2 inline void count_bits_by(const uint8_t* const* rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i sum64[2 * n_rows];
    for (auto& s : sum64) s = zero;
    int64_t i = 0;
    while (i + 32 <= n) {
        __m256i sum8[2 * n_rows];
        for (auto& s : sum8) s = zero;
        const int64_t steps = (n - i) / 32 < 31 ? (n - i) / 32 : 31;
        for (int64_t step = 0; step < steps; ++step, i += 32) {
            const __m256i end = load(ref + i);
            for (int r = 0; r < n_rows; ++r) {
                const __m256i now = load(rows[r] + i);
                sum8[2 * r] = _mm256_add_epi8(sum8[2 * r], popcount_bytes(now));
                sum8[2 * r + 1] = _mm256_add_epi8(sum8[2 * r + 1], popcount_bytes(_mm256_and_si256(now, end)));
            }
        }
        for (int k = 0; k < 2 * n_rows; ++k) sum64[k] = _mm256_add_epi64(sum64[k], _mm256_sad_epu8(sum8[k], zero));
    }
    for (int k = 0; k < 2 * n_rows; ++k) counts[k] = sum(sum64[k]);
    for (int r = 0; r < n_rows; ++r) loops::count_bits_from(i, rows[r], ref, n, counts + 2 * r);
}

FMN_AVX2 void count_bits(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts) {
    if (n_rows == count_rows) return count_bits_by<count_rows>(rows, ref, n, counts);
    for (int r = 0; r < n_rows; ++r) count_bits_by<1>(rows + r, ref, n, counts + 2 * r);
}

// Four rows against four: each load serves several counts; otherwise as count_bits.
FMN_AVX2 void count_overlaps(const uint8_t* const* a, const uint8_t* const* b, int64_t n, int64_t* counts, int64_t stride) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i sum64[overlap_rows][overlap_columns];
    for (auto& row : sum64)
        for (auto& s : row) s = zero;
    int64_t at = 0;
    while (at + 32 <= n) {
        __m256i sum8[overlap_rows][overlap_columns];
        for (auto& row : sum8)
            for (auto& s : row) s = zero;
        const int64_t steps = (n - at) / 32 < 31 ? (n - at) / 32 : 31;
        for (int64_t step = 0; step < steps; ++step, at += 32) {
            const __m256i rows[overlap_rows] = {load(a[0] + at), load(a[1] + at), load(a[2] + at), load(a[3] + at)};
            for (int k = 0; k < overlap_columns; ++k) {
                const __m256i column = load(b[k] + at);
                for (int i = 0; i < overlap_rows; ++i)
                    sum8[i][k] = _mm256_add_epi8(sum8[i][k], popcount_bytes(_mm256_and_si256(rows[i], column)));
            }
        }
        for (int i = 0; i < overlap_rows; ++i)
            for (int k = 0; k < overlap_columns; ++k)
                sum64[i][k] = _mm256_add_epi64(sum64[i][k], _mm256_sad_epu8(sum8[i][k], zero));
    }
    for (int i = 0; i < overlap_rows; ++i)
        for (int k = 0; k < overlap_columns; ++k) counts[i * stride + k] += sum(sum64[i][k]);
    if (at < n) loops::count_overlaps_from(at, a, b, n, counts, stride);
}

FMN_AVX2 void pack(const uint8_t* bytes, int64_t n, uint8_t* bits) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const uint32_t word = pack32(bytes + i);
        __builtin_memcpy(bits + i / 8, &word, 4);
    }
    loops::pack(bytes + i, n - i, bits + i / 8);
}

// Copies to each of 32 bytes the byte that holds its bit, and keeps only that bit.
FMN_AVX2 void unpack(const uint8_t* bits, int64_t n, uint8_t* bytes) {
    const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u)), one = _mm256_set1_epi8(1);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        int word;
        __builtin_memcpy(&word, bits + i / 8, 4);
        const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), which), bit);
        store(bytes + i, _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), one));
    }
    loops::unpack(bits + i / 8, n - i, bytes + i);
}

// For int64, the most common type, without bytes in between: vmovmskpd takes one bit of each of four comparisons.
FMN_AVX2 void compare(const void* predictions, fmn_type type, const int64_t* labels, int64_t n, uint8_t* bits) {
    const auto* p = static_cast<const uint8_t*>(predictions);
    int64_t i = 0;
    for (; type == FMN_INT64 && i + 8 <= n; i += 8) {
        int same[2];
        for (int half = 0; half < 2; ++half)
            same[half] = _mm256_movemask_pd(
                _mm256_castsi256_pd(_mm256_cmpeq_epi64(load(p + 8 * i + 32 * half), load(labels + i + 4 * half))));
        bits[i / 8] = static_cast<uint8_t>(same[0] | same[1] << 4);
    }
    if (i < n) loops::compare(p + 8 * i, type, labels + i, n - i, bits + i / 8);
}

FMN_AVX2 bool compare_scores(const uint8_t* scores, fmn_type type, int64_t n_classes, int64_t stride, const int64_t* labels,
                             int64_t n, uint8_t* bytes) {
    return loops::compare_scores(scores, type, n_classes, stride, labels, n, bytes);
}

FMN_AVX2 void update_samples(const uint8_t* const* rows, int n_rows, int64_t begin, int64_t end, int e, SampleBlock* block) {
    loops::update_samples(rows, n_rows, begin, end, e, block);
}

// Masks of the 64-bit lanes whose bit is set, for the lower and the upper four of eight epochs.
FMN_AVX2 inline void spread(int right, __m256i lanes[2]) {
    const __m256i bits = _mm256_set1_epi64x(right), low = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i high = _mm256_setr_epi64x(16, 32, 64, 128);
    lanes[0] = _mm256_cmpeq_epi64(_mm256_and_si256(bits, low), low);
    lanes[1] = _mm256_cmpeq_epi64(_mm256_and_si256(bits, high), high);
}

FMN_AVX2 void transpose(const uint8_t* const* rows, int64_t n, uint8_t* out) { loops::transpose(rows, n, out); }

FMN_AVX2 void add_samples(const SampleBlock& block, int64_t n, int32_t base, int32_t length, int32_t* counts, int64_t stride) {
    loops::add_samples<loops::transpose>(block, n, base, length, counts, stride);
}

// Adds the bits of 32 epochs to as many counts.
FMN_AVX2 inline void add_bits(uint32_t bits, __m256i counts[2]) {
    const __m256i places = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    for (int half = 0; half < 2; ++half) {
        const __m256i own = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(bits >> 16 * half)), places);
        counts[half] = _mm256_sub_epi16(counts[half], _mm256_cmpeq_epi16(own, places));
    }
}

FMN_AVX2 void add_counts(const GroupBlock& b, const uint8_t* const* right, CountLines* lines) {
    loops::CountBits bits;
    bits.read(b, right);
    for (const Run* run = b.runs; run < b.runs + b.n_runs; ++run) {
        auto& counts = lines[run->group].counts;
        __m256i sums[2][2] = {{load(counts[0]), load(counts[0] + 16)}, {load(counts[1]), load(counts[1] + 16)}};
        for (int64_t k = run->begin; k < run->end; ++k)
            for (int end = 0; end < 2; ++end) add_bits(bits.right[end][b.order[k]], sums[end]);
        for (int end = 0; end < 2; ++end)
            for (int half = 0; half < 2; ++half) store(counts[end] + 16 * half, sums[end][half]);
    }
}

// Four epochs per step.
FMN_AVX2 void add_weights(const GroupBlock& b, const uint8_t* right, WeightLines* lines) {
    for (const Run* run = b.runs; run < b.runs + b.n_runs; ++run) {
        auto& line = lines[run->group].sums;
        __m256d sums[2][4];
        for (int half = 0; half < 2; ++half)
            for (int row = 0; row < 4; ++row) sums[half][row] = _mm256_loadu_pd(line[row] + 4 * half);
        for (int64_t k = run->begin; k < run->end; ++k) {
            const int64_t i = b.order[k];
            __m256i now[2];
            spread(right[i], now);
            const __m256i w = _mm256_castpd_si256(_mm256_set1_pd(b.weights[i]));
            const __m256i at_end = _mm256_set1_epi8(static_cast<char>(-b.at_end[i]));
            const __m256i w_end = _mm256_and_si256(w, at_end), w_not = _mm256_andnot_si256(at_end, w);
            for (int half = 0; half < 2; ++half) {
                const __m256i terms[4] = {_mm256_and_si256(now[half], w), _mm256_and_si256(now[half], w_not),
                                          _mm256_andnot_si256(now[half], w_end), _mm256_and_si256(now[half], w_end)};
                for (int row = 0; row < 4; ++row)
                    sums[half][row] = _mm256_add_pd(sums[half][row], _mm256_castsi256_pd(terms[row]));
            }
        }
        for (int half = 0; half < 2; ++half)
            for (int row = 0; row < 4; ++row) _mm256_storeu_pd(line[row] + 4 * half, sums[half][row]);
    }
}

// Half precision by the processor's own conversion, exact for subnormals too.
FMN_AVX2 void mean(const void* const* rows, int64_t offset, fmn_type type, int64_t n_rows, int64_t n, double* out) {
    const __m256d count = _mm256_set1_pd(static_cast<double>(n_rows));
    int64_t i = 0;
    for (; type == FMN_FLOAT16 && i + 4 <= n; i += 4) {
        __m256d sum = _mm256_setzero_pd();
        for (int64_t r = 0; r < n_rows; ++r) {
            const auto* p = static_cast<const uint8_t*>(rows[r]) + offset + 2 * i;
            sum = _mm256_add_pd(sum, _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
        }
        _mm256_storeu_pd(out + i, n_rows == 1 ? sum : _mm256_div_pd(sum, count));
    }
    if (i < n) loops::mean(rows, offset + 2 * i, type, n_rows, n - i, out + i);
}

// Loops of the mixtures, vectorised by the compiler.
FMN_AVX2 bool sums_to_one(const double* row, int64_t n, double tolerance) {
    return loops::sums_to_one(row, n, tolerance);
}
FMN_AVX2 Interval interval(const double* now, const double* then, int64_t n, int64_t label, bool widest) {
    return loops::interval(now, then, n, label, widest);
}
FMN_AVX2 void right_at(const double* now, const double* then, int64_t n, int64_t label, const double* epsilon, int64_t n_epsilons,
                      bool* right) {
    loops::right_at(now, then, n, label, epsilon, n_epsilons, right);
}

}  // namespace

const Kernels avx2_kernels = {"avx2",   count_bytes,    count_bits,          count_overlaps, pack,        unpack,
                              compare,  compare_scores, update_samples, add_samples, transpose, add_counts, add_weights, mean,
                              sums_to_one, interval, right_at};

}  // namespace fmn
#endif
