// The divergence of {this token, everything else}, and the bounds where it is delta: rust/band/mod.rs in double
// precision alone.

namespace bandpo {

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
