"""What the library's derivatives cost, measured on the machine at hand."""
