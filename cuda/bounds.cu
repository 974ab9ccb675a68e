// Kernels of bounds: looked up, applied to ratios, and solved.

namespace bandpo {

// log_lower and log_upper of every token, from a table.
template <class Stored>
__global__ void __launch_bounds__(THREADS, 1) band_bounds(const Stored* old_log_prob, Index count,
                                                          const unsigned* words, int table_words,
                                                          typename Computed<Stored>::Type* log_lower,
                                                          typename Computed<Stored>::Type* log_upper) {
  typedef typename Computed<Stored>::Type T;
  BAND_TABLE_IN_SHARED_MEMORY(table);
  copy_table(words, table_words, table);
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
  copy_table(bounds, table_words, table);
  const Bounds<T> token_bounds = Bounds<T>::make(bounds, table, count);
  const Index stride = static_cast<Index>(gridDim.x) * THREADS;
  for (Index i = static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x; i < count; i += stride) {
    const T logp = widened(old_log_prob[i]);
    moved[i] = clipped(token_bounds, i, logp, values[i], of_ratio != 0);
  }
}

// Exact log bounds of every token, [2, count]. Radii are those of the generator; their stride is 0 if all tokens
// share one, otherwise 1.
template <class Stored>
__global__ void __launch_bounds__(THREADS, 1) band_solve(const Stored* old_log_prob, Index count, int kind,
                                                         double parameter, const double* low, const double* high,
                                                         Index radius_stride, double* log_bounds) {
  const Generator f = {kind, parameter};
  const Index stride = static_cast<Index>(gridDim.x) * THREADS;
  // All lower bounds precede all upper ones, so that neighbouring threads take the same branches.
  for (Index i = static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x; i < 2 * count; i += stride) {
    const bool lower = i < count;
    const Index token = lower ? i : i - count;
    log_bounds[i] = exact_bound(f, widened(old_log_prob[token]), (lower ? low : high)[token * radius_stride], lower);
  }
}

// True for each log-ratio that lies in the band.
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
