"""A folder to work in, outside a checkout: what `reprise init` writes. The files themselves are in `template`."""
