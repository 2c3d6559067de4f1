#pragma once

#include <limits>

#include "products.h"
#include "work.h"

namespace {

// Counts, sums and means of the keys left of a block's strip, kept up key by key, with a log to go back exactly.
//
// Codes get a slot as they first come in, so that products go over codes that have been met, not over all of them.
template <class R>
struct Cache {
    const int64_t S, Sp, K, V;
    const bool logs;
    int64_t used = 0, assigned = 0, logged = 0;   // slots met by the block at hand, and by any; entries of the log
    int64_t *slot_of, *code_in, *logged_slot;     // by code; by slot; by entry
    R *count, *log_count, *inverse, *sum;         // by slot
    R *row, *row_panels, *row_stripes;            // of the codebook: the one at hand, and all by slot
    R *mean, *mean_panels, *mean_stripes;         // of means: the same
    R *logged_count, *logged_sum;
    const R* codebook = nullptr;
    int64_t codebook_row = 0;
    const R *cos, *sin;  // of the distance at which codes are seen, if positions are rotary
    const int64_t half;

    Cache(Arena& arena, const Work& w, bool backward)
        : S(w.S),
          Sp(up(w.S, Of<R>::NR)),
          K(w.K),
          V(w.V),
          logs(backward),
          cos(at<R>(w.cos, 0, 0, 0, w.M + w.T)),
          sin(at<R>(w.sin, 0, 0, 0, w.M + w.T)),
          half(w.half) {
        slot_of = arena.take<int64_t>(S), code_in = arena.take<int64_t>(S);
        count = arena.take<R>(Sp), log_count = arena.take<R>(Sp), inverse = arena.take<R>(Sp);
        sum = arena.take<R>(S * V), mean = arena.take<R>(V), row = arena.take<R>(K);
        row_panels = arena.take<R>(Sp * K), row_stripes = logs ? arena.take<R>(S * K) : nullptr;
        mean_panels = logs ? arena.take<R>(Sp * V) : nullptr, mean_stripes = logs ? nullptr : arena.take<R>(S * V);
        const bool cleared = w.query_run.at;
        const int64_t most = logs && S ? w.N * w.L * (cleared ? 2 : 1) + (cleared ? S : 0) : 0;
        logged_slot = arena.take<int64_t>(most), logged_count = arena.take<R>(most);
        logged_sum = arena.take<R>(most * V);
    }

    void begin(const R* book, int64_t book_row, const R* counts, const R* sums, int64_t sums_row) {
        codebook = book, codebook_row = book_row, used = assigned = logged = 0;
        std::fill(slot_of, slot_of + S, int64_t(-1));
        std::fill(log_count, log_count + Sp, -std::numeric_limits<R>::infinity());
        std::fill(inverse, inverse + Sp, R(0));
        std::fill(row_panels, row_panels + Sp * K, R(0));
        if (mean_panels) std::fill(mean_panels, mean_panels + Sp * V, R(0));
        for (int64_t s = 0; s < S; s++)
            if (counts[s] > 0) {
                const int64_t i = slot(s);
                count[i] = counts[s];
                std::copy(sums + s * sums_row, sums + s * sums_row + V, sum + i * V);
                renew(i);
            }
    }

    int64_t stripe() const { return S * Of<R>::NR; }

    // Columns of logits that belong to codes.
    int64_t width() const { return up(used, Of<R>::NR); }

    int64_t slot(int64_t code) {
        int64_t i = slot_of[code];
        if (i < 0) {
            i = slot_of[code] = assigned++;
            code_in[i] = code, count[i] = 0;
            const R* given = codebook + code * codebook_row;
            if (cos)
                turn(given, cos, sin, half, K, R(-1), row);
            else
                std::copy(given, given + K, row);
            set_column(i, K, row, row_panels);
            if (row_stripes) to_stripes(1, K, row, K, row_stripes + i * Of<R>::NR, stripe());
            std::fill(sum + i * V, sum + (i + 1) * V, R(0));
        }
        used = std::max(used, i + 1);
        return i;
    }

    // After a slot's count and sum have changed.
    void renew(int64_t i) {
        const R n = std::max(count[i], R(1));
        for (int64_t d = 0; d < V; d++) mean[d] = sum[i * V + d] / n;
        log_count[i] = count[i] > 0 ? std::log(count[i]) : -std::numeric_limits<R>::infinity();
        inverse[i] = 1 / n;
        if (logs)
            set_column(i, V, mean, mean_panels);
        else
            to_stripes(1, V, mean, V, mean_stripes + i * Of<R>::NR, stripe());
    }

    void note(int64_t i) {
        if (!logs) return;
        logged_slot[logged] = i, logged_count[logged] = count[i];
        std::copy(sum + i * V, sum + (i + 1) * V, logged_sum + logged++ * V);
    }

    void add(int64_t code, const R* value) {
        const int64_t i = slot(code);
        note(i);
        count[i] += 1;
        for (int64_t d = 0; d < V; d++) sum[i * V + d] += value[d];
    }

    void clear() {
        for (int64_t i = 0; i < used; i++)
            if (count[i] > 0) {
                note(i);
                count[i] = 0;
                std::fill(sum + i * V, sum + (i + 1) * V, R(0));
                renew(i);
            }
    }

    // To what it was when the log had so many entries, and so many slots had been met.
    void back_to(int64_t entries, int64_t slots) {
        const int64_t last = logged;
        while (logged > entries) {
            const int64_t i = logged_slot[--logged];
            count[i] = logged_count[logged];
            std::copy(logged_sum + logged * V, logged_sum + (logged + 1) * V, sum + i * V);
        }
        for (int64_t e = entries; e < last; e++) renew(logged_slot[e]);
        used = slots;
    }
};

}  // namespace
