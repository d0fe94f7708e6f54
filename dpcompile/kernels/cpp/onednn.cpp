// Torch's matrix product by oneDNN.

using Matmul = void (*)(void* const&, void* const&, void* const&, float, float);

// Calls torch's product, and lets none of its exceptions out: 0, or 1 if it failed. A reference to an at::Tensor is one
// to the pointer that it holds.
extern "C" int dp_multiply(Matmul multiply, void* left, void* right, void* result) {
  try {
    multiply(left, right, result, 0.0f, 1.0f);
    return 0;
  } catch (...) {
    return 1;
  }
}
