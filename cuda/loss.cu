// Kernels of the loss.

namespace bandpo {

const int BLOCKS = 3;     // of policy_loss that fit a multiprocessor: with a fourth registers would be spilled

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

}  // namespace bandpo
