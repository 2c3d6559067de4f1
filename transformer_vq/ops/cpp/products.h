// Products of small matrices that stay in a core's own cache, exp, and turns by an angle.
//
// One micro kernel makes MR x NR numbers at a time. What it reads is laid out first so that it reads on and on: in panels
// of NR columns that hold NR rows turned upright, or in stripes of NR columns. Rows of a few hundred numbers would fall
// into few sets of the cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using std::int64_t;

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif
constexpr int MR = 6;  // rows of the micro kernel's tile: 2·MR sums and two loads fill 16 registers

template <class R>
struct Of {
    static constexpr int VL = BYTES / sizeof(R);
    static constexpr int NR = 2 * VL;
    typedef R vec __attribute__((vector_size(BYTES)));
    typedef R loose __attribute__((vector_size(BYTES), aligned(sizeof(R)), may_alias));
};

template <class R>
inline typename Of<R>::vec load(const R* x) {
    return *reinterpret_cast<const typename Of<R>::loose*>(x);
}

template <class R>
inline void store(R* x, typename Of<R>::vec y) {
    *reinterpret_cast<typename Of<R>::loose*>(x) = y;
}

// sum += a b, all in registers. A core shares what it can begin with its neighbour on the same silicon, so a kernel must
// begin few operations for each multiplication: left to themselves, compilers read b again for every use and move sums
// from register to register.
template <class R>
__attribute__((always_inline)) inline void add_product(typename Of<R>::vec& sum, typename Of<R>::vec a,
                                                       typename Of<R>::vec b) {
#if defined(__FMA__)
    if constexpr (sizeof(R) == 4)
        asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    else
        asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
    sum += a * b;
#endif
}

// C (rows x NR) = or += A B: A's row i at A + i·lda, or Aᵀ's row k at A + k·lda (upright); B's row k at B + k·ldb.
template <class R, bool upright, int rows>
inline void micro(int64_t depth, const R* A, int64_t lda, const R* B, int64_t ldb, R* C, int64_t ldc, bool add) {
    using F = Of<R>;
    constexpr int STEPS = 4;  // between two looks at whether there are more
    typename F::vec left[rows], right[rows];
    const R* at[rows];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        at[i] = A + i * lda;
        if (!upright) asm("" : "+r"(at[i]));  // or there would be addresses of i·lda + k, more than registers
        left[i] = add ? load(C + i * ldc) : typename F::vec{};
        right[i] = add ? load(C + i * ldc + F::VL) : typename F::vec{};
    }
    const auto step = [&](int64_t k, int u) __attribute__((always_inline)) {
        const auto b0 = load(B + u * ldb), b1 = load(B + u * ldb + F::VL);
        const R* across = A + u * lda;
        if (upright && !__builtin_constant_p(lda)) asm("" : "+r"(across));  // as above
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const auto a = (upright ? across[i] : at[i][k + u]) - typename F::vec{};
            add_product<R>(left[i], a, b0);
            add_product<R>(right[i], a, b1);
        }
    };
    int64_t k = 0;
    for (; k + STEPS <= depth; k += STEPS, A += upright ? STEPS * lda : 0, B += STEPS * ldb) {
#pragma GCC unroll 4
        for (int u = 0; u < STEPS; u++) step(k, u);
    }
    for (; k < depth; k++, A += upright ? lda : 0, B += ldb) step(k, 0);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) store(C + i * ldc, left[i]), store(C + i * ldc + F::VL, right[i]);
}

// The same for 1 … MR rows.
template <class R, bool upright>
inline void micro(int64_t rows, int64_t depth, const R* A, int64_t lda, const R* B, int64_t ldb, R* C, int64_t ldc,
                  bool add) {
    switch (rows) {
        case 1:
            return micro<R, upright, 1>(depth, A, lda, B, ldb, C, ldc, add);
        case 2:
            return micro<R, upright, 2>(depth, A, lda, B, ldb, C, ldc, add);
        case 3:
            return micro<R, upright, 3>(depth, A, lda, B, ldb, C, ldc, add);
        case 4:
            return micro<R, upright, 4>(depth, A, lda, B, ldb, C, ldc, add);
        case 5:
            return micro<R, upright, 5>(depth, A, lda, B, ldb, C, ldc, add);
        case 6:
            return micro<R, upright, 6>(depth, A, lda, B, ldb, C, ldc, add);
    }
}

// Call work(first, n) on rows [from, to) in groups of at most MR, of sizes as equal as can be: small ones are slow.
template <class Call>
inline void in_groups(int64_t from, int64_t to, const Call& work) {
    int64_t groups = (to - from + MR - 1) / MR;
    for (; groups > 0; groups--) {
        const int64_t n = (to - from + groups - 1) / groups;
        work(from, n);
        from += n;
    }
}

// Of a tile's logits over `width` keys, what is seen at all: row r sees columns [from + r·moves, to + r·goes).
struct Band {
    int64_t width, from, moves, to, goes;
    int64_t first(int64_t row) const { return std::max<int64_t>(0, from + row * moves); }
    int64_t last(int64_t row) const { return std::min(width, to + row * goes); }
    // Rows [top, bottom) of `rows` that see something of columns [a, e).
    int64_t top(int64_t a, int64_t rows) const {
        return goes ? std::clamp<int64_t>(a - to + 1, 0, rows) : to > a ? 0 : rows;
    }
    int64_t bottom(int64_t e, int64_t rows) const {
        return moves ? std::clamp<int64_t>(e - from, 0, rows) : from < e ? rows : 0;
    }
};

// C (rows x band) = A (rows x depth) times panels, each (depth x NR). What is not seen is left as it is.
template <class R>
void by_panels(int64_t rows, const Band& band, int64_t depth, const R* A, int64_t lda, const R* panels, R* C,
               int64_t ldc) {
    constexpr int NR = Of<R>::NR;
    for (int64_t c = 0; c < band.width; c += NR)
        in_groups(band.top(c, rows), band.bottom(c + NR, rows), [&](int64_t r, int64_t n) {
            micro<R, false>(n, depth, A + r * lda, lda, panels + c * depth, NR, C + r * ldc + c, ldc, false);
        });
}

// C (rows x width) = or += A (rows x band) times stripes, `stripe` numbers each; A is 0 where it is not seen.
template <class R>
void by_stripes(int64_t rows, int64_t width, const Band& band, const R* A, int64_t lda, const R* stripes,
                int64_t stripe, R* C, int64_t ldc, bool add) {
    constexpr int NR = Of<R>::NR;
    for (int64_t c = 0; c < width; c += NR, stripes += stripe)
        in_groups(0, rows, [&](int64_t r, int64_t n) {
            const int64_t k = band.first(r), depth = std::max<int64_t>(0, band.last(r + n - 1) - k);
            micro<R, false>(n, depth, A + r * lda + k, lda, stripes + k * NR, NR, C + r * ldc + c, ldc, add);
        });
}

// C (band from column a on x width) += Aᵀ B, for A (rows x band), B (rows x width); A is 0 where it is not seen.
template <class R>
void add_transposed(int64_t a, int64_t width, const Band& band, int64_t rows, const R* A, int64_t lda, const R* B,
                    int64_t ldb, R* C, int64_t ldc) {
    for (int64_t c = 0; c < width; c += Of<R>::NR)
        in_groups(a, band.width, [&](int64_t k, int64_t n) {
            const int64_t r = band.top(k, rows), depth = band.bottom(k + n, rows) - r;
            if (depth > 0)
                micro<R, true>(n, depth, A + r * lda + k, lda, B + r * ldb + c, ldb, C + (k - a) * ldc + c, ldc, true);
        });
}

// Rows of x (count x depth) -> panels, columns of which they are; zeros up to a whole panel.
template <class R>
void to_panels(int64_t count, int64_t depth, const R* x, int64_t ld, R* panels) {
    constexpr int NR = Of<R>::NR;
    for (int64_t first = 0; first < count; first += NR, panels += depth * NR) {
        const int64_t n = std::min<int64_t>(NR, count - first);
        if (n < NR) std::fill(panels, panels + depth * NR, R(0));
        for (int64_t i = 0; i < n; i++)
            for (int64_t d = 0; d < depth; d++) panels[d * NR + i] = x[(first + i) * ld + d];
    }
}

// Rows of x (count x width) -> stripes of NR columns, one `stripe` numbers after the other.
template <class R>
void to_stripes(int64_t count, int64_t width, const R* x, int64_t ld, R* stripes, int64_t stripe) {
    constexpr int NR = Of<R>::NR;
    for (int64_t c = 0; c < width; c += NR, stripes += stripe)
        for (int64_t i = 0; i < count; i++) std::copy(x + i * ld + c, x + i * ld + c + NR, stripes + i * NR);
}

// Put x (depth) in place of one column of panels.
template <class R>
void set_column(int64_t at, int64_t depth, const R* x, R* panels) {
    constexpr int NR = Of<R>::NR;
    R* panel = panels + at / NR * NR * depth + at % NR;
    for (int64_t d = 0; d < depth; d++) panel[d * NR] = x[d];
}

inline int64_t down(int64_t x, int64_t unit) { return x / unit * unit; }
inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// exp(x) for x ≤ 0, −inf and NaN: 2^n times a polynomial in the rest, within 2 units in the last place; 0 below e^−87.
inline typename Of<float>::vec exp_of(typename Of<float>::vec x) {
    using vec = Of<float>::vec;
    typedef std::int32_t ints __attribute__((vector_size(BYTES)));
    const ints kept = ~(x <= -87.0f);  // NaN is kept
    x = kept ? x : vec{} - 87.0f;
    const vec magic = vec{} + 12582912.0f;  // 1.5·2^23: adding it rounds to a whole number
    const vec shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
    const vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vec p = vec{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ints exponent = (__builtin_convertvector(n, ints) + 127) << 23;
    vec power;
    std::memcpy(&power, &exponent, sizeof power);
    return kept ? p * power : vec{};
}

inline typename Of<double>::vec exp_of(typename Of<double>::vec x) {
    for (int i = 0; i < Of<double>::VL; i++) x[i] = std::exp(x[i]);
    return x;
}

// y = x with pairs (c, c + half) turned by an angle, or back (sign −1); the rest as it is. x may be y.
template <class R>
inline void turn(const R* x, const R* cos, const R* sin, int64_t half, int64_t width, R sign, R* y) {
    for (int64_t c = 0; c < half; c++) {
        const R left = x[c], right = x[c + half], up = sign * sin[c];
        y[c] = left * cos[c] - right * up;
        y[c + half] = right * cos[c] + left * up;
    }
    for (int64_t c = 2 * half; c < width; c++) y[c] = x[c];
}

template <class R>
inline R sum_of(typename Of<R>::vec x) {
    R sum = 0;
    for (int i = 0; i < Of<R>::VL; i++) sum += x[i];
    return sum;
}

}  // namespace
