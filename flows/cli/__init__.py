"""The `reprise` command: argparse and printing. It may import every room, lazily; no room imports it."""
