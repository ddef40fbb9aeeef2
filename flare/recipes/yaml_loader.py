"""YAML loader of recipes and configuration files."""

from __future__ import annotations

import re

import yaml


class YamlLoader(yaml.SafeLoader):
    """Safe YAML loader that also reads 2e-5 as a number (YAML 1.1 requires 2.0e-5)."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
