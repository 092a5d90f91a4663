/* fmn.h: the counts behind the forget fraction, as a C library. Link a static libfmn.a with the C++ runtime and threads;
 * `pkg-config --static` and find_package(fmn) know how.
 *
 * A correctness matrix says for each epoch (row) and sample (column) whether the sample was classified correctly. Two
 * formats are read everywhere: FMN_BYTES, a byte per sample, nonzero for right (what a bool array of NumPy holds); and
 * FMN_BITS, eight samples per byte, least significant bit first (np.packbits(..., bitorder="little")); bits past the last
 * sample are ignored. Samples of a row are adjacent; rows are `stride` bytes apart: any value, zero and negative included.
 *
 * Every function checks its arguments, returns an fmn_status, throws nothing, keeps no state and may be called from several
 * threads at once. It starts up to n_threads - 1 threads (n_threads <= 0: fmn_threads() - 1), none for work of less than a
 * tenth of a millisecond each, and joins them; beyond these only functions of mixtures and probabilities
 * allocate, at most what their comments say. Nothing is written when the
 * status is FMN_INVALID_ARGUMENT. The same input gives the same output, bit for bit, whatever the thread count and
 * instruction set.
 *
 * Functions that count ADD to their output. Set it to zero first; give a matrix that is larger than memory, or lies on
 * several machines, in pieces of its samples (all epochs of samples 0 to 999, then of 1000 to 1999, ...), to one output.
 *
 * Sizes: n_epochs * n_samples up to 2^62; nothing overflows below.
 */
#ifndef FMN_FMN_H
#define FMN_FMN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    FMN_OK = 0,
    FMN_INVALID_ARGUMENT = 1, /* a null pointer, a negative size, an index out of range, an unknown format or type */
    FMN_NOT_A_NUMBER = 2,     /* fmn_pack_scores: a score is NaN */
    FMN_OUT_OF_MEMORY = 3     /* of functions that allocate */
} fmn_status;

typedef enum { FMN_BYTES = 0, FMN_BITS = 1 } fmn_format;

typedef enum {
    FMN_INT8, FMN_UINT8, FMN_INT16, FMN_UINT16, FMN_INT32, FMN_UINT32, FMN_INT64, FMN_UINT64,
    FMN_FLOAT16, FMN_BFLOAT16, FMN_FLOAT32, FMN_FLOAT64
} fmn_type;

typedef struct {
    const uint8_t* data; /* first byte of row 0; may be null where there is nothing to read */
    int64_t n_epochs;    /* rows, >= 0 */
    int64_t n_samples;   /* columns, >= 0: samples, not bytes, in both formats */
    int64_t stride;      /* bytes from one row to the next */
    int32_t format;      /* an fmn_format */
} fmn_matrix;

/* Adds four rows of n_epochs counts against the reference epoch r (0 <= r < n_epochs):
 *   counts[0][e] right at e                          counts[1][e] right at e, wrong at r (forgotten)
 *   counts[2][e] wrong at e, right at r (learned)    counts[3][e] right at both (retained)
 * F_e = counts[1][e] / n_samples (arXiv 2507.08686, Section III). Reads the matrix once: O(n_epochs * n_samples).
 * What counts holds before must be zeros, or the counts of other samples at the same epochs and reference. */
fmn_status fmn_curve_counts(const fmn_matrix* correct, int64_t reference, int n_threads, int64_t* counts);

/* Adds the same within groups: groups[i] in [0, n_groups) is the group of sample i; counts is (4, n_groups, n_epochs). */
fmn_status fmn_group_counts(const fmn_matrix* correct, int64_t reference, const int64_t* groups, int64_t n_groups,
                            int n_threads, int64_t* counts);

/* Adds weights[i] where fmn_group_counts adds one; sums is (4, n_groups, n_epochs). Each sum is taken in double in the order
 * of the samples, pieces included: samples 0 to 999 and then 1000 to 1999 give the bits that all at once give. */
fmn_status fmn_group_sums(const fmn_matrix* correct, int64_t reference, const int64_t* groups, int64_t n_groups,
                          const double* weights, int n_threads, double* sums);

/* Writes five rows of n_samples values: first epoch right, last epoch right, number of right-to-wrong changes, number of
 * epochs right, last epoch wrong; -1 where there is no such epoch. n_epochs < 2^31. O(n_epochs * n_samples), one pass. */
fmn_status fmn_sample_counts(const fmn_matrix* correct, int n_threads, int32_t* counts);

/* Adds the number of samples right at both i and j to counts[i][j], (n_epochs, n_epochs). Right at i and wrong at j is then
 * counts[i][i] - counts[i][j]. One half is computed and mirrored: O(n_epochs^2 / 2 * n_samples) bit operations, 64 to 512 at
 * once. Bytes are packed on the way, again for every 32 rows that they meet: pack first if there are many epochs. */
fmn_status fmn_overlap_counts(const fmn_matrix* correct, int n_threads, int64_t* counts);

/* Bytes to bits, and bits to bytes 0 or 1: `correct` must be of the other format. Writes n_epochs rows, `stride` bytes
 * apart, which must not overlap, of ceil(n_samples / 8) bytes with zero bits past the last sample, or of n_samples bytes. */
fmn_status fmn_pack(const fmn_matrix* correct, int n_threads, uint8_t* bits, int64_t stride);
fmn_status fmn_unpack(const fmn_matrix* correct, int n_threads, uint8_t* bytes, int64_t stride);

/* Writes packed rows: whether predictions[e][i] == labels[i]. `type` is an integer type; the predictions of a row are
 * adjacent, rows `stride` bytes apart, with no need of alignment; row e of the result begins at bits + e * bits_stride. */
fmn_status fmn_pack_predictions(const void* predictions, fmn_type type, int64_t n_epochs, int64_t n_samples, int64_t stride,
                                const int64_t* labels, int n_threads, uint8_t* bits, int64_t bits_stride);

/* Writes one packed row, ceil(n_samples / 8) bytes: whether the arg-max of sample i's scores is labels[i], the first of
 * equal ones counting as the arg-max, as in NumPy (0.0 and -0.0 are equal). `type` is a floating-point type; the n_classes
 * scores of a sample are adjacent, samples `stride` bytes apart; labels in [0, n_classes). FMN_NOT_A_NUMBER when any score
 * is NaN (the row is then written, and wrong at the samples that have one). O(n_samples * n_classes). */
fmn_status fmn_pack_scores(const void* scores, fmn_type type, int64_t n_samples, int64_t n_classes, int64_t stride,
                           const int64_t* labels, int n_threads, uint8_t* bits);

/* A predictor, and epochs that may be mixed into it. Values are finite; adjacent, row after row. A window of epochs first to
 * last predicts their mean: the sum in double in that order, divided by their number. */
typedef struct {
    const void* current;       /* (n_samples, n_classes) */
    const void* const* epochs; /* n_epochs arrays (n_samples, n_classes) */
    int64_t n_epochs;
    int32_t current_type;      /* an fmn_type, floating-point */
    int32_t type;              /* of the epochs, as well */
    int64_t n_samples, n_classes;
    const int64_t* labels;     /* in [0, n_classes) */
    const int64_t* weights;    /* of the samples, >= 0, with a sum below 2^62; null: 1 each; 0: as if it were not there */
} fmn_mixture;

/* Writes to *sound 1 if every row of scores (n_samples, n_classes), adjacent, holds finite numbers >= 0 with a sum within
 * `tolerance` of 1, else 0. */
fmn_status fmn_check_probabilities(const void* scores, fmn_type type, int64_t n_samples, int64_t n_classes, double tolerance,
                                   int n_threads, int* sound);

/* Adds to right[j] the weights of the samples that epsilon[j] * window + (1 - epsilon[j]) * current, in double, gets right: no
 * class before the label's reaches its score, none after it exceeds it. O(n_samples * n_classes * n_epsilons). */
fmn_status fmn_mixture_right(const fmn_mixture* mixture, int64_t first, int64_t last, const double* epsilon,
                             int64_t n_epsilons, int n_threads, int64_t* right);

/* The best epsilon in [0, 1] for each of n_windows windows (windows[2 * c] first, windows[2 * c + 1] last epoch). A sample is
 * right on one interval of epsilon, so one pass, O(n_samples * n_classes), gives the intervals, one sort the stretch of [0, 1] in
 * which the most weight is right (arXiv 2507.08686 searches a grid). Writes to epsilon[c] the middle of the first such stretch
 * that is longer than 1e-12, or of the first if none is; to right[c] its weight. Rounding may make an evaluation at epsilon[c]
 * differ: ask fmn_mixture_right. With n_grid > 0, writes to on_grid[c] a bound of what fmn_mixture_right gives at any of the
 * ascending grid[j] in [0, 1], for scores of at most 1 in magnitude. Holds up to 64 MiB or 32 bytes per sample. */
fmn_status fmn_best_epsilon(const fmn_mixture* mixture, const int64_t* windows, int64_t n_windows, const double* grid,
                            int64_t n_grid, int n_threads, double* epsilon, int64_t* right, int64_t* on_grid);

/* The instruction set in use: "avx512", "avx2", "neon" or "base". The environment variable FMN_ISA, read once, asks for one;
 * it is not obeyed where the processor or the operating system lacks it, so compare. */
const char* fmn_instruction_set(void);

/* The default thread count: FMN_NUM_THREADS, or else the processors this process may run on. */
int fmn_threads(void);

#ifdef __cplusplus
}
#endif
#endif
