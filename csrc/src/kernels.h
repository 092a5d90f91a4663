// One row-level kernel set per instruction set; dispatch.cpp picks one at run time.
#pragma once
#include <cstdint>

namespace fmn {

struct Kernels {
    const char* name;
    // right = bytes of row that are nonzero; retained = positions where row and ref both are.
    void (*count_row)(const uint8_t* row, const uint8_t* ref, int64_t n, int64_t* right, int64_t* retained);
    // Bits set in both a and b.
    int64_t (*count_and)(const uint8_t* a, const uint8_t* b, int64_t n_bytes);
};

extern const Kernels base_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define FMN_HAVE_AVX2 1
extern const Kernels avx2_kernels;
#endif

}  // namespace fmn
