// The kernels. Every one strides over its work, so that any grid gives the same result bit for bit; arrays
// are contiguous unless strides are given. Compiled by NVRTC, as one string after band.cuh.

#ifndef BAND_TABLE_IN_SHARED_MEMORY
#define BAND_TABLE_IN_SHARED_MEMORY(name) extern __shared__ unsigned name[]
#endif

namespace bandpo {

const int THREADS = 256;  // in a block of every kernel
const int BLOCKS = 3;     // of policy_loss that fit a multiprocessor: with a fourth registers would be spilled
const int WARPS = THREADS / 32;
const int WIDTH = 4;         // tokens that a thread loads at a time
const int VECTORS = 8;       // times that it does so in a chunk: 32 tokens, which Outcome::flags can hold
const int CHUNK = THREADS * WIDTH * VECTORS;  // tokens that are added up to one partial result
const int SUMS = 7;          // of -x, r - 1 - x, -old_log_prob, the gradient, what is removed; least and most x
const int COUNTS = 5;        // valid, nonfinite, clipped low, clipped high, limited
const int BINS = 5;          // of the old probability
const int MOST_COUNTS = COUNTS + 3 * BINS;

template <class T>
struct alignas(sizeof(T) * WIDTH < 16 ? sizeof(T) * WIDTH : 16) Vector {
  T item[WIDTH];
};

// An argument of shape [rows, row_length]. `whole` says that it is contiguous and aligned for vectors.
template <class Stored>
struct Source {
  const Stored* data;
  Index row_stride, column_stride;
  bool whole;
};

// The bounds that a pointer stands for.
template <class Bounds>
struct BoundsOf;
template <class T>
struct BoundsOf<Constant<T>> {
  __device__ static Constant<T> make(const void* bounds, const unsigned*, Index) {
    const T* both = static_cast<const T*>(bounds);
    const Constant<T> made = {both[0], both[1]};
    return made;
  }
};
template <class T>
struct BoundsOf<Table<T>> {
  __device__ static Table<T> make(const void*, const unsigned* table, Index) {
    const Table<T> made = {table};
    return made;
  }
};
template <class T>
struct BoundsOf<PerToken<T>> {
  __device__ static PerToken<T> make(const void* bounds, const unsigned*, Index count) {
    const T* both = static_cast<const T*>(bounds);
    const PerToken<T> made = {both, both + count};
    return made;
  }
};

template <class Stored, class T>
__device__ __forceinline__ void load(const Source<Stored>& from, Index first, int count, Index row_length,
                                     T (&to)[WIDTH]) {
  if (from.whole && count == WIDTH) {
    const Vector<Stored> vector = *reinterpret_cast<const Vector<Stored>*>(from.data + first);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) to[k] = static_cast<T>(widened(vector.item[k]));
    return;
  }
  // One division for the vector; its tokens may lie in several rows. Most batches allow a short division.
  Index row, column;
  if (((first | row_length) >> 32) == 0) {
    row = static_cast<unsigned>(first) / static_cast<unsigned>(row_length);
    column = static_cast<unsigned>(first) % static_cast<unsigned>(row_length);
  } else {
    row = first / row_length;
    column = first % row_length;
  }
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    if (k >= count) break;
    to[k] = static_cast<T>(widened(from.data[row * from.row_stride + column * from.column_stride]));
    if (++column == row_length) {
      column = 0;
      ++row;
    }
  }
}

// In assembly: the compiler takes a store of a Vector, and of its own float4, apart.
__device__ __forceinline__ void store_vector(float* to, const float (&from)[WIDTH]) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3])
               : "memory");
#else
  *reinterpret_cast<Vector<float>*>(to) = {{from[0], from[1], from[2], from[3]}};
#endif
}

__device__ __forceinline__ void store_vector(double* to, const double (&from)[WIDTH]) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.f64 [%0], {%1, %2}; st.global.v2.f64 [%0+16], {%3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "d"(from[0]), "d"(from[1]), "d"(from[2]), "d"(from[3])
               : "memory");
#else
  *reinterpret_cast<Vector<double>*>(to) = {{from[0], from[1], from[2], from[3]}};
#endif
}

template <class T>
__device__ __forceinline__ void store(T* to, Index first, int count, bool whole, const T (&from)[WIDTH]) {
  if (whole && count == WIDTH) {
    store_vector(to + first, from);
    return;
  }
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    if (k < count) to[first + k] = from[k];
  }
}

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

// Loss and gradient of every token, and what those of each chunk add up to.
//
// Bounds: `bounds` points to log_lower and log_upper, to a table of `table_words`, or to all lower and then all
// upper log bounds. Rule: see bandpo::Rule. `vectors` has a bit for each of old_log_prob, log_prob, log_ratio,
// advantages, valid, loss and gradient that may be read or written in vectors. log_ratio may be null.
// sums is [SUMS, chunks], counts [COUNTS, chunks], or [MOST_COUNTS, chunks] with by_probability.
template <class Stored, template <class> class Bounds>
__global__ void __launch_bounds__(THREADS, sizeof(Stored) == 8 ? 1 : BLOCKS) policy_loss(
    const Stored* old_log_prob, Index old_row, Index old_column,
    const Stored* log_prob, Index new_row, Index new_column,
    const typename Computed<Stored>::Type* log_ratio, Index ratio_row, Index ratio_column,
    const typename Computed<Stored>::Type* advantages, Index advantage_row, Index advantage_column,
    const unsigned char* valid, Index valid_row, Index valid_column,
    Index count, Index row_length, unsigned vectors,
    const void* bounds, int table_words,
    int surrogate, double first, double second, double log_first, int by_probability,
    typename Computed<Stored>::Type* loss, typename Computed<Stored>::Type* gradient,
    double* sums, int* counts) {
  typedef typename Computed<Stored>::Type T;
  BAND_TABLE_IN_SHARED_MEMORY(table);
  __shared__ double sums_of_warps[WARPS][SUMS];
  __shared__ int counts_of_warps[WARPS][MOST_COUNTS];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  for (int word = thread; word < table_words; word += THREADS) {
    table[word] = static_cast<const unsigned*>(bounds)[word];
  }
  __syncthreads();
  const Bounds<T> region = BoundsOf<Bounds<T>>::make(bounds, table, count);
  const Rule<T> rule = {surrogate, static_cast<T>(first), static_cast<T>(second), static_cast<T>(log_first)};
  const Source<Stored> of_old = {old_log_prob, old_row, old_column, (vectors & 1u) != 0};
  const Source<Stored> of_new = {log_prob, new_row, new_column, (vectors & 2u) != 0};
  const Source<T> of_ratio = {log_ratio, ratio_row, ratio_column, (vectors & 4u) != 0};
  const Source<T> of_advantages = {advantages, advantage_row, advantage_column, (vectors & 8u) != 0};
  const Source<unsigned char> of_valid = {valid, valid_row, valid_column, (vectors & 16u) != 0};

  const Index chunks = (count + CHUNK - 1) / CHUNK;
  for (Index chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    Totals<T> totals;
    totals.clear();
    for (int vector = 0; vector < VECTORS; ++vector) {
      const Index start = chunk * CHUNK + (vector * THREADS + thread) * WIDTH;
      if (start >= count) break;
      const int here = count - start < WIDTH ? static_cast<int>(count - start) : WIDTH;
      T was[WIDTH], is[WIDTH], advantage[WIDTH], ratio[WIDTH], losses[WIDTH], slopes[WIDTH];
      unsigned char counted[WIDTH];
      load(of_valid, start, here, row_length, counted);
      load(of_old, start, here, row_length, was);
      load(of_new, start, here, row_length, is);
      load(of_advantages, start, here, row_length, advantage);
      if (log_ratio) load(of_ratio, start, here, row_length, ratio);
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) {
        Outcome<T> token = masked<T>();
        if (k < here && counted[k]) {
          const T unclamped = log_ratio ? ratio[k] : is[k] - was[k];
          token = outcome(rule, region, start + k, was[k], is[k], unclamped, advantage[k]);
          totals.add(token, was[k], by_probability != 0);
        }
        losses[k] = token.loss;
        slopes[k] = token.slope;
      }
      store(loss, start, here, (vectors & 32u) != 0, losses);
      store(gradient, start, here, (vectors & 64u) != 0, slopes);
    }

    const double of_thread[SUMS - 2] = {totals.kl, totals.kl_k3, totals.entropy, totals.gradient_free,
                                        totals.gradient_removed};
#pragma unroll
    for (int k = 0; k < SUMS - 2; ++k) {
      const double sum = of_warp(of_thread[k], Add());
      if (lane == 0) sums_of_warps[warp][k] = sum;
    }
    const double least = of_warp(static_cast<double>(totals.least), Smaller());
    const double most = of_warp(static_cast<double>(totals.most), Greater());
    if (lane == 0) {
      sums_of_warps[warp][SUMS - 2] = least;
      sums_of_warps[warp][SUMS - 1] = most;
    }
#pragma unroll
    for (int k = 0; k < COUNTS; ++k) {
      const int number = of_warp(static_cast<int>(totals.flags >> 6 * k & 63u), Add());
      if (lane == 0) counts_of_warps[warp][k] = number;
    }
    const int kinds = by_probability ? MOST_COUNTS : COUNTS;
    for (int k = COUNTS; k < kinds; ++k) {
      const int kind = (k - COUNTS) / BINS, bin = (k - COUNTS) % BINS;
      const unsigned by_bin = kind == 0 ? totals.valid_by_bin : kind == 1 ? totals.low_by_bin : totals.high_by_bin;
      const int number = of_warp(static_cast<int>(by_bin >> 6 * bin & 63u), Add());
      if (lane == 0) counts_of_warps[warp][k] = number;
    }
    __syncthreads();
    if (thread < SUMS) {
      double sum = sums_of_warps[0][thread];
      for (int k = 1; k < WARPS; ++k) {
        const double more = sums_of_warps[k][thread];
        sum = thread < SUMS - 2 ? sum + more : thread == SUMS - 2 ? smaller(sum, more) : -smaller(-sum, -more);
      }
      sums[thread * chunks + chunk] = sum;
    } else if (thread >= 32 && thread < 32 + kinds) {
      int number = 0;
      for (int k = 0; k < WARPS; ++k) number += counts_of_warps[k][thread - 32];
      counts[(thread - 32) * chunks + chunk] = number;
    }
    __syncthreads();  // before the next chunk writes there
  }
}

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

// The second stage: a block adds up one row of the partial results, always in the same order.
// A template, like all others, so that it is compiled where it is asked for.
template <class Sum>
__global__ void __launch_bounds__(THREADS) policy_loss_totals(const Sum* sums, const int* counts, Index chunks,
                                                              int kinds, Sum* total_sums, Index* total_counts) {
  for (int row = blockIdx.x; row < SUMS + kinds; row += gridDim.x) {
    if (row < SUMS) {
      const Sum* of_chunks = sums + row * chunks;
      const Sum total = row < SUMS - 2    ? of_row(of_chunks, chunks, Sum(0), Add())
                           : row == SUMS - 2 ? of_row(of_chunks, chunks, infinity(Sum()), Smaller())
                                             : of_row(of_chunks, chunks, -infinity(Sum()), Greater());
      if (threadIdx.x == 0) total_sums[row] = total;
    } else {
      const int k = row - SUMS;
      const Index total = of_row(counts + k * chunks, chunks, Index(0), Add());
      if (threadIdx.x == 0) total_counts[k] = total;
    }
  }
}

// log_lower and log_upper of every token, from a table.
template <class Stored>
__global__ void __launch_bounds__(THREADS, 1) band_bounds(const Stored* old_log_prob, Index count,
                                                       const unsigned* words, int table_words,
                                                       typename Computed<Stored>::Type* log_lower,
                                                       typename Computed<Stored>::Type* log_upper) {
  typedef typename Computed<Stored>::Type T;
  BAND_TABLE_IN_SHARED_MEMORY(table);
  for (int word = threadIdx.x; word < table_words; word += THREADS) table[word] = words[word];
  __syncthreads();
  const Index stride = static_cast<Index>(gridDim.x) * THREADS;
  for (Index i = static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x; i < count; i += stride) {
    const T logp = widened(old_log_prob[i]);
    log_lower[i] = log(tabulated(table, logp, true));
    log_upper[i] = tabulated(table, logp, false);
  }
}

// Log-ratios, or ratios, moved to the nearest bound where they lie outside.
template <class Stored, template <class> class Bounds>
__global__ void __launch_bounds__(THREADS, 1) band_clip(const Stored* old_log_prob,
                                                     const typename Computed<Stored>::Type* values, Index count,
                                                     int of_ratio, const void* bounds, int table_words,
                                                     typename Computed<Stored>::Type* moved) {
  typedef typename Computed<Stored>::Type T;
  BAND_TABLE_IN_SHARED_MEMORY(table);
  for (int word = threadIdx.x; word < table_words; word += THREADS) {
    table[word] = static_cast<const unsigned*>(bounds)[word];
  }
  __syncthreads();
  const Bounds<T> region = BoundsOf<Bounds<T>>::make(bounds, table, count);
  const Index stride = static_cast<Index>(gridDim.x) * THREADS;
  for (Index i = static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x; i < count; i += stride) {
    const T logp = widened(old_log_prob[i]);
    moved[i] = clipped(region, i, logp, values[i], of_ratio != 0);
  }
}

// Exact log bounds of every token, [2, count]. A radius is that of the generator; its stride is 0 if there is
// one for all tokens.
template <class Stored>
__global__ void __launch_bounds__(THREADS, 1) band_solve(const Stored* old_log_prob, Index count, int kind,
                                                      double parameter, const double* low, const double* high,
                                                      Index radius_stride, double* log_bounds) {
  const Generator f = {kind, parameter};
  const Index stride = static_cast<Index>(gridDim.x) * THREADS;
  // Sides are apart, so that neighbours do the same work.
  for (Index i = static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x; i < 2 * count; i += stride) {
    const bool lower = i < count;
    const Index token = lower ? i : i - count;
    log_bounds[i] = exact_bound(f, old_log_prob[token], (lower ? low : high)[token * radius_stride], lower);
  }
}

// Whether each log-ratio lies in the band.
template <class Stored>
__global__ void __launch_bounds__(THREADS, 1) band_contains(const Stored* old_log_prob, const Stored* log_ratio,
                                                         Index count, int kind, double parameter,
                                                         const double* low, const double* high,
                                                         Index radius_stride, unsigned char* inside) {
  const Generator f = {kind, parameter};
  const Index stride = static_cast<Index>(gridDim.x) * THREADS;
  for (Index i = static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x; i < count; i += stride) {
    const double x = log_ratio[i];
    inside[i] = contains(f, old_log_prob[i], (x < 0.0 ? low : high)[i * radius_stride], x);
  }
}

}  // namespace bandpo
