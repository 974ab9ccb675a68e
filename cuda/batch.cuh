// Batches of tokens: strided arrays, loaded and stored several tokens at a time.

namespace bandpo {

const int VECTORS = 8;  // vectors of a thread in a chunk: 32 tokens, below the 64 at which packed counts overflow
const int CHUNK = THREADS * WIDTH * VECTORS;  // max tokens that a block adds up to one partial result

template <class T>
struct alignas(sizeof(T) * WIDTH < 16 ? sizeof(T) * WIDTH : 16) AlignedVector {
  T item[WIDTH];
};

// An array of shape [rows, row_length].
template <class Stored>
struct Strided {
  const Stored* data;
  Index row_stride, column_stride;
};

// Loads whole vectors of a contiguous, aligned array.
template <class Stored, class T>
BAND_FUNCTION void load_vector(const Stored* from, T (&to)[WIDTH]) {
  const AlignedVector<Stored> vector = *reinterpret_cast<const AlignedVector<Stored>*>(from);
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) to[k] = static_cast<T>(widened(vector.item[k]));
}

// The place of a token in the order of rows.
struct Place {
  Index row, column;
  BAND_FUNCTION void advance(Index row_length) {
    if (++column == row_length) {
      column = 0;
      ++row;
    }
  }
};

// In 32 bits if it can be.
BAND_FUNCTION Place place_of(Index token, Index row_length) {
  Place place;
  if (((token | row_length) >> 32) == 0) {
    place.row = static_cast<unsigned>(token) / static_cast<unsigned>(row_length);
    place.column = static_cast<unsigned>(token) % static_cast<unsigned>(row_length);
  } else {
    place.row = token / row_length;
    place.column = token % row_length;
  }
  return place;
}

template <class Stored>
BAND_FUNCTION typename Computed<Stored>::Type item(const Strided<Stored>& from, const Place& place) {
  return widened(from.data[place.row * from.row_stride + place.column * from.column_stride]);
}

// In assembly, because the compiler splits the store of an AlignedVector, and of its own float4, into scalars.
BAND_FUNCTION void store_vector(float* to, const float (&from)[WIDTH]) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3])
               : "memory");
#else
  *reinterpret_cast<AlignedVector<float>*>(to) = {{from[0], from[1], from[2], from[3]}};
#endif
}

BAND_FUNCTION void store_vector(BFloat16* to, const float (&from)[WIDTH]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("{.reg .b32 low, high; cvt.rn.bf16x2.f32 low, %2, %1; cvt.rn.bf16x2.f32 high, %4, %3;"
               " st.global.v2.b32 [%0], {low, high};}"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3])
               : "memory");
#else
  AlignedVector<BFloat16> vector;
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) vector.item[k] = narrowed(from[k], BFloat16());
  *reinterpret_cast<AlignedVector<BFloat16>*>(to) = vector;
#endif
}

BAND_FUNCTION void store_vector(double* to, const double (&from)[WIDTH]) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.f64 [%0], {%1, %2}; st.global.v2.f64 [%0+16], {%3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "d"(from[0]), "d"(from[1]), "d"(from[2]), "d"(from[3])
               : "memory");
#else
  *reinterpret_cast<AlignedVector<double>*>(to) = {{from[0], from[1], from[2], from[3]}};
#endif
}

}  // namespace bandpo
