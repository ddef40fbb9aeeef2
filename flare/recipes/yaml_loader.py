"""How YAML is read here."""

from __future__ import annotations

import re

import yaml


class YamlLoader(yaml.SafeLoader):
    """YAML in which 2e-5 is a number, as people write it."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
