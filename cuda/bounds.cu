// Kernels of bounds: looked up, solved, and applied to ratios.

namespace bandpo {

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

// A log-ratio, or a ratio, moved to the nearest bound where it lies outside; NaN in either gives NaN.
template <class T, class Bounds>
BAND_FUNCTION T clipped(const Bounds& bounds, Index index, T old_log_prob, T value, bool of_ratio) {
  const bool lower = value < T(of_ratio ? 1 : 0);
  const bool is_ratio = lower && Bounds::LOWER_IS_RATIO;
  T bound = bounds.at(index, old_log_prob, lower);
  if (is_ratio != of_ratio) bound = of_ratio ? exp(bound) : log(bound);
  if (is_nan(bound) || is_nan(old_log_prob)) return bound + old_log_prob;
  return (lower ? value < bound : bound < value) ? bound : value;
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
