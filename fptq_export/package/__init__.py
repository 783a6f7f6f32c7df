"""Package: what a run directory says about itself."""
