"""From a function to a derivative of it; stateless."""
