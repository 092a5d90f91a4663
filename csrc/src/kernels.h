// One row-level kernel set per instruction set; dispatch.cpp picks one at run time.
#pragma once
#include <cstdint>

namespace fmn {

// What happened to a block of samples in up to 255 epochs, counted from the first of them: bytes, so that a step of a
// vector unit moves as many samples as it has bytes, and the block stays in the level-1 cache.
struct SampleBlock {
    static constexpr int64_t size = 4096;
    static constexpr int32_t max_epochs = 255;
    uint8_t right[size], events[size];                  // counts
    uint8_t first[size], last[size], last_wrong[size];  // epochs; undefined where there is none
};

struct Kernels {
    const char* name;
    // right = bytes of row that are nonzero; retained = positions where row and ref both are.
    void (*count_row)(const uint8_t* row, const uint8_t* ref, int64_t n, int64_t* right, int64_t* retained);
    // Bits set in both a and b.
    int64_t (*count_and)(const uint8_t* a, const uint8_t* b, int64_t n_bytes);
    // Takes n samples of a block through its epoch e, from the row before (for the very first epoch: the same) and now.
    void (*update_samples)(const uint8_t* before, const uint8_t* now, int64_t n, uint8_t e, SampleBlock* block);
};

// The loop behind update_samples, inlined into one function per instruction set, which the compiler then vectorises.
#ifdef __GNUC__
__attribute__((always_inline))
#endif
inline void
update_samples_loop(const uint8_t* before, const uint8_t* now, int64_t n, uint8_t e, SampleBlock* s) {
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#elif defined(__GNUC__)
#pragma GCC ivdep  // the rows do not overlap the block
#endif
    for (int64_t i = 0; i < n; ++i) {  // with masks (0 or 255): the compiler turns choices back into jumps
        const uint8_t ok = static_cast<uint8_t>(-(now[i] != 0)), was = static_cast<uint8_t>(-(before[i] != 0));
        const uint8_t is_first = static_cast<uint8_t>(-(s->right[i] == 0)) & ok;
        s->first[i] = static_cast<uint8_t>((e & is_first) | (s->first[i] & ~is_first));
        s->last[i] = static_cast<uint8_t>((e & ok) | (s->last[i] & ~ok));
        s->last_wrong[i] = static_cast<uint8_t>((e & ~ok) | (s->last_wrong[i] & ok));
        s->right[i] = static_cast<uint8_t>(s->right[i] + (ok & 1));
        s->events[i] = static_cast<uint8_t>(s->events[i] + (was & ~ok & 1));
    }
}

extern const Kernels base_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define FMN_HAVE_AVX2 1
extern const Kernels avx2_kernels;
#endif

}  // namespace fmn
