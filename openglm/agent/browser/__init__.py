"""The parts of the web browser: what may be fetched, how pages become lines, where searches go, what may be cited."""
