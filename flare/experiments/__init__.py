"""The paper's experiment and the command line: everything that is not part of a training script.

Needs the extra ``experiments`` (``pip install 'flare-kernels[experiments]'``). The method (``flare.tuner``,
``flare.source``, ``flare.training``, ...) never imports it.
"""
