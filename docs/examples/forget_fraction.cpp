// Accuracy and forget fraction per epoch in C++17. The input is a correctness
// matrix (n_epochs, n_samples) that NumPy wrote. The program maps the file
// (POSIX), packs it to one bit per sample, and counts the bits.
//
// Write an input in Python:
//     np.save("correct.npy", np.random.rand(5, 1001) < 0.6)
// Build the library and this program, and run it:
//     cmake -B build && cmake --build build
//     c++ -std=c++17 -Icsrc/include docs/examples/forget_fraction.cpp
//         build/libfmn.a -pthread -o forget_fraction
//     ./forget_fraction correct.npy
#include <fcntl.h>
#include <fmn/fmn.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

static void require(bool condition, const char* expected) {
    if (!condition)
        throw std::runtime_error(std::string("expected ") + expected);
}

// Maps a file until the process ends.
static std::string_view mapped(const char* path) {
    const int file = open(path, O_RDONLY);
    struct stat status;
    void* at = MAP_FAILED;
    if (file >= 0 && fstat(file, &status) == 0)
        at = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ,
                  MAP_PRIVATE, file, 0);
    if (at == MAP_FAILED)
        throw std::system_error(errno, std::generic_category(),
                                "expected a file to map, not empty");
    close(file);
    return {static_cast<const char*>(at), static_cast<size_t>(status.st_size)};
}

// Finds the matrix in a mapped file, after its header (numpy.lib.format).
static fmn_matrix matrix_in(std::string_view file) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(file.data());
    require(file.size() >= 12 && file.substr(0, 6) == "\x93NUMPY" &&
                (bytes[6] == 1 || bytes[6] == 2) && bytes[7] == 0,
            "an .npy file of version 1.0 or 2.0");
    // The length of the header takes 2 bytes in version 1.0, 4 bytes in 2.0.
    const size_t start = bytes[6] == 1 ? 10 : 12;
    size_t length = 0;
    for (size_t i = 8; i < start; ++i)
        length |= size_t{bytes[i]} << 8 * (i - 8);
    require(length <= file.size() - start, "a whole header");
    std::string header(file.substr(start, length));
    header.erase(std::remove(header.begin(), header.end(), ' '), header.end());
    require(header.find("'descr':'|b1'") != header.npos,
            "an array of bool, 'descr': '|b1'");
    require(header.find("'fortran_order':False") != header.npos,
            "C order, 'fortran_order': False");

    long long n_epochs = 0, n_samples = 0;
    // Set by %n, which sscanf reaches only if everything before it matched.
    // 18 digits cannot overflow.
    int end = 0;
    if (const size_t shape = header.find("'shape':("); shape != header.npos)
        std::sscanf(&header[shape], "'shape':(%18lld,%18lld)%n", &n_epochs,
                    &n_samples, &end);
    require(end > 0, "two dimensions, 'shape': (n_epochs, n_samples)");
    require(n_epochs > 0 && n_samples > 0, "at least one epoch and one sample");
    require(static_cast<size_t>(n_samples) <=
                (file.size() - start - length) / static_cast<size_t>(n_epochs),
            "n_epochs * n_samples bytes after the header; it is too short");
    return {bytes + start + length, n_epochs, n_samples, n_samples, FMN_BYTES};
}

int main(int argc, char** argv) try {
    require(argc == 2, "one argument, correct.npy");
    const fmn_matrix bytes = matrix_in(mapped(argv[1]));
    const int64_t n_epochs = bytes.n_epochs, n_samples = bytes.n_samples;
    const int64_t stride = (n_samples + 7) / 8;

    std::vector<uint8_t> bits(static_cast<size_t>(n_epochs * stride));
    require(fmn_pack(&bytes, 0, bits.data(), stride) == FMN_OK,
            "a matrix that fmn_pack accepts");
    const fmn_matrix packed = {bits.data(), n_epochs, n_samples, stride,
                               FMN_BITS};

    // Four rows of zeros: fmn_curve_counts adds to them.
    std::vector<int64_t> counts(static_cast<size_t>(4 * n_epochs));
    require(fmn_curve_counts(&packed, n_epochs - 1, 0, counts.data()) == FMN_OK,
            "a matrix that can be counted");
    const int64_t *right = counts.data(), *forgotten = right + n_epochs;
    const auto n = static_cast<double>(n_samples);
    std::printf("epoch accuracy      F_e\n");
    for (long long e = 0; e < n_epochs; ++e)
        std::printf("%5lld %8.6f %8.6f\n", e, right[e] / n, forgotten[e] / n);
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argc == 2 ? argv[1] : "forget_fraction",
                 error.what());
    return 1;
}
