// libFuzzer on the C API: the input chooses a case, and the plain loops of tests/cpp/test_fmn.cpp say what is right.
// README.md has the command.
#include <cstddef>
#include <cstdint>

// Random numbers of an input: most of its bytes stand for themselves, so that libFuzzer can change one number alone. The
// others, and all numbers past the end of the input, are of SplitMix64.
class InputNumbers {
  public:
    explicit InputNumbers(uint64_t seed) : state(seed), at(nullptr), end(nullptr) {}
    InputNumbers(const uint8_t* data, size_t size) : state(size), at(data), end(data + size) {}
    uint64_t operator()() {
        if (at != end && *at < 0xE0) return *at++;
        state += 0x9E3779B97F4A7C15 + (at != end ? *at++ : 0);
        uint64_t z = state;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
        z = (z ^ z >> 27) * 0x94D049BB133111EB;
        return z ^ z >> 31;
    }

  private:
    uint64_t state;
    const uint8_t *at, *end;
};

#define FMN_TEST_RNG InputNumbers
#define main main_of_the_test
#include "../cpp/test_fmn.cpp"
#undef main

static int64_t any_argument(Rng& rng) {
    static const int64_t edges[] = {-1, 0, 1, 2, 7, 8, 9, 64, (int64_t(1) << 31) - 1, int64_t(1) << 31, int64_t(1) << 32,
                                    int64_t(1) << 61, int64_t(1) << 62, (int64_t(1) << 62) + 1, INT64_MAX, INT64_MIN};
    return edges[rng() % 16];
}

// Sizes, references and formats of any value. A call is made if it must be refused: a right one would need the memory.
static void check_refusals(Rng& rng) {
    const uint8_t row[64] = {1};
    const int64_t groups[64] = {};
    const double weights[64] = {};
    int64_t out[64];
    std::fill(out, out + 64, 0x5555);
    const int64_t e = any_argument(rng), n = any_argument(rng), stride = any_argument(rng), r = any_argument(rng);
    const int64_t n_groups = any_argument(rng);
    const int32_t format = static_cast<int32_t>(pick(rng, -1, 2)), type = static_cast<int32_t>(pick(rng, -1, 12));
    const bool null = rng() % 8 == 0, empty = e == 0 || n == 0;
    const fmn_matrix m = {null ? nullptr : row, e, n, stride, format};
    const auto fits = [](int64_t a, int64_t b) { return a >= 0 && b >= 0 && static_cast<__int128>(a) * b <= int64_t(1) << 62; };
    const bool sound = fits(e, n) && (format == FMN_BYTES || format == FMN_BITS) && (empty || !null);
    const auto bad = FMN_INVALID_ARGUMENT;
    const int n_threads = static_cast<int>(pick(rng, 0, 3));
    context = "(refusals " + std::to_string(e) + " x " + std::to_string(n) + ", reference " + std::to_string(r) + ", format " +
              std::to_string(format) + ", type " + std::to_string(type) + ", groups " + std::to_string(n_groups) + ")";
    if (!sound || r < 0 || r >= e) CHECK(fmn_curve_counts(&m, r, n_threads, out) == bad);
    if (!sound || r < 0 || r >= e || n_groups < 1) {
        CHECK(fmn_group_counts(&m, r, groups, n_groups, n_threads, out) == bad);
        CHECK(fmn_group_sums(&m, r, groups, n_groups, weights, n_threads, reinterpret_cast<double*>(out)) == bad);
    }
    if (!sound) {
        CHECK(fmn_overlap_counts(&m, n_threads, out) == bad);
        CHECK(fmn_sample_counts(&m, n_threads, reinterpret_cast<int32_t*>(out)) == bad);
    }
    auto* bytes = reinterpret_cast<uint8_t*>(out);
    if (!sound || format != FMN_BYTES) CHECK(fmn_pack(&m, n_threads, bytes, stride) == bad);
    if (!sound || format != FMN_BITS) CHECK(fmn_unpack(&m, n_threads, bytes, stride) == bad);
    if (!fits(e, n) || type < FMN_INT8 || type > FMN_UINT64)
        CHECK(fmn_pack_predictions(row, type, e, n, stride, groups, n_threads, bytes, stride) == bad);
    const bool floating = type >= FMN_FLOAT16 && type <= FMN_FLOAT64;
    if (!fits(n, e) || !floating) {
        CHECK(fmn_pack_scores(row, type, n, e, stride, groups, n_threads, bytes) == bad);
        CHECK(fmn_check_probabilities(row, type, n, e, 0.01, n_threads, reinterpret_cast<int*>(out)) == bad);
    }
    for (const int64_t value : out) CHECK(value == 0x5555);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Rng rng(data, size);
    const uint64_t what = rng() % 10;
    if (what < 4) {
        const Case c(rng);
        if (what == 0) check_curves(c, rng);
        if (what == 1) check_samples(c);
        if (what == 2) check_overlap(c);
        if (what == 3) check_packing(c, rng);
    }
    if (what == 4) check_predictions<int8_t>(rng, FMN_INT8), check_predictions<uint16_t>(rng, FMN_UINT16);
    if (what == 5) check_predictions<int32_t>(rng, FMN_INT32), check_predictions<uint64_t>(rng, FMN_UINT64);
    if (what == 6) check_scores(rng, any_float(rng));
    if (what == 7) check_mixture(rng);
    if (what == 8) check_probabilities(rng);
    if (what == 9) check_refusals(rng);
    return 0;
}
