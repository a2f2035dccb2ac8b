// Plain C++: the reference, and what machines without a vector unit of ours run; in eight and in sixteen lanes.
#include "attention.h"

extern const OgKernels og_plain, og_plain16;
static constexpr OgKernels eight = table<Plain<8>>("plain"), sixteen = table<Plain<16>>("plain16");
const OgKernels og_plain = eight, og_plain16 = sixteen;
