// The active elements of a weight, by output and by input channel.

#include <algorithm>

#include "kernels.h"
#include "scan.h"

namespace sparse {
namespace {

constexpr int64_t SAMPLED = 32;  // one row of so many is counted to foresee the number of active elements

// The number of active elements, if the sampled rows are like the others, and some more.
int64_t foresee(const float* matrix, int64_t rows, int64_t columns, float threshold, const Buffers& buffers) {
    int64_t found = 0, seen = 0;
    for (int64_t row = std::min(rows, SAMPLED) / 2; row < rows; row += SAMPLED, ++seen)
        found += scan(matrix + row * columns, columns, threshold, 0, buffers.indices.get(), buffers.values.get());
    return seen ? found * rows / seen * 17 / 16 : 0;
}

}  // namespace

Buffers::Buffers(int64_t size) : room(size), indices(new int32_t[size]), values(new float[size]) {}

void Buffers::grow(int64_t used, int64_t size) {
    Buffers larger(size);
    std::copy_n(indices.get(), used, larger.indices.get());
    std::copy_n(values.get(), used, larger.values.get());
    *this = std::move(larger);
}

OwnedRows scan_rows(const float* matrix, int64_t rows, int64_t columns, float threshold) {
    OwnedRows found{std::vector<int32_t>(rows + 1, 0), Buffers(columns + SLACK)};
    Buffers& entries = found.entries;
    entries.grow(0, foresee(matrix, rows, columns, threshold, entries) + columns + SLACK);
    int64_t number = 0;
    for (int64_t row = 0; row < rows; ++row) {
        if (number + columns + SLACK > entries.room) entries.grow(number, 2 * number + columns + SLACK);
        number += scan(matrix + row * columns, columns, threshold, 0, entries.indices.get() + number,
                       entries.values.get() + number);
        found.pointers[row + 1] = static_cast<int32_t>(number);
    }
    return found;
}

OwnedRows by_channel(const Rows& filters, int64_t channels, int64_t taps) {
    const int64_t size = filters.pointers[filters.rows];
    std::vector<int32_t> channel_of(filters.columns), tap_of(filters.columns);
    for (int64_t i = 0; i < filters.columns; ++i) channel_of[i] = i / taps, tap_of[i] = i % taps;
    OwnedRows turned{std::vector<int32_t>(channels + 1, 0), Buffers(size)};
    for (int64_t i = 0; i < size; ++i) ++turned.pointers[channel_of[filters.indices[i]] + 1];
    for (int64_t c = 0; c < channels; ++c) turned.pointers[c + 1] += turned.pointers[c];
    std::vector<int32_t> next(turned.pointers.begin(), turned.pointers.end() - 1);
    for (int64_t row = 0; row < filters.rows; ++row)
        for (int64_t i = filters.pointers[row]; i < filters.pointers[row + 1]; ++i) {
            const int32_t index = filters.indices[i], to = next[channel_of[index]]++;
            turned.entries.indices[to] = static_cast<int32_t>(row * taps) + tap_of[index];
            turned.entries.values[to] = filters.values[i];
        }
    return turned;
}

}  // namespace sparse
