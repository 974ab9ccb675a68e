// Number types: their bits, log-probs as they are stored, and the type that each is computed in.
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

#ifndef BAND_TABLE_IN_SHARED_MEMORY
#define BAND_TABLE_IN_SHARED_MEMORY(name) extern __shared__ unsigned name[]
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

const int THREADS = 256;  // in a block of every kernel

}  // namespace bandpo
