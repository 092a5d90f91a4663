// Speed of the C library's functions beside the read bandwidth: on one thread and on all, in cache and out of cache.
//
//     cmake -B build && cmake --build build --target metric_throughput && build/metric_throughput [epochs] [samples]
//
// A row holds the function, the format, the number of threads, the median ms of the calls of a third of a second, the GB/s
// of the bytes that the function reads, and the share of the read bandwidth. For the bandwidth, as many threads read the
// same bytes and add them up, right after the function was timed. All results are first compared with those of plain loops.
// FMN_ISA chooses the instruction set.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fmn/fmn.h"

using Bytes = std::vector<uint8_t>;

static double median_seconds(const std::function<void()>& call) {
    using Clock = std::chrono::steady_clock;
    const auto now = [] { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); };
    std::vector<double> times;
    call();
    for (const double begin = now(); (now() - begin < 0.3 && times.size() < 10000) || times.size() < 5;) {
        const double start = now();
        call();
        times.push_back(now() - start);
    }
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

// Loads every byte once, in eight sums that the compiler keeps in vector registers: the upper bound for the metrics.
static uint64_t read_all(const uint8_t* p, int64_t n) {
    uint64_t sums[8] = {};
    for (int64_t i = 0; i + 64 <= n; i += 64)
        for (int k = 0; k < 8; ++k) {
            uint64_t v;
            std::memcpy(&v, p + i + 8 * k, 8);
            sums[k] += v;
        }
    uint64_t total = 0;
    for (const uint64_t s : sums) total += s;
    return total;
}

static double read_bandwidth(const Bytes& data, int n_threads) {  // GB/s
    std::vector<uint64_t> sinks(n_threads);
    const int64_t part = static_cast<int64_t>(data.size()) / n_threads;
    const int64_t times = std::max<int64_t>(1, (64 << 20) / static_cast<int64_t>(data.size()));
    const double s = median_seconds([&] {
        std::vector<std::thread> threads;
        const auto work = [&](int t) {
            for (int64_t i = 0; i < times; ++i) sinks[t] += read_all(data.data() + t * part, part);
        };
        for (int t = 1; t < n_threads; ++t) threads.emplace_back(work, t);
        work(0);
        for (auto& t : threads) t.join();
    });
    if (sinks[0] == 1) std::puts("");  // or the compiler would drop the sums
    return static_cast<double>(part * n_threads * times) / s / 1e9;
}

static void fail(const char* what) {
    std::fprintf(stderr, "wrong result: %s\n", what);
    std::exit(1);
}

struct Data {
    int64_t e, n, width, n_classes = 1000, n_scored;
    Bytes bytes, bits, out;
    std::vector<int64_t> labels, predictions, groups, counts;
    std::vector<float> scores;
    std::vector<double> weights, sums;
    std::vector<int32_t> samples;

    Data(int64_t e, int64_t n) : e(e), n(n), width((n + 63) / 64 * 64 / 8), n_scored(std::max<int64_t>(8, e * n / 4000)) {
        std::mt19937_64 rng(0);
        bytes.resize(e * n), bits.resize(e * width), out.resize(e * width);
        for (auto& b : bytes) b = rng() % 10 < 7;
        labels.resize(std::max(n, n_scored)), predictions.resize(std::max<int64_t>(1, e / 8) * n), groups.resize(n);
        for (auto& y : labels) y = rng() % n_classes;
        for (auto& p : predictions) p = rng() % n_classes;
        for (auto& g : groups) g = rng() % 100;
        scores.resize(n_scored * n_classes);
        for (auto& s : scores) s = static_cast<float>(rng() >> 40);
        weights.assign(n, 0.5), sums.resize(400 * e), counts.resize(std::max(400 * e, e * e)), samples.resize(5 * n);
        const fmn_matrix m = {bytes.data(), e, n, n, FMN_BYTES};
        fmn_pack(&m, 0, bits.data(), width);
        for (int64_t i = 0; i < e; i += 7)
            for (int64_t j = 0; j < n; ++j)
                if ((bits[i * width + j / 8] >> j % 8 & 1) != bytes[i * n + j]) fail("pack");
    }
};

static void verify(Data& d, const fmn_matrix& m) {
    std::fill(d.counts.begin(), d.counts.end(), 0);
    fmn_curve_counts(&m, d.e - 1, 0, d.counts.data());
    for (int64_t i = 0; i < d.e; i += 13) {
        int64_t right = 0, retained = 0;
        for (int64_t j = 0; j < d.n; ++j) {
            right += d.bytes[i * d.n + j];
            retained += d.bytes[i * d.n + j] & d.bytes[(d.e - 1) * d.n + j];
        }
        if (d.counts[i] != right || d.counts[3 * d.e + i] != retained) fail("curves");
    }
    fmn_sample_counts(&m, 0, d.samples.data());
    for (int64_t j = 0; j < d.n; j += 101) {
        int64_t right = 0, events = 0;
        for (int64_t i = 0; i < d.e; ++i) {
            right += d.bytes[i * d.n + j];
            events += i > 0 && d.bytes[(i - 1) * d.n + j] > d.bytes[i * d.n + j];
        }
        if (d.samples[3 * d.n + j] != right || d.samples[2 * d.n + j] != events) fail("samples");
    }
}

static void table(int64_t e, int64_t n) {
    Data d(e, n);
    const fmn_matrix bytes = {d.bytes.data(), e, n, n, FMN_BYTES}, bits = {d.bits.data(), e, n, d.width, FMN_BITS};
    verify(d, bytes), verify(d, bits);
    const double byte_size = static_cast<double>(e * n), bit_size = byte_size / 8;
    const int64_t rows = static_cast<int64_t>(d.predictions.size()) / n;
    std::printf("\n%lld epochs x %lld samples\n\n| function | input | threads | ms | GB/s | reading GB/s | share of it |\n"
                "|---|---|--:|--:|--:|--:|--:|\n", static_cast<long long>(e), static_cast<long long>(n));
    std::vector<int> thread_counts = {1};
    if (fmn_threads() > 1) thread_counts.push_back(fmn_threads());
    for (const int t : thread_counts) {
        const auto show = [&](const char* name, const char* input, double size, const Bytes& like, auto call) {
            const double s = median_seconds(call), rate = size / s / 1e9, bandwidth = read_bandwidth(like, t);
            std::printf("| %s | %s | %d | %.3f | %.1f | %.1f | %.0f%% |\n", name, input, t, 1e3 * s, rate, bandwidth,
                        100 * rate / bandwidth);
            std::fflush(stdout);
        };
        int64_t* counts = d.counts.data();
        for (const auto* m : {&bytes, &bits}) {
            const bool packed = m == &bits;
            const char* input = packed ? "bits" : "bytes";
            const double size = packed ? bit_size : byte_size;
            const Bytes& like = packed ? d.bits : d.bytes;
            show("curve_counts", input, size, like, [&] { fmn_curve_counts(m, e - 1, t, counts); });
            show("group_counts", input, size, like,
                 [&] { fmn_group_counts(m, e - 1, d.groups.data(), 100, t, counts); });
            show("group_sums", input, size, like,
                 [&] { fmn_group_sums(m, e - 1, d.groups.data(), 100, d.weights.data(), t, d.sums.data()); });
            show("sample_counts", input, size, like, [&] { fmn_sample_counts(m, t, d.samples.data()); });
            show("overlap_counts", input, size, like, [&] { fmn_overlap_counts(m, t, counts); });
        }
        show("pack", "bytes", byte_size, d.bytes, [&] { fmn_pack(&bytes, t, d.out.data(), d.width); });
        show("unpack", "bits", bit_size, d.bits, [&] { fmn_unpack(&bits, t, d.bytes.data(), n); });
        show("pack_predictions", "int64", 8.0 * static_cast<double>(rows * n), d.bytes, [&] {
            fmn_pack_predictions(d.predictions.data(), FMN_INT64, rows, n, 8 * n, d.labels.data(), t, d.out.data(), d.width);
        });
        show("pack_scores", "float32", 4.0 * static_cast<double>(d.scores.size()), d.bytes, [&] {
            fmn_pack_scores(d.scores.data(), FMN_FLOAT32, d.n_scored, d.n_classes, 4 * d.n_classes, d.labels.data(), t,
                            d.out.data());
        });
    }
}

int main(int argc, char** argv) {
    const int64_t e = argc > 1 ? std::atoll(argv[1]) : 200, n = argc > 2 ? std::atoll(argv[2]) : 1281167;
    if (e < 1 || n < 1) return std::fprintf(stderr, "usage: metric_throughput [epochs >= 1] [samples >= 1]\n"), 2;
    std::printf("instruction set %s, %d threads, compiler %s\n", fmn_instruction_set(), fmn_threads(), __VERSION__);
    table(200, 20000);  // in cache
    table(e, n);
    return 0;
}
