"""From an operator and a right-hand side to an answer and how it was reached."""
