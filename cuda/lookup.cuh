// Bounds of a token: from a table, by the steps of docs/table-format.md, from two constants, or from an array.

// The emulator of the tests has an array of its own.
#ifndef BAND_TABLE_IN_SHARED_MEMORY
#define BAND_TABLE_IN_SHARED_MEMORY(name) extern __shared__ unsigned name[]
#endif

namespace bandpo {

const unsigned PIECES = 8;  // pieces of a side; lane 8 s + k holds piece k of side s

// First words of the rows of a table, each with a word for every lane, and of the values at the ends.
enum Row : unsigned {
  START = 0, ORIGIN = 16, SCALE = 32, ENTRIES = 48, MIN_BITS = 64, MAX_BITS = 80, AT_ZERO = 96, AT_FAR = 98, NEAR = 108
};

const unsigned INFINITY_BITS = 0x7f800000u;
const unsigned MIN_NORMAL_BITS = 0x00800000u;
const unsigned FAR_BITS = 0x43000000u;  // bits of 128, from which on a bound has one value
const unsigned MANTISSA = 0x7fffffu;
const float NEAR_END = 1.5f;  // y from which the reach of a log-ratio is constant

// The bits of y = max(-logp, 0) in float32. Computed on bits, because a subnormal y has its own cell.
BAND_FUNCTION unsigned y_bits(float logp) {
  const unsigned y = bits_of(logp) ^ 0x80000000u;
  const bool nan = (y & 0x7fffffffu) > INFINITY_BITS;
  return nan || y < 0x80000000u ? y : 0u;
}

BAND_FUNCTION unsigned y_bits(double logp) {
  if (logp > 0.0) return 0u;
  if (logp > -0x1p-126) return static_cast<unsigned>(rint(logp * -0x1p149));
  return bits_of(static_cast<float>(-logp));
}

// `lower`, a ratio, or log_upper, at the y with these bits. `words` is a checked image: no y leads outside it.
BAND_FUNCTION float look_up(const unsigned* words, unsigned y_bits, bool lower) {
  const float y = float_of(y_bits);
  unsigned lane = lower ? PIECES : 0u;
#pragma unroll
  for (unsigned k = 1; k < PIECES; ++k) {
    const unsigned upper_start = words[START + k], lower_start = words[START + PIECES + k];
    if ((upper_start < lower_start ? upper_start : lower_start) == INFINITY_BITS) break;  // no more pieces
    // Bits of non-negative floats are in the order of the floats.
    lane += (lower ? lower_start : upper_start) <= y_bits ? 1u : 0u;
  }
  const float origin = float_of(words[ORIGIN + lane]), scale = float_of(words[SCALE + lane]);
  float z = fabsf(y - origin) * scale;
  if (y_bits < MIN_NORMAL_BITS && origin == 0.0f) {
    // A subnormal y would be flushed to 0. Its distance times the scale is normal wherever there is a grid.
    z = static_cast<float>(static_cast<int>(y_bits)) * 0x1p-100f * scale * 0x1p-49f;
  }
  unsigned q = bits_of(z);
  const unsigned min_bits = words[MIN_BITS + lane], max_bits = words[MAX_BITS + lane];
  q = q < min_bits ? min_bits : q;
  q = q > max_bits ? max_bits : q;
  const unsigned exponent = q >> 23;
  const unsigned entry = words[words[ENTRIES + lane] + exponent];
  const unsigned halvings = entry & 15u;
  const unsigned node = 2u * ((entry >> 4) + ((q & MANTISSA) >> (23u - halvings)));
  const float t = float_of(((q << halvings) & MANTISSA) | ONE_BITS) - 1.0f;
  const float width = float_of((exponent - halvings) << 23);
  const float v0 = float_of(words[node]), m0 = float_of(words[node + 1]) * width;
  const float rise = float_of(words[node + 2]) - v0, m1 = float_of(words[node + 3]) * width;
  const float bend = (3.0f * rise - 2.0f * m0) - m1;
  const float twist = (m0 + m1) - 2.0f * rise;
  float value = v0 + t * (m0 + t * (bend + t * twist));
  const unsigned side = lower ? 1u : 0u;
  if (y_bits == 0u) value = float_of(words[AT_ZERO + side]);
  if (y_bits >= FAR_BITS) value = float_of(words[AT_FAR + side]);
  if (lower) {
    value = value < 0.0f ? 0.0f : value;
  } else {
    value = y < value ? y : value;
  }
  return y_bits > INFINITY_BITS ? y : value;  // keeps a NaN
}

BAND_FUNCTION float tabulated(const unsigned* words, float logp, bool lower) {
  return look_up(words, y_bits(logp), lower);
}

BAND_FUNCTION double tabulated(const unsigned* words, double logp, bool lower) {
  const unsigned y = y_bits(logp);
  const float value = look_up(words, y, lower);
  // A new probability up to 1 is allowed; y in float32 could fall short of it.
  if (!lower && bits_of(value) == y && logp <= 0.0) return -logp;
  return value;
}

// Log-ratios of up to this size are near: their exponentials need no power of 2. Below ln(2)/2.
const float MAX_NEAR = 0.3465f;

// The words of a piece, beside each other.
struct alignas(16) Lane {
  float origin, scale;
  unsigned min_bits, max_bits;
  unsigned entries;
  float at_zero;  // of the side
  unsigned start;
};

// The first bits of a word, up to 15.
BAND_FUNCTION unsigned high_bits(unsigned word, unsigned count) {
#ifdef __CUDA_ARCH__
  return __funnelshift_l(word, 0u, count);
#else
  return count == 0u ? 0u : word >> (32u - count);
#endif
}

// The lanes of a table in memory that the block shares; every thread takes part.
BAND_FUNCTION const Lane* lanes_of(const unsigned* words) {
  __shared__ Lane lanes[2 * PIECES];
  const unsigned k = threadIdx.x;
  if (k < 2 * PIECES) {
    const Lane lane = {float_of(words[ORIGIN + k]), float_of(words[SCALE + k]), words[MIN_BITS + k],
                       words[MAX_BITS + k],         words[ENTRIES + k],        float_of(words[AT_ZERO + k / PIECES]),
                       words[START + k]};
    lanes[k] = lane;
  }
  __syncthreads();
  return lanes;
}

// 0 - value, which is never -0. A subnormal number is not flushed to 0.
BAND_FUNCTION float negated(float value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("sub.rn.f32 %0, 0f00000000, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  return (bits_of(value) & 0x7fffffffu) == 0u ? 0.0f : float_of(bits_of(value) ^ 0x80000000u);
#endif
}

// z of docs/table-format.md, at y = -logp. A subnormal y is not flushed to 0; its product with a scale is normal
// wherever there is a grid.
BAND_FUNCTION float scaled_distance(float logp, float origin, float scale) {
#ifdef __CUDA_ARCH__
  float z;
  asm("{.reg .f32 d; add.rn.f32 d, %1, %2; abs.f32 d, d; mul.rn.f32 %0, d, %3;}"
      : "=f"(z)
      : "f"(logp), "f"(origin), "f"(scale));
  return z;
#else
  const unsigned y = bits_of(logp) & 0x7fffffffu;
  if (y < MIN_NORMAL_BITS && origin == 0.0f) return static_cast<float>(static_cast<int>(y)) * 0x1p-100f * scale * 0x1p-49f;
  return fabsf(logp + origin) * scale;
#endif
}

// The value of a cell of a lane, for a log-prob in (-FAR, 0]. The operations are those of `look_up`; a product that is
// exact, by a power of 2, may be part of a fused multiply-add.
BAND_FUNCTION float in_cell(const unsigned* words, const Lane& lane, float logp) {
  unsigned q = bits_of(scaled_distance(logp, lane.origin, lane.scale));
  q = q < lane.min_bits ? lane.min_bits : q;
  q = q > lane.max_bits ? lane.max_bits : q;
  const unsigned exponent = q >> 23;
  const unsigned entry = words[lane.entries + exponent];
  const unsigned halvings = entry & 15u, mantissa = q << 9;
  const unsigned node = 2u * ((entry >> 4) + high_bits(mantissa, halvings));
  const float t = float_of((mantissa << halvings >> 9) + ONE_BITS) - 1.0f;
  const float width = float_of((exponent - halvings) << 23);
  const float v0 = float_of(words[node]), m0 = float_of(words[node + 1]) * width;
  const float rise = float_of(words[node + 2]) - v0, slope = float_of(words[node + 3]);
  const float bend = fmaf(-width, slope, fmaf(-2.0f, m0, 3.0f * rise));
  const float twist = fmaf(-2.0f, rise, fmaf(width, slope, m0));
  return v0 + t * (m0 + t * (bend + t * twist));
}

// Sources of bounds. Each has
// - `make`, which reads the argument of a kernel;
// - `at`, a token's lower or upper bound: an upper one is a log-ratio, a lower one is a ratio where LOWER_IS_RATIO;
// - `surely_holds`, true only for a log-ratio that is near and inside both bounds, never for a NaN, and `surely_hold`
//   for those of a vector, of which no log-prob is positive;
// - `are_ordinary`, true for log-ratios that need no clamp and log-probs that are not positive and have their bounds from
//   `at_ordinary`. That writes the bounds of a vector, a lower one only where it is above 0, in fewer instructions than
//   `at`.

template <class Bounds, class T>
BAND_FUNCTION bool each_surely_holds(const Bounds& bounds, Index first, const T (&logp)[WIDTH],
                                     const T (&log_ratio)[WIDTH]) {
  bool all = true;
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) all &= bounds.surely_holds(first + k, logp[k], log_ratio[k]);
  return all;
}

template <class Bounds, class T>
BAND_FUNCTION void bounds_at(const Bounds& bounds, Index first, const T (&logp)[WIDTH], const bool (&lower)[WIDTH],
                             T (&bound)[WIDTH]) {
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) bound[k] = bounds.at(first + k, logp[k], lower[k]);
}

// True if no log-prob of a vector, old or new, is positive. It is combined with `&`, because a branch takes an instruction
// a token.
template <class T>
BAND_FUNCTION bool none_positive(const T (&logp)[WIDTH], const T (&new_logp)[WIDTH]) {
  return !is_positive(largest(logp)) && !is_positive(largest(new_logp));
}

// Min and max of a vector; NaN if a number is.
template <class T>
struct Range {
  T min, max;
  BAND_FUNCTION static Range of(const T (&values)[WIDTH]) {
    Range range = {values[0], values[0]};
#pragma unroll
    for (int k = 1; k < WIDTH; ++k) {
      range.min = minimum(range.min, values[k]);
      range.max = maximum(range.max, values[k]);
    }
    return range;
  }
  // As log-ratios.
  BAND_FUNCTION bool needs_no_clamp() const { return T(-LOG_RATIO_LIMIT) <= min && max <= T(LOG_RATIO_LIMIT); }
};

template <class T>
struct Constant {
  static const bool LOWER_IS_RATIO = false;
  T log_lower, log_upper;
  BAND_FUNCTION static Constant make(const void* bounds, const unsigned*, Index) {
    const T* both = static_cast<const T*>(bounds);
    const Constant made = {both[0], both[1]};
    return made;
  }
  BAND_FUNCTION T at(Index, T, bool lower) const { return lower ? log_lower : log_upper; }
  BAND_FUNCTION bool surely_holds(Index, T, T log_ratio) const {
    return fabs(log_ratio) <= T(MAX_NEAR) && log_lower <= log_ratio && log_ratio <= log_upper;
  }
  BAND_FUNCTION bool surely_hold(Index first, const T (&logp)[WIDTH], const T (&new_logp)[WIDTH],
                                 const T (&log_ratio)[WIDTH]) const {
    return none_positive(logp, new_logp) & each_surely_holds(*this, first, logp, log_ratio);
  }
  BAND_FUNCTION bool are_ordinary(const T (&logp)[WIDTH], const T (&new_logp)[WIDTH],
                                  const Range<T>& log_ratios) const {
    return log_ratios.needs_no_clamp() && none_positive(logp, new_logp);
  }
  BAND_FUNCTION void at_ordinary(Index first, const T (&logp)[WIDTH], const bool (&lower)[WIDTH],
                                 T (&bound)[WIDTH]) const {
    bounds_at(*this, first, logp, lower, bound);
  }
};

template <class T>
struct Table {
  static const bool LOWER_IS_RATIO = true;
  const unsigned* words;
  const Lane* lanes;
  float slope, bend, floor, saturated;  // of the reach
  unsigned pieces;                      // of the side that has more
  BAND_FUNCTION static Table make(const void*, const unsigned* table, Index) {
    Table made = {table,
                  lanes_of(table),
                  float_of(table[NEAR]),
                  float_of(table[NEAR + 1]),
                  float_of(table[NEAR + 2]),
                  float_of(table[NEAR + 3]),
                  1u};
    while (made.pieces < PIECES && (table[START + made.pieces] != INFINITY_BITS ||
                                    table[START + PIECES + made.pieces] != INFINITY_BITS)) {
      ++made.pieces;
    }
    return made;
  }
  BAND_FUNCTION T at(Index, T old_log_prob, bool lower) const { return tabulated(words, old_log_prob, lower); }
  // Next to 0 the upper bound is y itself, and the lower one at most -floor.
  BAND_FUNCTION bool surely_holds(Index, float old_log_prob, float log_ratio) const {
    const float y = -old_log_prob, nearer = fminf(y, NEAR_END), reach = nearer * fmaf(-bend, nearer, slope);
    const bool next_to_zero = (y < saturated) & (-floor <= log_ratio) & (log_ratio <= y);
    return next_to_zero | (fabsf(log_ratio) <= reach);
  }
  // No new log-prob inside the bounds is positive, because the slope is below 1. Only sequences, which have no table, have
  // log-ratios that are given.
  BAND_FUNCTION bool surely_hold(Index first, const float (&logp)[WIDTH], const float (&)[WIDTH],
                                 const float (&log_ratio)[WIDTH]) const {
    return !is_positive(largest(logp)) & each_surely_holds(*this, first, logp, log_ratio);
  }
  BAND_FUNCTION bool are_ordinary(const float (&logp)[WIDTH], const float (&new_logp)[WIDTH],
                                  const Range<float>& log_ratios) const {
    unsigned y = 0u;
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      const unsigned of_token = bits_of(negated(logp[k]));
      y = y < of_token ? of_token : y;  // negative floats have the largest bits
    }
    return log_ratios.needs_no_clamp() && y < FAR_BITS && !is_positive(largest(new_logp));
  }
  BAND_FUNCTION void at_ordinary(Index, const float (&logp)[WIDTH], const bool (&lower)[WIDTH],
                                 float (&bound)[WIDTH]) const {
    float y[WIDTH];
    const Lane* lane[WIDTH];
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      y[k] = negated(logp[k]);
      lane[k] = lower[k] ? lanes + PIECES : lanes;
    }
#pragma unroll 1
    for (unsigned piece = 1; piece < pieces; ++piece) {
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) {
        // Bits of floats that are not negative are in the order of the floats.
        lane[k] += lanes[piece + (lower[k] ? PIECES : 0u)].start <= bits_of(y[k]) ? 1 : 0;
      }
    }
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      const float inner = in_cell(words, *lane[k], logp[k]);
      const float value = bits_of(y[k]) == 0u ? lane[k]->at_zero : inner;
      bound[k] = lower[k] ? value : fminf(value, y[k]);
    }
  }
  BAND_FUNCTION bool surely_holds(Index, double, double) const { return false; }  // reaches are those of float32
};

template <class T>
struct PerToken {
  static const bool LOWER_IS_RATIO = false;
  const T* log_lower;
  const T* log_upper;
  Index last;  // a vector may reach beyond the last token
  BAND_FUNCTION static PerToken make(const void* bounds, const unsigned*, Index count) {
    const T* both = static_cast<const T*>(bounds);
    const PerToken made = {both, both + count, count - 1};
    return made;
  }
  BAND_FUNCTION Index held(Index index) const { return index < last ? index : last; }
  BAND_FUNCTION T at(Index index, T, bool lower) const { return (lower ? log_lower : log_upper)[held(index)]; }
  BAND_FUNCTION bool surely_holds(Index index, T, T log_ratio) const {
    return fabs(log_ratio) <= T(MAX_NEAR) && log_lower[held(index)] <= log_ratio && log_ratio <= log_upper[held(index)];
  }
  BAND_FUNCTION bool surely_hold(Index first, const T (&logp)[WIDTH], const T (&new_logp)[WIDTH],
                                 const T (&log_ratio)[WIDTH]) const {
    return none_positive(logp, new_logp) & each_surely_holds(*this, first, logp, log_ratio);
  }
  BAND_FUNCTION bool are_ordinary(const T (&logp)[WIDTH], const T (&new_logp)[WIDTH],
                                  const Range<T>& log_ratios) const {
    return log_ratios.needs_no_clamp() && none_positive(logp, new_logp);
  }
  BAND_FUNCTION void at_ordinary(Index first, const T (&logp)[WIDTH], const bool (&lower)[WIDTH],
                                 T (&bound)[WIDTH]) const {
    bounds_at(*this, first, logp, lower, bound);
  }
};

// Copies a table to shared memory; every thread of the block takes part.
BAND_FUNCTION void copy_table(const void* bounds, int table_words, unsigned* table) {
  for (int word = threadIdx.x; word < table_words; word += THREADS) {
    table[word] = static_cast<const unsigned*>(bounds)[word];
  }
  __syncthreads();
}

}  // namespace bandpo
