"""The version of Reprise."""

import importlib.metadata

# On package indexes `reprise` is another project.
DISTRIBUTION = "reprise-lm"


def installed_version() -> str:
    """Return the version of Reprise that is installed, such as 0.12.0."""
    return importlib.metadata.version(DISTRIBUTION)
