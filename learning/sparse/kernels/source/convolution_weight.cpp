// The gradient of a convolution's weight from a dense gradient and the active elements of the input.
//
// An active element a of channel c meets, in one row of the kernel, a run of neighbouring pixels of the gradient. With
// the output channels innermost, that run is contiguous: gw[:, c, kh, all kw] += a * run. The sums of a run stay in
// registers while the active elements of a channel are read. Blocks of output channels and groups of samples keep the
// gradient that is read in the second-level cache.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scan.h"

namespace sparse {
namespace {

constexpr int64_t BLOCK = 64;               // output channels
constexpr int64_t GROUP_BYTES = 384 << 10;  // gradient of a group of samples
constexpr int MAX_SUMS = REGISTERS == 32 ? 24 : 12;

struct Active {
    int32_t pixel;  // of the padded gradient of the group, where the run of the kernel's first row begins
    float value;
};

// sums += value * run for each active element; A vectors.
template <int A>
void accumulate(const Active* active, const Active* end, const float* gradient, int64_t width, float* to) {
    Vec<WIDTH> sums[A];
#pragma GCC unroll 32
    for (int i = 0; i < A; ++i) sums[i] = load<WIDTH>(to + i * WIDTH);
    for (; active != end; ++active) {
        const float* run = gradient + active->pixel * width;
        const Vec<WIDTH> value = fill<WIDTH>(active->value);
#pragma GCC unroll 32
        for (int i = 0; i < A; ++i) sums[i] += value * load<WIDTH>(run + i * WIDTH);
    }
#pragma GCC unroll 32
    for (int i = 0; i < A; ++i) store<WIDTH>(to + i * WIDTH, sums[i]);
}

using Accumulate = void (*)(const Active*, const Active*, const float*, int64_t, float*);

template <int... A>
constexpr Accumulate select(int64_t vectors, std::integer_sequence<int, A...>) {
    constexpr Accumulate table[] = {&accumulate<A + 1>...};
    return table[vectors - 1];
}

// One dimension: input index i has phase (i + padding) % stride, which the taps residue + stride * u meet, u < taps.
struct WeightAxis {
    int64_t stride, padding, kernel, top, padded;  // zeros before the gradient; its padded size
    WeightAxis(int64_t x_size, int64_t kernel_, int64_t stride_, int64_t padding_)
        : stride(stride_),
          padding(padding_),
          kernel(kernel_),
          top((kernel_ - 1) / stride_),
          padded((x_size - 1 + padding_) / stride_ + top + 1) {}
    int64_t phase(int64_t i) const { return (i + padding) % stride; }
    int64_t taps(int64_t phase) const { return phase < kernel ? (kernel - 1 - phase) / stride + 1 : 0; }
    int64_t last(int64_t i) const { return (i + padding) / stride + top; }  // padded index that tap u = 0 meets
};

// The active elements of a group of samples, by channel and phase.
struct Group {
    std::vector<Active> active;
    std::vector<int64_t> starts;  // by channel * phases + phase
};

class Lister {
 public:
    Lister(const Images& x, float threshold, const WeightAxis& down, const WeightAxis& across)
        : x_(x), threshold_(threshold), phases_(down.stride * across.stride), image_(down.padded * across.padded) {
        for (int64_t h = 0; h < x.height; ++h)
            for (int64_t w = 0; w < x.width; ++w) {
                const int64_t q = across.phase(w);
                pixels_.push_back(static_cast<int32_t>(down.last(h) * across.padded + across.last(w) -
                                                       std::max<int64_t>(across.taps(q) - 1, 0)));
                phase_of_.push_back(static_cast<int32_t>(down.phase(h) * across.stride + q));
            }
        const int64_t run = std::max(x.channels, x.height * x.width);
        positions_.resize(run + SLACK);
        values_.resize(run + SLACK);
    }

    Group list(int64_t sample, int64_t count) {
        Group group;
        group.starts.assign(x_.channels * phases_ + 1, 0);
        buckets_.clear();
        std::vector<Active> found;
        if (x_.channels_last)
            by_pixels(sample, count, found, group.starts);
        else
            by_channels(sample, count, found, group.starts);
        for (size_t i = 1; i < group.starts.size(); ++i) group.starts[i] += group.starts[i - 1];
        if (!x_.channels_last && phases_ == 1) {
            group.active = std::move(found);
            return group;
        }
        group.active.resize(found.size());
        std::vector<int64_t> next(group.starts.begin(), group.starts.end() - 1);
        for (size_t i = 0; i < found.size(); ++i) group.active[next[buckets_[i]]++] = found[i];
        return group;
    }

 private:
    void by_channels(int64_t sample, int64_t count, std::vector<Active>& found, std::vector<int64_t>& sizes) {
        const int64_t size = x_.height * x_.width;
        for (int64_t c = 0; c < x_.channels; ++c)
            for (int64_t n = 0; n < count; ++n) {
                const int64_t number =
                    scan(x_.at(sample + n) + c * size, size, threshold_, 0, positions_.data(), values_.data());
                const int32_t base = static_cast<int32_t>(n * image_);
                const size_t old = found.size();
                found.resize(old + number);
                for (int64_t i = 0; i < number; ++i) found[old + i] = {base + pixels_[positions_[i]], values_[i]};
                if (phases_ == 1) {
                    sizes[c + 1] += number;
                    continue;
                }
                for (int64_t i = 0; i < number; ++i) {
                    buckets_.push_back(static_cast<int32_t>(c * phases_ + phase_of_[positions_[i]]));
                    ++sizes[buckets_.back() + 1];
                }
            }
    }

    void by_pixels(int64_t sample, int64_t count, std::vector<Active>& found, std::vector<int64_t>& sizes) {
        const int64_t size = x_.height * x_.width;
        for (int64_t n = 0; n < count; ++n)
            for (int64_t p = 0; p < size; ++p) {
                const int64_t number = scan(x_.at(sample + n) + p * x_.channels, x_.channels, threshold_, 0,
                                            positions_.data(), values_.data());
                const int32_t pixel = static_cast<int32_t>(n * image_) + pixels_[p];
                for (int64_t i = 0; i < number; ++i) {
                    found.push_back({pixel, values_[i]});
                    buckets_.push_back(static_cast<int32_t>(positions_[i] * phases_) + phase_of_[p]);
                    ++sizes[buckets_.back() + 1];
                }
            }
    }

    const Images x_;
    const float threshold_;
    const int64_t phases_, image_;
    std::vector<int32_t> pixels_, phase_of_, positions_, buckets_;
    std::vector<float> values_;
};

// Output channels [first, first + channels) of a group of samples to [samples, padded height, padded width, width].
void pack_gradient(const Images& g, int64_t sample, int64_t count, int64_t first, int64_t channels, int64_t width,
                   const WeightAxis& down, const WeightAxis& across, float* to) {
    // The gradient's indices that lie in the padded one; taps never meet those outside.
    const int64_t rows = std::min(g.height, down.padded - down.top),
                  columns = std::min(g.width, across.padded - across.top);
    const int64_t size = g.height * g.width;
    for (int64_t n = 0; n < count; ++n, to += down.padded * across.padded * width)
        for (int64_t h = 0; h < rows; ++h) {
            float* pixel = to + ((h + down.top) * across.padded + across.top) * width;
            if (g.channels_last) {
                const float* from = g.at(sample + n) + h * g.width * g.channels + first;
                for (int64_t w = 0; w < columns; ++w)
                    std::memcpy(pixel + w * width, from + w * g.channels, sizeof(float) * channels);
                continue;
            }
            const float* from = g.at(sample + n) + first * size + h * g.width;
            Vec<WIDTH> block[WIDTH];
            for (int64_t c = 0; c < channels; c += WIDTH)
                for (int64_t w = 0; w < columns; w += WIDTH) {
                    const int64_t some = std::min<int64_t>(WIDTH, columns - w);
                    load_transposed<WIDTH>(from + c * size + w, size, std::min<int64_t>(WIDTH, channels - c), some,
                                           block);
                    for (int64_t i = 0; i < some; ++i) store<WIDTH>(pixel + (w + i) * width + c, block[i]);
                }
        }
}

}  // namespace

void convolution_weight(const Images& g, const Images& x, float threshold, const Geometry& geometry, float* gw,
                        const Scratch& scratch) {
    const auto& [kernel, stride, padding] = geometry;
    const WeightAxis down(x.height, kernel[0], stride[0], padding[0]),
        across(x.width, kernel[1], stride[1], padding[1]);
    const int64_t taps = kernel[0] * kernel[1], phases = stride[0] * stride[1], columns = x.channels * taps;
    const int64_t widest = std::min(BLOCK, (g.channels + WIDTH - 1) / WIDTH * WIDTH),
                  image = down.padded * across.padded;
    const int64_t group = std::clamp<int64_t>(GROUP_BYTES / (4 * widest * image), 1, std::max<int64_t>(x.samples, 1));
    Lister lister(x, threshold, down, across);
    std::vector<Group> groups;
    for (int64_t sample = 0; sample < x.samples; sample += group)
        groups.push_back(lister.list(sample, std::min(group, x.samples - sample)));

    // Where the sums of each column of gw are: a row of taps is in falling order within its phase.
    std::vector<int64_t> place(taps), begin(phases * kernel[0]);
    for (int64_t r = 0, next = 0; r < kernel[0]; ++r)
        for (int64_t q = 0; q < stride[1]; ++q) {
            begin[r * stride[1] + q] = next;
            for (int64_t u = across.taps(q) - 1; u >= 0; --u) place[r * kernel[1] + q + u * stride[1]] = next++;
        }
    float* packed = scratch(group * image * widest);
    float* sums = scratch(columns * widest);
    for (int64_t first = 0; first < g.channels; first += BLOCK) {
        const int64_t channels = std::min(BLOCK, g.channels - first), width = (channels + WIDTH - 1) / WIDTH * WIDTH;
        std::memset(packed, 0, sizeof(float) * group * image * width);
        std::memset(sums, 0, sizeof(float) * columns * width);
        for (size_t index = 0; index < groups.size(); ++index) {
            const int64_t sample = index * group;
            pack_gradient(g, sample, std::min(group, x.samples - sample), first, channels, width, down, across, packed);
            for (int64_t c = 0; c < x.channels; ++c)
                for (int64_t phase = 0; phase < phases; ++phase) {
                    const int64_t* starts = &groups[index].starts[c * phases + phase];
                    if (starts[0] == starts[1]) continue;
                    const int64_t residue = phase / stride[1], q = phase % stride[1];
                    const int64_t vectors = across.taps(q) * width / WIDTH, parts = (vectors + MAX_SUMS - 1) / MAX_SUMS;
                    for (int64_t u = 0; u < down.taps(residue); ++u) {
                        const float* from = packed - u * across.padded * width;
                        float* to = sums + (c * taps + begin[(residue + u * stride[0]) * stride[1] + q]) * width;
                        for (int64_t part = 0, done = 0; part < parts; ++part) {
                            const int64_t some = (vectors - done) / (parts - part);
                            const Active* active = groups[index].active.data();
                            select(some, std::make_integer_sequence<int, MAX_SUMS>())(
                                active + starts[0], active + starts[1], from + done * WIDTH, width, to + done * WIDTH);
                            done += some;
                        }
                    }
                }
        }
        Vec<WIDTH> block[WIDTH];
        for (int64_t o = 0; o < channels; o += WIDTH)
            for (int64_t column = 0; column < columns; column += WIDTH) {
                const int64_t some = std::min<int64_t>(WIDTH, columns - column);
                for (int64_t i = 0; i < WIDTH; ++i) {
                    const int64_t from = column + std::min(i, some - 1);
                    block[i] = load<WIDTH>(sums + (from / taps * taps + place[from % taps]) * width + o);
                }
                store_transposed<WIDTH>(block, gw + (first + o) * columns + column, columns,
                                        std::min<int64_t>(WIDTH, channels - o), some);
            }
    }
}

}  // namespace sparse
