"""A stand-in for MindSpeed, where no checkout is at hand."""
