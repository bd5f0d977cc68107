// Threads: one OpenMP region per call, shared with torch's own pool when both load the same libgomp.
#pragma once

namespace lora_fused {

using ParallelBody = void (*)(void* context, int thread, int num_threads);

// Runs body on `threads` threads (1 inside somebody else's parallel region, as OpenMP nests by default).
// Safe in a forked child, where OpenMP's pool has lost its threads. Throws std::bad_alloc if a thread did.
void run_parallel(int threads, ParallelBody body, void* context);

// Waits for every thread of the running region. A body that runs alone may be inside somebody else's region,
// whose barrier is not ours to join: num_threads is what the body was given.
void parallel_barrier(int num_threads);

// Runs a step between two barriers of the running region. NOTE: a thread that left with std::bad_alloc would
// leave the others waiting; the step is cut short instead, those that follow are skipped, and the region
// throws at its end.
void run_step(void (*step)(void* context), void* context);

template <class Step>
void parallel_step(Step step) {
  run_step([](void* context) { (*static_cast<Step*>(context))(); }, &step);
}

template <class Body>
void parallel(int threads, Body& body) {
  run_parallel(
      threads,
      [](void* context, int thread, int num_threads) { (*static_cast<Body*>(context))(thread, num_threads); },
      &body);
}

}  // namespace lora_fused
