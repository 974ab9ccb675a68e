// Kernels of the loss: every token, then the totals of all chunks.
//
// Every kernel strides over its work, so that any grid gives the same result bit for bit. Arrays are contiguous
// unless strides are given.

namespace bandpo {

const int BLOCKS = 3;           // blocks of policy_loss on a multiprocessor: a fourth would spill registers
const int EXTENDED_BLOCKS = 2;  // likewise, where it is EXTENDED

// Bits of `vectorised`: arrays that may be read or written in vectors.
enum Vectorised : unsigned {
  OLD_LOG_PROB = 1, NEW_LOG_PROB = 2, LOG_RATIO = 4, ADVANTAGES = 8, VALID_TOKENS = 16, ANCHOR = 32, LOSS = 64,
  GRADIENT = 128
};

// Loss and gradient of every token, and the totals of each chunk.
//
// Inputs have the strides of their rows and columns; log_ratio and anchor_log_prob may be null. `bounds` points to
// log_lower and log_upper, to a table of `table_words`, or to all lower and then all upper log bounds. first,
// second and log_first are those of Rule.
// `sums` is [SUMS, chunks]; `counts` is [COUNTS, chunks], or [MAX_COUNTS, chunks] with by_probability.
template <class Stored, template <class> class Bounds, bool EXTENDED>
__global__ void __launch_bounds__(THREADS, sizeof(Stored) == 8 ? 1 : EXTENDED ? EXTENDED_BLOCKS : BLOCKS) policy_loss(
    const Stored* old_log_prob, Index old_row, Index old_column,
    const Stored* log_prob, Index new_row, Index new_column,
    const typename Computed<Stored>::Type* log_ratio, Index ratio_row, Index ratio_column,
    const typename Computed<Stored>::Type* advantages, Index advantage_row, Index advantage_column,
    const unsigned char* valid, Index valid_row, Index valid_column,
    const Stored* anchor_log_prob, Index anchor_row, Index anchor_column,
    Index count, Index row_length, unsigned vectorised,
    const void* bounds, int table_words,
    int surrogate, double first, double second, double log_first, int by_probability,
    typename Computed<Stored>::Type* loss, typename Computed<Stored>::Type* gradient,
    double* sums, int* counts) {
  typedef typename Computed<Stored>::Type T;
  BAND_TABLE_IN_SHARED_MEMORY(table);
  copy_table(bounds, table_words, table);
  const Bounds<T> token_bounds = Bounds<T>::make(bounds, table, count);
  const Rule<T, EXTENDED> rule = {surrogate, static_cast<T>(first), static_cast<T>(second), static_cast<T>(log_first)};
  const Strided<Stored> old_view = {old_log_prob, old_row, old_column, (vectorised & OLD_LOG_PROB) != 0};
  const Strided<Stored> new_view = {log_prob, new_row, new_column, (vectorised & NEW_LOG_PROB) != 0};
  const Strided<T> ratio_view = {log_ratio, ratio_row, ratio_column, (vectorised & LOG_RATIO) != 0};
  const Strided<T> advantage_view = {advantages, advantage_row, advantage_column, (vectorised & ADVANTAGES) != 0};
  const Strided<Stored> anchor_view = {anchor_log_prob, anchor_row, anchor_column, (vectorised & ANCHOR) != 0};
  const Strided<unsigned char> valid_view = {valid, valid_row, valid_column, (vectorised & VALID_TOKENS) != 0};

  const int thread = threadIdx.x;
  const Index chunks = (count + CHUNK - 1) / CHUNK;
  for (Index chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    Totals<T> totals;
    totals.clear();
    for (int vector = 0; vector < VECTORS; ++vector) {
      const Index start = chunk * CHUNK + (vector * THREADS + thread) * WIDTH;
      if (start >= count) break;
      const int tokens = count - start < WIDTH ? static_cast<int>(count - start) : WIDTH;
      T old_logp[WIDTH], new_logp[WIDTH], anchor_logp[WIDTH], advantage[WIDTH], given_log_ratio[WIDTH];
      T losses[WIDTH], slopes[WIDTH];
      unsigned char is_valid[WIDTH];
      load(valid_view, start, tokens, row_length, is_valid);
      load(old_view, start, tokens, row_length, old_logp);
      load(new_view, start, tokens, row_length, new_logp);
      load(advantage_view, start, tokens, row_length, advantage);
      if (EXTENDED && anchor_log_prob) load(anchor_view, start, tokens, row_length, anchor_logp);
      if (log_ratio) load(ratio_view, start, tokens, row_length, given_log_ratio);
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) {
        Outcome<T> token = {};  // zeros for a masked token, whatever it holds
        if (k < tokens && is_valid[k]) {
          const T unclamped = log_ratio ? given_log_ratio[k] : new_logp[k] - old_logp[k];
          const bool anchored = EXTENDED && anchor_log_prob;
          const Anchor<T, EXTENDED> anchor = {anchored, anchored ? anchor_logp[k] : T(0)};
          token = outcome(rule, token_bounds, start + k, old_logp[k], new_logp[k], unclamped, log_ratio != nullptr,
                          advantage[k], anchor);
          totals.add(token, old_logp[k], by_probability != 0);
        }
        losses[k] = token.loss;
        slopes[k] = token.slope;
      }
      store(loss, start, tokens, (vectorised & LOSS) != 0, losses);
      store(gradient, start, tokens, (vectorised & GRADIENT) != 0, slopes);
    }
    store_totals(totals, by_probability != 0, chunk, chunks, sums, counts);
  }
}

// Totals of all chunks: a block combines one row at a time. A template, so that it is compiled only on request.
template <class T>
__global__ void __launch_bounds__(THREADS) policy_loss_totals(const T* sums, const int* counts, Index chunks,
                                                              int count_rows, T* total_sums, Index* total_counts) {
  for (int row = blockIdx.x; row < SUMS + count_rows; row += gridDim.x) {
    if (row < SUMS) {
      const T* of_chunks = sums + row * chunks;
      const T total = row < LOG_RATIO_MIN    ? reduced_row(of_chunks, chunks, T(0), Add())
                      : row == LOG_RATIO_MIN ? reduced_row(of_chunks, chunks, infinity(T()), Minimum())
                                             : reduced_row(of_chunks, chunks, -infinity(T()), Maximum());
      if (threadIdx.x == 0) total_sums[row] = total;
    } else {
      const int k = row - SUMS;
      const Index total = reduced_row(counts + k * chunks, chunks, Index(0), Add());
      if (threadIdx.x == 0) total_counts[k] = total;
    }
  }
}

}  // namespace bandpo
