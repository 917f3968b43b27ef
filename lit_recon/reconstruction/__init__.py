"""The method: the walk over the windows, and the fit of each."""
