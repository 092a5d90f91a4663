// Portable kernels in plain C++ for any processor; the compiler vectorises them.
#include "sample_loops.h"

namespace fmn {

const Kernels base_kernels = {
    "base",        loops::count_bytes,    loops::count_bits,     loops::count_overlaps, loops::pack,       loops::unpack,
    loops::compare, loops::compare_scores, loops::update_samples, loops::add_samples<loops::transpose>, loops::transpose, loops::add_counts,     loops::add_weights,
    loops::mean, loops::sums_to_one, loops::interval,       loops::right_at};

}  // namespace fmn
