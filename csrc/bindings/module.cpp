// Python bindings: check the arrays, release the GIL, call the C API. fmn_ref/kernels/protocol.py documents each function.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "fmn/fmn.h"

namespace py = pybind11;

namespace {

// A matrix of n_samples bytes (dtype bool) or bits (dtype uint8) per row. The strides of an empty array mean nothing.
fmn_matrix matrix(const py::array& a, int64_t n_samples) {
    const bool bytes = a.dtype().kind() == 'b';
    const int64_t width = bytes ? n_samples : (n_samples + 7) / 8;
    if (a.ndim() != 2 || a.itemsize() != 1 || a.shape(1) != width || (a.size() > 0 && width > 1 && a.strides(1) != 1))
        throw py::value_error("rows: expected n_samples adjacent bool, or as many bits in uint8");
    return {static_cast<const uint8_t*>(a.data()), a.shape(0), n_samples, a.strides(0), bytes ? FMN_BYTES : FMN_BITS};
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
T* output(Array<T>& a, int64_t size, const char* name) {
    if (a.size() != size) throw py::value_error(std::string(name) + ": wrong size");
    return a.mutable_data();
}

template <class T>
const T* vector(const Array<T>& a, int64_t n, const char* name) {
    if (a.ndim() != 1 || a.shape(0) != n) throw py::value_error(std::string(name) + ": expected one value per sample");
    return a.data();
}

template <class Call>
fmn_status run(const Call& call) {
    fmn_status status;
    {
        py::gil_scoped_release release;
        status = call();
    }
    if (status == FMN_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status == FMN_INVALID_ARGUMENT) throw py::value_error("invalid argument: reference, group, label or type out of range");
    return status;
}

void curve_counts(const py::array& rows, int64_t n_samples, int64_t reference, Array<int64_t> counts) {
    const auto m = matrix(rows, n_samples);
    auto* out = output(counts, 4 * m.n_epochs, "counts");
    run([&] { return fmn_curve_counts(&m, reference, 0, out); });
}

void group_counts(const py::array& rows, int64_t n_samples, int64_t reference, const Array<int64_t>& groups,
                  int64_t n_groups, const py::none&, Array<int64_t> counts) {
    const auto m = matrix(rows, n_samples);
    const auto* g = vector(groups, n_samples, "groups");
    auto* out = output(counts, 4 * n_groups * m.n_epochs, "counts");
    run([&] { return fmn_group_counts(&m, reference, g, n_groups, 0, out); });
}

void group_sums(const py::array& rows, int64_t n_samples, int64_t reference, const Array<int64_t>& groups,
                int64_t n_groups, const Array<double>& weights, Array<double> sums) {
    const auto m = matrix(rows, n_samples);
    const auto* g = vector(groups, n_samples, "groups");
    const auto* w = vector(weights, n_samples, "weights");
    auto* out = output(sums, 4 * n_groups * m.n_epochs, "sums");
    run([&] { return fmn_group_sums(&m, reference, g, n_groups, w, 0, out); });
}

py::array sample_counts(const py::array& rows, int64_t n_samples) {
    const auto m = matrix(rows, n_samples);
    py::array_t<int32_t> out({int64_t(5), n_samples});
    auto* p = out.mutable_data();
    run([&] { return fmn_sample_counts(&m, 0, p); });
    return out;
}

void overlap_counts(const py::array& rows, int64_t n_samples, Array<int64_t> counts) {
    const auto m = matrix(rows, n_samples);
    auto* out = output(counts, m.n_epochs * m.n_epochs, "counts");
    run([&] { return fmn_overlap_counts(&m, 0, out); });
}

py::array pack(const py::array& rows, int64_t n_samples) {
    const auto m = matrix(rows, n_samples);
    const int64_t width = (n_samples + 7) / 8;
    py::array_t<uint8_t> out({m.n_epochs, width});
    auto* p = out.mutable_data();
    run([&] { return fmn_pack(&m, 0, p, width); });
    return out;
}

py::array unpack(const py::array& rows, int64_t n_samples) {
    const auto m = matrix(rows, n_samples);
    py::array_t<bool> out({m.n_epochs, n_samples});
    auto* p = reinterpret_cast<uint8_t*>(out.mutable_data());
    run([&] { return fmn_unpack(&m, 0, p, n_samples); });
    return out;
}

fmn_type type_of(const py::dtype& dtype) {  // bfloat16 comes as a structured type of two bytes
    const std::string name = std::string(1, dtype.kind()) + std::to_string(dtype.itemsize());
    const char* names[] = {"i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "V2", "f4", "f8"};
    for (int type = 0; type < 12; ++type)
        if (name == names[type]) return static_cast<fmn_type>(type);
    throw py::type_error("expected integers, or floats of 16 to 64 bits");
}

void check_rows(const py::array& a) {
    if (a.ndim() != 2 || (a.size() > 0 && a.shape(1) > 1 && a.strides(1) != a.itemsize()))
        throw py::value_error("expected two axes, the last one contiguous");
}

py::array pack_predictions(const py::array& predictions, const Array<int64_t>& labels) {
    check_rows(predictions);
    const int64_t n_epochs = predictions.shape(0), n = predictions.shape(1), width = (n + 7) / 8;
    const auto* y = vector(labels, n, "labels");
    const auto type = type_of(predictions.dtype());
    py::array_t<uint8_t> out({n_epochs, width});
    auto* p = out.mutable_data();
    run([&] {
        return fmn_pack_predictions(predictions.data(), type, n_epochs, n, predictions.strides(0), y, 0, p, width);
    });
    return out;
}

py::object pack_scores(const py::array& scores, const Array<int64_t>& labels) {
    check_rows(scores);
    const int64_t n = scores.shape(0), n_classes = scores.shape(1);
    const auto* y = vector(labels, n, "labels");
    const auto type = type_of(scores.dtype());
    py::array_t<uint8_t> out((n + 7) / 8);
    auto* p = out.mutable_data();
    const auto status =
        run([&] { return fmn_pack_scores(scores.data(), type, n, n_classes, scores.strides(0), y, 0, p); });
    return status == FMN_OK ? py::object(out) : py::none();
}

bool check_probabilities(const py::array& scores, double tolerance) {
    if (scores.ndim() != 2 || !(scores.flags() & py::array::c_style)) throw py::value_error("expected two axes, adjacent values");
    const auto type = type_of(scores.dtype());
    int sound = 0;
    run([&] {
        return fmn_check_probabilities(scores.data(), type, scores.shape(0), scores.shape(1), tolerance, 0, &sound);
    });
    return sound != 0;
}

// An fmn_mixture, and the arrays that it points to: epochs is a list of (n_samples, n_classes) arrays of one type.
struct Mixture {
    Mixture(const py::array& current, const std::vector<py::array>& epochs, const Array<int64_t>& labels,
            const py::object& weights)
        : arrays(epochs) {
        if (current.ndim() != 2 || epochs.empty() || !(current.flags() & py::array::c_style))
            throw py::value_error("current: expected two axes, adjacent values; at least one epoch");
        const int64_t n = current.shape(0), n_classes = current.shape(1);
        for (const auto& a : epochs) {
            const bool same = a.ndim() == 2 && a.shape(0) == n && a.shape(1) == n_classes && a.dtype().equal(epochs[0].dtype());
            if (!same || !(a.flags() & py::array::c_style)) throw py::value_error("epochs: expected adjacent values, alike");
            data.push_back(a.data());
        }
        if (!weights.is_none()) given = weights.cast<Array<int64_t>>();
        const int64_t* w = weights.is_none() ? nullptr : vector(given, n, "weights");
        m = {current.data(), data.data(), static_cast<int64_t>(data.size()), type_of(current.dtype()),
             type_of(epochs[0].dtype()), n, n_classes, vector(labels, n, "labels"), w};
    }
    Mixture(const Mixture&) = delete;

    std::vector<py::array> arrays;
    std::vector<const void*> data;
    Array<int64_t> given;
    fmn_mixture m;
};

py::array mixture_right(const py::array& current, const std::vector<py::array>& epochs, const Array<int64_t>& labels,
                        const py::object& weights, const Array<double>& epsilon) {
    const Mixture mixture(current, epochs, labels, weights);
    py::array_t<int64_t> right(epsilon.size());
    auto* out = right.mutable_data();
    std::fill_n(out, epsilon.size(), 0);
    const int64_t last = mixture.m.n_epochs - 1;
    run([&] { return fmn_mixture_right(&mixture.m, 0, last, epsilon.data(), epsilon.size(), 0, out); });
    return right;
}

py::tuple best_epsilons(const py::array& current, const std::vector<py::array>& epochs, const Array<int64_t>& labels,
                        const py::object& weights, const Array<int64_t>& windows, const Array<double>& grid,
                        std::optional<py::array_t<uint16_t>> seen, bool exact) {
    const Mixture mixture(current, epochs, labels, weights);
    if (windows.ndim() != 2 || windows.shape(1) != 2) throw py::value_error("windows: expected shape (n_windows, 2)");
    const int64_t n = windows.shape(0);
    py::array_t<double> epsilon(n);
    py::array_t<int64_t> right(n), on_grid(n);
    auto *eps = epsilon.mutable_data();
    auto *r = right.mutable_data(), *g = on_grid.mutable_data();
    std::fill_n(g, n, 0);
    if (seen && (seen->ndim() != 2 || seen->shape(0) != n || seen->shape(1) != mixture.m.n_samples ||
                 !(seen->flags() & py::array::c_style)))
        throw py::value_error("seen: expected adjacent values, shape (n_windows, n_samples)");
    uint16_t* s = seen ? seen->mutable_data() : nullptr;
    run([&] {
        if (s) return fmn_best_epsilon_seen(&mixture.m, windows.data(), n, exact, 0, s, eps, r);
        return fmn_best_epsilon(&mixture.m, windows.data(), n, grid.data(), grid.size(), 0, eps, r, g);
    });
    return py::make_tuple(epsilon, right, on_grid);
}

}  // namespace

// The functions share no state: a free-threaded Python may call them at once, on arrays that nobody writes meanwhile.
PYBIND11_MODULE(_kernels, m, py::mod_gil_not_used()) {
    using namespace py::literals;
    m.doc() = "Compiled kernels of fmn_ref; see protocol.py.";
    m.def("curve_counts", curve_counts, "rows"_a, "n_samples"_a, "reference"_a, "counts"_a.noconvert());
    m.def("group_sums", group_counts, "rows"_a, "n_samples"_a, "reference"_a, "groups"_a, "n_groups"_a, "weights"_a,
          "sums"_a.noconvert());  // with None for the weights
    m.def("group_sums", group_sums, "rows"_a, "n_samples"_a, "reference"_a, "groups"_a, "n_groups"_a, "weights"_a,
          "sums"_a.noconvert());
    m.def("sample_counts", sample_counts, "rows"_a, "n_samples"_a);
    m.def("overlap_counts", overlap_counts, "rows"_a, "n_samples"_a, "counts"_a.noconvert());
    m.def("pack", pack, "rows"_a, "n_samples"_a);
    m.def("unpack", unpack, "rows"_a, "n_samples"_a);
    m.def("pack_predictions", pack_predictions, "predictions"_a, "labels"_a);
    m.def("pack_scores", pack_scores, "scores"_a, "labels"_a);
    m.def("check_probabilities", check_probabilities, "scores"_a, "tolerance"_a);
    m.def("mixture_right", mixture_right, "current"_a, "epochs"_a, "labels"_a, "weights"_a, "epsilon"_a);
    m.def("best_epsilons", best_epsilons, "current"_a, "epochs"_a, "labels"_a, "weights"_a, "windows"_a, "grid"_a,
          "seen"_a.noconvert() = py::none(), "exact"_a = true);
    m.attr("reads_bits") = true;
    m.def("instruction_set", fmn_instruction_set);
    m.def("threads", fmn_threads);
#ifdef __VERSION__
    m.attr("compiler") = __VERSION__;
#else
    m.attr("compiler") = "unknown";
#endif
}
