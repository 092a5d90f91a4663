// The C API: argument checks, the choice of the instruction set, and the split over threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "fmn/fmn.h"
#include "kernels.h"

#ifdef __linux__
#include <sched.h>
#endif

namespace {

const fmn::Kernels& choose() {
    const char* forced = std::getenv("FMN_ISA");
    if (forced && std::strcmp(forced, "base") == 0) return fmn::base_kernels;
#ifdef FMN_HAVE_AVX2
    __builtin_cpu_init();  // its answer includes the operating system's support
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) return fmn::avx2_kernels;
#endif
    return fmn::base_kernels;
}

const fmn::Kernels& kernels() {
    static const fmn::Kernels& chosen = choose();
    return chosen;
}

bool valid(const fmn_matrix* m) { return m && m->data && m->n_epochs >= 1 && m->n_samples >= 1; }

const uint8_t* row(const fmn_matrix* m, int64_t e) { return m->data + e * m->stride; }

// Calls work(begin, end) on disjoint parts of [0, n), each a multiple of `grain` long but the last. Threads are started only
// when each gets at least a megabyte, so that small calls start none.
template <class Work>
fmn_status split(int64_t n, int64_t grain, int64_t bytes, int n_threads, const Work& work) {
    const int64_t wanted = n_threads > 0 ? n_threads : fmn_threads();
    const int64_t grains = (n + grain - 1) / grain;
    const int64_t parts = std::max<int64_t>(1, std::min({wanted, grains, bytes >> 20}));
    const auto bound = [&](int64_t part) { return std::min(n, grains * part / parts * grain); };
    try {
        std::vector<std::thread> threads;
        threads.reserve(static_cast<size_t>(parts - 1));
        int64_t part = 1;
        try {
            for (; part < parts; ++part) threads.emplace_back(work, bound(part), bound(part + 1));
        } catch (const std::exception&) {  // no more threads to be had: do the rest here
        }
        work(bound(0), bound(1));
        if (part < parts) work(bound(part), n);
        for (auto& t : threads) t.join();
    } catch (const std::bad_alloc&) {
        return FMN_OUT_OF_MEMORY;
    }
    return FMN_OK;
}

// Right, forgotten, learned, retained per group and epoch; one epoch's row is read in the order of the samples, so that
// floating-point sums do not depend on the thread count.
template <class T, class Weight>
fmn_status grouped(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups, int n_threads, T* out,
                   const Weight& weight) {
    if (!valid(m) || !groups || !out || n_groups < 1 || reference < 0 || reference >= m->n_epochs)
        return FMN_INVALID_ARGUMENT;
    for (int64_t i = 0; i < m->n_samples; ++i)
        if (groups[i] < 0 || groups[i] >= n_groups) return FMN_INVALID_ARGUMENT;
    const uint8_t* ref = row(m, reference);
    const int64_t n_epochs = m->n_epochs, plane = n_groups * n_epochs;
    std::vector<T> scratch;
    try {
        scratch.resize(static_cast<size_t>(5 * plane));
    } catch (const std::exception&) {
        return FMN_OUT_OF_MEMORY;
    }
    T* const sums = scratch.data();  // per epoch and group: wrong at both, learned, forgotten, retained; right
    return split(n_epochs, 1, n_epochs * m->n_samples, n_threads, [=](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
            const uint8_t* now = row(m, e);
            T* const of_epoch = sums + 5 * n_groups * e;
            for (int64_t i = 0; i < m->n_samples; ++i) {
                const int right = now[i] != 0;
                const T w = weight(i);
                T* cell = of_epoch + 5 * groups[i];
                cell[2 * right + (ref[i] != 0)] += w;
                cell[4] += right ? w : T(0);
            }
            for (int64_t g = 0; g < n_groups; ++g) {
                const T* cell = of_epoch + 5 * g;
                T* to = out + g * n_epochs + e;
                to[0] = cell[4];
                to[plane] = cell[2];
                to[2 * plane] = cell[1];
                to[3 * plane] = cell[3];
            }
        }
    });
}

// Adds a block's epochs, which begin at `base`, to the counts of its samples (rows of n).
void add_block(const fmn::SampleBlock& block, int64_t size, int32_t base, int32_t length, int64_t n, int32_t* counts) {
    int32_t *first = counts, *last = counts + n, *events = counts + 2 * n, *right = counts + 3 * n, *wrong = counts + 4 * n;
    for (int64_t i = 0; i < size; ++i) {
        if (base == 0) first[i] = last[i] = wrong[i] = -1, events[i] = right[i] = 0;
        const bool any_right = block.right[i] > 0, any_wrong = block.right[i] < length;
        first[i] = (first[i] < 0) & any_right ? base + block.first[i] : first[i];
        last[i] = any_right ? base + block.last[i] : last[i];
        wrong[i] = any_wrong ? base + block.last_wrong[i] : wrong[i];
        events[i] += block.events[i];
        right[i] += block.right[i];
    }
}

}  // namespace

extern "C" {

fmn_status fmn_curve_counts(const fmn_matrix* m, int64_t reference, int n_threads, int64_t* counts) {
    if (!valid(m) || !counts || reference < 0 || reference >= m->n_epochs) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    const uint8_t* ref = row(m, reference);
    const int64_t n = m->n_epochs;
    int64_t right_at_reference, same;
    k.count_row(ref, ref, m->n_samples, &right_at_reference, &same);
    return split(n, 1, n * m->n_samples, n_threads, [=, &k](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
            int64_t right, retained;
            k.count_row(row(m, e), ref, m->n_samples, &right, &retained);
            counts[e] = right;
            counts[n + e] = right - retained;
            counts[2 * n + e] = right_at_reference - retained;
            counts[3 * n + e] = retained;
        }
    });
}

fmn_status fmn_group_counts(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups, int n_threads,
                            int64_t* counts) {
    return grouped(m, reference, groups, n_groups, n_threads, counts, [](int64_t) { return int64_t(1); });
}

fmn_status fmn_group_sums(const fmn_matrix* m, int64_t reference, const int64_t* groups, int64_t n_groups,
                          const double* weights, int n_threads, double* sums) {
    if (!weights) return FMN_INVALID_ARGUMENT;
    return grouped(m, reference, groups, n_groups, n_threads, sums, [=](int64_t i) { return weights[i]; });
}

fmn_status fmn_sample_counts(const fmn_matrix* m, int n_threads, int32_t* counts) {
    if (!valid(m) || !counts || m->n_epochs > INT32_MAX) return FMN_INVALID_ARGUMENT;
    using Block = fmn::SampleBlock;
    const auto& k = kernels();
    const int64_t n = m->n_samples;
    const int32_t n_epochs = static_cast<int32_t>(m->n_epochs);
    return split(n, Block::size, m->n_epochs * n, n_threads, [=, &k](int64_t begin, int64_t end) {
        Block block;
        for (int64_t start = begin; start < end; start += Block::size) {
            const int64_t size = std::min(end - start, Block::size);
            for (int32_t base = 0; base < n_epochs; base += Block::max_epochs) {
                const int32_t length = std::min(n_epochs - base, Block::max_epochs);
                std::memset(&block, 0, sizeof block);
                for (int32_t e = base; e < base + length; ++e)
                    k.update_samples(row(m, e > 0 ? e - 1 : 0) + start, row(m, e) + start, size,
                                     static_cast<uint8_t>(e - base), &block);
                add_block(block, size, base, length, n, counts + start);
            }
        }
    });
}

fmn_status fmn_overlap_counts(const fmn_matrix* m, int n_threads, int64_t* counts) {
    if (!valid(m) || !counts) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    const int64_t n = m->n_epochs, pairs = n * (n + 1) / 2;
    return split(pairs, 1, pairs * m->n_samples * 2, n_threads, [=, &k](int64_t begin, int64_t end) {
        int64_t i = 0, skipped = 0;  // pair number `begin` in the order (0,0) (0,1) ... (0,n-1) (1,1) ...
        while (skipped + (n - i) <= begin) skipped += n - i++;
        for (int64_t p = begin, j = i + begin - skipped; p < end; ++p) {
            counts[i * n + j] = counts[j * n + i] = k.count_and(row(m, i), row(m, j), m->n_samples);
            if (++j == n) j = ++i;
        }
    });
}

const char* fmn_instruction_set(void) { return kernels().name; }

int fmn_threads(void) {
    const char* forced = std::getenv("FMN_NUM_THREADS");
    if (forced && std::atoi(forced) > 0) return std::atoi(forced);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // extern "C"
