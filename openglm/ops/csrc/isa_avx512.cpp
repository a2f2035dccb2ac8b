// AVX-512 with VNNI.
#include "avx512.h"

#include "attention.h"

extern const OgKernels og_avx512;
static constexpr OgKernels made = table<Avx512>("avx512-vnni");
const OgKernels og_avx512 = made;
