// The kernels as torch operators, fedbonsai_sparse::*.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using at::Tensor;
using Parts = std::tuple<Tensor, Tensor, Tensor>;

const auto FLOATS = at::TensorOptions().dtype(at::kFloat);

// Memory for one call, from torch's allocator.
class Workspace {
 public:
    sparse::Scratch scratch() {
        return [this](int64_t count) {
            held_.push_back(at::empty({std::max<int64_t>(count, 1)}, FLOATS));
            return held_.back().data_ptr<float>();
        };
    }

 private:
    std::vector<Tensor> held_;
};

template <typename T>
Tensor as_tensor(const T* values, int64_t size, at::ScalarType type) {
    Tensor tensor = at::empty({size}, at::TensorOptions().dtype(type));
    if (size) std::memcpy(tensor.data_ptr(), values, sizeof(T) * size);
    return tensor;
}

Parts as_tensors(const sparse::OwnedRows& rows) {
    const int64_t size = rows.pointers.back();
    return {as_tensor(rows.pointers.data(), rows.pointers.size(), at::kInt),
            as_tensor(rows.entries.indices.get(), size, at::kInt),
            as_tensor(rows.entries.values.get(), size, at::kFloat)};
}

sparse::Rows as_rows(const Tensor& pointers, const Tensor& indices, const Tensor& values, int64_t columns) {
    return {pointers.data_ptr<int32_t>(), indices.data_ptr<int32_t>(), values.data_ptr<float>(), pointers.size(0) - 1,
            columns};
}

// Of a tensor that is dense in both formats, as one with a single channel, the strides tell which is meant.
bool is_channels_last(const Tensor& x) {
    return x.dim() == 4 && x.suggest_memory_format() == at::MemoryFormat::ChannelsLast &&
           x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

at::MemoryFormat format_of(const Tensor& x) {
    return is_channels_last(x) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// x must be dense in one of the two formats.
sparse::Images as_images(const Tensor& x) {
    return {x.data_ptr<float>(), x.size(0), x.size(1), x.size(2), x.size(3), is_channels_last(x)};
}

Tensor dense(const Tensor& x) {
    return is_channels_last(x) ? x : x.contiguous();
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->data_ptr<float>() : nullptr;
}

// The shape of the output of a convolution of x with filters of this shape.
std::vector<int64_t> output_shape(at::IntArrayRef x, at::IntArrayRef filters, at::IntArrayRef stride,
                                  at::IntArrayRef padding) {
    TORCH_CHECK(x.size() == 4 && filters.size() == 4 && x[1] == filters[1], "input ", x, " does not fit filters ",
                filters);
    std::vector<int64_t> shape{x[0], filters[0]};
    for (int i = 0; i < 2; ++i) {
        TORCH_CHECK(stride[i] == 1 || stride[i] == 2, "stride ", stride, ": each of its numbers is 1 or 2");
        TORCH_CHECK(padding[i] >= 0 && x[2 + i] + 2 * padding[i] >= filters[2 + i], "padding ", padding,
                    ": the padded input ", x, " is smaller than the kernel of ", filters);
        shape.push_back((x[2 + i] + 2 * padding[i] - filters[2 + i]) / stride[i] + 1);
    }
    return shape;
}

sparse::Geometry as_geometry(at::IntArrayRef filters, at::IntArrayRef stride, at::IntArrayRef padding) {
    return {{filters[2], filters[3]}, {stride[0], stride[1]}, {padding[0], padding[1]}};
}

float checked(double threshold) {
    TORCH_CHECK(threshold > 0, "threshold ", threshold, ": it has to be above 0, so that zeros are not active");
    return static_cast<float>(threshold);
}

Parts scan_rows(const Tensor& weight, double threshold) {
    const Tensor held = weight.contiguous();
    const int64_t rows = held.size(0), columns = rows ? held.numel() / rows : 0;
    return as_tensors(sparse::scan_rows(held.data_ptr<float>(), rows, columns, checked(threshold)));
}

Tensor convolve(const Tensor& input, const Tensor& pointers, const Tensor& indices, const Tensor& values,
                const std::optional<Tensor>& bias, at::IntArrayRef filters, at::IntArrayRef stride,
                at::IntArrayRef padding) {
    const Tensor x = dense(input);
    Tensor y = at::empty(output_shape(x.sizes(), filters, stride, padding), FLOATS, format_of(x));
    Workspace workspace;
    sparse::convolve(as_images(x), as_rows(pointers, indices, values, filters[1] * filters[2] * filters[3]),
                     data_or_null(bias), as_geometry(filters, stride, padding), as_images(y), workspace.scratch());
    return y;
}

Tensor convolve_transposed(const Tensor& gradient, const Tensor& pointers, const Tensor& indices, const Tensor& values,
                           at::IntArrayRef input_shape, at::IntArrayRef filters, at::IntArrayRef stride,
                           at::IntArrayRef padding) {
    const Tensor g = dense(gradient);
    TORCH_CHECK(g.sizes().vec() == output_shape(input_shape, filters, stride, padding), "gradient ", g.sizes(),
                " does not fit input ", input_shape);
    const int64_t taps = filters[2] * filters[3];
    const sparse::OwnedRows turned =
        sparse::by_channel(as_rows(pointers, indices, values, filters[1] * taps), filters[1], taps);
    const sparse::Rows rows = turned.rows(filters[0] * taps);
    Tensor gx = at::empty(input_shape, FLOATS, format_of(g));
    Workspace workspace;
    sparse::convolve_transposed(as_images(g), rows, as_geometry(filters, stride, padding), as_images(gx),
                                workspace.scratch());
    return gx;
}

Tensor convolution_weight(const Tensor& gradient, const Tensor& input, double threshold, at::IntArrayRef filters,
                          at::IntArrayRef stride, at::IntArrayRef padding) {
    const Tensor g = dense(gradient), x = dense(input);
    TORCH_CHECK(g.sizes().vec() == output_shape(x.sizes(), filters, stride, padding), "gradient ", g.sizes(),
                " does not fit input ", x.sizes());
    Tensor gw = at::empty(filters, FLOATS);
    Workspace workspace;
    sparse::convolution_weight(as_images(g), as_images(x), checked(threshold), as_geometry(filters, stride, padding),
                               gw.data_ptr<float>(), workspace.scratch());
    return gw;
}

Tensor multiply(const Tensor& input, const Tensor& pointers, const Tensor& indices, const Tensor& values,
                const std::optional<Tensor>& bias, int64_t columns) {
    const Tensor x = input.contiguous();
    TORCH_CHECK(x.dim() == 2 && x.size(1) == columns, "input ", x.sizes(), " does not fit a matrix with ", columns,
                " columns");
    Tensor y = at::empty({x.size(0), pointers.size(0) - 1}, FLOATS);
    Workspace workspace;
    sparse::multiply(x.data_ptr<float>(), x.size(0), as_rows(pointers, indices, values, columns), data_or_null(bias),
                     y.data_ptr<float>(), workspace.scratch());
    return y;
}

Tensor multiply_transposed(const Tensor& gradient, const Tensor& pointers, const Tensor& indices, const Tensor& values,
                           int64_t columns) {
    const Tensor g = gradient.contiguous();
    TORCH_CHECK(g.dim() == 2 && g.size(1) == pointers.size(0) - 1, "gradient ", g.sizes(),
                " does not fit a matrix with ", pointers.size(0) - 1, " rows");
    Tensor gx = at::empty({g.size(0), columns}, FLOATS);
    Workspace workspace;
    sparse::multiply_transposed(g.data_ptr<float>(), g.size(0), as_rows(pointers, indices, values, columns),
                                gx.data_ptr<float>(), workspace.scratch());
    return gx;
}

Tensor outer_product(const Tensor& gradient, const Tensor& input, double threshold) {
    const Tensor g = gradient.contiguous(), x = input.contiguous();
    TORCH_CHECK(g.dim() == 2 && x.dim() == 2 && g.size(0) == x.size(0), "gradient ", g.sizes(), " does not fit input ",
                x.sizes());
    Tensor gw = at::empty({g.size(1), x.size(1)}, FLOATS);
    Workspace workspace;
    sparse::outer_product(g.data_ptr<float>(), x.data_ptr<float>(), x.size(0), g.size(1), x.size(1), checked(threshold),
                          gw.data_ptr<float>(), workspace.scratch());
    return gw;
}

void add_outer_product(Tensor& weight, const Tensor& gradient, const Tensor& input, double threshold, double scale) {
    const Tensor g = gradient.contiguous(), x = input.contiguous();
    TORCH_CHECK(g.dim() == 2 && x.dim() == 2 && g.size(0) == x.size(0), "gradient ", g.sizes(), " does not fit input ",
                x.sizes());
    TORCH_CHECK(weight.is_contiguous() && weight.sizes() == at::IntArrayRef({g.size(1), x.size(1)}), "weight ",
                weight.sizes(), " is not contiguous, or does not fit gradient ", g.sizes(), " and input ", x.sizes());
    Workspace workspace;
    sparse::add_outer_product(g.data_ptr<float>(), x.data_ptr<float>(), x.size(0), g.size(1), x.size(1),
                              checked(threshold), static_cast<float>(scale), weight.data_ptr<float>(),
                              workspace.scratch());
}

}  // namespace

TORCH_LIBRARY(fedbonsai_sparse, library) {
    library.def("scan_rows(Tensor weight, float threshold) -> (Tensor, Tensor, Tensor)");
    library.def(
        "convolve(Tensor x, Tensor pointers, Tensor indices, Tensor values, Tensor? bias, int[] filters, int[2] "
        "stride, int[2] padding) -> Tensor");
    library.def(
        "convolve_transposed(Tensor g, Tensor pointers, Tensor indices, Tensor values, int[] input_shape, int[] "
        "filters, int[2] stride, int[2] padding) -> Tensor");
    library.def(
        "convolution_weight(Tensor g, Tensor x, float threshold, int[] filters, int[2] stride, int[2] padding) -> "
        "Tensor");
    library.def(
        "multiply(Tensor x, Tensor pointers, Tensor indices, Tensor values, Tensor? bias, int columns) -> Tensor");
    library.def("multiply_transposed(Tensor g, Tensor pointers, Tensor indices, Tensor values, int columns) -> Tensor");
    library.def("outer_product(Tensor g, Tensor x, float threshold) -> Tensor");
    library.def("add_outer_product_(Tensor(a!) weight, Tensor g, Tensor x, float threshold, float scale) -> ()");
}

TORCH_LIBRARY_IMPL(fedbonsai_sparse, CPU, library) {
    library.impl("scan_rows", scan_rows);
    library.impl("convolve", convolve);
    library.impl("convolve_transposed", convolve_transposed);
    library.impl("convolution_weight", convolution_weight);
    library.impl("multiply", multiply);
    library.impl("multiply_transposed", multiply_transposed);
    library.impl("outer_product", outer_product);
    library.impl("add_outer_product_", add_outer_product);
}
