"""The paper's experiment and the ``flare`` command. A training script needs nothing from this package.

The commands need the extra ``experiments`` (``pip install 'flare-kernels[experiments]'``), except ``flare info``. The
method (``flare.tuner``, ``flare.source``, ``flare.training``, ...) never imports this package.
"""
