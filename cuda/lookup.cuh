// Bounds of a token: looked up in a table by the steps of docs/table-format.md, two constants, or in an array.

namespace bandpo {

// The bits of y = max(-logp, 0) in float32. On bits, because a subnormal y has a cell of its own.
BAND_FUNCTION unsigned y_bits(float logp) {
  const unsigned y = bits_of(logp) ^ 0x80000000u;
  const bool nan = (y & 0x7fffffffu) > 0x7f800000u;
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
  unsigned lane = lower ? 8u : 0u;
#pragma unroll
  for (int k = 1; k < 8; ++k) {
    const unsigned upper_start = words[k], lower_start = words[8 + k];
    if ((upper_start < lower_start ? upper_start : lower_start) == 0x7f800000u) break;  // no more pieces
    // Floats that are not negative are ordered like their bits.
    lane += (lower ? lower_start : upper_start) <= y_bits ? 1u : 0u;
  }
  const float origin = float_of(words[16 + lane]), scale = float_of(words[32 + lane]);
  float z = fabsf(y - origin) * scale;
  if (y_bits < 0x00800000u && origin == 0.0f) {
    // A subnormal y would be flushed to 0; the distance times the scale is normal wherever there is a grid.
    z = static_cast<float>(static_cast<int>(y_bits)) * 0x1p-100f * scale * 0x1p-49f;
  }
  unsigned q = bits_of(z);
  const unsigned lowest = words[64 + lane], highest = words[80 + lane];
  q = q < lowest ? lowest : q;
  q = q > highest ? highest : q;
  const unsigned exponent = q >> 23;
  const unsigned entry = words[words[48 + lane] + exponent];
  const unsigned halvings = entry & 15u;
  const unsigned node = 2u * ((entry >> 4) + ((q & 0x7fffffu) >> (23u - halvings)));
  const float t = float_of(((q << halvings) & 0x7fffffu) | 0x3f800000u) - 1.0f;
  const float width = float_of((exponent - halvings) << 23);
  const float v0 = float_of(words[node]), m0 = float_of(words[node + 1]) * width;
  const float rise = float_of(words[node + 2]) - v0, m1 = float_of(words[node + 3]) * width;
  const float bend = (3.0f * rise - 2.0f * m0) - m1;
  const float twist = (m0 + m1) - 2.0f * rise;
  float value = v0 + t * (m0 + t * (bend + t * twist));
  if (y_bits == 0u) value = float_of(words[lower ? 97 : 96]);
  if (y_bits >= 0x43000000u) value = float_of(words[lower ? 99 : 98]);  // y >= 128
  if (lower) {
    value = value < 0.0f ? 0.0f : value;
  } else {
    value = y < value ? y : value;
  }
  return y_bits > 0x7f800000u ? y : value;  // NaN stays
}

BAND_FUNCTION float tabulated(const unsigned* words, float logp, bool lower) {
  return look_up(words, y_bits(logp), lower);
}

BAND_FUNCTION double tabulated(const unsigned* words, double logp, bool lower) {
  const unsigned y = y_bits(logp);
  const float value = look_up(words, y, lower);
  // Where everything is allowed, y in float32 could fall short of a new probability of 1.
  if (!lower && bits_of(value) == y && logp <= 0.0) return -logp;
  return value;
}

// Where the bounds of tokens are. `at` gives the lower one where `lower` is true.

template <class T>
struct Constant {
  static const bool LOWER_IS_RATIO = false;
  T log_lower, log_upper;
  BAND_FUNCTION T at(Index, T, bool lower) const { return lower ? log_lower : log_upper; }
};

template <class T>
struct Table {
  static const bool LOWER_IS_RATIO = true;
  const unsigned* words;
  BAND_FUNCTION T at(Index, T old_log_prob, bool lower) const { return tabulated(words, old_log_prob, lower); }
};

template <class T>
struct PerToken {
  static const bool LOWER_IS_RATIO = false;
  const T* log_lower;
  const T* log_upper;
  BAND_FUNCTION T at(Index index, T, bool lower) const { return (lower ? log_lower : log_upper)[index]; }
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

}  // namespace bandpo
