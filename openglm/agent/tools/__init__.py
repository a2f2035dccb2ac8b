"""The tools that come with the package, one module each."""
