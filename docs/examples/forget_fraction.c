/* Accuracy and forget fraction per epoch in C11. The input is a correctness
 * matrix (n_epochs, n_samples) that NumPy wrote; it is counted as bytes.
 *
 * Write an input in Python:
 *     np.save("correct.npy", np.random.rand(5, 1001) < 0.6)
 * Build the library and this program, and run it:
 *     cmake -B build && cmake --build build
 *     cc -std=c11 -Icsrc/include docs/examples/forget_fraction.c \
 *         build/libfmn.a -lstdc++ -lm -pthread -o forget_fraction
 *     ./forget_fraction correct.npy
 */
#include <fmn/fmn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Noreturn void fail(const char* path, const char* expected) {
    fprintf(stderr, "%s: expected %s\n", path, expected);
    exit(EXIT_FAILURE);
}

static const char* entry(const char* header, const char* key) {
    const char* found = strstr(header, key);
    return found ? found : "";
}

/* Reads the shape from the header (numpy.lib.format) and leaves the file at the
 * first byte of data. */
static void read_shape(FILE* file, const char* path, int64_t* n_epochs,
                       int64_t* n_samples) {
    /* Large enough for any header of version 1.0. Headers of version 2.0 are
     * longer only for structured types. */
    static char header[1 << 16];
    /* Magic, version, length of the header (2 bytes in 1.0, 4 bytes in 2.0). */
    uint8_t start[12] = {0};
    if (fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY", 6) ||
        start[6] < 1 || start[6] > 2 || start[7] ||
        (start[6] == 2 && fread(start + 10, 1, 2, file) != 2))
        fail(path, "an .npy file of version 1.0 or 2.0");
    const uint32_t length = start[8] | (uint32_t)start[9] << 8 |
                            (uint32_t)start[10] << 16 |
                            (uint32_t)start[11] << 24;
    if (length >= sizeof header || fread(header, 1, length, file) != length)
        fail(path, "a whole header below 64 KiB");

    /* Set by %n, which sscanf reaches only if everything before it matched. */
    int is_bool = 0, is_c_order = 0, is_matrix = 0;
    sscanf(entry(header, "'descr'"), "'descr' : '|b1'%n", &is_bool);
    sscanf(entry(header, "'fortran_order'"), "'fortran_order' : False%n",
           &is_c_order);
    sscanf(entry(header, "'shape'"),
           "'shape' : ( %18" SCNd64 " , %18" SCNd64 " )%n", n_epochs, n_samples,
           &is_matrix);
    if (!is_bool) fail(path, "an array of bool, 'descr': '|b1'");
    if (!is_c_order)
        fail(path, "C order, 'fortran_order': False (np.ascontiguousarray)");
    if (!is_matrix)
        fail(path, "two dimensions, 'shape': (n_epochs, n_samples)");
    if (*n_epochs < 1 || *n_samples < 1)
        fail(path, "at least one epoch and one sample");
    if (*n_samples > PTRDIFF_MAX / *n_epochs)
        fail(path, "a matrix that can be addressed");
}

int main(int argc, char** argv) {
    if (argc != 2)
        fail(argc ? argv[0] : "forget_fraction", "one argument, correct.npy");
    const char* path = argv[1];
    FILE* file = fopen(path, "rb");
    if (!file) fail(path, "a file that can be read");
    int64_t n_epochs, n_samples;
    read_shape(file, path, &n_epochs, &n_samples);

    const size_t size = (size_t)n_epochs * (size_t)n_samples;
    uint8_t* correct = malloc(size);
    /* Four rows of zeros: fmn_curve_counts adds to them. */
    int64_t* counts = calloc((size_t)n_epochs, 4 * sizeof *counts);
    if (!correct || !counts) fail(path, "a matrix that fits in memory");
    if (fread(correct, 1, size, file) != size)
        fail(path,
             "n_epochs * n_samples bytes after the header; it is too short");
    fclose(file);

    const fmn_matrix matrix = {correct, n_epochs, n_samples, n_samples,
                               FMN_BYTES};
    if (fmn_curve_counts(&matrix, n_epochs - 1, 0, counts) != FMN_OK)
        fail(path, "a matrix that fmn_curve_counts accepts");
    const int64_t *right = counts, *forgotten = counts + n_epochs;
    const double n = (double)n_samples;
    printf("epoch accuracy      F_e\n");
    for (int64_t e = 0; e < n_epochs; ++e)
        printf("%5" PRId64 " %8.6f %8.6f\n", e, (double)right[e] / n,
               (double)forgotten[e] / n);
    free(counts);
    free(correct);
    return EXIT_SUCCESS;
}
