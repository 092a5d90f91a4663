/* fmn.h: the counts behind the forget fraction, as a C library (arXiv 2507.08686, Section III).
 *
 * Linking. A static libfmn.a also needs the C++ runtime and threads; `pkg-config --static` and find_package(fmn) add them.
 *
 * Matrix. A correctness matrix has a row per epoch and a column per sample: was the sample classified correctly? Every
 * function that takes an fmn_matrix reads two formats:
 *   FMN_BYTES  one byte per sample, nonzero for right, as in a NumPy bool array;
 *   FMN_BITS   eight samples per byte, least significant bit first, as np.packbits(..., bitorder="little"). Bits past the
 *              last sample are ignored.
 * The samples of a row are adjacent. Rows are `stride` bytes apart: any value, also zero or negative.
 *
 * Errors. Every function checks its arguments and returns an fmn_status; none throws. A call that returns
 * FMN_INVALID_ARGUMENT has written nothing.
 *
 * Threads. A call runs on at most n_threads threads, the caller's included; n_threads <= 0 means fmn_threads(). Each extra
 * thread gets at least a tenth of a millisecond of work, so small calls start none. All of them end before the call returns.
 * The library keeps no state between calls: several threads may call it at once.
 *
 * Memory. Only these functions allocate: fmn_group_counts and fmn_group_sums less than the size of their output or 256 bytes a
 * group, if that is more; fmn_check_probabilities, fmn_mixture_right and the two functions fmn_best_epsilon buffers for a block of
 * samples, and what the comment of fmn_best_epsilon says. If there is not enough memory, nothing was added.
 *
 * Results. The same input gives the same output, bit for bit, for any number of threads and any instruction set.
 *
 * Counting functions ADD to their output, so set it to zero first. A matrix that is larger than memory, or spread over
 * several machines, can therefore be counted in pieces: all epochs of samples 0 to 999, then of samples 1000 to 1999, and so
 * on, into one output.
 *
 * Sizes. n_epochs * n_samples and n_samples * n_classes may be up to 2^62; more is FMN_INVALID_ARGUMENT. Where one of them is
 * zero there is nothing to read: the other may have any size, and the arrays may be null.
 */
#ifndef FMN_FMN_H
#define FMN_FMN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    FMN_OK = 0,
    FMN_INVALID_ARGUMENT = 1, /* a null pointer, a size out of range, an index out of range, an unknown format or type */
    FMN_NOT_A_NUMBER = 2,     /* fmn_pack_scores: a score is NaN */
    FMN_OUT_OF_MEMORY = 3     /* only from functions that allocate */
} fmn_status;

typedef enum { FMN_BYTES = 0, FMN_BITS = 1 } fmn_format;

typedef enum {
    FMN_INT8, FMN_UINT8, FMN_INT16, FMN_UINT16, FMN_INT32, FMN_UINT32, FMN_INT64, FMN_UINT64,
    FMN_FLOAT16, FMN_BFLOAT16, FMN_FLOAT32, FMN_FLOAT64
} fmn_type;

typedef struct {
    const uint8_t* data; /* first byte of row 0; may be null if the matrix is empty */
    int64_t n_epochs;    /* rows, >= 0 */
    int64_t n_samples;   /* columns, >= 0: samples, not bytes, in both formats */
    int64_t stride;      /* bytes from one row to the next */
    int32_t format;      /* an fmn_format */
} fmn_matrix;

/* Adds four rows of n_epochs counts against the reference epoch r (0 <= r < n_epochs):
 *   counts[0][e] right at e                          counts[1][e] right at e, wrong at r (forgotten)
 *   counts[2][e] wrong at e, right at r (learned)    counts[3][e] right at both (retained)
 * F_e = counts[1][e] / n_samples, L_e = counts[2][e] / n_samples. Reads the matrix once: O(n_epochs * n_samples).
 * Before the call, `counts` must hold zeros or the counts of other samples at the same epochs and reference. */
fmn_status fmn_curve_counts(const fmn_matrix* correct, int64_t reference, int n_threads, int64_t* counts);

/* Adds the same counts within groups: sample i is in group groups[i], in [0, n_groups); counts is (4, n_groups, n_epochs). */
fmn_status fmn_group_counts(const fmn_matrix* correct, int64_t reference, const int64_t* groups, int64_t n_groups,
                            int n_threads, int64_t* counts);

/* Adds weights[i] where fmn_group_counts adds one; sums is (4, n_groups, n_epochs). Each sum is taken in double, in the order
 * of the samples. Pieces in that order (samples 0 to 999, then 1000 to 1999) therefore give the bits of one call. */
fmn_status fmn_group_sums(const fmn_matrix* correct, int64_t reference, const int64_t* groups, int64_t n_groups,
                          const double* weights, int n_threads, double* sums);

/* Writes five rows of n_samples values: first epoch right, last epoch right, number of right-to-wrong changes, number of
 * epochs right, last epoch wrong. An epoch is -1 if there is none. n_epochs < 2^31. One pass: O(n_epochs * n_samples). */
fmn_status fmn_sample_counts(const fmn_matrix* correct, int n_threads, int32_t* counts);

/* Adds to counts[i][j] the number of samples that are right at both i and j; counts is (n_epochs, n_epochs). The number right
 * at i and wrong at j is counts[i][i] - counts[i][j]. The function computes one half and mirrors it: O(n_epochs^2 / 2 *
 * n_samples) bit operations, 64 to 512 per instruction. It packs bytes once per 32 epochs: with many epochs, call fmn_pack
 * first and pass the bits. */
fmn_status fmn_overlap_counts(const fmn_matrix* correct, int n_threads, int64_t* counts);

/* fmn_pack turns FMN_BYTES into bits, fmn_unpack turns FMN_BITS into bytes 0 or 1. The output has n_epochs rows, `stride`
 * bytes apart, which must not overlap. A row of bits has ceil(n_samples / 8) bytes, with zeros past the last sample; a row
 * of bytes has n_samples. */
fmn_status fmn_pack(const fmn_matrix* correct, int n_threads, uint8_t* bits, int64_t stride);
fmn_status fmn_unpack(const fmn_matrix* correct, int n_threads, uint8_t* bytes, int64_t stride);

/* Writes rows of bits: whether predictions[e][i] == labels[i]. `type` is an fmn_type of integers. The predictions of a row are
 * adjacent, rows are `stride` bytes apart; no alignment is needed. Row e of the result begins at bits + e * bits_stride. */
fmn_status fmn_pack_predictions(const void* predictions, int32_t type, int64_t n_epochs, int64_t n_samples, int64_t stride,
                                const int64_t* labels, int n_threads, uint8_t* bits, int64_t bits_stride);

/* Writes one row of bits, ceil(n_samples / 8) bytes: whether the arg-max of sample i's scores is labels[i]. As in NumPy, the
 * first of equal scores is the arg-max, and 0.0 equals -0.0. `type` is a floating-point fmn_type. The n_classes scores of a
 * sample are adjacent, samples are `stride` bytes apart; labels are in [0, n_classes). O(n_samples * n_classes).
 * Returns FMN_NOT_A_NUMBER if a score is NaN; the row is then written, with "wrong" for each sample that has a NaN. */
fmn_status fmn_pack_scores(const void* scores, int32_t type, int64_t n_samples, int64_t n_classes, int64_t stride,
                           const int64_t* labels, int n_threads, uint8_t* bits);

/* A predictor, and the epochs that may be mixed into it. All values are finite; each array is contiguous, in C order. The
 * prediction of a window of epochs, first to last, is their mean: the sum in double in that order, divided by their number. */
typedef struct {
    const void* current;       /* (n_samples, n_classes) */
    const void* const* epochs; /* n_epochs arrays (n_samples, n_classes) */
    int64_t n_epochs;
    int32_t current_type;      /* an fmn_type, floating-point */
    int32_t type;              /* an fmn_type, floating-point: of all epochs */
    int64_t n_samples, n_classes;
    const int64_t* labels;     /* in [0, n_classes) */
    const int64_t* weights;    /* of the samples, >= 0, sum below 2^62; null for 1 each. Weight 0 skips a sample. */
} fmn_mixture;

/* Writes 1 to *sound if every row of scores, a contiguous (n_samples, n_classes) array, holds finite numbers >= 0 whose sum is
 * within `tolerance` of 1; else 0. */
fmn_status fmn_check_probabilities(const void* scores, int32_t type, int64_t n_samples, int64_t n_classes, double tolerance,
                                   int n_threads, int* sound);

/* Adds to right[j] the weights of the samples that epsilon[j] * window + (1 - epsilon[j]) * current classifies correctly, in
 * double: no class before the label reaches the label's score, and none after it exceeds it.
 * O(n_samples * n_classes * n_epsilons). */
fmn_status fmn_mixture_right(const fmn_mixture* mixture, int64_t first, int64_t last, const double* epsilon,
                             int64_t n_epsilons, int n_threads, int64_t* right);

/* Finds the best epsilon in [0, 1] for each of n_windows windows; windows[2 * c] is the first, windows[2 * c + 1] the last
 * epoch of window c. A sample is right on one interval of epsilon. One pass, O(n_samples * n_classes), gives the intervals;
 * one sort gives the stretch of [0, 1] in which the most weight is right (arXiv 2507.08686 searches a grid instead).
 *   epsilon[c]  the middle of the first such stretch that is longer than 1e-12, or of the first one if none is longer
 *   right[c]    the weight that is right there; rounding may change it: fmn_mixture_right evaluates it
 *   on_grid[c]  written if n_grid > 0: an upper bound of what fmn_mixture_right gives at any grid[j], for scores of at most
 *               1 in magnitude. The grid is ascending, in [0, 1].
 * Allocates up to 64 MiB, or 32 bytes per sample if that is more. */
fmn_status fmn_best_epsilon(const fmn_mixture* mixture, const int64_t* windows, int64_t n_windows, const double* grid,
                            int64_t n_grid, int n_threads, double* epsilon, int64_t* right, int64_t* on_grid);

/* As fmn_best_epsilon without a grid, for several calls that differ in current and weights only. The calls write to `seen`
 * (n_windows, n_samples), zeros before the first one, which class beats the label in a window, and save time by it. Unless
 * `exact`, which takes longest, right[c] is an upper bound, and epsilon[c] means nothing. */
fmn_status fmn_best_epsilon_seen(const fmn_mixture* mixture, const int64_t* windows, int64_t n_windows, int exact,
                                 int n_threads, uint16_t* seen, double* epsilon, int64_t* right);

/* The instruction set in use: "avx512", "avx2", "neon" or "base". The environment variable FMN_ISA, read once, asks for one.
 * If the processor or the operating system lacks it, the best available one is used: compare the result. */
const char* fmn_instruction_set(void);

/* The default thread count: FMN_NUM_THREADS, or else the processors this process may run on. */
int fmn_threads(void);

#ifdef __cplusplus
}
#endif
#endif
