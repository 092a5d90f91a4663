/* fmn.h: the counts behind the forget fraction, as a C library.
 *
 * A correctness matrix has n_epochs rows of n_samples bytes; a nonzero byte means that the sample was classified correctly
 * at that epoch. Bytes of a row are adjacent; rows are `stride` bytes apart (any value: negative, zero, unaligned).
 *
 * Every function checks its arguments, returns an fmn_status, throws nothing, keeps no state and may be called from several
 * threads at once. n_threads <= 0 means fmn_threads(). Outputs are written by the caller's memory only; the same input gives
 * the same output, bit for bit, whatever the thread count and instruction set.
 */
#ifndef FMN_FMN_H
#define FMN_FMN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { FMN_OK = 0, FMN_INVALID_ARGUMENT = 1, FMN_OUT_OF_MEMORY = 2 } fmn_status;

typedef struct {
    const uint8_t* data; /* first byte of row 0 */
    int64_t n_epochs;    /* >= 1 */
    int64_t n_samples;   /* >= 1 */
    int64_t stride;      /* bytes from one row to the next */
} fmn_matrix;

/* Four rows of n_epochs counts against the reference epoch r (0 <= r < n_epochs):
 *   counts[0][e] right at e          counts[1][e] right at e, wrong at r (forgotten)
 *   counts[2][e] wrong at e, right at r (learned)   counts[3][e] right at both (retained)
 * F_e = counts[1][e] / n_samples. Reads the matrix once: O(n_epochs * n_samples). */
fmn_status fmn_curve_counts(const fmn_matrix* correct, int64_t reference, int n_threads, int64_t* counts);

/* The same within groups: groups[i] in [0, n_groups) for each sample; counts is (4, n_groups, n_epochs). This function and
 * the next allocate 40 * n_groups * n_epochs bytes while they run. */
fmn_status fmn_group_counts(const fmn_matrix* correct, int64_t reference, const int64_t* groups, int64_t n_groups,
                            int n_threads, int64_t* counts);

/* The same with a weight per sample, summed in double in the order of the samples; sums is (4, n_groups, n_epochs). */
fmn_status fmn_group_sums(const fmn_matrix* correct, int64_t reference, const int64_t* groups, int64_t n_groups,
                          const double* weights, int n_threads, double* sums);

/* Five rows of n_samples values: first epoch right, last epoch right, number of right-to-wrong changes, number of epochs
 * right, last epoch wrong; -1 where there is no such epoch. */
fmn_status fmn_sample_counts(const fmn_matrix* correct, int n_threads, int32_t* counts);

/* counts[i][j] = number of bits set in both row i and row j; (n_epochs, n_epochs). Here n_samples counts BYTES of packed
 * bits per row. Computes one half and mirrors it: O(n_epochs^2 / 2 * n_bytes). */
fmn_status fmn_overlap_counts(const fmn_matrix* packed, int n_threads, int64_t* counts);

/* The instruction set in use ("avx2" or "base"; the environment variable FMN_ISA forces one, read once). */
const char* fmn_instruction_set(void);

/* The default thread count: the processors this process may run on, or FMN_NUM_THREADS. */
int fmn_threads(void);

#ifdef __cplusplus
}
#endif
#endif
