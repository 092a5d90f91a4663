// One table of kernels per instruction set; dispatch.cpp picks one at run time and cuts the work into pieces for it.
#pragma once
#include <cstdint>

#include "fmn/fmn.h"

// Before a loop: what it writes does not overlap what it reads.
#if defined(__clang__)
#define FMN_NO_ALIAS _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FMN_NO_ALIAS _Pragma("GCC ivdep")
#else
#define FMN_NO_ALIAS
#endif

namespace fmn {

// What happened to a block of samples in up to 248 epochs, counted from the first of them: bytes, so that a step of a
// vector unit moves as many samples as it has bytes, and the block stays in the first caches.
struct SampleBlock {
    static constexpr int64_t size = 8192;
    static constexpr int32_t max_epochs = 248;  // a multiple of sample_rows
    uint8_t wrong[size], events[size];      // counts
    uint8_t first[size];                    // epochs before the first right one
    uint8_t last[size], last_wrong[size];   // epochs; 0 where there is none
};

// Up to eight epochs of some samples, and the sums to which they are added: (4, n_groups, n_epochs).
template <class T>
struct GroupTile {
    const uint8_t* right;   // bit k of right[i]: sample i was right at the tile's epoch k
    const uint8_t* at_end;  // 255 if it was right at the reference epoch, else 0
    const int64_t* groups;
    const double* weights;
    int64_t n_samples;
    T* sums;           // of right, at the tile's first epoch, in group 0
    int64_t n_epochs;  // from group to group
    int64_t plane;     // from right to forgotten, learned, retained
    int n_lanes;       // epochs of this tile
};

// Where a mixture of two rows of scores is right: the closed interval [lo, hi] of epsilon, empty if lo > hi; and the widest
// one that rounding could make of it.
struct Interval {
    double lo, hi, widest_lo, widest_hi;
};

struct Kernels {
    const char* name;

    // counts[2 * r] = samples right in rows[r] (nonzero bytes, or bits set), counts[2 * r + 1] = those of them right in ref,
    // which is bits in both; n_rows is 1 to count_rows, so that a row's read of ref serves others too.
    void (*count_bytes)(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n, int64_t* counts);
    void (*count_bits)(const uint8_t* const* rows, int n_rows, const uint8_t* ref, int64_t n_bytes, int64_t* counts);

    // counts[k] += bits set in both a and b[k], for k < 4.
    void (*count_overlaps)(const uint8_t* a, const uint8_t* const* b, int64_t n_bytes, int64_t* counts);

    // Bytes to bits and back; the last byte of bits is filled with zero bits, bytes come out as 0 or 1.
    void (*pack)(const uint8_t* bytes, int64_t n, uint8_t* bits);
    void (*unpack)(const uint8_t* bits, int64_t n, uint8_t* bytes);

    // Bit i = predictions[i] == labels[i], for i < n <= compare_block; the last byte is filled with zero bits.
    void (*compare)(const void* predictions, fmn_type type, const int64_t* labels, int64_t n, uint8_t* bits);

    // bytes[i] = the arg-max of row i is labels[i]; whether any score is NaN.
    bool (*compare_scores)(const uint8_t* scores, fmn_type type, int64_t n_classes, int64_t stride, const int64_t* labels,
                           int64_t n, uint8_t* bytes);

    // Takes n samples of a block through n_rows epochs (rows[1] ... rows[n_rows], the first of them numbered e), given the
    // row before in rows[0]; n_rows is sample_rows or 1. The n_rows pointers after them say what will be read next.
    void (*update_samples)(const uint8_t* const* rows, int n_rows, int64_t n, uint8_t e, SampleBlock* block);

    // Adds the tile's samples: to right and retained alone (the rest follows from them), or weights to all four.
    void (*add_counts)(const GroupTile<int64_t>& tile);
    void (*add_weights)(const GroupTile<double>& tile);

    // n floating-point numbers as double.
    void (*widen)(const void* scores, fmn_type type, int64_t n, double* out);

    // Whether a row of n numbers is not negative and has a sum within `tolerance` of 1; false for NaN.
    bool (*sums_to_one)(const double* row, int64_t n, double tolerance);

    // Of epsilon * then + (1 - epsilon) * now: where it is right (the widest interval only if asked for); and whether it is at
    // each epsilon. Rows of n scores.
    Interval (*interval)(const double* now, const double* then, int64_t n, int64_t label, bool widest);
    void (*right_at)(const double* now, const double* then, int64_t n, int64_t label, const double* epsilon,
                     int64_t n_epsilons, bool* right);
};

constexpr int count_rows = 4, sample_rows = 8;
constexpr int64_t compare_block = 4096;

extern const Kernels base_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define FMN_X86 1
extern const Kernels avx2_kernels, avx512_kernels;
void update_samples_avx2(const uint8_t* const* rows, int n_rows, int64_t n, uint8_t e, SampleBlock* block);
#elif defined(__aarch64__) && defined(__GNUC__)
#define FMN_NEON 1
extern const Kernels neon_kernels;
#endif

}  // namespace fmn
