"""One file a family of gates: its formulas, each kind's exact forward and soft adjoint, and the rows of the table."""
