#pragma once
// Threads that work together on one call, and do not wait for those who are late. Knows work only as a function to be
// called; must not know what it computes.
//
// A parallel region of OpenMP ends when all its threads have been there. On a machine that has anything else to do one
// of them often waits for a core, and all wait for it, with nothing left to compute. Here work is taken piece by piece
// by whoever is there, and a thread that comes when all is taken finds the door closed.
#include <cstdint>

namespace shoal {

// Calls body(context, true) on this thread and body(context, false) on free threads of the team, and returns when all
// who began have ended. The body takes its work from a common counter until none is left, so that one thread would do,
// and one does where the system gives no more. It must not throw. One call at a time: called while another thread's call
// is under way, or from within one, it runs alone.
void run_together(void (*body)(const void *context, bool here), const void *context);

// How many threads a team has, the caller included.
int64_t team_size();
void set_team_size(int64_t threads);

namespace {

// Runs body(here) on the team when that is worth it, else on this thread alone; `here` is true on this thread.
template <class Body>
inline void together(bool worth, const Body &body) {
  if (!worth || team_size() == 1) return body(true);
  run_together([](const void *context, bool here) { (*(const Body *)context)(here); }, &body);
}

// Calls body(i) once for each 0 <= i < count, in any order.
template <class Body>
inline void for_each(int64_t count, bool worth, const Body &body) {
  int64_t next = 0;
  const int64_t piece = count / (8 * team_size()) + 1;
  together(worth && count > 1, [&](bool) {
    for (;;) {
      const int64_t from = __atomic_fetch_add(&next, piece, __ATOMIC_RELAXED);
      if (from >= count) return;
      const int64_t to = from + piece < count ? from + piece : count;
      for (int64_t i = from; i < to; i++) body(i);
    }
  });
}

}  // namespace
}  // namespace shoal
