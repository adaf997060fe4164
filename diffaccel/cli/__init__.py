"""The `diffaccel` command: one file per group of commands."""

from diffaccel.cli.app import main as main
