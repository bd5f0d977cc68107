#include "parallel.h"

#include <atomic>
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
void openmp_region(int threads, ParallelBody body, void* context) {
#pragma omp parallel num_threads(threads)
  body(context, omp_get_thread_num(), omp_get_num_threads());
}

#ifdef LORA_FUSED_HAS_FORK
std::atomic<bool> in_forked_child{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif
#endif

}  // namespace

void run_parallel(int threads, ParallelBody body, void* context) {
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
#ifdef LORA_FUSED_HAS_FORK
    if (in_forked_child) {
      // NOTE: libgomp keeps its pool per calling thread and does not notice a fork: a region started on the
      // forked thread would wait for workers that do not exist. A fresh thread starts with a fresh pool.
      std::thread([&] { openmp_region(threads, body, context); }).join();
      return;
    }
#endif
    openmp_region(threads, body, context);
    return;
  }
#endif
  (void)threads;
  body(context, 0, 1);
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
