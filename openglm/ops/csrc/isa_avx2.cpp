// AVX2, FMA and F16C.
#include "avx2.h"

#include "attention.h"

extern const OgKernels og_avx2;
static constexpr OgKernels made = table<Avx2>("avx2");
const OgKernels og_avx2 = made;
