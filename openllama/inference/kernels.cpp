// A pass of a few new tokens through all layers: the formulas of model.py as loops over the weights where they lie.
//
// A token needs every weight once, so a pass takes the time of reading them. Each product goes through its matrix once,
// in order, for all rows of its input. Activations are float32. Products with integers round their inputs to 16 bits;
// where the processor multiplies pairs of bfloat16, those of four rows or more with bfloat16 round to that type. The
// products of prompts, whose passes are the model's, stand by themselves.
//
// Shapes: N rows (the new tokens of all sequences), C hidden size, I intermediate size, H heads, D head dim, S keys,
// V vocabulary. structs.py mirrors the structs. All threads run all functions: `omp for` divides a loop among them.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// ---- numbers and vectors ----

// Integers are multiplied in vectors of 16 shorts, whose products are added two by two, on every processor.
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int16_t ShortsAt __attribute__((vector_size(32), aligned(2)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));
typedef float FloatsAt __attribute__((vector_size(32), aligned(4)));

// A bfloat16 is the upper half of a float32.
inline float get(const uint16_t* p) {
    uint32_t word = uint32_t(*p) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

inline void put(uint16_t* p, float value) {  // the nearest, ties to even
    uint32_t word;
    memcpy(&word, &value, 4);
    *p = value == value ? uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16) : 0x7fc0;
}

inline float get(const float* p) { return *p; }
inline void put(float* p, float value) { *p = value; }
inline Floats eight(const float* p) { return *(const FloatsAt*)p; }

#ifdef __AVX2__  // one instruction or two each, which compilers do not find by themselves
inline Floats eight(const uint16_t* p) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline Shorts widen(const int8_t* p) { return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline Shorts widen(const uint8_t* p) { return (Shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline Ints pairs(Shorts a, Shorts b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline Shorts scaled(Shorts a, int16_t scale) {  // a * scale / 2^15, the nearest
    return (Shorts)_mm256_mulhrs_epi16((__m256i)a, _mm256_set1_epi16(scale));
}
#else
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t HalvesAt __attribute__((vector_size(16), aligned(2)));
typedef int8_t SignedAt __attribute__((vector_size(16), aligned(1)));
typedef uint8_t BytesAt __attribute__((vector_size(16), aligned(1)));
inline Floats eight(const uint16_t* p) { return (Floats)(__builtin_convertvector(*(const HalvesAt*)p, Words) << 16); }
inline Shorts widen(const int8_t* p) { return __builtin_convertvector(*(const SignedAt*)p, Shorts); }
inline Shorts widen(const uint8_t* p) { return __builtin_convertvector(*(const BytesAt*)p, Shorts); }
inline Ints pairs(Shorts a, Shorts b) {
    Ints x = (Ints)a, y = (Ints)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
}
inline Shorts scaled(Shorts a, int16_t scale) {
    for (int i = 0; i < 16; i++) a[i] = a[i] * scale + 0x4000 >> 15;
    return a;
}
#endif

// Floats are multiplied in the longest vectors there are; those of less than 8 numbers are the compiler's to split.
#ifdef __AVX512F__
typedef float Vector __attribute__((vector_size(64)));
typedef float VectorAt __attribute__((vector_size(64), aligned(4)));
const int WIDTH = 16, REGISTERS = 32;
inline Vector load(const float* p) { return *(const VectorAt*)p; }
inline Vector load(const uint16_t* p) {
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
#else
typedef Floats Vector;
typedef FloatsAt VectorAt;
const int WIDTH = 8, REGISTERS = 16;
template <class Number>
Vector load(const Number* p) { return eight(p); }
#endif

// a * b + c, rounded once where processors can. Compilers do so in one copy of a loop and not in the next, and then the
// numbers of a row would depend on how many rows are computed with it.
#if defined(__AVX2__) && defined(__FMA__)
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
template <class Any>
Any fused(Any a, Any b, Any c) { return a * b + c; }
#endif
#ifdef __AVX512F__
inline Vector fused(Vector a, Vector b, Vector c) {
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#endif

template <class Number>
Floats eight(const Number* p, int count) {  // with zeros after the first `count`
    if (count == 8) return eight(p);
    Floats v = {};
    for (int i = 0; i < count; i++) v[i] = get(p + i);
    return v;
}

// What is loaded stays in a register: compilers would read it again for each product, and reading bounds the products.
template <class Any>
void hold(Any& v) {
#ifdef __AVX2__
    asm("" : "+v"(v));
#endif
}

template <class Any>
float sum(Any v) {
    for (int width = sizeof(Any) / sizeof(v[0]) / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

// ---- matrices ----

const int GROUP = 32;
enum Kind { FLOAT32, BFLOAT16, INT8, INT4 };

struct Matrix {
    const void* data;
    const void* scale;  // INT8: float32, one per row; INT4: bfloat16, one per group
    int64_t rows, columns, kind;
};

// How a group of 32 numbers lies in memory; it is read as two vectors of 16, each number OFFSET too large.
struct Int8 {
    static const int BYTES = 32, OFFSET = 0;
    static void read(const uint8_t* p, Shorts w[2]) {
        w[0] = widen((const int8_t*)p), w[1] = widen((const int8_t*)p + 16);
    }
};

struct Int4 {  // byte j: element j in the lower half, element j + 16 in the upper
    static const int BYTES = 16, OFFSET = 8;
    static void read(const uint8_t* p, Shorts w[2]) {
        Shorts bytes = widen(p);
        w[0] = bytes & 15, w[1] = bytes >> 4;
    }
};

// out (columns,) = the numbers of a row of a quantised matrix
template <class Number>
void restore_row(const Matrix& m, int64_t row, Number* out) {
    int64_t groups = (m.columns + GROUP - 1) / GROUP;
    if (m.kind == INT8) {
        const int8_t* data = (const int8_t*)m.data + row * m.columns;
        float scale = ((const float*)m.scale)[row];
        for (int64_t k = 0; k < m.columns; k++) put(out + k, data[k] * scale);
        return;
    }
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t* data = (const uint8_t*)m.data + (row * groups + g) * Int4::BYTES;
        float scale = get((const uint16_t*)m.scale + row * groups + g);
        Number numbers[GROUP];
        for (int j = 0; j < 16; j++) put(numbers + j, ((data[j] & 15) - Int4::OFFSET) * scale);
        for (int j = 0; j < 16; j++) put(numbers + 16 + j, ((data[j] >> 4) - Int4::OFFSET) * scale);
        memcpy(out + g * GROUP, numbers, std::min<int64_t>(GROUP, m.columns - g * GROUP) * sizeof(Number));
    }
}

template <class Number>
void restore(const Matrix& m, Number* out) {
    #pragma omp for schedule(static)
    for (int64_t row = 0; row < m.rows; row++) restore_row(m, row, out + row * m.columns);
}

// ---- products of a few rows ----

const int TILE = 6;   // how many rows of x are multiplied at a time, at most
const int ROWS = 12;  // of the matrix: a multiple of how many are multiplied at a time

// The rows of x in one of the tiles that share out n as evenly as can be: 8 are 4 and 4.
struct Share {
    int64_t tile, tiles, first, rows;
    static int64_t count(int64_t n) { return (n + TILE - 1) / TILE; }
    static int64_t most(int64_t n) { return (n + count(n) - 1) / count(n); }
    Share(int64_t tile, int64_t n)
        : tile(tile), tiles(count(n)), first(tile * n / tiles), rows((tile + 1) * n / tiles - first) {}
};

// y[n][row] = x[n] . m[row] for N rows of x and `count` of the matrix from `row` on. The kernel's `tile` computes R of
// them at a time; rows of y are `m.rows` apart.
template <class Kernel, int R, int N>
void tiles_of(const Matrix& m, int64_t row, int64_t count, const typename Kernel::Input& x, const Share& part, float* y,
              bool add) {
    static_assert(ROWS % R == 0);
    int64_t last = row + count;
    y += part.first * m.rows;
    for (; row + R <= last; row += R) Kernel::template tile<R, N>(m, row, x, part, y + row, add);
    for (; row < last; row++) Kernel::template tile<1, N>(m, row, x, part, y + row, add);
}

// For tiles of N rows. The second is for those beside tiles of N + 1: in turn, all take as many rows of the matrix.
template <class Kernel, int N>
const decltype(&tiles_of<Kernel, 1, 1>) TILES[2] = {tiles_of<Kernel, Kernel::rows(N), N>,
                                                    tiles_of<Kernel, Kernel::rows(Kernel::IN_TURN ? N + 1 : N), N>};

// Every tile of x reads all rows of the matrix. If the tiles take a few rows in turn, each can fetch a part of the next
// rows, and the memory is read all the time.
template <class Kernel>
void multiply(const Matrix& m, const typename Kernel::Input& x, float* y, int64_t n, bool add) {
    static const decltype(&TILES<Kernel, 1>[0]) tiles[TILE] = {TILES<Kernel, 1>, TILES<Kernel, 2>, TILES<Kernel, 3>,
                                                               TILES<Kernel, 4>, TILES<Kernel, 5>, TILES<Kernel, 6>};
    if (!n) return;
    std::vector<Share> parts;
    for (int64_t tile = 0; tile < Share::count(n); tile++) parts.emplace_back(tile, n);
    int64_t most = Share::most(n), step = parts.size() > 1 && Kernel::IN_TURN ? Kernel::rows(most) : ROWS;
    // A processor that others use, too, does less.
    #pragma omp for schedule(guided, 2) nowait
    for (int64_t block = 0; block < m.rows; block += ROWS) {
        int64_t last = std::min(block + ROWS, m.rows);
        for (int64_t row = block; row < last; row += step)
            for (const Share& part : parts)
                tiles[part.rows - 1][part.rows < most](m, row, std::min(step, last - row), x, part, y, add);
    }
}

// Sums as vectors over columns, in the longest vectors there are.
template <class Number>
struct Plain {
    static const bool IN_TURN = true;  // as reading takes longer than computing, or nearly so
    typedef const float* Input;
    static constexpr int rows(int n) {  // their sums, their numbers and one of x are in registers
        return std::min(4, (REGISTERS - 1) / (n + 1));
    }

    template <int R, int N>
    static void tile(const Matrix& m, int64_t row, const float* x, const Share& part, float* y, bool add) {
        const bool alone = N <= TILE / 2;  // its place is k; so is that of the 3 in 7 = 3 + 4, which fetches too much
        const Number* rows[R];
        for (int r = 0; r < R; r++) rows[r] = (const Number*)m.data + (row + r) * m.columns;
        Vector sums[R][N] = {};
        int64_t whole = m.columns / WIDTH * WIDTH;
        int64_t place = part.tile * whole / part.tiles, stride = (WIDTH + part.tiles - 1) / part.tiles;
        x += part.first * m.columns;
        for (int64_t k = 0; k < whole; k += WIDTH, place += stride) {
            Vector w[R];
            for (int r = 0; r < R; r++) {
                w[r] = load(rows[r] + k);
                __builtin_prefetch(rows[r] + R * m.columns + (alone ? k : place));  // of the next R rows
            }
            for (int n = 0; n < N; n++) {
                Vector in = load(x + n * m.columns + k);
                hold(in);
                for (int r = 0; r < R; r++) sums[r][n] = fused(w[r], in, sums[r][n]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) {
                float total = sum(sums[r][n]), *out = y + n * m.rows + r;
                for (int64_t k = whole; k < m.columns; k++)
                    total = fused(get(rows[r] + k), x[n * m.columns + k], total);
                *out = total + (add ? *out : 0);
            }
    }
};

#ifdef __AVX512BF16__
// The same for bfloat16 and x rounded to it: products of pairs are added in one instruction.
struct Narrow {
    static const bool IN_TURN = false;  // not measured
    typedef std::vector<uint16_t> Input;
    static constexpr int rows(int) { return 4; }

    static Input rounded(const float* x, int64_t size) {
        Input halves(size);
        for (int64_t i = 0; i < size; i += WIDTH)
            _mm256_storeu_si256((__m256i*)&halves[i], (__m256i)_mm512_cvtneps_pbh((__m512)load(x + i)));
        return halves;
    }

    template <int R, int N>
    static void tile(const Matrix& m, int64_t row, const Input& x, const Share& part, float* y, bool add) {
        const uint16_t *rows = (const uint16_t*)m.data + row * m.columns, *in = &x[part.first * m.columns];
        __m512 sums[R][N] = {};
        for (int64_t k = 0; k < m.columns; k += GROUP) {
            __m512bh w[R];
            for (int r = 0; r < R; r++) {
                w[r] = (__m512bh)_mm512_loadu_si512(rows + r * m.columns + k);
                __builtin_prefetch(rows + (R + r) * m.columns + k);
            }
            for (int n = 0; n < N; n++) {
                __m512bh numbers = (__m512bh)_mm512_loadu_si512(in + n * m.columns + k);
                for (int r = 0; r < R; r++) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], w[r], numbers);
            }
        }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) {
                float* out = y + n * m.rows + r;
                *out = sum((Vector)sums[r][n]) + (add ? *out : 0);
            }
    }
};
#endif

// Numbers of 16 bits from -highest to highest, the nearest to x / scale; returns the scale, NaN where x is not finite.
float round_part(const float* x, int64_t size, float highest, int16_t* numbers) {
    Floats highs = {}, checks = {};
    for (int64_t k = 0; k < size; k += 8) {
        Floats v = eight(x + k, int(std::min<int64_t>(8, size - k))), absolute = v > 0 ? v : -v;
        highs = absolute > highs ? absolute : highs;
        checks += v * 0;
    }
    float largest = 0, check = sum(checks);
    for (int i = 0; i < 8; i++) largest = std::max(largest, highs[i]);
    float factor = largest > 1e-30f ? highest / largest : 0;  // smaller ones count as zero
    for (int64_t k = 0; k < size; k++) numbers[k] = int16_t(int(x[k] * factor + (x[k] < 0 ? -.5f : .5f)));
    return largest / highest + check;
}

// Rows of x, each group of which has a scale: x = number * scale.
struct Rounded {
    std::vector<int16_t> numbers;
    std::vector<float> scales, totals;  // of each group: the scale, and the sum of the numbers

    Rounded(const float* x, int64_t size) : numbers(size), scales(size / GROUP), totals(size / GROUP) {
        for (int64_t g = 0; g < size / GROUP; g++) {
            scales[g] = round_part(x + g * GROUP, GROUP, 32767, &numbers[g * GROUP]);
            int total = 0;
            for (int k = 0; k < GROUP; k++) total += numbers[g * GROUP + k];
            totals[g] = total;
        }
    }
};

// Integers of a group are multiplied and added exactly; eight groups at a time, as their scales are read together.
template <class Kind>
struct Integer {
    static const bool IN_TURN = false;  // as computing takes longer than reading
    typedef Rounded Input;
    static constexpr int rows(int n) { return n == 1 ? 1 : 2; }

    template <int R, int N>
    static void tile(const Matrix& m, int64_t row, const Rounded& x, const Share& part, float* y, bool add) {
        int64_t groups = m.columns / GROUP, first = part.first;
        const uint8_t* data = (const uint8_t*)m.data + row * groups * Kind::BYTES;
        const uint16_t* scales = (const uint16_t*)m.scale + row * groups;
        Floats sums[R][N] = {}, offsets[R][N] = {};
        auto some = [&](int64_t start, int count) {
            float scale[R][N][8];
            for (int n = 0; n < N; n++) {
                int64_t at = (first + n) * groups + start;
                for (int r = 0; r < R; r++) {
                    Floats of = eight(&x.scales[at], count);
                    if (Kind::OFFSET) {
                        of *= eight(scales + r * groups + start, count);
                        offsets[r][n] = fused(of, eight(&x.totals[at], count), offsets[r][n]);
                    }
                    *(FloatsAt*)scale[r][n] = of;
                }
            }
            Floats parts[R][N] = {};  // in registers, which `sums` are not
            for (int i = 0; i < count; i++) {
                Shorts w[R][2];
                for (int r = 0; r < R; r++) {
                    const uint8_t* group = data + (r * groups + start + i) * Kind::BYTES;
                    Kind::read(group, w[r]);
                    __builtin_prefetch(group + 4096);
                }
                for (int n = 0; n < N; n++) {
                    const ShortsAt* in = (const ShortsAt*)&x.numbers[((first + n) * groups + start + i) * GROUP];
                    Shorts lower = in[0], upper = in[1];
                    if (R > 1) hold(lower), hold(upper);
                    for (int r = 0; r < R; r++) {
                        Ints products = pairs(w[r][0], lower) + pairs(w[r][1], upper);
                        parts[r][n] = fused(__builtin_convertvector(products, Floats), scale[r][n][i] - Floats{},
                                            parts[r][n]);
                    }
                }
            }
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++) sums[r][n] += parts[r][n];
        };
        int64_t start = 0;
        for (; start + 8 <= groups; start += 8) some(start, 8);
        if (start < groups) some(start, int(groups - start));
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) {
                float total = sum(sums[r][n] - Kind::OFFSET * offsets[r][n]), *out = y + n * m.rows + r;
                *out = fused(total, Kind::OFFSET ? 1 : ((const float*)m.scale)[row + r], add ? *out : 0);
            }
    }
};

// The same where the last group of a row is not whole.
void odd_multiply(const Matrix& m, const float* x, float* y, int64_t n, bool add) {
    std::vector<float> numbers(m.columns);
    Matrix one{numbers.data(), nullptr, 1, m.columns, FLOAT32};
    #pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < m.rows; row++) {
        restore_row(m, row, numbers.data());
        for (int64_t i = 0; i < n; i++)
            Plain<float>::tile<1, 1>(one, 0, x + i * m.columns, Share(0, 1), y + i * m.rows + row, add);
    }
}

// ---- products of many rows ----

// Sums are vectors over rows of the matrix, and each number of x is multiplied by two vectors of them. So a panel of
// PANEL rows is widened, to float32 or to integers of 16 bits, and turned: the numbers of a column (integers: of two
// columns), one word of each row, lie together. So do those of a tile of x. PANELS panels of SPAN columns are what a
// cache holds.
const int SPAN = 256, PANELS = 16;

// out (words, rows) = in (rows, words): rows are SPAN numbers apart in `in`, columns `apart` words in `out`. A word is
// a float or two integers. Eight rows are turned by vectors.
template <class Number>
void turn(const Number* in, int64_t rows, int64_t words, Number* out, int64_t apart) {
    const int64_t each = 4 / sizeof(Number);
    int64_t k = 0;
#ifdef __AVX2__
    auto two = [&](int64_t row) {  // words of two rows
        auto four = [&](int64_t row) { return _mm_loadu_ps((const float*)(in + row * SPAN + k * each)); };
        return _mm256_set_m128(four(row + 4), four(row));
    };
    for (; rows == 8 && k + 4 <= words; k += 4) {
        __m256 a = two(0), b = two(1), c = two(2), d = two(3);
        __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
        __m256 upper_ab = _mm256_unpackhi_ps(a, b), upper_cd = _mm256_unpackhi_ps(c, d);
        __m256 columns[4] = {_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee),
                             _mm256_shuffle_ps(upper_ab, upper_cd, 0x44), _mm256_shuffle_ps(upper_ab, upper_cd, 0xee)};
        for (int i = 0; i < 4; i++) _mm256_storeu_ps((float*)(out + (k + i) * apart * each), columns[i]);
    }
#endif
    for (; k < words; k++)
        for (int64_t row = 0; row < rows; row++) memcpy(out + (k * apart + row) * each, in + row * SPAN + k * each, 4);
}

// Integers of x and of the matrix: their products over a span are added in 32 bits.
const int INT8_INPUT = 32767, INT4_INPUT = 4095, INT4_WEIGHT = 2048;
static_assert(int64_t(SPAN) * INT8_INPUT * 128 <= INT32_MAX && int64_t(SPAN) * INT4_INPUT * INT4_WEIGHT <= INT32_MAX);

// numbers (size,) = x, rounded if they are integers; returns their scale.
template <class Activation>
float widen_input(const Activation* x, int64_t size, int64_t, float* numbers) {
    for (int64_t k = 0; k < size; k++) numbers[k] = get(x + k);
    return 1;
}
template <class Activation>
float widen_input(const Activation* x, int64_t size, int64_t kind, int16_t* numbers) {
    float floats[SPAN];
    widen_input(x, size, kind, floats);
    return round_part(floats, size, kind == INT8 ? INT8_INPUT : INT4_INPUT, numbers);
}

// A part of a row of the matrix: out (size,) = its numbers; returns their scale.
float widen_part(const Matrix& m, int64_t row, int64_t first, int64_t size, float* out) {
    if (m.kind == FLOAT32) memcpy(out, (const float*)m.data + row * m.columns + first, size * sizeof(float));
    else for (int64_t k = 0; k < size; k++) out[k] = get((const uint16_t*)m.data + row * m.columns + first + k);
    return 1;
}

float widen_part(const Matrix& m, int64_t row, int64_t first, int64_t size, int16_t* out) {
    if (m.kind == INT8) {
        const int8_t* data = (const int8_t*)m.data + row * m.columns + first;
        for (int64_t k = 0; k < size; k++) out[k] = data[k];
        return ((const float*)m.scale)[row];
    }
    int64_t groups = (size + GROUP - 1) / GROUP, group = row * ((m.columns + GROUP - 1) / GROUP) + first / GROUP;
    const uint8_t* data = (const uint8_t*)m.data + group * Int4::BYTES;
    const uint16_t* scales = (const uint16_t*)m.scale + group;
    float largest = 0, check = 0;  // NaN if a scale is not finite
    for (int64_t g = 0; g < groups; g++) {
        largest = std::max(largest, std::fabs(get(scales + g)));
        check += get(scales + g) * 0;
    }
    for (int64_t g = 0; g < groups; g++) {
        int16_t scale = largest > 0 ? std::lrint(get(scales + g) / largest * 32767) : 0;
        Shorts w[2];
        Int4::read(data + g * Int4::BYTES, w);
        for (int half = 0; half < 2; half++) {
            Shorts part = scaled((w[half] - Int4::OFFSET) * (INT4_WEIGHT / 8), scale);
            memcpy(out + g * GROUP + half * 16, &part, sizeof part);
        }
    }
    return largest * (32768.f / 32767 * 8 / INT4_WEIGHT) + check;
}

// One step of a sum over columns: a number of x (of integers two) is multiplied by those of all rows of a vector.
struct FloatStep {
    typedef float Number;
    typedef Vector Sum;
    static const int NUMBERS = 1, ROWS = WIDTH;
    static Vector broadcast(const float* x) { return *x - Vector{}; }
    static void add(Sum& sum, const float* w, Vector x) { sum = fused(load(w), x, sum); }
    static VectorAt floats(Sum sum) { return sum; }
};

struct IntStep {
    typedef int16_t Number;
    typedef Ints Sum;
    static const int NUMBERS = 2, ROWS = 8;
    static Shorts broadcast(const int16_t* x) {
        int32_t two;
        memcpy(&two, x, 4);
        return (Shorts)(two - Ints{});
    }
    static void add(Sum& sum, const int16_t* w, Shorts x) { sum += pairs(*(const ShortsAt*)w, x); }
    static FloatsAt floats(Sum sum) { return __builtin_convertvector(sum, Floats); }
};

// Parts of `room`, each from a line of a cache on; without a room they only count.
struct Room {
    float* at;
    int64_t floats = 0;

    template <class Number>
    Number* take(int64_t size) {
        float* part = at + floats;
        floats += (size * sizeof(Number) + 63) / 64 * 16;
        return (Number*)part;
    }
};

template <class Step>
struct PanelProduct {
    typedef typename Step::Number Number;
    static const int PANEL = 2 * Step::ROWS;

    const Matrix& m;
    int64_t n, spans, block;  // rows of x, spans of columns, rows of the matrix that are multiplied at a time
    Number* x;                // (spans, tiles, SPAN / NUMBERS, rows of the tile, NUMBERS)
    float* x_scales;          // (spans, N)
    Number* panels;           // of each thread: (block / PANEL, SPAN / NUMBERS, PANEL, NUMBERS)
    float* sums;              // of each thread: (N, block)

    PanelProduct(const Matrix& m, int64_t n, int64_t threads, Room& room) : m(m), n(n) {
        spans = (m.columns + SPAN - 1) / SPAN;
        int64_t all = (m.rows + PANEL - 1) / PANEL, each = (all + threads - 1) / threads;
        block = PANEL * std::min<int64_t>(PANELS, each);
        x = room.take<Number>(spans * n * SPAN), x_scales = room.take<float>(spans * n);
        panels = room.take<Number>(threads * block * SPAN), sums = room.take<float>(threads * n * block);
    }

    int64_t size(int64_t span) const { return std::min<int64_t>(SPAN, m.columns - span * SPAN); }

    int64_t words(int64_t span) const { return (size(span) + Step::NUMBERS - 1) / Step::NUMBERS; }

    template <class Activation>
    void read(const Activation* in) const {
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < Share::count(n) * spans; i++) {
            alignas(64) Number numbers[TILE * SPAN] = {};  // the last pair of an odd number has a zero
            Share tile(i / spans, n);
            int64_t span = i % spans, item = span * n + tile.first;
            for (int64_t row = 0; row < tile.rows; row++)
                x_scales[item + row] = widen_input(in + (tile.first + row) * m.columns + span * SPAN, size(span),
                                                   m.kind, numbers + row * SPAN);
            turn(numbers, tile.rows, words(span), x + item * SPAN, tile.rows);
        }
    }

    // w (SPAN / NUMBERS, PANEL, NUMBERS) = rows of the matrix from `row` on; zeros after the last
    void widen_panel(int64_t row, int64_t span, Number* w, float* scales) const {
        alignas(64) Number numbers[8 * SPAN];  // beside the columns anything: x has zeros there
        for (int64_t first = 0; first < PANEL; first += 8) {
            for (int64_t r = 0; r < 8; r++) {
                Number* out = numbers + r * SPAN;
                bool is_row = row + first + r < m.rows;
                scales[first + r] = is_row ? widen_part(m, row + first + r, span * SPAN, size(span), out) : 0;
                if (!is_row) std::fill_n(out, SPAN, Number(0));
            }
            turn(numbers, 8, words(span), w + first * Step::NUMBERS, PANEL);
        }
    }

    // sums[n][r] += x[n] . w[r] over a span, for N rows of x from `first` on and the rows of a panel
    template <int N>
    static void tile(const PanelProduct& self, const Number* w, const float* scales, int64_t span, int64_t first,
                     float* sums) {
        int64_t item = span * self.n + first;
        const Number* in = self.x + item * SPAN;
        typename Step::Sum totals[N][2] = {};
        for (int64_t k = 0; k < self.words(span); k++)
            for (int n = 0; n < N; n++) {
                auto number = Step::broadcast(in + (k * N + n) * Step::NUMBERS);
                hold(number);
                for (int half = 0; half < 2; half++)
                    Step::add(totals[n][half], w + (k * PANEL + half * Step::ROWS) * Step::NUMBERS, number);
            }
        for (int n = 0; n < N; n++)
            for (int half = 0; half < 2; half++) {
                typedef decltype(Step::floats(totals[n][half])) Part;
                Part& out = *(Part*)(sums + (first + n) * self.block + half * Step::ROWS);
                Part scale = *(const Part*)(scales + half * Step::ROWS) * self.x_scales[item + n];
                out += Step::floats(totals[n][half]) * scale;
            }
    }

    // own (N, block) += x @ the rows of `count` panels of the matrix from `row` on, over a span; `w` has room for them
    void multiply_block(int64_t row, int64_t count, int64_t span, Number* w, float* own) const {
        static const decltype(&tile<1>) tiles[TILE] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
        alignas(64) float scales[PANELS * PANEL];
        for (int64_t p = 0; p < count; p++)
            widen_panel(row + p * PANEL, span, w + p * PANEL * SPAN, scales + p * PANEL);
        for (int64_t t = 0; t < Share::count(n); t++) {
            Share part(t, n);
            for (int64_t p = 0; p < count; p++)
                tiles[part.rows - 1](*this, w + p * PANEL * SPAN, scales + p * PANEL, span, part.first,
                                     own + p * PANEL);
        }
    }

    template <class Activation>
    void multiply(Activation* y) const {
        Number* w = panels + omp_get_thread_num() * block * SPAN;
        float* own = sums + omp_get_thread_num() * n * block;
        #pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < m.rows; row += block) {
            int64_t rows = std::min<int64_t>(block, m.rows - row);
            std::fill_n(own, n * block, 0.f);
            for (int64_t span = 0; span < spans; span++)
                multiply_block(row, (rows + PANEL - 1) / PANEL, span, w, own);
            for (int64_t i = 0; i < n; i++)
                for (int64_t r = 0; r < rows; r++) put(y + i * m.rows + row + r, own[i * block + r]);
        }
    }
};

// Returns how many floats of room it needs; computes where there is room.
template <class Step, class Activation>
int64_t many(const Matrix& m, const Activation* x, Activation* y, int64_t n, float* memory, int64_t threads) {
    Room room{memory};
    PanelProduct<Step> product(m, n, threads, room);
    if (!memory) return room.floats;
    #pragma omp parallel num_threads(threads)
    {
        product.read(x);
        product.multiply(y);
    }
    return room.floats;
}

// y (N, rows) = x (N, columns) @ m.T, added to what is there if `add`. The caller waits.
void product(const Matrix& m, const float* x, float* y, int64_t n, bool add = false) {
    if (m.kind == FLOAT32) multiply<Plain<float>>(m, x, y, n, add);
#ifdef __AVX512BF16__
    else if (m.kind == BFLOAT16 && n >= 4 && m.columns % GROUP == 0)
        multiply<Narrow>(m, Narrow::rounded(x, n * m.columns), y, n, add);
#endif
    else if (m.kind == BFLOAT16) multiply<Plain<uint16_t>>(m, x, y, n, add);
    else if (m.columns % GROUP) odd_multiply(m, x, y, n, add);
    else if (m.kind == INT8) multiply<Integer<Int8>>(m, Rounded(x, n * m.columns), y, n, add);
    else multiply<Integer<Int4>>(m, Rounded(x, n * m.columns), y, n, add);
}

// ---- the formulas of model.py ----

struct Layer {
    const void *attention_norm, *mlp_norm;  // (C,)
    Matrix q, k, v, o, gate, up, down;
    void *keys, *values;  // of the cache: (B, H, room, D)
};

struct Model {
    const Layer* layers;
    const void* norm;  // (C,)
    Matrix head;       // (V, C)
    int64_t count, size, intermediate, heads, head_dim;
    int64_t norm_kind, cache_kind;  // FLOAT32 or BFLOAT16
    float eps;
};

struct Pass {
    int64_t batch, length, past, room;  // N = batch * length new tokens after `past` cached ones; room of the cache
    int64_t keep;                       // logits of the last `keep` tokens of each sequence
    int64_t threads;
    const float *cos, *sin;             // (N, D), as rope.cos_sin makes them: both halves, the first of sin negative
    const uint8_t* mask;                // (B, past + length), 0 for padding; or null
    float* x;                           // (N, C): embeddings in, hidden states after the final norm out
    float* logits;                      // (B, keep, V)
    float* work;                        // room for the buffers below
};

void wait() {
    #pragma omp barrier
}

// x / rms(x) * weight, row by row; x and out are (N, C) and may be the same.
template <class Number>
void rms_norm(const float* x, const Number* weight, float* out, int64_t n, const Model& model) {
    #pragma omp for schedule(static)
    for (int64_t row = 0; row < n; row++) {
        const float* in = x + row * model.size;
        double squares = 0;
        for (int64_t c = 0; c < model.size; c++) squares += double(in[c]) * in[c];
        float scale = 1 / std::sqrt(float(squares / model.size) + model.eps);
        for (int64_t c = 0; c < model.size; c++) out[row * model.size + c] = get(weight + c) * (in[c] * scale);
    }
}

void norm(const float* x, const void* weight, float* out, int64_t n, const Model& model) {
    if (model.norm_kind == FLOAT32) rms_norm(x, (const float*)weight, out, n, model);
    else rms_norm(x, (const uint16_t*)weight, out, n, model);
}

// Turn each feature pair by its position's angle, as rope.rotate; head (D,).
void rotate(float* head, const float* cos, const float* sin, int64_t dim) {
    for (int64_t d = 0; d < dim / 2; d++) {
        float first = head[d], second = head[d + dim / 2];
        head[d] = first * cos[d] + second * sin[d];
        head[d + dim / 2] = second * cos[d + dim / 2] + first * sin[d + dim / 2];
    }
}

// Rotate queries and keys (N, H, D) and write the keys and values into the cache.
template <class Number>
void append(const Model& model, const Layer& layer, const Pass& pass, float* q, float* k, const float* v) {
    int64_t dim = model.head_dim;
    #pragma omp for schedule(static)
    for (int64_t item = 0; item < pass.batch * pass.length * model.heads; item++) {
        int64_t row = item / model.heads, head = item % model.heads;
        int64_t sequence = row / pass.length, position = pass.past + row % pass.length;
        const float *cos = pass.cos + row * dim, *sin = pass.sin + row * dim;
        rotate(q + item * dim, cos, sin, dim);
        rotate(k + item * dim, cos, sin, dim);
        int64_t place = ((sequence * model.heads + head) * pass.room + position) * dim;
        for (int64_t d = 0; d < dim; d++) {
            put((Number*)layer.keys + place + d, k[item * dim + d]);
            put((Number*)layer.values + place + d, v[item * dim + d]);
        }
    }
}

// out (D,) += weights (S,) . values (S, D)
template <int S, class Number>
void mix(const float* weights, const Number* values, int64_t dim, float* out) {
    int64_t d = 0;
    for (; d + WIDTH <= dim; d += WIDTH) {
        Vector total = load(out + d);
        for (int s = 0; s < S; s++) {
            __builtin_prefetch(values + (s + 2 * S) * dim + d);
            total = fused(weights[s] - Vector{}, load(values + s * dim + d), total);
        }
        *(VectorAt*)(out + d) = total;
    }
    for (; d < dim; d++)
        for (int s = 0; s < S; s++) out[d] = fused(weights[s], get(values + s * dim + d), out[d]);
}

// softmax(q . keys / sqrt(D)) . values of one token and head; `scores` has room for all keys.
template <class Number>
void attend(const Number* keys, const Number* values, const uint8_t* mask, int64_t seen, int64_t dim, const float* q,
            float* scores, float* out) {
    Matrix matrix{keys, nullptr, seen, dim, sizeof(Number) == 4 ? FLOAT32 : BFLOAT16};
    tiles_of<Plain<Number>, Plain<Number>::rows(1), 1>(matrix, 0, seen, q, Share(0, 1), scores, false);
    float scale = 1 / std::sqrt(float(dim)), highest = -INFINITY, total = 0;
    for (int64_t s = 0; s < seen; s++) {
        scores[s] = mask && !mask[s] ? -INFINITY : scores[s] * scale;
        highest = std::max(highest, scores[s]);
    }
    for (int64_t s = 0; s < seen; s++) {  // padding weighs 0, as in the model; what sees nothing gets 0
        scores[s] = scores[s] == -INFINITY ? 0 : std::exp(scores[s] - highest);
        total += scores[s];
    }
    std::fill_n(out, dim, 0.f);
    int64_t s = 0;
    for (; s + 4 <= seen; s += 4) mix<4>(scores + s, values + s * dim, dim, out);
    for (; s < seen; s++) mix<1>(scores + s, values + s * dim, dim, out);
    for (int64_t d = 0; d < dim; d++) out[d] /= total > 0 ? total : 1;
}

template <class Number>
void attention(const Model& model, const Layer& layer, const Pass& pass, const float* q, float* scores, float* out) {
    int64_t dim = model.head_dim, keys = pass.past + pass.length;
    scores += omp_get_thread_num() * keys;
    #pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < pass.batch * pass.length * model.heads; item++) {
        int64_t row = item / model.heads, head = item % model.heads, sequence = row / pass.length;
        int64_t place = (sequence * model.heads + head) * pass.room * dim;
        attend((const Number*)layer.keys + place, (const Number*)layer.values + place,
               pass.mask ? pass.mask + sequence * keys : nullptr, pass.past + row % pass.length + 1, dim,
               q + item * dim, scores, out + item * dim);
    }
}

// down(silu(gate(x)) * up(x)), added to y
void mlp(const Layer& layer, const float* x, float* gate, float* up, float* y, int64_t n) {
    product(layer.gate, x, gate, n);
    product(layer.up, x, up, n);
    wait();
    #pragma omp for schedule(static)
    for (int64_t i = 0; i < n * layer.up.rows; i++) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
    product(layer.down, gate, y, n, true);
    wait();
}

template <class Number>
void forward(const Model& model, const Pass& pass) {
    int64_t n = pass.batch * pass.length, size = n * model.size;
    float *normed = pass.work, *q = normed + size, *k = q + size, *v = k + size, *mixed = v + size;
    float *gate = mixed + size, *up = gate + n * model.intermediate, *scores = up + n * model.intermediate;
    for (int64_t l = 0; l < model.count; l++) {
        const Layer& layer = model.layers[l];
        norm(pass.x, layer.attention_norm, normed, n, model);
        product(layer.q, normed, q, n);
        product(layer.k, normed, k, n);
        product(layer.v, normed, v, n);
        wait();
        append<Number>(model, layer, pass, q, k, v);
        attention<Number>(model, layer, pass, q, scores, mixed);
        product(layer.o, mixed, pass.x, n, true);
        wait();
        norm(pass.x, layer.mlp_norm, normed, n, model);
        mlp(layer, normed, gate, up, pass.x, n);
    }
    norm(pass.x, model.norm, pass.x, n, model);
    #pragma omp for schedule(static)
    for (int64_t row = 0; row < pass.batch * pass.keep; row++) {
        int64_t from = (row / pass.keep + 1) * pass.length - pass.keep + row % pass.keep;
        memcpy(normed + row * model.size, pass.x + from * model.size, model.size * sizeof(float));
    }
    product(model.head, normed, pass.logits, pass.batch * pass.keep);
}

}  // namespace

// ---- what Python calls ----

extern "C" {

// Floats that `Pass.work` must have room for.
int64_t openllama_room(const Model* model, int64_t batch, int64_t length, int64_t past, int64_t threads) {
    return batch * length * (5 * model->size + 2 * model->intermediate) + threads * (past + length);
}

void openllama_forward(const Model* model, const Pass* pass) {
    #pragma omp parallel num_threads(pass->threads)
    {
        if (model->cache_kind == FLOAT32) forward<float>(*model, *pass);
        else forward<uint16_t>(*model, *pass);
    }
}

// `out` is float32 or bfloat16, as `kind` says.
void openllama_restore(const Matrix* matrix, void* out, int64_t kind, int64_t threads) {
    #pragma omp parallel num_threads(threads)
    {
        if (kind == FLOAT32) restore(*matrix, (float*)out);
        else restore(*matrix, (uint16_t*)out);
    }
}

// y (N, rows) = x (N, columns) @ matrix.T, for N of dozens, both float32 or bfloat16, as `kind` says; returns how many
// floats of room it needs. `room` starts at a line of a cache; without it nothing is computed.
int64_t openllama_many(const Matrix* matrix, const void* x, void* y, int64_t kind, int64_t n, float* room,
                       int64_t threads) {
    bool floats = matrix->kind == FLOAT32 || matrix->kind == BFLOAT16;
    auto compute = [&](auto* y) {
        auto in = (decltype(y))x;
        return floats ? many<FloatStep>(*matrix, in, y, n, room, threads)
                      : many<IntStep>(*matrix, in, y, n, room, threads);
    };
    return kind == FLOAT32 ? compute((float*)y) : compute((uint16_t*)y);
}

// y (N, rows) = x (N, columns) @ matrix.T
void openllama_product(const Matrix* matrix, const float* x, float* y, int64_t n, int64_t threads) {
    #pragma omp parallel num_threads(threads)
    product(*matrix, x, y, n);
}

}
