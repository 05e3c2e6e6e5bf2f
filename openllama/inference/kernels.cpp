// A pass of a few new tokens through all layers: the formulas of model.py as loops over the weights where they lie.
//
// A token needs every weight once, so a pass takes the time of reading them. Each product goes through its matrix once,
// in order, for all rows of its input. Activations are float32; where the processor multiplies pairs of bfloat16, int4 and
// passes of four rows or more round the inputs of products.
//
// Shapes: N rows (the new tokens of all sequences), C hidden size, I intermediate size, H heads, D head dim, S keys,
// V vocabulary. structs.py mirrors the structs. All threads run all functions: `omp for` divides a loop among them.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// ---- vectors of 16 numbers, which the compiler splits where the processor has shorter ones ----

const int WIDTH = 16;
typedef float Vector __attribute__((vector_size(64)));
typedef float FloatsAt __attribute__((vector_size(64), aligned(4)));
typedef uint16_t HalvesAt __attribute__((vector_size(32), aligned(2)));
typedef uint8_t BytesAt __attribute__((vector_size(16), aligned(1)));
typedef int8_t SignedAt __attribute__((vector_size(16), aligned(1)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

inline float sum(Vector v) {
    for (int width = WIDTH / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

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
inline Vector load(const float* p) { return *(const FloatsAt*)p; }
inline Vector load(const uint16_t* p) { return (Vector)(__builtin_convertvector(*(const HalvesAt*)p, Words) << 16); }

inline void store(float* p, Vector v) { *(FloatsAt*)p = v; }
inline void store(uint16_t* p, Vector v) {  // of finite numbers
    Words words = (Words)v;
    *(HalvesAt*)p = __builtin_convertvector((words + 0x7fff + (words >> 16 & 1)) >> 16, HalvesAt);
}

#ifdef __AVX512F__  // one instruction each, which compilers do not find by themselves
inline Ints widen(const int8_t* p) { return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline Ints widen(const uint8_t* p) { return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline Vector nibbles(Ints v) {  // the lower four bits, minus 8
    const Vector values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (Vector)_mm512_permutexvar_ps((__m512i)v, (__m512)values);
}
#else
inline Ints widen(const int8_t* p) { return __builtin_convertvector(*(const SignedAt*)p, Ints); }
inline Ints widen(const uint8_t* p) { return __builtin_convertvector(*(const BytesAt*)p, Ints); }
inline Vector nibbles(Ints v) { return __builtin_convertvector((v & 15) - 8, Vector); }
#endif

// ---- rows of matrices, read as floats in groups of 32 ----

#ifdef __AVX512BF16__
typedef __m512bh Pairs;  // 32 bfloat16, whose products with 32 others are added two by two in one instruction
const __m512i INT4_VALUES = [] {  // -8 ... 7 in bfloat16, twice, as an index has 5 bits
    uint16_t values[32];
    for (int i = 0; i < 32; i++) put(values + i, float(i % 16 - 8));
    return _mm512_loadu_si512(values);
}();
#endif

const int GROUP = 32;
enum Kind { FLOAT32, BFLOAT16, INT8, INT4 };

struct Matrix {
    const void* data;
    const void* scale;  // INT8: float32, one per row; INT4: bfloat16, one per group
    int64_t rows, columns, kind;
};

template <class Number>
struct PlainRow {
    const Number* data;
    PlainRow() = default;
    PlainRow(const Matrix& m, int64_t row) : data((const Number*)m.data + row * m.columns) {}
    void group(int64_t k, Vector w[2]) const {
        for (int half = 0; half < 2; half++) w[half] = load(data + k + half * WIDTH);
    }
    const void* at(int64_t k) const { return data + k; }
    float one(int64_t k) const { return get(data + k); }
    float factor() const { return 1; }
#ifdef __AVX512BF16__
    static const bool INTERLEAVED = false;
    Pairs pairs(int64_t k) const { return (Pairs)_mm512_loadu_si512(data + k); }
    float group_scale(int64_t) const { return 1; }
#endif
};

struct Int8Row {
    const int8_t* data;
    float scale;
    Int8Row() = default;
    Int8Row(const Matrix& m, int64_t row)
        : data((const int8_t*)m.data + row * m.columns), scale(((const float*)m.scale)[row]) {}
    void group(int64_t k, Vector w[2]) const {
        for (int half = 0; half < 2; half++) w[half] = __builtin_convertvector(widen(data + k + half * WIDTH), Vector);
    }
    const void* at(int64_t k) const { return data + k; }
    float one(int64_t k) const { return data[k]; }
    float factor() const { return scale; }
#ifdef __AVX512BF16__
    static const bool INTERLEAVED = false;
    float group_scale(int64_t) const { return 1; }
    Pairs pairs(int64_t k) const {
        Vector w[2];
        group(k, w);
        return _mm512_cvtne2ps_pbh((__m512)w[1], (__m512)w[0]);  // exact: 8 bits are enough for -127 to 127
    }
#endif
};

struct Int4Row {  // byte j of a group: element j in the lower half, element j + 16 in the upper; (half - 8) * scale
    const uint8_t* data;
    const uint16_t* scales;
    Int4Row() = default;
    Int4Row(const Matrix& m, int64_t row) {
        int64_t groups = (m.columns + GROUP - 1) / GROUP;
        data = (const uint8_t*)m.data + row * groups * (GROUP / 2);
        scales = (const uint16_t*)m.scale + row * groups;
    }
    void group(int64_t k, Vector w[2]) const {
        Ints bytes = widen(data + k / 2);
        float scale = get(scales + k / GROUP);
        w[0] = nibbles(bytes) * scale, w[1] = nibbles(bytes >> 4) * scale;
    }
    const void* at(int64_t k) const { return data + k / 2; }
    float one(int64_t k) const {
        int byte = data[k / GROUP * WIDTH + k % WIDTH];
        return ((k % GROUP < WIDTH ? byte & 15 : byte >> 4) - 8) * get(scales + k / GROUP);
    }
    float factor() const { return 1; }
#ifdef __AVX512BF16__
    static const bool INTERLEAVED = true;  // elements 0 16 1 17 ... 15 31, still without the scale
    Pairs pairs(int64_t k) const {
        Ints bytes = widen(data + k / 2);
        return (Pairs)_mm512_permutexvar_epi16((__m512i)(bytes | bytes << 12), INT4_VALUES);
    }
    float group_scale(int64_t k) const { return get(scales + k / GROUP); }
#endif
};

// ---- products ----

// y[n][row] = x[n] . m[row], for R rows of the matrix and N of x; rows of y are `m.rows` apart.
template <class Row, int R, int N>
void tile(const Matrix& m, int64_t row, const float* x, float* y, bool add) {
    Row rows[R];
    for (int r = 0; r < R; r++) rows[r] = Row(m, row + r);
    Vector sums[R][N] = {};
    int64_t whole = m.columns / GROUP * GROUP;
    int64_t bytes = (const char*)rows[0].at(m.columns) - (const char*)rows[0].at(0);
    int64_t ahead = R * bytes < 32768 ? R * bytes : 4096;  // the same place in the next tile
    for (int64_t k = 0; k < whole; k += GROUP) {
        Vector w[R][2];
        for (int r = 0; r < R; r++) {
            rows[r].group(k, w[r]);
            __builtin_prefetch((const char*)rows[r].at(k) + ahead);
        }
        for (int half = 0; half < 2; half++)
            for (int n = 0; n < N; n++) {
                Vector part = load(x + n * m.columns + k + half * WIDTH);
                for (int r = 0; r < R; r++) sums[r][n] += w[r][half] * part;
            }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float total = sum(sums[r][n]);
            for (int64_t k = whole; k < m.columns; k++) total += rows[r].one(k) * x[n * m.columns + k];
            float* out = y + n * m.rows + row + r;
            *out = total * rows[r].factor() + (add ? *out : 0);
        }
}

#ifdef __AVX512BF16__
// The same for x in bfloat16.
template <class Row, int R, int N>
void narrow_tile(const Matrix& m, int64_t row, const uint16_t* x, float* y, bool add) {
    Row rows[R];
    for (int r = 0; r < R; r++) rows[r] = Row(m, row + r);
    __m512 sums[R][N] = {};
    int64_t bytes = (const char*)rows[0].at(m.columns) - (const char*)rows[0].at(0);
    for (int64_t k = 0; k < m.columns; k += GROUP) {
        Pairs w[R];
        float scale[R];
        for (int r = 0; r < R; r++) {
            w[r] = rows[r].pairs(k);
            scale[r] = rows[r].group_scale(k);
            __builtin_prefetch((const char*)rows[r].at(k) + R * bytes);
        }
        for (int n = 0; n < N; n++) {
            Pairs part = (Pairs)_mm512_loadu_si512(x + n * m.columns + k);
            for (int r = 0; r < R; r++) {
                if (!Row::INTERLEAVED) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], w[r], part);
                else sums[r][n] += scale[r] * _mm512_dpbf16_ps(__m512{}, w[r], part);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float* out = y + n * m.rows + row + r;
            *out = sum((Vector)sums[r][n]) * rows[r].factor() + (add ? *out : 0);
        }
}

template <class Row>
void narrow_multiply(const Matrix& m, const float* x, float* y, int64_t n, bool add) {
    thread_local std::vector<uint16_t> halves;
    halves.resize(n * m.columns);
    for (int64_t i = 0; i < n * m.columns; i += GROUP) {
        __m256i first = (__m256i)_mm512_cvtneps_pbh((__m512)load(x + i));
        __m256i second = (__m256i)_mm512_cvtneps_pbh((__m512)load(x + i + WIDTH));
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        if (Row::INTERLEAVED)
            both = _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
        _mm512_storeu_si512(&halves[i], both);
    }
    #pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < m.rows; row += 4) {
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) narrow_tile<Row, 4, 4>(m, row, &halves[i * m.columns], y + i * m.rows, add);
        for (; i + 2 <= n; i += 2) narrow_tile<Row, 4, 2>(m, row, &halves[i * m.columns], y + i * m.rows, add);
        for (; i < n; i++) narrow_tile<Row, 4, 1>(m, row, &halves[i * m.columns], y + i * m.rows, add);
    }
}
#endif

template <class Row>
void multiply(const Matrix& m, const float* x, float* y, int64_t n, bool add) {
    #pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < m.rows; row += 8) {
        bool whole = row + 8 <= m.rows;
        const float* in = x;
        float* out = y;
        for (int64_t left = n; left > 0;) {
            int64_t step = !whole || left < 2 ? 1 : left < 4 ? 2 : 4;
            if (!whole)
                for (int64_t r = row; r < m.rows; r++) tile<Row, 1, 1>(m, r, in, out, add);
            else if (step == 4) tile<Row, 4, 4>(m, row, in, out, add), tile<Row, 4, 4>(m, row + 4, in, out, add);
            else if (step == 2) tile<Row, 8, 2>(m, row, in, out, add);
            else tile<Row, 8, 1>(m, row, in, out, add);
            left -= step, in += step * m.columns, out += step * m.rows;
        }
    }
}

// y (N, rows) = x (N, columns) @ m.T, added to what is there if `add`. The caller waits.
void product(const Matrix& m, const float* x, float* y, int64_t n, bool add = false) {
#ifdef __AVX512BF16__
    if (m.columns % GROUP == 0 && m.rows % 4 == 0) {
        if (m.kind == INT4) return narrow_multiply<Int4Row>(m, x, y, n, add);
        if (m.kind == INT8 && n >= 4) return narrow_multiply<Int8Row>(m, x, y, n, add);
        if (m.kind == BFLOAT16 && n >= 4) return narrow_multiply<PlainRow<uint16_t>>(m, x, y, n, add);
    }
#endif
    switch (m.kind) {
        case FLOAT32: return multiply<PlainRow<float>>(m, x, y, n, add);
        case BFLOAT16: return multiply<PlainRow<uint16_t>>(m, x, y, n, add);
        case INT8: return multiply<Int8Row>(m, x, y, n, add);
        case INT4: return multiply<Int4Row>(m, x, y, n, add);
    }
}

// out (rows, columns) = the numbers of a quantised matrix
template <class Row, class Number>
void restore(const Matrix& m, Number* out) {
    #pragma omp for schedule(static)
    for (int64_t r = 0; r < m.rows; r++) {
        Row row(m, r);
        Number* to = out + r * m.columns;
        int64_t k = 0;
        for (; k + GROUP <= m.columns; k += GROUP) {
            Vector w[2];
            row.group(k, w);
            for (int half = 0; half < 2; half++) store(to + k + half * WIDTH, w[half] * row.factor());
        }
        for (; k < m.columns; k++) put(to + k, row.one(k) * row.factor());
    }
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
    const float *cos, *sin;             // (N, D), as rope.cos_sin makes them: both halves, the first half of sin negative
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

template <class Number>
float dot(const float* a, const Number* b, int64_t size) {
    Vector sums = {};
    int64_t d = 0;
    for (; d + WIDTH <= size; d += WIDTH) sums += load(a + d) * load(b + d);
    float total = sum(sums);
    for (; d < size; d++) total += a[d] * get(b + d);
    return total;
}

// softmax(q . keys / sqrt(D)) . values of one token and head; `scores` has room for all keys.
template <class Number>
void attend(const Number* keys, const Number* values, const uint8_t* mask, int64_t seen, int64_t dim, const float* q,
            float* scores, float* __restrict out) {
    float scale = 1 / std::sqrt(float(dim)), highest = -INFINITY, total = 0;
    for (int64_t s = 0; s < seen; s++) {
        scores[s] = mask && !mask[s] ? -INFINITY : dot(q, keys + s * dim, dim) * scale;
        highest = std::max(highest, scores[s]);
    }
    for (int64_t d = 0; d < dim; d++) out[d] = 0;
    for (int64_t s = 0; s < seen; s++) {
        if (scores[s] == -INFINITY) continue;  // padding; a token that is padding itself sees nothing and gets 0
        float weight = std::exp(scores[s] - highest);
        total += weight;
        for (int64_t d = 0; d < dim; d++) out[d] += weight * get(values + s * dim + d);
    }
    for (int64_t d = 0; d < dim; d++) out[d] /= total > 0 ? total : 1;
}

template <class Number>
void attention(const Model& model, const Layer& layer, const Pass& pass, const float* q, float* scores, float* out) {
    int64_t dim = model.head_dim, keys = pass.past + pass.length;
    scores += omp_get_thread_num() * keys;
    #pragma omp for schedule(static)
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
        if (matrix->kind == INT8 && kind == FLOAT32) restore<Int8Row>(*matrix, (float*)out);
        else if (matrix->kind == INT8) restore<Int8Row>(*matrix, (uint16_t*)out);
        else if (kind == FLOAT32) restore<Int4Row>(*matrix, (float*)out);
        else restore<Int4Row>(*matrix, (uint16_t*)out);
    }
}

// y (N, rows) = x (N, columns) @ matrix.T
void openllama_product(const Matrix* matrix, const float* x, float* y, int64_t n, int64_t threads) {
    #pragma omp parallel num_threads(threads)
    product(*matrix, x, y, n);
}

}
