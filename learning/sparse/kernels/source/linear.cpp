// Products of a sparse matrix with a few samples, which are the lanes of vectors.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sparse {
namespace {

constexpr int64_t AHEAD = 2;         // rows, for which scattered elements are prefetched
constexpr int ROWS = 8;              // of the weight's gradient at a time
constexpr int64_t FEW_SAMPLES = 24;  // above, the sums over samples are worth a list of active elements

// [samples, features] as images of one pixel, so that features are channels.
Images as_images(const float* data, int64_t samples, int64_t features) {
    return {const_cast<float*>(data), samples, features, 1, 1, true};
}

template <int L, int V>
void multiply_block(const Images& x, int64_t sample, int64_t count, const Rows& matrix, const float* bias,
                    const Images& y, float* from, float* to) {
    // Each of V vectors has L samples; [features, V, L] is V interleaved planes.
    for (int64_t v = 0; v < V; ++v) {
        const int64_t some = std::clamp<int64_t>(count - v * L, 0, L);
        if (some > 0) to_lanes<L>(x, sample + v * L, some, 0, 1, from + v * L, 1, V * L);
    }
    for (int64_t row = 0; row < matrix.rows; ++row) {
        constexpr int CHAINS = V == 1 ? 4 : V == 2 ? 2 : 1;  // independent sums hide the latency of additions
        Vec<L> sums[CHAINS][V] = {};
        int64_t i = matrix.pointers[row];
        const int64_t end = matrix.pointers[row + 1];
        for (; i + CHAINS <= end; i += CHAINS)
#pragma GCC unroll 4
            for (int k = 0; k < CHAINS; ++k)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v)
                    sums[k][v] += fill<L>(matrix.values[i + k]) *
                                  load<L>(from + (static_cast<int64_t>(matrix.indices[i + k]) * V + v) * L);
        for (; i < end; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                sums[0][v] +=
                    fill<L>(matrix.values[i]) * load<L>(from + (static_cast<int64_t>(matrix.indices[i]) * V + v) * L);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            Vec<L> sum = fill<L>(bias ? bias[row] : 0.0f);
#pragma GCC unroll 4
            for (int k = 0; k < CHAINS; ++k) sum += sums[k][v];
            store<L>(to + (row * V + v) * L, sum);
        }
    }
    for (int64_t v = 0; v < V; ++v) {
        const int64_t some = std::clamp<int64_t>(count - v * L, 0, L);
        if (some > 0) from_lanes<L>(to + v * L, V * L, y, sample + v * L, some, 0, 1);
    }
}

template <int L, int V>
void multiply_transposed_block(const Images& g, int64_t sample, int64_t count, const Rows& matrix, const Images& gx,
                               float* from, float* to) {
    for (int64_t v = 0; v < V; ++v) {
        const int64_t some = std::clamp<int64_t>(count - v * L, 0, L);
        if (some > 0) to_lanes<L>(g, sample + v * L, some, 0, 1, from + v * L, 1, V * L);
    }
    std::memset(to, 0, sizeof(float) * matrix.columns * V * L);
    for (int64_t row = 0; row < matrix.rows; ++row) {
        Vec<L> gradient[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) gradient[v] = load<L>(from + (row * V + v) * L);
        for (int64_t i = matrix.pointers[row]; i < matrix.pointers[row + 1]; ++i) {
            float* sum = to + static_cast<int64_t>(matrix.indices[i]) * V * L;
            const Vec<L> value = fill<L>(matrix.values[i]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) store<L>(sum + v * L, load<L>(sum + v * L) + value * gradient[v]);
        }
    }
    for (int64_t v = 0; v < V; ++v) {
        const int64_t some = std::clamp<int64_t>(count - v * L, 0, L);
        if (some > 0) from_lanes<L>(to + v * L, V * L, gx, sample + v * L, some, 0, 1);
    }
}

// sums [R, width] = R neighbouring outputs' gradients, `pitch` floats apart by sample, times active [samples, width].
template <int R>
void sum_rows(const float* g, int64_t pitch, const float* active, int64_t samples, int64_t width, float* sums) {
    for (int64_t j = 0; j < width; j += WIDTH) {
        Vec<WIDTH> sum[R] = {};
        for (int64_t n = 0; n < samples; ++n) {
            const Vec<WIDTH> x = load<WIDTH>(active + n * width + j);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r] += fill<WIDTH>(g[n * pitch + r]) * x;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store<WIDTH>(sums + r * width + j, sum[r]);
    }
}

constexpr int64_t CACHED = 1 << 20;  // a result of more elements does not stay in the caches until it is read

// Copy a part of a result; past the caches, without reading the old lines, where the result does not stay in them.
inline void write(const float* from, int64_t count, float* to, bool is_cached) {
    int64_t i = 0;
    if (is_cached) {
        std::memcpy(to, from, sizeof(float) * count);
        return;
    }
#if defined(__AVX512F__)
    for (; i < count && reinterpret_cast<uintptr_t>(to + i) % 64; ++i) to[i] = from[i];
    for (; i + 16 <= count; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
#elif defined(__AVX2__)
    for (; i < count && reinterpret_cast<uintptr_t>(to + i) % 32; ++i) to[i] = from[i];
    for (; i + 8 <= count; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
#endif
    for (; i < count; ++i) to[i] = from[i];
}

// The columns of x [samples, inputs] with an active element, side by side.
struct ActiveColumns {
    ActiveColumns(const float* x, int64_t samples_, int64_t inputs, float threshold, const Scratch& scratch)
        : samples(samples_) {
        std::vector<uint8_t> is_active(inputs, 0);
        for (int64_t n = 0; n < samples; ++n)
            for (int64_t i = 0; i < inputs; ++i) is_active[i] |= !(std::fabs(x[n * inputs + i]) < threshold);
        const int64_t number = std::count(is_active.begin(), is_active.end(), 1);
        is_whole = 2 * number > inputs;
        for (int64_t i = 0; i < inputs; ++i)
            if (is_whole || is_active[i]) columns.push_back(static_cast<int32_t>(i));
        width = (columns.size() + WIDTH - 1) / WIDTH * WIDTH;
        values = scratch(samples * width);
        std::memset(values, 0, sizeof(float) * samples * width);
        for (int64_t n = 0; n < samples; ++n)
            for (size_t j = 0; j < columns.size(); ++j) {
                const float value = x[n * inputs + columns[j]];
                values[n * width + j] = std::fabs(value) < threshold ? 0.0f : value;
            }
    }

    // Calls `use` with each output and the sums over samples of its gradient times each column.
    template <typename Use>
    void for_rows(const float* g, int64_t outputs, const Scratch& scratch, const Use& use) const {
        float* sums = scratch(ROWS * width);
        for (int64_t o = 0; o < outputs; o += ROWS) {
            const int64_t rows = std::min<int64_t>(ROWS, outputs - o);
            if (rows == ROWS)
                sum_rows<ROWS>(g + o, outputs, values, samples, width, sums);
            else
                for (int64_t r = 0; r < rows; ++r)
                    sum_rows<1>(g + o + r, outputs, values, samples, width, sums + r * width);
            for (int64_t r = 0; r < rows; ++r) use(o + r, sums + r * width);
        }
    }

    int64_t samples, width;
    bool is_whole;  // more than half of the columns are active: then all are here
    std::vector<int32_t> columns;
    float* values;  // [samples, width]; those that are not active are 0
};

// Calls `run` with the number of vectors, for blocks of up to four vectors of samples.
template <int L, typename Run>
void for_blocks(int64_t samples, const Run& run) {
    for (int64_t sample = 0; sample < samples; sample += 4 * L) {
        const int64_t count = std::min<int64_t>(4 * L, samples - sample);
        if (count > 2 * L)
            run(std::integral_constant<int, 4>(), sample, count);
        else if (count > L)
            run(std::integral_constant<int, 2>(), sample, count);
        else
            run(std::integral_constant<int, 1>(), sample, count);
    }
}

template <int L>
void multiply_lanes(const Images& x, const Rows& matrix, const float* bias, const Images& y, const Scratch& scratch) {
    const int64_t vectors = std::min<int64_t>(4, (x.samples + L - 1) / L) + 1;
    float *from = scratch(matrix.columns * vectors * L), *to = scratch(matrix.rows * vectors * L);
    // Lanes without a sample are computed and not read; they only have to be numbers that exist.
    std::memset(from, 0, sizeof(float) * matrix.columns * vectors * L);
    for_blocks<L>(x.samples, [&](auto v, int64_t sample, int64_t count) {
        multiply_block<L, decltype(v)::value>(x, sample, count, matrix, bias, y, from, to);
    });
}

template <int L>
void multiply_transposed_lanes(const Images& g, const Rows& matrix, const Images& gx, const Scratch& scratch) {
    const int64_t vectors = std::min<int64_t>(4, (g.samples + L - 1) / L) + 1;
    float *from = scratch(matrix.rows * vectors * L), *to = scratch(matrix.columns * vectors * L);
    std::memset(from, 0, sizeof(float) * matrix.rows * vectors * L);
    for_blocks<L>(g.samples, [&](auto v, int64_t sample, int64_t count) {
        multiply_transposed_block<L, decltype(v)::value>(g, sample, count, matrix, gx, from, to);
    });
}

}  // namespace

void multiply(const float* x, int64_t samples, const Rows& matrix, const float* bias, float* y,
              const Scratch& scratch) {
    const Images from = as_images(x, samples, matrix.columns), to = as_images(y, samples, matrix.rows);
    if (WIDTH == 16 && samples > 8)
        multiply_lanes<16>(from, matrix, bias, to, scratch);
    else
        multiply_lanes<8>(from, matrix, bias, to, scratch);
}

void multiply_transposed(const float* g, int64_t samples, const Rows& matrix, float* gx, const Scratch& scratch) {
    const Images from = as_images(g, samples, matrix.rows), to = as_images(gx, samples, matrix.columns);
    if (WIDTH == 16 && samples > 8)
        multiply_transposed_lanes<16>(from, matrix, to, scratch);
    else
        multiply_transposed_lanes<8>(from, matrix, to, scratch);
}

void outer_product(const float* g, const float* x, int64_t samples, int64_t outputs, int64_t inputs, float threshold,
                   float* gw, const Scratch& scratch) {
    if (samples > FEW_SAMPLES) {
        convolution_weight(as_images(g, samples, outputs), as_images(x, samples, inputs), threshold,
                           {{1, 1}, {1, 1}, {0, 0}}, gw, scratch);
        return;
    }
    const ActiveColumns active(x, samples, inputs, threshold, scratch);
    const bool is_cached = outputs * inputs <= CACHED;
    float* whole = scratch(inputs);
    std::memset(whole, 0, sizeof(float) * inputs);
    active.for_rows(g, outputs, scratch, [&](int64_t o, const float* sums) {
        float* row = gw + o * inputs;
        if (active.is_whole) {
            write(sums, inputs, row, is_cached);
            return;
        }
        for (size_t j = 0; j < active.columns.size(); ++j) whole[active.columns[j]] = sums[j];
        write(whole, inputs, row, is_cached);
    });
#if defined(__AVX2__)
    _mm_sfence();  // other threads see the result after this one has returned it
#endif
}

void add_outer_product(const float* g, const float* x, int64_t samples, int64_t outputs, int64_t inputs,
                       float threshold, float scale, float* weight, const Scratch& scratch) {
    const ActiveColumns active(x, samples, inputs, threshold, scratch);
    active.for_rows(g, outputs, scratch, [&](int64_t o, const float* sums) {
        float* row = weight + o * inputs;
        if (active.is_whole)
            for (int64_t i = 0; i < inputs; ++i) row[i] += scale * sums[i];
        else
            for (size_t j = 0; j < active.columns.size(); ++j) {
                __builtin_prefetch(row + active.columns[j] + AHEAD * inputs, 1);
                row[active.columns[j]] += scale * sums[j];
            }
    });
}

}  // namespace sparse
