// Direct sparse convolution, and the gradient of its input.
//
// The samples of a block (as many as a vector has lanes) are the innermost dimension, so an active weight is one scalar
// for a whole vector, and its place in the input is one offset. A tile of output pixels stays in registers while the
// active weights of a filter are read. Strips of rows are converted from torch's layout and back, so that a strip stays
// in the second-level cache.
//
// The gradient of the input is the same computation with the filters by input channel: a stride s divides its pixels
// into s * s phases, each a convolution of stride 1 with the taps that meet it.

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace sparse {
namespace {

constexpr int64_t STRIP_BYTES = 512 << 10;  // of input and output of a strip: half a usual second-level cache
constexpr int MAX_TILE = REGISTERS == 32 ? 16 : 12;
constexpr int MAX_COLUMNS = 8;

struct Entry {
    int32_t offset;
    float value;
};

struct Steps {
    int64_t x_row, y_row, y_column;  // floats between neighbouring rows and columns of a tile
};

// A tile of R x Q pixels of L samples; neighbouring columns are S pixels apart in the input.
template <int L, int S, int R, int Q>
void tile(const float* x, const Entry* entry, const Entry* end, float bias, float* y, const Steps& steps) {
    Vec<L> sums[R][Q];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) sums[r][q] = fill<L>(bias);
    for (; entry != end; ++entry) {
        const float* from = x + entry->offset;
        const Vec<L> weight = fill<L>(entry->value);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, from += steps.x_row)
#pragma GCC unroll 16
            for (int q = 0; q < Q; ++q) sums[r][q] += weight * load<L>(from + q * S * L);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) store<L>(y + r * steps.y_row + q * steps.y_column, sums[r][q]);
}

using Tile = void (*)(const float*, const Entry*, const Entry*, float, float*, const Steps&);

template <int L, int S, int R, int Q>
constexpr Tile tile_or_null() {
    if constexpr (R * Q <= MAX_TILE)
        return &tile<L, S, R, Q>;
    else
        return nullptr;
}

template <int L, int S, int R>
constexpr Tile of_columns(int64_t columns) {
    constexpr Tile table[MAX_COLUMNS] = {
        tile_or_null<L, S, R, 1>(), tile_or_null<L, S, R, 2>(), tile_or_null<L, S, R, 3>(), tile_or_null<L, S, R, 4>(),
        tile_or_null<L, S, R, 5>(), tile_or_null<L, S, R, 6>(), tile_or_null<L, S, R, 7>(), tile_or_null<L, S, R, 8>()};
    return table[columns - 1];
}

template <int L, int S>
Tile find_tile(int64_t rows, int64_t columns) {
    switch (rows) {
        case 1:
            return of_columns<L, S, 1>(columns);
        case 2:
            return of_columns<L, S, 2>(columns);
        case 3:
            return of_columns<L, S, 3>(columns);
        default:
            return of_columns<L, S, 4>(columns);
    }
}

// One dimension of a convolution. An output index o = phase + o_step * i reads the padded input from x_step * i + base.
struct Axis {
    int64_t size, x_size;  // output, input
    int64_t o_step, x_step;
    int64_t pad, span;          // zeros before the input (negative: cropped); indices that the taps of one output span
    std::vector<int64_t> base;  // by phase
    std::vector<int64_t> phase_of_tap, shift_of_tap;
    int64_t phases() const { return o_step; }
    int64_t steps() const { return (size + o_step - 1) / o_step; }
    int64_t count(int64_t phase) const { return phase < size ? (size - phase + o_step - 1) / o_step : 0; }
    // Padded indices that steps [0, count) of all phases read.
    int64_t padded(int64_t count) const {
        return x_step * (count - 1) + *std::max_element(base.begin(), base.end()) + span;
    }
};

Axis forward_axis(int64_t x_size, int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
    Axis axis{size, x_size, 1, stride, padding, kernel, {0}, {}, {}};
    for (int64_t tap = 0; tap < kernel; ++tap) axis.phase_of_tap.push_back(0), axis.shift_of_tap.push_back(tap);
    return axis;
}

Axis transposed_axis(int64_t x_size, int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
    // Output o and tap k read the input at (o + padding - k) / stride, where that is whole. k = residue + stride * u.
    const int64_t span = (kernel - 1) / stride + 1, first = padding / stride;
    Axis axis{size, x_size, stride, 1, span - 1 - first, span, {}, {}, {}};
    std::vector<int64_t> phase_of_residue(stride);
    for (int64_t phase = 0; phase < stride; ++phase) {
        axis.base.push_back((phase + padding) / stride - first);
        phase_of_residue[(phase + padding) % stride] = phase;
    }
    for (int64_t tap = 0; tap < kernel; ++tap) {
        axis.phase_of_tap.push_back(phase_of_residue[tap % stride]);
        axis.shift_of_tap.push_back(span - 1 - tap / stride);
    }
    return axis;
}

// The entries of each row, in each phase, as offsets into a strip of the input.
struct Lists {
    std::vector<Entry> entries;
    std::vector<int64_t> starts;  // by row * phases + phase
};

Lists make_lists(const Rows& filters, const Axis& down, const Axis& across, int64_t plane, int64_t pitch,
                 int64_t lanes) {
    const int64_t taps = down.phase_of_tap.size() * across.phase_of_tap.size(),
                  phases = down.phases() * across.phases();
    std::vector<int32_t> offsets(filters.columns), phase_of(filters.columns);
    for (int64_t column = 0, i = 0; column < filters.columns; column += taps)
        for (size_t r = 0; r < down.phase_of_tap.size(); ++r)
            for (size_t q = 0; q < across.phase_of_tap.size(); ++q, ++i) {
                const int64_t pixel = down.shift_of_tap[r] * pitch + across.shift_of_tap[q];
                offsets[i] = static_cast<int32_t>((column / taps * plane) + pixel * lanes);
                phase_of[i] = static_cast<int32_t>(down.phase_of_tap[r] * across.phases() + across.phase_of_tap[q]);
            }
    Lists lists;
    lists.entries.resize(filters.pointers[filters.rows]);
    lists.starts.assign(filters.rows * phases + 1, 0);
    for (int64_t row = 0; row < filters.rows; ++row) {
        const int64_t begin = filters.pointers[row], end = filters.pointers[row + 1];
        int64_t* starts = &lists.starts[row * phases];
        starts[0] = begin;
        if (phases == 1) {
            for (int64_t i = begin; i < end; ++i) lists.entries[i] = {offsets[filters.indices[i]], filters.values[i]};
            continue;
        }
        std::vector<int64_t> next(phases + 1, 0);
        for (int64_t i = begin; i < end; ++i) ++next[phase_of[filters.indices[i]] + 1];
        next[0] = begin;
        for (int64_t phase = 1; phase <= phases; ++phase) next[phase] += next[phase - 1];
        for (int64_t phase = 0; phase < phases; ++phase) starts[phase] = next[phase];
        for (int64_t i = begin; i < end; ++i) {
            const int32_t index = filters.indices[i];
            lists.entries[next[phase_of[index]]++] = {offsets[index], filters.values[i]};
        }
    }
    lists.starts.back() = filters.pointers[filters.rows];
    return lists;
}

// Starts of tiles of `size` that cover [0, count); the last one overlaps the one before rather than end outside.
inline int64_t clamp_start(int64_t start, int64_t size, int64_t count) {
    return std::min(start, count - size);
}

template <int L>
class Convolution {
 public:
    Convolution(const Images& x, const Rows& filters, const float* bias, const Axis& down, const Axis& across,
                const Images& y, const Scratch& scratch)
        : x_(x), y_(y), bias_(bias), filters_(filters), down_(down), across_(across) {
        skip_ = std::max<int64_t>(-across.pad, 0);
        pitch_ = std::max(across.padded(across.steps()) + skip_, std::max<int64_t>(across.pad, 0) + across.x_size);
        const int64_t row_bytes = 4 * L * (x.channels * pitch_ * down.x_step + y.channels * y.width * down.o_step);
        strip_ = std::min(down.steps(), std::max<int64_t>(4, (STRIP_BYTES / row_bytes) & ~int64_t{1}));
        x_rows_ = down.padded(strip_);
        x_plane_ = x_rows_ * pitch_ * L;
        y_plane_ = strip_ * down.o_step * y.width * L;
        lists_ = make_lists(filters, down, across, x_plane_, pitch_, L);
        strip_x_ = scratch(x.channels * x_plane_);
        strip_y_ = scratch(y.channels * y_plane_);
    }

    void run() {
        // Columns of padding stay zero; rows of it are cleared where a strip has some.
        std::memset(strip_x_, 0, sizeof(float) * x_.channels * x_plane_);
        for (int64_t sample = 0; sample < x_.samples; sample += L) {
            const int64_t count = std::min<int64_t>(L, x_.samples - sample);
            for (int64_t step = 0; step < down_.steps(); step += strip_) {
                const int64_t steps = std::min(strip_, down_.steps() - step);
                read_strip(sample, count, step, steps);
                for (int64_t r = 0; r < down_.phases(); ++r)
                    for (int64_t q = 0; q < across_.phases(); ++q)
                        compute(r, q, std::min(steps, down_.count(r) - step));
                const int64_t row = step * down_.o_step;
                from_lanes<L>(strip_y_, y_plane_, y_, sample, count, row,
                              std::min(steps * down_.o_step, y_.height - row));
            }
        }
    }

 private:
    void read_strip(int64_t sample, int64_t count, int64_t step, int64_t steps) {
        const int64_t start = step * down_.x_step - down_.pad, rows = down_.padded(steps);
        const int64_t first = std::clamp<int64_t>(-start, 0, rows);
        const int64_t last = std::clamp<int64_t>(down_.x_size - start, first, rows);
        for (int64_t c = 0; c < x_.channels; ++c) {
            float* plane = strip_x_ + c * x_plane_;
            std::memset(plane, 0, sizeof(float) * first * pitch_ * L);
            std::memset(plane + last * pitch_ * L, 0, sizeof(float) * (rows - last) * pitch_ * L);
        }
        if (last == first) return;
        // Where the padding is negative, the columns before the strip are converted too, and are not read.
        to_lanes<L>(x_, sample, count, start + first, last - first,
                    strip_x_ + (first * pitch_ + std::max<int64_t>(across_.pad, 0)) * L, pitch_, x_plane_);
    }

    void compute(int64_t r, int64_t q, int64_t rows) {
        const int64_t columns = across_.count(q);
        if (rows <= 0 || columns <= 0) return;
        const int64_t tiles = (columns + MAX_COLUMNS - 1) / MAX_COLUMNS, wide = (columns + tiles - 1) / tiles;
        const int64_t high = std::min<int64_t>({rows, MAX_TILE / wide, 4});
        const Tile run_tile = across_.x_step == 1 ? find_tile<L, 1>(high, wide) : find_tile<L, 2>(high, wide);
        const Steps steps{down_.x_step * pitch_ * L, down_.o_step * y_.width * L, across_.o_step * L};
        const float* x = strip_x_ + (down_.base[r] * pitch_ + across_.base[q] + skip_) * L;
        float* y = strip_y_ + (r * y_.width + q) * L;
        const int64_t phases = down_.phases() * across_.phases(), phase = r * across_.phases() + q;
        for (int64_t i = 0; i < rows; i += high) {
            const int64_t row = clamp_start(i, high, rows);
            for (int64_t j = 0; j < columns; j += wide) {
                const int64_t column = clamp_start(j, wide, columns);
                const float* from = x + row * steps.x_row + column * across_.x_step * L;
                float* to = y + row * steps.y_row + column * steps.y_column;
                for (int64_t c = 0; c < y_.channels; ++c) {
                    const int64_t* starts = &lists_.starts[c * phases + phase];
                    const Entry* entries = lists_.entries.data();
                    run_tile(from, entries + starts[0], entries + starts[1], bias_ ? bias_[c] : 0.0f, to + c * y_plane_,
                             steps);
                }
            }
        }
    }

    const Images x_, y_;
    const float* bias_;
    const Rows filters_;
    const Axis down_, across_;
    int64_t skip_, pitch_, strip_, x_rows_, x_plane_, y_plane_;
    Lists lists_;
    float *strip_x_, *strip_y_;
};

void run(const Images& x, const Rows& filters, const float* bias, const Axis& down, const Axis& across, const Images& y,
         const Scratch& scratch) {
    // Up to eight samples that are left over take a narrower vector.
    const int64_t left = x.samples % 16, wide = WIDTH < 16 ? 0 : left <= 8 ? x.samples - left : x.samples;
    const auto part = [](const Images& all, int64_t first, int64_t samples) {
        return Images{all.at(first), samples, all.channels, all.height, all.width, all.channels_last};
    };
    if (wide) Convolution<16>(part(x, 0, wide), filters, bias, down, across, part(y, 0, wide), scratch).run();
    if (const int64_t rest = x.samples - wide)
        Convolution<8>(part(x, wide, rest), filters, bias, down, across, part(y, wide, rest), scratch).run();
}

}  // namespace

void convolve(const Images& x, const Rows& filters, const float* bias, const Geometry& geometry, const Images& y,
              const Scratch& scratch) {
    const auto& [kernel, stride, padding] = geometry;
    run(x, filters, bias, forward_axis(x.height, y.height, kernel[0], stride[0], padding[0]),
        forward_axis(x.width, y.width, kernel[1], stride[1], padding[1]), y, scratch);
}

void convolve_transposed(const Images& g, const Rows& filters, const Geometry& geometry, const Images& gx,
                         const Scratch& scratch) {
    const auto& [kernel, stride, padding] = geometry;
    run(g, filters, nullptr, transposed_axis(g.height, gx.height, kernel[0], stride[0], padding[0]),
        transposed_axis(g.width, gx.width, kernel[1], stride[1], padding[1]), gx, scratch);
}

}  // namespace sparse
