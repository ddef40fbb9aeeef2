"""Runs of the paper's experiment on the user's own languages: fine-tune a base, train every method, evaluate.

The folders of one experiment, all below its output folder:

    base/seed-0/                      the base, fine-tuned on the source language
    <target>/<variant>/seed-0/        one trained adapter
    <target>/zero-shot/seed-0/        the base on the target language, without training
    <target>/translate-test/seed-0/   the base on the target's test texts in the source language

Each holds run.json (the settings) and metrics.json (the results); :mod:`flare.experiments.runs.records` reads them.
"""
