"""`lori schema`: print the JSON schema of configurations."""

import argparse

SUMMARY = "print the JSON schema of configurations"
HELP = """\
Prints the JSON schema of configurations, or with --yaml all keys with their defaults and descriptions. An editor with a
YAML language server completes and checks a file that begins with a line such as
  # yaml-language-server: $schema=config.schema.json

examples:
  lori schema > config.schema.json
  lori schema --yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yaml", action="store_true", help="all keys with their defaults and descriptions, as YAML")


def run(arguments: argparse.Namespace) -> None:
    from lori_dist.config import schema

    print(schema.as_yaml() if arguments.yaml else schema.text(), end="")
