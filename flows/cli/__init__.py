"""The `reprise` command: argparse and printing. It may import every room, lazily; nothing imports it."""
