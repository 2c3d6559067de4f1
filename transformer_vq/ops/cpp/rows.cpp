// What is done row by row between products of matrices: root-mean-square norm, and SiLU(gate) ⊙ up.
//
// PyTorch goes through memory once for each operation of a formula; here each row comes from memory once and goes there
// once; what is read again is in the core's own cache.

#include "pieces.h"
#include "products.h"

extern "C" {

// Rows of numbers: strides in numbers along three axes; numbers of a row lie side by side. `at` is null for none.
struct Rows {
    void* at;
    int64_t b, h, t;
};

// Must agree with rows.py, whose `Work` lists the same.
struct RowWork {
    int64_t b, h, t, width;  // how many rows there are, and numbers in each
    int64_t parts, *next;    // of the rows: who is free takes the next
    double scale, eps;
    Rows x, y, d_x, d_y, inverse;
    void *weight, *bias;
    double* sums;  // (parts, 2, width): of the gradients of weight and bias
};
}

namespace {

template <class R>
R* row_of(const Rows& x, int64_t b, int64_t h, int64_t t) {
    return x.at ? static_cast<R*>(x.at) + b * x.b + h * x.h + t * x.t : nullptr;
}

// Call work(b, h, t) for every row of a part.
template <class Call>
void each_row(const RowWork& w, int64_t part, const Call& work) {
    const int64_t rows = w.b * w.h * w.t, first = rows * part / w.parts, last = rows * (part + 1) / w.parts;
    int64_t t = first % w.t, h = first / w.t % w.h, b = first / w.t / w.h;
    for (int64_t n = first; n < last; n++) {
        work(b, h, t);
        if (++t == w.t) t = 0, h++;
        if (h == w.h) h = 0, b++;
    }
}

// Call work(place, n) for every vector of a row; n is the number of its numbers, less than a vector's in the last.
template <class R, class Call>
inline void each_vector(int64_t width, const Call& work) {
    constexpr int VL = Of<R>::VL;
    int64_t c = 0;
    for (; c + VL <= width; c += VL) work(c, VL);
    if (c < width) work(c, static_cast<int>(width - c));
}

template <class R>
inline typename Of<R>::vec load(const R* x, int n) {
    if (n == Of<R>::VL) return load(x);
    typename Of<R>::vec y{};
    std::memcpy(&y, x, n * sizeof(R));
    return y;
}

template <class R>
inline void store(R* x, typename Of<R>::vec y, int n) {
    if (n == Of<R>::VL)
        store(x, y);
    else
        std::memcpy(x, &y, n * sizeof(R));
}

// y = scale · x r · g + b,  r = 1/√(ε + mean x²), which is kept.
template <class R>
void norm(const RowWork w, int64_t part) {
    const int64_t width = w.width;
    const R scale = w.scale, eps = w.eps;
    const R *weight = static_cast<R*>(w.weight), *bias = static_cast<R*>(w.bias);
    each_row(w, part, [&](int64_t b, int64_t h, int64_t t) {
        const R* x = row_of<R>(w.x, b, h, t);
        R* y = row_of<R>(w.y, b, h, t);
        typename Of<R>::vec squares{};
        each_vector<R>(width, [&](int64_t c, int n) {
            const auto one = load(x + c, n);
            squares += one * one;
        });
        const R r = 1 / std::sqrt(sum_of<R>(squares) / width + eps), factor = r * scale;
        *row_of<R>(w.inverse, b, h, t) = r;
        each_vector<R>(width, [&](int64_t c, int n) {
            auto one = load(x + c, n) * factor;
            if (weight) one = one * load(weight + c, n) + load(bias + c, n);
            store(y + c, one, n);
        });
    });
}

// With h = d_y g:  dx = scale r (h − x r² mean(h x));  dg += scale Σ d_y x r  and  db += Σ d_y over all rows.
template <class R>
void norm_gradients(const RowWork w, int64_t part) {
    const int64_t width = w.width;
    const R scale = w.scale;
    constexpr int SPAN = 64;  // rows whose sums are taken in R, before they enter the sum over all
    const R* weight = static_cast<R*>(w.weight);
    std::vector<R> sums(weight ? 2 * width : 0);
    R *d_weight = sums.data(), *d_bias = d_weight + width;
    int64_t summed = 0;
    const auto hand_over = [&] {
        for (size_t c = 0; c < sums.size(); c++) w.sums[part * sums.size() + c] += sums[c], sums[c] = 0;
        summed = 0;
    };
    each_row(w, part, [&](int64_t b, int64_t h, int64_t t) {
        const R *x = row_of<R>(w.x, b, h, t), *d_y = row_of<R>(w.d_y, b, h, t);
        R* d_x = row_of<R>(w.d_x, b, h, t);
        const R r = *row_of<R>(w.inverse, b, h, t), factor = r * scale;
        typename Of<R>::vec along{};
        each_vector<R>(width, [&](int64_t c, int n) {
            const auto one = load(x + c, n), d = load(d_y + c, n), product = d * one;
            if (!weight) {
                along += product;
                return;
            }
            along += product * load(weight + c, n);
            store(d_weight + c, load(d_weight + c, n) + product * factor, n);
            store(d_bias + c, load(d_bias + c, n) + d, n);
        });
        const R back = sum_of<R>(along) * r / width * r * factor;
        each_vector<R>(width, [&](int64_t c, int n) {
            auto d = load(d_y + c, n) * factor;
            if (weight) d *= load(weight + c, n);
            store(d_x + c, d - load(x + c, n) * back, n);
        });
        if (++summed == SPAN) hand_over();
    });
    hand_over();
}

// σ(x), NaN for NaN.
template <class R>
inline typename Of<R>::vec logistic(typename Of<R>::vec x) {
    const auto small = exp_of(x > 0 ? -x : x);
    return (x > 0 ? small * 0 + 1 : small) / (1 + small);
}

// y = SiLU(gate) ⊙ up, of rows x = [gate ; up].
template <class R>
void swiglu(const RowWork w, int64_t part) {
    const int64_t width = w.width;
    each_row(w, part, [&](int64_t b, int64_t h, int64_t t) {
        const R *gate = row_of<R>(w.x, b, h, t), *up = gate + width;
        R* y = row_of<R>(w.y, b, h, t);
        each_vector<R>(width, [&](int64_t c, int n) {
            const auto g = load(gate + c, n);
            store(y + c, g * logistic<R>(g) * load(up + c, n), n);
        });
    });
}

// With s = σ(g):  d_up = d g s,  d_gate = d u s (1 + g (1 − s)).
template <class R>
void swiglu_gradients(const RowWork w, int64_t part) {
    const int64_t width = w.width;
    each_row(w, part, [&](int64_t b, int64_t h, int64_t t) {
        const R *gate = row_of<R>(w.x, b, h, t), *up = gate + width, *d_y = row_of<R>(w.d_y, b, h, t);
        R *d_gate = row_of<R>(w.d_x, b, h, t), *d_up = d_gate + width;
        each_vector<R>(width, [&](int64_t c, int n) {
            const auto g = load(gate + c, n), d = load(d_y + c, n), s = logistic<R>(g);
            store(d_up + c, d * g * s, n);
            store(d_gate + c, d * load(up + c, n) * s * (1 + g * (1 - s)), n);
        });
    });
}

// What threads call, all with the same work.
template <class Call>
void share(RowWork* w, const Call& work) {
    each_piece(w->next, w->parts, [&](int64_t part) { work(*w, part); });
}

}  // namespace

extern "C" void norm_float32(RowWork* w) { share(w, norm<float>); }
extern "C" void norm_float64(RowWork* w) { share(w, norm<double>); }
extern "C" void norm_gradients_float32(RowWork* w) { share(w, norm_gradients<float>); }
extern "C" void norm_gradients_float64(RowWork* w) { share(w, norm_gradients<double>); }
extern "C" void swiglu_float32(RowWork* w) { share(w, swiglu<float>); }
extern "C" void swiglu_float64(RowWork* w) { share(w, swiglu<double>); }
extern "C" void swiglu_gradients_float32(RowWork* w) { share(w, swiglu_gradients<float>); }
extern "C" void swiglu_gradients_float64(RowWork* w) { share(w, swiglu_gradients<double>); }
extern "C" int64_t size_of_row_work() { return sizeof(RowWork); }
