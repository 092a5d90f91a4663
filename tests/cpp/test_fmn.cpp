// The C API against plain loops, on awkward strides and sizes, from several threads at once. Run once per FMN_ISA.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "fmn/fmn.h"

#define CHECK(condition)                                                          \
    do {                                                                          \
        if (!(condition)) {                                                       \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);  \
            std::exit(1);                                                         \
        }                                                                         \
    } while (0)

using Counts = std::vector<int64_t>;

static Counts curve_counts_by_loop(const fmn_matrix& m, int64_t r) {
    Counts c(4 * m.n_epochs);
    for (int64_t e = 0; e < m.n_epochs; ++e)
        for (int64_t i = 0; i < m.n_samples; ++i) {
            const bool now = m.data[e * m.stride + i], end = m.data[r * m.stride + i];
            c[e] += now;
            c[m.n_epochs + e] += now && !end;
            c[2 * m.n_epochs + e] += !now && end;
            c[3 * m.n_epochs + e] += now && end;
        }
    return c;
}

static void random_case(std::mt19937& rng, int64_t n_epochs, int64_t n_samples, int64_t offset, int n_threads) {
    std::vector<uint8_t> bytes(n_epochs * (n_samples + 5) + offset);
    for (auto& b : bytes) b = rng() % 3 ? static_cast<uint8_t>(rng()) : 0;
    const fmn_matrix m = {bytes.data() + offset, n_epochs, n_samples, n_samples + 5};
    const int64_t r = rng() % n_epochs;
    const Counts expected = curve_counts_by_loop(m, r);

    Counts counts(4 * n_epochs);
    CHECK(fmn_curve_counts(&m, r, n_threads, counts.data()) == FMN_OK);
    CHECK(counts == expected);

    std::vector<int64_t> groups(n_samples);
    for (auto& g : groups) g = rng() % 3;
    Counts grouped(12 * n_epochs);
    std::vector<double> sums(12 * n_epochs), weights(n_samples, 0.5);
    CHECK(fmn_group_counts(&m, r, groups.data(), 3, n_threads, grouped.data()) == FMN_OK);
    CHECK(fmn_group_sums(&m, r, groups.data(), 3, weights.data(), n_threads, sums.data()) == FMN_OK);
    for (int64_t row = 0; row < 4; ++row)
        for (int64_t e = 0; e < n_epochs; ++e) {
            int64_t total = 0;
            for (int64_t g = 0; g < 3; ++g) {
                const int64_t at = (row * 3 + g) * n_epochs + e;
                total += grouped[at];
                CHECK(sums[at] == 0.5 * static_cast<double>(grouped[at]));
            }
            CHECK(total == expected[row * n_epochs + e]);
        }

    std::vector<int32_t> samples(5 * n_samples);
    CHECK(fmn_sample_counts(&m, n_threads, samples.data()) == FMN_OK);
    int64_t right = 0, sample_right = 0;
    for (int64_t e = 0; e < n_epochs; ++e) right += expected[e];
    for (int64_t i = 0; i < n_samples; ++i) sample_right += samples[3 * n_samples + i];
    CHECK(right == sample_right);

    Counts overlap(n_epochs * n_epochs);
    CHECK(fmn_overlap_counts(&m, n_threads, overlap.data()) == FMN_OK);
    for (int64_t i = 0; i < n_epochs; ++i)
        for (int64_t j = 0; j < n_epochs; ++j) {
            int64_t bits = 0;
            for (int64_t b = 0; b < n_samples; ++b)
                for (int v = m.data[i * m.stride + b] & m.data[j * m.stride + b]; v; v &= v - 1) ++bits;
            CHECK(overlap[i * n_epochs + j] == bits);
        }
}

int main() {
    std::printf("instruction set %s, %d threads\n", fmn_instruction_set(), fmn_threads());
    const char* wanted = std::getenv("FMN_ISA");
    if (wanted && std::strcmp(wanted, fmn_instruction_set()) != 0) return 77;  // not on this processor: skipped
    const int64_t sizes[] = {1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 255, 256, 8159, 8160, 8161, 20000};
    const auto all = [&](unsigned seed) {
        std::mt19937 rng(seed);
        for (int64_t n : sizes)
            for (int64_t e : {1, 2, 5}) random_case(rng, e, n, rng() % 64, 1 + seed % 3);
    };
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 4; ++t) threads.emplace_back(all, t);
    for (auto& t : threads) t.join();
    std::mt19937 rng(9);
    random_case(rng, 7, 1 << 20, 3, 4);  // large enough for threads inside one call

    // A zero stride repeats one row: counts past 2^32 bits of input without the memory.
    std::vector<uint8_t> one(1 << 20, 1);
    const fmn_matrix repeated = {one.data(), 4200, 1 << 20, 0};
    Counts counts(4 * 4200);
    CHECK(fmn_curve_counts(&repeated, 0, 0, counts.data()) == FMN_OK);
    int64_t total = 0;
    for (int64_t e = 0; e < 4200; ++e) total += counts[e];
    CHECK(total == int64_t(4200) << 20);

    fmn_matrix bad = {one.data(), 1, 0, 0};
    CHECK(fmn_curve_counts(&bad, 0, 0, counts.data()) == FMN_INVALID_ARGUMENT);
    bad = {one.data(), 2, 8, 8};
    CHECK(fmn_curve_counts(&bad, 2, 0, counts.data()) == FMN_INVALID_ARGUMENT);
    CHECK(fmn_curve_counts(&bad, -1, 0, counts.data()) == FMN_INVALID_ARGUMENT);
    CHECK(fmn_curve_counts(nullptr, 0, 0, counts.data()) == FMN_INVALID_ARGUMENT);
    CHECK(fmn_sample_counts(&bad, 0, nullptr) == FMN_INVALID_ARGUMENT);
    const int64_t groups[8] = {0, 1, 2, 0, 0, 0, 0, 0};
    CHECK(fmn_group_counts(&bad, 0, groups, 2, 0, counts.data()) == FMN_INVALID_ARGUMENT);
    std::puts("ok");
    return 0;
}
