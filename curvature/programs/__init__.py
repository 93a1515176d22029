"""Reading a function as a program (a jaxpr): legality, batch axes, affine operations, taps, jets."""
