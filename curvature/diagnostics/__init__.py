"""Diagnostics of derivatives: ``check_derivatives`` tests them, ``explain`` compares the cost of modes."""
