// Exact bounds of a band: where the divergence D of {this token, everything else} reaches its radius.
//
// The definitions are those of rust/band, here in double precision alone.

namespace bandpo {

const double EPSILON = 0x1p-52;
// Tails: products such as p f(r) leave the range of a double below this logp, or below this 1 - p.
const double FAR_TAIL = -690.9;
const double FAR_REST = 1e-300;
const double FAR_ERROR = 1e-12;  // relative error of D in the tails, where logarithms of up to 750 are added

// Max evaluations of D after the one at the end of a side. Bits of a finite double are below 2^63, and each
// evaluation halves their interval.
const int MAX_HALVINGS = 63;

// w f(u). The weight absorbs a factor u where f(u) might overflow. The product is formed in logarithms where the
// weight itself leaves the range of a double.
BAND_FUNCTION double weighted(const Generator& f, double weight, double log_weight, const Point& at) {
  const bool gone = at.log == -infinity(1.0);
  const double plain = gone ? at_zero(f) : value(f, at);
  if (plain <= 0.0) return 0.0;
  if (gone || log_weight > FAR_TAIL) {
    return at.u > 1e60 ? weight * at.u * value_per_u(f, at, plain) : weight * plain;
  }
  // ln w + ln u first: both may be huge, while their sum is exact.
  return exp((at.log > 0.0 ? log_weight + at.log : log_weight) + log_value(f, at.log, plain));
}

// D and a bound of its rounding error.
struct Evaluated {
  double divergence, error;
};

// D at a log-ratio inside the simplex, for logp <= 0. At logp = 0 it is the limit f(r) + (1-r) f'(inf).
BAND_FUNCTION Evaluated evaluate(const Generator& f, double logp, double log_ratio) {
  const bool certain = logp >= 0.0, far = !(logp >= FAR_TAIL && logp <= -FAR_REST);
  const double log_new = logp + log_ratio;
  const double token_p = exp(logp), others_p = -expm1(logp);
  const double new_others_p = -expm1(log_new), left = new_others_p / others_p;
  const Point token = log_ratio == -infinity(1.0) ? point_of_zero() : point_of_log(log_ratio);
  const double lost = token_p / others_p * token.excess;
  Point others;
  if (certain) {
    others = point_of_excess(0.0);
  } else if (far ? new_others_p <= 0.0 : lost > 0.5 && !(left > 0.0)) {
    others = point_of_zero();
  } else if (far && logp > FAR_TAIL) {
    others = point_of_log(log(new_others_p) - log(others_p));
  } else if (far ? new_others_p < 0.5 : lost > 0.5) {
    others = point_of_ratio(left);  // near saturation: 1 - lost would cancel
  } else {
    others = point_of_excess(far ? token_p - exp(log_new) : -lost);
  }
  // Derivative of D by the relative change of what the others gain or keep.
  double change = 0.0;
  if (others.excess > 0.0) {
    change = others.excess * slope(f, others);
  } else if (others.excess < 0.0 && others.u > 0.0) {
    const double share = others.excess / others.u;
    change = log_slope(f, others) * (share < -1.0 ? -1.0 : share);
  }
  Evaluated result = {0.0, 0.0};
  // Not unrolled: the formulas of all generators are much code.
#pragma unroll 1
  for (int outcome = 0; outcome < 2; ++outcome) {
    const bool of_token = outcome == 0;
    result.divergence += weighted(f, of_token ? token_p : others_p, of_token ? logp : certain ? 0.0 : log(others_p),
                                  of_token ? token : others);
  }
  if (certain && token.excess != 0.0) result.divergence -= token.excess * slope_at_infinity(f);
  double error_scale = result.divergence + fabs(others_p * change);
  if (f.kind == HOCKEY_STICK && token.excess > 0.0) error_scale += token_p * token.excess;  // g - 1 is subtracted
  result.error = far && !certain ? FAR_ERROR * result.divergence : 64.0 * EPSILON * error_scale;
  return result;
}

// The last log-ratio, from 0 towards the end of a side, at which D plus its error bound is at most the radius.
BAND_FUNCTION double exact_bound(const Generator& f, double logp, double radius, bool lower) {
  if (is_nan(logp)) return logp;
  if (logp == -infinity(1.0)) return lower ? -infinity(1.0) : infinity(1.0);
  if (logp >= 0.0) {
    if (!lower || slope_at_infinity(f) == infinity(1.0)) return 0.0;
    logp = 0.0;
  }
  const double end = lower ? -infinity(1.0) : -logp, sign = lower ? -1.0 : 1.0;
  unsigned long long inside = 0, outside = bits_of(fabs(end));
  unsigned long long tried = outside;  // the end comes first
#pragma unroll 1
  for (int halving = 0; halving <= MAX_HALVINGS; ++halving) {
    const Evaluated at = evaluate(f, logp, sign * double_of(tried));
    if (at.divergence + at.error <= radius) {
      inside = tried;
    } else {
      outside = tried;
    }
    if (inside >= outside || outside - inside == 1) break;
    tried = inside + (outside - inside) / 2;
  }
  return sign * double_of(inside);
}

// True if D at a log-ratio, in double precision, is at most the radius; false for a NaN.
BAND_FUNCTION bool contains(const Generator& f, double logp, double radius, double log_ratio) {
  if (is_nan(logp) || is_nan(log_ratio)) return false;
  if (logp == -infinity(1.0)) return true;  // no finite ratio raises p = 0
  if (log_ratio > (logp < 0.0 ? -logp : 0.0)) return false;
  return evaluate(f, logp < 0.0 ? logp : 0.0, log_ratio).divergence <= radius;
}

}  // namespace bandpo
