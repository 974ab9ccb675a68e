// Rules of the loss: the table of rust/loss/surrogate.rs, one token at a time.

namespace bandpo {

const double LOG_RATIO_LIMIT = 20;  // log-ratios are clamped to plus and minus this

// Of PPO, DPPO, CISPO and CE-GPPO.
enum Surrogate { MIN_CLIP = 0, MASK = 1, WEIGHT = 2, GRADIENT_PRESERVING = 3 };

template <class T>
struct Rule {
  int surrogate;
  T limit;      // dual clip of min-clip or truncation of mask, infinite for none
  T log_limit;  // of min-clip
  T beta_low, beta_high;  // of gradient-preserving
};

// Counts of a loss, in the order of its output.
enum Count { VALID, NONFINITE, CLIPPED_LOW, CLIPPED_HIGH, LIMITED, COUNTS };

// Five counts of up to 63 share a word, six bits each.
BAND_FUNCTION unsigned packed_one(int position) { return 1u << 6 * position; }
BAND_FUNCTION int unpacked(unsigned counts, int position) {
  return static_cast<int>(counts >> 6 * position & 63u);
}

template <class T>
struct Outcome {
  T loss, slope;  // the slope is the gradient with respect to the log-prob
  T log_ratio, kl_k3, gradient_unclipped, gradient_removed;
  unsigned counts;  // packed: 1 for each Count that includes the token
};

// A valid token under a rule. `unclamped` is its log-ratio, or the log-ratio that is given in its place.
template <class T, class Bounds>
BAND_FUNCTION Outcome<T> outcome(const Rule<T>& rule, const Bounds& bounds, Index index, T old_log_prob,
                                 T log_prob, T unclamped, T advantage) {
  const T limit = LOG_RATIO_LIMIT;
  const T minus_advantage = T(0) - advantage;
  // Comparisons, unlike fmin and fmax, keep a NaN.
  const bool above = limit < unclamped, below = unclamped < -limit, clamped = above || below;
  const T log_ratio = above ? limit : below ? -limit : unclamped;
  const Exponentials<T> exponential = exponentials(log_ratio);
  const T ratio = exponential.exp;

  const bool is_weight = rule.surrogate == WEIGHT;
  const bool by_upper = is_weight ? T(0) < log_ratio : minus_advantage < T(0);
  const bool by_lower = is_weight ? log_ratio < T(0) : T(0) < minus_advantage;
  const T stored_bound = bounds.at(index, old_log_prob, by_lower);
  const bool clipped_low = by_lower && (Bounds::LOWER_IS_RATIO ? ratio : log_ratio) < stored_bound;
  const bool clipped_high = by_upper && stored_bound < log_ratio;
  const bool beyond = clipped_low || clipped_high;
  T bound = 0;  // as a ratio; computed for the few tokens beyond it, because exponentials are expensive
  if (beyond) bound = Bounds::LOWER_IS_RATIO && by_lower ? stored_bound : exponentials(stored_bound).exp;

  Outcome<T> result;
  bool limited = false;
  if (rule.surrogate == MIN_CLIP) {
    limited = by_lower && rule.log_limit <= log_ratio;
    const T kept_ratio = limited ? rule.limit : beyond ? bound : ratio;
    result.loss = minus_advantage * kept_ratio;
    result.slope = clamped || beyond || limited ? T(0) : result.loss;
  } else if (rule.surrogate == MASK) {
    limited = rule.limit < ratio && !beyond;
    const T slope = minus_advantage * (limited ? rule.limit : ratio);
    result.loss = beyond ? T(0) : slope * log_prob;
    result.slope = beyond ? T(0) : slope;
  } else if (is_weight) {
    result.slope = minus_advantage * (beyond ? bound : ratio);
    result.loss = result.slope * log_prob;
  } else {  // GRADIENT_PRESERVING
    const T beta = by_lower ? rule.beta_low : rule.beta_high;
    result.loss = minus_advantage * (beyond ? beta * bound : ratio);
    result.slope = clamped && !beyond ? T(0) : result.loss;
  }
  const T unclipped = minus_advantage * ratio;
  result.log_ratio = log_ratio;
  result.kl_k3 = exponential.excess;
  result.gradient_unclipped = magnitude(unclipped);
  result.gradient_removed = magnitude(unclipped - result.slope);
  const bool finite = magnitude(result.loss) < infinity(T());
  result.counts = packed_one(VALID);
  if (!finite) result.counts |= packed_one(NONFINITE);
  if (clipped_low) result.counts |= packed_one(CLIPPED_LOW);
  if (clipped_high) result.counts |= packed_one(CLIPPED_HIGH);
  if (limited) result.counts |= packed_one(LIMITED);
  return result;
}

// A log-ratio, or a ratio, moved to the nearest bound where it lies outside. NaN if the old log-prob is NaN.
template <class T, class Bounds>
BAND_FUNCTION T clipped(const Bounds& bounds, Index index, T old_log_prob, T value, bool of_ratio) {
  const bool lower = value < T(of_ratio ? 1 : 0);
  const bool is_ratio = lower && Bounds::LOWER_IS_RATIO;
  T bound = bounds.at(index, old_log_prob, lower);
  if (is_ratio != of_ratio) bound = of_ratio ? exp(bound) : log(bound);
  if (is_nan(bound) || is_nan(old_log_prob)) return bound + old_log_prob;
  return (lower ? value < bound : bound < value) ? bound : value;
}

}  // namespace bandpo
