// The C API against plain loops: random matrices of awkward sizes, strides, offsets and formats, the edges of every block,
// several threads at once. Run once per FMN_ISA.
//
//     test_fmn [cases = 20000] [seed = from the clock]      prints both; a failure is repeated by its seed
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fmn/fmn.h"

static std::string context;  // of the case at hand, for a failure's message

#define CHECK(condition)                                                                             \
    do {                                                                                             \
        if (!(condition)) {                                                                          \
            std::fprintf(stderr, "%s:%d: %s %s\n", __FILE__, __LINE__, #condition, context.c_str()); \
            std::exit(1);                                                                            \
        }                                                                                            \
    } while (0)

using Rng = std::mt19937_64;
using Bytes = std::vector<uint8_t>;

static int64_t pick(Rng& rng, int64_t low, int64_t high) { return low + static_cast<int64_t>(rng() % (high - low + 1)); }

// Mostly small, often at the edge of a block of the kernels.
static int64_t any_size(Rng& rng) {
    static const int64_t edges[] = {8, 16, 32, 64, 128, 255 * 32, 512, 2048, 4096, 8192};
    if (rng() % 4) return pick(rng, 0, 70);
    const int64_t edge = edges[rng() % 10];
    return edge > 600 && rng() % 16 ? pick(rng, 0, 300) : edge + pick(rng, -2, 2);
}

static int64_t any_epochs(Rng& rng, int64_t n_samples) {
    if (n_samples < 100 && rng() % 64 == 0) return pick(rng, 240, 520);  // the sample counts' blocks end at 248
    return rng() % 4 ? pick(rng, 1, 12) : pick(rng, 0, 40);
}

// A matrix somewhere in memory, and the same as plain rows of 0 and 1.
struct Case {
    Bytes memory;
    fmn_matrix m;
    std::vector<Bytes> right;
    int n_threads;

    explicit Case(Rng& rng) {
        const int64_t n = any_size(rng), e = any_epochs(rng, n), format = rng() % 2;
        const int64_t width = format ? (n + 7) / 8 : n, padding = pick(rng, 0, 70), offset = pick(rng, 0, 63);
        const int layout = static_cast<int>(rng() % 8), density = static_cast<int>(pick(rng, 0, 8));
        memory.resize(offset + (e > 0 ? (e - 1) * (width + padding) + width : 0));  // not a byte more, for AddressSanitizer
        for (auto& b : memory)  // any byte but zero is right; bits past the last sample are noise
            b = format ? static_cast<uint8_t>(rng()) : static_cast<int>(rng() % 8) < density ? 1 + rng() % 255 : 0;
        m = {memory.data() + offset, e, n, width + padding, format ? FMN_BITS : FMN_BYTES};
        if (layout == 0 && e > 0) m.data += (e - 1) * m.stride, m.stride = -m.stride;
        if (layout == 1) m.stride = 0;
        n_threads = static_cast<int>(pick(rng, 0, 3));
        for (int64_t i = 0; i < e; ++i) {
            right.emplace_back(n);
            const uint8_t* row = m.data + i * m.stride;
            for (int64_t j = 0; j < n; ++j) right[i][j] = format ? row[j / 8] >> j % 8 & 1 : row[j] != 0;
        }
        context = "(" + std::to_string(e) + " x " + std::to_string(n) + ", format " + std::to_string(format) + ", stride " +
                  std::to_string(m.stride) + ", offset " + std::to_string(offset) + ")";
    }
};

static void check_curves(const Case& c, Rng& rng) {
    const int64_t e = c.m.n_epochs, n = c.m.n_samples, n_groups = pick(rng, 1, 5);
    if (e == 0) return;
    const int64_t r = pick(rng, 0, e - 1), plane = n_groups * e;
    std::vector<int64_t> groups(n), counts(4 * e), expected(4 * e), by_group(4 * plane), by_loop(4 * plane);
    std::vector<double> weights(n), sums(4 * plane), sums_by_loop(4 * plane);
    for (auto& g : groups) g = pick(rng, 0, n_groups - 1);
    for (auto& w : weights) w = static_cast<double>(rng() % 1000) / 7;
    for (int64_t i = 0; i < e; ++i)
        for (int64_t j = 0; j < n; ++j) {
            const bool now = c.right[i][j], end = c.right[r][j], is[] = {now, now && !end, !now && end, now && end};
            for (int row = 0; row < 4; ++row)
                if (is[row]) {
                    const int64_t at = row * plane + groups[j] * e + i;
                    expected[row * e + i]++, by_loop[at]++, sums_by_loop[at] += weights[j];
                }
        }
    CHECK(fmn_curve_counts(&c.m, r, c.n_threads, counts.data()) == FMN_OK);
    CHECK(counts == expected);
    CHECK(fmn_group_counts(&c.m, r, groups.data(), n_groups, c.n_threads, by_group.data()) == FMN_OK);
    CHECK(by_group == by_loop);
    // In two pieces, which add up to the same bits.
    const int64_t cut = n > 8 ? n / 2 / 8 * 8 : 0;
    fmn_matrix head = c.m, tail = c.m;
    head.n_samples = cut, tail.n_samples = n - cut, tail.data += c.m.format == FMN_BITS ? cut / 8 : cut;
    CHECK(fmn_group_sums(&head, r, groups.data(), n_groups, weights.data(), c.n_threads, sums.data()) == FMN_OK);
    CHECK(fmn_group_sums(&tail, r, groups.data() + cut, n_groups, weights.data() + cut, c.n_threads, sums.data()) == FMN_OK);
    CHECK(sums == sums_by_loop);
    std::fill(counts.begin(), counts.end(), 0);
    CHECK(fmn_curve_counts(&tail, r, 1, counts.data()) == FMN_OK && fmn_curve_counts(&head, r, 2, counts.data()) == FMN_OK);
    CHECK(counts == expected);
}

static void check_samples(const Case& c) {
    const int64_t e = c.m.n_epochs, n = c.m.n_samples;
    std::vector<int32_t> counts(5 * n + 1, 77), expected(5 * n + 1, -1);
    expected[5 * n] = 77;
    for (int64_t j = 0; j < n; ++j) {
        int32_t* at = &expected[j];
        at[2 * n] = at[3 * n] = 0;
        for (int32_t i = 0; i < e; ++i) {
            if (c.right[i][j]) {
                if (at[0] < 0) at[0] = i;
                at[n] = i;
                at[3 * n]++;
            } else {
                at[4 * n] = i;
                at[2 * n] += i > 0 && c.right[i - 1][j];
            }
        }
    }
    CHECK(fmn_sample_counts(&c.m, c.n_threads, counts.data()) == FMN_OK);
    CHECK(counts == expected);
}

static void check_overlap(const Case& c) {
    const int64_t e = c.m.n_epochs, n = c.m.n_samples;
    if (e > 100) return;  // the loop below would be slow; large ones are checked in main
    std::vector<int64_t> counts(e * e + 1, 5), expected(e * e + 1, 5);
    for (int64_t i = 0; i < e; ++i)
        for (int64_t j = 0; j < e; ++j)
            for (int64_t s = 0; s < n; ++s) expected[i * e + j] += c.right[i][s] & c.right[j][s];
    CHECK(fmn_overlap_counts(&c.m, c.n_threads, counts.data()) == FMN_OK);
    CHECK(counts == expected);
}

static void check_packing(const Case& c, Rng& rng) {
    const int64_t e = c.m.n_epochs, n = c.m.n_samples, width = (n + 7) / 8, gap = pick(rng, 0, 9);
    Bytes bits(e * (width + gap) + 1, 0xEE), bytes(e * (n + gap) + 1, 0xEE);
    const fmn_matrix packed = {bits.data(), e, n, width + gap, FMN_BITS};
    if (c.m.format == FMN_BYTES) {
        CHECK(fmn_pack(&c.m, c.n_threads, bits.data(), width + gap) == FMN_OK);
        CHECK(fmn_unpack(&packed, c.n_threads, bytes.data(), n + gap) == FMN_OK);
        for (int64_t i = 0; i < e; ++i)
            if (n % 8) CHECK(bits[i * (width + gap) + n / 8] >> n % 8 == 0);
    } else {
        CHECK(fmn_pack(&c.m, 1, bits.data(), width) == FMN_INVALID_ARGUMENT);
        CHECK(fmn_unpack(&c.m, c.n_threads, bytes.data(), n + gap) == FMN_OK);
    }
    for (int64_t i = 0; n > 0 && i < e; ++i) CHECK(std::memcmp(&bytes[i * (n + gap)], c.right[i].data(), n) == 0);
    CHECK(bits.back() == 0xEE && bytes.back() == 0xEE);
    for (int64_t i = 0; gap && i < e; ++i) CHECK(bits[i * (width + gap) + width] == 0xEE && bytes[i * (n + gap) + n] == 0xEE);
}

template <class T>
static void check_predictions(Rng& rng, fmn_type type) {
    const int64_t n = any_size(rng), e = pick(rng, 0, 3), width = (n + 7) / 8, offset = pick(rng, 0, 9);
    const int64_t stride = n * static_cast<int64_t>(sizeof(T)) + pick(rng, 0, 9);
    Bytes memory(offset + e * stride + 1), bits(e * width + 1, 0xEE);
    std::vector<int64_t> labels(n);
    for (auto& y : labels) y = rng() % 8 ? pick(rng, 0, 120) : static_cast<int64_t>(rng());
    Bytes expected(e * width + 1);
    expected.back() = 0xEE;
    for (int64_t i = 0; i < e; ++i)
        for (int64_t j = 0; j < n; ++j) {
            const T p = static_cast<T>(rng() % 2 ? static_cast<uint64_t>(labels[j]) : rng());
            std::memcpy(&memory[offset + i * stride + j * sizeof(T)], &p, sizeof(T));
            const bool same = std::is_signed<T>::value || labels[j] >= 0
                                  ? static_cast<__int128>(p) == static_cast<__int128>(labels[j]) : false;
            expected[i * width + j / 8] |= same << j % 8;
        }
    CHECK(fmn_pack_predictions(memory.data() + offset, type, e, n, stride, labels.data(), 2, bits.data(), width) == FMN_OK);
    CHECK(bits == expected);
}

// Scores of small whole numbers, so that there are ties, and now and then something special.
static double any_score(Rng& rng, bool nan) {
    const double inf = std::numeric_limits<double>::infinity(), special[] = {0.0, -0.0, inf, -inf};
    if (rng() % 8 == 0) return special[rng() % 4];
    return nan && rng() % 64 == 0 ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(pick(rng, -4, 4));
}

// The bits of a whole number, zero, infinity or NaN as IEEE half (10 bits of fraction) or bfloat16 (7).
static uint16_t half_bits(double v, int fraction, int bias) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0, infinity = static_cast<uint16_t>(0x7FFF >> fraction << fraction);
    if (std::isnan(v)) return 0x7FFF;
    if (std::isinf(v)) return sign | infinity;
    if (v == 0) return sign;
    const int exponent = std::ilogb(v);
    const int mantissa = static_cast<int>((std::fabs(v) / std::ldexp(1.0, exponent) - 1) * (1 << fraction));
    return static_cast<uint16_t>(sign | (exponent + bias) << fraction | mantissa);
}

static void put(uint8_t* to, fmn_type type, double v) {
    const float f = static_cast<float>(v);
    const uint16_t h = type == FMN_FLOAT16 ? half_bits(v, 10, 15) : half_bits(v, 7, 127);
    if (type == FMN_FLOAT64) std::memcpy(to, &v, 8);
    else if (type == FMN_FLOAT32) std::memcpy(to, &f, 4);
    else std::memcpy(to, &h, 2);
}

static void check_scores(Rng& rng, fmn_type type) {
    const int64_t n = pick(rng, 0, 140), k = rng() % 4 ? pick(rng, 1, 12) : pick(rng, 1, 140), offset = pick(rng, 0, 9);
    const int64_t size = type == FMN_FLOAT64 ? 8 : type == FMN_FLOAT32 ? 4 : 2, stride = k * size + pick(rng, 0, 9);
    Bytes memory(offset + n * stride + 1), bits((n + 7) / 8 + 1, 0xEE), expected((n + 7) / 8 + 1);
    expected.back() = 0xEE;
    std::vector<int64_t> labels(n);
    const bool nan = rng() % 8 == 0;
    bool any_nan = false;
    for (int64_t i = 0; i < n; ++i) {
        double best = 0;
        int64_t arg_max = -1, n_nan = 0;
        for (int64_t j = 0; j < k; ++j) {
            const double v = any_score(rng, nan);
            put(&memory[offset + i * stride + j * size], type, v);
            n_nan += std::isnan(v);
            if (arg_max < 0 || v > best) best = v, arg_max = j;
        }
        labels[i] = rng() % 2 && arg_max >= 0 ? arg_max : pick(rng, 0, k - 1);
        any_nan |= n_nan > 0;
        expected[i / 8] |= (n_nan == 0 && labels[i] == arg_max) << i % 8;
    }
    const auto status = fmn_pack_scores(memory.data() + offset, type, n, k, stride, labels.data(), 2, bits.data());
    CHECK(status == (any_nan ? FMN_NOT_A_NUMBER : FMN_OK));
    CHECK(bits == expected);
}

static void check_case(Rng& rng) {
    const Case c(rng);
    check_curves(c, rng);
    check_samples(c);
    check_overlap(c);
    check_packing(c, rng);
    context = "(predictions)";
    check_predictions<int8_t>(rng, FMN_INT8), check_predictions<uint8_t>(rng, FMN_UINT8);
    check_predictions<int16_t>(rng, FMN_INT16), check_predictions<uint16_t>(rng, FMN_UINT16);
    check_predictions<int32_t>(rng, FMN_INT32), check_predictions<uint32_t>(rng, FMN_UINT32);
    check_predictions<int64_t>(rng, FMN_INT64), check_predictions<uint64_t>(rng, FMN_UINT64);
    context = "(scores)";
    check_scores(rng, static_cast<fmn_type>(pick(rng, FMN_FLOAT16, FMN_FLOAT64)));
}

// Large enough for threads inside one call, in both formats.
static void check_large(Rng& rng) {
    const int64_t e = 70, n = (1 << 20) + 13;
    Bytes bytes(e * n), bits(e * ((n + 7) / 8));
    for (auto& b : bytes) b = rng() % 3 == 0;
    const fmn_matrix m = {bytes.data(), e, n, n, FMN_BYTES};
    CHECK(fmn_pack(&m, 4, bits.data(), (n + 7) / 8) == FMN_OK);
    const fmn_matrix p = {bits.data(), e, n, (n + 7) / 8, FMN_BITS};
    std::vector<int64_t> of_bytes(4 * e), of_bits(4 * e), right(e), overlap(e * e), overlap_bits(e * e);
    for (int64_t i = 0; i < e; ++i)
        for (int64_t j = 0; j < n; ++j) right[i] += bytes[i * n + j];
    CHECK(fmn_curve_counts(&m, 3, 4, of_bytes.data()) == FMN_OK && fmn_curve_counts(&p, 3, 4, of_bits.data()) == FMN_OK);
    CHECK(of_bytes == of_bits && std::equal(right.begin(), right.end(), of_bytes.begin()));
    CHECK(fmn_overlap_counts(&m, 4, overlap.data()) == FMN_OK && fmn_overlap_counts(&p, 4, overlap_bits.data()) == FMN_OK);
    CHECK(overlap == overlap_bits);
    for (int64_t i = 0; i < e; ++i) {
        CHECK(overlap[i * e + i] == right[i]);
        CHECK(overlap[i * e + 3] == of_bytes[3 * e + i] && overlap[3 * e + i] == of_bytes[3 * e + i]);
    }
    std::vector<int32_t> samples(5 * n), samples_bits(5 * n);
    CHECK(fmn_sample_counts(&m, 4, samples.data()) == FMN_OK && fmn_sample_counts(&p, 1, samples_bits.data()) == FMN_OK);
    CHECK(samples == samples_bits);
    Bytes again(bytes.size());
    CHECK(fmn_unpack(&p, 4, again.data(), n) == FMN_OK && again == bytes);
}

// A zero stride repeats one row: counts past 2^32 without the memory.
static void check_overflow() {
    const int64_t n = 1 << 20, e = 4200;
    const Bytes one(n, 255);
    for (const auto format : {FMN_BYTES, FMN_BITS}) {
        // All epochs are the same row; as bits it holds 8 n samples, and 8 n e = 3.5e10 is past 2^32.
        const int64_t samples = format == FMN_BITS ? 8 * n : n;
        const fmn_matrix m = {one.data(), e, samples, 0, format};
        std::vector<int64_t> counts(4 * e);
        const int times = static_cast<int>((int64_t(1) << 33) / samples);  // added up in one output
        const fmn_matrix two = {one.data(), 2, samples, 0, format};
        std::vector<int64_t> many(8), overlap(4);
        for (int i = 0; i < times; ++i) {
            CHECK(fmn_curve_counts(&two, 0, 0, many.data()) == FMN_OK);
            if (format == FMN_BITS) CHECK(fmn_overlap_counts(&two, 0, overlap.data()) == FMN_OK);
        }
        CHECK(many[0] == int64_t(1) << 33 && many[7] == many[0] && many[2] == 0 && many[4] == 0);
        CHECK(format == FMN_BYTES || (overlap[0] == many[0] && overlap[1] == many[0]));
        CHECK(fmn_curve_counts(&m, 0, 0, counts.data()) == FMN_OK);
        for (int64_t i = 0; i < e; ++i) CHECK(counts[i] == samples && counts[3 * e + i] == samples && counts[e + i] == 0);
    }
    // One call whose single counts pass 2^32: 2^33 samples, all in one row of one repeated gigabyte would need the memory;
    // right-to-wrong changes and epochs are bounded by n_epochs instead, which passes 2^16 here.
    const uint8_t pair[2] = {1, 0};
    const int64_t many = 200001;
    std::vector<int32_t> counts(5);
    const fmn_matrix same = {pair, many, 1, 0, FMN_BYTES};
    CHECK(fmn_sample_counts(&same, 1, counts.data()) == FMN_OK);
    CHECK(counts[0] == 0 && counts[1] == many - 1 && counts[2] == 0 && counts[3] == many && counts[4] == -1);
}

static void check_errors() {
    const Bytes one(64, 1);
    std::vector<int64_t> counts(400);
    std::vector<int32_t> samples(400);
    const int64_t groups[8] = {0, 1, 2, 0, 0, 0, 0, 0};
    const double weights[8] = {};
    uint8_t out[64];
    fmn_matrix m = {one.data(), 2, 8, 8, FMN_BYTES};
    const auto bad = FMN_INVALID_ARGUMENT;
    CHECK(fmn_curve_counts(&m, 2, 0, counts.data()) == bad && fmn_curve_counts(&m, -1, 0, counts.data()) == bad);
    CHECK(fmn_curve_counts(nullptr, 0, 0, counts.data()) == bad && fmn_curve_counts(&m, 0, 0, nullptr) == bad);
    CHECK(fmn_group_counts(&m, 0, groups, 2, 0, counts.data()) == bad && fmn_group_counts(&m, 0, groups, 0, 0, counts.data()) == bad);
    CHECK(fmn_group_counts(&m, 0, nullptr, 3, 0, counts.data()) == bad);
    CHECK(fmn_group_sums(&m, 0, groups, 3, nullptr, 0, reinterpret_cast<double*>(counts.data())) == bad);
    CHECK(fmn_group_sums(&m, 0, groups, 3, weights, 0, nullptr) == bad);
    CHECK(fmn_sample_counts(&m, 0, nullptr) == bad && fmn_overlap_counts(&m, 0, nullptr) == bad);
    CHECK(fmn_pack(&m, 0, nullptr, 1) == bad && fmn_unpack(&m, 0, out, 8) == bad);
    CHECK(fmn_pack_predictions(one.data(), FMN_FLOAT32, 1, 8, 8, groups, 0, out, 1) == bad);
    CHECK(fmn_pack_predictions(one.data(), FMN_INT8, -1, 8, 8, groups, 0, out, 1) == bad);
    CHECK(fmn_pack_predictions(one.data(), FMN_INT8, 1, 8, 8, nullptr, 0, out, 1) == bad);
    CHECK(fmn_pack_scores(one.data(), FMN_INT8, 4, 4, 4, groups, 0, out) == bad);
    CHECK(fmn_pack_scores(one.data(), FMN_FLOAT32, 4, 2, 8, groups, 0, out) == bad);  // label 2 of 2 classes
    CHECK(fmn_pack_scores(one.data(), FMN_FLOAT32, 4, 0, 8, groups, 0, out) == bad);
    for (const int64_t e : {int64_t(-1), int64_t(1) << 31}) {
        const fmn_matrix wrong = {one.data(), e, 8, 0, FMN_BYTES};
        CHECK(fmn_sample_counts(&wrong, 0, samples.data()) == bad);
    }
    m.format = 7;
    CHECK(fmn_curve_counts(&m, 0, 0, counts.data()) == bad);
    m = {nullptr, 2, 8, 8, FMN_BYTES};
    CHECK(fmn_curve_counts(&m, 0, 0, counts.data()) == bad);
    for (const int64_t c : counts) CHECK(c == 0);  // nothing was written
}

int main(int argc, char** argv) {
    const char* wanted = std::getenv("FMN_ISA");
    if (wanted && std::strcmp(wanted, fmn_instruction_set()) != 0) return 77;  // not on this processor: skipped
    const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 20000;
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10)
                                   : static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
    std::printf("instruction set %s, %d threads, %lld cases, seed %llu\n", fmn_instruction_set(), fmn_threads(),
                static_cast<long long>(cases), static_cast<unsigned long long>(seed));
    std::fflush(stdout);
    Rng rng(seed);
    for (int64_t i = 0; i < cases; ++i) check_case(rng);
    context = "(large)";
    check_errors();
    if (cases > 1000) check_large(rng), check_overflow();

    // Eight threads in the library at once.
    const Bytes bytes(1 << 20, 1);
    const fmn_matrix m = {bytes.data(), 20, 1 << 20, 0, FMN_BYTES};
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; ++t)
        threads.emplace_back([&m] {
            std::vector<int64_t> counts(80), overlap(400);
            CHECK(fmn_curve_counts(&m, 4, 2, counts.data()) == FMN_OK && counts[0] == m.n_samples && counts[79] == counts[0]);
            CHECK(fmn_overlap_counts(&m, 2, overlap.data()) == FMN_OK && overlap[1] == m.n_samples);
        });
    for (auto& t : threads) t.join();
    std::puts("ok");
    return 0;
}
