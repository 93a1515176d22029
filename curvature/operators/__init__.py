"""Linear maps that are never formed, as pytrees."""
