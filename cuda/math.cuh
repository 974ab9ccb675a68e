// Elementary functions of both computed types: exponentials, magnitudes, and extremes that keep a NaN.

namespace bandpo {

const double LOG_RATIO_LIMIT = 20;  // log-ratios are clamped to plus and minus this
const double MAX_LOG_PROB = 0.05;   // rounding puts no logarithm of a probability above this

// e^x, and e^x - 1 - x without cancellation.
template <class T>
struct Exponentials {
  T exp, gap;
};

// (e^t - 1 - t)/t^2 for t up to ln(2)/2 on either side.
BAND_FUNCTION float gap_series(float t) {
  float series = static_cast<float>(0.0001989107404369874);
  series = series * t + static_cast<float>(0.0013933725422248244);
  series = series * t + static_cast<float>(0.00833331048488617);
  series = series * t + static_cast<float>(0.041666463017463684);
  series = series * t + static_cast<float>(0.1666666716337204);
  return series * t + 0.5f;
}

// The same as `exponentials` for x below ln(2)/2 on either side, with its bits.
BAND_FUNCTION Exponentials<float> near_exponentials(float x) {
  Exponentials<float> result;
  result.gap = (x * x) * gap_series(x);
  result.exp = (result.gap + x) + 1.0f;
  return result;
}

// For x in [-80, 20] or NaN: e^x within 1.2 ulp, the gap within a relative 1e-6. The polynomial and the order
// of operations are those of rust/simd/exp_log.rs, so that the bits are equal.
BAND_FUNCTION Exponentials<float> exponentials(float x) {
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const float shifted = x * static_cast<float>(1.4426950408889634) + rounding;
  const float k = shifted - rounding;  // x = k ln 2 + t
  // A product that is exact may be part of a fused multiply-add.
  const float t = fmaf(k, -0.693359375f, x) - k * static_cast<float>(-2.1219444005469058e-4);
  const float gap = (t * t) * gap_series(t);
  const float minus_one = gap + t;
  const float scale = float_of((bits_of(shifted) << 23) + ONE_BITS);  // 2^k
  const float far = fmaf(scale, minus_one, scale - 1.0f) - x;
  Exponentials<float> result;
  result.exp = fmaf(scale, minus_one, scale);
  result.gap = fabsf(k) < 0.5f ? gap : far;
  return result;
}

// The same in double precision: e^x within 1 ulp, the gap within a relative 2e-15.
BAND_FUNCTION Exponentials<double> exponentials(double x) {
  const double rounding = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.4426950408889634 + rounding;
  const double k = shifted - rounding;
  const double t = (x - k * 0.6931471805599472) - k * -1.8641886737243033e-15;
  const double square = t * t, fourth = square * square;
  const double high = 2.0914750905027345e-09 * square + (2.5105306538858238e-08 * t + 2.755727348935914e-07);
  const double middle = (2.755725518490137e-06 * t + 2.4801587325669058e-05) * square +
                        (0.0001984126987499051 * t + 0.0013888888888883713);
  const double low = (0.008333333333326087 * t + 0.04166666666666667) * square + (0.1666666666666667 * t + 0.5);
  const double gap = square * ((high * fourth + middle) * fourth + low);
  const double scale = double_of((bits_of(shifted) + 1023) << 52);  // 2^k
  const double scaled = scale * (gap + t);
  Exponentials<double> result;
  result.exp = scaled + scale;
  result.gap = fabs(k) < 0.5 ? gap : (scaled + (scale - 1.0)) - x;
  return result;
}

BAND_FUNCTION float magnitude(float value) { return fabsf(value); }
BAND_FUNCTION double magnitude(double value) { return fabs(value); }

// The minimum, or NaN if either is NaN.
template <class T>
BAND_FUNCTION T minimum(T a, T b) {
  return b < a || is_nan(b) ? b : a;
}

// The maximum, or NaN if either is NaN.
template <class T>
BAND_FUNCTION T maximum(T a, T b) {
  return -minimum(-a, -b);
}

// In one instruction, which the compiler takes for the comparisons above at some places alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
BAND_FUNCTION float minimum(float a, float b) {
  float result;
  asm("min.NaN.ftz.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

BAND_FUNCTION float maximum(float a, float b) {
  float result;
  asm("max.NaN.ftz.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
#endif

// The maximum of a vector, or NaN if one is NaN.
template <class T>
BAND_FUNCTION T largest(const T (&values)[WIDTH]) {
  T result = values[0];
#pragma unroll
  for (int k = 1; k < WIDTH; ++k) result = maximum(result, values[k]);
  return result;
}

// True if rounding alone does not put a log-prob so far above 0.
template <class T>
BAND_FUNCTION bool is_positive(T log_prob) {
  return static_cast<T>(MAX_LOG_PROB) < log_prob;
}

}  // namespace bandpo
