// Atomic access to plain words in memory that several ranks map. The only place that names memory orders.
#pragma once

#include <cstdint>

#include "core/platform.h"

#ifdef __CUDACC__
#include <cuda/atomic>
#endif
#include <atomic>

namespace pycoll {

#ifdef __CUDA_ARCH__
template <class T>
using AtomicRef = cuda::atomic_ref<T, cuda::thread_scope_system>;
namespace order = cuda::std;
#else
template <class T>
using AtomicRef = std::atomic_ref<T>;
namespace order = std;
#endif

template <class T>
PYCOLL_HD T load_relaxed(const T& word) {
  return AtomicRef<T>(const_cast<T&>(word)).load(order::memory_order_relaxed);
}

template <class T>
PYCOLL_HD void store_relaxed(T& word, T value) {
  AtomicRef<T>(word).store(value, order::memory_order_relaxed);
}

template <class T>
PYCOLL_HD T load_acquire(const T& word) {
  return AtomicRef<T>(const_cast<T&>(word)).load(order::memory_order_acquire);
}

template <class T>
PYCOLL_HD T load_seq_cst(const T& word) {
  return AtomicRef<T>(const_cast<T&>(word)).load(order::memory_order_seq_cst);
}

template <class T>
PYCOLL_HD void store_release(T& word, T value) {
  AtomicRef<T>(word).store(value, order::memory_order_release);
}

template <class T>
PYCOLL_HD T exchange_seq_cst(T& word, T value) {
  return AtomicRef<T>(word).exchange(value, order::memory_order_seq_cst);
}

template <class T>
PYCOLL_HD T fetch_add_seq_cst(T& word, T value) {
  return AtomicRef<T>(word).fetch_add(value, order::memory_order_seq_cst);
}

template <class T>
PYCOLL_HD bool compare_exchange(T& word, T expected, T value) {
  return AtomicRef<T>(word).compare_exchange_strong(expected, value, order::memory_order_acq_rel,
                                                    order::memory_order_acquire);
}

}  // namespace pycoll
