// Batches of tokens: strided arrays, loaded and stored several tokens at a time.

namespace bandpo {

const int WIDTH = 4;    // tokens in a vector, which a thread loads at a time
const int VECTORS = 8;  // vectors of a thread in a chunk: 32 tokens, below the 64 at which packed counts overflow
const int CHUNK = THREADS * WIDTH * VECTORS;  // tokens that a block adds up to one partial result

template <class T>
struct alignas(sizeof(T) * WIDTH < 16 ? sizeof(T) * WIDTH : 16) AlignedVector {
  T item[WIDTH];
};

// An array of shape [rows, row_length]. It is `vectorised` if it is contiguous and aligned for vectors.
template <class Stored>
struct Strided {
  const Stored* data;
  Index row_stride, column_stride;
  bool vectorised;
};

// Loads `count` tokens, in the order of rows, of which the first has index `first`.
template <class Stored, class T>
BAND_FUNCTION void load(const Strided<Stored>& from, Index first, int count, Index row_length, T (&to)[WIDTH]) {
  if (from.vectorised && count == WIDTH) {
    const AlignedVector<Stored> vector = *reinterpret_cast<const AlignedVector<Stored>*>(from.data + first);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) to[k] = static_cast<T>(widened(vector.item[k]));
    return;
  }
  // One division for all of them, though they may lie in several rows; in 32 bits if it can be.
  Index row, column;
  if (((first | row_length) >> 32) == 0) {
    row = static_cast<unsigned>(first) / static_cast<unsigned>(row_length);
    column = static_cast<unsigned>(first) % static_cast<unsigned>(row_length);
  } else {
    row = first / row_length;
    column = first % row_length;
  }
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    if (k >= count) break;
    to[k] = static_cast<T>(widened(from.data[row * from.row_stride + column * from.column_stride]));
    if (++column == row_length) {
      column = 0;
      ++row;
    }
  }
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

template <class T>
BAND_FUNCTION void store(T* to, Index first, int count, bool vectorised, const T (&from)[WIDTH]) {
  if (vectorised && count == WIDTH) {
    store_vector(to + first, from);
    return;
  }
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    if (k < count) to[first + k] = from[k];
  }
}

}  // namespace bandpo
