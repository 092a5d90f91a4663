#include <fmn/fmn.h>

#include <cstdio>

int main() {
    const uint8_t correct[2][4] = {{1, 1, 0, 0}, {1, 0, 1, 0}};
    const fmn_matrix m = {correct[0], 2, 4, 4, FMN_BYTES};
    int64_t counts[4][2] = {};  // zeros: fmn_curve_counts adds to its output
    if (fmn_curve_counts(&m, 1, 1, counts[0]) != FMN_OK) return 1;
    std::printf("F_0 = %.2f\n", static_cast<double>(counts[1][0]) / 4);
    return counts[1][0] == 1 ? 0 : 1;
}
