"""Engines and clusters: where the work of data stages runs. The only room, with the Ray launcher, that imports Ray."""
