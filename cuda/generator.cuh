// Generators of f-divergences, in double precision.
//
// The formulas are those of rust/divergence: sums of terms of one sign, so that nothing cancels near u = 1.

namespace bandpo {

enum Kind {
  KL = 0, REVERSE_KL = 1, TV = 2, HELLINGER = 3, JENSEN_SHANNON = 4, JEFFREYS = 5, ALPHA = 6, VAJDA = 7,
  BWCS = 8, LE_CAM = 9, HOCKEY_STICK = 10
};

struct Generator {
  int kind;
  double parameter;
};

// An argument u of f. ln u and u - 1 are stored too, because near 1 neither can be computed from u.
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

// u = 0: an outcome that lost all of its probability.
BAND_FUNCTION Point point_of_zero() {
  const Point point = {-infinity(1.0), -1.0, 0.0};
  return point;
}

// x - ln(1+x), which is at least 0.
BAND_FUNCTION double excess_over_log1p(double x) {
  if (!(x >= -0.4 && x < 0.6)) return x - log1p(x);
  // With z = x/(2+x): ln(1+x) = 2 atanh z and x - 2z = z x.
  const double z = x / (2.0 + x), square = z * z;
  double tail = 1.0 / 29.0;
  for (int odd = 27; odd >= 3; odd -= 2) tail = tail * square + 1.0 / odd;
  return z * (x - 2.0 * square * tail);
}

// e^x - 1 - x, which is at least 0.
BAND_FUNCTION double exp_excess(double x) {
  if (!(x >= -1.0 && x < 1.0)) return expm1(x) - x;
  double tail = 1.0;
  for (int n = 19; n >= 3; --n) tail = 1.0 + tail * x / n;
  return 0.5 * x * x * tail;
}

// u ln u; 0 at u = 0.
BAND_FUNCTION double scaled_log(double u, double log) { return u == 0.0 ? 0.0 : u * log; }

// u^order - 1.
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
    // By the adjoint, f_a(u) = u f_(1-a)(1/u), because orders near 1 would cancel.
    return at.u * (exp_excess(-(rest * at.log)) - rest * exp_excess(-at.log)) / (-rest * order);
  }
  if (at.log < -600.0) return 1.0 / order;  // f(0), to the last digit
  return (at.u * power_minus_one(order - 1.0, at) - (order - 1.0) * at.excess) / scale;
}

// f(u).
BAND_FUNCTION double value(const Generator& f, const Point& at) {
  switch (f.kind) {
    case KL: return fabs(at.excess) < 0.5 ? excess_over_log1p(at.excess) : at.excess - at.log;
    case REVERSE_KL:
      return fabs(at.log) < 0.7 ? at.u * exp_excess(-at.log) : scaled_log(at.u, at.log) - at.excess;
    case TV: return fabs(at.excess) * 0.5;
    case HELLINGER: {
      // A square root where ln u is large, because e^(ln(u)/2) would lose digits.
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

// f(0), which may be infinite.
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

// f'(inf), which may be infinite.
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

// f(u)/u, in the range of a double also where `plain`, the value f(u), overflows.
BAND_FUNCTION double value_per_u(const Generator& f, const Point& at, double plain) {
  if (f.kind == ALPHA && f.parameter > 1.0) {
    const double rate = f.parameter - 1.0;
    return (power_minus_one(rate, at) - rate * (at.excess / at.u)) / (f.parameter * rate);
  }
  if (f.kind == VAJDA && at.excess > 0.0) return at.excess / at.u * pow(at.excess, f.parameter - 1.0);
  if (f.kind == BWCS) return at.excess / at.u * (at.excess / (at.excess * f.parameter + 1.0));
  return plain / at.u;
}

// u f'(u).
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

// f'(u) for u > 1, in the range of a double also where u f'(u) overflows.
BAND_FUNCTION double slope(const Generator& f, const Point& at) {
  if (f.kind == ALPHA) return expm1((f.parameter - 1.0) * at.log) / (f.parameter - 1.0);
  if (f.kind == VAJDA) return f.parameter * pow(at.excess, f.parameter - 1.0);
  if (f.kind == BWCS && f.parameter == 0.0) return 2.0 * at.excess;
  return log_slope(f, at) / at.u;
}

// ln(f(u)/u) for ln u > 0 and ln f(u) for ln u < 0, also where `plain`, the value f(u), overflows or underflows.
BAND_FUNCTION double log_value(const Generator& f, double log_u, double plain) {
  if (plain < infinity(1.0) && plain > 0.0) return log(plain) - (log_u > 0.0 ? log_u : 0.0);
  const double order = f.parameter, rate = order - 1.0;
  // Omitted terms are a relative e^-300 at most.
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

}  // namespace bandpo
