// Python bindings: check the arrays, release the GIL, call the C API. The contract is fmn_ref/_kernels.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <new>
#include <string>

#include "fmn/fmn.h"

namespace py = pybind11;

namespace {

fmn_matrix matrix(const py::array& a, const char* name) {
    if (a.ndim() != 2 || a.itemsize() != 1 || (a.shape(1) > 1 && a.strides(1) != 1))
        throw py::value_error(std::string(name) + ": expected a 2-d array of bytes with adjacent columns");
    return {static_cast<const uint8_t*>(a.data()), a.shape(0), a.shape(1), a.strides(0)};
}

template <class T>
using Vector = py::array_t<T, py::array::c_style>;

template <class T>
const T* vector(const Vector<T>& a, int64_t n, const char* name) {
    if (a.ndim() != 1 || a.shape(0) != n) throw py::value_error(std::string(name) + ": expected one value per sample");
    return a.data();
}

template <class Call>
void run(const Call& call) {
    fmn_status status;
    {
        py::gil_scoped_release release;
        status = call();
    }
    if (status == FMN_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status != FMN_OK) throw py::value_error("invalid argument: empty matrix, or reference or group out of range");
}

py::array curve_counts(const py::array& correct, int64_t reference) {
    const auto m = matrix(correct, "correct");
    py::array_t<int64_t> out({int64_t(4), m.n_epochs});
    int64_t* p = out.mutable_data();
    run([&] { return fmn_curve_counts(&m, reference, 0, p); });
    return out;
}

py::array group_counts(const py::array& correct, int64_t reference, const Vector<int64_t>& groups, int64_t n_groups) {
    const auto m = matrix(correct, "correct");
    const auto* g = vector(groups, m.n_samples, "groups");
    py::array_t<int64_t> out({int64_t(4), n_groups, m.n_epochs});
    int64_t* p = out.mutable_data();
    run([&] { return fmn_group_counts(&m, reference, g, n_groups, 0, p); });
    return out;
}

py::array group_sums(const py::array& correct, int64_t reference, const Vector<int64_t>& groups, int64_t n_groups,
                     const Vector<double>& weights) {
    const auto m = matrix(correct, "correct");
    const auto* g = vector(groups, m.n_samples, "groups");
    const auto* w = vector(weights, m.n_samples, "weights");
    py::array_t<double> out({int64_t(4), n_groups, m.n_epochs});
    double* p = out.mutable_data();
    run([&] { return fmn_group_sums(&m, reference, g, n_groups, w, 0, p); });
    return out;
}

py::array sample_counts(const py::array& correct) {
    const auto m = matrix(correct, "correct");
    py::array_t<int32_t> out({int64_t(5), m.n_samples});
    int32_t* p = out.mutable_data();
    run([&] { return fmn_sample_counts(&m, 0, p); });
    return out;
}

py::array overlap_counts(const py::array& packed) {
    const auto m = matrix(packed, "packed");
    py::array_t<int64_t> out({m.n_epochs, m.n_epochs});
    int64_t* p = out.mutable_data();
    run([&] { return fmn_overlap_counts(&m, 0, p); });
    return out;
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
    using namespace py::literals;
    m.doc() = "Compiled kernels of fmn_ref; see _kernels.pyi.";
    m.def("curve_counts", curve_counts, "correct"_a, "reference"_a);
    m.def("group_counts", group_counts, "correct"_a, "reference"_a, "groups"_a, "n_groups"_a);
    m.def("group_sums", group_sums, "correct"_a, "reference"_a, "groups"_a, "n_groups"_a, "weights"_a);
    m.def("sample_counts", sample_counts, "correct"_a);
    m.def("overlap_counts", overlap_counts, "packed"_a);
    m.def("instruction_set", fmn_instruction_set);
    m.def("threads", fmn_threads);
}
