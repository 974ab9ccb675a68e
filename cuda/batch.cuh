// Arrays of tokens: shapes, strides, loads and stores in vectors.

namespace bandpo {

const int WIDTH = 4;         // tokens that a thread loads at a time
const int VECTORS = 8;       // times that it does so in a chunk: 32 tokens, which Outcome::flags can hold
const int CHUNK = THREADS * WIDTH * VECTORS;  // tokens that are added up to one partial result

template <class T>
struct alignas(sizeof(T) * WIDTH < 16 ? sizeof(T) * WIDTH : 16) Vector {
  T item[WIDTH];
};

// An argument of shape [rows, row_length]. `whole` says that it is contiguous and aligned for vectors.
template <class Stored>
struct Source {
  const Stored* data;
  Index row_stride, column_stride;
  bool whole;
};

template <class Stored, class T>
__device__ __forceinline__ void load(const Source<Stored>& from, Index first, int count, Index row_length,
                                     T (&to)[WIDTH]) {
  if (from.whole && count == WIDTH) {
    const Vector<Stored> vector = *reinterpret_cast<const Vector<Stored>*>(from.data + first);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) to[k] = static_cast<T>(widened(vector.item[k]));
    return;
  }
  // One division for the vector; its tokens may lie in several rows. Most batches allow a short division.
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

// In assembly: the compiler takes a store of a Vector, and of its own float4, apart.
__device__ __forceinline__ void store_vector(float* to, const float (&from)[WIDTH]) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3])
               : "memory");
#else
  *reinterpret_cast<Vector<float>*>(to) = {{from[0], from[1], from[2], from[3]}};
#endif
}

__device__ __forceinline__ void store_vector(double* to, const double (&from)[WIDTH]) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.f64 [%0], {%1, %2}; st.global.v2.f64 [%0+16], {%3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "d"(from[0]), "d"(from[1]), "d"(from[2]), "d"(from[3])
               : "memory");
#else
  *reinterpret_cast<Vector<double>*>(to) = {{from[0], from[1], from[2], from[3]}};
#endif
}

template <class T>
__device__ __forceinline__ void store(T* to, Index first, int count, bool whole, const T (&from)[WIDTH]) {
  if (whole && count == WIDTH) {
    store_vector(to + first, from);
    return;
  }
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    if (k < count) to[first + k] = from[k];
  }
}

}  // namespace bandpo
