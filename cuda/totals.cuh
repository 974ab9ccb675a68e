// Counts and sums of many tokens, and how the threads of a block add them up.

namespace bandpo {

const int WARPS = THREADS / 32;

const int SUMS = 7;          // of -x, r - 1 - x, -old_log_prob, the gradient, what is removed; least and most x
const int COUNTS = 5;        // valid, nonfinite, clipped low, clipped high, limited
const int BINS = 5;          // of the old probability
const int MOST_COUNTS = COUNTS + 3 * BINS;

template <class T, class Combine>
__device__ __forceinline__ T of_warp(T value, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_down_sync(0xffffffffu, value, distance));
  }
  return value;
}

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Smaller {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return smaller(a, b);
  }
};

struct Greater {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return -smaller(-a, -b);
  }
};

// What the tokens of a thread add up to.
template <class T>
struct Totals {
  T kl, kl_k3, entropy, gradient_free, gradient_removed, least, most;
  unsigned flags;
  unsigned valid_by_bin, low_by_bin, high_by_bin;  // six bits a bin

  __device__ __forceinline__ void clear() {
    kl = kl_k3 = entropy = gradient_free = gradient_removed = T(0);
    least = infinity(T());
    most = -infinity(T());
    flags = valid_by_bin = low_by_bin = high_by_bin = 0u;
  }

  __device__ __forceinline__ void add(const Outcome<T>& token, T old_log_prob, bool by_probability) {
    kl -= token.log_ratio;
    kl_k3 += token.kl_k3;
    entropy -= old_log_prob;
    gradient_free += token.gradient_free;
    gradient_removed += token.gradient_removed;
    least = smaller(least, token.log_ratio);
    most = -smaller(-most, -token.log_ratio);
    flags += token.flags;
    if (by_probability) {
      const unsigned one = 1u << 6 * probability_bin(old_log_prob);
      valid_by_bin += one;
      if (token.flags & CLIPPED_LOW) low_by_bin += one;
      if (token.flags & CLIPPED_HIGH) high_by_bin += one;
    }
  }
};

template <class T, class Element, class Combine>
__device__ __forceinline__ T of_row(const Element* row, Index length, T nothing, Combine combine) {
  __shared__ T of_threads[THREADS];
  T result = nothing;
  for (Index k = threadIdx.x; k < length; k += THREADS) result = combine(result, static_cast<T>(row[k]));
  of_threads[threadIdx.x] = result;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < static_cast<unsigned>(half)) {
      of_threads[threadIdx.x] = combine(of_threads[threadIdx.x], of_threads[threadIdx.x + half]);
    }
    __syncthreads();
  }
  result = of_threads[0];
  __syncthreads();  // before the next row writes there
  return result;
}

}  // namespace bandpo
