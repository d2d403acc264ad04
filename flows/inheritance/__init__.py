"""Parameter inheritance: find the teacher, measure its layers, choose, and cut the smaller model."""
