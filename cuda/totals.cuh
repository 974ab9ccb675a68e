// Totals of a loss: counts and sums of a thread, of a block, and of all blocks.

namespace bandpo {

const int WARPS = THREADS / 32;

// Rows of the sums of a loss: those that are added, then min and max of the log-ratio.
enum Sum {
  SUM_KL,                  // -x of the log-ratio x
  SUM_KL_K3,               // e^x - 1 - x
  SUM_ENTROPY,             // -old_log_prob
  SUM_GRADIENT_UNCLIPPED,  // |A| e^x
  SUM_GRADIENT_REMOVED,    // what the rule takes from it
  LOG_RATIO_MIN,
  LOG_RATIO_MAX,
  SUMS
};

// Rows of the counts by probability, after those of Count: all bins of the first, of the second, of the third.
enum BinnedCount { BINNED_VALID, BINNED_CLIPPED_LOW, BINNED_CLIPPED_HIGH, BINNED_COUNTS };
const int BINS = 5;
const int MAX_COUNTS = COUNTS + BINNED_COUNTS * BINS;

// The bin of an old probability, with edges at 1e-3, 1e-2, 1e-1 and 0.5.
template <class T>
BAND_FUNCTION int probability_bin(T old_log_prob) {
  return (T(-6.907755278982137) <= old_log_prob) + (T(-4.605170185988091) <= old_log_prob) +
         (T(-2.3025850929940455) <= old_log_prob) + (T(-0.6931471805599453) <= old_log_prob);
}

// Totals of a thread.
template <class T>
struct Totals {
  T kl, kl_k3, entropy, gradient_unclipped, gradient_removed, log_ratio_min, log_ratio_max;
  unsigned counts;                                                 // packed, by Count
  unsigned valid_by_bin, clipped_low_by_bin, clipped_high_by_bin;  // packed, by bin

  BAND_FUNCTION void clear() {
    kl = kl_k3 = entropy = gradient_unclipped = gradient_removed = T(0);
    log_ratio_min = infinity(T());
    log_ratio_max = -infinity(T());
    counts = valid_by_bin = clipped_low_by_bin = clipped_high_by_bin = 0u;
  }

  BAND_FUNCTION void add(const Outcome<T>& token, T old_log_prob, bool by_probability) {
    kl -= token.log_ratio;
    kl_k3 += token.kl_k3;
    entropy -= old_log_prob;
    gradient_unclipped += token.gradient_unclipped;
    gradient_removed += token.gradient_removed;
    log_ratio_min = minimum(log_ratio_min, token.log_ratio);
    log_ratio_max = maximum(log_ratio_max, token.log_ratio);
    counts += token.counts;
    if (by_probability) {
      const unsigned one = packed_one(probability_bin(old_log_prob));
      valid_by_bin += one;
      if (token.counts & packed_one(CLIPPED_LOW)) clipped_low_by_bin += one;
      if (token.counts & packed_one(CLIPPED_HIGH)) clipped_high_by_bin += one;
    }
  }
};

struct Add {
  template <class T>
  BAND_FUNCTION T operator()(T a, T b) const {
    return a + b;
  }
};

struct Minimum {
  template <class T>
  BAND_FUNCTION T operator()(T a, T b) const {
    return minimum(a, b);
  }
};

struct Maximum {
  template <class T>
  BAND_FUNCTION T operator()(T a, T b) const {
    return maximum(a, b);
  }
};

// Combines the values of a warp; the first lane has the result.
template <class T, class Combine>
BAND_FUNCTION T reduced_warp(T value, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_down_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Writes the totals of a block to one column of sums and counts. Every thread of the block takes part.
template <class T>
BAND_FUNCTION void store_totals(const Totals<T>& totals, bool by_probability, Index column, Index columns,
                                double* sums, int* counts) {
  __shared__ double sums_of_warps[WARPS][SUMS];
  __shared__ int counts_of_warps[WARPS][MAX_COUNTS];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  const double added[LOG_RATIO_MIN] = {totals.kl, totals.kl_k3, totals.entropy, totals.gradient_unclipped,
                                       totals.gradient_removed};
#pragma unroll
  for (int k = 0; k < LOG_RATIO_MIN; ++k) {
    const double sum = reduced_warp(added[k], Add());
    if (lane == 0) sums_of_warps[warp][k] = sum;
  }
  const double min = reduced_warp(static_cast<double>(totals.log_ratio_min), Minimum());
  const double max = reduced_warp(static_cast<double>(totals.log_ratio_max), Maximum());
  if (lane == 0) {
    sums_of_warps[warp][LOG_RATIO_MIN] = min;
    sums_of_warps[warp][LOG_RATIO_MAX] = max;
  }
#pragma unroll
  for (int k = 0; k < COUNTS; ++k) {
    const int number = reduced_warp(unpacked(totals.counts, k), Add());
    if (lane == 0) counts_of_warps[warp][k] = number;
  }
  const int count_rows = by_probability ? MAX_COUNTS : COUNTS;
  for (int k = COUNTS; k < count_rows; ++k) {
    const int kind = (k - COUNTS) / BINS, bin = (k - COUNTS) % BINS;
    const unsigned by_bin = kind == BINNED_VALID         ? totals.valid_by_bin
                            : kind == BINNED_CLIPPED_LOW ? totals.clipped_low_by_bin
                                                         : totals.clipped_high_by_bin;
    const int number = reduced_warp(unpacked(by_bin, bin), Add());
    if (lane == 0) counts_of_warps[warp][k] = number;
  }
  __syncthreads();
  if (thread < SUMS) {
    double sum = sums_of_warps[0][thread];
    for (int k = 1; k < WARPS; ++k) {
      const double more = sums_of_warps[k][thread];
      sum = thread < LOG_RATIO_MIN ? sum + more : thread == LOG_RATIO_MIN ? minimum(sum, more) : maximum(sum, more);
    }
    sums[thread * columns + column] = sum;
  } else if (thread >= 32 && thread < 32 + count_rows) {
    int number = 0;
    for (int k = 0; k < WARPS; ++k) number += counts_of_warps[k][thread - 32];
    counts[(thread - 32) * columns + column] = number;
  }
  __syncthreads();  // otherwise the next call could overwrite what is still read
}

// Combines the elements of a row, always in the same order. Every thread of the block takes part.
template <class T, class Element, class Combine>
BAND_FUNCTION T reduced_row(const Element* row, Index length, T identity, Combine combine) {
  __shared__ T of_threads[THREADS];
  T result = identity;
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
  __syncthreads();  // otherwise the next call could overwrite what is still read
  return result;
}

}  // namespace bandpo
