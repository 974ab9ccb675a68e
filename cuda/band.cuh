// The maths of one token: bounds from a table, exact bounds, and the rules of the loss.
//
// One source for the device and for the host, where it is tested against rust/simd/lanes.rs, rust/loss/mod.rs and
// rust/band/mod.rs. It is compiled without fused multiply-adds (-fmad=false, -ffp-contract=off), so that float32
// has the same bits everywhere. It includes nothing on the device: headers may be absent where it is compiled.
// Subnormal float32 may be flushed to 0; whatever that could change is done on bits.

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)
#define BAND_FUNCTION __device__ __forceinline__
#else
#include <math.h>  // with overloads for float, in the global namespace as on the device

#include <cstring>
#define BAND_FUNCTION inline
#endif

namespace bandpo {

typedef long long Index;  // tokens may be more than 2^31

BAND_FUNCTION unsigned bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

BAND_FUNCTION float float_of(unsigned bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

BAND_FUNCTION unsigned long long bits_of(double value) {
#ifdef __CUDA_ARCH__
  return static_cast<unsigned long long>(__double_as_longlong(value));
#else
  unsigned long long bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

BAND_FUNCTION double double_of(unsigned long long bits) {
#ifdef __CUDA_ARCH__
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

BAND_FUNCTION float infinity(float) { return float_of(0x7f800000u); }
BAND_FUNCTION double infinity(double) { return double_of(0x7ff0000000000000ull); }

template <class T>
BAND_FUNCTION bool is_nan(T value) {
  return value != value;
}

// ---------------------------------------------------------------------------------------------------------
// Log-probs as they are stored, and the type that each is computed in.

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

template <class Stored>
struct Computed {
  typedef float Type;
};
template <>
struct Computed<double> {
  typedef double Type;
};

BAND_FUNCTION float widened(float value) { return value; }
BAND_FUNCTION double widened(double value) { return value; }
BAND_FUNCTION unsigned char widened(unsigned char value) { return value; }
BAND_FUNCTION float widened(BFloat16 value) { return float_of(static_cast<unsigned>(value.bits) << 16); }
BAND_FUNCTION float widened(Half value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const unsigned sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + (112u << 23)));
#endif
}

// ---------------------------------------------------------------------------------------------------------
// e^x, and e^x - 1 - x without cancellation, for x within plus and minus 20. NaN gives NaN.

template <class T>
struct Exponentials {
  T exp, excess;
};

// The polynomial and the order of rust/simd/lanes.rs: e^x within 1.2 ulp, the excess within 1e-6 of itself.
BAND_FUNCTION Exponentials<float> exponentials(float x) {
  const float rounding = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to a whole number
  const float shifted = x * static_cast<float>(1.4426950408889634) + rounding;
  const float k = shifted - rounding;  // x = k ln 2 + t
  const float t = (x - k * 0.693359375f) - k * static_cast<float>(-2.1219444005469058e-4);
  float series = static_cast<float>(0.0001989107404369874);
  series = series * t + static_cast<float>(0.0013933725422248244);
  series = series * t + static_cast<float>(0.00833331048488617);
  series = series * t + static_cast<float>(0.041666463017463684);
  series = series * t + static_cast<float>(0.1666666716337204);
  series = series * t + 0.5f;
  const float excess = (t * t) * series;
  const float minus_one = excess + t;
  const float scale = float_of((bits_of(shifted) + 127u) << 23);  // 2^k
  const float scaled = scale * minus_one;
  const float far = (scaled + (scale - 1.0f)) - x;
  Exponentials<float> result;
  result.exp = scaled + scale;
  result.excess = fabsf(k) < 0.5f ? excess : far;
  return result;
}

BAND_FUNCTION Exponentials<double> exponentials(double x) {
  Exponentials<double> result;
  result.exp = exp(x);
  // By its series where the difference has lost digits; the next term is 3e-15 of it.
  result.excess =
      fabs(x) < 1e-3 ? x * x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0)))) : expm1(x) - x;
  return result;
}

BAND_FUNCTION float magnitude(float value) { return fabsf(value); }
BAND_FUNCTION double magnitude(double value) { return fabs(value); }

// ---------------------------------------------------------------------------------------------------------
// The table: the steps of docs/table-format.md.

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

// ---------------------------------------------------------------------------------------------------------
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

// ---------------------------------------------------------------------------------------------------------
// The rules: the table of rust/loss/mod.rs.

enum Surrogate { MIN_CLIP = 0, MASK = 1, WEIGHT = 2, GRADIENT_PRESERVING = 3 };

template <class T>
struct Rule {
  int surrogate;
  T first;      // the dual clip of min-clip or the truncation of mask, inf for none; beta_low
  T second;     // beta_high
  T log_first;  // of min-clip
};

// Bits of Outcome::flags, six apart: a thread adds up to 63 tokens in one word.
enum Flag : unsigned {
  VALID = 1u,
  NONFINITE = 1u << 6,
  CLIPPED_LOW = 1u << 12,
  CLIPPED_HIGH = 1u << 18,
  LIMITED = 1u << 24
};

template <class T>
struct Outcome {
  T loss, slope;  // the gradient with respect to the log-prob
  T log_ratio, kl_k3, gradient_free, gradient_removed;
  unsigned flags;
};

// Of a token that counts. `unclamped` is its log-ratio or the one that is given in its place.
template <class T, class Bounds>
BAND_FUNCTION Outcome<T> outcome(const Rule<T>& rule, const Bounds& bounds, Index index, T old_log_prob,
                                 T log_prob, T unclamped, T advantage) {
  const T limit = 20;
  const T cost = T(0) - advantage;
  // Comparisons, unlike minima, keep a NaN.
  const bool above = limit < unclamped, below = unclamped < -limit, clamped = above || below;
  const T log_ratio = above ? limit : below ? -limit : unclamped;
  const Exponentials<T> exponential = exponentials(log_ratio);
  const T ratio = exponential.exp;

  const bool weighs = rule.surrogate == WEIGHT;
  const bool up = weighs ? T(0) < log_ratio : cost < T(0);
  const bool down = weighs ? log_ratio < T(0) : T(0) < cost;
  const T edge = bounds.at(index, old_log_prob, down);
  const bool clipped_low = down && (Bounds::LOWER_IS_RATIO ? ratio : log_ratio) < edge;
  const bool clipped_high = up && edge < log_ratio;
  const bool beyond = clipped_low || clipped_high;
  T bound = 0;  // as a ratio, where it is needed: few tokens are beyond, and exponentials cost
  if (beyond) bound = Bounds::LOWER_IS_RATIO && down ? edge : exponentials(edge).exp;

  Outcome<T> result;
  bool limited = false;
  if (rule.surrogate == MIN_CLIP) {
    limited = down && rule.log_first <= log_ratio;
    const T stop = limited ? rule.first : beyond ? bound : ratio;
    result.loss = cost * stop;
    result.slope = clamped || beyond || limited ? T(0) : result.loss;
  } else if (rule.surrogate == MASK) {
    limited = rule.first < ratio && !beyond;
    const T slope = cost * (limited ? rule.first : ratio);
    result.loss = beyond ? T(0) : slope * log_prob;
    result.slope = beyond ? T(0) : slope;
  } else if (weighs) {
    result.slope = cost * (beyond ? bound : ratio);
    result.loss = result.slope * log_prob;
  } else {
    const T beta = down ? rule.first : rule.second;
    result.loss = cost * (beyond ? beta * bound : ratio);
    result.slope = clamped && !beyond ? T(0) : result.loss;
  }
  const T free = cost * ratio;
  result.log_ratio = log_ratio;
  result.kl_k3 = exponential.excess;
  result.gradient_free = magnitude(free);
  result.gradient_removed = magnitude(free - result.slope);
  const bool finite = magnitude(result.loss) < infinity(T());
  result.flags = VALID;
  if (!finite) result.flags |= NONFINITE;
  if (clipped_low) result.flags |= CLIPPED_LOW;
  if (clipped_high) result.flags |= CLIPPED_HIGH;
  if (limited) result.flags |= LIMITED;
  return result;
}

// Of a token that does not count, whatever it holds.
template <class T>
BAND_FUNCTION Outcome<T> masked() {
  Outcome<T> result = {T(0), T(0), T(0), T(0), T(0), T(0), 0u};
  return result;
}

// The bin of the old probability, with edges at 1e-3, 1e-2, 1e-1 and 0.5.
template <class T>
BAND_FUNCTION int probability_bin(T old_log_prob) {
  return (T(-6.907755278982137) <= old_log_prob) + (T(-4.605170185988091) <= old_log_prob) +
         (T(-2.3025850929940455) <= old_log_prob) + (T(-0.6931471805599453) <= old_log_prob);
}

// The minimum, NaN if either is.
template <class T>
BAND_FUNCTION T smaller(T a, T b) {
  return b < a || is_nan(b) ? b : a;
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

// ---------------------------------------------------------------------------------------------------------
// Generators of f-divergences in double precision: the formulas of rust/divergence/mod.rs, sums of terms of one
// sign, so that nothing cancels near u = 1.

enum Kind {
  KL = 0, REVERSE_KL = 1, TV = 2, HELLINGER = 3, JENSEN_SHANNON = 4, JEFFREYS = 5, ALPHA = 6, VAJDA = 7,
  BWCS = 8, LE_CAM = 9, HOCKEY_STICK = 10
};

struct Generator {
  int kind;
  double parameter;
};

// An argument u > 0: near 1 neither ln u nor u - 1 can be had from u itself.
struct Point {
  double log, excess, u;
};

BAND_FUNCTION Point point_of_log(double log) {
  const double excess = expm1(log);
  const Point point = {log, excess, excess < -0.5 ? exp(log) : excess + 1.0};
  return point;
}

BAND_FUNCTION Point point_of_excess(double excess) {
  const Point point = {log1p(excess), excess, excess + 1.0};
  return point;
}

BAND_FUNCTION Point point_of_ratio(double u) {
  const Point point = {log(u), u - 1.0, u};
  return point;
}

// An outcome that has lost all of its probability.
BAND_FUNCTION Point point_of_nothing() {
  const Point point = {-infinity(1.0), -1.0, 0.0};
  return point;
}

// x - ln(1+x) >= 0
BAND_FUNCTION double excess_over_log1p(double x) {
  if (!(x >= -0.4 && x < 0.6)) return x - log1p(x);
  // With z = x/(2+x): ln(1+x) = 2 atanh z and x - 2z = z x.
  const double z = x / (2.0 + x), square = z * z;
  double tail = 1.0 / 29.0;
  for (int odd = 27; odd >= 3; odd -= 2) tail = tail * square + 1.0 / odd;
  return z * (x - 2.0 * square * tail);
}

// e^x - 1 - x >= 0
BAND_FUNCTION double exp_excess(double x) {
  if (!(x >= -1.0 && x < 1.0)) return expm1(x) - x;
  double tail = 1.0;
  for (int n = 19; n >= 3; --n) tail = 1.0 + tail * x / n;
  return 0.5 * x * x * tail;
}

// u ln u, 0 at u = 0
BAND_FUNCTION double scaled_log(double u, double log) { return u == 0.0 ? 0.0 : u * log; }

// u^a - 1
BAND_FUNCTION double power_minus_one(double order, const Point& at) {
  const double exponent = order * at.log;
  if (fabs(exponent) < 1.0) return expm1(exponent);
  if (at.u < 1e-290) return exp(exponent) - 1.0;
  return pow(at.u, order) - 1.0;
}

BAND_FUNCTION double jensen_shannon(const Point& at) {
  // With m = (1+u)/2 and K(z) = z - ln(1+z): [K(m - 1) + u K(m/u - 1)]/2.
  const double to_mean = at.excess * 0.5;
  const double from_mean = at.u < 1e-3 ? -to_mean - scaled_log(at.u, log1p(to_mean) - at.log)
                                       : at.u * excess_over_log1p(-(to_mean / at.u));
  return (excess_over_log1p(to_mean) + from_mean) * 0.5;
}

BAND_FUNCTION double cressie_read(double order, const Point& at) {
  const bool near_one = fabs(at.log) < 1.0;
  const double scale = order * (order - 1.0), rest = 1.0 - order;
  if (order <= 0.5) {
    if (near_one) return (exp_excess(order * at.log) - order * exp_excess(at.log)) / scale;
    return (power_minus_one(order, at) - order * at.excess) / scale;
  }
  if (near_one) {
    // Orders near 1 would cancel: the adjoint f_a(u) = u f_(1-a)(1/u) does not.
    return at.u * (exp_excess(-(rest * at.log)) - rest * exp_excess(-at.log)) / (-rest * order);
  }
  if (at.log < -600.0) return 1.0 / order;  // f(0) to all digits
  return (at.u * power_minus_one(order - 1.0, at) - (order - 1.0) * at.excess) / scale;
}

// f(u)
BAND_FUNCTION double value(const Generator& f, const Point& at) {
  switch (f.kind) {
    case KL: return fabs(at.excess) < 0.5 ? excess_over_log1p(at.excess) : at.excess - at.log;
    case REVERSE_KL:
      return fabs(at.log) < 0.7 ? at.u * exp_excess(-at.log) : scaled_log(at.u, at.log) - at.excess;
    case TV: return fabs(at.excess) * 0.5;
    case HELLINGER: {
      // Half of a large ln u would lose digits of e^(ln(u)/2).
      const double m = fabs(at.log) < 1.0 ? expm1(at.log * 0.5) : sqrt(at.u) - 1.0;
      return m * m * 0.5;
    }
    case JENSEN_SHANNON: return jensen_shannon(at);
    case JEFFREYS: return at.excess * at.log;
    case ALPHA: return cressie_read(f.parameter, at);
    case VAJDA: return f.parameter == 1.0 ? fabs(at.excess) : pow(fabs(at.excess), f.parameter);
    case BWCS: return at.excess * (at.excess / ((1.0 - f.parameter) + at.u * f.parameter));
    case LE_CAM: return at.excess * (at.excess / (at.excess + 2.0)) * 0.5;
    default: {  // HOCKEY_STICK
      const double over = at.excess - (f.parameter - 1.0);
      return over > 0.0 ? over : 0.0;
    }
  }
}

// f(0), infinite for some
BAND_FUNCTION double at_zero(const Generator& f) {
  switch (f.kind) {
    case KL: case JEFFREYS: return infinity(1.0);
    case REVERSE_KL: case VAJDA: return 1.0;
    case TV: case HELLINGER: case LE_CAM: return 0.5;
    case JENSEN_SHANNON: return 0.34657359027997264;
    case ALPHA: return f.parameter > 0.0 ? 1.0 / f.parameter : infinity(1.0);
    case BWCS: return f.parameter == 1.0 ? infinity(1.0) : 1.0 / (1.0 - f.parameter);
    default: return 0.0;
  }
}

// f'(inf), infinite for some
BAND_FUNCTION double slope_at_infinity(const Generator& f) {
  switch (f.kind) {
    case KL: case HOCKEY_STICK: return 1.0;
    case TV: case HELLINGER: case LE_CAM: return 0.5;
    case JENSEN_SHANNON: return 0.34657359027997264;
    case ALPHA: return f.parameter < 1.0 ? 1.0 / (1.0 - f.parameter) : infinity(1.0);
    case VAJDA: return f.parameter == 1.0 ? 1.0 : infinity(1.0);
    case BWCS: return f.parameter == 0.0 ? infinity(1.0) : 1.0 / f.parameter;
    default: return infinity(1.0);
  }
}

// f(u)/u, which stays in the range of a double where f(u), which is `plain`, does not
BAND_FUNCTION double value_per_u(const Generator& f, const Point& at, double plain) {
  if (f.kind == ALPHA && f.parameter > 1.0) {
    const double rate = f.parameter - 1.0;
    return (power_minus_one(rate, at) - rate * (at.excess / at.u)) / (f.parameter * rate);
  }
  if (f.kind == VAJDA && at.excess > 0.0) return at.excess / at.u * pow(at.excess, f.parameter - 1.0);
  if (f.kind == BWCS) return at.excess / at.u * (at.excess / (at.excess * f.parameter + 1.0));
  return plain / at.u;
}

// u f'(u)
BAND_FUNCTION double log_slope(const Generator& f, const Point& at) {
  const double log = at.log, excess = at.excess, u = at.u;
  switch (f.kind) {
    case KL: return excess;
    case REVERSE_KL: return scaled_log(u, log);
    case TV: return excess < 0.0 ? -0.5 * u : 0.5 * u;
    case HELLINGER: return 0.5 * exp(0.5 * log) * expm1(0.5 * log);
    case JENSEN_SHANNON: return u == 0.0 ? 0.0 : 0.5 * u * (log - log1p(0.5 * excess));
    case JEFFREYS: return scaled_log(u, log) + excess;
    case ALPHA: {
      const double power = (f.parameter - 1.0) * log;
      if (fabs(power) < 1.0) return u * expm1(power) / (f.parameter - 1.0);
      return (exp(f.parameter * log) - u) / (f.parameter - 1.0);
    }
    case VAJDA: {
      const double slope = f.parameter * pow(fabs(excess), f.parameter - 1.0) * u;
      return excess < 0.0 ? -slope : slope;
    }
    case BWCS: {
      if (f.parameter == 1.0) return excess * (1.0 + 1.0 / u);
      const double denominator = 1.0 + f.parameter * excess;
      return u * (excess / denominator) * ((2.0 + f.parameter * excess) / denominator);
    }
    case LE_CAM: {
      const double plus = 2.0 + excess;
      return 0.5 * u * (excess / plus) * ((4.0 + excess) / plus);
    }
    default: return excess > f.parameter - 1.0 ? u : 0.0;
  }
}

// f'(u) for u > 1, in the range of a double where u f'(u) is not
BAND_FUNCTION double slope(const Generator& f, const Point& at) {
  if (f.kind == ALPHA) return expm1((f.parameter - 1.0) * at.log) / (f.parameter - 1.0);
  if (f.kind == VAJDA) return f.parameter * pow(at.excess, f.parameter - 1.0);
  if (f.kind == BWCS && f.parameter == 0.0) return 2.0 * at.excess;
  return log_slope(f, at) / at.u;
}

// ln(f(u)/u) for ln u > 0, and ln f(u) for ln u < 0, also where f(u), `plain`, leaves the range of a double
BAND_FUNCTION double log_value(const Generator& f, double log_u, double plain) {
  if (plain < infinity(1.0) && plain > 0.0) return log(plain) - (log_u > 0.0 ? log_u : 0.0);
  const double order = f.parameter, rate = order - 1.0;
  // What is left out is smaller by a factor e^-300 or more.
  if (log_u > 0.0) {
    switch (f.kind) {
      case REVERSE_KL: return log(log_u - 1.0);
      case JEFFREYS: return log(log_u);
      case ALPHA: {
        const double exponent = rate * log_u;
        if (exponent < 700.0) return log((expm1(exponent) - rate) / (order * rate));
        return exponent - log(order * rate);
      }
      case VAJDA: return order > 1.0 ? rate * log_u : log(slope_at_infinity(f));
      case BWCS: return order == 0.0 ? log_u : log(slope_at_infinity(f));
      default: return log(slope_at_infinity(f));
    }
  }
  if (f.kind == ALPHA) return order * log_u - log(order * rate);
  return f.kind == BWCS ? -log_u : log(plain);
}

// ---------------------------------------------------------------------------------------------------------
// The divergence of {this token, everything else}, and the bounds where it is delta: rust/band/mod.rs in double
// precision alone.

const double EPSILON = 0x1p-52;
const double FAR_TAIL = -690.9;  // below this logp, products such as p f(r) leave the range of a double
const double FAR_REST = 1e-300;  // and below this 1 - p
const double FAR_ERROR = 1e-12;  // relative, of a divergence there: logarithms of up to 750 are added

// Most evaluations of D that halving bits takes, after that at the end of a side: the bits of a finite double
// are below 2^63, and each trip halves what is left, rounding up, until neighbours are left.
const int MOST_TRIPS = 63;

// w f(u). The factor u is drawn to the weight where f(u) might overflow; where the weight itself leaves the
// range of a double, the product is formed in logarithms.
BAND_FUNCTION double weighted(const Generator& f, double weight, double log_weight, const Point& at) {
  const bool gone = at.log == -infinity(1.0);
  const double plain = gone ? at_zero(f) : value(f, at);
  if (plain <= 0.0) return 0.0;
  if (gone || log_weight > FAR_TAIL) {
    return at.u > 1e60 ? weight * at.u * value_per_u(f, at, plain) : weight * plain;
  }
  // The weight takes the factor u first: both may be huge, and their sum exact.
  return exp((at.log > 0.0 ? log_weight + at.log : log_weight) + log_value(f, at.log, plain));
}

// A divergence, and what its rounding error may be
struct Evaluated {
  double divergence, error;
};

// D at any log-ratio inside the simplex, for any logp <= 0; for 0 the limit f(r) + (1-r) f'(inf)
BAND_FUNCTION Evaluated evaluate(const Generator& f, double logp, double log_ratio) {
  const bool certain = logp >= 0.0, far = !(logp >= FAR_TAIL && logp <= -FAR_REST);
  const double log_new = logp + log_ratio;
  const double token_p = exp(logp), others_p = -expm1(logp);
  const double new_others_p = -expm1(log_new), left = new_others_p / others_p;
  const Point token = log_ratio == -infinity(1.0) ? point_of_nothing() : point_of_log(log_ratio);
  const double lost = token_p / others_p * token.excess;
  Point others;
  if (certain) {
    others = point_of_excess(0.0);
  } else if (far ? new_others_p <= 0.0 : lost > 0.5 && !(left > 0.0)) {
    others = point_of_nothing();
  } else if (far && logp > FAR_TAIL) {
    others = point_of_log(log(new_others_p) - log(others_p));
  } else if (far ? new_others_p < 0.5 : lost > 0.5) {
    others = point_of_ratio(left);  // next to saturation: what is left, without cancellation
  } else {
    others = point_of_excess(far ? token_p - exp(log_new) : -lost);
  }
  // By how much D moves for a relative change of 1 in what the others gain or keep.
  double change = 0.0;
  if (others.excess > 0.0) {
    change = others.excess * slope(f, others);
  } else if (others.excess < 0.0 && others.u > 0.0) {
    const double share = others.excess / others.u;
    change = log_slope(f, others) * (share < -1.0 ? -1.0 : share);
  }
  Evaluated result = {0.0, 0.0};
  // A loop, because the formulas of all generators are much code.
#pragma unroll 1
  for (int outcome = 0; outcome < 2; ++outcome) {
    const bool of_token = outcome == 0;
    result.divergence += weighted(f, of_token ? token_p : others_p, of_token ? logp : certain ? 0.0 : log(others_p),
                                  of_token ? token : others);
  }
  if (certain && token.excess != 0.0) result.divergence -= token.excess * slope_at_infinity(f);
  double doubt = result.divergence + fabs(others_p * change);
  if (f.kind == HOCKEY_STICK && token.excess > 0.0) doubt += token_p * token.excess;  // of which g - 1 is taken
  result.error = far && !certain ? FAR_ERROR * result.divergence : 64.0 * EPSILON * doubt;
  return result;
}

// The last log-ratio on the way from 0 to the end of a side where D <= radius whatever the rounding errors
BAND_FUNCTION double exact_bound(const Generator& f, double logp, double radius, bool lower) {
  if (is_nan(logp)) return logp;
  if (logp == -infinity(1.0)) return lower ? -infinity(1.0) : infinity(1.0);
  if (logp >= 0.0) {
    if (!lower || slope_at_infinity(f) == infinity(1.0)) return 0.0;
    logp = 0.0;
  }
  const double end = lower ? -infinity(1.0) : -logp, sign = lower ? -1.0 : 1.0;
  unsigned long long good = 0, bad = bits_of(fabs(end));
  unsigned long long tried = bad;  // first the end itself
#pragma unroll 1
  for (int trip = 0; trip <= MOST_TRIPS; ++trip) {
    const Evaluated at = evaluate(f, logp, sign * double_of(tried));
    if (at.divergence + at.error <= radius) {
      good = tried;
    } else {
      bad = tried;
    }
    if (good >= bad || bad - good == 1) break;
    tried = good + (bad - good) / 2;
  }
  return sign * double_of(good);
}

// Whether the divergence at a log-ratio, to double precision, is at most the radius; a NaN lies nowhere
BAND_FUNCTION bool contains(const Generator& f, double logp, double radius, double log_ratio) {
  if (is_nan(logp) || is_nan(log_ratio)) return false;
  if (logp == -infinity(1.0)) return true;  // no finite ratio gives the token any probability
  if (log_ratio > (logp < 0.0 ? -logp : 0.0)) return false;
  return evaluate(f, logp < 0.0 ? logp : 0.0, log_ratio).divergence <= radius;
}

}  // namespace bandpo
