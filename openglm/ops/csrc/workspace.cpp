// What a caller makes and checks before it runs anything.
#include "workspace.h"

// Sizes of the structures, for a caller to see whether it was written for this library.
OG_API int64_t og_layout() {
  int64_t layout = 0;
  for (int64_t n :
       {sizeof(OgModel), sizeof(OgLayer), sizeof(OgPool), sizeof(OgBatch), sizeof(OgStream), sizeof(OgBurst)})
    layout = layout * 1024 + n;
  return layout;
}

OG_API void *og_workspace_new() { return new openglm::Workspace; }
OG_API void og_workspace_free(void *w) { delete (openglm::Workspace *)w; }
