"""One file a family of gates: the exact forward, the soft adjoint, and the rows of the table that they make."""
