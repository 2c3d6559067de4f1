// VQ attention for processors: forward and backward over whole sequences, one pair of batch row and key head at a time.
//
// The mathematics is blockwise's, see blocks.py and chunk.py. What differs is where numbers live: a tile of ROWS
// queries of one head, its logits over [cache ; far ; near], softmax and gradients stay in the core's own cache, and
// counts and means are kept up key by key instead of being made anew for every block.
//
//     near   keys that are in the window of some query of the tile
//     far    keys of the block's strip that are beyond the window of some or all of them
//
// Where keys are seen alike inside and beyond the window, those that are both are near, and seen once ("one-sided").
// Where they are not ("two-sided"), they are both near and far, and each query sees them on one side.
//
// Axes:  b, h rows, key heads  g queries of a key head  T length  K, V widths (multiples of NR)  S codes  M window
//        L block  N blocks; keys count from the first carried one: key j stands at position j−M, query t at key t+M

#include "cache.h"
#include "pieces.h"

namespace {

constexpr int ROWS = 32;  // queries of a tile

// Keys as queries meet them: as they are, or turned. `rows` and `grads` are the caller's, or ours where keys are turned.
template <class R>
struct Keys {
    const R* rows;
    int64_t row;
    R* grads;
    int64_t grads_row;
    R *panels, *stripes;
};

// One row of the batch and one key head of it.
template <class R>
struct List {
    static constexpr int NR = Of<R>::NR;
    const Work& w;
    const bool backward, turns;
    const int64_t K, V, S, M, L, T, keys;
    int64_t b = 0, h = 0, first_key = 0;  // no key before that one, a multiple of NR
    Cache<R> cache;
    int64_t *begun, *met;        // by block: entries of the cache's log, and slots
    Keys<R> inside{}, beyond{};  // the window
    R* values;                   // stripes, in the backward pass panels
    R *q, *q_turned, *d_turned;  // of a tile: queries times scale, the same turned, and the gradient of those
    R *p, *d_p, *running;        // running, by slot: R of R_n = dm_n/n_n + R_{n+1}, see blockwise.py
    R *own_inside = nullptr, *own_beyond = nullptr, *own_d_inside = nullptr, *own_d_beyond = nullptr;
    const R* v;
    const int64_t *query_run, *key_run, *code_of;

    List(Arena& arena, const Work& w, bool backward)
        : w(w),
          backward(backward),
          turns(w.cos.at),
          K(w.K),
          V(w.V),
          S(w.S),
          M(w.M),
          L(w.L),
          T(w.T),
          keys(M + T),
          cache(arena, w, backward) {
        const int64_t most = up(keys, NR);
        const bool two = w.beyond && (w.k_far.at || turns);
        inside.panels = arena.take<R>(most * K), inside.stripes = arena.take<R>(backward ? keys * K : 0);
        beyond.panels = two ? arena.take<R>(most * K) : inside.panels;
        beyond.stripes = two ? arena.take<R>(backward ? keys * K : 0) : inside.stripes;
        if (turns) {
            own_inside = arena.take<R>(keys * K), own_beyond = arena.take<R>(two ? keys * K : 0);
            own_d_inside = arena.take<R>(backward ? keys * K : 0);
            own_d_beyond = arena.take<R>(backward && two && !w.windowed ? keys * K : 0);
        }
        values = arena.take<R>(most * V);
        q = arena.take<R>(ROWS * K), q_turned = turns ? arena.take<R>(ROWS * K) : q;
        d_turned = turns ? arena.take<R>(ROWS * K) : nullptr;
        begun = arena.take<int64_t>(backward ? w.N : 0), met = arena.take<int64_t>(backward ? w.N : 0);
        const int64_t widest = cache.Sp + (w.beyond ? L + 2 * NR : 0) + M + ROWS + 2 * NR;
        p = arena.take<R>(ROWS * widest);
        d_p = backward ? arena.take<R>(ROWS * widest) : nullptr;
        running = backward && w.through ? arena.take<R>(S * V) : nullptr;
    }

    void begin(int64_t row, int64_t head) {
        b = row, h = head;
        v = at<R>(w.v, b, h);
        query_run = at<int64_t>(w.query_run, b, 0), key_run = at<int64_t>(w.key_run, b, 0);
        code_of = at<int64_t>(w.codes, b, h);
        first_key = 0;
        while (first_key < M && key_run[first_key] < 0) first_key++;
        first_key = down(first_key, NR);
        const View &far = w.k_far.at ? w.k_far : w.k, &d_far = w.k_far.at ? w.d_k_far : w.d_k;
        inside = {at<R>(w.k, b, h), w.k.t, at<R>(w.d_k, b, h), w.d_k.t, inside.panels, inside.stripes};
        beyond = {at<R>(far, b, h), far.t, at<R>(d_far, b, h), d_far.t, beyond.panels, beyond.stripes};
        if (turns) {
            for (int64_t j = first_key; j < keys; j++) {
                turn(inside.rows + j * inside.row, cos(j), sin(j), w.half, K, R(1), own_inside + j * K);
                if (w.beyond)
                    turn(beyond.rows + j * beyond.row, cos(keys), sin(keys), w.half, K, R(-1), own_beyond + j * K);
            }
            inside.rows = own_inside, inside.row = K;
            beyond.rows = own_beyond, beyond.row = K;
            if (backward) {
                std::fill(own_d_inside, own_d_inside + keys * K, R(0));
                if (!w.windowed && w.beyond) std::fill(own_d_beyond, own_d_beyond + keys * K, R(0));
                inside.grads = own_d_inside, beyond.grads = own_d_beyond;
                inside.grads_row = beyond.grads_row = K;
            }
        }
        lay_out(inside);
        if (beyond.panels != inside.panels) lay_out(beyond);
        if (backward)
            to_panels(keys - first_key, V, v + first_key * w.v.t, w.v.t, values + first_key * V);
        else
            to_stripes(keys - first_key, V, v + first_key * w.v.t, w.v.t, values + first_key * NR, stripe());
        if (S)
            cache.begin(at<R>(w.codebook, 0, h), w.codebook.t, at<R>(w.count, b, h), at<R>(w.total, b, h), w.total.t);
    }

    void lay_out(Keys<R>& x) const {
        const R* first = x.rows + first_key * x.row;
        to_panels(keys - first_key, K, first, x.row, x.panels + first_key * K);
        if (backward) to_stripes(keys - first_key, K, first, x.row, x.stripes + first_key * NR, stripe());
    }
    int64_t stripe() const { return keys * NR; }

    // Hand gradients of turned keys to the keys.
    void end() {
        if (!turns) return;
        const View& d_far = w.k_far.at ? w.d_k_far : w.d_k;
        for (int64_t j = first_key; j < keys; j++) {
            R* one = own_d_inside + j * K;
            turn(one, cos(j), sin(j), w.half, K, R(-1), one);
            add(one, at<R>(w.d_k, b, h, 0, j), K);
            if (w.windowed || !w.beyond) continue;
            R* other = own_d_beyond + j * K;
            turn(other, cos(keys), sin(keys), w.half, K, R(1), other);
            add(other, at<R>(d_far, b, h, 0, j), K);
        }
    }

    static void add(const R* x, R* to, int64_t width) {
        for (int64_t c = 0; c < width; c++) to[c] += x[c];
    }
    const R* cos(int64_t j) const { return at<R>(w.cos, 0, 0, 0, j); }
    const R* sin(int64_t j) const { return at<R>(w.sin, 0, 0, 0, j); }

    // The document of the block after block n.
    int64_t following(int64_t n) const { return query_run[(n + 1) * L]; }
    bool goes_on(int64_t n) const { return !query_run || following(n) == query_run[n * L]; }
    // Whether a key passes from the strip to the cache after block n.
    bool leaves(int64_t j, int64_t n) const {
        return code_of[j] >= 0 && code_of[j] < S && (!query_run || key_run[j] == following(n));
    }

    // From the cache of block n to that of the next.
    void advance(int64_t n) {
        if (!S) return;
        if (backward) begun[n] = cache.logged, met[n] = cache.used;
        if (!goes_on(n)) cache.clear();
        for (int64_t j = n * L; j < (n + 1) * L; j++)
            if (leaves(j, n)) cache.add(code_of[j], v + j * w.v.t);
        for (int64_t j = n * L; j < (n + 1) * L; j++)
            if (leaves(j, n)) cache.renew(cache.slot_of[code_of[j]]);
    }

    // Back again, and their gradient to the keys that had left.
    void retreat(int64_t n) {
        if (!S) return;
        if (running) {
            for (int64_t j = n * L; j < (n + 1) * L; j++)
                if (leaves(j, n)) add(running + cache.slot_of[code_of[j]] * V, at<R>(w.d_v, b, h, 0, j), V);
            if (!goes_on(n)) std::fill(running, running + S * V, R(0));
        }
        cache.back_to(begun[n], met[n]);
    }

    // A tile: `rows` queries from t0 on, of head g, in the block that starts at s.
    struct Tile {
        int64_t g, s, t0, rows;
        bool two_sided;
        int64_t far, far_end, near, near_end;  // key numbers, multiples of NR
        int64_t cached, near_at, width;        // columns: of the cache, which come first, then far ones
        Band codes_band, far_band, near_band;  // keys that are none are in no band
    };

    // Cut it out, and its queries into q and q_turned.
    Tile tile(int64_t g, int64_t s, int64_t t0) {
        Tile x;
        x.g = g, x.s = s, x.t0 = t0, x.rows = std::min<int64_t>({ROWS, s + L - t0, T - t0});
        x.two_sided = w.two_sided || (w.k_far.at && s < M);
        x.near = std::max(down(t0, NR), first_key), x.near_end = up(t0 + x.rows + M, NR);
        x.far = std::max(down(s, NR), first_key), x.far_end = x.two_sided ? up(t0 + x.rows, NR) : x.near;
        if (!w.beyond || x.far_end < x.far) x.far_end = x.far;
        x.cached = cache.width(), x.near_at = x.cached + x.far_end - x.far, x.width = x.near_at + x.near_end - x.near;
        const bool apart = x.two_sided || !w.beyond;
        x.codes_band = {cache.used, 0, 0, cache.used, 0};
        x.far_band = {std::min(x.far_end, keys) - x.far, 0, 0, x.two_sided ? t0 - x.far : x.far_end - x.far,
                      x.two_sided};
        x.near_band = {std::min(x.near_end, keys) - x.near, (apart ? t0 : s) - x.near, apart, t0 + M + 1 - x.near, 1};
        for (int64_t r = 0; r < x.rows; r++) {
            const R* from = at<R>(w.q, b, h, g, t0 + r);
            R* to = q + r * K;
            for (int64_t c = 0; c < K; c++) to[c] = R(w.scale) * from[c];
            if (turns) turn(to, cos(t0 + r + M), sin(t0 + r + M), w.half, K, R(1), q_turned + r * K);
        }
        return x;
    }

    // The largest distance in query t's window that has a column.
    int64_t farthest(const Tile& x, int64_t t) const { return std::min(M, t + M - x.near); }

    // Logits of a tile into p, hidden ones −inf.
    void logits(const Tile& x) {
        const R never = -std::numeric_limits<R>::infinity();
        by_panels(x.rows, x.codes_band, K, q, K, cache.row_panels, p, x.width);
        const R* far_panels = x.two_sided ? beyond.panels : inside.panels;
        by_panels(x.rows, x.far_band, K, q, K, far_panels + x.far * K, p + x.cached, x.width);
        by_panels(x.rows, x.near_band, K, q_turned, K, inside.panels + x.near * K, p + x.near_at, x.width);
        for (int64_t r = 0; r < x.rows; r++) {
            const int64_t t = x.t0 + r;
            R* cached = p + r * x.width;
            R *far = cached + x.cached - x.far, *near = cached + x.near_at - x.near;  // by key
            for (int64_t c = 0; c < x.cached; c++) cached[c] += cache.log_count[c];
            const int64_t first = w.beyond && !x.two_sided ? x.s : t;
            for (int64_t j = x.near; j < first; j++) near[j] = never;
            for (int64_t j = t + M + 1; j < x.near_end; j++) near[j] = never;
            for (int64_t j = x.far; j < x.s && j < x.far_end; j++) far[j] = never;
            if (x.two_sided)
                for (int64_t j = std::max(t, x.far); j < x.far_end; j++) far[j] = never;
            if (const R* bias = at<R>(w.bias, b, h, x.g, t))
                for (int64_t m = 0; m <= farthest(x, t); m++) near[t + M - m] += bias[m];
            if (query_run) {
                const int64_t run = query_run[t];
                if (run != query_run[x.s]) std::fill(cached, cached + x.cached, never);
                for (int64_t j = x.far; j < std::min(x.far_end, keys); j++)
                    if (key_run[j] != run) far[j] = never;
                for (int64_t j = x.near; j <= t + M; j++)
                    if (key_run[j] != run) near[j] = never;
            } else if (x.s < M) {
                for (int64_t j = x.far; j < std::min(x.far_end, M); j++)
                    if (key_run[j] < 0) far[j] = never;
                for (int64_t j = x.near; j < std::min(x.near_end, M); j++)
                    if (key_run[j] < 0) near[j] = never;
            }
        }
    }

    void forward_tile(const Tile& x) {
        using F = Of<R>;
        logits(x);
        R* o = at<R>(w.o, b, h, x.g, x.t0);
        R inverse[ROWS];
        for (int64_t r = 0; r < x.rows; r++) {
            R* row = p + r * x.width;
            typename F::vec high = load(row), sums{};
            for (int64_t c = F::VL; c < x.width; c += F::VL) {
                const auto y = load(row + c);
                high = y > high ? y : high;
            }
            R most = high[0];
            for (int i = 1; i < F::VL; i++) most = std::max<R>(most, high[i]);
            for (int64_t c = 0; c < x.width; c += F::VL) {
                const auto y = exp_of(load(row + c) - most);
                sums += y;
                store(row + c, y);
            }
            const R sum = sum_of<R>(sums);
            inverse[r] = 1 / sum;
            if (R* lse = at<R>(w.lse, b, h, x.g, x.t0 + r)) *lse = most + std::log(sum);
        }
        by_stripes(x.rows, V, x.codes_band, p, x.width, cache.mean_stripes, cache.stripe(), o, w.o.t, false);
        by_stripes(x.rows, V, x.far_band, p + x.cached, x.width, values + x.far * NR, stripe(), o, w.o.t, true);
        by_stripes(x.rows, V, x.near_band, p + x.near_at, x.width, values + x.near * NR, stripe(), o, w.o.t, true);
        for (int64_t r = 0; r < x.rows; r++)
            for (int64_t d = 0; d < V; d++) o[r * w.o.t + d] *= inverse[r];
    }

    // Zeros in x (a tile's p or d_p) for keys near that lie beyond the window.
    void clear_bubble(const Tile& x, R* y) {
        for (int64_t r = 0; r < x.rows; r++) {
            R* near = y + r * x.width + x.near_at;
            std::fill(near, near + std::max<int64_t>(0, x.t0 + r - x.near), R(0));
        }
    }

    // target, by key, += yᵀ z for the keys of a band that are `from` or later; y begins with key `first`.
    void add_keys(const Tile& x, R* target, int64_t target_row, const R* y, const Band& band, int64_t first,
                  int64_t from, const R* z, int64_t row, int64_t width) {
        const int64_t a = std::max<int64_t>(0, from - first);
        add_transposed(a, width, band, x.rows, y, x.width, z, row, target + (first + a) * target_row, target_row);
    }

    void backward_tile(const Tile& x) {
        using F = Of<R>;
        const R* d_o = at<R>(w.d_o, b, h, x.g, x.t0);
        const int64_t slope = w.d_o.t;
        logits(x);
        by_panels(x.rows, x.codes_band, V, d_o, slope, cache.mean_panels, d_p, x.width);
        by_panels(x.rows, x.far_band, V, d_o, slope, values + x.far * V, d_p + x.cached, x.width);
        by_panels(x.rows, x.near_band, V, d_o, slope, values + x.near * V, d_p + x.near_at, x.width);
        for (int64_t r = 0; r < x.rows; r++) {
            R *row = p + r * x.width, *d_row = d_p + r * x.width;
            const R lse = *at<R>(w.lse, b, h, x.g, x.t0 + r);
            typename F::vec sums{};
            for (int64_t c = 0; c < x.width; c += F::VL) {
                const auto y = exp_of(load(row + c) - lse);
                store(row + c, y);
                const auto d = load(d_row + c);
                sums += y != 0 ? y * d : y;  // where nothing is seen, d_p holds what was there before
            }
            const R all = sum_of<R>(sums);  // Σ P∘dP
            for (int64_t c = 0; c < x.width; c += F::VL) {
                const auto y = load(row + c);
                store(d_row + c, y != 0 ? y * (load(d_row + c) - all) : y);
            }
            if (R* d_bias = at<R>(w.d_bias, b, h, x.g, x.t0 + r)) {
                const R* near = d_row + x.near_at - x.near + x.t0 + r + M;
                for (int64_t m = 0; m <= farthest(x, x.t0 + r); m++) d_bias[m] += near[-m];
            }
        }
        const R *d_far = d_p + x.cached, *d_near = d_p + x.near_at;
        R *d_q = at<R>(w.d_q, b, h, x.g, x.t0), *d_q_inside = turns ? d_turned : d_q;
        const int64_t row = w.d_q.t, row_inside = turns ? K : row;
        const Keys<R>& seen = x.two_sided ? beyond : inside;
        const R *near_keys = inside.stripes + x.near * NR, *far_keys = seen.stripes + x.far * NR;
        by_stripes(x.rows, K, x.near_band, d_near, x.width, near_keys, stripe(), d_q_inside, row_inside, false);
        by_stripes(x.rows, K, x.codes_band, d_p, x.width, cache.row_stripes, cache.stripe(), d_q, row, !turns);
        by_stripes(x.rows, K, x.far_band, d_far, x.width, far_keys, stripe(), d_q, row, true);
        for (int64_t r = 0; r < x.rows; r++) {
            R *to = d_q + r * row, *one = d_turned + r * K;
            if (turns) turn(one, cos(x.t0 + r + M), sin(x.t0 + r + M), w.half, K, R(-1), one), add(one, to, K);
            for (int64_t c = 0; c < K; c++) to[c] *= R(w.scale);
        }

        const int64_t from = w.windowed || w.through ? 0 : x.s + M;  // rule "block" without cache: the block's own keys
        const bool far_learns = !w.windowed || w.through;
        if (!far_learns) clear_bubble(x, p);
        R* d_v = at<R>(w.d_v, b, h);
        if (far_learns) add_keys(x, d_v, w.d_v.t, p + x.cached, x.far_band, x.far, from, d_o, slope, V);
        add_keys(x, d_v, w.d_v.t, p + x.near_at, x.near_band, x.near, from, d_o, slope, V);
        if (running) {
            for (int64_t r = 0; r < x.rows; r++)
                for (int64_t c = 0; c < cache.used; c++) p[r * x.width + c] *= cache.inverse[c];
            add_transposed(0, V, x.codes_band, x.rows, p, x.width, d_o, slope, running, V);
        }
        if (w.windowed)
            clear_bubble(x, d_p);
        else
            add_keys(x, seen.grads, seen.grads_row, d_far, x.far_band, x.far, from, q, K, K);
        add_keys(x, inside.grads, inside.grads_row, d_near, x.near_band, x.near, from, q_turned, K, K);
    }

    void forward() {
        for (int64_t n = 0; n < w.N; n++) {
            for (int64_t g = w.g0; g < w.g1; g++)
                for (int64_t t = n * L; t < std::min((n + 1) * L, T); t += ROWS) forward_tile(tile(g, n * L, t));
            if (n + 1 < w.N) advance(n);
        }
    }

    void back() {
        if (running) std::fill(running, running + S * V, R(0));
        for (int64_t n = 0; n + 1 < w.N; n++) advance(n);
        for (int64_t n = w.N - 1; n >= 0; n--) {
            if (n + 1 < w.N) retreat(n);
            for (int64_t g = w.g0; g < w.g1; g++)
                for (int64_t t = n * L; t < std::min((n + 1) * L, T); t += ROWS) backward_tile(tile(g, n * L, t));
        }
        if (R* d_total = at<R>(w.d_total, b, h); d_total && running)
            for (int64_t i = 0; i < cache.assigned; i++)
                std::copy(running + i * V, running + (i + 1) * V, d_total + cache.code_in[i] * w.d_total.t);
        end();
    }
};

template <class R>
void run(const Work& w, bool backward, char* memory) {
    Arena arena{memory};
    List<R> list(arena, w, backward);
    for (int64_t b = w.b0; b < w.b1; b++)
        for (int64_t h = w.h0; h < w.h1; h++) {
            list.begin(b, h);
            backward ? list.back() : list.forward();
        }
}

// What threads call, all with the same job.
template <class R>
void share(Job* job, bool backward) {
    const int64_t place = __atomic_fetch_add(&job->begun, 1, __ATOMIC_RELAXED);
    if (place >= job->places) return;
    char* memory = job->memory + job->size * place;
    each_piece(&job->next, job->count, [&](int64_t n) { run<R>(job->works[n], backward, memory); });
}

// Bytes that a thread needs.
template <class R>
int64_t size(const Work* w, bool backward) {
    Arena arena{nullptr};
    List<R>(arena, *w, backward);
    return arena.used;
}

}  // namespace

extern "C" void attend_float32(Job* job) { share<float>(job, false); }
extern "C" void attend_float64(Job* job) { share<double>(job, false); }
extern "C" void gradients_float32(Job* job) { share<float>(job, true); }
extern "C" void gradients_float64(Job* job) { share<double>(job, true); }
extern "C" int64_t size_float32(const Work* w, bool backward) { return size<float>(w, backward); }
extern "C" int64_t size_float64(const Work* w, bool backward) { return size<double>(w, backward); }
extern "C" int64_t size_of_work() { return sizeof(Work); }
extern "C" int64_t size_of_job() { return sizeof(Job); }
extern "C" int64_t panel_float32() { return Of<float>::NR; }
extern "C" int64_t panel_float64() { return Of<double>::NR; }
