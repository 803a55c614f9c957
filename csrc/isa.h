// Code that is compiled several times: for each instruction set, for the GPU, and for tests of what the GPU runs.
#pragma once

// Each of them compiles it in a namespace of its own: no inline function of one is ever linked into another.
#ifndef MMFAST_ISA
#define MMFAST_ISA portable
#endif

#define MMFAST_INLINE inline __attribute__((always_inline))

// MMFAST_HD: on the host and on the GPU. MMFAST_APART: there a function of its own. The assembler takes minutes over all solvers in one piece.
#ifdef __CUDACC__
#define MMFAST_HD __host__ __device__
#define MMFAST_APART __host__ __device__ __noinline__
#else
#define MMFAST_HD
#define MMFAST_APART inline
#endif
