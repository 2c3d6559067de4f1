// What Python hands over, and memory to work in.
#pragma once

#include "products.h"

extern "C" {

// A tensor: strides in elements, 0 along what it lacks; `at` is null where there is no such tensor.
struct View {
    void* at;
    int64_t b, h, g, t;
};

// Must agree with native.py, whose `Work` lists the same.
struct Work {
    int64_t b0, b1, h0, h1, g0, g1;  // what to work on
    int64_t T, K, V, S, M, L, N;
    int64_t beyond, windowed, through;  // booleans: Plan.beyond, gradients == "window", Plan.through
    int64_t two_sided, half;            // are keys beyond the window always seen otherwise? half the width that turns
    double scale;                       // of content logits
    View q, k, k_far, v, bias, codebook, count, total, codes, query_run, key_run;
    View cos, sin;  // of rotary positions −M … T−1, as keys are numbered, and in one more row of M
    View o, lse;
    View d_o, d_q, d_k, d_k_far, d_v, d_bias, d_total;
};

// Pieces of work, and memory for each thread that works on them.
struct Job {
    Work* works;
    int64_t count, next;  // who is free takes the next
    char* memory;
    int64_t size, places, begun;  // bytes for a thread, threads for which there are so many, and those that have come
};
}

namespace {

// Hands out the workspace; with none it only counts.
struct Arena {
    char* base;
    int64_t used = 0;
    template <class X>
    X* take(int64_t count) {
        X* found = base ? reinterpret_cast<X*>(base + used) : nullptr;
        used += up(count * int64_t(sizeof(X)), 64);
        return found;
    }
};

template <class X>
X* at(const View& x, int64_t b, int64_t h, int64_t g = 0, int64_t t = 0) {
    return x.at ? static_cast<X*>(x.at) + b * x.b + h * x.h + g * x.g + t * x.t : nullptr;
}

}  // namespace
