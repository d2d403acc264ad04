"""Types by which the arguments of operators are annotated."""

Tensor = TensorSpec = DataType = object
