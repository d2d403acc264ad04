"""Parameter inheritance: find the teacher, measure and choose its layers, and cut the smaller model."""
