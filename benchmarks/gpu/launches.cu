// What launches.py asks of the CUDA runtime: an empty cooperative launch, to hold a resolve of one launch against, and what a captured graph holds.
#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace {
__global__ void empty() {}
}  // namespace

extern "C" int empty_cooperative(int blocks, void* stream) {
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(empty), dim3(blocks), dim3(128), nullptr, 0, static_cast<cudaStream_t>(stream));
}

// Counts kernels, and what copies or sets memory.
extern "C" int count_nodes(void* graph, int64_t* kernels, int64_t* memory) {
  size_t count = 0;
  cudaError_t error = cudaGraphGetNodes(static_cast<cudaGraph_t>(graph), nullptr, &count);
  if (error != cudaSuccess) return error;
  std::vector<cudaGraphNode_t> nodes(count);
  error = cudaGraphGetNodes(static_cast<cudaGraph_t>(graph), nodes.data(), &count);
  for (size_t i = 0; i < count && error == cudaSuccess; ++i) {
    cudaGraphNodeType type;
    error = cudaGraphNodeGetType(nodes[i], &type);
    *kernels += type == cudaGraphNodeTypeKernel;
    *memory += type == cudaGraphNodeTypeMemcpy || type == cudaGraphNodeTypeMemset;
  }
  return error;
}
