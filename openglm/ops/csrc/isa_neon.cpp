// NEON, as every 64-bit ARM has it.
#include "neon.h"

#include "attention.h"

extern const OgKernels og_neon;
static constexpr OgKernels made = table<Neon>("neon");
const OgKernels og_neon = made;
