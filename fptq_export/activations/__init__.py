"""Look at activations: what every linear reads in calibration and on held-out text -> `stats.json`, `stats.svg`.

The question behind it is whether calibration is representative. Nothing is imported here: the command line reads the
options without loading torch.
"""
