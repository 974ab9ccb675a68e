// Totals of a loss: counts and sums of a thread, of a block, and of all blocks.

namespace bandpo {

const int WARPS = THREADS / 32;

// Rows of the sums of a loss. All are added but the min and max of the log-ratio.
enum Sum {
  SUM_KL,                  // -x of the log-ratio x
  SUM_KL_K3,               // e^x - 1 - x
  SUM_ENTROPY,             // -old_log_prob
  SUM_GRADIENT_UNCLIPPED,  // |A| e^x
  SUM_GRADIENT_REMOVED,    // what the rule takes from it
  LOG_RATIO_MIN,
  LOG_RATIO_MAX,
  SUM_LOSS,
  SUMS
};
static_assert(SUMS == WARPS, "a warp adds up each row");

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
  T kl, kl_k3, entropy, gradient_unclipped, gradient_removed, log_ratio_min, log_ratio_max, loss;
  unsigned counts;  // packed, by Count

  BAND_FUNCTION void clear() {
    kl = kl_k3 = entropy = gradient_unclipped = gradient_removed = loss = T(0);
    log_ratio_min = infinity(T());
    log_ratio_max = -infinity(T());
    counts = 0u;
  }

  // Counts the losses that are not finite; there are none where their sum of sizes is finite.
  BAND_FUNCTION void count_nonfinite(T size, const T (&losses)[WIDTH]) {
    if (size < infinity(T())) return;
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      if (!(magnitude(losses[k]) < infinity(T()))) counts += packed_one(NONFINITE);
    }
  }

  BAND_FUNCTION void add(const Outcome<T>& token, T old_log_prob) {
    kl -= token.log_ratio;
    kl_k3 += token.kl_k3;
    entropy -= old_log_prob;
    gradient_unclipped += token.gradient_unclipped;
    gradient_removed += token.gradient_removed;
    loss += token.loss;
    log_ratio_min = minimum(log_ratio_min, token.log_ratio);
    log_ratio_max = maximum(log_ratio_max, token.log_ratio);
    counts += packed_one(VALID);
    if (!(magnitude(token.loss) < infinity(T()))) counts += packed_one(NONFINITE);
    if (token.clipped_low) counts += packed_one(CLIPPED_LOW);
    if (token.clipped_high) counts += packed_one(CLIPPED_HIGH);
    if (token.limited) counts += packed_one(LIMITED);
  }
};

// Tokens, all of which are near: bounds and clamp change nothing. The operations on a token are those of `outcome`.
// Those that do not count hold zeros; with ALL_COUNT there are none.
template <bool ALL_COUNT, class Rule>
BAND_FUNCTION void near_outcomes(const Rule& rule, unsigned is_valid, const float (&old_log_prob)[WIDTH],
                                 const float (&log_prob)[WIDTH], const float (&log_ratio)[WIDTH],
                                 const float (&advantage)[WIDTH], float (&minus_loss)[WIDTH],
                                 float (&minus_slope)[WIDTH], Totals<float>& totals) {
  float size = 0.0f, size_of_losses = 0.0f;
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    const bool is_counted = ALL_COUNT || (is_valid & 0xffu << 8 * k) != 0u;
    const float x = log_ratio[k];
    const Exponentials<float> exponential = near_exponentials(x);
    minus_slope[k] = advantage[k] * exponential.exp;
    minus_loss[k] = rule.loss_is_ratio() ? minus_slope[k] : minus_slope[k] * log_prob[k];
    totals.kl -= x;
    totals.kl_k3 += exponential.gap;
    totals.loss -= minus_loss[k];
    size += magnitude(minus_slope[k]);
    if (!rule.loss_is_ratio()) size_of_losses += magnitude(minus_loss[k]);
    totals.entropy -= old_log_prob[k];
    totals.log_ratio_min = minimum(totals.log_ratio_min, is_counted ? x : infinity(1.0f));
    totals.log_ratio_max = maximum(totals.log_ratio_max, is_counted ? x : -infinity(1.0f));
    if (!ALL_COUNT && is_counted) totals.counts += packed_one(VALID);
  }
  if (ALL_COUNT) totals.counts += WIDTH * packed_one(VALID);
  totals.gradient_unclipped += size;
  totals.count_nonfinite(rule.loss_is_ratio() ? size : size_of_losses, minus_loss);
}

// Tokens whose log-ratios need no clamp and whose log-probs are ordinary, under min-clip. The operations on a token are
// those of `outcome`. Those that do not count hold zeros; with ALL_COUNT there are none.
template <bool ALL_COUNT, class Rule, class Bounds>
BAND_FUNCTION void ordinary_outcomes(const Rule& rule, const Bounds& bounds, Index first, unsigned is_valid,
                                     const float (&old_log_prob)[WIDTH], const float (&log_ratio)[WIDTH],
                                     const Range<float>& log_ratios, const float (&advantage)[WIDTH],
                                     float (&minus_loss)[WIDTH], float (&minus_slope)[WIDTH], Totals<float>& totals) {
  bool by_lower[WIDTH];
  float bound[WIDTH];
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) by_lower[k] = advantage[k] < 0.0f;
  bounds.at_ordinary(first, old_log_prob, by_lower, bound);
  float size = 0.0f;
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    const float x = log_ratio[k];
    const Exponentials<float> exponential = exponentials(x);
    const bool clipped_low = by_lower[k] && (Bounds::LOWER_IS_RATIO ? exponential.exp : x) < bound[k];
    const bool clipped_high = advantage[k] > 0.0f && bound[k] < x;
    // A bound that a log-ratio is beyond needs no clamp either.
    float kept = clipped_low && Bounds::LOWER_IS_RATIO ? bound[k] : exponential.exp;
    if (clipped_high || (clipped_low && !Bounds::LOWER_IS_RATIO)) kept = exponentials(bound[k]).exp;
    const float unclipped = advantage[k] * exponential.exp;
    minus_loss[k] = advantage[k] * kept;
    minus_slope[k] = clipped_low || clipped_high ? -0.0f : unclipped;
    totals.kl -= x;
    totals.kl_k3 += exponential.gap;
    totals.entropy -= old_log_prob[k];
    size += magnitude(unclipped);
    if (clipped_low || clipped_high) totals.gradient_removed += magnitude(unclipped);
    if (clipped_low) totals.counts += packed_one(CLIPPED_LOW);
    if (clipped_high) totals.counts += packed_one(CLIPPED_HIGH);
    if (!ALL_COUNT) {
      const bool is_counted = (is_valid & 0xffu << 8 * k) != 0u;
      totals.log_ratio_min = minimum(totals.log_ratio_min, is_counted ? x : infinity(1.0f));
      totals.log_ratio_max = maximum(totals.log_ratio_max, is_counted ? x : -infinity(1.0f));
      if (is_counted) totals.counts += packed_one(VALID);
    }
  }
  if (rule.log_first <= static_cast<float>(LOG_RATIO_LIMIT)) {
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      // No bound clips it, because its ratio is above 1.
      if (by_lower[k] && rule.log_first <= log_ratio[k]) {
        totals.gradient_removed += magnitude(minus_slope[k]);
        totals.counts += packed_one(LIMITED);
        minus_loss[k] = advantage[k] * rule.first;
        minus_slope[k] = -0.0f;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) totals.loss -= minus_loss[k];
  if (ALL_COUNT) {
    totals.log_ratio_min = minimum(totals.log_ratio_min, log_ratios.min);
    totals.log_ratio_max = maximum(totals.log_ratio_max, log_ratios.max);
    totals.counts += WIDTH * packed_one(VALID);
  }
  totals.gradient_unclipped += size;
  totals.count_nonfinite(size, minus_loss);  // no loss is larger than its unclipped one and its advantage
}

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

// Values of all threads, in memory that the block shares. Of float64, two threads share a place, so that a table of the
// max size fits beside. Counts by probability and of positive log-probs are only here, because they would take registers
// of every loss.
template <class T>
struct Held {
  static const int SHARERS = sizeof(T) == 8 ? 2 : 1;
  T values[SUMS][THREADS / SHARERS];
  unsigned counts[1 + BINNED_COUNTS][THREADS];
  int positive;  // tokens of the block with a log-prob above MAX_LOG_PROB; few have one

  BAND_FUNCTION void clear_bins() {
#pragma unroll
    for (int k = 1; k <= BINNED_COUNTS; ++k) counts[k][threadIdx.x] = 0u;
  }

  BAND_FUNCTION void count_positive(T old_log_prob, T log_prob) {
    if (is_positive(old_log_prob) || is_positive(log_prob)) atomicAdd(&positive, 1);
  }

  BAND_FUNCTION void add_to_bins(const Outcome<T>& token, T old_log_prob) {
    const unsigned one = packed_one(probability_bin(old_log_prob));
    counts[1 + BINNED_VALID][threadIdx.x] += one;
    if (token.clipped_low) counts[1 + BINNED_CLIPPED_LOW][threadIdx.x] += one;
    if (token.clipped_high) counts[1 + BINNED_CLIPPED_HIGH][threadIdx.x] += one;
  }
};

// Combines the values of a row of Held in a warp, in double precision; the first lane has the result.
template <class T, class Combine>
BAND_FUNCTION double combined(const T (&row)[THREADS / Held<T>::SHARERS], int lane, Combine combine) {
  double result = row[lane];
#pragma unroll
  for (int k = 32; k < THREADS / Held<T>::SHARERS; k += 32) result = combine(result, static_cast<double>(row[lane + k]));
  return reduced_warp(result, combine);
}

// Adds up packed counts of all threads in a warp, and writes each of `fields`, `stride` apart.
BAND_FUNCTION void store_counts(const unsigned (&row)[THREADS], int lane, int fields, Index stride, int* counts) {
  unsigned sums[3] = {0u, 0u, 0u};  // two counts in a word, of up to 32 * THREADS each
#pragma unroll
  for (int k = 0; k < THREADS; k += 32) {
    const unsigned packed = row[lane + k];
    sums[0] += (packed & 63u) | (packed << 10 & 63u << 16);
    sums[1] += (packed >> 12 & 63u) | (packed >> 2 & 63u << 16);
    sums[2] += packed >> 24 & 63u;
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) sums[k] = reduced_warp(sums[k], Add());
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < 5; ++k) {
      if (k < fields) counts[k * stride] = static_cast<int>(k % 2 ? sums[k / 2] >> 16 : sums[k / 2] & 0xffffu);
    }
  }
}

// Writes the totals of a block to one column of sums and counts. Every thread of the block takes part.
template <class T>
BAND_FUNCTION void store_totals(const Totals<T>& totals, Held<T>& held, bool by_probability, Index column,
                                Index columns, double* sums, int* counts) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  T of_thread[SUMS] = {totals.kl, totals.kl_k3, totals.entropy, totals.gradient_unclipped, totals.gradient_removed,
                       totals.log_ratio_min, totals.log_ratio_max, totals.loss};
#pragma unroll
  for (int k = 0; k < SUMS; ++k) {
    if (Held<T>::SHARERS == 2) {
      const T other = __shfl_down_sync(0xffffffffu, of_thread[k], 16);
      of_thread[k] = k == LOG_RATIO_MIN   ? minimum(of_thread[k], other)
                     : k == LOG_RATIO_MAX ? maximum(of_thread[k], other)
                                          : of_thread[k] + other;
      if (lane < 16) held.values[k][16 * warp + lane] = of_thread[k];
    } else {
      held.values[k][thread] = of_thread[k];
    }
  }
  held.counts[0][thread] = totals.counts;
  __syncthreads();
  const double result = warp == LOG_RATIO_MIN   ? combined(held.values[warp], lane, Minimum())
                        : warp == LOG_RATIO_MAX ? combined(held.values[warp], lane, Maximum())
                                                : combined(held.values[warp], lane, Add());
  if (lane == 0) sums[warp * columns + column] = result;
  if (thread == 0) {
    counts[POSITIVE * columns + column] = held.positive;
    held.positive = 0;
  }
  if (warp == WARPS - 1) {
    store_counts(held.counts[0], lane, POSITIVE, columns, counts + column);
    for (int k = 0; by_probability && k < BINNED_COUNTS; ++k) {
      store_counts(held.counts[1 + k], lane, BINS, columns, counts + (COUNTS + BINS * k) * columns + column);
    }
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
