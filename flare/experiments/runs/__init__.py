"""Run the paper's experiment on the user's own languages: fine-tune a base, train every method, and evaluate.

The folders of one experiment, all below its output folder:

    base/seed-0/                      the base, fine-tuned on the source language
    <target>/<variant>/seed-0/        one trained adapter; <variant> names its method and settings
    <target>/zero-shot/seed-0/        the base on the target language, without training
    <target>/translate-test/seed-0/   the base on the target's test texts in the source language

Each of these folders holds run.json (the settings) and metrics.json (the results). The module
:mod:`flare.experiments.runs.records` reads both files.
"""
