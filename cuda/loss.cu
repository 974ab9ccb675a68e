// Kernels of the loss: every token, then the totals of all chunks.
//
// Every kernel strides over its work, so that any grid gives the same result bit for bit. Arrays are contiguous
// unless strides are given.

namespace bandpo {

const int BLOCKS = 3;           // blocks of policy_loss on a multiprocessor: a fourth would spill registers
const int EXTENDED_BLOCKS = 2;  // likewise, where rules are EXTENDED

// Bits of `layout`.
enum Layout : unsigned {
  WHOLE = 1,           // every input can be read in vectors
  ROW_ADVANTAGES = 2,  // but a row, of whole vectors, has one advantage
  GIVEN = 4,           // log-ratios are given
  NEAR_PATH = 8,       // set by the kernel, where tokens may take it
  PER_TOKEN_LOSS = 16  // set by the kernel, where losses are written
};

const Index MAX_PLACE = (1ll << 32) - 2 * CHUNK;
const unsigned EVERY_BYTE = 0x01010101u;  // a mask whose tokens all count

const int FLAGS = 16;  // that a thread of count_valid reads at a time
struct alignas(16) FlagVector {
  unsigned four[FLAGS / 4];
};

// The weight of a token: `numerator` over a count, which is at least 1, or itself without one.
BAND_FUNCTION double weight_of(double numerator, const double* count) {
  return count ? numerator / (*count < 1.0 ? 1.0 : *count) : numerator;
}

// Writes a vector of tokens from begin + at on, of which the first `left` exist. `place` is the first in 32 bits.
template <class T, class Narrow>
BAND_FUNCTION void store(const T (&values)[WIDTH], Narrow* to, Index begin, int at, unsigned place, int left,
                         bool is_whole) {
  if (is_whole) {
    store_vector(to + place, values);
  } else {
    keep_in_register(at);  // otherwise the address in 64 bits is computed for whole vectors as well
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      if (k < left) to[begin + at + k] = narrowed(values[k], Narrow());
    }
  }
}

// Loss and gradient of every token, and the totals of each chunk.
//
// Inputs have the strides of their rows and columns; log_ratio and anchor_log_prob may be null. `bounds` points to
// log_lower and log_upper, to a table of `table_words`, or to all lower and then all upper log bounds. first,
// second and log_first are those of Rule.
// With a null `loss`, the gradient is of type Weighted and times weight_of(numerator, divisor).
// A chunk has chunk_length tokens, whole vectors of every thread.
// `sums` is [SUMS, chunks]; `counts` is [COUNTS, chunks], or [MAX_COUNTS, chunks] with by_probability.
template <class Stored, template <class> class Bounds, Family FAMILY>
__global__ void __launch_bounds__(THREADS, sizeof(Stored) == 8    ? 1
                                           : FAMILY == EXTENDED ? EXTENDED_BLOCKS
                                                                : BLOCKS) policy_loss(
    const Stored* old_log_prob, Index old_row, Index old_column,
    const Stored* log_prob, Index new_row, Index new_column,
    const typename Computed<Stored>::Type* log_ratio, Index ratio_row, Index ratio_column,
    const typename Computed<Stored>::Type* advantages, Index advantage_row, Index advantage_column,
    const unsigned char* valid, Index valid_row, Index valid_column,
    const Stored* anchor_log_prob, Index anchor_row, Index anchor_column,
    Index count, Index row_length, unsigned layout,
    const void* bounds, int table_words,
    int surrogate, typename Computed<Stored>::Type first, typename Computed<Stored>::Type second,
    typename Computed<Stored>::Type log_first, int by_probability,
    typename Computed<Stored>::Type* loss, void* gradient, double numerator, const double* divisor,
    int chunk_length, double* sums, int* counts) {
  typedef typename Computed<Stored>::Type T;
  typedef typename Weighted<Stored>::Type Gradient;
  BAND_TABLE_IN_SHARED_MEMORY(table);
  __shared__ Held<T> held;
  if (threadIdx.x == 0) held.positive = 0;
  copy_table(bounds, table_words, table);
  const Bounds<T> token_bounds = Bounds<T>::make(bounds, table, count);
  const Rule<T, FAMILY> rule = {surrogate, first, second, log_first};
  const Strided<Stored> old_view = {old_log_prob, old_row, old_column};
  const Strided<Stored> new_view = {log_prob, new_row, new_column};
  const Strided<T> ratio_view = {log_ratio, ratio_row, ratio_column};
  const Strided<T> advantage_view = {advantages, advantage_row, advantage_column};
  const Strided<Stored> anchor_view = {anchor_log_prob, anchor_row, anchor_column};
  const bool anchored = FAMILY == EXTENDED && anchor_log_prob;
  constexpr bool HAS_NEAR_PATH = FAMILY != EXTENDED && sizeof(T) == 4;
  if (HAS_NEAR_PATH && rule.leaves_near_ratios() && !by_probability) layout |= NEAR_PATH;
  if (loss) layout |= PER_TOKEN_LOSS;
  keep_in_register(layout);

  const int thread = threadIdx.x;
  T minus_weight = -weight_of(numerator, divisor);
  keep_in_register(minus_weight);
  const Index chunks = (count + chunk_length - 1) / chunk_length;
  for (Index chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    Totals<T> totals;
    totals.clear();
    if (by_probability) held.clear_bins();
    const Index begin = chunk * chunk_length;
    const int length = count - begin < chunk_length ? static_cast<int>(count - begin) : chunk_length;
    // Vectors have places of 32 bits, because those of 64 take twice the instructions.
    int whole_length = (layout & WHOLE) != 0u && begin <= MAX_PLACE ? length : 0;
    keep_in_register(whole_length);
    // The same turns in all threads, because warps vote.
#pragma unroll 1
    for (int at = thread * WIDTH; at < length + thread * WIDTH; at += THREADS * WIDTH) {
      const bool is_whole = at + WIDTH <= whole_length;
      unsigned first_token = static_cast<unsigned>(begin) + static_cast<unsigned>(at);
      keep_in_register(first_token);
      T old_logp[WIDTH], new_logp[WIDTH], anchor_logp[WIDTH], advantage[WIDTH], unclamped[WIDTH];
      unsigned is_valid;  // a byte for each token
      if (is_whole) {
        is_valid = *reinterpret_cast<const unsigned*>(valid + first_token);
        load_vector(old_log_prob + first_token, old_logp);
        load_vector(log_prob + first_token, new_logp);
        if ((layout & ROW_ADVANTAGES) != 0u) {
          const T of_row = advantages[place_of(begin + at, row_length).row * advantage_row];
#pragma unroll
          for (int k = 0; k < WIDTH; ++k) advantage[k] = of_row;
        } else {
          load_vector(advantages + first_token, advantage);
        }
        if (anchored) load_vector(anchor_log_prob + first_token, anchor_logp);
        if ((layout & GIVEN) != 0u) load_vector(log_ratio + first_token, unclamped);
      } else {
        is_valid = 0u;
        Place place = place_of(begin + at, row_length);
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) {
          old_logp[k] = new_logp[k] = anchor_logp[k] = advantage[k] = unclamped[k] = T(0);
          if (at + k >= length) continue;
          if (valid[place.row * valid_row + place.column * valid_column]) is_valid |= 1u << 8 * k;
          old_logp[k] = item(old_view, place);
          new_logp[k] = item(new_view, place);
          advantage[k] = item(advantage_view, place);
          if (anchored) anchor_logp[k] = item(anchor_view, place);
          if ((layout & GIVEN) != 0u) unclamped[k] = item(ratio_view, place);
          place.advance(row_length);
        }
      }
      if ((layout & GIVEN) == 0u) {
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) unclamped[k] = new_logp[k] - old_logp[k];
      }

      // Negated, because the weight takes the sign for nothing.
      T minus_loss[WIDTH], minus_slope[WIDTH];
      // One way for the warp, because lanes of several would take the time of all.
      bool done = false;
      if constexpr (HAS_NEAR_PATH) {
        if ((layout & NEAR_PATH) != 0u) {
          const bool all_count = __all_sync(0xffffffffu, is_valid == EVERY_BYTE);
          if (!all_count) {
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
              if ((is_valid & 0xffu << 8 * k) == 0u) {
                old_logp[k] = new_logp[k] = unclamped[k] = T(0);
                advantage[k] = -T(0);  // so that its gradient is 0, not -0
              }
            }
          }
          // The first of each lane before all, because it decides for most warps of large steps.
          done = __all_sync(0xffffffffu, token_bounds.surely_holds(begin + at, old_logp[0], unclamped[0]));
          if (done) done = __all_sync(0xffffffffu, token_bounds.surely_hold(begin + at, old_logp, new_logp, unclamped));
          if (done) {
            if (all_count) {
              near_outcomes<true>(rule, is_valid, old_logp, new_logp, unclamped, advantage, minus_loss, minus_slope,
                                  totals);
            } else {
              near_outcomes<false>(rule, is_valid, old_logp, new_logp, unclamped, advantage, minus_loss, minus_slope,
                                   totals);
            }
          } else if constexpr (FAMILY == MIN_CLIP_ALONE) {
            const Range<T> range = Range<T>::of(unclamped);
            done = __all_sync(0xffffffffu, token_bounds.are_ordinary(old_logp, new_logp, range));
            if (done && all_count) {
              ordinary_outcomes<true>(rule, token_bounds, begin + at, is_valid, old_logp, unclamped, range, advantage,
                                      minus_loss, minus_slope, totals);
            } else if (done) {
              ordinary_outcomes<false>(rule, token_bounds, begin + at, is_valid, old_logp, unclamped, range, advantage,
                                       minus_loss, minus_slope, totals);
            }
          }
        }
      }
      if (!done) {
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) {
          Outcome<T> token = {};  // zeros for a masked token, whatever it holds
          if ((is_valid & 0xffu << 8 * k) != 0u) {
            const Anchor<T, FAMILY> anchor = {anchored, anchored ? anchor_logp[k] : T(0)};
            token = outcome(rule, token_bounds, begin + at + k, old_logp[k], new_logp[k], unclamped[k],
                            (layout & GIVEN) != 0u, advantage[k], anchor);
            totals.add(token, old_logp[k]);
            held.count_positive(old_logp[k], new_logp[k]);
            if (by_probability) held.add_to_bins(token, old_logp[k]);
          }
          minus_loss[k] = -token.loss;
          minus_slope[k] = -token.slope;
        }
      }
      if ((layout & PER_TOKEN_LOSS) != 0u) {
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) {
          minus_loss[k] = -minus_loss[k];
          minus_slope[k] = -minus_slope[k];
        }
        store(minus_loss, loss, begin, at, first_token, length - at, is_whole);
        store(minus_slope, static_cast<T*>(gradient), begin, at, first_token, length - at, is_whole);
      } else {
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) minus_slope[k] *= minus_weight;
        store(minus_slope, static_cast<Gradient*>(gradient), begin, at, first_token, length - at, is_whole);
      }
    }
    store_totals(totals, held, by_probability != 0, chunk, chunks, sums, counts);
  }
}

// Totals of all chunks, and the loss, a sum times weight_of(numerator, divisor): a block combines one row at a time.
// total_loss may be null.
template <class T>
__global__ void __launch_bounds__(THREADS) policy_loss_totals(const double* sums, const int* counts, Index chunks,
                                                              int count_rows, double* total_sums, Index* total_counts,
                                                              double numerator, const double* divisor, T* total_loss) {
  for (int row = blockIdx.x; row < SUMS + count_rows; row += gridDim.x) {
    if (row < SUMS) {
      const double* of_chunks = sums + row * chunks;
      const double total = row == LOG_RATIO_MIN   ? reduced_row(of_chunks, chunks, infinity(0.0), Minimum())
                           : row == LOG_RATIO_MAX ? reduced_row(of_chunks, chunks, -infinity(0.0), Maximum())
                                                  : reduced_row(of_chunks, chunks, 0.0, Add());
      if (threadIdx.x == 0 && row != SUM_LOSS) total_sums[row] = total;
      if (threadIdx.x == 0 && row == SUM_LOSS && total_loss) {
        *total_loss = static_cast<T>(weight_of(numerator, divisor) * total);
      }
    } else {
      const int k = row - SUMS;
      const Index total = reduced_row(counts + k * chunks, chunks, Index(0), Add());
      if (threadIdx.x == 0) total_counts[k] = total;
    }
  }
}

// Adds to `total` how many of contiguous, aligned flags, each 0 or 1, are 1. Whole numbers below 2^53 add up exactly.
template <class Flag>
__global__ void __launch_bounds__(THREADS) count_valid(const Flag* valid, Index count, double* total) {
  const Index step = static_cast<Index>(gridDim.x) * THREADS * FLAGS;
  unsigned found = 0u;  // a thread of the largest grid reads far fewer than 2^32
  for (Index first = (static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x) * FLAGS; first < count; first += step) {
    if (first + FLAGS <= count) {
      const FlagVector flags = *reinterpret_cast<const FlagVector*>(valid + first);
#pragma unroll
      for (int k = 0; k < FLAGS / 4; ++k) found += (flags.four[k] * EVERY_BYTE) >> 24;
    } else {
      for (Index i = first; i < count; ++i) found += valid[i];
    }
  }
  found = reduced_warp(found, Add());
  if (threadIdx.x % 32 == 0 && found != 0u) atomicAdd(total, static_cast<double>(found));
}

// A gradient times a factor, in place; no work where that is 1, as in the backward pass of a loss itself.
template <class Gradient>
__global__ void __launch_bounds__(THREADS) scale_gradient(Gradient* gradient, Index count,
                                                          const typename Computed<Gradient>::Type* factor) {
  typedef typename Computed<Gradient>::Type T;
  const T by = *factor;
  if (by == T(1)) return;
  const Index step = static_cast<Index>(gridDim.x) * THREADS * WIDTH;
  for (Index first = (static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH; first < count; first += step) {
    T values[WIDTH];
    if (first + WIDTH <= count) {
      load_vector(gradient + first, values);
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) values[k] *= by;
      store_vector(gradient + first, values);
    } else {
      for (Index i = first; i < count; ++i) gradient[i] = narrowed(widened(gradient[i]) * by, Gradient());
    }
  }
}

}  // namespace bandpo
