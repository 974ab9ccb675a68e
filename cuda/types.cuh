// Number types: bits of floats, types that log-probs are stored in, and the type that each is computed in.
//
// The source runs on a device and, for tests, on the host (tests/support/emulator.h). On a device it includes
// nothing, because a compiler at run time may have no headers. It is compiled without fused multiply-adds
// (-fmad=false, -ffp-contract=off), so that float32 has the bits that it has in Rust; fmaf stands where a product is
// exact, and where only a margin depends on it. Subnormal float32 may be flushed to 0; what that could change is computed
// on bits.

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)
#define BAND_FUNCTION __device__ __forceinline__
#else
#include <math.h>  // has overloads for float in the global namespace, as a device has

#include <cstring>
#define BAND_FUNCTION inline
#endif

namespace bandpo {

typedef long long Index;  // because an int counts fewer tokens than fit a device

const int THREADS = 256;  // threads of a block, in every kernel
const int WIDTH = 4;      // tokens in a vector, which a thread loads at a time

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

const unsigned ONE_BITS = 0x3f800000u;

template <class T>
BAND_FUNCTION bool is_nan(T value) {
  return value != value;
}

// Otherwise a compiler may compute a value again at each use.
#ifdef __CUDA_ARCH__
BAND_FUNCTION void keep_in_register(unsigned& value) { asm volatile("" : "+r"(value)); }
BAND_FUNCTION void keep_in_register(int& value) { asm volatile("" : "+r"(value)); }
BAND_FUNCTION void keep_in_register(float& value) { asm volatile("" : "+f"(value)); }
BAND_FUNCTION void keep_in_register(double& value) { asm volatile("" : "+d"(value)); }
#else
template <class T>
BAND_FUNCTION void keep_in_register(T&) {}
#endif

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

// The type that a stored type is computed in.
template <class Stored>
struct Computed {
  typedef float Type;
};
template <>
struct Computed<double> {
  typedef double Type;
};

// The type of a weighted gradient. float16 has too small a range for a gradient that a scale is still to multiply.
template <class Stored>
struct Weighted {
  typedef typename Computed<Stored>::Type Type;
};
template <>
struct Weighted<BFloat16> {
  typedef BFloat16 Type;
};

// A stored value in that type, or a flag as it is.
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

// A value as it is stored, rounded to nearest, ties to even.
BAND_FUNCTION float narrowed(float value, float) { return value; }
BAND_FUNCTION double narrowed(double value, double) { return value; }
BAND_FUNCTION BFloat16 narrowed(float value, BFloat16) {
  const unsigned bits = bits_of(value);
  const unsigned rounded = is_nan(value) ? 0x7fffffffu : bits + 0x7fffu + (bits >> 16 & 1u);
  const BFloat16 narrow = {static_cast<unsigned short>(rounded >> 16)};
  return narrow;
}

}  // namespace bandpo
