#include "parallel.h"

#include <atomic>
#include <new>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define LORA_FUSED_HAS_FORK 1
#endif

namespace lora_fused {
namespace {

#ifdef _OPENMP
struct Region {
  std::atomic<bool> out_of_memory{false};

  template <class F>
  void guard(F f) {
    try {
      f();
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
};

thread_local Region* running = nullptr;

void openmp_region(int threads, ParallelBody body, void* context, Region& region) {
#pragma omp parallel num_threads(threads)
  {
    running = &region;
    region.guard([&] { body(context, omp_get_thread_num(), omp_get_num_threads()); });
    running = nullptr;
  }
}

#ifdef LORA_FUSED_HAS_FORK
std::atomic<bool> in_forked_child{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

void run_region(int threads, ParallelBody body, void* context, Region& region) {
#ifdef LORA_FUSED_HAS_FORK
  if (in_forked_child) {
    // NOTE: libgomp keeps its pool per calling thread and does not notice a fork: a region started on the
    // forked thread would wait for workers that do not exist. A fresh thread starts with a fresh pool.
    std::thread([&] { openmp_region(threads, body, context, region); }).join();
    return;
  }
#endif
  openmp_region(threads, body, context, region);
}
#endif

}  // namespace

void run_parallel(int threads, ParallelBody body, void* context) {
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
    Region region;
    run_region(threads, body, context, region);
    if (region.out_of_memory) throw std::bad_alloc();
    return;
  }
#endif
  (void)threads;
  body(context, 0, 1);
}

void run_step(void (*step)(void* context), void* context) {
#ifdef _OPENMP
  if (running) {
    if (!running->out_of_memory) running->guard([&] { step(context); });
    return;
  }
#endif
  step(context);
}

void parallel_barrier(int num_threads) {
#ifdef _OPENMP
  if (num_threads > 1) {
#pragma omp barrier
  }
#endif
  (void)num_threads;
}

}  // namespace lora_fused
