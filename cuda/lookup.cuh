// Bounds of a token: from a table, by the steps of docs/table-format.md, from two constants, or from an array.

// The emulator of the tests has an array of its own.
#ifndef BAND_TABLE_IN_SHARED_MEMORY
#define BAND_TABLE_IN_SHARED_MEMORY(name) extern __shared__ unsigned name[]
#endif

namespace bandpo {

const unsigned PIECES = 8;  // pieces of a side; lane 8 s + k holds piece k of side s

// First words of the rows of a table, each with a word for every lane, and of the values at the ends.
enum Row : unsigned {
  START = 0, ORIGIN = 16, SCALE = 32, ENTRIES = 48, MIN_BITS = 64, MAX_BITS = 80, AT_ZERO = 96, AT_FAR = 98
};

const unsigned INFINITY_BITS = 0x7f800000u;
const unsigned MIN_NORMAL_BITS = 0x00800000u;
const unsigned FAR_BITS = 0x43000000u;  // bits of 128, from which on a bound has one value
const unsigned MANTISSA = 0x7fffffu;
const unsigned ONE_BITS = 0x3f800000u;

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

// Sources of bounds. Each has `make`, which reads the argument of a kernel, and `at`, a token's lower or upper
// bound. An upper bound is a log-ratio; a lower one is a ratio where LOWER_IS_RATIO.

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
};

template <class T>
struct Table {
  static const bool LOWER_IS_RATIO = true;
  const unsigned* words;
  BAND_FUNCTION static Table make(const void*, const unsigned* table, Index) {
    const Table made = {table};
    return made;
  }
  BAND_FUNCTION T at(Index, T old_log_prob, bool lower) const { return tabulated(words, old_log_prob, lower); }
};

template <class T>
struct PerToken {
  static const bool LOWER_IS_RATIO = false;
  const T* log_lower;
  const T* log_upper;
  BAND_FUNCTION static PerToken make(const void* bounds, const unsigned*, Index count) {
    const T* both = static_cast<const T*>(bounds);
    const PerToken made = {both, both + count};
    return made;
  }
  BAND_FUNCTION T at(Index index, T, bool lower) const { return (lower ? log_lower : log_upper)[index]; }
};

// Copies a table to shared memory; every thread of the block takes part.
BAND_FUNCTION void copy_table(const void* bounds, int table_words, unsigned* table) {
  for (int word = threadIdx.x; word < table_words; word += THREADS) {
    table[word] = static_cast<const unsigned*>(bounds)[word];
  }
  __syncthreads();
}

}  // namespace bandpo
