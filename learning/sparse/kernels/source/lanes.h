// Between torch's layouts and the one of the kernels, in which the samples of a block are the innermost dimension.
#pragma once

#include "vectors.h"

namespace sparse {

// An image tensor [num_samples, channels, height, width], contiguous or channels last.
struct Images {
    float* data;
    int64_t samples, channels, height, width;
    bool channels_last;
    float* at(int64_t sample) const { return data + sample * channels * height * width; }
};

// Load L rows of up to L floats, `pitch` floats apart, of which `rows` exist and `columns` are wanted, and transpose
// them.
template <int L>
inline void load_transposed(const float* from, int64_t pitch, int64_t rows, int64_t columns, Vec<L> (&block)[L]) {
    if (rows == L && columns == L) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) block[r] = load<L>(from + r * pitch);
    } else {
        for (int r = 0; r < L; ++r) {
            if (r >= rows)
                block[r] = fill<L>(0.0f);
            else
                block[r] = columns == L ? load<L>(from + r * pitch) : load_some<L>(from + r * pitch, columns);
        }
    }
    transpose<L>(block);
}

// Transpose L vectors of L floats, and store `rows` rows of `columns` floats, `pitch` floats apart.
template <int L>
inline void store_transposed(Vec<L> (&block)[L], float* to, int64_t pitch, int64_t rows, int64_t columns) {
    transpose<L>(block);
    if (rows == L && columns == L) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) store<L>(to + r * pitch, block[r]);
    } else {
        for (int64_t r = 0; r < rows; ++r) {
            if (columns == L)
                store<L>(to + r * pitch, block[r]);
            else
                store_some<L>(to + r * pitch, block[r], columns);
        }
    }
}

// Rows [row, row + rows) of all channels of samples [sample, sample + count) to [channels, rows, pitch, L].
// The first pixel of the first row goes to `to`; `plane` floats lie between channels.
template <int L>
void to_lanes(const Images& x, int64_t sample, int64_t count, int64_t row, int64_t rows, float* to, int64_t pitch,
              int64_t plane) {
    const int64_t size = x.channels * x.height * x.width, pixels = rows * x.width;
    const float* from = x.at(sample);
    Vec<L> block[L];
    if (x.channels_last) {
        from += row * x.width * x.channels;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t w = 0; w < x.width; ++w, from += x.channels)
                for (int64_t c = 0; c < x.channels; c += L) {
                    const int64_t channels = x.channels - c < L ? x.channels - c : L;
                    load_transposed<L>(from + c, size, count, channels, block);
                    float* pixel = to + c * plane + (r * pitch + w) * L;
                    for (int64_t i = 0; i < channels; ++i) store<L>(pixel + i * plane, block[i]);
                }
        return;
    }
    for (int64_t c = 0; c < x.channels; ++c) {
        const float* start = from + (c * x.height + row) * x.width;
        int64_t r = 0, w = 0;
        float* channel = to + c * plane;
        for (int64_t p = 0; p < pixels; p += L) {
            const int64_t some = pixels - p < L ? pixels - p : L;
            load_transposed<L>(start + p, size, count, some, block);
            for (int64_t i = 0; i < some; ++i) {
                store<L>(channel + (r * pitch + w) * L, block[i]);
                if (++w == x.width) w = 0, ++r;
            }
        }
    }
}

// [channels, rows, width, L] to rows [row, row + rows) of all channels of samples [sample, sample + count).
template <int L>
void from_lanes(const float* from, int64_t plane, const Images& y, int64_t sample, int64_t count, int64_t row,
                int64_t rows) {
    const int64_t size = y.channels * y.height * y.width, pixels = rows * y.width;
    float* to = y.at(sample);
    Vec<L> block[L];
    if (y.channels_last) {
        to += row * y.width * y.channels;
        for (int64_t p = 0; p < pixels; ++p, to += y.channels)
            for (int64_t c = 0; c < y.channels; c += L) {
                const int64_t channels = y.channels - c < L ? y.channels - c : L;
                for (int64_t i = 0; i < L; ++i)
                    block[i] = i < channels ? load<L>(from + (c + i) * plane + p * L) : fill<L>(0.0f);
                store_transposed<L>(block, to + c, size, count, channels);
            }
        return;
    }
    for (int64_t c = 0; c < y.channels; ++c) {
        float* start = to + (c * y.height + row) * y.width;
        const float* channel = from + c * plane;
        for (int64_t p = 0; p < pixels; p += L) {
            const int64_t some = pixels - p < L ? pixels - p : L;
            for (int64_t i = 0; i < L; ++i) block[i] = i < some ? load<L>(channel + (p + i) * L) : fill<L>(0.0f);
            store_transposed<L>(block, start + p, size, count, some);
        }
    }
}

}  // namespace sparse
