// The C API: argument checks, the choice of the instruction set, and the split into pieces for the threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "blocks.h"
#include "threads.h"

#ifdef FMN_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace {

using namespace fmn;

#ifdef FMN_X86
bool has_f16c() {  // some compilers do not know the name in __builtin_cpu_supports
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Finds the kernels that this processor can run, the best first.
int available(const Kernels* found[3]) {
    int n = 0;
#ifdef FMN_X86
    __builtin_cpu_init();  // its answers include support by the operating system
#ifdef FMN_SIMDE
    found[n++] = &avx512_kernels;  // emulated
#else
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vpopcntdq") && has_f16c())
        found[n++] = &avx512_kernels;
#endif
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") && has_f16c()) found[n++] = &avx2_kernels;
#elif defined(FMN_NEON)
    found[n++] = &neon_kernels;
#endif
    found[n++] = &base_kernels;
    return n;
}

const Kernels& choose() {
    const Kernels* found[3];
    const int n = available(found);
    const char* wanted = std::getenv("FMN_ISA");
    for (int i = 0; wanted && i < n; ++i)
        if (std::strcmp(found[i]->name, wanted) == 0) return *found[i];
    return *found[0];
}

constexpr int64_t label_piece = 1 << 15;    // samples: 256 KiB of labels

}  // namespace

namespace fmn {
const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}
}  // namespace fmn

extern "C" {

fmn_status fmn_curve_counts(const fmn_matrix* m, int64_t reference, int n_threads, int64_t* counts) {
    if (!valid(m, reference) || !counts) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    // All epochs of a piece of the samples, then the next piece. A piece is long, so that memory is read in long runs. Its
    // reference row is kept as bits, so that it stays in the level-2 cache.
    const int64_t n = m->n_epochs, fours = ceil_div(n, count_rows), pieces = ceil_div(m->n_samples, reference_piece);
    std::mutex adding;
    split(fours * pieces, 1.0 * n * row_bytes(m), n_threads, [=, &k, &adding](int64_t begin, int64_t end) {
        ReferencePiece ref;
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t e = unit % fours * count_rows, start = unit / fours * reference_piece;
            const int64_t size = std::min(m->n_samples - start, reference_piece);
            const int n_rows = static_cast<int>(std::min<int64_t>(count_rows, n - e));
            if (unit == begin || e == 0) ref.read(k, m, reference, start, size);
            int64_t piece[2 * count_rows];
            count(k, m, e, n_rows, start, size, ref.bits, piece);
            const std::lock_guard<std::mutex> lock(adding);
            for (int r = 0; r < n_rows; ++r) {
                counts[e + r] += piece[2 * r];
                counts[3 * n + e + r] += piece[2 * r + 1];
            }
        }
    });
    derive(counts, n, n, reference);
    return FMN_OK;
}

fmn_status fmn_sample_counts(const fmn_matrix* m, int n_threads, int32_t* counts) {
    if (!valid(m) || (!counts && m->n_samples > 0) || m->n_epochs > INT32_MAX) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    constexpr int64_t size = SampleBlock::size;
    for (int64_t row = 0; m->n_epochs == 0 && row < 5; ++row)
        std::fill_n(counts + row * m->n_samples, m->n_samples, row == 2 || row == 3 ? 0 : -1);
    split(ceil_div(m->n_samples, size), 2.0 * m->n_epochs * m->n_samples, n_threads, [=, &k](int64_t begin, int64_t end) {
        for (int64_t start = begin * size; start < std::min(end * size, m->n_samples); start += size)
            count_samples(k, m, start, std::min(size, m->n_samples - start), counts);
    });
    return FMN_OK;
}

fmn_status fmn_overlap_counts(const fmn_matrix* m, int n_threads, int64_t* counts) {
    if (!valid(m) || (!counts && m->n_epochs > 0)) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    const int64_t n = m->n_epochs, samples = m->n_samples, rows = OverlapTile::rows, piece = 8 * OverlapTile::piece;
    const int64_t tiles = ceil_div(n, rows), section = 1 << 22, sections = ceil_div(samples, section);
    const int64_t units = tiles * (tiles + 1) / 2 * sections;
    std::atomic<int64_t> next{0};  // tiles on the diagonal are half the work: a thread takes the next unit when it is done
    std::mutex adding;
    split(units, 1.0 * n * n * row_bytes(m), n_threads, [=, &k, &next, &adding](int64_t, int64_t) {
        for (int64_t unit; (unit = next++) < units;) {
            int64_t pair = unit / sections, i0 = 0;
            while (pair >= tiles - i0) pair -= tiles - i0++;
            const int64_t j0 = (i0 + pair) * rows, begin = unit % sections * section;
            i0 *= rows;
            OverlapTile tile;
            const int64_t end = std::min(begin + section, samples);
            for (int64_t start = begin; start < end; start += piece)
                tile.add(k, m, i0, j0, start, std::min(piece, end - start));
            const std::lock_guard<std::mutex> lock(adding);
            for (int64_t i = i0; i < std::min(i0 + rows, n); ++i)
                for (int64_t j = std::max(i, j0); j < std::min(j0 + rows, n); ++j) {
                    counts[i * n + j] += tile.counts[i - i0][j - j0];
                    if (i != j) counts[j * n + i] += tile.counts[i - i0][j - j0];
                }
        }
    });
    return FMN_OK;
}

fmn_status fmn_pack(const fmn_matrix* m, int n_threads, uint8_t* bits, int64_t stride) {
    if (!valid(m) || m->format != FMN_BYTES || (!bits && row_bytes(m) * m->n_epochs > 0)) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    const int64_t piece = 1 << 18, pieces = ceil_div(m->n_samples, piece);
    split(m->n_epochs * pieces, 1.0 * m->n_epochs * row_bytes(m), n_threads, [=, &k](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t e = unit / pieces, start = unit % pieces * piece;
            k.pack(at(m, e, start), std::min(piece, m->n_samples - start), bits + e * stride + start / 8);
        }
    });
    return FMN_OK;
}

fmn_status fmn_unpack(const fmn_matrix* m, int n_threads, uint8_t* bytes, int64_t stride) {
    if (!valid(m) || m->format != FMN_BITS || (!bytes && row_bytes(m) * m->n_epochs > 0)) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    const int64_t piece = 1 << 18, pieces = ceil_div(m->n_samples, piece);
    split(m->n_epochs * pieces, 1.0 * m->n_epochs * m->n_samples, n_threads, [=, &k](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t e = unit / pieces, start = unit % pieces * piece;
            k.unpack(at(m, e, start), std::min(piece, m->n_samples - start), bytes + e * stride + start);
        }
    });
    return FMN_OK;
}

fmn_status fmn_pack_predictions(const void* predictions, int32_t type, int64_t n_epochs, int64_t n_samples, int64_t stride,
                                const int64_t* labels, int n_threads, uint8_t* bits, int64_t bits_stride) {
    const int64_t size = type_size(type), pieces = ceil_div(n_samples, label_piece);
    if (!valid_sizes(n_epochs, n_samples) || size == 0 || is_float(type)) return FMN_INVALID_ARGUMENT;
    if (n_epochs * n_samples > 0 && (!predictions || !labels || !bits)) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    const auto* data = static_cast<const uint8_t*>(predictions);
    split(n_epochs * pieces, 1.0 * n_epochs * n_samples * size, n_threads, [=, &k](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {  // all epochs of a piece: its labels stay in the cache
            const int64_t e = unit % n_epochs, first = unit / n_epochs * label_piece;
            const int64_t last = std::min(first + label_piece, n_samples);
            for (int64_t i = first; i < last; i += compare_block)
                k.compare(data + e * stride + i * size, static_cast<fmn_type>(type), labels + i, std::min(compare_block, last - i),
                          bits + e * bits_stride + i / 8);
        }
    });
    return FMN_OK;
}

fmn_status fmn_pack_scores(const void* scores, int32_t type, int64_t n_samples, int64_t n_classes, int64_t stride,
                           const int64_t* labels, int n_threads, uint8_t* bits) {
    if (!is_float(type) || !valid_sizes(n_samples, n_classes) || n_classes < 1) return FMN_INVALID_ARGUMENT;
    if (n_samples > 0 && (!scores || !bits || !valid_groups(labels, n_samples, n_classes))) return FMN_INVALID_ARGUMENT;
    const auto& k = kernels();
    const auto* data = static_cast<const uint8_t*>(scores);
    const int64_t block = 64, blocks = ceil_div(n_samples, block);
    std::atomic<bool> any_nan{false};
    split(blocks, 1.0 * n_samples * n_classes * type_size(type), n_threads, [=, &k, &any_nan](int64_t begin, int64_t end) {
        uint8_t bytes[block];
        for (int64_t start = begin * block; start < std::min(end * block, n_samples); start += block) {
            const int64_t n = std::min(block, n_samples - start);
            if (k.compare_scores(data + start * stride, static_cast<fmn_type>(type), n_classes, stride, labels + start, n, bytes)) any_nan = true;
            k.pack(bytes, n, bits + start / 8);
        }
    });
    return any_nan ? FMN_NOT_A_NUMBER : FMN_OK;
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
