"""The paper's experiment and the command line: everything that is not part of a training script.

The commands need the extra ``experiments`` (``pip install 'flare-kernels[experiments]'``), except ``flare info``. The
method (``flare.tuner``, ``flare.source``, ``flare.training``, ...) never imports this package.
"""
