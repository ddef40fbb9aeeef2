"""Helpers of the experiment: files, names, errors, processes, progress."""
