// Rounds matrices to integers: the functions of rounding.py, which explains them, in the same bits.
//
// Each product, quotient and sum rounds as torch's does, and sums are taken by halves in the same order. So this is
// compiled without contraction. What is computed of a row (int8) or of some groups (int4) stays in a core's cache.

#include <omp.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE __attribute__((always_inline))

namespace {

struct Matrix {  // rows of numbers, `stride` numbers apart
    const void* data;
    int64_t kind, rows, columns, stride;  // kind: 0 float32, 1 bfloat16, 2 float16
};

struct Format {
    const float* divisors;
    int64_t count;  // of divisors
    float low, high;
};

constexpr int GROUP = 32;  // numbers that share a scale of int4
#ifdef __AVX512F__
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;  // groups that are computed at a time, each in a lane of the vectors
typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));

// ---- numbers ----

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

inline float wide(uint32_t word) { return bits<float>(word); }
inline float wide(uint16_t bfloat) { return bits<float>(uint32_t(bfloat) << 16); }

struct Half {
    uint16_t word;
};
inline float wide(Half half) {
    float size = bits<float>(uint32_t(half.word & 0x7fff) << 13) * 0x1p112f;  // exponents differ by 112
    uint32_t beyond = (half.word & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return bits<float>(bits<uint32_t>(size) | beyond | uint32_t(half.word & 0x8000) << 16);
}

// Writes `count` numbers as float32; returns the bits of the largest size, which for NaN and infinity are the largest.
template <class Stored>
inline uint32_t widen(const Stored* stored, float* x, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        x[i] = wide(stored[i]);
        uint32_t size = bits<uint32_t>(x[i]) & 0x7fffffff;
        most = size > most ? size : most;
    }
    return most;
}

inline uint32_t widen(const Matrix& matrix, int64_t row, float* x) {
    int64_t start = row * matrix.stride;
    if (matrix.kind == 0) return widen((const uint32_t*)matrix.data + start, x, matrix.columns);
    if (matrix.kind == 1) return widen((const uint16_t*)matrix.data + start, x, matrix.columns);
    return widen((const Half*)matrix.data + start, x, matrix.columns);
}

inline bool finite(uint32_t size) { return size < 0x7f800000; }

// ---- formulas for a row, where T is a float, or for groups, where T is a vector ----

template <class T>
struct Products {
    T along, square;  // <w, q> and <q, q>
    Products operator+(Products other) const { return {along + other.along, square + other.square}; }
};

template <class T>
inline T inverse(T scale) {  // 0 where it is not finite, as that of 0
    T found = 1.0f / scale;
    return found - found == 0.0f ? found : T{};
}

// Clamped and rounded, ties to even: near 1.5 * 2^23 the next floats differ by 1.
template <class T>
inline T nearest(T x, const Format& form) {
    const T low = T{} + form.low, high = T{} + form.high;
    x = x < low ? low : x;
    x = x > high ? high : x;
    return (x + 0x1.8p23f) - 0x1.8p23f;
}

template <class Numbers, class T>
inline T best_scale(Numbers& numbers, T peak, const Format& form) {
    T fit{}, best = peak / form.divisors[0];
    const T first = numbers.stored(best);
    for (int64_t i = 0; i < form.count; i++) {
        const Products<T> sums = numbers.products(inverse<T>(peak / form.divisors[i]), form);
        const auto better = sums.along * sums.along > fit * sums.square;
        fit = better ? sums.along * sums.along / sums.square : fit;
        best = better ? sums.along / sums.square : best;
    }
    const T scale = numbers.stored(best);
    return numbers.error(scale, form) < numbers.error(first, form) ? scale : first;
}

// ---- int8: a row ----

struct Row {
    const float* x;
    int64_t count;
    float *one, *other;  // memory for as many numbers

    static float stored(float scale) { return scale; }

    Products<float> products(float inverse, const Format& form) {
        for (int64_t i = 0; i < count; i++) {
            const float q = nearest(x[i] * inverse, form);
            one[i] = x[i] * q;
            other[i] = q * q;
        }
        return {sum(one), sum(other)};
    }

    float error(float scale, const Format& form) {
        const float inverted = inverse(scale);
        for (int64_t i = 0; i < count; i++) {
            const float off = nearest(x[i] * inverted, form) * scale - x[i];
            one[i] = off * off;
        }
        return sum(one);
    }

    float sum(float* terms) const {
        for (int64_t length = count; length > 1; length /= 2) {
            const int64_t half = length / 2;
            for (int64_t i = 0; i < half; i++) terms[i] += terms[half + i];
            if (length % 2) terms[0] += terms[length - 1];
        }
        return terms[0];
    }
};

void round_row(Row& row, float size, const Format& form, int8_t* weight, float* scale) {
    *scale = best_scale(row, size, form);
    const float inverted = inverse(*scale);
    for (int64_t i = 0; i < row.count; i++) weight[i] = int8_t(nearest(row.x[i] * inverted, form));
}

// ---- int4: LANES groups of a row ----

struct Groups {
    Floats w[GROUP];  // the numbers j of the groups

    // A bfloat16 is the upper half of a float32; the nearest, ties to even.
    static Floats stored(Floats scale) {
        const Words word = (Words)scale;
        return (Floats)((word + 0x7fff + (word >> 16 & 1)) & 0xffff0000);
    }

    // By halves: the sum of the terms j, j + COUNT, j + 2 COUNT ... of each group.
    template <int COUNT, class Term>
    INLINE static auto sum(int j, const Term& term) {
        if constexpr (COUNT == GROUP)
            return term(j);
        else
            return sum<2 * COUNT>(j, term) + sum<2 * COUNT>(j + COUNT, term);
    }

    Products<Floats> products(Floats inverse, const Format& form) const {
        return sum<1>(0, [&](int j) INLINE {
            const Floats q = nearest(w[j] * inverse, form);
            return Products<Floats>{w[j] * q, q * q};
        });
    }

    Floats error(Floats scale, const Format& form) const {
        const Floats inverted = inverse(scale);
        return sum<1>(0, [&](int j) INLINE {
            const Floats off = nearest(w[j] * inverted, form) * scale - w[j];
            return off * off;
        });
    }

    static Floats absolute(Floats x) { return (Floats)((Words)x & 0x7fffffff); }

    Floats peak() const {
        Floats least = w[0], most = w[0];
        for (int j = 1; j < GROUP; j++) {
            least = w[j] < least ? w[j] : least;
            most = w[j] > most ? w[j] : most;
        }
        const Floats highest = absolute(most), lowest = absolute(least);
        const Floats size = highest > lowest ? highest : lowest;
        return most >= -least ? size : -size;
    }
};

// Groups that the row has no numbers for are computed, but only `count` are written.
void round_groups(const float* x, int64_t count, const Format& form, uint8_t* weight, uint16_t* scale) {
    Groups groups;
    float w[GROUP][LANES];
    for (int lane = 0; lane < LANES; lane++)
        for (int j = 0; j < GROUP; j++) w[j][lane] = x[lane * GROUP + j];
    memcpy(groups.w, w, sizeof(w));
    const Floats found = best_scale(groups, groups.peak(), form), inverted = inverse(found);
    const Words upper = (Words)found >> 16;
    Ints bytes[GROUP / 2];
    for (int j = 0; j < GROUP / 2; j++) {
        const Floats p = nearest(groups.w[j] * inverted, form) - form.low;
        const Floats q = nearest(groups.w[j + GROUP / 2] * inverted, form) - form.low;
        bytes[j] = __builtin_convertvector(p, Ints) | __builtin_convertvector(q, Ints) << 4;
    }
    for (int64_t lane = 0; lane < count; lane++) {
        scale[lane] = uint16_t(upper[lane]);
        for (int j = 0; j < GROUP / 2; j++) weight[lane * GROUP / 2 + j] = uint8_t(bytes[j][lane]);
    }
}

// ---- matrices ----

// Calls `part(row, x, size, work)` for each row x in float32 and the size of its largest number; `room` floats follow
// x, which are zeros at first. Returns whether all numbers are finite; if not, it leaves rows out.
template <class Part>
int64_t for_rows(const Matrix& matrix, int64_t room, int64_t threads, const Part& part) {
    std::atomic<bool> whole{true};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> x(matrix.columns + room);
#pragma omp for
        for (int64_t row = 0; row < matrix.rows; row++) {
            if (!whole.load(std::memory_order_relaxed)) continue;
            const uint32_t size = widen(matrix, row, x.data());
            if (finite(size))
                part(row, x.data(), wide(size));
            else
                whole = false;
        }
    }
    return whole;
}

}  // namespace

extern "C" {

int64_t openllama_is_finite(const Matrix* matrix, int64_t threads) {
    return for_rows(*matrix, 0, threads, [](int64_t, float*, float) {});
}

int64_t openllama_round_rows(
    const Matrix* matrix, const Format* form, int8_t* weight, float* scale, int64_t threads) {
    const int64_t columns = matrix->columns;
    return for_rows(*matrix, 2 * columns, threads, [&](int64_t row, float* x, float size) {
        Row numbers{x, columns, x + columns, x + 2 * columns};
        round_row(numbers, size, *form, weight + row * columns, scale + row);
    });
}

int64_t openllama_round_groups(
    const Matrix* matrix, const Format* form, uint8_t* weight, uint16_t* scale, int64_t threads) {
    const int64_t count = (matrix->columns + GROUP - 1) / GROUP;
    return for_rows(*matrix, GROUP * LANES, threads, [&](int64_t row, float* x, float) {
        for (int64_t first = 0; first < count; first += LANES) {
            const int64_t place = row * count + first, left = count - first;
            round_groups(
                x + first * GROUP, left < LANES ? left : LANES, *form, weight + place * GROUP / 2, scale + place);
        }
    });
}
}
