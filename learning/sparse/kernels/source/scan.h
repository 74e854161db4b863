// Positions and values of the active elements of a run of floats: those whose magnitude is at least the threshold.
//
// An element that is not a number is active, so that it is not lost.
#pragma once

#include <cmath>

#include "vectors.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sparse {

// Room that `scan` needs after the last active element.
constexpr int SLACK = 16;

#if defined(__AVX2__) && !defined(__AVX512F__)
struct Compression {
    alignas(32) int32_t lanes[256][8];
    constexpr Compression() : lanes() {
        for (int mask = 0; mask < 256; ++mask) {
            int count = 0;
            for (int lane = 0; lane < 8; ++lane)
                if (mask >> lane & 1) lanes[mask][count++] = lane;
        }
    }
};
inline constexpr Compression COMPRESSION;
#endif

// Writes the active elements' positions, counted from `first`, and their values; returns their number.
inline int64_t scan(const float* from, int64_t count, float threshold, int32_t first, int32_t* positions,
                    float* values) {
    int64_t found = 0, i = 0;
#if defined(__AVX512F__)
    const __m512 limit = _mm512_set1_ps(threshold);
    __m512i position = _mm512_add_epi32(_mm512_set1_epi32(first),
                                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i step = _mm512_set1_epi32(16);
    for (; i + 16 <= count; i += 16) {
        const __m512 value = _mm512_loadu_ps(from + i);
        const __mmask16 active = _mm512_cmp_ps_mask(_mm512_abs_ps(value), limit, _CMP_NLT_UQ);
        _mm512_storeu_ps(values + found, _mm512_maskz_compress_ps(active, value));
        _mm512_storeu_si512(positions + found, _mm512_maskz_compress_epi32(active, position));
        found += __builtin_popcount(active);
        position = _mm512_add_epi32(position, step);
    }
#elif defined(__AVX2__)
    const __m256 limit = _mm256_set1_ps(threshold), sign = _mm256_set1_ps(-0.0f);
    __m256i position = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i step = _mm256_set1_epi32(8);
    for (; i + 8 <= count; i += 8) {
        const __m256 value = _mm256_loadu_ps(from + i);
        const int active = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, value), limit, _CMP_NLT_UQ));
        const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(COMPRESSION.lanes[active]));
        _mm256_storeu_ps(values + found, _mm256_permutevar8x32_ps(value, lanes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions + found),
                            _mm256_permutevar8x32_epi32(position, lanes));
        found += __builtin_popcount(active);
        position = _mm256_add_epi32(position, step);
    }
#endif
    for (; i < count; ++i) {
        values[found] = from[i];
        positions[found] = first + static_cast<int32_t>(i);
        found += !(std::fabs(from[i]) < threshold);
    }
    return found;
}

}  // namespace sparse
