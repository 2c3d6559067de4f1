// Pieces of work that threads share: who is free takes the next.
#pragma once

#include <cstdint>

namespace {

// Call work(piece) until none of `count` is left; all threads share `next`.
template <class Call>
inline void each_piece(std::int64_t* next, std::int64_t count, const Call& work) {
    for (std::int64_t piece; (piece = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) work(piece);
}

}  // namespace
