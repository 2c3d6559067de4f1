// Products of many rows with a small matrix: A B for y = x Wᵀ and d_x = d_y W, Aᵀ B for d_W = d_yᵀ x.
//
// What the micro kernel reads is copied first, into blocks that stay in a core's own cache. A tile's sums follow k in
// order, so no number depends on how rows are shared among blocks and threads.

#include "pieces.h"
#include "products.h"

extern "C" {

// Must agree with linear.py, whose `Work` lists the same.
struct LinearWork {
    int64_t rows, depth, width;  // of the product (rows x width), and of the sums that it is made of
    int64_t lda, ldb, ldc;       // numbers from one row to the next
    int64_t high, wide, deep;    // of a piece; of A B, pieces are as wide and deep as it
    int64_t* next;               // who is free takes the next piece
    float *a, *b, *c, *bias;     // bias (width), or null
};
}

namespace {

constexpr int NR = Of<float>::NR;
constexpr int64_t LINE = 64 / sizeof(float);  // numbers of the cache's
constexpr int64_t DEPTH = 256;                // of a block in A B
constexpr int64_t STEPS = 128;                // of one in Aᵀ B
constexpr int64_t AHEAD = 4;                  // rows

// Memory of this thread, kept from call to call, from a line's begin.
float* kept(int64_t count) {
    static thread_local std::vector<float> memory;
    if (int64_t(memory.size()) < count + LINE) memory.resize(count + LINE);
    const int64_t at = reinterpret_cast<std::uintptr_t>(memory.data()) / sizeof(float);
    return memory.data() + up(at, LINE) - at;
}

// C (rows x width) = or += A B in a core's cache: A's rows lie `lda` apart or, upright, its columns; in groups of MR,
// `group` apart. B in panels. Not inlined, since a compiler that sees more than this runs out of registers.
template <bool upright>
__attribute__((noinline)) void block(int64_t rows, int64_t width, int64_t depth, const float* A, int64_t lda,
                                     int64_t group, const float* B, int64_t panel, float* C, int64_t ldc, bool add) {
    for (int64_t c = 0; c < width; c += NR, B += panel) {
        int64_t r = 0;
        for (; c + NR <= width && r + MR <= rows; r += MR)
            micro<float, upright, MR>(depth, A + r / MR * group, lda, B, NR, C + r * ldc + c, ldc, add);
        for (; r < rows; r += MR) {
            float whole[MR * NR];
            const int64_t n = std::min<int64_t>(MR, rows - r), m = std::min<int64_t>(NR, width - c);
            for (int64_t i = 0; add && i < n; i++)
                std::copy(C + (r + i) * ldc + c, C + (r + i) * ldc + c + m, whole + i * NR);
            micro<float, upright>(n, depth, A + r / MR * group, lda, B, NR, whole, NR, add);
            for (int64_t i = 0; i < n; i++) std::copy(whole + i * NR, whole + i * NR + m, C + (r + i) * ldc + c);
        }
    }
}

// C = A B + bias, B in panels of NR columns, each (depth x NR).
void product(const LinearWork& w) {
    constexpr int64_t ld = DEPTH + LINE;  // rows of a whole DEPTH would fall into few sets of the cache
    const float *A = w.a, *B = w.b, *bias = w.bias;
    const int64_t high = up(w.high, MR);
    float* copy = kept(high * ld);
    each_piece(w.next, (w.rows + high - 1) / high, [&](int64_t piece) {
        const int64_t first = piece * high, rows = std::min(high, w.rows - first);
        float* C = w.c + first * w.ldc;
        for (int64_t r = 0; bias && r < rows; r++) std::copy(bias, bias + w.width, C + r * w.ldc);
        for (int64_t k = 0; k < w.depth; k += DEPTH) {
            const int64_t depth = std::min(DEPTH, w.depth - k);
            for (int64_t r = 0; r < rows; r++) {
                const float* from = A + (first + r) * w.lda + k;
                std::copy(from, from + depth, copy + r * ld);
            }
            block<false>(rows, w.width, depth, copy, ld, MR * ld, B + k * NR, w.depth * NR, C, w.ldc, k > 0 || bias);
        }
    });
}

// Copy a row to places that are `apart`, so many numbers each. Rows may lie pages from each other, so that the processor
// does not foresee what comes next: ask for what lies `ahead`.
template <int numbers>
inline void strip(int64_t width, const float* row, int64_t ahead, float* to, int64_t apart) {
    int64_t c = 0;
    for (; c < width; c += LINE) __builtin_prefetch(row + ahead + c);
    for (c = 0; c + numbers <= width; c += numbers, to += apart) std::memcpy(to, row + c, numbers * sizeof(float));
    std::copy(row + c, row + width, to);
}

// C = Aᵀ B for A (depth x rows), B (depth x width): for each `deep` of the depth one C, the next after the last.
void transposed(const LinearWork& w) {
    constexpr int64_t group = STEPS * MR + LINE, panel = STEPS * NR + LINE;  // as above
    const float *A = w.a, *B = w.b;
    const int64_t high = up(w.high, MR), down = (w.rows + high - 1) / high;
    const int64_t wide = up(w.wide, NR), across = (w.width + wide - 1) / wide;
    float *right = kept(wide / NR * panel + high / MR * group), *left = right + wide / NR * panel;
    each_piece(w.next, (w.depth + w.deep - 1) / w.deep * down * across, [&](int64_t piece) {
        const int64_t part = piece / (down * across), begin = part * w.deep, end = std::min(w.depth, begin + w.deep);
        const int64_t i = piece / across % down * high, rows = std::min(high, w.rows - i);
        const int64_t j = piece % across * wide, width = std::min(wide, w.width - j);
        float* C = w.c + (part * w.rows + i) * w.ldc + j;
        for (int64_t k = begin; k < end; k += STEPS) {
            const int64_t depth = std::min(STEPS, end - k);
            for (int64_t d = 0; d < depth; d++) {
                strip<MR>(rows, A + (k + d) * w.lda + i, AHEAD * w.lda, left + d * MR, group);
                strip<NR>(width, B + (k + d) * w.ldb + j, AHEAD * w.ldb, right + d * NR, panel);
            }
            block<true>(rows, width, depth, left, MR, group, right, panel, C, w.ldc, k > begin);
        }
    });
}

}  // namespace

extern "C" void product_float32(LinearWork* w) { product(*w); }
extern "C" void transposed_float32(LinearWork* w) { transposed(*w); }
extern "C" int64_t panel_float32() { return NR; }
extern "C" int64_t size_of_linear_work() { return sizeof(LinearWork); }
