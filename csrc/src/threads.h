// Shared by the functions of the C API: the kernels in use, the split over threads, checks of arguments.
#pragma once
#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

#include "kernels.h"

namespace fmn {

const Kernels& kernels();  // dispatch.cpp

// Calls work(begin, end) on disjoint parts that cover [0, n), one part per thread; not at all if n is 0. `bytes` is the memory to read, or as much
// as other work takes the time of. A thread gets at least 4 MB: with less, two threads were slower than one.
template <class Work>
void split(int64_t n, double bytes, int n_threads, const Work& work) {
    if (n == 0) return;
    constexpr int64_t most = 256;
    const int64_t useful = std::min(n, static_cast<int64_t>(std::min<double>(bytes / (1 << 22), most)));
    if (useful <= 1) return work(0, n);
    const int64_t parts = std::min<int64_t>(useful, n_threads > 0 ? n_threads : fmn_threads());
    const auto bound = [=](int64_t part) { return n / parts * part + std::min(part, n % parts); };
    std::thread threads[most];
    int64_t part = 1;
    try {
        for (; part < parts; ++part) threads[part] = std::thread(work, bound(part), bound(part + 1));
    } catch (const std::exception&) {  // the system gives no more threads: do the rest here
    }
    work(0, bound(1));
    if (part < parts) work(bound(part), n);
    while (--part > 0) threads[part].join();
}

// As split, for work that allocates: an exception must not leave a thread. Returns whether there was enough memory.
template <class Work>
bool split_allocating(int64_t n, double bytes, int n_threads, const Work& work) {
    std::atomic<bool> enough{true};
    split(n, bytes, n_threads, [&](int64_t begin, int64_t end) {
        try {
            work(begin, end);
        } catch (const std::exception&) {  // of a vector: no memory, or more elements than a vector may have
            enough = false;
        }
    });
    return enough;
}

inline bool valid_groups(const int64_t* groups, int64_t n_samples, int64_t n_groups) {
    if (n_groups < 1 || (!groups && n_samples > 0)) return false;
    return std::all_of(groups, groups + n_samples, [=](int64_t g) { return 0 <= g && g < n_groups; });
}

// Whether both sizes of an array are possible. Zero times any size is: then there is nothing to read.
inline bool valid_sizes(int64_t a, int64_t b) {
    return a >= 0 && b >= 0 && (a == 0 || b <= (int64_t(1) << 62) / a);
}

inline bool valid(const fmn_matrix* m) {
    return m && valid_sizes(m->n_epochs, m->n_samples) && (m->data || m->n_epochs == 0 || m->n_samples == 0) &&
           (m->format == FMN_BYTES || m->format == FMN_BITS);
}

inline bool valid(const fmn_matrix* m, int64_t reference) { return valid(m) && 0 <= reference && reference < m->n_epochs; }

// The size of an fmn_type; 0 for any other number.
inline int64_t type_size(int32_t type) {
    switch (type) {
        case FMN_INT8: case FMN_UINT8: return 1;
        case FMN_INT16: case FMN_UINT16: case FMN_FLOAT16: case FMN_BFLOAT16: return 2;
        case FMN_INT32: case FMN_UINT32: case FMN_FLOAT32: return 4;
        case FMN_INT64: case FMN_UINT64: case FMN_FLOAT64: return 8;
    }
    return 0;
}

inline bool is_float(int32_t type) {
    return type == FMN_FLOAT16 || type == FMN_BFLOAT16 || type == FMN_FLOAT32 || type == FMN_FLOAT64;
}

}  // namespace fmn
