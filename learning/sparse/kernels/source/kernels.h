// What the kernels offer to the bindings. All pointers are to contiguous memory; nothing here depends on torch.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "lanes.h"

namespace sparse {

// A sparse matrix by rows: entries pointers[r] to pointers[r + 1] are of row r; an index is a column.
struct Rows {
    const int32_t* pointers;
    const int32_t* indices;
    const float* values;
    int64_t rows, columns;
};

// Memory for entries, which is not cleared.
struct Buffers {
    explicit Buffers(int64_t size);
    // Make room for `size` entries, and keep the first `used`.
    void grow(int64_t used, int64_t size);
    int64_t room;
    std::unique_ptr<int32_t[]> indices;
    std::unique_ptr<float[]> values;
};

// Rows with their memory, which may have more room than the last pointer says.
struct OwnedRows {
    std::vector<int32_t> pointers;
    Buffers entries;
    Rows rows(int64_t columns) const {
        return {pointers.data(), entries.indices.get(), entries.values.get(), static_cast<int64_t>(pointers.size()) - 1,
                columns};
    }
};

struct Geometry {
    int64_t kernel[2], stride[2], padding[2];
};

// Gives `count` floats of memory that last until the kernel returns.
using Scratch = std::function<float*(int64_t count)>;

// The active elements of a matrix by rows.
OwnedRows scan_rows(const float* matrix, int64_t rows, int64_t columns, float threshold);

// Filters [outputs, channels, taps] by output, column = channel * taps + tap, reordered by channel, column = output *
// taps + tap.
OwnedRows by_channel(const Rows& filters, int64_t channels, int64_t taps);

// y = convolution of x with the filters. Rows of `filters` are output channels.
void convolve(const Images& x, const Rows& filters, const float* bias, const Geometry& geometry, const Images& y,
              const Scratch& scratch);

// The gradient of the convolution's input. Rows of `filters` are input channels (`by_channel`).
void convolve_transposed(const Images& g, const Rows& filters, const Geometry& geometry, const Images& gx,
                         const Scratch& scratch);

// The gradient [g.channels, x.channels, kernel] of the weight for dense g and the active elements of x.
void convolution_weight(const Images& g, const Images& x, float threshold, const Geometry& geometry, float* gw,
                        const Scratch& scratch);

// y [samples, rows] = x [samples, columns] times the transposed matrix, plus the bias.
void multiply(const float* x, int64_t samples, const Rows& matrix, const float* bias, float* y, const Scratch& scratch);

// gx [samples, columns] = g [samples, rows] times the matrix.
void multiply_transposed(const float* g, int64_t samples, const Rows& matrix, float* gx, const Scratch& scratch);

// gw [outputs, inputs] = transposed g [samples, outputs] times the active elements of x [samples, inputs].
void outer_product(const float* g, const float* x, int64_t samples, int64_t outputs, int64_t inputs, float threshold,
                   float* gw, const Scratch& scratch);

// weight [outputs, inputs] += scale * the same product, in the columns where x has an active element.
void add_outer_product(const float* g, const float* x, int64_t samples, int64_t outputs, int64_t inputs,
                       float threshold, float scale, float* weight, const Scratch& scratch);

}  // namespace sparse
