// Rules of the loss: the table of rust/loss/surrogate.rs, one token at a time.

namespace bandpo {

const double MIN_WIDTH = 1e-6;      // of a region, for rules that divide by it
const double MIN_RATIO = 2.061153622438558e-9;  // e^-20, the min of the ratios that the clamp leaves
const double MIN_EXPONENT = -80;    // log-ratio below which a ratio is below every lower bound that is not 0
const double NO_RATIO = -40;        // log of a ratio that is 0 beside 1 in every type
const double CLOSED = 40;           // argument from which a soft gate is closed

// Of PPO, DPPO, CISPO, CE-GPPO, SAPO and SPO.
enum Surrogate { MIN_CLIP = 0, MASK = 1, WEIGHT = 2, GRADIENT_PRESERVING = 3, SOFT_GATE = 4, QUADRATIC = 5 };

// Rules that a kernel is compiled for, without what only others need.
enum Family {
  MIN_CLIP_ALONE,
  PLAIN,    // any rule without a width or an anchor
  EXTENDED  // any
};

template <class T, Family FAMILY>
struct Rule {
  int number;
  T first;      // dual clip of min-clip or truncation of mask, infinite for none; beta_low; tau_positive
  T second;     // of mask: 1 if it is symmetric; beta_high; tau_negative
  T log_first;  // logarithm of the dual clip
  BAND_FUNCTION bool is(Surrogate surrogate) const {
    return FAMILY == MIN_CLIP_ALONE ? surrogate == MIN_CLIP : number == surrogate;
  }
  BAND_FUNCTION bool needs_width() const { return FAMILY == EXTENDED && (is(SOFT_GATE) || is(QUADRATIC)); }
  // True if no ratio of up to sqrt(2) is limited by the dual clip or truncated.
  BAND_FUNCTION bool leaves_near_ratios() const {
    return T(1.5) < first || !(is(MIN_CLIP) || is(MASK));
  }
  // True if the loss of a token inside its bounds is its gradient, not that times the log-prob.
  BAND_FUNCTION bool loss_is_ratio() const { return is(MIN_CLIP) || is(GRADIENT_PRESERVING); }
  // True if the sign of the log-ratio selects the bound, not that of the advantage.
  BAND_FUNCTION bool by_log_ratio() const {
    return is(WEIGHT) || needs_width() || (is(MASK) && second == T(1));
  }
};

template <class T>
BAND_FUNCTION T clamp_log_ratio(T log_ratio) {
  const T limit = LOG_RATIO_LIMIT;
  return maximum(-limit, minimum(limit, log_ratio));
}

// A policy in place of the old one, at which the bounds stand.
template <class T, Family FAMILY>
struct Anchor {
  bool is_given;
  T log_prob;
  BAND_FUNCTION bool given() const { return FAMILY == EXTENDED && is_given; }
};

// Counts of a loss, in the order of its output. POSITIVE has no place in a word with the others.
enum Count { VALID, NONFINITE, CLIPPED_LOW, CLIPPED_HIGH, LIMITED, POSITIVE, COUNTS };

// Five counts of up to 63 share a word, six bits each.
BAND_FUNCTION unsigned packed_one(int position) { return 1u << 6 * position; }
BAND_FUNCTION int unpacked(unsigned counts, int position) {
  return static_cast<int>(counts >> 6 * position & 63u);
}

template <class T>
struct Outcome {
  T loss, slope;  // the slope is the gradient with respect to the log-prob
  T log_ratio, kl_k3, gradient_unclipped, gradient_removed;
  bool clipped_low, clipped_high, limited;
};

// A valid token under a rule. `unclamped` is its log-ratio, or one that is given in its place.
template <class T, Family FAMILY, class Bounds>
BAND_FUNCTION Outcome<T> outcome(const Rule<T, FAMILY>& rule, const Bounds& bounds, Index index, T old_log_prob,
                                 T log_prob, T unclamped, bool is_given, T advantage, Anchor<T, FAMILY> anchor) {
  T minus_advantage = -advantage;
  const bool clamped = static_cast<T>(LOG_RATIO_LIMIT) < magnitude(unclamped);
  const T log_ratio = clamp_log_ratio(unclamped);
  const Exponentials<T> exponential = exponentials(log_ratio);
  const T ratio = exponential.exp;

  // The log-ratio that the bounds limit, as it is and clamped, and the distance from it to that to the old policy.
  T compared = unclamped, limited_log_ratio = log_ratio, shift = 0;
  Exponentials<T> limited_exponential = exponential;
  if (anchor.given()) {
    shift = anchor.log_prob - old_log_prob;
    compared = is_given ? unclamped - shift : log_prob - anchor.log_prob;
    // A NaN compares false, and must reach the loss.
    if (is_nan(compared)) minus_advantage = compared;
    if (is_nan(log_ratio)) minus_advantage = log_ratio;
    limited_log_ratio = clamp_log_ratio(compared);
    limited_exponential = exponentials(limited_log_ratio);
    shift = clamp_log_ratio(shift);
  }
  const bool by_upper = rule.by_log_ratio() ? T(0) < limited_log_ratio : minus_advantage < T(0);
  const bool by_lower = rule.by_log_ratio() ? limited_log_ratio < T(0) : T(0) < minus_advantage;
  const T log_prob_of_bounds = anchor.given() ? anchor.log_prob : old_log_prob;
  const bool bound_is_ratio = Bounds::LOWER_IS_RATIO && by_lower;

  bool clipped_low = false, clipped_high = false;
  T bound = 0;              // as a ratio to the old policy, of a token beyond it
  T width = 0, excess = 0;  // of the region and of the ratio that it limits, for rules that need them
  if (rule.needs_width()) {
    const T stored_bound = bounds.at(index, log_prob_of_bounds, by_lower);
    if (bound_is_ratio) {
      width = T(1) - stored_bound;
    } else {
      const T from_below = stored_bound < static_cast<T>(NO_RATIO) ? static_cast<T>(NO_RATIO) : stored_bound;
      const T limited = static_cast<T>(LOG_RATIO_LIMIT) < from_below ? static_cast<T>(LOG_RATIO_LIMIT) : from_below;
      const T rise = exponentials(limited).gap + limited;
      width = by_lower ? T(0) - rise : rise;
    }
    // A ratio of 1 is at no side, and its width does not matter.
    if (!(by_lower || by_upper) || width < static_cast<T>(MIN_WIDTH)) width = MIN_WIDTH;
    excess = limited_exponential.gap + limited_log_ratio;
    clipped_low = by_lower && width < magnitude(excess);
    clipped_high = by_upper && width < magnitude(excess);
  } else if (!bounds.surely_holds(index, log_prob_of_bounds, compared)) {
    const T stored_bound = bounds.at(index, log_prob_of_bounds, by_lower);
    if (bound_is_ratio) {
      T exp = limited_exponential.exp;
      if (compared < limited_log_ratio) {  // the clamp acts
        const T min_exponent = MIN_EXPONENT;
        exp = exponentials(compared < min_exponent ? min_exponent : compared).exp;
      }
      clipped_low = exp < stored_bound;
    } else {
      clipped_low = by_lower && compared < stored_bound;
    }
    clipped_high = by_upper && stored_bound < compared;
    if (clipped_low || clipped_high) {  // few tokens, because exponentials are expensive
      if (bound_is_ratio) {
        const T min_ratio = MIN_RATIO;
        bound = stored_bound < min_ratio ? min_ratio : stored_bound;
        if (anchor.given()) bound *= exponentials(shift).exp;
      } else {
        bound = exponentials(clamp_log_ratio(stored_bound + shift)).exp;
      }
    }
  }
  const bool beyond = clipped_low || clipped_high;

  Outcome<T> result;
  bool limited = false;
  if (rule.is(MIN_CLIP)) {
    limited = by_lower && rule.log_first <= log_ratio;
    const T kept_ratio = limited ? rule.first : beyond ? bound : ratio;
    result.loss = minus_advantage * kept_ratio;
    result.slope = clamped || beyond || limited ? T(0) : result.loss;
  } else if (rule.is(MASK)) {
    // Only in a symmetric mask the advantage of a token beyond can be NaN; it must not be dropped.
    const bool dropped = beyond && !is_nan(minus_advantage);
    limited = rule.first < ratio && !dropped;
    const T slope = minus_advantage * (limited ? rule.first : ratio);
    result.loss = dropped ? T(0) : slope * log_prob;
    result.slope = dropped ? T(0) : slope;
  } else if (rule.is(WEIGHT)) {
    result.slope = minus_advantage * (beyond ? bound : ratio);
    result.loss = result.slope * log_prob;
  } else if (rule.is(GRADIENT_PRESERVING)) {
    const T beta = by_lower ? rule.first : rule.second;
    result.loss = minus_advantage * (beyond ? beta * bound : ratio);
    result.slope = clamped && !beyond ? T(0) : result.loss;
  } else {
    const bool gains = minus_advantage < T(0);
    const T loss_scale = anchor.given() ? ratio / limited_exponential.exp : T(1);
    T factor;
    if (rule.is(SOFT_GATE)) {
      const T tau = gains ? rule.first : rule.second;
      const T size = magnitude(tau * excess / width);
      const T closed = CLOSED;
      const T falling = T(0) - (closed < size ? closed : size);
      const Exponentials<T> e = exponentials(falling);
      const T sum = T(1) + e.exp;
      const T tanh = (T(0) - (e.gap + falling)) / sum;  // of half the size
      factor = closed < size ? T(0) : T(4) * e.exp / (sum * sum);
      const T moved = T(2) * width * tanh / tau;
      result.loss = minus_advantage * (loss_scale * (T(2) / tau + (excess < T(0) ? T(0) - moved : moved)));
    } else {  // QUADRATIC
      const T share = gains ? excess / width : T(0) - excess / width;
      factor = T(1) - share;
      result.loss = minus_advantage * (ratio - static_cast<T>(0.5) * (loss_scale * excess) * share);
    }
    result.slope = clamped ? T(0) : minus_advantage * ratio * factor;
  }
  const T unclipped = minus_advantage * ratio;
  result.log_ratio = log_ratio;
  result.kl_k3 = exponential.gap;
  result.gradient_unclipped = magnitude(unclipped);
  result.gradient_removed = magnitude(unclipped - result.slope);
  result.clipped_low = clipped_low;
  result.clipped_high = clipped_high;
  result.limited = limited;
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
