// NEON with dot products and matrix products of bytes (I8MM).
#include "neon.h"

#include "attention.h"

extern const OgKernels og_neon_i8mm;
static constexpr OgKernels made = table<NeonI8mm>("neon-i8mm");
const OgKernels og_neon_i8mm = made;
