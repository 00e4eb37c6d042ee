// The team. Its door is a number: odd while a call is open. A helper that sees it open counts itself in, looks again,
// and works if it is still the same; the caller closes the door when it has run out of work, and waits for those inside.
// Whoever writes one of the two words reads the other afterwards, so one of them always sees what the other did.
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace shoal {
namespace {

// How long a helper looks at the door before it sleeps: longer than Python takes between two calls of a step. First it
// keeps its core, then it lets others have it in between.
constexpr int SPINS = 2000, YIELDS = 200;

// Calls for which a team goes on with the helpers it has when it could not get another, before it asks again: to be
// refused takes longer than many a call.
constexpr int REFUSED = 1000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  static Team &instance() {
    static Team *const *team = first();
    return **team;
  }

  void run(void (*work)(const void *, bool), const void *argument) {
    if (busy.exchange(true, std::memory_order_acquire)) return work(argument, true);
    hire();
    body = work, context = argument;
    door.fetch_add(1);
    if (sleeping.load()) {
      { std::lock_guard<std::mutex> lock(mutex); }
      alarm.notify_all();
    }
    work(argument, true);
    door.fetch_add(1);
    for (int tries = 0; inside.load(); tries++) tries < SPINS ? pause() : (void)sched_yield();
    busy.store(false, std::memory_order_release);
  }

  std::atomic<int64_t> size{1};

 private:
  // Teams are never taken apart: helpers may outlive everything else. A process that was forked has no helpers, and what
  // they held when it was made, they hold for ever: it gets a new team.
  static Team **first() {
    static Team *team = new Team;
    pthread_atfork(nullptr, nullptr, [] {
      Team *fresh = new Team;
      fresh->size.store(team->size.load());
      team = fresh;
    });
    return &team;
  }

  void hire() {
    if (hired + 1 >= size.load(std::memory_order_relaxed)) return;
    if (refused) return (void)refused--;
    try {
      for (; hired + 1 < size.load(std::memory_order_relaxed); hired++) std::thread(&Team::help, this, hired).detach();
    } catch (const std::exception &) {  // no thread or no memory for one: those who are here do the work
      refused = REFUSED;
    }
  }

  void help(int64_t number) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);  // they are for the interpreter's threads
    uint64_t seen = 0;
    for (;;) {
      const uint64_t now = wait(seen);
      if (now % 2 == 0) continue;  // closed again while this thread woke up
      seen = now;
      if (number + 1 >= size.load(std::memory_order_relaxed)) continue;
      inside.fetch_add(1);
      if (door.load() == now) body(context, false);
      inside.fetch_sub(1);
    }
  }

  // An open door that is not `seen`.
  uint64_t wait(uint64_t seen) {
    auto fresh = [&](uint64_t now) { return now % 2 && now != seen; };
    for (int tries = 0; tries < SPINS + YIELDS; tries++) {
      const uint64_t now = door.load();
      if (fresh(now)) return now;
      tries < SPINS ? pause() : (void)sched_yield();
    }
    std::unique_lock<std::mutex> lock(mutex);
    sleeping.fetch_add(1);
    alarm.wait(lock, [&] { return fresh(door.load()); });
    sleeping.fetch_sub(1);
    return door.load();
  }

  alignas(64) std::atomic<uint64_t> door{0};
  alignas(64) std::atomic<int64_t> inside{0};
  alignas(64) std::atomic<int64_t> sleeping{0};
  std::atomic<bool> busy{false};
  void (*body)(const void *, bool) = nullptr;  // these two change only while nobody is inside
  const void *context = nullptr;
  int64_t hired = 0;
  int refused = 0;  // calls left before it asks for helpers again
  std::mutex mutex;
  std::condition_variable alarm;
};

}  // namespace

void run_together(void (*body)(const void *, bool), const void *context) { Team::instance().run(body, context); }

int64_t team_size() { return Team::instance().size.load(std::memory_order_relaxed); }

void set_team_size(int64_t threads) { Team::instance().size.store(threads < 1 ? 1 : threads); }

}  // namespace shoal
