// Vectors of floats by the compiler's vector extensions: 16 lanes with AVX-512, else 8.
//
// A wider vector than the machine's is split by the compiler, so the code is the same everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sparse {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr int REGISTERS = 32;
#else
constexpr int WIDTH = 8;
constexpr int REGISTERS = 16;
#endif

template <int L>
struct Lanes {
    typedef float type __attribute__((vector_size(L * 4), aligned(4), may_alias));
    typedef int32_t index __attribute__((vector_size(L * 4)));
};
template <int L>
using Vec = typename Lanes<L>::type;

template <int L>
inline Vec<L> load(const float* from) {
    return *reinterpret_cast<const Vec<L>*>(from);
}

template <int L>
inline void store(float* to, Vec<L> value) {
    *reinterpret_cast<Vec<L>*>(to) = value;
}

template <int L>
inline Vec<L> fill(float value) {
    return Vec<L>{} + value;
}

// The first `count` of L floats; the others are 0.
template <int L>
inline Vec<L> load_some(const float* from, int64_t count) {
    float buffer[L] = {};
    std::memcpy(buffer, from, sizeof(float) * count);
    return load<L>(buffer);
}

template <int L>
inline void store_some(float* to, Vec<L> value, int64_t count) {
    float buffer[L];
    store<L>(buffer, value);
    std::memcpy(to, buffer, sizeof(float) * count);
}

// Transpose L vectors of L floats in registers: log2(L) rounds of interleaving vector i with vector i + L/2.
template <int L>
inline void transpose(Vec<L> (&rows)[L]) {
    typename Lanes<L>::index low, high;
    for (int lane = 0; lane < L; ++lane) {
        low[lane] = lane / 2 + (lane % 2) * L;
        high[lane] = low[lane] + L / 2;
    }
#pragma GCC unroll 8
    for (int round = 1; round < L; round *= 2) {
        Vec<L> next[L];
#pragma GCC unroll 16
        for (int i = 0; i < L / 2; ++i) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) rows[i] = next[i];
    }
}

}  // namespace sparse
