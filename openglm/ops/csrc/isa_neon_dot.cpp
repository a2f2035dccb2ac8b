// NEON with dot products (DotProd).
#include "neon.h"

#include "attention.h"

extern const OgKernels og_neon_dot;
static constexpr OgKernels made = table<NeonDot>("neon-dotprod");
const OgKernels og_neon_dot = made;
