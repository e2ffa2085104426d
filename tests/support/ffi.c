/* A library with the ABI of a compiled kernel, whose functions run without a GPU. Argument i: args[i], of type
   {int32 type_index, int32 zero, int64 value}; 1 is the type index of an integer. Returns 0. */
#include <stdint.h>

typedef struct { int32_t type; int32_t zero; int64_t value; } any;

int __tvm_ffi_mla_decode(void *self, const any *args, int32_t count, any *result) {
  result->type = 1;
  result->value = count == 2 ? args[0].value + args[1].value : -1;
  return 0;
}

/* stands for loading the kernels into the driver: counts its calls */
#define CUDA_LOAD(op) \
  int __tvm_ffi_##op##_cuda_load(void *self, const any *args, int32_t count, any *result) { \
    static int64_t calls; \
    result->type = 1; \
    result->value = ++calls; \
    return 0; \
  }
#define OP(op) \
  int __tvm_ffi_##op(void *self, const any *args, int32_t count, any *result) { \
    return __tvm_ffi_mla_decode(self, args, count, result); \
  } \
  CUDA_LOAD(op)

CUDA_LOAD(mla_decode)
OP(mla_prefill)
OP(merge_attn_states)
OP(gather_latent)
