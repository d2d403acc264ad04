"""Loss files: scoring, origins and calibration. It knows no policy."""
