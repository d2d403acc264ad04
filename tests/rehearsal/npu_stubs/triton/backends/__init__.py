"""What torch looks for in Triton as it is imported."""
