// AVX2 with VNNI.
#include "avx2.h"

#include "attention.h"

extern const OgKernels og_avx2vnni;
static constexpr OgKernels made = table<Avx2Vnni>("avx2-vnni");
const OgKernels og_avx2vnni = made;
