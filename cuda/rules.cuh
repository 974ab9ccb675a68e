// The rules: the table of rust/loss/mod.rs.

namespace bandpo {

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

}  // namespace bandpo
