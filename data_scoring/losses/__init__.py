"""Loss files: written, identified by origin, calibrated. It knows no policy."""
