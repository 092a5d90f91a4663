// A table of kernels for each instruction set. dispatch.cpp picks one at run time and cuts the work into pieces.
#pragma once
#include <cstdint>

#include "fmn/fmn.h"

// Promise to the compiler, before a loop: its output does not overlap its input.
#if defined(__clang__)
#define FMN_NO_ALIAS _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FMN_NO_ALIAS _Pragma("GCC ivdep")
#else
#define FMN_NO_ALIAS
#endif

namespace fmn {

// Statistics of a block of samples over up to 248 epochs, numbered from the first of them: bit i % 64 of word i / 64 of plane p
// is bit p of sample i's number. Logic on whole words then counts for 64 samples or more at once.
struct SampleBlock {
    static constexpr int64_t size = 8192, words = size / 64;  // the planes stay in the level-1 and level-2 caches
    static constexpr int32_t max_epochs = 248;  // a multiple of sample_rows
    enum Number { wrong, events, first, last, last_wrong, n_numbers };  // counts, then epochs, which are 0 if there is none
    uint64_t planes[n_numbers][8][words], seen[words];  // seen: right at one of the epochs
    uint64_t was[words];  // right at the row before
};

// Sums of one group in a tile of epochs.
constexpr int count_lanes = 32, weight_lanes = 8;
struct alignas(64) CountLines {
    uint16_t counts[2][count_lanes];  // of the samples that are wrong at the reference epoch, and of the others
};
struct alignas(64) WeightLines {
    double sums[4][weight_lanes];  // right, forgotten, learned, retained
};

// A block of samples by group, those of a group in their order: each sum stays in registers.
struct Run {
    int64_t group, begin, end;  // places in `order`
};
struct GroupBlock {
    static constexpr int64_t size = 4096;
    const Run* runs;
    int64_t n_runs, n_samples;
    const uint16_t* order;  // samples
    const uint8_t* at_end;  // 1 if the sample was right at the reference epoch, else 0
    const double* weights;  // unless counting
};

// The closed interval [lo, hi] of epsilon in which a mixture of two rows of scores is right, empty if lo > hi; and the widest
// interval that rounding could make of it.
struct Interval {
    double lo, hi, widest_lo, widest_hi;
};

struct Kernels {
    const char* name;

    // counts[2 * r] = samples right in rows[r] (nonzero bytes, or bits set); counts[2 * r + 1] = samples right in rows[r] and
    // in ref, which is bits in both functions. n_rows is 1 to count_rows: several rows share one read of ref.
    void (*count_bytes)(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts);
    void (*count_bits)(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n_bytes, int64_t* counts);

    // counts[i * stride + k] += bits set in both a[i] and b[k], for i < overlap_rows and k < overlap_columns.
    void (*count_overlaps)(const uint8_t* const* a, const uint8_t* const* b, int64_t n_bytes, int64_t* counts,
                           int64_t stride);

    // Bytes to bits, with zeros past the last sample, and bits to bytes 0 or 1.
    void (*pack)(const uint8_t* bytes, int64_t n, uint8_t* bits);
    void (*unpack)(const uint8_t* bits, int64_t n, uint8_t* bytes);

    // Bit i = predictions[i] == labels[i], for i < n <= compare_block; zeros past the last.
    void (*compare)(const void* predictions, fmn_type type, const int64_t* labels, int64_t n, uint8_t* bits);

    // bytes[i] = whether the arg-max of row i is labels[i]. Returns whether any score is NaN.
    bool (*compare_scores)(const uint8_t* scores, fmn_type type, int64_t n_classes, int64_t stride, const int64_t* labels,
                           int64_t n, uint8_t* bytes);

    // Updates words [begin, end) of a block by n_rows epochs of bits, n_rows <= sample_rows, of which the first has number e, a
    // multiple of sample_rows. rows has sample_rows pointers to word 0; those past n_rows point to zeros.
    void (*update_samples)(const uint8_t* const* rows, int n_rows, int64_t begin, int64_t end, int e, SampleBlock* block);

    // Adds a block of n samples, whose `length` epochs begin at `base`, to their counts: five rows, `stride` apart.
    void (*add_samples)(const SampleBlock& block, int64_t n, int32_t base, int32_t length, int32_t* counts, int64_t stride);

    // Bit k of out[i] = bit i of rows[k], for k < 8 and i < n or the next multiple of 8.
    void (*transpose)(const uint8_t* const* rows, int64_t n, uint8_t* out);

    // Add the tile's samples to the lines of their groups, in their order.
    // right: at eight epochs of the tile, from `transpose`; four or one of them.
    void (*add_counts)(const GroupBlock& block, const uint8_t* const* right, CountLines* lines);
    void (*add_weights)(const GroupBlock& block, const uint8_t* right, WeightLines* lines);

    // Mean of n_rows rows of n floating-point numbers, each `offset` bytes behind its pointer: their sum in order as double,
    // divided by n_rows.
    void (*mean)(const void* const* rows, int64_t offset, fmn_type type, int64_t n_rows, int64_t n, double* out);

    // Whether a row of n numbers is not negative and has a sum within `tolerance` of 1; false for NaN.
    bool (*sums_to_one)(const double* row, int64_t n, double tolerance);

    // For epsilon * then + (1 - epsilon) * now, rows of n scores: the interval in which it is right (with the widest one only
    // if `widest`), and whether it is right at each epsilon. `interval` may read interval_lanes numbers past the ends.
    Interval (*interval)(const double* now, const double* then, int64_t n, int64_t label, bool widest);
    void (*right_at)(const double* now, const double* then, int64_t n, int64_t label, const double* epsilon,
                     int64_t n_epsilons, bool* right);
};

constexpr int count_rows = 4, sample_rows = 8, overlap_rows = 4, overlap_columns = 4, interval_lanes = 8;
constexpr int64_t compare_block = 4096;

extern const Kernels base_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define FMN_X86 1
extern const Kernels avx2_kernels, avx512_kernels;
#elif defined(__aarch64__) && defined(__GNUC__)
#define FMN_NEON 1
extern const Kernels neon_kernels;
#endif

}  // namespace fmn
